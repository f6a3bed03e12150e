"What a converted model computes is what kernels on integers compute, to the bit"
import numpy as np, onnx, pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from onnx import TensorProto, helper as h
from torch import nn
from fastquant.core.model import copy_model
from fastquant.export.engine import Engine
from fastquant.export.onnx import to_onnx
from fastquant.export.portable import session
from fastquant.quant.convert import convert
from fastquant.quant.fakequant import fake_quant_of
from fastquant.quant.kernels import add_in_steps, in_steps, normalize_channels, sum_exactly
from fastquant.quant.prepare import prepare, set_ranges, watch

def ran(op, domain, values, kind=TensorProto.UINT8, **attributes):
    "What ONNX Runtime's operator `op` makes of arrays"
    names = [f'v{i}' for i in range(len(values))]
    node = h.make_node(op, names, ['y'], domain=domain, **attributes)
    graph = h.make_graph([node], 'one', [], [h.make_tensor_value_info('y', kind, None)],
        [onnx.numpy_helper.from_array(np.asarray(v), k) for k,v in zip(names, values)])
    ops = [h.make_opsetid('', 17),h.make_opsetid('com.microsoft', 1)]
    return torch.from_numpy(session(h.make_model(graph, opset_imports=ops, ir_version=9).SerializeToString()).run(None, {})[0])

def clipped(y, s, z): return ((y/s).round()+z).clamp(0, 255).to(torch.uint8)
def scales(): return st.floats(1e-4, .2)
zeros = st.integers(0, 255)

@settings(max_examples=30, deadline=None)
@given(scales(), zeros, scales(), zeros, scales(), zeros, st.integers(0, 999))
def test_sum_is_the_operators(sa, za, sb, zb, s, z, seed):
    gen = torch.Generator().manual_seed(seed)
    a,b = torch.randint(0, 256, (2,4096), generator=gen)
    of = [(torch.tensor(v, dtype=torch.float32),torch.tensor(o, dtype=torch.uint8)) for v,o in ((sa,za),(sb,zb),(s,z))]
    got = clipped(add_in_steps((a-za)*of[0][0], of[0], (b-zb)*of[1][0], of[1], of[2]), *of[2])
    def arrays(q, o): return (q.to(torch.uint8).numpy(),*(t.numpy() for t in o))
    want = ran('QLinearAdd', 'com.microsoft', [*arrays(a, of[0]),*arrays(b, of[1]),*(t.numpy() for t in of[2])])
    assert (got==want).all()

@settings(max_examples=30, deadline=None)
@given(scales(), zeros, scales(), zeros, st.integers(0, 999))
def test_convolution_is_the_operators(sx, zx, s, z, seed):
    gen = torch.Generator().manual_seed(seed)
    q,w = torch.randint(0, 256, (1,8,9,9), generator=gen),torch.randint(-64, 65, (5,8,3,3), generator=gen).to(torch.int8)
    ws,b = torch.rand(5, generator=gen)*.01+1e-4,torch.randint(-5000, 5000, (5,), generator=gen).int()
    sx,s = (torch.tensor(v, dtype=torch.float32) for v in (sx,s))
    y = in_steps(sum_exactly(F.conv2d, (q-zx).float(), w, b), (sx*ws).view(-1,1,1), s)
    given_ = [q.to(torch.uint8).numpy(),sx.numpy(),np.uint8(zx),w.numpy(),ws.numpy(),np.zeros(5, np.int8),s.numpy(),np.uint8(z),b.numpy()]
    assert (clipped(y, s, z)==ran('QLinearConv', '', given_)).all()

@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.sampled_from([1e-5,1e-3,.1]), st.booleans(), st.sampled_from([(3,33),(2,70,5),(4,40,6,7),(2,9,3,4,5)]))
def test_batchnorm_is_the_operators(seed, eps, affine, shape):
    gen = torch.Generator().manual_seed(seed)
    norm = {2:nn.BatchNorm1d,3:nn.BatchNorm1d,4:nn.BatchNorm2d,5:nn.BatchNorm3d}[len(shape)]
    m,x = norm(shape[1], eps=eps, affine=affine).eval(),torch.randn(shape, generator=gen)
    m.running_mean.normal_(generator=gen)
    m.running_var.uniform_(1e-3, 9, generator=gen)
    if affine: m.weight.data.normal_(generator=gen),m.bias.data.normal_(generator=gen)
    scale,shift = (m.weight,m.bias) if affine else (torch.ones(shape[1]),torch.zeros(shape[1]))
    given_ = [t.detach().numpy() for t in (x,scale,shift,m.running_mean,m.running_var)]
    want = ran('BatchNormalization', '', given_, TensorProto.FLOAT, epsilon=eps)
    with torch.no_grad(): assert torch.equal(normalize_channels(x, m.running_mean, m.running_var, m.weight, m.bias, eps), want)

def test_sum_of_many_bits():
    x,w = torch.full((1,9000), 255.),torch.full((3,9000), 127, dtype=torch.int8)
    w[1,::2],w[2] = -127,torch.randint(-127, 128, (9000,))
    b = torch.tensor([2**30,-5,7], dtype=torch.int32)
    want = (w.long()*255).sum(1)+b
    assert (sum_exactly(F.linear, x, w, b)==want.float()).all()

class Block(nn.Module):
    "Convolutions with sums of several kinds around them"
    def __init__(self, add):
        super().__init__()
        self.add = add
        self.a,self.b,self.c = nn.Conv2d(3, 8, 3, padding=1),nn.Conv2d(8, 8, 3, padding=1, groups=8),nn.Conv2d(8, 8, 1)
        self.bn,self.head = nn.BatchNorm2d(8),nn.Linear(8*36, 7)
    def forward(self, x):
        x = F.relu(self.bn(self.a(x)))
        x = F.relu6(self.add(self.c(self.b(x)), x))
        return self.head(F.max_pool2d(x, 2).flatten(1))

def in_place(a, b):
    a += b
    return a

adds = dict(plain=lambda a, b: a+b, method=torch.add, in_place=in_place, twice=lambda a, b: a+b+a, itself=lambda a, b: a+a, doubled=lambda a, b: torch.add(a, b, alpha=2))

@pytest.mark.parametrize('spec', ['int8','int8_full','int8_per_tensor','w4a8','w4a4'])
@pytest.mark.parametrize('add', adds)
def test_file_is_its_simulation(add, spec):
    torch.manual_seed(0)
    net,x = Block(adds[add]),torch.randn(16,3,12,12)
    for _ in range(20): net(x)
    m = prepare(copy_model(net).eval(), spec, x, fold=True)
    watch(m, x)
    set_ranges(m)
    sim = convert(m)
    data = to_onnx(sim, x).SerializeToString()
    assert list(fake_quant_of(sim).adds) or add in ('itself','doubled')
    with torch.no_grad(): mine = sim(x)
    if spec=='int8_full': y = Engine(data)(x) # a plain session saturates on some processors
    else: y = torch.from_numpy(session(data).run(None, dict(input=x.numpy()))[0])
    assert torch.equal(mine, y) if add!='doubled' else (mine-y).abs().max()<.1*y.std()

class Before(nn.Module):
    "Batchnorms in front of what they normalize for, as in a DenseNet or behind a ReLU"
    def __init__(self):
        super().__init__()
        self.stem,self.a,self.b = nn.Conv2d(3, 800, 1),nn.Conv2d(800, 6, 3, padding=1),nn.Conv2d(806, 900, 1)
        self.n1,self.n2,self.n3,self.head = nn.BatchNorm2d(800),nn.BatchNorm2d(806, affine=False),nn.BatchNorm2d(900),nn.Conv2d(900, 500, 1)
    def forward(self, x):
        x = self.stem(x)
        x = torch.cat([x,self.a(F.relu(self.n1(x)))], 1)
        return self.head(self.n3(F.relu(self.b(self.n2(x).relu()))))

@pytest.mark.parametrize('seed', [1,2])
@pytest.mark.parametrize('spec', ['int8','w4a8'])
def test_batchnorms_that_are_left(spec, seed):
    torch.manual_seed(seed)
    net,x = Before(),torch.randn(32,3,7,7) # many channels, since each has its grid
    for _ in range(5): net(x+torch.randn_like(x))
    m = prepare(copy_model(net).eval(), spec, x, fold=True)
    watch(m, x)
    set_ranges(m)
    sim = convert(m)
    assert fake_quant_of(sim).alone=={('n1','batch_norm',0),('n2','batch_norm',0),('n3','batch_norm',0)}
    y = session(to_onnx(sim, x).SerializeToString()).run(None, dict(input=x.numpy()))[0]
    with torch.no_grad(): assert torch.equal(sim(x), torch.from_numpy(y))

class Shifted(nn.BatchNorm2d):
    def forward(self, x): return F.batch_norm(x, self.running_mean, self.running_var, 1+self.weight, self.bias, self.training, self.momentum, self.eps)

class Builtin(nn.BatchNorm2d):
    def forward(self, x): return torch.batch_norm(x, 1+self.weight, self.bias, self.running_mean, self.running_var, self.training, .1, 1e-2, True)

class ByName(nn.BatchNorm2d):
    def forward(self, x): return F.batch_norm(x, running_var=self.running_var, running_mean=self.running_mean, weight=self.weight, training=self.training, eps=.1)

class Frozen(nn.Module):
    "Statistics as buffers of a module that is no batchnorm"
    def __init__(self, n):
        super().__init__()
        self.register_buffer('mean', torch.randn(n))
        self.register_buffer('var', torch.rand(n)+.5)
    def forward(self, x): return F.batch_norm(x, self.mean, self.var)

@pytest.mark.parametrize('norm', [nn.BatchNorm2d,Shifted,Builtin,ByName,Frozen])
def test_batchnorms_as_they_are_called(norm):
    torch.manual_seed(0)
    net,x = nn.Sequential(nn.Conv2d(3, 600, 1), nn.ReLU(), norm(600), nn.ReLU(), nn.Conv2d(600, 500, 1)),torch.randn(32,3,7,7)
    for _ in range(5): net(x)
    m = prepare(copy_model(net).eval(), 'int8', x, fold=True)
    watch(m, x)
    set_ranges(m)
    sim = convert(m)
    y = session(to_onnx(sim, x).SerializeToString()).run(None, dict(input=x.numpy()))[0]
    with torch.no_grad(): assert torch.equal(sim(x), torch.from_numpy(y))
