"Files of single layers on integers, of every shape, and a small net"
import numpy as np, onnx, onnxruntime as ort
from dataclasses import dataclass, field
from onnx import helper as oh
from torch import nn
from fastquant.export.portable import session

plain = ort.GraphOptimizationLevel.ORT_DISABLE_ALL

def model(nodes, ins, outs, arrays):
    "An ONNX model of the opset and IR version that exported files have"
    graph = oh.make_graph(nodes, 'g', ins, outs, arrays)
    return oh.make_model(graph, opset_imports=[oh.make_opsetid('', 20)], ir_version=10)

@dataclass(frozen=True)
class Case:
    "A layer on integers, with random weights"
    x:tuple              # Shape of its input
    w:tuple              # Shape of its weight
    op:str='Conv'        # Operator
    attrs:dict=field(default_factory=dict) # Its attributes
    bias:str='int32'     # Data type of the bias: this, 'float', or '' for none
    act:type=np.uint8    # Data type of the input's integers
    weight:type=np.int8  # Data type of the weight's integers
    transposed:bool=False # A `Transpose` between the weight and the layer?

class File:
    "An ONNX file of one layer for each of `cases`, and an input for each"
    def __init__(self, cases, seed=0):
        self.cases,self.rng = cases,np.random.default_rng(seed)
        self.nodes,self.arrays,self.feeds = [],{},{}
        for name,c in cases.items(): self.layer(name, c)
        self.steps = {k:abs(v).max()/np.float32(120) for k,v in self.outputs(self.proto(), plain).items()}
    def keep(self, name, array):
        "Put `array` into the file"
        self.arrays[name] = np.asarray(array)
        return name
    def add(self, op, ins, out, **attrs):
        "Put a node into the file"
        self.nodes.append(oh.make_node(op, ins, [out], out, **attrs))
        return out
    def pair(self, x, name, scale, zero, nodes):
        "Send `x` through integers"
        ends = [self.keep(f'{name}_scale', np.float32(scale)),self.keep(f'{name}_zero', zero)]
        nodes.append(oh.make_node('QuantizeLinear', [x,*ends], [f'{name}_q']))
        nodes.append(oh.make_node('DequantizeLinear', [f'{name}_q',*ends], [name]))
        return name
    def integers(self, name, q, scale, zero, axis):
        "Dequantize constant integers"
        ins = [self.keep(f'{name}_q', q),self.keep(f'{name}_s', scale.astype(np.float32)),self.keep(f'{name}_z', zero)]
        return self.add('DequantizeLinear', ins, name, axis=axis)
    def layer(self, name, c):
        "The nodes of `c`, with an input of whole steps, many of them the largest there is"
        zero,out = c.act(self.rng.integers(0, 60)),self.axis(c)
        q = np.where(self.rng.random(c.x)<.4, 255, self.rng.integers(0, 256, c.x))-(128 if c.act==np.int8 else 0)
        self.feeds[f'{name}_in'] = (.02*(q-float(zero))).astype(np.float32)
        ins = [self.pair(f'{name}_in', f'{name}_x', .02, zero, self.nodes),self.weight(name, c, out)]
        if c.bias: ins.append(self.bias(name, c, out))
        self.add(c.op, ins, name, **c.attrs)
    def axis(self, c):
        "Where the weight has its output channels"
        inputs_first = c.op=='MatMul' or c.op=='Gemm' and not c.attrs.get('transB')
        return 1 if inputs_first and not c.transposed else 0
    def weight(self, name, c, out):
        "A dequantized weight of the whole range"
        n,middle = c.w[out],128 if c.weight==np.uint8 else 0
        self.scale,zero = self.rng.uniform(.5, 1.5, n)/100,np.full(n, middle, c.weight)
        q = (self.rng.integers(-127, 128, c.w)+middle).astype(c.weight)
        w = self.integers(f'{name}_w', q, self.scale, zero, out)
        return self.add('Transpose', [w], f'{name}_t', perm=[1,0]) if c.transposed else w
    def bias(self, name, c, out):
        "A bias, dequantized or not"
        n = c.w[out]
        if c.bias=='float': return self.keep(f'{name}_b', self.rng.normal(0, 5, n).astype(np.float32))
        q = self.rng.integers(-5000, 5000, n).astype(np.int32)
        return self.integers(f'{name}_b', q, np.float32(.02)*self.scale.astype(np.float32), np.zeros(n, np.int32), 0)
    def proto(self, rounded=False):
        "The file, with outputs as they are or on a grid of 8 bits"
        nodes,names = list(self.nodes),list(self.cases)
        if rounded: names = [self.pair(k, f'{k}_y', self.steps[k], np.uint8(128), nodes) for k in names]
        ins = [oh.make_tensor_value_info(k, 1, v.shape) for k,v in self.feeds.items()]
        outs = [oh.make_tensor_value_info(k, 1, None) for k in names]
        arrays = [onnx.numpy_helper.from_array(v, k) for k,v in self.arrays.items()]
        return model(nodes, ins, outs, arrays)
    def outputs(self, proto, level):
        "What ONNX Runtime makes of it"
        names = [o.name for o in proto.graph.output]
        engine = session(proto.SerializeToString(), graph_optimization_level=level)
        return dict(zip(names, engine.run(names, self.feeds)))
    def apart(self, a, b):
        "How many steps lie at most between the outputs `a` and `b` of each layer"
        return {k:abs(a[f'{k}_y']-b[f'{k}_y']).max()/s for k,s in self.steps.items()}

def conv(x, w, **kw):
    "A convolution, by shapes and attributes"
    own = {k:kw.pop(k) for k in ('bias','act','weight') if k in kw}
    return Case(x, w, attrs=dict(kernel_shape=w[2:], **kw), **own)

class Net(nn.Module):
    "Convolutions that are plain, depthwise and pointwise, a join, and linear layers on tokens and at the end"
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU())
        self.depth = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.Hardswish(), nn.Conv2d(12, 12, 1))
        self.tokens,self.head = nn.Linear(12, 18),nn.Linear(18, 5)
    def forward(self, x):
        x = self.stem(x)
        x = x+self.depth(x)
        return self.head(self.tokens(x.flatten(2).transpose(1, 2)).relu().mean(1))
