"The gate that every file goes through refuses what is wrong, and says where"
import re
import numpy as np, onnx, pytest
from fastquant.all import *
from fastquant.export.onnx import layer_nodes
from fastquant.export.portable import constants
from fastquant.export.verify import activations, file_integers, replay, run_as_written
from tests.helpers.files import kept
from tests.helpers.integers import attributes, makers, there

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
    return any(not q.q.equal(r.q) for q,r in zip(a, b)) or any(not o.equal(p) for o,p in zip(x, y))

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
@pytest.mark.parametrize('name', ['resnet18','mobilenet_v2','mobilenet_v3_small','tabular','unet_learner'])
def test_gate_refuses_faults(name, fault):
    "Whatever is wrong in a file is refused, with the name of the module behind whose output it shows first"
    refuses(name, fault)

with_square_weights = 'resnet18','mobilenet_v3_small','unet_learner'

@pytest.mark.parametrize('name', with_square_weights)
def test_gate_refuses_a_wrong_axis(name):
    "Though kernels of ONNX Runtime do not look at it, another engine will"
    refuses(name, 'wrong axis')

@pytest.mark.parametrize('name', ['resnet18','tabular','squeezenet1_1'])
def test_gate_refuses_saturation(name):
    "A file that uses the whole range of weights passes where sums are exact, and not where they saturate"
    full = kept(name, 'int8_full')
    full.gate(n=2, run=lambda *args: there(*args, saturate=False))
    with pytest.raises(ExportMismatch) as e: full.gate(n=2, run=there)
    assert told(str(e.value)) in {s.source for s in fake_quant_of(full.sim).all}|{None}
