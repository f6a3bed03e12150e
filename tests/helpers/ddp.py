"Two processes with gloo on a CPU, for fastai's own `distrib_ctx(sync_bn=False, cpu=True)`"
import os, socket, torch
from contextlib import contextmanager
import torch.multiprocessing as mp
from fastai.distributed import DistributedDL

def _broadcast(self, t, rank):
    "fastai's own puts the indices on a GPU"
    t = torch.LongTensor(t)
    torch.distributed.broadcast(t, rank)
    return t.tolist()

def _work(rank, port, f, args):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', LOCAL_WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), ACCELERATE_USE_CPU='true')
    torch.set_num_threads(1)
    DistributedDL._broadcast = _broadcast
    torch.distributed.init_process_group('gloo')
    f(rank, *args)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()

def two_processes(f, *args):
    "Run `f(rank, *args)` in two processes at once; it has to be a module's own function"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    mp.start_processes(_work, (port, f, args), nprocs=2, start_method='forkserver') # of a server that has imported what takes long, see conftest.py

def joined(n, bs):
    "Indices of the first `2*n` items as one process has to see them, in batches of `2*bs`, to see what two see that split them"
    return [i+r*n for j in range(0, n, bs) for r in (0,1) for i in range(j, j+bs)]

@contextmanager
def single():
    "fastai gathers metrics from all processes, unless it is told that there is one"
    os.environ['WORLD_SIZE'] = '0'
    try: yield
    finally: os.environ['WORLD_SIZE'] = '2'
