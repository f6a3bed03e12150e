"Weights that are in no layer: parameters that a model multiplies with itself, as they are, as a part of them, or computed"
import copy, onnx, pickle, pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from fastquant.core.model import clean_copy
from fastquant.core.trace import trace
from fastquant.export.engine import layer_kernels
from fastquant.export.onnx import to_onnx
from fastquant.export.portable import misfits
from fastquant.export.verify import verify
from fastquant.quant.convert import convert
from fastquant.quant.fakequant import fake_quant_of
from fastquant.quant.grid import quantize
from fastquant.quant.prepare import prepare, set_ranges, unprepare, watch
from fastquant.quant.site import Site
from fastquant.quant.spec import Spec
from fastquant.quant.train import follow, guess, start

def param(*shape): return nn.Parameter(torch.randn(shape)*.3)

class Net(nn.Module):
    "A linear layer (or none), and what `f` does with its output and parameters"
    def __init__(self, f, size, **params):
        super().__init__()
        self.f,self.a = f,nn.Linear(size, size) if size else nn.Identity()
        for k,v in params.items(): setattr(self, k, v)
    def forward(self, x): return self.f(self, self.a(x))

def standardized(m, x):
    var,mean = torch.var_mean(m.w, dim=(1,2,3), keepdim=True)
    return F.conv2d(x, (m.w-mean)/(var+1e-5).sqrt(), m.b, padding=1).relu().mean((2,3))

def attention(m, x):
    q,k,v = (x@m.w).chunk(3, -1)
    return F.scaled_dot_product_attention(q[:,None], k[:,None], v[:,None])[:,0]@m.o

tokens,rows,images = torch.Size([8,5,12]),torch.Size([8,12]),torch.Size([8,6,7,7])
cases = dict(linear=(lambda m,x: F.linear(x.relu(), m.w, m.b), rows, 12, dict(w=(9,12), b=(9,)), ['a','w']),
    product=(lambda m,x: x@m.w+m.b, tokens, 12, dict(w=(12,9), b=(9,)), ['a','w']),
    addmm=(lambda m,x: torch.addmm(m.b, x, m.w), rows, 12, dict(w=(12,9), b=(9,)), ['a','w']),
    left=(lambda m,x: m.w@x, tokens, 12, dict(w=(7,5)), ['a','w']),
    einsum=(lambda m,x: torch.einsum('bthd,hdc->btc', torch.einsum('btc,chd->bthd', x, m.w), m.o), tokens, 12, dict(w=(12,2,6), o=(2,6,12)), ['a','w','o']),
    view=(lambda m,x: x@m.w.view(9,12).T, rows, 12, dict(w=(12,9)), ['a','w']),
    slices=(lambda m,x: (x@m.w[0]).relu()@m.w[1], rows, 12, dict(w=(2,12,12)), ['a','w','w.2']),
    lora=(lambda m,x: x+.5*(x@m.w)@m.o, rows, 12, dict(w=(12,3), o=(3,12)), ['a','w','o']),
    merged=(lambda m,x: F.linear(x, m.w+m.o@m.p), rows, 12, dict(w=(9,12), o=(9,2), p=(2,12)), ['a','w']),
    tied=(lambda m,x: F.linear(x.relu(), m.a.weight.t())+m.a.weight.mean(), rows, 12, {}, ['a','a.2']),
    conv=(lambda m,x: F.conv2d(x, m.w, m.b, stride=2, padding=1).relu(), images, 0, dict(w=(8,6,3,3), b=(8,)), ['w']),
    depthwise=(lambda m,x: F.conv2d(F.conv2d(x, m.w, groups=6).relu(), m.o, groups=2), images, 0, dict(w=(6,1,3,3), o=(4,3,1,1)), ['w','o']),
    grouped=(lambda m,x: F.conv1d(x, m.w, padding=1, groups=5), tokens, 12, dict(w=(10,1,3)), ['a','w']),
    standardized=(standardized, images, 0, dict(w=(8,6,3,3), b=(8,)), ['w']), attention=(attention, tokens, 12, dict(w=(12,36), o=(12,12)), ['a','w','o']))

def made(name):
    f,shape,size,params,layers = cases[name]
    torch.manual_seed(0)
    return Net(f, size, **{k:param(*v) for k,v in params.items()}).eval(),torch.randn(shape),layers

def calibrated(net, x, spec='int8'):
    rounded = prepare(clean_copy(net), spec, x, fold=True)
    watch(rounded, x)
    set_ranges(rounded)
    return rounded

def trained(net, x, spec, lr=1e-4):
    "A few steps of training through rounding"
    rounded = prepare(clean_copy(net), spec, x).train()
    guess(rounded, x)
    opt = torch.optim.SGD(rounded.parameters(), lr)
    for i in range(5):
        if i==2: start(rounded)
        fake_quant_of(rounded).how = Site.follow
        loss = rounded(x).square().mean()
        follow(rounded)
        opt.zero_grad()
        loss.backward()
        opt.step()
    return rounded.eval()

def shipped(net, rounded, x, trained=False):
    "The report of the file made of it, and the file"
    sim = convert(clean_copy(rounded))
    data = to_onnx(sim, x).SerializeToString()
    return verify(net, rounded, sim, data, [(x,)], trained=trained),data

@pytest.mark.parametrize('name', cases)
def test_runs_in_int8(name):
    net,x,layers = made(name)
    rounded = calibrated(net, x)
    assert set(fake_quant_of(rounded).layers)==set(layers)
    report,data = shipped(net, rounded, x)
    assert not report.float_layers and report.n_int8==report.n_layers==len(layers) and report.sqnr_float>25 and report.portable
    assert all(k.startswith('products in') for k in report.float_work)
    proto = onnx.load_from_string(data)
    dims = {i.name:list(i.dims) for i in proto.graph.initializer if i.data_type==1 and len(i.dims)>1}
    assert not dims

@pytest.mark.parametrize('name,rows_of', [('linear',lambda m: m.w),('product',lambda m: m.w.T),('merged',lambda m: m.w+m.o@m.p),('view',lambda m: m.w.view(9,12))])
def test_rounds_as_by_hand(name, rows_of):
    "With activations left alone: a linear layer with the rows of the weight rounded"
    net,x,_ = made(name)
    rounded = calibrated(net, x, 'int8_full')
    r = fake_quant_of(rounded)
    w,s = rows_of(net),r.weight_scale[r.slices['w']]
    w = quantize(w, s, torch.zeros_like(s, dtype=torch.int8), r.weights['w'].grid)*s[:,None]
    r.how,r.only = lambda site, x, cap=None: x, {'w'}
    h = net.a(x)
    want = F.linear(h.relu() if name=='linear' else h, w, getattr(net, 'b', None))
    assert torch.allclose(rounded(x), want, atol=1e-5)

@pytest.mark.parametrize('name,spec', [('linear','int8'),('product','w4a8'),('merged','int8_full'),('tied','w4a8'),('standardized','int8'),('depthwise','w2a4')])
def test_trains_and_ships(name, spec):
    "Every parameter and step learns, and the file does what the model that rounds did"
    net,x,layers = made(name)
    before = {k:p.detach().clone() for k,p in prepare(clean_copy(net), spec, x).named_parameters()}
    rounded = trained(net, x, spec)
    assert not [k for k,p in rounded.named_parameters() if p.equal(before[k])]
    report,_ = shipped(unprepare(clean_copy(rounded)), rounded, x, trained=True)
    assert report.n_int8==len(layers) and report.sqnr>60

def test_scales_follow_the_weight():
    net,x,_ = made('merged')
    rounded = trained(net, x, 'int8')
    with torch.no_grad(): rounded.p.mul_(20)
    r = fake_quant_of(rounded.train())
    old = r.weight_scale.clone()
    r.how = Site.follow
    rounded(x)
    follow(rounded, mom=1.)
    got,most = r.weight_scale[r.slices['w']],(rounded.w+rounded.o@rounded.p).abs().amax(1)
    assert (got*127>=most*(1-1e-5)).all() and not got.equal(old[r.slices['w']])

@pytest.mark.parametrize('spec,n', [('int8',9),('int8_per_tensor',1)])
def test_a_scale_for_each_output(spec, n):
    "Neighbours along the input fit to every processor, also where the parameter has its outputs last"
    net,x,_ = made('product')
    with torch.no_grad(): net.w[:] = torch.linspace(.1, 2, 9)
    rounded = calibrated(net, x, spec)
    r = fake_quant_of(rounded)
    assert r.slices['w'].stop-r.slices['w'].start==n
    report,data = shipped(net, rounded, x)
    assert report.portable and not misfits(onnx.load_from_string(data))

def _turned(m, x): return x@(m.w*.5).T

def test_state_copy_and_pickle():
    torch.manual_seed(0)
    net,x = Net(_turned, 12, w=param(9,12)),torch.randn(rows)
    rounded = trained(net, x, 'w4a8')
    want = rounded(x)
    fresh = prepare(clean_copy(net), 'w4a8', x)
    fresh.load_state_dict(rounded.state_dict())
    for twin in (copy.deepcopy(rounded),pickle.loads(pickle.dumps(rounded)),fresh.eval()):
        assert twin(x).equal(want)
        with torch.no_grad(): twin.w.add_(1)
        assert fake_quant_of(twin).weight_of('w').equal(twin.w*.5) and rounded(x).equal(want)
    assert unprepare(rounded).state_dict().keys()==net.state_dict().keys()

@pytest.mark.parametrize('pattern,left', [('w',['a','o']),('o',['a','w']),('a',['w','o'])])
def test_left_out_by_name(pattern, left):
    net,x,_ = made('lora')
    rounded = calibrated(net, x, Spec().excluding(pattern))
    report,_ = shipped(net, rounded, x)
    assert list(fake_quant_of(rounded).layers)==left and report.float_layers=={pattern:'excluded'} and 0<report.float_work[pattern]<1

def test_a_pattern_that_matches_nothing():
    net,x,_ = made('lora')
    with pytest.raises(ValueError, match="'ww' matches no module"): prepare(net, Spec().excluding('ww'), x)

why = dict(transposed=(lambda m,x: F.conv_transpose2d(x, m.w), images, dict(w=(6,4,2,2)), 'w', 'no integer kernel does what conv_transpose2d does'),
    batched=(lambda m,x: torch.einsum('btc,tcd->btd', x, m.w), tokens, dict(w=(5,12,3)), 'w', 'no integer kernel does what einsum does'),
    bias=(lambda m,x: F.linear(x, m.w, x.mean(0)[:9]), rows, dict(w=(9,12)), 'w', 'its bias depends on the batch'),
    random=(lambda m,x: F.linear(x, m.w+torch.rand_like(m.w)), rows, dict(w=(9,12)), 'w', 'computed in a way that cannot be followed'),
    hidden=(lambda m,x: F.linear(x, m.w*m.mask), rows, dict(w=(9,12), mask=None), 'w', 'computed in a way that cannot be followed'),
    number=(lambda m,x: F.linear(x, m.w/m.w.abs().max().item()), rows, dict(w=(9,12)), 'w', 'computed in a way that cannot be followed'),
    written=(lambda m,x: torch.mm(x, m.w, out=x.new_empty(len(x), 9)), rows, dict(w=(12,9)), 'w', 'written into a tensor that was there before'))

@pytest.mark.parametrize('name', why)
def test_what_cannot_is_named(name):
    f,shape,params,k,reason = why[name]
    x = torch.randn(shape)
    first = nn.Conv2d(6,6,1) if len(shape)==4 else nn.Linear(12,12)
    own = Net(f, 0, **{k:param(*v) if v else torch.ones(9,12) for k,v in params.items()})
    net = nn.Sequential(first, own).eval()
    r = fake_quant_of(prepare(net, 'int8', x))
    assert list(r.layers)==['0'] and reason in r.float_layers[f'1.{k}'] and .1<r.work[f'1.{k}']<1
    assert abs(sum(r.work.values())-1)<1e-6

def test_products_of_the_batch_alone_are_no_weights():
    "Attention, and a weight that another layer computes from the batch"
    net = Net(lambda m,x: F.linear(x, m.b(x).mean(0).view(3,12))@x.new_ones(3,3)@(x.mT@x)[:3], 12, b=nn.Linear(12,36)).eval()
    r = fake_quant_of(prepare(net, 'int8', torch.randn(rows)))
    assert set(r.layers)=={'a','b'} and not r.float_layers

class Standardized(nn.Conv2d):
    "A layer that computes the weight it uses"
    def forward(self, x): return self._conv_forward(x, self.weight-self.weight.mean((1,2,3), keepdim=True), self.bias)

class Borrowed(nn.Module):
    "Uses layers for their parameters only"
    def __init__(self):
        super().__init__()
        self.q,self.k = nn.Linear(12,12),nn.Linear(12,12)
    def forward(self, x):
        x = F.linear(x, self.q.weight, self.q.bias).relu()
        return F.linear(x, torch.cat([self.k.weight,self.q.weight[:3]]), torch.cat([self.k.bias,self.q.bias[:3]]))

class Pointwise(nn.Module):
    "A convolution with the weight of a linear layer: the same integers, which the file has once"
    def __init__(self):
        super().__init__()
        self.l,self.h = nn.Linear(6,6),nn.Linear(6,2)
    def forward(self, x):
        x = F.conv2d(x, self.l.weight[:,:,None,None], self.l.bias).relu()
        return self.h(self.l(x.mean((2,3))))

@pytest.mark.parametrize('net,x,layers', [(Pointwise(), torch.randn(images), ['l','l.2','h']), (nn.Sequential(Standardized(6,8,3), nn.ReLU()), torch.randn(images), ['0']),
    (Borrowed(), torch.randn(rows), ['q','k']), (nn.Sequential(nn.utils.spectral_norm(nn.Linear(12,9))), torch.randn(rows), ['0'])])
def test_layers_by_another_way(net, x, layers):
    net.eval()
    with torch.no_grad(): report,data = shipped(net, calibrated(net, x), x)
    assert report.n_int8==report.n_layers==len(layers) and not report.float_layers and set(layer_kernels(data))==set(layers)

@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.sampled_from([(1,1),(2,1),(1,2)]), st.sampled_from([1,2]), st.booleans())
@settings(max_examples=12, deadline=None)
def test_convolutions_of_any_shape(groups, ins, outs, at, size, bias):
    "As a layer of the same shape, to the bit"
    stride,padding = at
    layer = nn.Conv1d(groups*ins, groups*outs, size, stride, padding, groups=groups, bias=bias)
    own = Net(lambda m,x: F.conv1d(x, m.w, getattr(m, 'b', None), stride, padding, groups=groups), 0, w=layer.weight, **({'b':layer.bias} if bias else {}))
    x = torch.randn(4, groups*ins, 6)
    a,b = (calibrated(m, x) for m in (nn.Sequential(layer).eval(),own.eval()))
    assert a(x).equal(b(x)) and convert(a)(x).equal(convert(b)(x))

def test_costs_of_both_kinds_are_the_same():
    net,x,_ = made('linear')
    assert sum(o.macs for o in trace(net, x).ops)==8*12*12+8*12*9

class Encoder(nn.Module):
    def __init__(self, norm_first):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(12, 2, 16, dropout=.1, batch_first=True, norm_first=norm_first)
        self.head = nn.Linear(12, 2)
    def forward(self, x): return self.head(self.layer(x).mean(1))

class Cross(nn.Module):
    "Attention to something else, with projections of their own, that hands out its weights"
    def __init__(self):
        super().__init__()
        self.key,self.att = nn.Linear(12,12),nn.MultiheadAttention(12, 2, batch_first=True, vdim=8)
    def forward(self, x): return self.att(x, self.key(x), x[...,:8])

@pytest.mark.parametrize('net,names', [(Encoder(True),['in_proj_weight','out_proj']),(Cross(),['q_proj_weight','k_proj_weight','v_proj_weight','out_proj'])])
def test_attention_is_made_of_layers(net, names):
    x,before = torch.randn(tokens),{k:v.clone() for k,v in net.state_dict().items()}
    net.eval()
    rounded = calibrated(net, x)
    r = fake_quant_of(rounded)
    assert {k.rpartition('.')[2] for k in r.layers if 'att' in k}==set(names) and not r.float_layers
    report,_ = shipped(net, rounded, x)
    assert report.n_int8==report.n_layers and report.sqnr_float>25 and set(net.state_dict())==set(before)

def test_attention_trains():
    torch.manual_seed(0)
    net,x = Encoder(False).eval(),torch.randn(tokens)
    rounded = trained(net, x, 'w4a8', .1)
    assert not [k for k,p in unprepare(clean_copy(rounded)).named_parameters() if p.equal(net.get_parameter(k))]
    report,_ = shipped(unprepare(clean_copy(rounded)), rounded, x, trained=True)
    assert report.sqnr>40

def test_attention_left_out_is_named_once():
    x = torch.randn(tokens)
    r = fake_quant_of(prepare(Encoder(False).eval(), Spec().excluding('layer.self_attn'), x))
    assert r.float_layers=={'layer.self_attn':'excluded', 'layer.self_attn.out_proj':'excluded'} and set(r.layers)=={'layer.linear1','layer.linear2','head'}
    assert abs(sum(r.work.values())-1)<1e-6
