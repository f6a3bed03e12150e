"Files that are the same on every processor: sums that saturate in 16 bits, the gate of every file, and AVX2 without VNNI"
import importlib.util, json, os, platform, re, shutil, subprocess, sys
import numpy as np, onnx, pytest, torch
from dataclasses import dataclass
from fastai.callback.training import ShortEpochCallback
from fastai.torch_core import set_seed
from functools import lru_cache
from pathlib import Path
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from torch import nn
from fastquant.export import portable
from fastquant.quant.pairs import fit_pairs
from fastquant.export.onnx import layer_nodes, quiet
from fastquant.export.portable import as_run, constants, misfits, session
from fastquant.export.engine import to_bytes
from fastquant.export.verify import activations, file_integers, replay, run_as_written, run_file, gate
from fastquant.callback.data import inputs
from fastquant.all import *
from integers import attributes, evaluate, integer_layers, makers, values
from test_integers import Case, File, Net, conv, plain
from test_models import models

low = 'w4a4','w2a2'
exported_fast = 'resnet18','squeezenet1_1','xresnet18','tabular' # in few bits too; others with --flags slow
looked_at = 'resnet18','mobilenet_v2','mobilenet_v3_small','tabular','unet_learner' # by several tests
cases = [(k,s) for k in models for s in ('int8',*low)]
cases += [(k,s) for k in ('squeezenet1_1','tabular') for s in ('int8_per_tensor','int8_symmetric')]

# Files

@dataclass(frozen=True)
class Made:
    "A file, and what it was made from"
    rounded:nn.Module      # The model that rounds
    sim:nn.Module          # The same, converted
    proto:onnx.ModelProto  # The file made of that
    xb:tuple               # A few inputs
    @property
    def data(self): return self.proto.SerializeToString()
    def feeds(self, n=None):
        "`n` inputs as a session takes them"
        return {i.name:x[:n].numpy() for i,x in zip(self.proto.graph.input, self.xb)}
    def gate(self, proto=None, n=None, **kw):
        "Show the gate the file, or another one, on `n` inputs"
        gate(self.rounded, self.sim, proto or self.proto, [x[:n] for x in self.xb], **kw)

def few(learn):
    "As many inputs as the gate is shown"
    return tuple(x[:8].detach().as_subclass(torch.Tensor) for x in inputs(learn, learn.dls.valid, 1)[0])

def rounds(model, spec, *xb):
    "`model` with ranges from `xb`"
    prepare(model, spec, *xb, fold=True)
    watch(model, *xb)
    set_ranges(model)
    return model

def calibrated(learn, spec):
    "The model of `learn`, rounded after training"
    return rounds(copy_model(learn.model).eval(), spec, *few(learn))

def trained(learn, spec):
    "The model of `learn` after a few batches of training through rounding"
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-4, cbs=[QuantAwareCallback(spec, start=.2),ShortEpochCallback(.25)])
    model = copy_model(learn.model).eval()
    fake_quant_of(model).refresh()
    return model

def made(model, *xb):
    "The file of the rounded `model`"
    rounded,sim = copy_model(model),convert(model)
    return Made(rounded, sim, to_onnx(sim, *xb), xb)

def of_net(net, x, spec):
    "The file of `net`, rounded after training"
    return made(rounds(copy_model(net), spec, x), x)

def make(name, spec, how=calibrated, seed=0):
    "The file of a model of the support matrix, with weights from `seed`"
    set_seed(seed)
    learn = models[name]()
    return made(how(learn, spec), *few(learn))

kept = lru_cache(make) # Files that several tests look at

@pytest.fixture(scope='module', params=cases, ids='-'.join)
def file(request):
    "A file of the support matrix"
    name,spec = request.param
    if spec not in low: return (kept if name in looked_at else make)(name, spec)
    if name not in exported_fast and 'slow' not in request.config.getoption('--flags'): pytest.skip('takes long: --flags slow')
    return make(name, spec, trained)

# Sums in 16 bits

def different(a, b):
    "Names of what differs between the values `a` and `b` of a graph"
    return [k for k,v in a.items() if not np.array_equal(v, b[k])]

def assert_saturates_nowhere(file, n):
    "Assert that every value in the graph is what it is in exact integers, whichever neighbours are added in 16 bits"
    assert set(integer_layers(file.proto))==set(layer_nodes(file.proto))
    whole = evaluate(file.proto, file.feeds(n))
    assert {n.input[0] for n in activations(file.proto)}|{o.name for o in file.proto.graph.output}<=set(whole)
    for order in ('flat','block'):
        assert not different(whole, evaluate(file.proto, file.feeds(n), saturate=True, order=order)), order

def test_saturating_equals_exact(file):
    "All integers and outputs of a file are the same to the bit where products are added in 16 bits"
    assert_saturates_nowhere(file, 1 if file.xb[0].shape[-1]>64 else 2)

def test_saturation_would_be_seen():
    "With the whole range of weights the two evaluations part, and the file says that it has it"
    full = kept('resnet18', 'int8_full')
    whole,less = (evaluate(full.proto, full.feeds(1), s) for s in (False,True))
    ints = {n.input[0] for n in activations(full.proto)}
    assert len(ints&set(different(whole, less)))>len(ints)/2 and 'output' in different(whole, less)
    assert len(misfits(full.proto))==len(integer_layers(full.proto))

def test_seven_bits_leave_room_for_two():
    "quant_17: weights of `Grid(7)` are stored as they are, so that no pair of them can saturate"
    seven = make('squeezenet1_1', Spec(weight=TensorSpec(Grid(7), granularity=PerChannel())))
    weights = constants(seven.proto, list(portable.int8_weights(seven.proto)))
    assert len(weights)==len(integer_layers(seven.proto)) and max(abs(w.astype(int)).max() for w in weights.values())==63
    assert_saturates_nowhere(seven, 2)
    seven.gate()

# The gate: healthy files

def test_gate_passes_healthy_files(file):
    "What was exported as it should be is not refused"
    file.gate()

class Doors(nn.Module):
    "A tensor that goes into two layers in few bits, and into a sum in 8"
    def __init__(self):
        super().__init__()
        self.stem,self.head = nn.Conv2d(3, 8, 3),nn.Linear(8, 5)
        self.a,self.b,self.c = (nn.Conv2d(8, 8, 1) for _ in range(3))
    def forward(self, x):
        x = self.stem(x).relu()
        return self.head((x+self.c((self.a(x)+self.b(x)).relu())).mean((2,3)))

def test_gate_passes_equal_activations():
    "Two layers that round the same tensor alike"
    torch.manual_seed(0)
    of_net(Doors().eval(), torch.randn(8, 3, 8, 8), 'w4a4').gate()

@pytest.mark.parametrize('spec', ['int8','w4a4'])
@pytest.mark.parametrize('seed', [1,2,3])
@pytest.mark.parametrize('name', ['squeezenet1_1','vision_learner'])
def test_gate_passes_healthy_files_of_other_weights(name, seed, spec): make(name, spec, seed=seed).gate()

# The gate: faults

def own(proto, node, i, array):
    "Give the input `i` of `node` a constant of its own"
    name = f'own_{i}_of_{node.output[0]}'
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    node.input[i] = name

def dequantizer(proto, layer, i):
    "What makes floats of the input `i` of a layer; None if there is nothing"
    made,n = makers(proto),layer_nodes(proto)[layer]
    if len(n.input)<=i: return None
    d = made[n.input[i]]
    return made[d.input[0]] if d.op_type=='Transpose' else d

def arrays_of(proto, node): return [constants(proto, [i])[i] for i in node.input]

def doubled_scale(proto, layer, rng):
    "Double the scale of a channel that is not all 0"
    d = dequantizer(proto, layer, 1)
    q,s,_ = arrays_of(proto, d)
    rows = np.moveaxis(q, attributes(d).get('axis', 1), 0).reshape(len(s), -1)
    s = s.copy()
    s[rng.choice(np.flatnonzero(rows.any(1)))] *= 2
    own(proto, d, 1, s)
    return True

def no_bias(proto, layer, rng):
    "Set the bias to 0, unless it is"
    if not (d:=dequantizer(proto, layer, 2)): return False
    q = arrays_of(proto, d)[0]
    own(proto, d, 0, np.zeros_like(q))
    return q.any()

def wrong_axis(proto, layer, rng):
    "Take the scales for those of input channels, if there are as many"
    d = dequantizer(proto, layer, 1)
    a, = [a for a in d.attribute if a.name=='axis']
    shape = arrays_of(proto, d)[0].shape
    a.i = 1-a.i
    return shape[0]==shape[1]

def moved_zero(proto, output, rng):
    "Move the zero point of an activation by one"
    nodes = [n for n in proto.graph.node if 'Linear' in n.op_type and output in (n.input[0], n.output[0])]
    z = constants(proto, [nodes[1].input[2]])[nodes[1].input[2]]
    for n in nodes: own(proto, n, 2, z+1 if z<np.iinfo(z.dtype).max else z-1)
    return True

faults = {'one channel scale doubled':doubled_scale, 'bias missing':no_bias, 'wrong axis':wrong_axis,
    'zero point off by one':moved_zero}

def places(proto, fault):
    "Where a fault can be: layers, or integer activations"
    return list(layer_nodes(proto) if fault is not moved_zero else dict.fromkeys(n.input[0] for n in activations(proto)))

def injected(proto, fault, place, rng):
    "A copy of `proto` with the fault, None if there it would be none"
    bad = onnx.ModelProto()
    bad.CopyFrom(proto)
    return bad if fault(bad, place, rng) else None

def next_ones(proto, name):
    "Integer activations that come next after the value `name`, and whether the output may come before one"
    users,found,todo = {},set(),[name]
    for n in proto.graph.node:
        for i in n.input: users.setdefault(i, []).append(n)
    while todo:
        if (k:=todo.pop()) in {o.name for o in proto.graph.output}: found.add(None)
        for n in users.get(k, ()):
            if n.op_type=='QuantizeLinear': found.add(n.output[0])
            else: todo.extend(n.output)
    return found

def blamed(file, place):
    "Modules that a message may name for a fault at `place`; None if it may name none"
    nodes = activations(file.proto)
    found = replay(file.sim, file_integers(file.proto, file.xb)[0], file.xb)[0]
    source = {n.input[0]:d.source for n,d in zip(nodes, found, strict=True)}
    layers = layer_nodes(file.proto)
    first = next_ones(file.proto, layers[place].output[0]) if place in layers else {place}|next_ones(file.proto, place)
    return {source.get(k) for k in first}

def told(message):
    "The module that a message of the gate names; None if it is about what is behind the last integers"
    found = re.search(r"part at '(.*?)':", message) or re.search(r"than its simulation at '(.*?)':", message)
    return found and found[1]

def changes(file, bad):
    "Does any integer, or an output, come out otherwise?"
    (a,x),(b,y) = (file_integers(p, file.xb, run_as_written) for p in (file.proto,bad))
    return any(not q.equal(r) for (_,q),(_,r) in zip(a, b)) or any(not o.equal(p) for o,p in zip(x, y))

def some(file, fault, n, seed=0):
    "`n` files with the fault, with where it is, that compute something else than `file`"
    rng = np.random.default_rng(seed)
    for place in rng.permutation(places(file.proto, fault)):
        bad = injected(file.proto, fault, str(place), rng)
        if not bad or not changes(file, bad): continue
        yield str(place),bad
        if not (n:=n-1): return

def refuses(name, fault, **kw):
    "Assert that the gate refuses a few files with the fault, and says where it is"
    file,seen = kept(name, 'int8'),0
    for place,bad in some(file, faults[fault], 2 if name=='unet_learner' else 4):
        with pytest.raises(ExportMismatch) as e: file.gate(bad, **kw)
        assert told(str(e.value)) in blamed(file, place), (place, str(e.value))
        seen += 1
    assert seen

@pytest.mark.parametrize('fault', [k for k in faults if k!='wrong axis'])
@pytest.mark.parametrize('name', looked_at)
def test_gate_refuses_faults(name, fault):
    "Whatever is wrong in a file is refused, with the name of the module behind whose output it shows first"
    refuses(name, fault)

with_square_weights = 'resnet18','mobilenet_v3_small','unet_learner'

@pytest.mark.parametrize('name', with_square_weights)
def test_gate_refuses_a_wrong_axis(name):
    "Though kernels of ONNX Runtime do not look at it, another engine will"
    refuses(name, 'wrong axis')

def there(proto, feeds, names, saturate=True):
    "What a processor that saturates makes of a file"
    return values(proto, feeds, names, saturate=saturate)

@pytest.mark.parametrize('name', ['resnet18','tabular','squeezenet1_1'])
def test_gate_refuses_saturation(name):
    "A file that uses the whole range of weights passes where sums are exact, and not where they saturate"
    full = kept(name, 'int8_full')
    full.gate(n=2, run=lambda *args: there(*args, saturate=False))
    with pytest.raises(ExportMismatch) as e: full.gate(n=2, run=there)
    assert told(str(e.value)) in {s.source for s in fake_quant_of(full.sim).all}|{None}

# A processor that saturates, emulated

@pytest.fixture
def saturating(monkeypatch):
    "As if this processor saturated"
    monkeypatch.setattr(portable, 'saturates', lambda: True)
    monkeypatch.setattr(portable, '_said', set())

def run_as_there(proto, feeds, names):
    "What a processor that saturates makes of the file that `as_run` gives it"
    return there(onnx.load_from_string(as_run(proto.SerializeToString())), feeds, names)

def test_emulated_processor_runs_full_range_exactly(saturating):
    "On a processor that saturates an `Engine` runs a full-range file exactly, and says once that it is slower"
    full = kept('resnet18', 'int8_full')
    with pytest.warns(UserWarning, match='whole range of int8') as said:
        y,_ = (Engine(full.data)(*full.xb) for _ in range(2))
    assert len(said)==1
    assert not misfits(onnx.load_from_string(as_run(full.data)))
    for run in (run_as_there,run_file): full.gate(n=2, run=run)
    outs = [o.name for o in full.proto.graph.output]
    whole,same = (f(full.proto, full.feeds(2), outs)[0] for f in (values,run_as_there))
    assert np.array_equal(whole, same)
    assert sqnr(torch.from_numpy(whole), y[:2])>30

def test_portable_files_run_unchanged(saturating, recwarn):
    "What fits is run as it is, and nothing is said"
    data = kept('tabular', 'int8').data
    assert as_run(data) is data
    Engine(data)(*kept('tabular', 'int8').xb)
    assert not [w for w in recwarn if 'whole range' in str(w.message)]

class Batches(CalibrationDataReader):
    "Hands `batches` to ONNX Runtime's quantizer"
    def __init__(self, batches): self.batches = iter(batches)
    def get_next(self): return next(self.batches, None)

def somebody_elses(folder, net, x, **kw):
    "The file that ONNX Runtime's quantizer makes of `net`"
    onnx.save(to_onnx(net, x), folder/'float.onnx')
    types = dict(activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8)
    with quiet():
        quantize_static(folder/'float.onnx', folder/'int8.onnx', Batches([{'input':x.numpy()}]), quant_format=QuantFormat.QDQ, **types, **kw)
    return (folder/'int8.onnx').read_bytes()

def small():
    "A small net with statistics, and inputs for it"
    torch.manual_seed(0)
    net,x = Net(),torch.randn(16, 3, 12, 12)
    with torch.no_grad():
        for _ in range(20): net(x)
    return net.eval(),x

@pytest.mark.parametrize('per_channel', [True,False])
def test_files_of_others_run_exactly(saturating, per_channel, tmp_path):
    "A file of ONNX Runtime's own quantizer does in an `Engine` what it says, node for node"
    net,x = small()
    data = somebody_elses(tmp_path, net, x, per_channel=per_channel)
    proto = onnx.load_from_string(data)
    assert misfits(proto)
    with pytest.warns(UserWarning, match='whole range of int8'): ours = Engine(data)(x)
    theirs, = session(data, graph_optimization_level=plain).run(None, {'input':x.numpy()})
    last = [n for n in proto.graph.node if n.op_type=='DequantizeLinear'][-1]
    scale, = constants(proto, [last.input[1]]).values()
    assert abs(ours.numpy()-theirs).max()<=2.01*scale and sqnr(torch.from_numpy(theirs), ours)>30

# AVX2 without VNNI

script = """import sys, numpy as np
def ort_outputs(path, feeds):
    import onnxruntime as ort
    o = ort.SessionOptions()
    o.log_severity_level,o.intra_op_num_threads = 4,1
    s = ort.InferenceSession(path, o, providers=['CPUExecutionProvider'])
    return dict(zip([i.name for i in s.get_outputs()], s.run(None, feeds)))
def openvino_outputs(path, feeds):
    import openvino as ov
    m = ov.Core().compile_model(ov.Core().read_model(path), 'CPU', dict(INFERENCE_NUM_THREADS=1))
    found = m(feeds)
    return {o.any_name:found[o] for o in m.outputs}
run = dict(ort=ort_outputs, openvino=openvino_outputs)[sys.argv[1]]
for name in sys.argv[2:]: np.savez(name+'_out.npz', **run(name+'.onnx', dict(np.load(name+'_in.npz'))))
"""

def emulated(folder, code, *args, timeout=300):
    "Run Python `code` on an emulated processor with AVX2 and without VNNI"
    if not shutil.which('qemu-x86_64'): pytest.skip("Debian's qemu-user is not installed")
    if platform.machine()!='x86_64': pytest.skip(f'This Python is built for {platform.machine()}, and not for x86-64')
    (folder/'run.py').write_text(code)
    env = {**os.environ, 'OMP_NUM_THREADS':'1', 'PYTHONPATH':str(Path(portable.__file__).parents[2])}
    command = ['qemu-x86_64','-cpu','Haswell',sys.executable,str(folder/'run.py'),*map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env)
    assert not done.returncode, done.stderr[-2000:]
    return done.stdout

def on_haswell(folder, by='ort', **files):
    "Outputs of each of `files`, a model and its inputs, in an engine there"
    for k,(proto,feeds) in files.items():
        onnx.save(proto, folder/f'{k}.onnx')
        np.savez(folder/f'{k}_in.npz', **feeds)
    emulated(folder, script, by, *(folder/k for k in files))
    return {k:dict(np.load(folder/f'{k}_out.npz')) for k in files}

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
    named = {f'layer{i}':c for i,c in enumerate(shapes()) if by=='ort' or not padded_wrongly(c)}
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
    assert db<45 if spec=='int8_full' else db>60, db

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

# Bad input

def says(path, proto, portable):
    "Write `proto` with another word on whether it is portable"
    new = onnx.load_from_string(to_bytes(proto))
    for p in new.metadata_props:
        if p.key=='portable': p.value = json.dumps(portable)
    onnx.save(new, path)
    return path

def test_files_that_lie_about_their_range_are_refused(tmp_path):
    "A file is not what it says of its weights: the message names one that does not fit, if there is one"
    full,fits = (kept('tabular', s).proto for s in ('int8_full','int8'))
    for proto,truth in ((full,False),(fits,True)):
        assert load_engine(says(tmp_path/'f.onnx', proto, truth)).metadata['portable'] is truth
    name = re.escape(repr(misfits(full)[0]))
    with pytest.raises(ValueError, match=f'same on every processor.*{name}'): load_engine(says(tmp_path/'f.onnx', full, True))
    with pytest.raises(ValueError, match='has none that do'): load_engine(says(tmp_path/'f.onnx', fits, False))

def test_full_range_is_not_made_portable_afterwards():
    "A Learner prepared with whole weights does not give a file that promises to fit, and is left as it is"
    learn = models['tabular']()
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-4, cbs=QuantAwareCallback('int8_full'))
        before = {k:v.clone() for k,v in learn.model.state_dict().items()}
        with pytest.raises(ValueError, match="prepared already.*whole range of int8.*remove_quant"): learn.quantize('int8')
        assert all(np.array_equal(v, before[k], equal_nan=True) for k,v in learn.model.state_dict().items())
        assert learn.quantize(n_batches=1).model.report.portable is False
        assert learn.remove_quant().quantize('int8', n_batches=1).model.report.portable is True
