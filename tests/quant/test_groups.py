"Weights in 4 bits with a scale for each few neighbours: from a spec to a file that is held against NumPy's rounding"
import copy, numpy as np, onnx, onnxruntime as ort, pytest, torch, torch.nn.functional as F
from fastai.vision.all import set_seed
from onnx.reference import ReferenceEvaluator
from torch import nn
from fastquant.all import *
from fastquant.export.engine import layer_kernels
from fastquant.export.verify import verify
from fastquant.quant.spec import find_spec
from tests.helpers.data import loaders, noise
from tests.helpers.files import of_net, rounds
from tests.helpers.learners import check_owned, classifier, every_parameter_moves
from tests.helpers.nets import classify

def groups(bits=4, n=32, observer='min_max', **kw): return Spec(TensorSpec(Grid(bits), observer, PerGroup(n), **kw), act=None)

class Own(nn.Module):
    "Parameters outside of layers, one of them turned, and one on the left"
    def __init__(self):
        super().__init__()
        self.a,self.b,self.c = (nn.Parameter(torch.randn(*s)*.3) for s in ((40,9),(5,9),(7,36)))
    def forward(self, x): return F.linear((self.c@x)@self.a, self.b)

class Twice(nn.Module):
    "A layer that runs twice, and one whose weight something else reads too"
    def __init__(self):
        super().__init__()
        self.lin,self.out = nn.Linear(40, 40),nn.Linear(40, 6)
    def forward(self, x): return self.out(self.lin(self.lin(x).relu()))+self.out.weight.sum()

def convs(): return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), *classify(8, 9))
def tokens(): return nn.Sequential(nn.Linear(40, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 7, bias=False))
def plain(): return nn.Sequential(nn.Linear(40, 64), nn.ReLU(), nn.Linear(64, 7))
def one_d(): return nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.Conv1d(8, 40, 1))
nets = dict(tokens=(tokens, (4,5,40)), rows=(plain, (4,40)), own=(Own, (4,36,40)), twice=(Twice, (4,40)), convs=(convs, (6,3,10,10)), one_d=(one_d, (6,3,10)))

def net_of(name):
    torch.manual_seed(0)
    make,shape = nets[name]
    return make().eval(),torch.randn(shape)

def by_hand(net, r):
    "The float net with each weight rounded by NumPy, in groups with the scales of `r`, in float16"
    net = copy.deepcopy(net)
    for k,spec in r.weights.items():
        p = net.get_submodule(k).weight if k in r.modules else getattr(net, k)
        turned = k=='a' # which a product has output channels last
        w = (p.T if turned else p).detach().numpy()
        n,flat = spec.granularity.n,w.reshape(len(w), -1)
        s = r.weight_scale[r.slices[k]].detach().numpy().astype(np.float16).astype(np.float32).reshape(len(w), -1)
        each = np.repeat(s, n, 1)[:,:flat.shape[1]]
        q = np.clip(np.rint(flat/each), spec.grid.lo, spec.grid.hi)
        new = torch.tensor((q*each).reshape(w.shape))
        if k!='out' or not isinstance(net, Twice): p.data = (new.T if turned else new).clone()
        else: net.out.weight,net.kept = nn.Parameter(new),p # which is read as it was
    if isinstance(net, Twice): net.forward = lambda x: net.out(net.lin(net.lin(x).relu()))+net.kept.sum()
    return net

@pytest.mark.parametrize('name', nets)
@pytest.mark.parametrize('spec', [groups(),groups(3, 16),groups(4, 24),groups(2),groups(8, 20)], ids=['w4','w3','of_24','w2','w8'])
def test_is_the_float_net_with_rounded_weights(name, spec):
    "In the model that rounds, its simulation, our session, a plain one, and as the standard says if it has the operators"
    net,x = net_of(name)
    rounded = rounds(copy.deepcopy(net), spec, x, fold=False)
    want = by_hand(net, fake_quant_of(rounded))(x)
    sim = convert(copy_model(rounded))
    data = to_onnx(sim, x).SerializeToString()
    plain, = ort.InferenceSession(data).run(None, {'input':x.numpy()})
    for got in rounded(x),sim(x),Engine(data)(x),torch.tensor(plain): assert sqnr(want, got)>100
    kinds = {n.op_type for n in onnx.load_from_string(data).graph.node}
    assert ('MatMulNBits' in kinds)==(spec.weight.grid.bits in (3,4) and spec.weight.granularity.n!=24 and name!='one_d') and 'DequantizeLinear' not in kinds
    if not kinds&{'MatMulNBits','Gelu','LayerNormalization'}: assert sqnr(want, torch.tensor(ReferenceEvaluator(onnx.load_from_string(data)).run(None, {'input':x.numpy()})[0]))>100
    report = verify(net, rounded, sim, data, [(x,)])
    assert set(report.weights_only.values())=={spec.weight.grid.bits} and not report.float_layers and report.kind=='weights only'

def transformer(n=2, d=128):
    layer = lambda: nn.TransformerEncoderLayer(d, 4, 4*d, batch_first=True, dropout=0.)
    return nn.Sequential(*[layer() for _ in range(n)], nn.Linear(d, 5))

def test_a_transformer():
    "A seventh of the float file, all of its products by the kernel"
    torch.manual_seed(0)
    net,x = transformer().eval(),torch.randn(2, 6, 128)
    f = of_net(net, x, 'w4')
    full = to_onnx(copy_model(net), x).ByteSize()
    assert f.proto.ByteSize()<full/6.3
    report = verify(net, f.rounded, f.sim, f.data, [(x,)])
    assert not report.float_layers and len(report.weights_only)>=9 and set(layer_kernels(f.data).values())=={'MatMulNBits'}
    e = Engine(f.data)
    float_ = Engine(to_onnx(copy_model(net), x).SerializeToString())
    assert (e.n_macs,e.n_params)==(float_.n_macs,float_.n_params)

def test_another_engine():
    "It rounds no activation either"
    pytest.importorskip('openvino')
    for name in 'tokens','convs':
        net,x = net_of(name)
        f = of_net(net, x, 'w4')
        assert sqnr(f.sim(x), Openvino(f.data)(x))>90

@pytest.mark.parametrize('opset', [13,17,21])
def test_older_versions(opset):
    for name in 'rows','convs':
        net,x = net_of(name)
        f = of_net(net, x, 'w4')
        assert sqnr(f.sim(x), Engine(to_onnx(f.sim, x, opset=opset).SerializeToString())(x))>100

def test_beside_int8():
    "Each layer as its own spec says"
    torch.manual_seed(0)
    net,x = convs().eval(),torch.randn(6, 3, 10, 10)
    for spec,in_int8 in (Spec(overrides=(('6',groups()),)),2),(Spec(groups().weight, act=None, overrides=(('2',Spec()),)),1):
        f = of_net(net, x, spec)
        report = verify(net, f.rounded, f.sim, f.data, [(x,)])
        assert report.n_int8==in_int8 and set(report.weights_only.values())=={4}

def test_a_fault_is_seen():
    "A nibble or a scale that is another one is refused, and the layer named"
    net,x = net_of('tokens')
    f = of_net(net, x, 'w4')
    for name in '0.weight','0.weight_scale_half':
        proto = copy.deepcopy(f.proto)
        i = next(i for i in proto.graph.initializer if i.name==name)
        i.raw_data = bytes([i.raw_data[0]^16])+i.raw_data[1:]
        with pytest.raises(ExportMismatch, match="weight of '0'"): f.gate(proto)

def test_no_scale_is_too_small():
    "Weights next to nothing stay so, and a group of zeros stays zero"
    net,x = net_of('rows')
    with torch.no_grad():
        net[0].weight[:3] *= 1e-12
        net[0].weight[5] = 0
    f = of_net(net, x, 'w4')
    w = fake_quant_of(f.sim).as_floats('0')[0]
    assert w.isfinite().all() and (w[:3].abs()<1e-7).all() and (w[5]==0).all()
    f.gate()

def test_a_better_scale():
    "*search* loses less than the whole range, and *hqq* too"
    torch.manual_seed(0)
    net,x = transformer().eval(),torch.randn(4, 6, 128)
    db = {k:sqnr(net(x), rounds(copy.deepcopy(net), groups(observer=k), x)(x)) for k in ('min_max','search','hqq')}
    assert db['search']>db['min_max']+.1 and db['hqq']>db['min_max']

# For a Learner

@pytest.fixture
def learn(tmp_path):
    set_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 64), nn.ReLU(), nn.Linear(64, 3))
    learn = classifier(loaders(noise(1, 8, 8, n=48), bs=8), net, tmp_path)
    learn.fit(1, 1e-2)
    return learn

def test_quantize(learn, tmp_path):
    q = learn.quantize('w4', fname='w4.onnx')
    assert q.model.report.weights_only=={'0':4, '4':4, '6':4} and 'int4' in str(q.model.report)
    table = learn.compare(q, learn.load_onnx('w4.onnx'), n=3, warmup=0)
    assert table.MACs.nunique()==1 and table['in float there (ms)'].iloc[1]>0
    errors = learn.layer_errors('w4', show_plot=False)
    assert set(errors.layer)=={'0','4','6'} and errors.own.min()>15

@pytest.mark.parametrize('spec', ['w4',groups(learned=True)], ids=['w4','learned'])
def test_training(learn, spec, tmp_path):
    "Steps and weights learn, and what is shipped is what was trained"
    learn.fit(2, 1e-3, cbs=QuantAwareCallback(spec))
    r = fake_quant_of(learn.model)
    check_owned(learn)
    every_parameter_moves(learn)
    assert r.slices['4'].stop-r.slices['4'].start==64*9
    q = learn.quantize()
    assert q.model.report.trained and q.model.report.agrees_rounded==1 and q.model.report.sqnr>60
    learn.save('here')
    want = learn.get_preds()[0]
    fresh = classifier(learn.dls, unprepare(copy_model(learn.model)), tmp_path)
    assert fresh.load('here').get_preds()[0].equal(want)

def test_channels_go_first(learn):
    learn.fit(1, 1e-3, cbs=QuantAwareCallback('w4'))
    before = {k:v.clone() for k,v in learn.model.state_dict().items()}
    with pytest.raises(ValueError, match="'4' share scales in groups.*Remove channels first"): learn.prune(.5, structure='channel')
    assert all(v.equal(before[k]) for k,v in learn.model.state_dict().items())

def test_what_is_not_done_yet_is_named(learn):
    part = Spec(TensorSpec(Grid(4), granularity=PerGroup(32)))
    with pytest.raises(NotImplementedError, match='PerGroup beside rounded activations'): learn.quantize(part)
    with pytest.raises(NotImplementedError, match='PerGroup beside'): learn.quantize(Spec(overrides=(('0',part),)))
    assert fake_quant_of(learn.model) is None

# Embeddings

class Words(nn.Module):
    "An embedding, and a last layer that may have the same weight"
    def __init__(self, tied=False):
        super().__init__()
        self.emb,self.hid,self.out = nn.Embedding(50, 40, padding_idx=0),nn.Linear(40, 40),nn.Linear(40, 50)
        if tied: self.out.weight = self.emb.weight
    def forward(self, x): return self.out(self.hid(self.emb(x)).relu())

@pytest.mark.parametrize('tied', [False,True])
@pytest.mark.parametrize('spec', ['w8','w4'])
def test_embeddings(tied, spec):
    "A row for each token, rounded like the weight of a layer, and stored in as few bytes"
    torch.manual_seed(0)
    net,x = Words(tied).eval(),torch.randint(0, 50, (4,6))
    f = of_net(net, x, spec)
    r = fake_quant_of(f.rounded)
    w,s = net.emb.weight,r.weight_scale[r.slices['emb']]
    s = s.half().float().reshape(50, -1).repeat_interleave(32, 1)[:,:40] if spec=='w4' else s[:,None]
    grid = r.weights['emb'].grid
    table = (w/s).round().clamp(grid.lo, grid.hi)*s
    with torch.no_grad(): assert torch.equal(f.rounded.emb(x), net.emb(x)) and fake_quant_of(f.sim).as_floats('emb')[0].equal(table)
    plain, = ort.InferenceSession(f.data).run(None, {'input':x.numpy()})
    for got in f.rounded(x),Engine(f.data)(x),torch.tensor(plain): assert sqnr(f.sim(x), got)>100
    report = verify(net, f.rounded, f.sim, f.data, [(x,)])
    assert list(report.weights_only)==['emb','hid','out'] and not report.float_layers
    assert Engine(f.data).n_params in (n_params(net),n_params(net)+2000*tied)

@pytest.mark.parametrize('spec', ['int8','dynamic'])
def test_beside_integers_a_table_has_8_bits(spec):
    "Nothing is rounded on its way into an embedding, and its rows are floats"
    torch.manual_seed(0)
    net,x = Words(tied=True).eval(),torch.randint(0, 50, (4,6))
    f = of_net(net, x, spec)
    w,s = net.emb.weight,net.emb.weight.abs().amax(1, keepdim=True).clamp(min=1e-6)/127
    with torch.no_grad(): assert torch.allclose(fake_quant_of(f.sim).as_floats('emb')[0], (w/s).round()*s, atol=1e-6)
    report = verify(net, f.rounded, f.sim, f.data, [(x,)])
    assert report.weights_only=={'emb':8} and report.n_int8==2 and not report.float_layers and report.sqnr>60
    assert len(f.data)<len(of_net(net, x, find_spec(spec).excluding('emb')).data)

def test_an_embedding_is_trained_through(tmp_path):
    learn = classifier(loaders([(t,int(t[0])) for t in torch.randint(0, 50, (48,6))], bs=8), nn.Sequential(Words(), nn.Flatten(), nn.Linear(300, 50)), tmp_path)
    learn.fit(1, 1e-3, cbs=QuantAwareCallback('w4'))
    check_owned(learn)
    report = learn.quantize().model.report
    assert report.trained and report.agrees_rounded==1 and '0.emb' in report.weights_only
    report = learn.remove_quant().quantize('w4', exclude='0.emb').model.report
    assert '0.emb' not in report.weights_only and report.float_layers=={'0.emb':'excluded'}

def test_an_embedding_that_stays_in_float_is_named():
    class Elsewhere(Words):
        def forward(self, x): return self.out(self.hid(F.embedding(x, self.emb.weight)).relu())
    net,x = Elsewhere().eval(),torch.randint(0, 50, (4,6))
    assert fake_quant_of(rounds(net, 'w4', x)).float_layers=={'emb':'something else looks its rows up, or they are the same for every batch'}

def test_equal_integers():
    "Layers whose weights are the same numbers, at another scale or at the same one"
    torch.manual_seed(0)
    net,x = nn.Sequential(nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 40)).eval(),torch.randn(4, 40)
    net[2].weight.data,net[4].weight.data = 2*net[0].weight.data,net[0].weight.data.clone()
    f = of_net(net, x, 'w4')
    report = verify(net, f.rounded, f.sim, f.data, [(x,)])
    assert list(report.weights_only)==['0','2','4'] and report.sqnr>100
