"""What an exported file computes: in exact integers, or as x86 processors without VNNI do it.

ONNX Runtime runs what is not a layer, one node at a time and in float; its integer kernels have no part in this."""
import math, numpy as np, onnx, onnxruntime as ort, torch
from collections.abc import Sequence
from dataclasses import dataclass
from torch import Tensor
from fastquant.export.onnx import layer_nodes
from fastquant.export.portable import session
from fastquant.export.verify import activations

def evaluate(
    model,           # An ONNX file's content, or the model in it
    feeds:dict,      # An array for each input of the graph
    saturate=False,  # Add neighbouring products in 16 bits, as `vpmaddubsw` does it?
    order='flat'     # Neighbours in the whole sum as ONNX Runtime has it, or in a 'block' of one pixel as oneDNN has it
)->dict:
    "Every value in the graph by its name, with layers on integers computed in integers"
    if order not in ('flat','block'): raise ValueError(f"order={order!r}: pass 'flat' or 'block'.")
    proto = loaded(model)
    known,made = constants(proto),makers(proto)
    found = {**known, **{k:np.asarray(v) for k,v in feeds.items()}}
    for n in proto.graph.node:
        if all(o in known for o in n.output): continue
        if is_layer(n, made, known): found[n.output[0]] = layer(n, made, found, saturate, order)
        elif n.op_type=='MatMulInteger': found[n.output[0]] = product(n, found, order if saturate else 'exact')
        else: found.update(run(proto, [n], {i:found[i] for i in n.input if i}))
    return found

def values(
    model,           # An ONNX file's content, or the model in it
    feeds:dict,      # An array for each input of the graph
    names:Sequence,  # Which values
    saturate=False,  # Add neighbouring products in 16 bits, as `vpmaddubsw` does it?
    order='flat'     # As for `evaluate`
)->list:
    "The values called `names`, in that order"
    found = evaluate(model, feeds, saturate, order)
    return [found[o] for o in names]

def there(proto, feeds, names, saturate=True):
    "What a processor that saturates makes of a file"
    return values(proto, feeds, names, saturate=saturate)

def integer_layers(
    model # An ONNX file's content, or the model in it
)->list:
    "Names of the nodes that `evaluate` computes in integers"
    proto = loaded(model)
    known,made = constants(proto),makers(proto)
    return [n.name for n in proto.graph.node if is_layer(n, made, known) or n.op_type=='MatMulInteger']

# The graph

def loaded(model): return model if isinstance(model, onnx.ModelProto) else onnx.load_from_string(model)
def makers(proto): return {o:n for n in proto.graph.node for o in n.output}
def attributes(n): return {a.name:onnx.helper.get_attribute_value(a) for a in n.attribute}

def run(proto, nodes, feeds, initializers=()):
    "All outputs of `nodes` of `proto` from an ONNX Runtime that rewrites nothing"
    names = [o for n in nodes for o in n.output if o]
    kind = onnx.helper.np_dtype_to_tensor_dtype
    ins = [onnx.helper.make_tensor_value_info(k, kind(v.dtype), v.shape) for k,v in feeds.items()]
    outs = [onnx.ValueInfoProto(name=o) for o in names]
    graph = onnx.helper.make_graph(nodes, 'part', ins, outs, initializers)
    part = onnx.helper.make_model(graph, opset_imports=proto.opset_import, ir_version=proto.ir_version)
    s = session(part.SerializeToString(), graph_optimization_level=ort.GraphOptimizationLevel.ORT_DISABLE_ALL)
    return dict(zip(names, s.run(names, feeds)))

def constants(proto):
    "Initializers, and whatever nodes make of them alone, by name"
    known,nodes = {i.name:onnx.numpy_helper.to_array(i) for i in proto.graph.initializer},[]
    names = set(known)
    for n in proto.graph.node:
        if not names.issuperset(i for i in n.input if i): continue
        nodes.append(n)
        names.update(n.output)
    return {**known, **run(proto, nodes, {}, proto.graph.initializer)} if nodes else known

def source(name, made):
    "The `DequantizeLinear` that `name` comes from, perhaps through `Transpose` or `Reshape`; None if there is none"
    n = made.get(name)
    if n is None or n.op_type not in ('DequantizeLinear','Transpose','Reshape'): return None
    return n if n.op_type=='DequantizeLinear' else source(n.input[0], made)

def is_layer(n, made, known):
    "Does `n` multiply an activation of 8-bit integers by constant ones?"
    if n.op_type not in ('Conv','Gemm','MatMul'): return False
    x,w = (source(i, made) for i in n.input[:2])
    if x is None or w is None or w.input[0] not in known: return False
    zero = known[x.input[2]] if any(x.input[2:]) else np.zeros((), np.uint8)
    return all(v.dtype in (np.int8, np.uint8) for v in (zero, known[w.input[0]]))

# A layer

@dataclass(frozen=True)
class Quantized:
    "Integers that stand for `scale*(q-zero)`"
    q:np.ndarray     # The integers
    scale:np.ndarray # With as many dimensions as `q`, all of size 1 but perhaps one
    zero:np.ndarray  # Shaped like `scale`
    def map(self, f): return Quantized(f(self.q), f(self.scale), f(self.zero))

def quantized(name, made, found):
    "The integers behind `name`, which has a `source`"
    n,a = made[name],attributes(made[name])
    if n.op_type=='Transpose': return quantized(n.input[0], made, found).map(lambda v: v.transpose(a.get('perm')))
    if n.op_type=='Reshape':
        o,shape = quantized(n.input[0], made, found),found[name].shape
        return Quantized(o.q.reshape(shape), *(v.reshape([1]*len(shape)) for v in (o.scale,o.zero)))
    q,scale = (found[i] for i in n.input[:2])
    zero = found[n.input[2]] if any(n.input[2:]) else np.zeros_like(scale, q.dtype)
    shape = [1]*q.ndim
    if scale.size>1: shape[a.get('axis', 1)] = scale.size
    return Quantized(q, scale.reshape(shape), zero.reshape(shape))

@dataclass(frozen=True)
class Window:
    "How a kernel moves over its input; a linear layer's is one over no dimensions"
    pads:Sequence      # All starts, then all ends
    strides:Sequence   # One for each dimension, as are
    dilations:Sequence # these
    groups:int         # Of channels

def window(a, dims):
    "The `Window` of a node with attributes `a`"
    return Window(a.get('pads', [0]*2*dims), *(a.get(k, [1]*dims) for k in ('strides','dilations')), a.get('group', 1))

def layer(n, made, found, saturate, order):
    "What the layer `n` computes"
    a,(x,w) = attributes(n),(quantized(i, made, found) for i in n.input[:2])
    if n.op_type=='MatMul' or n.op_type=='Gemm' and not a.get('transB'): w = w.map(np.transpose)
    refuse(n, a, x, w)
    dims = w.q.ndim-2
    rows = x if n.op_type=='Conv' else x.map(lambda v: v.reshape(-1, v.shape[-1]))
    acc = convolve(unsigned(rows), w, window(a, dims), order if saturate else 'exact')
    if n.op_type!='Conv': acc = acc.reshape(*x.q.shape[:-1], len(w.q))
    return dequantized(acc, x, w, bias(n, made, found, dims), dims)

def product(n, found, how):
    "Sums of products of integers, as `MatMulInteger` gives them"
    x,w,*zeros = (torch.tensor(found[i]) for i in n.input)
    if len(zeros)!=1: raise NotImplementedError(f"{n.name!r} has a zero point for its weight. Teach `product` what that does.")
    rows = x.flatten(0, -2).t()[None,None]
    acc = corrected(rows, zeros[0].item(), w.t()[None,:,None], torch.zeros(1, w.shape[1], 1, dtype=torch.long), how)
    return acc[0].t().reshape(*x.shape[:-1], w.shape[1]).int().numpy()

def refuse(n, a, x, w):
    "Raise `NotImplementedError` if `n` is a layer that is not known here"
    if a.get('auto_pad', b'NOTSET')!=b'NOTSET': why = "pads itself"
    elif a.get('transA') or a.get('alpha', 1.)!=1 or a.get('beta', 1.)!=1: why = "transposes its input, or has factors"
    elif x.scale.size!=1: why = "has an input with several scales"
    elif w.scale.size!=w.scale.shape[0]: why = "has a weight with several scales for an output channel"
    elif n.op_type=='MatMul' and w.q.ndim!=2: why = "multiplies by several matrices"
    else: return
    raise NotImplementedError(f"{n.op_type} {n.name!r} {why}, and no file of fastquant has such a one. Teach `layer` what it does.")

def unsigned(x):
    "`x` in uint8, as kernels want it"
    return x if x.q.dtype==np.uint8 else Quantized(x.q.view(np.uint8)^128, x.scale, x.zero.view(np.uint8)^128)

def bias(n, made, found, dims):
    "The bias of `n`: int32 if the file has it so, float otherwise; 0 if there is none"
    if not any(n.input[2:]): return np.int32(0)
    d,b = source(n.input[2], made),found[n.input[2]]
    if d is not None and found[d.input[0]].dtype==np.int32: b = found[d.input[0]]
    return b.reshape(-1, *[1]*dims) if dims else b

def dequantized(acc, x, w, b, dims):
    "Sums `acc` of products of integers as floats, with a bias `b`"
    scale = w.scale.astype(np.float64).reshape(-1, *[1]*dims)*x.scale.item()
    y = (acc+b)*scale if b.dtype==np.int32 else acc*scale+b
    return y.astype(x.scale.dtype)

# Sums of products. Inputs are [groups, kernel positions, input channels, outputs],
# weights [groups, output channels, kernel positions, input channels]

def convolve(x, w, win, how):
    "Sums of products of the integers of `x` and `w`, of shape [batch, output channels, ...]"
    n,dims = len(w.q),w.q.ndim-2
    if w.q.dtype==np.uint8 or win.groups==n==x.q.shape[1]: how = 'exact' # other kernels, which do not saturate
    wq = torch.tensor(w.q).reshape(win.groups, -1, w.q.shape[1], math.prod(w.q.shape[2:])).transpose(2, 3)
    wz = torch.from_numpy(np.resize(w.zero, n)).long().view(win.groups, -1, 1)
    ends = [(0,0),(0,0),*zip(win.pads[:dims], win.pads[dims:])]
    padded = torch.from_numpy(np.pad(x.q, ends, constant_values=x.zero.item()))
    def images(v):
        seen = taps(v, w.q.shape[2:], win)
        acc = corrected(columns(seen, win.groups), x.zero.item(), wq, wz, how)
        return acc.reshape(n, len(v), *seen.shape[3:]).transpose(0, 1)
    some = max(1, 2**21//(n+w.q[0].size)//padded[0,0].numel()) # at a time, for the sake of memory
    return torch.cat([images(v) for v in padded.split(some)]).numpy()

def taps(x, kernel, win):
    "What each position of a kernel sees of the padded `x`: [kernel positions, batch, channels, ...]"
    size = [(n-d*(k-1)-1)//s+1 for n,k,s,d in zip(x.shape[2:], kernel, win.strides, win.dilations)]
    def seen(at): return tuple(slice(i*d, i*d+(n-1)*s+1, s) for i,n,s,d in zip(at, size, win.strides, win.dilations))
    return torch.stack([x[(..., *seen(at))] for at in np.ndindex(*kernel)])

def columns(seen, groups):
    "What `taps` gave, with the batch and its positions as outputs"
    t,n,c = seen.shape[:3]
    return seen.reshape(t, n, groups, c//groups, -1).permute(2,0,3,1,4).flatten(3)

def corrected(x, zx, w, zw, how):
    "Sums of `(x-zx)*(w-zw)`: a kernel sums `x*w`, and what zero points add is exact (Jacob et al. 2018, eq. 7)"
    total,n = exact(x, w) if how=='exact' else saturated(x, w, how),w[0,0].numel()
    return total - zx*w.sum((2,3))[...,None] - zw*(x.sum((1,2))[:,None]-zx*n)

def exact(x:Tensor, w:Tensor)->Tensor:
    "Sums of `x*w`, of shape [groups, output channels, outputs]"
    x = x.flatten(1, 2).double() # exact below 2**53
    return torch.cat([v.double()@x for v in w.flatten(2).split(256, 1)], 1).long()

def saturated(x:Tensor, w:Tensor, order:str)->Tensor:
    "The same, but each two neighbouring products are added in 16 bits that end at 32767 and -32768"
    if order=='block': x,w = even(x, 2),even(w, 3)
    x,w = even(x.flatten(1, 2), 1),even(w.flatten(2), 2)
    acc = torch.zeros(*w.shape[:2], x.shape[2], dtype=torch.int32)
    for i in range(0, x.shape[1], 2):
        (x0,x1),(w0,w1) = x[:,i:i+2].int().unbind(1),w[...,i:i+2].int().unbind(2)
        pairs = (x0[:,None]*w0[...,None]).addcmul_(x1[:,None], w1[...,None])
        acc += pairs.clamp_(-2**15, 2**15-1)
    return acc.long()

def even(x, dim):
    "`x` with a 0 at the end of an odd dimension"
    return torch.cat([x, torch.zeros_like(x.narrow(dim, 0, 1))], dim) if x.shape[dim]%2 else x

# Neighbours in 16 bits

def different(a, b):
    "Names of what differs between the values `a` and `b` of a graph"
    return [k for k,v in a.items() if not np.array_equal(v, b[k])]

def assert_saturates_nowhere(proto, feeds):
    "Assert that every value in the graph is what it is in exact integers, whichever neighbours are added in 16 bits"
    assert set(integer_layers(proto))==set(layer_nodes(proto))
    whole = evaluate(proto, feeds)
    assert {n.input[0] for n in activations(proto)}|{o.name for o in proto.graph.output}<=set(whole)
    for order in ('flat','block'):
        assert not different(whole, evaluate(proto, feeds, saturate=True, order=order)), order
