"Operations of a model that is not a plain stack of layers: each keeps its place, whatever runs beside it, and does to its arguments what it does in float"
import copy, math, pickle, pytest, torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint
from fastquant.export.engine import Engine
from fastquant.export.onnx import to_onnx
from fastquant.export.verify import sqnr, verify
from fastquant.prune.structures import groups
from fastquant.quant.convert import convert
from fastquant.quant.fakequant import fake_quant_of
from fastquant.quant.site import Site
from fastquant.quant.prepare import prepare, set_ranges, watch
from fastquant.quant.spec import Spec
from fastquant.quant.train import follow, unseen
from tests.helpers.files import rounds

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

def test_what_the_model_itself_computes_has_its_name():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b = nn.Linear(4, 4),nn.Linear(4, 4)
        def forward(self, x): return self.b(self.a(x)+x)
    r = fake_quant_of(prepare(Net(), 'int8', torch.randn(4, 4)))
    assert [s.name.split(' (')[0] for s in r.all]==['input 0','a','Net']
    with pytest.raises(ValueError, match="The output of 'Net' ranges from"): r.check_range(r.all[-1], torch.tensor(torch.nan), torch.tensor(1.), 'here')

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

class Numbered(Residual):
    "One turn more in training, and a loop that says which"
    def body(self, x):
        for i in range(2+self.training): x = x+self.blocks[0](x)
        return x

def test_turns_that_evaluation_does_not_have():
    net = Numbered()
    del net.blocks[1:], net.aux
    prepare(net, 'int8', x)
    with pytest.raises(ValueError, match='ran in turn 2 of its loop, which the pass that was traced, in evaluation, did not have'): seen(net)

def stmt(f):
    "A net of three convolutions around `f`"
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b,self.c = nn.Conv2d(3,4,3,padding=1),nn.Conv2d(4,4,1),nn.Conv2d(4,2,1)
        def forward(self, x): return self.c(f(self.a(x), self.b))
    torch.manual_seed(0)
    return Net()

def relu(a, b):
    F.relu(a, inplace=True)
    y = b(a)
    y.relu_()
    return y
def clip(a, b):
    a.clamp_(min=0)
    return b(a).clamp_(0, 6)
def add(a, b):
    y = b(a)
    y.add_(a)
    return y
def mul(a, b):
    y = b(a)
    y.mul_(a)
    y.mul_(.5)
    return y
def silu(a, b):
    F.silu(a, inplace=True)
    y = b(a)
    F.silu(y, inplace=True)
    return y
def part(a, b):
    y = b(a)
    y[:,:2].relu_()
    return y
def earlier_view(a, b):
    y = b(a)
    seen = y.flatten(2)
    y.relu_()
    return seen.view_as(y)
def put(a, b):
    y = b(a*1)
    y[:,1:] = a[:,1:]
    return y
def mask(a, b):
    y = b(a)
    y[y<0] = 0
    return y
def made_before(a, b):
    y = torch.zeros_like(a)
    y[:,:2],y[:,2:] = b(a)[:,2:],a[:,:2]
    return y
def copied(a, b):
    y = torch.empty_like(a)
    y.copy_(b(a))
    return y
def indexed(a, b):
    y = b(a)
    y.index_put_((torch.tensor([0,1]),), a[:2])
    return y
def keyword(a, b): return b(F.relu(input=a))

def plain(f):
    "What `f` does, without writing into anything"
    return dict(relu=lambda a,b: b(a.relu()).relu(), clip=lambda a,b: b(a.clamp(min=0)).clamp(0, 6), add=lambda a,b: b(a)+a,
        mul=lambda a,b: b(a)*a*.5, silu=lambda a,b: F.silu(b(F.silu(a))), keyword=lambda a,b: b(a.relu())).get(f.__name__)

effects = [relu,clip,add,mul,silu,part,earlier_view,put,mask,made_before,copied,indexed,keyword]

@pytest.mark.parametrize('f', effects)
def test_effects_are_those_of_float(f):
    "Nothing is rounded: to the bit. Rounded: close, with all layers in int8. Converted: as when it rounds"
    net = stmt(f).eval()
    with torch.no_grad():
        want = net(x)
        prepare(net, 'int8', x)
        assert net(x).equal(want) and not fake_quant_of(net).float_layers
        watch(net, x)
        set_ranges(net)
        rounded = net(x)
        assert sqnr(want, rounded)>30
        assert sqnr(rounded, convert(copy.deepcopy(net))(x))>40
    net.train()
    fake_quant_of(net).how = Site.follow
    assert net(x).equal(rounded)

@pytest.mark.parametrize('f', [f for f in effects if plain(f)])
def test_effects_have_the_gradients_of_values(f):
    nets = [stmt(f),stmt(plain(f))]
    for net in nets:
        rounds(net, 'int8', x, fold=False)
        net.train()(x).square().sum().backward()
    for p,q in zip(*(n.parameters() for n in nets), strict=True): assert torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize('f', [relu,add,silu,part,put])
def test_file_has_the_effects(f):
    net = stmt(f).eval()
    rounded = rounds(copy.deepcopy(net), 'int8', x, fold=False)
    sim = convert(copy.deepcopy(rounded))
    report = verify(net, rounded, sim, to_onnx(sim, x).SerializeToString(), [(x,)])
    assert report.n_int8==report.n_layers==3, report

class Born(nn.Module):
    "Activations that are made from `f` of the batch"
    def __init__(self, f, n):
        super().__init__()
        self.f,self.emb,self.lin,self.head = f,nn.Embedding(9,4),nn.Linear(n,8),nn.Linear(8,2)
    def forward(self, x): return self.head(self.lin(self.f(self, x)).relu())

ids = torch.arange(16).view(8,2)%9
born = dict(embedding=(lambda m,x: m.emb(x).flatten(1), 8, ids), cast=(lambda m,x: x.float()/9, 2, ids),
    bytes=(lambda m,x: x.to(torch.float32)-3, 2, ids.byte()), one_hot=(lambda m,x: F.one_hot(x, 9).float().flatten(1), 18, ids),
    spectrum=(lambda m,x: torch.fft.rfft(x).abs(), 5, torch.randn(8,8)),
    mask=(lambda m,x: (x>0).float(), 8, torch.randn(8,8)), table=(lambda m,x: m.emb.weight[x].sum(1), 4, ids))

@pytest.mark.parametrize('name', born)
def test_born_inside(name):
    "What is made from integers or complex numbers is an activation, and the last layer is found"
    f,n,x = born[name]
    net = Born(f, n).eval()
    assert list(groups(net, 'weight', x)[0])==['lin']
    with torch.no_grad():
        want = net(x)
        rounds(net, 'int8', x, fold=False)
        assert set(fake_quant_of(net).layers)=={'lin','head'} and sqnr(want, net(x))>25

class Both(nn.Module):
    "An int8 layer and a float operation that use the same value, which `f` makes"
    def __init__(self, f):
        super().__init__()
        self.f,self.lin,self.norm = f,nn.Linear(8,8),nn.LayerNorm(8)
    def forward(self, x):
        x = self.f(self, x)
        return x, x+.001*self.lin(x).tanh()

@pytest.mark.parametrize('f', [lambda m,x: x, lambda m,x: m.norm(x), lambda m,x: x.exp().flatten(1)])
def test_what_stays_in_float_gets_floats(f):
    net = Both(f).eval()
    x = torch.randn(16,8)
    rounded = rounds(copy.deepcopy(net), 'int8', x, fold=False)
    sim = convert(copy.deepcopy(rounded))
    with torch.no_grad():
        for m in (rounded,sim): assert m(x)[0].equal(net(x)[0]) and 60<sqnr(net(x)[1], m(x)[1])<200
    report = verify(net, rounded, sim, to_onnx(sim, x).SerializeToString(), [(x,)])
    assert report.n_int8==1

class Clipped(nn.Module):
    "A layer that reads what `act` makes of its own output; and the batch as well, if `twice`, on the same grid"
    def __init__(self, act, twice):
        super().__init__()
        self.act,self.twice,self.lin,self.head = act,twice,nn.Linear(8,8),nn.Linear(8,8)
        self.lin.weight.data.mul_(9)
    def forward(self, x):
        x = self.act(self.lin(x))
        return self.head(self.lin(x) if self.twice else x)

clipped = dict(relu=(F.relu, math.inf), relu6=(F.relu6, 6), hardtanh=(lambda x: F.hardtanh(x, 0, 4), 4))

@pytest.mark.parametrize('spec', ['int8','int8_symmetric','w4a4'])
@pytest.mark.parametrize('twice', ['','any','positive'])
@pytest.mark.parametrize('name', clipped)
def test_no_grid_undoes_a_clip(name, twice, spec):
    "Not one with a sign, nor one that the layer's other input needs, which reaches further down and up"
    torch.manual_seed(0)
    act,cap = clipped[name]
    x,seen = 10*torch.randn(64,8),[]
    if twice=='positive': x = x.abs()
    net = rounds(Clipped(act, twice).eval(), spec, x)
    (net.lin if twice else net.head).register_forward_pre_hook(lambda m,xs: seen.append(xs[0]))
    for m in net.eval(),convert(copy.deepcopy(net)):
        with torch.no_grad(): m(x)
        h = seen[-1]
        assert h.min()==0 and h.max()<=1.1*cap and (h>0).float().mean()>.3, (h.min(), h.max())

class Parted(nn.Module):
    "A value in two parts, of which a layer reads one, and a gate in float the other"
    def __init__(self, cut):
        super().__init__()
        self.cut,self.first,self.lin,self.head = cut,nn.Linear(8,16),nn.Linear(8,8),nn.Linear(8,2)
    def forward(self, x):
        a,b = self.cut(self.first(x))
        return self.head(self.lin(a)*b.sigmoid())

cuts = dict(chunk=lambda x: x.chunk(2, 1), split=lambda x: x.split(8, 1), unbind=lambda x: x.view(-1,2,8).unbind(1), slices=lambda x: (x[:,:8],x[:,8:]))

@pytest.mark.parametrize('cut', cuts)
def test_one_part_of_a_value_in_int8(cut):
    "The layer that reads it finds it rounded, in the file too"
    net,x = Parted(cuts[cut]).eval(),torch.randn(32,8)
    rounded = rounds(copy.deepcopy(net), 'int8', x)
    r = fake_quant_of(rounded)
    assert set(r.layers)=={'first','lin','head'} and r.layers['lin'].source in ('first','')
    with torch.no_grad(): want = net(x)
    sim = convert(copy.deepcopy(rounded))
    report = verify(net, rounded, sim, to_onnx(sim, x).SerializeToString(), [(x,)])
    assert report.n_int8==3 and report.sqnr_float>20 and want.std()>.05, report

class Outside(nn.Module):
    "Weights that are in no layer"
    def __init__(self):
        super().__init__()
        self.lin,self.w,self.v = nn.Linear(8,8),nn.Parameter(torch.randn(8,8)),nn.Parameter(torch.randn(8,8))
    def forward(self, x): return F.linear(torch.einsum('bi,ij->bj', self.lin(x), self.w), self.v)

def test_all_work_is_accounted_for():
    r = fake_quant_of(prepare(Outside(), Spec().excluding('v'), torch.randn(4,8)))
    assert set(r.layers)=={'lin','w'} and r.float_layers=={'v':'excluded'}
    assert {k:round(v, 3) for k,v in r.work.items()}==dict(lin=.333, w=.333, v=.333)

class Idle(nn.Module):
    "An auxiliary head that always runs, and is of use in training only; a layer that runs for the size of what it makes"
    def __init__(self):
        super().__init__()
        self.body,self.aux,self.size,self.head = nn.Conv2d(3,4,1),nn.Conv2d(4,2,3),nn.Conv2d(4,2,3),nn.Conv2d(4,2,1)
    def forward(self, x):
        x = F.relu(self.body(x))
        aux = self.aux(x).relu()
        out = self.head(x)/self.size(x).shape[-1]
        return (out,aux) if self.training else out

def test_what_no_output_needs_is_left_alone():
    net = Idle().eval()
    rounded = prepare(copy.deepcopy(net), 'int8', x)
    watch(rounded, x)
    set_ranges(rounded)
    sim = convert(copy.deepcopy(rounded))
    report = verify(net, rounded, sim, to_onnx(sim, x).SerializeToString(), [(x,)])
    assert report.n_int8==2 and set(report.float_layers)=={'aux','size'}
    assert [len(o) for o in rounded.train()(x)]==[8,8]

@pytest.mark.parametrize('need_weights', [True,False])
def test_an_operation_may_give_back_nothing_beside_its_tensors(need_weights):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.att,self.head = nn.MultiheadAttention(8, 2, batch_first=True),nn.Linear(8,2)
        def forward(self, x): return self.head(self.att(x, x, x, need_weights=need_weights)[0])
    net,x = Attention().eval(),torch.randn(4,3,8)
    watch(prepare(net, 'int8', x), x)
    set_ranges(net)
    with torch.no_grad(): assert sqnr(fake_quant_of(net).own_forward(x), net(x))>25

def test_a_file_takes_any_batch_though_the_model_says_len():
    class Token(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin,self.token = nn.Linear(8,8),nn.Parameter(torch.randn(1,1,8))
        def forward(self, x): return self.lin(torch.cat([self.token.expand(len(x), -1, -1),x.view(len(x), -1, 8)], 1))
    net = Token()
    run = Engine(to_onnx(net, torch.randn(4,24)).SerializeToString())
    for n in 1,4,7:
        x = torch.randn(n,24)
        with torch.no_grad(): assert sqnr(net(x), run(x))>80

@pytest.mark.parametrize('norm', [weight_norm,spectral_norm,orthogonal])
@pytest.mark.parametrize('fold', [True,False])
def test_a_batchnorm_after_a_weight_that_is_computed(norm, fold):
    net = nn.Sequential(norm(nn.Conv2d(3,4,3)), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4,2,1))
    with torch.no_grad(): net(x)
    rounded = prepare(copy.deepcopy(net.eval()), 'int8', x, fold=fold)
    watch(rounded, x)
    set_ranges(rounded)
    sim = convert(copy.deepcopy(rounded))
    assert verify(net, rounded, sim, to_onnx(sim, x).SerializeToString(), [(x,)]).n_int8==2

def test_a_bias_may_be_coarser_than_what_comes_of_it():
    "Where an input's step is large, an integer bias moves by steps of it; that is no fault of the conversion"
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8,16), nn.GELU(), nn.Linear(16,8), nn.GELU(), nn.Linear(8,2)).eval()
    x = torch.randn(64,8)
    x[:,3] *= 1000
    with torch.no_grad(): net[0].weight[:,3] /= 10000
    rounded = prepare(copy.deepcopy(net), 'int8', x)
    watch(rounded, x)
    set_ranges(rounded)
    sim = convert(copy.deepcopy(rounded))
    report = verify(net, rounded, sim, to_onnx(sim, x).SerializeToString(), [(x,)])
    assert (sim[0].bias_scale>2*fake_quant_of(sim).scale[1]).any() and report.n_int8==3

class Recurrent(nn.Module):
    "Who uses the sequence, the last state, or both"
    def __init__(self, uses):
        super().__init__()
        self.uses,self.rnn,self.a,self.b = uses,nn.GRU(8, 8, batch_first=True),nn.Linear(8,2),nn.Linear(8,2)
    def forward(self, x):
        out,h = self.rnn(x)
        return sum(([self.a(out[:,-1])] if 'a' in self.uses else [])+([self.b(3*h[0])] if 'b' in self.uses else []))

@pytest.mark.parametrize('uses', ['a','b','ab'])
def test_each_result_of_an_operation_is_rounded_for_who_uses_it(uses):
    net,x = Recurrent(uses).eval(),torch.randn(16,5,8)
    rounded = prepare(copy.deepcopy(net), 'int8', x)
    watch(rounded, x)
    set_ranges(rounded)
    sim = convert(copy.deepcopy(rounded))
    report = verify(net, rounded, sim, to_onnx(sim, x).SerializeToString(), [(x,)])
    assert report.n_int8==len(uses) and report.sqnr_float>30

def test_two_results_that_go_into_layers():
    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b = nn.Linear(1,4),nn.Linear(1,4)
        def forward(self, x):
            var,mean = torch.var_mean(x, 1, keepdim=True)
            return self.a(var),self.b(mean)
    net,x = Parts().eval(),100+torch.randn(64,8)*3
    watch(prepare(net, 'int8', x), x)
    set_ranges(net)
    with torch.no_grad():
        for a,b in zip(fake_quant_of(net).own_forward(x), net(x)): assert sqnr(a, b)>35

# A batchnorm behind a layer with a forward pass of its own

class NoBias(nn.Conv2d):
    def forward(self, x): return F.conv2d(x, self.weight, None, self.stride)

class Padded(nn.Conv2d):
    "As timm's Conv2dSame"
    def forward(self, x): return F.conv2d(F.pad(x, (0,1,0,1)), self.weight, self.bias, self.stride)

class Doubled(nn.Conv2d):
    def forward(self, x): return 2*F.conv2d(x, self.weight, self.bias, self.stride)

@pytest.mark.parametrize('cls', [NoBias,Padded,Doubled])
def test_batchnorms_behind_layers_of_ones_own(cls):
    torch.manual_seed(0)
    net,x = nn.Sequential(cls(3, 8, 3, 2, bias=False), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 4, 1)).eval(),torch.randn(16, 3, 9, 9)
    net[1].running_mean.normal_(),net[1].running_var.uniform_(.5, 2),net[1].num_batches_tracked.fill_(1)
    y = net(x).detach()
    sim = prepare(copy.deepcopy(net), 'int8', x, fold=True)
    watch(sim, x)
    set_ranges(sim)
    assert fake_quant_of(sim).folded==({('1','batch_norm',0)} if cls is not Doubled else set()) and sqnr(y, sim(x))>30
    with torch.no_grad(): assert sqnr(y, Engine(to_onnx(convert(sim), x).SerializeToString())(x))>30
