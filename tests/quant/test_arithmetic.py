"Arithmetic in half precision: files that compute in float16, held against PyTorch's own `half()`, and in float what has no room there"
import copy, numpy as np, onnx, onnxruntime as ort, pytest, torch
from fastai.vision.all import SaveModelCallback, load_learner, set_seed
from torch import nn
from fastquant.all import *
from fastquant.core.model import evaluating
from fastquant.export.verify import verify
from fastquant.quant.arithmetic import compute_in, watch_room
from tests.helpers import texts
from tests.helpers.data import loaders, noise, pictures
from tests.helpers.files import of_net
from tests.helpers.learners import check_owned, classifier, every_parameter_moves
from tests.helpers.nets import classify

spec = 'fp16_arithmetic'
of = onnx.TensorProto

class Rows(nn.Module):
    "Recurrent, attentive, and with a product and a place of its own"
    def __init__(self, kind):
        super().__init__()
        self.emb,self.mix,self.place = nn.Embedding(50, 16),kind(),nn.Parameter(torch.randn(1, 6, 16))
        self.own,self.out = nn.Parameter(torch.randn(16, 16)*.2),nn.Linear(16, 5)
    def forward(self, x):
        x = self.mix(self.emb(x)+self.place)
        return self.out((x[0] if isinstance(x, tuple) else x).mean(1)@self.own)

class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.att = nn.MultiheadAttention(16, 2, batch_first=True)
    def forward(self, x): return self.att(x, x, x, attn_mask=torch.full((6,6), -torch.inf, dtype=x.dtype).triu(1))[0]

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb,self.out = nn.Embedding(20, 16),nn.Linear(16, 20, bias=False)
        self.out.weight = self.emb.weight
    def forward(self, x): return self.out(self.emb(x).relu())

class First(nn.Module):
    def forward(self, outs): return outs[0]

class Turned(nn.Module):
    "A product of what `transpose` made, which ONNX Runtime takes only if they are kept apart"
    def __init__(self, turn):
        super().__init__()
        self.turn,self.out = turn,nn.Linear(8, 5)
    def forward(self, x): return self.out(self.turn(x)).transpose(0, 1)

def rows(kind): return lambda: (Rows(kind), torch.randint(0, 50, (4,6)))
nets = dict(linear=lambda: (nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.LayerNorm(20), nn.Linear(20, 7)), torch.randn(4, 5, 12)),
    convs=lambda: (nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 8, 3, groups=8), nn.GroupNorm(2, 8), nn.ConvTranspose2d(8, 8, 2, 2), nn.ReLU(), *classify(8, 9)), torch.randn(6, 3, 10, 10)),
    lstm=rows(lambda: nn.LSTM(16, 16, batch_first=True)), gru=rows(lambda: nn.GRU(16, 8, bidirectional=True, batch_first=True)),
    attention=rows(Attention), transformer=rows(lambda: nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)), tied=lambda: (Tied(), torch.randint(0, 20, (4,6))),
    turned=lambda: (Turned(lambda x: x.transpose(0, 1)), torch.randn(4, 6, 8)), split=lambda: (Turned(lambda x: x.unflatten(1, (6,8)).transpose(0, 1)), torch.randn(4, 48)),
    rnn=lambda: (Turned(nn.Sequential(nn.RNN(8, 8, batch_first=True), First())), torch.randn(4, 6, 8)))

def net_of(name):
    torch.manual_seed(0)
    net,x = nets[name]()
    return net.eval(),x

def initializers(proto, *types): return [i for i in proto.graph.initializer if i.data_type in types]

@pytest.mark.parametrize('name', nets)
def test_is_the_net_in_half_precision(name):
    "In its simulation, in our session and in a plain one; with no float of 32 bits in the file"
    net,x = net_of(name)
    f = of_net(net, x, spec)
    half = copy.deepcopy(net).half()
    with torch.no_grad(): want = half(x.half() if x.is_floating_point() else x).float()
    plain, = ort.InferenceSession(f.data).run(None, {'input':x.numpy()})
    assert f.sim(x).dtype==torch.float32 and plain.dtype==np.float32
    assert sqnr(want, f.sim(x))>60
    for got in Engine(f.data)(x),torch.tensor(plain): assert 45<sqnr(f.sim(x), got)<190
    assert 45<sqnr(net(x), f.sim(x))<90
    assert initializers(f.proto, of.FLOAT16) and not [i for i in initializers(f.proto, of.FLOAT) if np.prod(i.dims)>1]
    r = verify(net, f.rounded, f.sim, f.data, [(x,)])
    assert (r.arithmetic,r.kind,r.float_layers,r.float_work)==('float16','float16',{},{}) and f'{r.n_layers} of {r.n_layers} layers compute in float16' in str(r)

@pytest.mark.parametrize('opset', [13,18,21])
def test_older_versions(opset):
    net,x = net_of('convs')
    f = of_net(net, x, spec)
    assert sqnr(f.sim(x), Engine(to_onnx(f.sim, x, opset=opset).SerializeToString())(x))>45

def test_another_engine():
    pytest.importorskip('openvino')
    net,x = net_of('linear')
    f = of_net(net, x, spec)
    assert sqnr(f.sim(x), Openvino(f.data)(x))>45

# Where there is no room

class Energy(nn.Module):
    def forward(self, x): return x.pow(2).sum(1, keepdim=True)

def loud(tmp_path, *layers, **kwargs):
    "A Learner whose batches are loud"
    set_seed(0)
    items = [(300*x,y) for x,y in noise(8, n=64)]
    learn = classifier(loaders(items, bs=16), nn.Sequential(nn.Linear(8, 8), nn.ReLU(), *layers, nn.Linear(1, 3)), tmp_path, **kwargs)
    learn.fit(1, 1e-3)
    return learn

def test_what_is_beyond_stays_in_float_and_is_named(tmp_path):
    learn = loud(tmp_path, Energy(), nn.BatchNorm1d(1))
    with pytest.warns(UserWarning, match="A number in '2' is .*, which is infinite in half precision"): q = learn.quantize(spec, timed=False)
    r,x = q.model.report,learn.dls.valid.one_batch()[0].as_subclass(torch.Tensor)
    assert list(r.float_layers)==['2','3'] and 'a number there, is infinite' in r.float_layers['2'] and (r.n_layers,r.n_int8)==(2,0) and '2 of 2 layers compute in float16' in str(r)
    assert r.sqnr_float>45 and q.model(x).isfinite().all()
    assert not compute_in(copy.deepcopy(learn.model).eval(), torch.float16)(x).isfinite().all()

class Group(nn.Module):
    def __init__(self):
        super().__init__()
        self.up,self.down = nn.Linear(1, 4),nn.Linear(4, 1)
    def forward(self, x): return self.down(((self.up(x)+1)*1e6).tanh())

def test_a_group_stays_with_all_inside(tmp_path):
    q = loud(tmp_path, Energy(), nn.LayerNorm(1), Group()).quantize(spec, timed=False)
    assert set(q.model.report.float_layers)=={'2','3','4.up','4.down'} # the norm is given what is beyond
    assert q.model.report.sqnr_float>40

def test_later_batches_count(tmp_path):
    "Not the first alone, on which the model is traced"
    learn = loud(tmp_path, Energy(), nn.LayerNorm(1))
    items = [(x/(1 if i>48 else 300),y) for i,(x,y) in enumerate((300*x,y) for x,y in noise(8, n=64))]
    learn.dls = loaders(items, bs=16)
    assert '3' in learn.quantize(spec, dl=learn.dls.train.new(shuffle=False), timed=False).model.report.float_layers

class Outside(nn.Sequential):
    def forward(self, x): return super().forward((x*1e6).tanh())

def test_outside_of_all_modules(tmp_path):
    learn = classifier(loaders(noise(8, n=32), bs=8), Outside(nn.Linear(8, 3)), tmp_path)
    with pytest.raises(ValueError, match="Outside computes a number of .* Use 'fp16'"): learn.quantize(spec, fname='x.onnx')
    assert not (tmp_path/'x.onnx').exists()
    learn.quantize('fp16', timed=False)

def test_a_weight_that_is_too_large(tmp_path):
    net,_ = net_of('lstm')
    with torch.no_grad(): net.out.weight[1,1] = -1e5
    learn = classifier(loaders([(t,0) for t in torch.randint(0, 50, (32,6))], bs=8), net, tmp_path)
    with pytest.warns(UserWarning, match="'out' has a weight of 1e\\+05"): q = learn.quantize(spec, timed=False)
    assert list(q.model.report.float_layers)==['out'] and q.model.report.sqnr_float>45

def test_an_infinity_that_is_meant():
    net,x = net_of('attention')
    with evaluating(net), watch_room(net) as found: net(x)
    assert found=={}

def test_some_layers_only():
    net,x = net_of('lstm')
    f = of_net(net, x, specs[spec]().excluding(['emb','mix']))
    r = verify(net, f.rounded, f.sim, f.data, [(x,)])
    assert r.float_layers=={'emb':'excluded', 'mix':'excluded'} and f.sim.mix.weight_ih_l0.dtype==torch.float32 and f.sim.out.weight.dtype==torch.float16
    assert f.sim.emb.weight.equal(net.emb.weight)

@pytest.mark.parametrize('other', [dict(weight=TensorSpec(torch.bfloat16), act=TensorSpec(torch.bfloat16)), dict(act=TensorSpec(torch.float16))])
def test_what_is_not_done_yet_is_named(other, tmp_path):
    learn = classifier(loaders(noise(8, n=32), bs=8), nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)), tmp_path)
    with pytest.raises(NotImplementedError, match='other than of float16 alone'): learn.quantize(Spec(**other))
    with pytest.raises(NotImplementedError, match='for some layers alone'): learn.quantize(Spec(overrides=(('0',specs[spec]()),)))
    with pytest.raises(ValueError, match='arithmetic in half precision'): learn.quantize(spec, engine='executorch')

# For a Learner

def test_quantize(learn, recwarn, tmp_path):
    q = learn.quantize(spec, fname='half.onnx')
    assert not [w for w in recwarn if 'not faster' in str(w.message)] and q.model.report.agrees_float==1
    table = learn.compare(q, learn.load_onnx('half.onnx'), n=3, warmup=0)
    assert list(table.index)==['float','float16','float16 2'] and table.agrees.min()==1
    assert len(q.model.data)<=len(learn.quantize('fp16', timed=False).model.data)
    assert set(learn.layer_errors(spec, show_plot=False).layer)=={'0','3','7'}
    assert learn.quantize(spec, max_drop=.5, timed=False).model.report.arithmetic=='float16'

def test_training(learn, tmp_path):
    "Weights are rounded in each step, and what is shipped is what was trained"
    learn.fit(2, 1e-3, cbs=[QuantAwareCallback(spec),SaveModelCallback()])
    check_owned(learn)
    every_parameter_moves(learn)
    q = learn.quantize(timed=False)
    assert q.model.report.trained and q.model.report.agrees_rounded==1 and q.model.report.arithmetic=='float16'

def test_free_length(tmp_path):
    "A text model, of any length"
    learn = texts.classifier(tmp_path)
    q = learn.quantize(spec, timed=False)
    assert q.model.report.arithmetic=='float16' and not q.model.report.float_layers
    for n in 3,9: assert q.model(torch.randint(2, 10, (2,n))).isfinite().all()

def test_shipping(tmp_path):
    "A Learner to a file and back, and an app that answers by it"
    learn = classifier(pictures(40), nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), *classify(8)), tmp_path)
    q,x = learn.quantize(spec, timed=False),learn.dls.valid.one_batch()[0]
    q.path = tmp_path
    q.export('q.pkl')
    assert load_learner(tmp_path/'q.pkl').model(x).equal(q.model(x))
    assert (q.export_app(tmp_path/'app')/'predict.py').exists()
