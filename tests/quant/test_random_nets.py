"Nets that nobody has drawn: random stacks of layers, joined at random, whose file has to do what the simulation does"
import copy, pytest, random, torch
import torch.nn.functional as F
from torch import nn
from fastquant.all import *
from fastquant.export.verify import verify

class Random(nn.Module):
    "Random convolutions, normalisations, activations, moves and joins over a few running tensors"
    def __init__(self, seed, width=8):
        super().__init__()
        self.rng,self.steps,self.shared,self.mods = random.Random(seed),[],False,nn.ModuleList([nn.Conv2d(3, width, 3, padding=1)])
        for i in range(10): self.steps.append(getattr(self, self.rng.choice(['conv','conv','conv','norm','act','join','shrink','again','permute']))(width, i))
        self.head = nn.Linear(width, 5)
    def add(self, m):
        self.mods.append(m)
        return len(self.mods)-1
    def conv(self, w, i):
        k,groups,bias = self.rng.choice([1,3,5]),self.rng.choice([1,2,w]),self.rng.random()<.5
        j = self.add(nn.Conv2d(w, w, k, padding=k//2, groups=groups, bias=bias, padding_mode=self.rng.choice(['zeros','reflect'])))
        return lambda m,xs: [m.mods[j](xs[0]), *xs]
    def norm(self, w, i):
        j = self.add(nn.BatchNorm2d(w, eps=self.rng.choice([1e-5,1e-3])))
        return lambda m,xs: [m.mods[j](xs[0]), *xs[1:]]
    def act(self, w, i):
        f = self.rng.choice([F.relu, F.relu6, F.silu, F.hardswish, F.gelu, F.hardtanh, torch.sigmoid, lambda x: F.leaky_relu(x, .1)])
        return lambda m,xs: [f(xs[0]), *xs[1:]]
    def join(self, w, i):
        how = self.rng.choice(['add','mul','cat','iadd'])
        def f(m, xs):
            a,b = xs[0],xs[-1]
            if how=='add': return [a+b, *xs[1:]]
            if how=='mul': return [a*b.sigmoid(), *xs[1:]]
            if how=='cat': return [torch.cat([a[:,:w//2], b[:,w//2:]], 1), *xs[1:]]
            c = a.clone()
            c += b
            return [c, *xs[1:]]
        return f
    def shrink(self, w, i):
        pool = self.rng.choice([F.max_pool2d, F.avg_pool2d])
        return lambda m,xs: [F.interpolate(pool(xs[0], 2), scale_factor=2., mode='nearest'), *xs[1:]]
    def again(self, w, i):
        self.shared = True
        j = self.rng.choice([k for k,m in enumerate(self.mods) if isinstance(m, nn.Conv2d) and k] or [self.add(nn.Conv2d(w, w, 1))])
        return lambda m,xs: [m.mods[j](xs[0]), *xs]
    def permute(self, w, i): return lambda m,xs: [xs[0].permute(0,1,3,2).flip(3), *xs[1:]]
    def forward(self, x):
        xs = [self.mods[0](x)]
        for s in self.steps: xs = s(self, xs)
        return self.head(xs[0].mean((2,3)) if isinstance(xs[0], torch.Tensor) else xs[0])
    def __deepcopy__(self, memo):
        new = object.__new__(type(self))
        memo[id(self)] = new
        new.__dict__ = {k:v if k=='steps' else copy.deepcopy(v, memo) for k,v in self.__dict__.items()}
        return new

@pytest.mark.parametrize('seed', range(16))
def test_file_equals_simulation(seed):
    torch.manual_seed(seed)
    net = Random(seed)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d): nn.init.normal_(m.weight, .5, .5)
    x = torch.randn(16, 3, 12, 12)
    with torch.no_grad():
        for _ in range(30): net(x)
    net.eval()
    sim = prepare(copy.deepcopy(net), 'int8', x, fold=True)
    with torch.no_grad(): assert sqnr(net(x), sim(x))>60, 'folding changed the model'
    watch(sim, x)
    set_ranges(sim)
    rounded = copy.deepcopy(sim)
    report = verify(net, rounded, convert(sim), to_onnx(sim, x).SerializeToString(), [(x,)])
    # a ReLU whose grid is shared with the signed input of a layer that runs twice cannot be fused
    assert set(report.float_layers.values())<=({'ONNX Runtime runs it as FusedConv'} if net.shared else set()), report
    assert report.sqnr>25 and report.sqnr_float>8, (report.sqnr, report.sqnr_float)
