"Weights in half precision, and everything else in float: from a spec to a file that is held against NumPy's rounding"
import copy, numpy as np, onnx, onnxruntime as ort, pytest, torch
from fastai.vision.all import ImageBlock, PILImageBW, load_learner
from onnx.reference import ReferenceEvaluator
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from fastquant.all import *
from fastquant.export.verify import verify
from tests.helpers.data import gray, loaders, pictures as pictures_of
from tests.helpers.files import of_net
from tests.helpers.learners import check_owned, classifier, every_parameter_moves
from tests.helpers.nets import classify

class Text(nn.Module):
    "Much that is no layer: an embedding, places that are learned, a recurrent layer, a product of its own"
    def __init__(self):
        super().__init__()
        self.emb,self.rnn,self.out = nn.Embedding(50, 16),nn.LSTM(16, 24, batch_first=True),nn.Linear(24, 5)
        self.place,self.own = nn.Parameter(torch.randn(1, 6, 16)),nn.Parameter(torch.randn(24, 24)*.2)
    def forward(self, x): return self.out(self.rnn(self.emb(x)+self.place)[0].mean(1)@self.own)

class Wider(nn.Module):
    def __init__(self):
        super().__init__()
        self.up,self.out = nn.ConvTranspose2d(3, 8, 2, 2),nn.Conv2d(8, 4, 3)
    def forward(self, x): return self.out(self.up(x).relu())

class Last(nn.Module):
    "Nothing that integers have a kernel for"
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(8, 12, batch_first=True)
    def forward(self, x): return self.rnn(x)[0][:,-1]

def pictures(): return torch.randn(6, 3, 10, 10)
nets = dict(linear=lambda: (nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.LayerNorm(20), nn.Linear(20, 7)), torch.randn(4, 5, 12)),
    convs=lambda: (nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), *classify(8, 9)), pictures()),
    text=lambda: (Text(), torch.randint(0, 50, (4,6))), wider=lambda: (Wider(), pictures()),
    recurrent=lambda: (Last(), torch.randn(4, 5, 8)), transposed=lambda: (nn.Sequential(nn.ConvTranspose2d(3, 8, 2, 2), nn.ReLU()), pictures()))

def net_of(name):
    torch.manual_seed(0)
    net,x = nets[name]()
    return net.eval(),x

def by_hand(net, dtype=torch.float16):
    "The float net with each weight rounded: by NumPy, or, where that has no such type, by the bits"
    net = copy.deepcopy(net)
    for p in net.parameters():
        if p.ndim<2: continue
        a = p.detach().numpy()
        if dtype==torch.float16:
            with np.errstate(over='ignore'): a = a.astype(np.float16).astype(np.float32)
        else:
            bits = a.view(np.uint32).astype(np.uint64)
            a = ((bits+0x7fff+(bits>>16&1))&0xffff0000).astype(np.uint32).view(np.float32)
        p.data = torch.tensor(a)
    return net

@pytest.mark.parametrize('name', nets)
@pytest.mark.parametrize('spec', ['fp16','bf16'])
def test_is_the_float_net_with_rounded_weights(name, spec):
    "In its simulation, in our session, in a plain one and as the standard says; with each weight in two bytes"
    net,x = net_of(name)
    f = of_net(net, x, spec)
    rounded = by_hand(net, specs[spec]().weight.grid)
    want = rounded(x)
    assert all(torch.equal(p, rounded.get_parameter(k)) for k,p in f.sim.named_parameters() if k in dict(rounded.named_parameters()))
    plain, = ort.InferenceSession(f.data).run(None, {'input':x.numpy()})
    for got in f.sim(x),Engine(f.data)(x),torch.tensor(plain): assert sqnr(want, got)>100
    if spec=='fp16' and name in ('linear','convs'): assert sqnr(want, torch.tensor(ReferenceEvaluator(f.proto).run(None, {'input':x.numpy()})[0]))>100
    of = onnx.TensorProto
    large = [i for i in f.proto.graph.initializer if np.prod(i.dims)>=64 and i.data_type in (of.FLOAT,of.FLOAT16,of.BFLOAT16)]
    assert large and all(i.data_type!=of.FLOAT for i in large if 'bias' not in i.name)
    report = verify(net, f.rounded, f.sim, f.data, [(x,)])
    said = str(specs[spec]().weight.grid).removeprefix('torch.')
    assert not report.float_layers and set(report.weights_only.values())=={said} and report.kind=='weights only' and f'weights in {said}' in str(report)
    if name=='text': assert set(report.weights_only)=={'emb','rnn','place','out','own'}
    if name=='wider': assert set(report.weights_only)=={'up','out'}

def test_batchnorm_is_folded_first():
    "What is rounded is what the file has"
    torch.manual_seed(0)
    net,x = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), *classify(8, 9)),pictures()
    for _ in range(3): net(x)
    net.eval()
    f = of_net(net, x, 'fp16')
    folded = nn.Sequential(fuse_conv_bn_eval(net[0], net[1]), *net[2:])
    assert sqnr(by_hand(folded)(x), Engine(f.data)(x))>100 and 'BatchNormalization' not in {n.op_type for n in f.proto.graph.node}

@pytest.mark.parametrize('opset', [13,18,21])
def test_older_versions(opset):
    net,x = net_of('convs')
    f = of_net(net, x, 'fp16')
    proto = to_onnx(f.sim, x, opset=opset)
    assert sqnr(f.sim(x), Engine(proto.SerializeToString())(x))>100 and proto.ByteSize()<1.1*f.proto.ByteSize()

@pytest.mark.parametrize('spec', ['fp16','bf16'])
def test_another_engine(spec):
    pytest.importorskip('openvino')
    net,x = net_of('linear')
    f = of_net(net, x, spec)
    assert sqnr(f.sim(x), Openvino(f.data)(x))>90

# Where there is no room

def test_what_is_beyond_stays_in_float_and_is_named(tmp_path):
    net,x = net_of('text')
    with torch.no_grad(): net.emb.weight[3,2],net.out.weight[1,1] = 7e4,-1e5
    learn = classifier(loaders([(t,0) for t in torch.randint(0, 50, (32,6))], bs=8), net, tmp_path)
    with pytest.warns(UserWarning) as said: q = learn.quantize('fp16')
    words = [str(w.message) for w in said]
    assert any("'out' has a weight of 1e+05, which is infinite" in w for w in words) and any("'emb' has a weight of 7e+04" in w for w in words)
    report = q.model.report
    assert set(report.float_layers)=={'emb','out'} and '7e+04' in report.float_layers['emb'] and set(report.weights_only)=={'rnn','place','own'}
    tokens = torch.randint(0, 50, (4,6))
    want = by_hand(net)
    want.emb.weight.data,want.out.weight.data = net.emb.weight.data,net.out.weight.data
    assert sqnr(want(tokens), q.model(tokens))>100
    assert not learn.quantize('bf16').model.report.float_layers

def test_nan_is_named():
    net,x = net_of('text')
    with torch.no_grad(): net.emb.weight[0,0] = float('nan')
    with pytest.raises(ValueError, match="'emb.weight' has NaN"): prepare(net, 'fp16', x)

def test_some_layers_only():
    "Excluded ones are in float, and others in int8"
    net,x = net_of('text')
    f = of_net(net, x, spec_of('fp16').excluding(['emb','own']))
    report = verify(net, f.rounded, f.sim, f.data, [(x,)])
    assert set(report.weights_only)=={'rnn','place','out'} and report.float_layers=={'own':'excluded', 'emb':'excluded'}
    assert torch.equal(f.sim.emb.weight, net.emb.weight) and torch.equal(f.sim.own, net.own)
    net,x = net_of('convs')
    f = of_net(net, x, Spec(overrides=(('6',spec_of('fp16')),)))
    report = verify(net, f.rounded, f.sim, f.data, [(x,)])
    assert report.n_int8==2 and report.weights_only=={'6':'float16'}
    f = of_net(net, x, Spec(specs['fp16']().weight, act=None, overrides=(('2',Spec()),)))
    report = verify(net, f.rounded, f.sim, f.data, [(x,)])
    assert report.n_int8==1 and report.weights_only=={'0':'float16', '6':'float16'}

def spec_of(name): return specs[name]()

# For a Learner

def test_quantize(learn, recwarn, tmp_path):
    "A file of half the size, the same predictions, and verbs take it"
    q = learn.quantize('fp16', fname='half.onnx')
    assert not [w for w in recwarn if 'not faster' in str(w.message)] and q.model.report.agrees_float==1
    table = learn.compare(q, learn.load_onnx('half.onnx'), n=3, warmup=0)
    assert list(table.index)==['float','weights only','weights only 2'] and table.MACs.nunique()==1
    assert table.agrees.min()==1 and (tmp_path/'half.onnx').stat().st_size<.6*learn.export_onnx().stat().st_size
    errors = learn.layer_errors('fp16', show_plot=False)
    assert set(errors.layer)=={'0','3','7'} and errors.output.min()>60

def test_export(tmp_path):
    "A Learner to a file and back"
    learn = classifier(pictures_of(40, get_x=gray, block=ImageBlock(PILImageBW)), nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), *classify(8)), tmp_path)
    q,x = learn.quantize('fp16'),learn.dls.valid.one_batch()[0]
    q.path = tmp_path
    q.export('q.pkl')
    assert load_learner(tmp_path/'q.pkl').model(x).equal(q.model(x))

def test_training(learn, tmp_path):
    "Rounded in each step, and what is shipped is what was trained"
    learn.fit(2, 1e-3, cbs=QuantAwareCallback('fp16'))
    r = fake_quant_of(learn.model)
    check_owned(learn)
    every_parameter_moves(learn)
    assert not r.all and r.ready and set(ranges(learn.model).bits)=={16}
    q = learn.quantize()
    assert q.model.report.trained and q.model.report.agrees_rounded==1 and q.model.report.sqnr>60
    learn.save('here')
    want = learn.get_preds()[0]
    fresh = classifier(learn.dls, unprepare(copy_model(learn.model)), tmp_path)
    assert fresh.load('here').get_preds()[0].equal(want)

@pytest.mark.parametrize('dtype,spec', [(torch.float16,'fp16'),(torch.bfloat16,'bf16')])
def test_models_in_half_precision(learn, dtype, spec, tmp_path):
    "They are exported, and what they have is kept as it is"
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)).to(dtype)
    x = torch.rand(16, 1, 8, 8)
    half = classifier(loaders([(o.to(dtype),i%3) for i,o in enumerate(x)], bs=8), net, tmp_path)
    run,q = load_engine(half.export_onnx()),half.quantize(spec).model
    want = copy.deepcopy(net).float()(x)
    assert run(x.to(dtype)).dtype==q(x.to(dtype)).dtype==dtype
    assert sqnr(want, q(x))>100 and sqnr(want, run(x))>(100 if dtype==torch.bfloat16 else 40)
    assert q.report.sqnr_float>100 and len(run.data)<.6*4*sum(p.numel() for p in net.parameters())

@pytest.mark.parametrize('part,say', [(dict(weight=TensorSpec(torch.float16)),'beside rounded activations')])
def test_what_is_not_done_yet_is_named(learn, part, say):
    with pytest.raises(NotImplementedError, match=say): learn.quantize(Spec(**part))
    with pytest.raises(NotImplementedError, match=say): learn.quantize(Spec(overrides=(('0',Spec(**part)),)))
    assert fake_quant_of(learn.model) is None

@pytest.mark.parametrize('spec', ['fp16','fp16_arithmetic'])
def test_nothing_but_a_recurrent_layer(tmp_path, spec):
    "A Learner whose model has no layer that integers could compute trains through the rounding and ships"
    torch.manual_seed(0)
    data = [(torch.randn(5, 8),torch.randint(0, 12, ())) for _ in range(32)]
    learn = classifier(loaders(data, bs=8), Last(), tmp_path)
    learn.fit(1, 1e-2, cbs=QuantAwareCallback(spec))
    check_owned(learn)
    q = learn.quantize(timed=False)
    assert set(q.model.report.weights_only)=={'rnn'} and q.model.report.agrees_rounded==1
    with pytest.raises(ValueError, match="this spec rounds none.*GRU.*'fp16' halves"): learn.remove_quant().quantize('int8')
