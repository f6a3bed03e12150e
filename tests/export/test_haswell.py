"AVX2 without VNNI, emulated: layers and files that fit give there what they give here"
import importlib.util, json
import numpy as np, onnx, pytest, torch
from torch import nn
from fastquant.all import *
from fastquant.export.portable import saturates, session
from fastquant.quant.pairs import fit_pairs
from fastquant.quant.spec import find_spec
from tests.helpers.files import of_net, small
from tests.helpers.haswell import emulated, on_haswell
from tests.helpers.integers import evaluate, values
from tests.helpers.layers import Case, File, conv, plain

class Extreme(File):
    "Layers whose inputs are mostly as large as can be and whose weights are large, made to fit or not"
    def __init__(self, cases, fits):
        self.fits = fits
        super().__init__(cases)
        self.feeds = {k:np.where(self.rng.random(v.shape)<.6, v.max(), v) for k,v in self.feeds.items()}
        self.steps = {k:abs(v).max()/np.float32(120) for k,v in self.outputs(self.proto(), plain).items()}
    def integers(self, name, q, scale, zero, axis):
        if q.dtype==np.int8: q = self.large(self.cases[name.removesuffix('_w')], np.moveaxis(q, axis, 0), axis)
        return super().integers(name, q, scale, zero, axis)
    def large(self, c, q, axis):
        "Integers from 100 on for half of the weights `q`, output channels first"
        q = np.where(self.rng.random(q.shape)<.5, np.sign(q)*self.rng.integers(100, 128, q.shape), q)
        depthwise = c.op=='Conv' and c.attrs.get('group', 1)==c.x[1]==len(q)>1
        if self.fits and not depthwise: q = fit_pairs(torch.tensor(q).float()).numpy()
        return np.moveaxis(q, 0, axis).astype(np.int8)

def square(dims, c, n, k, stride=1, groups=1, dilation=1):
    "A convolution without bias that keeps the size of images"
    size = (6 if dims==3 else 9,)*dims
    attrs = dict(strides=[stride]*dims, pads=[k//2*dilation]*2*dims, group=groups, dilations=[dilation]*dims)
    return conv((2,c,*size), (n,c//groups,*[k]*dims), bias='', **attrs)

def shapes():
    "Layers of all shapes"
    for c in (1,2,3,4,5,6,7,8,12,16,17,32):
        for n,k,stride in ((16,3,1),(16,1,1),(8,5,2),(33,3,1),(3,3,1)): yield square(2, c, n, k, stride)
    for c,n,g in ((4,4,4),(16,16,16),(32,32,32),(8,16,8),(6,12,2),(16,32,4),(12,12,4),(6,6,3),(3,3,3),(5,10,5),(24,24,24),(64,64,2)):
        for k,stride,d in ((3,1,1),(3,2,1),(5,1,2)): yield square(2, c, n, k, stride, g, d)
    for c,n,k,g in ((58,8,3,2),(60,8,3,2),(87,9,3,3),(514,8,1,2)): yield square(2, c, n, k, groups=g) # summed in two halves
    for c,n,g in ((3,16,1),(8,16,1),(5,7,1),(8,8,8),(4,8,4),(16,16,16)):
        for dims in (1,3): yield square(dims, c, n, 3, groups=g)
    for c,n in ((1,4),(3,5),(7,16),(8,16),(9,33),(64,10),(65,33),(257,20),(513,100),(512,1000)):
        yield Case((4,c), (n,c), 'Gemm', dict(transB=1), bias='')
    for c in (9,65,257):
        for act in (np.uint8,np.int8): yield Case((2,9,c), (c,20), 'MatMul', bias='', act=act)

def padded_wrongly(c):
    "Does oneDNN pad this layer wrongly, whatever its weights are? It is grouped, in three dimensions, with a zero point"
    return c.op=='Conv' and len(c.w)==5 and 1<c.attrs['group']<c.w[0]

@pytest.mark.parametrize('by', ['ort','openvino'])
def test_layers_that_fit_are_exact_on_a_processor_that_saturates(by, tmp_path):
    "Layers of all shapes with weights that fit are a step at most from exact sums, and with whole ones they are not"
    if not importlib.util.find_spec(dict(ort='onnxruntime').get(by, by)): pytest.skip(f'{by} is not installed')
    # oneDNN makes a kernel for each, which takes long there
    named = {f'layer{i}':c for i,c in enumerate(shapes()) if by=='ort' or i%4==1 and not padded_wrongly(c)}
    fits,whole = (Extreme(named, f) for f in (True,False))
    theirs = on_haswell(tmp_path, by, **{k:(f.proto(rounded=True),f.feeds) for k,f in (('fits',fits),('whole',whole))})
    apart = fits.apart(evaluate(fits.proto(rounded=True), fits.feeds), theirs['fits'])
    assert not [(named[k],v) for k,v in apart.items() if v>1.01]
    apart = whole.apart(evaluate(whole.proto(rounded=True), whole.feeds), theirs['whole'])
    assert len([v for v in apart.values() if v>1.01])>.7*len(named)

@pytest.mark.parametrize('spec', ['int8','w4a8','int8_per_tensor','int8_full'])
def test_small_net_on_a_processor_that_saturates(spec, tmp_path):
    "A file made here gives the same integers there, unless it uses the whole range of weights"
    file,theirs = of_net(*small(), spec),{}
    def both(proto, feeds, names):
        asked = onnx.ModelProto()
        asked.CopyFrom(proto)
        asked.graph.output.extend(onnx.ValueInfoProto(name=k) for k in names if k!='output')
        theirs.update(on_haswell(tmp_path, asked=(asked,feeds), alone=(proto,feeds)))
        return [theirs['asked'][k] for k in names]
    if spec=='int8_full':
        with pytest.raises(ExportMismatch): file.gate(run=both)
    else: file.gate(run=both)
    here, = session(file.data).run(None, file.feeds())
    db = sqnr(*(torch.from_numpy(v) for v in (here, theirs['alone']['output'])))
    assert db<45 if spec=='int8_full' and not saturates() else db>60, db

def test_ranges_found_while_it_runs_on_a_processor_that_saturates(tmp_path):
    "The kernels of linear layers and LSTMs saturate there as well, and give the same with weights that fit"
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.into,self.rnn,self.out = nn.Linear(8, 16),nn.LSTM(16, 16, bidirectional=True),nn.Linear(32, 5)
            for p in self.parameters(): nn.init.uniform_(p, -.05, .3) # so that neighbours add up
        def forward(self, x): return self.out(self.rnn(self.into(x).relu())[0])
    torch.manual_seed(0)
    net,x = Reads().eval(),torch.rand(7,4,8)
    made = dict(fits=of_net(net, x, 'dynamic'), whole=of_net(net, x, Spec(act=find_spec('dynamic').act, portable=False)))
    theirs = on_haswell(tmp_path, **{k:(f.proto,f.feeds()) for k,f in made.items()})
    db = {k:sqnr(Engine(f.data)(x), torch.from_numpy(theirs[k]['output'])) for k,f in made.items()}
    assert db['fits']>80 and db['whole']<40, db

whole_library = """import json, sys, numpy as np, torch, warnings
from fastquant.export.engine import Engine
from fastquant.export.portable import saturates, session
data,x = open(sys.argv[1], 'rb').read(),np.load(sys.argv[2])
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter('always')
    y = Engine(data)(torch.from_numpy(x)).numpy()
np.savez(sys.argv[3], engine=y, alone=session(data).run(None, {'input':x})[0])
print(json.dumps([saturates(), *(str(w.message) for w in said if 'whole range' in str(w.message))]))
"""

def test_engine_on_a_processor_that_saturates(tmp_path):
    "There it is found that the processor saturates, and an `Engine` on a full-range file says so and is exact"
    full = of_net(*small(), 'int8_full')
    onnx.save(full.proto, tmp_path/'full.onnx')
    np.save(tmp_path/'x.npy', full.xb[0].numpy())
    yes,*said = json.loads(emulated(tmp_path, whole_library, *(tmp_path/k for k in ('full.onnx','x.npy','y.npz'))))
    assert yes and len(said)==1 and 'another kernel' in said[0]
    exact = torch.from_numpy(values(full.proto, full.feeds(), ['output'])[0])
    theirs = {k:torch.from_numpy(v) for k,v in np.load(tmp_path/'y.npz').items()}
    assert sqnr(exact, theirs['engine'])>60 and sqnr(exact, theirs['alone'])<45
