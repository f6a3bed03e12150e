"Integer weights, and everything else in float: from a spec to a file that is held against rounding by hand"
import copy, onnx, onnxruntime as ort, pytest, torch
import torch.nn.functional as F
from fastai.vision.all import ImageBlock, PILImageBW, load_learner, set_seed
from torch import nn
from fastquant.all import *
from fastquant.export.engine import layer_kernels, optimized
from fastquant.export.portable import misfits
from fastquant.export.verify import verify
from tests.helpers.data import gray, loaders, noise, pictures
from tests.helpers.files import of_net, rounds
from tests.helpers.learners import Do, check_owned, classifier, every_parameter_moves
from tests.helpers.nets import classify

def few_bits(bits, **kw): return Spec(TensorSpec(Grid(bits), 'mse', PerChannel(), **kw), act=None)
w4,learned_4 = few_bits(4),few_bits(4, learned=True)
specs_here = dict(w8='w8', w4=w4, w2=few_bits(2), one_scale=Spec(TensorSpec(Grid(8)), act=None))

def trained_norm(n, dims=2):
    m = {1:nn.BatchNorm1d, 2:nn.BatchNorm2d, 3:nn.BatchNorm3d}[dims](n)
    m.num_batches_tracked += 1
    with torch.no_grad():
        for o,a in (m.running_mean,0.),(m.running_var,1.),(m.weight,-.2),(m.bias,0.): o.copy_(a+torch.rand(n))
    return m

class Own(nn.Module):
    "Parameters outside of layers, one of them turned, and one on the left"
    def __init__(self):
        super().__init__()
        self.a,self.b,self.c = (nn.Parameter(torch.randn(*s)*.3) for s in ((12,9),(5,9),(7,6)))
        self.bias = nn.Parameter(torch.randn(9))
    def forward(self, x): return F.linear((self.c@x)@self.a+self.bias, self.b)

def two_d(): return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), trained_norm(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), *classify(8, 3))
nets = dict(two_d=(two_d, (6,3,10,10)), own=(Own, (4,6,12)),
    one_d=(lambda: nn.Sequential(nn.Conv1d(3, 8, 3, padding=1), trained_norm(8, 1), nn.ReLU(), nn.Conv1d(8, 4, 1)), (6,3,10)),
    three_d=(lambda: nn.Sequential(nn.Conv3d(2, 6, 3), trained_norm(6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 5)), (4,2,4,4,4)),
    tokens=(lambda: nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.LayerNorm(20), nn.Linear(20, 7, bias=False)), (4,5,12)))

def net_of(name):
    torch.manual_seed(0)
    make,shape = nets[name]
    return make().eval(),torch.randn(shape)

def by_hand(w, s, grid):
    "A weight, output channels first, rounded by its scales"
    s = s.detach().reshape(-1, *[1]*(w.ndim-1))
    return (w/s).round().clamp(grid.lo, grid.hi)*s

def rounded_by_hand(net, r):
    "The plain float model with each weight rounded; batchnorms stay what they are"
    net = copy.deepcopy(net)
    for k,w in r.weights.items():
        p = net.get_submodule(k).weight if k in r.modules else getattr(net, k)
        turned = k=='a' # which a product has output channels last
        q = by_hand(p.T if turned else p, r.weight_scale[r.slices[k]], w.grid)
        p.data = (q.T if turned else q).detach().clone()
    return net

@pytest.mark.parametrize('name,spec', [*[(k,'w8') for k in nets],('two_d',w4),('own',w4)])
def test_is_the_float_net_with_rounded_weights(name, spec):
    "In the model that rounds, its simulation, the file in our session and in a plain one"
    net,x = net_of(name)
    rounded = rounds(copy.deepcopy(net), spec, x, fold=False)
    r = fake_quant_of(rounded)
    assert not r.all and r.weights_only==set(r.layers) and not r.float_layers
    want = rounded_by_hand(net, r)(x)
    sim = convert(copy_model(rounded))
    data = to_onnx(sim, x).SerializeToString()
    plain, = ort.InferenceSession(data).run(None, {'input':x.numpy()})
    for got in rounded(x),sim(x),Engine(data)(x),torch.tensor(plain): assert sqnr(want, got)>100
    report = verify(net, rounded, sim, data, [(x,)])
    assert report.weights_only=={k:r.weights[k].grid.bits for k in r.layers} and not report.n_int8
    assert report.portable and report.kind=='weights only' and 'smaller, not faster' in str(report) and report.sqnr>100

@pytest.mark.parametrize('spec', specs_here.values(), ids=specs_here)
def test_integers_on_the_whole_grid(spec):
    "No pair has to fit, biases are floats, and batchnorm is folded exactly"
    net,x = net_of('two_d')
    f = of_net(net, x, spec)
    r = fake_quant_of(f.sim)
    grid = r.weights['0'].grid
    assert not r.paired and all(f.sim[i].bias.dtype==torch.float32 for i in (0,3))
    assert r.home('0').weight.abs().max()>=.9*grid.hi and not misfits(f.proto)
    assert {n.op_type for n in f.proto.graph.node}.isdisjoint({'QuantizeLinear','BatchNormalization','Max'})
    f.gate()

def test_size():
    "A quarter of the float file for 8 bits, an eighth for 4"
    net,x = nn.Sequential(nn.Flatten(), nn.Linear(512, 256)).eval(),torch.randn(4, 512)
    full = to_onnx(copy_model(net), x).ByteSize()
    for spec,share in ('w8',.26),(w4,.14): assert of_net(net, x, spec).proto.ByteSize()<share*full

def test_made_floats_once():
    "Where nothing computes in integers, our session turns weights into floats when it opens the file, and not in each run"
    net,x = net_of('two_d')
    def nodes(proto): return [n.op_type for n in optimized(proto.SerializeToString()).graph.node]
    proto = of_net(net, x, 'w8').proto
    assert 'DequantizeLinear' in {n.op_type for n in proto.graph.node} and nodes(proto)==nodes(to_onnx(net, x))

# Beside layers in int8

def mixed_net():
    convs = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU()
    return nn.Sequential(*convs, *classify(8, 16), nn.ReLU(), nn.Linear(16, 4))
mixes = dict(behind=(Spec(overrides=(('8',w4),('10',w4))), ['0','2','4']), before=(Spec(overrides=(('0',w4),)), ['2','4','8','10']),
    between=(Spec(overrides=(('2',specs['w8']()),)), ['0','4','8','10']), inside=(Spec(TensorSpec(Grid(8)), act=None, overrides=(('2',Spec()),)), ['2']),
    ends=(Spec(TensorSpec(Grid(4), 'mse', PerChannel()), act=None, ends=Spec()), ['0','10']), other_ends=(Spec(ends=specs['w8']()), ['2','4','8']))

@pytest.mark.parametrize('name', mixes)
def test_beside_int8(name):
    "Each layer as its own spec says: no engine computes in integers where only weights are"
    torch.manual_seed(0)
    net,x = mixed_net().eval(),torch.randn(6,3,10,10)
    spec,in_int8 = mixes[name]
    rounded = rounds(copy.deepcopy(net), spec.excluding('4') if name=='ends' else spec, x)
    sim = convert(copy_model(rounded))
    data = to_onnx(sim, x).SerializeToString()
    report,kernels = verify(net, rounded, sim, data, [(x,)]),layer_kernels(data)
    r = fake_quant_of(sim)
    assert [k for k in r.layers if k not in r.weights_only]==in_int8 and report.kind=='int8' and report.portable
    assert report.n_int8==len(in_int8) and 'that compute in float' in str(report)
    assert all(not Engine.in_integers(kernels[k]) for k in r.weights_only)

def test_a_fault_is_seen():
    "A weight, a bias or a scale that is another one is refused, and the layer named where it is a weight"
    net,x = net_of('two_d')
    f = of_net(net, x, 'w8')
    def with_other(name, change):
        proto = copy.deepcopy(f.proto)
        i = next(i for i in proto.graph.initializer if i.name==name)
        i.CopyFrom(onnx.numpy_helper.from_array(change(onnx.numpy_helper.to_array(i)), name))
        return proto
    for name in '3.weight','3.weight_scale':
        with pytest.raises(ExportMismatch, match="weight of '3'"): f.gate(with_other(name, lambda a: a+a.dtype.type(1)))
    with pytest.raises(ExportMismatch, match='output 0'): f.gate(with_other('3.bias', lambda a: a+1))

# For a Learner

@pytest.fixture
def learn(tmp_path):
    set_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), *classify(16, 3))
    learn = classifier(loaders(noise(1, 8, 8, n=48), bs=8), net, tmp_path)
    learn.fit(1, 1e-2)
    return learn

def test_quantize(learn, recwarn):
    "Verbs take it: a file that is smaller, the same predictions, and nobody warns that it is not faster"
    q = learn.quantize('w8', fname='w8.onnx')
    assert not [w for w in recwarn if 'not faster' in str(w.message)]
    assert q.model.report.kind=='weights only' and q.model.report.agrees_float==1
    again = learn.load_onnx('w8.onnx')
    table = learn.compare(q, again, learn.quantize(w4, exclude='0'), n=3, warmup=0)
    assert list(table.index)==['float','weights only','weights only 2','weights only 3'] and table.agrees.min()>.9
    assert table.MACs.nunique()==1 and table.bytes['weights only']<table.bytes['float']
    errors = learn.layer_errors('w8', show_plot=False)
    assert set(errors.layer)=={k for k in fake_quant_of(prepare(copy_model(learn.model), 'w8', learn.dls.one_batch()[0])).layers}
    assert errors.output.min()>25 and errors.own.min()>30 and not fake_quant_of(learn.model)

@pytest.mark.parametrize('spec', ['w8',learned_4], ids=['w8','learned_4'])
def test_training(learn, spec, tmp_path):
    "Rounds from where it is told to, weights and steps learn, and what is shipped is what was trained"
    net = learn.model
    rounding_at = []
    learn.fit(2, 1e-3, cbs=[QuantAwareCallback(spec, start=.5),Do(after_pred=lambda l: rounding_at.append(fake_quant_of(net).ready))])
    r = fake_quant_of(net)
    n = len(rounding_at)//2
    assert learn.model is net and not r.all and rounding_at==[False]*n+[True]*n
    check_owned(learn)
    every_parameter_moves(learn)
    with pytest.raises(ValueError, match='rounds weights only'): learn.recorder.plot_ranges()
    assert set(ranges(net).what)=={'weight'}
    q = learn.quantize()
    assert q.model.report.trained and q.model.report.agrees_rounded==1 and q.model.report.weights_only.keys()==r.layers.keys()
    learn.save('here')
    want = learn.get_preds()[0]
    fresh = classifier(learn.dls, copy_model(net), tmp_path)
    fresh.remove_quant()
    with torch.no_grad():
        for p in fresh.model.parameters(): p.mul_(.5)
    assert fresh.load('here').get_preds()[0].equal(want) and fake_quant_of(fresh.model).ready
    learn.remove_quant()
    assert fake_quant_of(net) is None and {id(p) for p in learn.opt.all_params().itemgot(0)}=={id(p) for p in net.parameters()}

def test_export(tmp_path):
    "A Learner in training, and a quantized one, to a file and back"
    data = pictures(40, get_x=gray, block=ImageBlock(PILImageBW))
    learn = classifier(data, nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), *classify(8)), tmp_path)
    learn.fit(1, 1e-3, cbs=QuantAwareCallback('w8'))
    q,x = learn.quantize(),learn.dls.valid.one_batch()[0]
    for l in learn,q:
        l.path = tmp_path
        l.export('whole.pkl')
        assert load_learner(tmp_path/'whole.pkl').model.eval()(x).equal(l.model.eval()(x))

def test_scales_follow_weights(learn):
    "Until ranges are frozen"
    learn.fit(1, 1e-3, cbs=QuantAwareCallback('w8', freeze=1., mom=.5, freeze_bn=1.))
    w,s = learn.model[3].weight,fake_quant_of(learn.model).weight_scale
    assert s[8:24].allclose(w.detach().abs().flatten(1).amax(1)/127, rtol=.05)

def test_float_weights_take_its_place(learn):
    "Weights from before the fit round nothing until there are scales for them"
    learn.save('float')
    learn.fit(1, 1e-3, cbs=QuantAwareCallback('w8'))
    learn.load('float')
    x = learn.dls.one_batch()[0]
    want = learn.model.eval()(x)
    assert not fake_quant_of(learn.model).ready and (want==unprepare(copy_model(learn.model)).eval()(x)).all()

def test_calibration(learn):
    "There is nothing to watch, so one batch is enough, and then it rounds"
    learn.validate(cbs=PTQCalibrate(spec='w8'))
    assert fake_quant_of(learn.model).ready and learn.quantize().model.report.kind=='weights only'

def test_weights_make_up_on_all_batches(tmp_path):
    "And not on the first of them alone, which may have nothing of what comes after"
    set_seed(0)
    net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 3))
    def like(n, mix): return [(torch.randn(8, 3)@mix,torch.randint(0, 3, (8,))) for _ in range(n)]
    early,late = torch.randn(2, 3, 32)
    batches = [*like(2, early),*like(5, late)]
    learn = classifier(loaders(noise(32, n=16), bs=8), net, tmp_path)
    x = torch.cat([x for x,_ in like(20, late)])
    def nearness(dl): return sqnr(net(x), learn.quantize('w4', dl=dl, timed=False).model(x))
    assert nearness(batches)>nearness(batches[:2])+1

def test_contradictions():
    with pytest.raises(ValueError, match='no activation is rounded'): Spec(act=None, stream=TensorSpec(Grid(8, signed=False)))
    with pytest.raises(ValueError, match="No spec is called 'w9'"): prepare(nn.Linear(2, 2), 'w9', torch.randn(2, 2))
