"Ranges found while a model runs: from the spec to a file that is held against rounding by hand"
import copy, numpy as np, onnx, onnxruntime as ort, pytest, torch
import torch.nn.functional as F
from dataclasses import replace
from fastai.vision.all import DataLoaders, ImageBlock, PILImageBW, load_learner, set_seed
from torch import nn
from torch.utils.data import TensorDataset
from fastquant.all import *
from fastquant.export.dynamic import dynamic_layers
from fastquant.export.engine import layer_kernels, optimized
from fastquant.export.portable import misfits, unsigned
from fastquant.export.integers import file_states, run_file
from fastquant.export.verify import Integers, file_integers, replay, verify
from fastquant.quant.dynamic import quantize_dynamic
from fastquant.quant.gptq import compensate
from fastquant.quant.lstm import lstm_dynamic
from fastquant.quant.pairs import fit_pairs
from fastquant.quant.spec import find_spec
from tests.helpers.data import gray, loaders, noise, pictures
from tests.helpers.files import of_net, rounds
from tests.helpers.integers import evaluate, integer_layers
from tests.helpers.learners import check_owned, classifier, every_parameter_moves
from tests.helpers.nets import classify

dynamic = find_spec('dynamic')
full = Spec(act=dynamic.act, portable=False)
four = Spec(TensorSpec(Grid(4), 'mse', PerChannel()), act=dynamic.act)

class Own(nn.Module):
    "Parameters outside of layers: turned, on the left, in an einsum, and in a layer that runs twice"
    def __init__(self):
        super().__init__()
        self.a,self.b,self.c,self.d = (nn.Parameter(torch.randn(*s)*.3) for s in ((12,9),(9,9),(7,6),(9,2,4)))
        self.bias = nn.Parameter(torch.randn(9))
    def forward(self, x):
        x = F.linear(F.gelu((self.c@x)@self.a+self.bias), self.b)
        return torch.einsum('btc,chd->bthd', F.linear(x, self.b).tanh(), self.d)

class Attends(nn.Module):
    def __init__(self, n=16, n_out=3):
        super().__init__()
        self.into,self.block,self.out = nn.Linear(8, n),nn.TransformerEncoderLayer(n, 4, 2*n, 0., batch_first=True),nn.Linear(n, n_out)
    def forward(self, x): return self.out(self.block(self.into(x)).mean(1))

class FromPictures(Attends):
    "The same, of what comes as pictures"
    def __init__(self, n_out=3): super().__init__(32, n_out)
    def forward(self, x): return super().forward(x.squeeze(1))

nets = dict(own=(Own, (4,6,12)), attends=(Attends, (6,5,8)),
    flat=(lambda: nn.Sequential(nn.Linear(12, 20), nn.BatchNorm1d(20, track_running_stats=True), nn.ReLU(), nn.Linear(20, 7, bias=False)), (5,12)),
    tokens=(lambda: nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.LayerNorm(20), nn.Linear(20, 7, bias=False)), (4,5,12)))

def net_of(name):
    torch.manual_seed(0)
    make,shape = nets[name]
    net,x = make(),torch.randn(shape)
    for _ in range(3): net(x)
    return net.eval(),x

def by_hand(x):
    "`x` rounded by the formula, in numpy"
    x = x.detach().numpy()
    lo,hi = min(x.min(), np.float32(0)),max(x.max(), np.float32(0))
    if lo==hi: return torch.tensor(x)
    s = (hi-lo)/np.float32(255)
    z = np.rint(np.clip(-lo/s, 0, 255))
    return torch.tensor((np.clip(np.rint(x/s)+z, 0, 255)-z)*s)

def test_is_rounding_by_hand():
    "Weights by their scales and inputs by their extremes, in the model that rounds, its simulation, the file in our session and in a plain one"
    net,x = net_of('tokens')
    rounded = rounds(copy.deepcopy(net), dynamic, x)
    ours,r,want = rounded(x),fake_quant_of(rounded),x
    assert not r.all and r.live.keys()==r.layers.keys()=={'0','3'} and not r.weights_only
    for k,m in net.named_children():
        if k not in r.layers: want = m(want)
        else: want = F.linear(by_hand(want), r.round_weight(k, m.weight), m.bias)
    sim = convert(copy_model(rounded))
    data = to_onnx(sim, x).SerializeToString()
    plain, = ort.InferenceSession(data).run(None, {'input':x.numpy()})
    for got in ours,sim(x),Engine(data)(x),torch.tensor(plain): assert sqnr(want, got)>100

@pytest.mark.parametrize('name,spec', [*[(k,dynamic) for k in nets],('tokens',full),('tokens',four)])
def test_file_is_its_simulation(name, spec):
    "All linear layers in integers, by a kernel that also finds the range, or floats; at other sizes of batch too"
    net,x = net_of(name)
    rounded = rounds(copy.deepcopy(net), spec, x)
    sim = convert(copy_model(rounded))
    data = to_onnx(sim, x).SerializeToString()
    report = verify(net, rounded, sim, data, [(x,),(x[:1]*3,)])
    assert report.sqnr>80 and report.n_int8==report.n_layers==len(fake_quant_of(sim).layers) and report.kind=='int8'
    assert set(layer_kernels(data).values())<={'DynamicQuantizeMatMul','MatMulIntegerToFloat'}
    assert report.portable==(spec is not full) and 'QuantizeLinear' not in {n.op_type for n in optimized(data).graph.node}

def test_several_layers_of_one_input_round_it_once():
    torch.manual_seed(0)
    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            self.q,self.k,self.v = (nn.Linear(8, 8) for _ in range(3))
        def forward(self, x): return self.q(x)*self.k(x)+self.v(x)
    f = of_net(Three().eval(), torch.randn(4,8), dynamic)
    f.gate()
    kinds = [n.op_type for n in optimized(f.data).graph.node]
    assert kinds.count('DynamicQuantizeLinear')==1 and kinds.count('MatMulIntegerToFloat')==3

# LSTMs

class Reads(nn.Module):
    "An LSTM in the usual places: a sequence, its states, and a layer after its last step"
    def __init__(self, n_out=3, **kwargs):
        super().__init__()
        self.rnn = nn.LSTM(8, 16, batch_first=True, **kwargs)
        self.out = nn.Linear(16*(2 if self.rnn.bidirectional else 1), n_out)
    def forward(self, x):
        y,(h,c) = self.rnn(x)
        return self.out(y[:,-1]),h.sum(0),c.sum(0)

class FromRows(Reads):
    "The same, of what comes as pictures, and of its last step only"
    def forward(self, x): return super().forward(x.squeeze(1))[0]

lstms = dict(plain={}, deep=dict(num_layers=2, bidirectional=True, dropout=.5), bare=dict(bias=False))

def lstm_of(name):
    torch.manual_seed(0)
    return Reads(**lstms[name]).eval(),torch.randn(6,9,8)

def lstm_by_hand(m, r, x):
    "The layers of an LSTM, each input and state rounded by the formula"
    for l in range(m.num_layers):
        found = []
        for d,back in enumerate(('','_reverse')[:1+m.bidirectional]):
            ws = []
            for k in 'weight_ih','weight_hh':
                w,s = getattr(m, f'{k}_l{l}{back}'),r.weight_scale[r.slices[f'rnn.{k}_l{l}']].view(1+m.bidirectional, 4, -1)
                s = s[d,[0,2,3,1]].reshape(-1, 1)
                ws.append(fit_pairs((w/s).round().clamp(-127, 127).detach())*s)
            b = sum(getattr(m, f'{k}_l{l}{back}') for k in ('bias_ih','bias_hh')).half().float() if m.bias else 0.
            h,c,ys = torch.zeros(len(x), 16),torch.zeros(len(x), 16),[]
            for g in (by_hand(x)@ws[0].T+b).unbind(1)[::-1 if d else 1]:
                i,f,n,o = (g+by_hand(h)@ws[1].T).chunk(4, 1)
                c = f.sigmoid()*c+i.sigmoid()*n.tanh()
                h = o.sigmoid()*c.tanh()
                ys.append(h)
            found.append(torch.stack(ys[::-1 if d else 1], 1))
        x = torch.cat(found, 2)
    return x

@pytest.mark.parametrize('name', lstms)
def test_lstm_is_rounding_by_hand(name):
    "Its input over all steps, its state at each, in the model that rounds, its simulation and the file, of any length"
    net,x = lstm_of(name)
    rounded = rounds(copy.deepcopy(net), dynamic, x)
    got,r = rounded(x)[0],fake_quant_of(rounded)
    want = F.linear(by_hand(lstm_by_hand(net.rnn, r, x)[:,-1]), r.round_weight('out', net.out.weight), net.out.bias)
    assert r.lstms.keys()=={'rnn'} and not r.float_layers and sqnr(want, got)>100
    sim = convert(copy_model(rounded))
    data = to_onnx(sim, x, dynamic=(1,)).SerializeToString()
    report,e = verify(net, rounded, sim, data, [(x,)], others=[(x[:,:4],)]),Engine(data)
    assert report.n_int8==report.n_layers==2 and report.portable and layer_kernels(data)['rnn.weight_ih_l0']=='DynamicQuantizeLSTM'
    for xs in x,x[:1],x[:,:3]:
        for a,b,c in zip(rounded(xs), sim(xs), e(xs)): assert sqnr(a, b)>80 and sqnr(b, c)>80

def test_older_versions_and_few_bits():
    "An operator of ONNX Runtime's own is no matter of ONNX's version; weights of 4 bits are unpacked on their way to it"
    net,x = lstm_of('deep')
    sim = convert(rounds(copy.deepcopy(net), dynamic, x))
    assert sqnr(sim(x)[0], Engine(to_onnx(sim, x, opset=13).SerializeToString())(x)[0])>80
    f = of_net(net, x, four)
    f.gate()
    assert sqnr(f.sim(x)[0], Engine(f.data)(x)[0])>80

def test_states_that_are_given():
    "To an LSTM that runs twice, and goes on where it was"
    torch.manual_seed(0)
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn,self.first = nn.LSTM(8, 8, 2, batch_first=True),nn.Linear(8, 16)
        def forward(self, x):
            h = self.first(x[:,0]).view(-1, 2, 8).transpose(0, 1).contiguous()
            y,state = self.rnn(x, (h,h.tanh()))
            return self.rnn(y, state)[0]
    net,x = Twice().eval(),torch.randn(4,5,8)
    f = of_net(net, x, dynamic)
    f.gate()
    assert sqnr(f.sim(x), Engine(f.data)(x))>80 and sqnr(net(x), f.sim(x))>30

def test_what_breaks_ties_is_no_fault():
    "An LSTM with large weights remembers each tie that a file breaks otherwise: it is asked for each step, from the state that the file has"
    net = Reads().eval()
    torch.manual_seed(9)
    net.rnn,net.out,x = nn.LSTM(8, 128, batch_first=True),nn.Linear(128, 3),torch.randn(6,200,8)
    with torch.no_grad():
        for p in net.rnn.parameters(): p.mul_(6)
    f = of_net(net, x, dynamic)
    (y,*_), = file_states(f.proto, [x], run_file)
    w,r = map(fake_quant_of(f.sim).home, ('rnn.weight_ih_l0','rnn.weight_hh_l0'))
    steps = x.transpose(0, 1)
    assert sqnr(y, lstm_dynamic(steps, w, r, w.bias, ())[0])<60 and sqnr(y, lstm_dynamic(steps, w, r, w.bias, (), y)[0])>100
    replay(f.sim, file_integers(f.proto, [x])[0], [x], file_states(f.proto, [x], run_file))

def test_a_fault_in_an_lstm_is_seen():
    "A weight, a scale, a zero point, a bias; by name"
    net,x = lstm_of('deep')
    f = of_net(net, x, dynamic)
    f.gate()
    for k,change in (('rnn.weight_hh_l1.weight',lambda a: np.where(a==a.max(), a-1, a)), ('rnn.weight_ih_l0.weight_scale',lambda a: a*np.float32(1.001)),
        ('rnn.weight_ih_l0.weight_zero_point',lambda a: a+np.int8(1)), ('rnn.weight_ih_l1.bias_half',lambda a: a+np.float16(1e-3))):
        proto = copy.deepcopy(f.proto)
        i = next(i for i in proto.graph.initializer if i.name==k)
        i.CopyFrom(onnx.numpy_helper.from_array(change(onnx.numpy_helper.to_array(i)), k))
        with pytest.raises(ExportMismatch, match=f"weight of '{k.rpartition('.')[0]}'"): f.gate(proto)
    proto = copy.deepcopy(f.proto)
    n = next(n for n in proto.graph.node if n.op_type=='DynamicQuantizeLSTM')
    n.input[3] = ''
    with pytest.raises(ExportMismatch): f.gate(proto)

def test_an_lstm_of_the_whole_range_runs_around_128():
    net,x = lstm_of('deep')
    f = of_net(net, x, full)
    bad = misfits(f.proto)
    around = Engine(unsigned(copy.deepcopy(f.proto), bad).SerializeToString())
    assert {'rnn.weight_ih_l0.weight','rnn.weight_hh_l1.weight'}<=set(bad)
    for a,b in zip(f.sim(x), around(x)): assert sqnr(a, b)>80

def test_lstms_that_stay_in_float():
    "With projections, with computed weights, or left out by name; and GRUs"
    torch.manual_seed(0)
    x = torch.randn(4,5,8)
    class Both(nn.Module):
        def __init__(self, m):
            super().__init__()
            self.rnn,self.out = m,nn.Linear(6,2)
        def forward(self, x): return self.out(self.rnn(x)[0])
    norm = nn.utils.parametrizations.weight_norm
    for m in nn.LSTM(8, 9, proj_size=6, batch_first=True),norm(nn.LSTM(8, 6, batch_first=True), 'weight_hh_l0'),nn.GRU(8, 6, batch_first=True):
        r = fake_quant_of(rounds(Both(m).eval(), dynamic, x))
        assert 'has no integer kernel' in r.float_layers['rnn'] and r.layers.keys()=={'out'}
    net,x = lstm_of('plain')
    r = fake_quant_of(rounds(net, dynamic.excluding('rnn'), x))
    assert r.float_layers=={'rnn':'excluded'} and r.layers.keys()=={'out'}

def test_training_an_lstm(tmp_path):
    "Every parameter moves, and what is shipped is what was trained"
    set_seed(0)
    learn = classifier(loaders(noise(1, 6, 8, n=32), bs=8), FromRows(num_layers=2, dropout=.1), tmp_path)
    learn.fit(1, 1e-3, cbs=QuantAwareCallback('dynamic', start=.5))
    assert fake_quant_of(learn.model).lstms.keys()=={'rnn'}
    check_owned(learn)
    every_parameter_moves(learn)
    q = learn.quantize(timed=False)
    assert q.model.report.trained and q.model.report.agrees_rounded==1 and q.model.report.n_int8==2
    table = learn.compare(q, n=2, warmup=0)
    assert table.MACs.nunique()==1
    learn.remove_quant()
    errors = learn.layer_errors('dynamic', show_plot=False)
    assert set(errors.layer)=={'rnn','out'} and errors.output.min()>15

# Features of LSTMs

def bands(n, steps=20, k=8):
    "Powers in bands of very different loudness, that come and go"
    torch.manual_seed(2)
    return torch.randn(n,steps,k).exp()**2*torch.logspace(-4, 0, k)

class HearsBands(Reads):
    "Weighs soft bands as much as loud ones"
    def __init__(self, n_out=3, k=8, **kwargs):
        super().__init__(n_out, **kwargs)
        with torch.no_grad(): self.rnn.weight_ih_l0.div_(bands(64, k=k).mean((0,1)).sqrt())
    def forward(self, x): return super().forward(x.squeeze(1))[0]

@pytest.fixture
def hears(tmp_path):
    "A Learner that hears bands"
    data = TensorDataset(bands(64)[:,None], torch.randint(3, (64,)))
    torch.manual_seed(0)
    dls = DataLoaders.from_dsets(data, data, bs=16, num_workers=0, device='cpu')
    return classifier(dls, HearsBands(num_layers=2), tmp_path)

def test_bands_are_scaled_and_large_values_put_apart(hears, monkeypatch):
    "Which the file says, computes as its simulation does, and loses less"
    q,x = hears.quantize('dynamic', timed=False),bands(16)[:,None]
    kinds = [n.op_type for n in onnx.load_from_string(q.model.data).graph.node]
    assert kinds[:kinds.index('DynamicQuantizeLSTM')].count('Clip')==1 and q.model.report.n_int8==2
    monkeypatch.setattr('fastquant.quant.live.find_features', lambda *args: None)
    left,want = hears.quantize('dynamic', timed=False),hears.model.eval()(x)
    assert 'Clip' not in [n.op_type for n in onnx.load_from_string(left.model.data).graph.node]
    assert sqnr(want, q.model(x))>sqnr(want, left.model(x))+5

def test_features_come_back(hears, tmp_path):
    "With a checkpoint, into a model that is prepared or not; without rounding they change nothing"
    hears.validate(cbs=PTQCalibrate(spec='dynamic'))
    r,want = fake_quant_of(hears.model),hears.get_preds()[0]
    assert r.features['rnn.weight_ih_l0'].limit is not None
    hears.save('here')
    fresh = classifier(hears.dls, HearsBands(num_layers=2), tmp_path)
    assert fresh.load('here').get_preds()[0].equal(want)
    plain = hears.remove_quant().get_preds()[0]
    assert not torch.allclose(plain, want) and not any('fake_quant' in k for k in hears.model.state_dict())

def test_features_in_training(hears):
    "They are chosen before anything is rounded, stay, and every parameter moves"
    hears.fit(1, 1e-3, cbs=QuantAwareCallback('dynamic', start=.5))
    r = fake_quant_of(hears.model)
    chosen = r.features['rnn.weight_ih_l0']
    check_owned(hears)
    every_parameter_moves(hears)
    hears.fit(1, 1e-3, cbs=QuantAwareCallback('dynamic'))
    assert r.features['rnn.weight_ih_l0'].scale.equal(chosen.scale)
    q = hears.quantize(timed=False)
    assert q.model.report.trained and q.model.report.agrees_rounded==1

def test_a_fault_in_features_is_seen(hears):
    "In a factor, and in a limit"
    hears.validate(cbs=PTQCalibrate(spec='dynamic'))
    f = of_net(hears.model, bands(6)[:,None], dynamic)
    f.gate()
    for k in 'input_scale','input_limit':
        proto = copy.deepcopy(f.proto)
        i = next(i for i in proto.graph.initializer if i.name.endswith(k))
        i.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(i)*np.float32(1.1), i.name))
        with pytest.raises(ExportMismatch): f.gate(proto)

def test_weights_of_an_lstm_make_up_for_each_other():
    "In both directions; a model whose spec does not say so keeps its weights"
    torch.manual_seed(0)
    net,x = Reads(num_layers=2, bidirectional=True).eval(),torch.randn(32,9,3)@torch.randn(3,8)
    def lost(spec):
        made = rounds(copy.deepcopy(net), spec, x)
        compensate(made, [(x,)])
        return made,sqnr(net(x)[0], made(x)[0])
    alone,together = lost(four),lost(replace(four, compensate=True))
    assert alone[0].rnn.weight_ih_l1.equal(net.rnn.weight_ih_l1) and together[1]>alone[1]+1
    for k in together[0].rnn._flat_weights_names:
        if 'weight' in k: assert not getattr(together[0].rnn, k).equal(getattr(net.rnn, k))

# On every processor

def test_nobody_saturates():
    "With pairs that fit, adding in 16 bits changes nothing; with the whole range it does, and the file is run around 128 there"
    net,x = net_of('tokens')
    x = x.abs()*4
    fits,whole = of_net(net, x, dynamic),of_net(net, x, full)
    assert integer_layers(fits.proto)==['0','3'] and not misfits(fits.proto) and misfits(whole.proto)
    def apart(f): return sqnr(*(torch.tensor(evaluate(f.proto, f.feeds(), saturate=s)['output']) for s in (False,True)))
    assert apart(fits)>=200 and apart(whole)<40
    exact = torch.tensor(evaluate(whole.proto, whole.feeds())['output'])
    around = unsigned(copy.deepcopy(whole.proto), misfits(whole.proto)).SerializeToString()
    assert sqnr(exact, Engine(whole.data)(x))>100 and sqnr(exact, Engine(around)(x))>100

# What stays in float

def test_what_stays_in_float_is_named():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(8, 8, 3, padding=1), nn.ReLU(), Attends()).eval()
    x = torch.randn(4,8,8)
    f = of_net(net, x, dynamic)
    report = verify(net, f.rounded, f.sim, f.data, [(x,)])
    assert 'convolutions' in report.float_layers['0'] and 'products in 2.block.self_attn' in report.float_work
    with pytest.raises(ValueError, match='nothing to quantize'): prepare(net[:2], dynamic, x)

def test_beside_other_specs():
    "Each layer as its own spec says"
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), *classify(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.GELU(), nn.Linear(12, 4)).eval()
    x = torch.randn(6,3,8,8)
    rest = Spec(overrides=(('6',dynamic),('8','w8' and specs['w8']())))
    f = of_net(net, x, rest)
    report,r = verify(net, f.rounded, f.sim, f.data, [(x,)]),fake_quant_of(f.sim)
    assert r.live.keys()=={'6'} and r.weights_only=={'8'} and report.n_int8==3 and report.weights_only=={'8':8}
    f = of_net(net, x, Spec(act=dynamic.act, overrides=(('0',Spec()),)))
    f.gate()
    assert fake_quant_of(f.sim).live.keys()=={'4','6','8'} and len(fake_quant_of(f.sim).all)==2

# Batches

def test_a_prediction_depends_on_its_batch():
    "And the file's is that of its simulation, whatever the company"
    net,x = net_of('attends')
    f = of_net(net, x, dynamic)
    loud = torch.cat([x[:1],100*x[1:]])
    e = Engine(f.data)
    assert not f.sim(x)[0].equal(f.sim(loud)[0]) and sqnr(f.sim(loud)[0], e(loud)[0])>100 and sqnr(f.sim(x[:1]), e(x[:1]))>100

def test_zeros_and_extremes():
    net,x = net_of('tokens')
    f = of_net(net, x, dynamic)
    e = Engine(f.data)
    for x in x*0,x.abs(),-x.abs(),x*1e-20,x*1e10: assert sqnr(f.sim(x), e(x))>80

# The gate

def test_a_fault_is_seen():
    "A weight, a scale or a bias that is another one, and a zero point that is left out"
    net,x = net_of('tokens')
    f = of_net(net, x, dynamic)
    f.gate()
    def with_other(name, change):
        proto = copy.deepcopy(f.proto)
        i = next(i for i in proto.graph.initializer if i.name==name)
        i.CopyFrom(onnx.numpy_helper.from_array(change(onnx.numpy_helper.to_array(i)), name))
        return proto
    faults = [with_other('0.weight', lambda a: np.where(a==a.max(), a-1, a)),with_other('3.weight', lambda a: a[::-1].copy())]
    faults += [with_other('0.weight_scale', lambda a: a*np.float32(1.01)),with_other('0.bias', lambda a: a+np.float32(.01))]
    less = copy.deepcopy(f.proto)
    del dynamic_layers(less.graph)[0].product.input[2]
    for proto in (*faults,less):
        with pytest.raises(ExportMismatch): f.gate(proto)

def test_zero_points_on_a_tie():
    "The next integer for 0 is no fault of a file, and all others follow it"
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).eval()
    nn.init.zeros_(net[0].bias)
    nn.init.eye_(net[0].weight)
    x = torch.cat([torch.tensor([[40.,-40.,0.,1.]]),torch.randn(5,4)])
    assert quantize_dynamic(net(x[:1]*0+1))[1]>0
    f = of_net(net, x, dynamic) # -1 to 1 after a Tanh: 0 is at 127.5
    f.gate()
    given,_ = file_integers(f.proto, (x,))
    last = given[-1]
    other = Integers((last.q.int()+(1 if last.zero==127 else -1)).clamp(0, 255).byte(), last.scale, (last.zero.int()+(1 if last.zero==127 else -1)).byte())
    found,_ = replay(f.sim, [*given[:-1],other], (x,))
    assert found[-1].far<=.5 and last.zero.item() in (127,128)

# In training

def test_gradients_go_straight_through():
    net,x = net_of('tokens')
    rounded = rounds(copy.deepcopy(net), dynamic, x)
    x = x.requires_grad_()
    lin,r = rounded[0],fake_quant_of(rounded)
    out = rounded(x)
    out.sum().backward()
    w = r.round_weight('0', lin.weight).detach()
    y = F.linear(x.detach(), w, lin.bias.detach())
    assert x.grad.isfinite().all() and (x.grad!=0).all() and y.shape[-1]==20

@pytest.fixture
def learn(tmp_path):
    set_seed(0)
    learn = classifier(loaders(noise(1, 6, 8, n=48), bs=8), FromPictures(), tmp_path)
    learn.fit(1, 1e-3)
    return learn

def test_quantize(learn):
    "Verbs take it, and the file says how it rounds"
    q = learn.quantize('dynamic', fname='d.onnx', timed=False)
    report = q.model.report
    assert report.n_int8==report.n_layers==6 and report.agrees_float>.8 and q.model.metadata['spec']=='dynamic'
    table = learn.compare(q, learn.load_onnx('d.onnx'), n=2, warmup=0)
    assert table.MACs.nunique()==1 and table.agrees.min()>.8 and table.bytes['int8']<table.bytes['float']
    errors = learn.layer_errors('dynamic', show_plot=False)
    assert set(errors.layer)==set(layer_kernels(q.model.data)) and errors.output.min()>15 and not fake_quant_of(learn.model)
    assert learn.quantize('dynamic', exclude='out', timed=False).model.report.float_layers=={'out':'excluded'}

def test_an_engine_that_computes_it_in_float(learn):
    "Is named, with what it does not run in integers, and nothing is written"
    pytest.importorskip('openvino')
    with pytest.raises(ValueError, match="Openvino computes MatMulInteger in float.*engine='onnxruntime'"): learn.quantize('dynamic', engine='openvino', fname='d.onnx')
    assert not (learn.path/'d.onnx').exists() and not fake_quant_of(learn.model)

def test_training(learn, tmp_path):
    "Through the rounding of activations and weights; what is shipped is what was trained"
    learn.fit(2, 1e-3, cbs=QuantAwareCallback('dynamic', start=.5))
    r = fake_quant_of(learn.model)
    assert r.ready and not r.all
    check_owned(learn)
    every_parameter_moves(learn)
    q = learn.quantize(timed=False)
    assert q.model.report.trained and q.model.report.agrees_rounded==1
    learn.save('here')
    want = learn.get_preds()[0]
    fresh = classifier(learn.dls, FromPictures(), tmp_path)
    assert fresh.load('here').get_preds()[0].equal(want) and fake_quant_of(fresh.model).ready
    learn.remove_quant()
    assert fake_quant_of(learn.model) is None

def test_export(tmp_path):
    "A Learner in training, and a quantized one, to a file and back"
    set_seed(0)
    learn = classifier(pictures(40, get_x=gray, block=ImageBlock(PILImageBW)), FromPictures(10), tmp_path)
    learn.fit(1, 1e-3, cbs=QuantAwareCallback('dynamic'))
    q,x = learn.quantize(timed=False),learn.dls.valid.one_batch()[0]
    for l in learn,q:
        l.path = tmp_path
        l.export('whole.pkl')
        assert load_learner(tmp_path/'whole.pkl').model.eval()(x).equal(l.model.eval()(x))

def test_there_is_nothing_to_calibrate(learn):
    "One batch tells what the model does, and then it rounds"
    learn.validate(cbs=PTQCalibrate(spec='dynamic'))
    assert fake_quant_of(learn.model).ready and learn.quantize(timed=False).model.report.trained
    with pytest.raises(ValueError, match='no range'): learn.recorder.plot_ranges()

def test_wrong_specs():
    x = torch.randn(2,4)
    for act,say in ((TensorSpec(Grid(8), dynamic=True),'another grid'),(TensorSpec(Grid(4, signed=False), dynamic=True),'another grid')):
        with pytest.raises(NotImplementedError, match=say): prepare(nn.Linear(4,4), Spec(act=act), x)
    with pytest.raises(ValueError, match='Leave `stream` out'): Spec(act=dynamic.act, stream=TensorSpec(Grid(8, signed=False)))
    with pytest.raises(ValueError, match='no step size'): TensorSpec(Grid(8, signed=False), learned=True, dynamic=True)
