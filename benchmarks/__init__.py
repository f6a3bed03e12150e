"Measurements that the docs read from `results/`: see `README.md`"
