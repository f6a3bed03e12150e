"Laws of selection, on inputs nobody thought of"
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from fastquant.all import *
from fastquant.prune.structures import cut, find_structure
from fastquant.prune.select import Selection, select
from fastquant.prune.regrow import erk

layers_ = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12), st.sampled_from([(),(3,),(3,3),(1,1)])), min_size=1, max_size=4)

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
