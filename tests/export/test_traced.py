"The graph that needs no second trace computes what the model does, whatever is in place and whoever looks at it"
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import functional as F
from fastquant.export.traced import simplify

ops = dict(relu=F.relu, relu_=F.relu_, add_=lambda x: x.add_(1), times=lambda x: x*2, mul_=lambda x: x.mul_(-3), flat=lambda x: x.flatten(1),
    part=lambda x: x[:,:1], dropout=lambda x: F.dropout(x, .5, False), dropout_=lambda x: F.dropout(x, .5, False, inplace=True), clone=torch.clone, turned=lambda x: x.mT)
step = st.tuples(st.sampled_from(sorted(ops)), st.integers(0, 20))

class Steps(nn.Module):
    "Each step does something to what an earlier one made; all of it is returned"
    def __init__(self, steps):
        super().__init__()
        self.steps = steps
    def forward(self, x):
        made = [x+0]
        for name,i in self.steps: made.append(ops[name](made[i%len(made)]))
        return tuple(made)

@settings(max_examples=25, deadline=None)
@given(st.lists(step, min_size=1, max_size=6))
def test_computes_what_the_model_does(steps):
    model,x = Steps(steps).eval(),torch.randn(2,3)
    program = torch.export.export(model, (x,), strict=False)
    simplify(program)
    for y,z in zip(program.module()(x.clone()), model(x.clone()), strict=True): assert y.equal(z)

def test_an_input_in_place_stays_so():
    class Net(nn.Module):
        def forward(self, x): return x.relu_()
    x,y = torch.randn(2,3),torch.randn(2,3)
    program = torch.export.export(Net(), (x,), strict=False)
    simplify(program)
    program.module()(y)
    assert y.min()>=0
