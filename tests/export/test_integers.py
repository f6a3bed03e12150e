"The evaluator of exported files in `helpers/integers.py`, held against ONNX Runtime, loops over taps, and AVX2"
import copy, numpy as np, onnx, pytest, torch
from onnx import helper as oh
from fastquant.all import *
from fastquant.export.onnx import layer_nodes
from fastquant.export.portable import session
from tests.helpers.files import rounds
from tests.helpers.haswell import on_haswell
from tests.helpers.integers import evaluate, integer_layers, values
from tests.helpers.layers import Case, File, Net, conv, model, plain

convolutions = dict(
    line=conv((2,5,17), (6,5,3), pads=[1,2], strides=[2], dilations=[2]),
    square=conv((2,3,9,9), (8,3,3,3), pads=[1,1,1,1]),
    even=conv((2,4,9,7), (5,4,2,3), pads=[0,1,2,0], strides=[2,1], bias=''),
    dot=conv((2,7,5,5), (4,7,1,1), bias='float'),
    wide=conv((2,16,6,6), (9,16,3,3), pads=[1,1,1,1], dilations=[2,1]),
    cube=conv((2,3,5,6,7), (4,3,3,1,2), pads=[1,0,1,1,0,0], strides=[1,2,2]),
    groups=conv((2,6,8,8), (10,3,3,3), pads=[1,1,1,1], group=2),
    depthwise=conv((2,8,8,8), (8,1,3,3), pads=[1,1,1,1], group=8),
    multiplier=conv((2,4,8,8), (8,1,3,3), pads=[1,1,1,1], group=4),
    single=conv((2,1,8,8), (1,1,3,3), pads=[1,1,1,1]),
    signed=conv((2,5,8,8), (6,5,3,3), pads=[1,1,1,1], act=np.int8),
    shifted=conv((2,5,8,8), (6,5,3,3), pads=[1,1,1,1], weight=np.uint8))
linears = dict(
    gemm=Case((3,65), (7,65), 'Gemm', dict(transB=1)),
    upright=Case((3,10), (10,7), 'Gemm', bias='float'),
    bare=Case((3,9), (6,9), 'Gemm', dict(transB=1), bias=''),
    matmul=Case((2,3,33), (33,8), 'MatMul', bias=''),
    transposed=Case((2,3,11), (8,11), 'MatMul', bias='', transposed=True),
    uint8=Case((3,12), (7,12), 'Gemm', dict(transB=1), weight=np.uint8))
exact_anyway = {'depthwise','single','shifted','uint8'}

@pytest.fixture(scope='module')
def file(): return File({**convolutions, **linears})

def test_exact_sums_equal_onnxruntime(file):
    "Layers of every shape give what ONNX Runtime makes of their floats, and on a grid at most one step beside"
    proto = file.proto()
    assert integer_layers(proto)==list(file.cases)
    floats = evaluate(proto, file.feeds)
    for k,v in file.outputs(proto, plain).items():
        np.testing.assert_allclose(floats[k], v, rtol=1e-5, atol=file.steps[k]/1000, err_msg=k)
    proto = file.proto(rounded=True)
    apart = file.apart(evaluate(proto.SerializeToString(), file.feeds), file.outputs(proto, plain))
    assert max(apart.values())<1.01, apart

def test_saturation_hits_those_layers_whose_kernels_saturate(file):
    "Full-range weights saturate, except in a depthwise convolution and around a zero point of 128"
    proto = file.proto(rounded=True)
    whole = evaluate(proto, file.feeds)
    for order in ('flat','block'):
        apart = file.apart(whole, evaluate(proto, file.feeds, saturate=True, order=order))
        alone = {'multiplier'} if order=='block' else set() # a channel that has no neighbour
        assert {k for k,v in apart.items() if v<2}==exact_anyway|alone, (order, apart)
        assert all(apart[k]==0 for k in exact_anyway|alone)

def bare(w, x, zero, **attrs):
    "A model of one layer with scales of 1, whose outputs are its sums, and the floats that `x` stands for"
    arrays = dict(one=np.float32(1), zero=np.uint8(zero), w=w.astype(np.int8), none=np.int8(0))
    nodes = [oh.make_node('QuantizeLinear', ['in','one','zero'], ['q']),
        oh.make_node('DequantizeLinear', ['q','one','zero'], ['x']),
        oh.make_node('DequantizeLinear', ['w','one','none'], ['d']),
        oh.make_node('Conv' if w.ndim>2 else 'Gemm', ['x','d'], ['y'], **attrs)]
    ends = [[oh.make_tensor_value_info(k, 1, s)] for k,s in (('in',x.shape),('y',None))]
    proto = model(nodes, *ends, [onnx.numpy_helper.from_array(np.asarray(v), k) for k,v in arrays.items()])
    return proto,{'in':x.astype(np.float32)-zero}

def clip16(v):
    "What 16 bits make of `v`"
    return min(max(v, -32768), 32767)

def one_sum(taps, zero):
    "Pairs of `(input, weight)` as a processor sums them: two by two, in 16 bits"
    if len(taps)%2: taps = [*taps,(0,0)]
    return sum(clip16(a*v+b*w) for (a,v),(b,w) in zip(taps[::2], taps[1::2])) - zero*sum(w for _,w in taps)

def by_hand(x, w, zero, pads, stride, order):
    "A convolution of one image, tap by tap"
    (chans,hi,wi),(n,_,kh,kw),(top,left,bottom,right) = x.shape,w.shape,pads
    def pixel(o, i, j, u, v):
        r,c = i*stride+u-top,j*stride+v-left
        inside = 0<=r<hi and 0<=c<wi
        taps = [(int(x[k,r,c]) if inside else zero, int(w[o,k,u,v])) for k in range(chans)]
        return [*taps,(0,0)] if order=='block' and chans%2 else taps
    size = (hi+top+bottom-kh)//stride+1,(wi+left+right-kw)//stride+1
    y = np.empty((n,*size))
    for o,i,j in np.ndindex(*y.shape):
        y[o,i,j] = one_sum([t for u,v in np.ndindex(kh, kw) for t in pixel(o, i, j, u, v)], zero)
    return y

@pytest.mark.parametrize('order', ['flat','block'])
def test_saturating_sums_equal_a_loop_over_taps(order):
    "A padded convolution of 3 channels and a linear layer of 5 inputs, added up one by one"
    rng = np.random.default_rng(1)
    x,w = rng.integers(0, 256, (3,6,5)),rng.integers(-128, 128, (4,3,3,2))
    x[:,2:] = 255
    proto,feeds = bare(w, x[None], 37, pads=[1,0,2,1], strides=[2,2])
    y, = values(proto, feeds, ['y'], saturate=True, order=order)
    assert (y[0]==by_hand(x, w, 37, (1,0,2,1), 2, order)).all()
    assert abs(y-values(proto, feeds, ['y'])[0]).max()>1000
    x,w = rng.integers(200, 256, (1,5)),rng.integers(100, 128, (3,5))
    proto,feeds = bare(w, x, 3, transB=1)
    y, = values(proto, feeds, ['y'], saturate=True, order=order)
    assert (y[0]==by_hand(x[0,:,None,None], w[...,None,None], 3, (0,0,0,0), 1, order)[:,0,0]).all()

def test_orders_pair_other_neighbours():
    "With 3 channels a pair reaches into the next pixel, unless pixels are kept apart"
    w = np.zeros((1,3,1,2))
    w[0,2,0,0] = w[0,0,0,1] = 127
    proto,feeds = bare(w, np.full((1,3,1,2), 255), 0)
    sums = [values(proto, feeds, ['y'], saturate=True, order=o)[0].item() for o in ('flat','block')]
    assert sums==[32767,2*127*255]
    with pytest.raises(ValueError, match="pass 'flat' or 'block'"): evaluate(proto, feeds, order='other')

def test_small_weights_do_not_saturate_and_large_ones_do():
    "Weights within +-63 leave room for any two neighbours; two of 127 do not"
    rng = np.random.default_rng(2)
    for shape,attrs in (((8,5,3,3),{}),((8,45),dict(transB=1))):
        x = np.full((2,shape[1],*(4 for _ in shape[2:])), 255)
        proto,feeds = bare(rng.choice([-63,63], shape), x, 0, **attrs)
        whole,same = (values(proto, feeds, ['y'], s)[0] for s in (False,True))
        assert (whole==same).all()
        proto,feeds = bare(np.full(shape, 127), x, 0, **attrs)
        whole,less = (values(proto, feeds, ['y'], s)[0] for s in (False,True))
        assert (whole==45*127*255).all() and (less==22*32767+127*255).all()

def test_unknown_layers_are_refused():
    "What no exported file has raises, and does not go to ONNX Runtime in silence"
    x = np.full((1,3,4,4), 255)
    proto,feeds = bare(np.full((2,3,3,3), 1), x, 0, auto_pad='SAME_UPPER')
    with pytest.raises(NotImplementedError, match='pads itself'): evaluate(proto, feeds)
    proto,feeds = bare(np.full((2,3), 1), np.full((1,3), 255), 0, transB=1, alpha=2.)
    with pytest.raises(NotImplementedError, match='has factors'): evaluate(proto, feeds)

def exported(spec):
    "A file of a small net, and an input for it"
    torch.manual_seed(0)
    net,x = Net(),torch.randn(8, 3, 12, 12)
    with torch.no_grad():
        for _ in range(20): net(x)
    sim = rounds(copy.deepcopy(net.eval()), spec, x)
    return to_onnx(convert(sim), x),{'input':x.numpy()}

def db(a, b):
    "How close the array `b` comes to `a`"
    return sqnr(*(torch.from_numpy(v) for v in (a,b)))

@pytest.mark.parametrize('spec', ['int8_full','int8_symmetric','w4a4','w2a2'])
def test_exported_files_do_what_onnxruntime_does(spec):
    "Files with whole and packed weights agree with ONNX Runtime, and each of their layers is computed in integers"
    proto,feeds = exported(spec)
    found = evaluate(proto, feeds)
    theirs, = session(proto.SerializeToString(), graph_optimization_level=plain).run(None, feeds)
    assert set(integer_layers(proto))==set(layer_nodes(proto)) and len(integer_layers(proto))==5
    assert db(theirs, found['output'])>60
    assert {o for n in proto.graph.node for o in n.output}<=set(found)

def test_saturation_equals_that_of_a_processor(file, tmp_path):
    "AVX2 without VNNI gives what `saturate=True` says, for each layer and a whole net, and not the exact sums"
    proto,net = file.proto(rounded=True),exported('int8_full')
    theirs = on_haswell(tmp_path, layers=(proto,file.feeds), net=net)
    whole,less = (file.apart(evaluate(proto, file.feeds, s), theirs['layers']) for s in (False,True))
    assert max(less.values())<1.01, less
    assert all(v>2 for k,v in whole.items() if k not in exact_anyway), whole
    whole,less = (db(theirs['net']['output'], values(*net, ['output'], s)[0]) for s in (False,True))
    assert less>40>whole, (less, whole)
