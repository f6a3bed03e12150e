"What a mask must not do to the model it is on"
import gc, pytest, torch
from torch import nn
from weakref import ref
from fastquant.all import *
from fastquant.prune.mask import set_mask

@pytest.mark.parametrize('trained', [False,True])
def test_a_pruned_model_is_let_go(trained):
    "Nothing holds it once nobody has it: a hook on a tensor is out of the garbage collector's sight, and so is what it holds"
    m = nn.Linear(8, 4)
    set_mask(m, torch.rand(4, 8)<.5)
    if trained: m(torch.randn(2, 8)).sum().backward()
    gone = ref(m)
    del m
    gc.collect()
    assert gone() is None
