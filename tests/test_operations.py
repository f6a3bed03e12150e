"Operations of a model that is not a plain stack of layers: each keeps its place, whatever runs beside it, and does to its arguments what it does in float"
import copy, pickle, pytest, torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from fastquant.quant.fakequant import Site, fake_quant_of
from fastquant.quant.prepare import prepare, set_ranges, watch
from fastquant.quant.spec import Spec
from fastquant.quant.train import follow, unseen

x = torch.randn(8,3,8,8, generator=torch.Generator().manual_seed(0))

class Residual(nn.Module):
    "Three residual blocks whose sums are larger than what goes in, and one ReLU for everything"
    def __init__(self):
        super().__init__()
        self.first,self.head,self.aux = nn.Conv2d(3,4,1),nn.Conv2d(4,2,1),nn.Conv2d(4,4,1)
        self.blocks,self.relu = nn.ModuleList(nn.Conv2d(4,4,1) for _ in range(3)),nn.ReLU()
        for i,b in enumerate(self.blocks): nn.init.constant_(b.weight, 2.*(i+1))
    def before(self, x): return x
    def body(self, x):
        for b in self.blocks: x = x+self.inside(self.relu(b(x)))
        return x
    def inside(self, x): return x
    def forward(self, x): return self.head(self.body(self.relu(self.first(self.before(x)))))

class Noise(Residual):
    def before(self, x): return x+torch.randn_like(x) if self.training else x
class Mix(Residual):
    def before(self, x):
        if self.training: x = .9*x+.1*x.flip(0)
        return x
class ByHand(Residual):
    def inside(self, x): return x*(torch.rand_like(x)>.1)/.9 if self.training else x
class Auxiliary(Residual):
    def inside(self, x):
        if self.training: self.extra = (x+self.relu(self.aux(x))*1e3).mean().item()
        return x
class Reshaped(Residual):
    def inside(self, x):
        if self.training: x = x.flatten(1).view_as(x)+0
        return x
class Recomputed(Residual):
    def body(self, x):
        if self.training: return checkpoint(self.steps, x, use_reentrant=False)
        return self.steps(x)
    def steps(self, x): return super().body(x)
class Depth(Residual):
    def body(self, x):
        for i,b in enumerate(self.blocks):
            if self.training and i==1: continue
            x = x+self.inside(self.relu(b(x)))
        return x

def seen(model):
    "Ranges of a prepared model, by place, after training mode has run once"
    fake_quant_of(model.train()).how = Site.follow
    model(x)
    follow(model)
    r = fake_quant_of(model)
    return dict(zip(r.sites, [r.range[s.i,:2].tolist() for s in r.sites.values()]))

def prepared(cls):
    torch.manual_seed(0)
    return prepare(cls(), Spec().excluding('aux'), x)

@pytest.mark.parametrize('cls', [Noise,Mix,ByHand,Auxiliary,Reshaped,Recomputed,Depth])
def test_place_is_kept(cls):
    "What else training runs shifts no range: the last sum is far larger than anything else"
    net = prepared(cls)
    want,got = seen(prepared(Residual)),seen(net)
    assert list(got)==list(want)
    skipped = {('','add',1),('relu','relu',2)} if cls is Depth else set()
    for k in set(want)-skipped: assert .3*want[k][1]<got[k][1]<3*want[k][1] or cls is Depth, (k, want[k], got[k])
    assert {k for k,(_,hi) in got.items() if hi!=hi}==skipped

def test_place_is_in_a_copy_and_in_a_pickle():
    net = prepared(Noise)
    want = seen(net)
    for twin in (copy.deepcopy(net),pickle.loads(pickle.dumps(net))):
        fake_quant_of(twin).range.fill_(torch.nan)
        torch.manual_seed(1)
        assert set(seen(twin))==set(want) and not unseen(twin)

class Split(Residual):
    "Does in training on another line what it does in evaluation"
    def body(self, x):
        if self.training: return x+self.blocks[0](x)
        return x+self.blocks[0](x)

def test_what_never_ran_is_named_with_its_place():
    net = Split()
    del net.blocks[1:], net.aux
    prepare(net, 'int8', x)
    seen(net)
    never = unseen(net)
    assert len(never)==1 and 'line 3, column 15 of Split.body' in never[0], never

class Turns(Residual):
    "Turns of a loop that look the same"
    def body(self, x):
        n = 2+self.more
        while n: x,n = x+self.blocks[0](x),n-1
        return x

@pytest.mark.parametrize('more', [-1,1])
def test_turns_that_cannot_be_told_apart(more):
    net = Turns()
    del net.blocks[1:], net.aux
    net.more = 0
    prepare(net, 'int8', x)
    seen(net)
    net.more = more
    with pytest.raises(ValueError, match='ran . times in this pass, and 2 times'): seen(net)
    net.more = 0
    watch(net, x)
    set_ranges(net)
