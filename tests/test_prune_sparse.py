"Laws of selection and of the sparse file, on inputs nobody thought of"
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from fastquant.all import *
from fastquant.prune.structures import cut, find_structure
from fastquant.prune.select import Selection, select
from fastquant.prune.regrow import erk
from fastquant.export.sparse import decode, encode, from_sparse, to_sparse

dtypes = torch.float32,torch.float64,torch.float16,torch.bfloat16,torch.int8,torch.uint8,torch.int16,torch.int32,torch.int64,torch.bool
shapes = st.lists(st.integers(0, 9), max_size=4)
layers_ = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12), st.sampled_from([(),(3,),(3,3),(1,1)])), min_size=1, max_size=4)

def bits(t): return t.contiguous().reshape(-1).view(torch.uint8)
def random_tensor(shape, dtype, left, seed):
    g = torch.Generator().manual_seed(seed)
    t = torch.randn(shape, generator=g)*40*(torch.rand(shape, generator=g)<left)
    return t.clamp(0 if dtype is torch.uint8 else -100, 100).to(dtype)

@settings(max_examples=150, deadline=None)
@given(shapes, st.sampled_from(dtypes), st.sampled_from([0,.01,.1,.5,1]), st.integers(0, 1000))
def test_tensor_there_and_back(shape, dtype, left, seed):
    t = random_tensor(shape, dtype, left, seed)
    data,facts = encode(t)
    back = decode(data, facts)
    assert back.dtype==t.dtype and back.shape==t.shape and bits(back).equal(bits(t))
    assert len(data)<=t.numel()*t.element_size()

@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(shapes, st.sampled_from(dtypes)), max_size=4), st.integers(0, 1000), st.data())
def test_damaged_files(tensors, seed, data):
    "Any byte changed: an error that is a `ValueError`, or the very same tensors"
    want = {f't{i}':random_tensor(s, d, .3, seed) for i,(s,d) in enumerate(tensors)}
    file = to_sparse(want, about='me')
    bad = bytearray(file)
    bad[data.draw(st.integers(0, len(bad)-1))] ^= data.draw(st.integers(1, 255))
    try: got,about = from_sparse(bytes(bad), max_bytes=2**24)
    except ValueError: return
    assert about==dict(about='me') and got.keys()==want.keys() and all(bits(got[k]).equal(bits(t)) for k,t in want.items())

def make(spec): return {str(i):([nn.Linear,nn.Conv1d,nn.Conv2d][len(k)](a, b, *([k] if k else []))) for i,(a,b,k) in enumerate(spec)}

@settings(max_examples=100, deadline=None)
@given(layers_, st.floats(.01, .99), st.lists(st.floats(.05, 1), max_size=4), st.sampled_from(['weight','row','filter']), st.sampled_from(['global','local']))
def test_selection(spec, amount, shares, structure, scope):
    "What is pruned stays so, groups stay whole, and single weights meet the amount exactly, or a layer is named"
    layers = make(spec)
    masks = {k:torch.ones_like(m.weight, dtype=torch.bool) for k,m in layers.items()}
    for share in [*sorted(shares),1.]:
        try: new = select(layers, masks, Selection(amount, structure, 'magnitude', scope), share)
        except ValueError as e:
            assert 'Nothing would be left of' in str(e)
            return
        for k in layers:
            assert (new[k]<=masks[k]).all()
            g = cut(layers[k], new[k], find_structure(structure))
            assert (g.all(-1)|~g.any(-1)).all()
        masks = new
    if structure=='weight':
        if scope=='global': assert sum((~m).sum().item() for m in masks.values())==round(amount*sum(m.numel() for m in masks.values()))
        else: assert all((~m).sum().item()==round(amount*m.numel()) for m in masks.values())

@settings(max_examples=50, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(2, 8), st.data())
def test_n_of_m(out, runs, m, data):
    n = data.draw(st.integers(1, m-1))
    conv = {'c':nn.Conv2d(runs*m, out, 3)}
    keep = select(conv, {'c':torch.ones_like(conv['c'].weight, dtype=torch.bool)}, Selection(structure=NM(n, m)))['c']
    assert (keep.movedim(1,-1).unflatten(-1, (runs,m)).sum(-1)==n).all()

@pytest.mark.parametrize('amount', [.5,.9,.97])
def test_erk_adds_up(amount):
    layers = make([(3,16,(3,3)), (16,32,(3,3)), (32,64,(3,3)), (64,10,())])
    n = {k:m.weight.numel() for k,m in layers.items()}
    got = erk(layers, amount)
    assert abs(sum(got[k]*n[k] for k in n)-amount*sum(n.values()))<1e-6 and all(0<=a<1 for a in got.values())
