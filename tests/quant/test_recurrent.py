"LSTMs and GRUs of which only the weights are integers: from a spec to a file that is held against rounding by hand"
import copy, onnx, onnxruntime as ort, pytest, torch
from dataclasses import replace
from fastai.vision.all import set_seed
from torch import nn
from fastquant.all import *
from fastquant.export.engine import optimized
from fastquant.export.openvino import Openvino
from fastquant.export.verify import verify
from fastquant.quant.gptq import compensate
from fastquant.quant.spec import find_spec
from tests.helpers.data import loaders, noise
from tests.helpers.files import made, of_net, rounds
from tests.helpers.learners import check_owned, classifier, every_parameter_moves

def only(bits, granularity): return Spec(TensorSpec(Grid(bits), 'mse', granularity), act=None)
specs_here = dict(w8='w8', w4='w4', rows=only(4, PerChannel()), twos=only(2, PerGroup(16)), whole=only(8, PerTensor()))
ways = dict(plain={}, deep=dict(num_layers=2, bidirectional=True, dropout=.5), bare=dict(bias=False))

class Reads(nn.Module):
    "A recurrent layer in the usual places: a sequence, its states, and a layer after its last step"
    def __init__(self, kind, n_out=3, **kwargs):
        super().__init__()
        self.rnn = kind(40, 16, batch_first=True, **kwargs)
        self.out = nn.Linear(16*(2 if self.rnn.bidirectional else 1), n_out)
    def forward(self, x):
        y,state = self.rnn(x)
        return self.out(y[:,-1]),state[0].sum(0)

class FromRows(Reads):
    "The same, of what comes as pictures, and of its last step only"
    def forward(self, x): return super().forward(x.squeeze(1))[0]

def net_of(kind, way='plain', cls=Reads):
    torch.manual_seed(0)
    return cls(kind, **ways[way]).eval(),torch.randn(6,9,40)

order = {nn.LSTM:[0,2,3,1], nn.GRU:[1,0,2]} # where ONNX has each gate of PyTorch's

def by_hand(net, r):
    "The plain float model with each weight rounded, gate by gate"
    net,m = copy.deepcopy(net),net.rnn
    dirs,gates = 1+m.bidirectional,order[type(m)]
    for l in range(m.num_layers):
        for k in f'weight_ih_l{l}',f'weight_hh_l{l}':
            spec,s = r.weights[f'rnn.{k}'],r.weight_scale[r.slices[f'rnn.{k}']].detach()
            s = s.half().float() if spec.by_group else s
            for d,back in enumerate(('','_reverse')[:dirs]):
                p,n = getattr(net.rnn, k+back),spec.granularity.n if spec.by_group else 10**6
                each = s.expand(dirs*len(p)) if len(s)==1 else s
                each = each.view(dirs, len(gates), 16, -1)[d,gates].reshape(len(p), -1)
                wide = each.repeat_interleave(n, 1)[:,:p.shape[1]] if spec.by_group else each
                p.data = ((p/wide).round().clamp(spec.grid.lo, spec.grid.hi)*wide).detach()
    net.out.weight.data = r.round_weight('out', net.out.weight).detach()
    return net

@pytest.mark.parametrize('way,spec', [('plain',s) for s in specs_here]+[('deep','w8'),('deep','w4'),('bare','w8')])
@pytest.mark.parametrize('kind', order)
def test_is_the_float_net_with_rounded_weights(kind, way, spec):
    "In the model that rounds, its simulation, the file in our session and in a plain one, of any length"
    net,x = net_of(kind, way)
    rounded = rounds(copy.deepcopy(net), specs_here[spec], x)
    _,r = rounded(x),fake_quant_of(rounded) # from now on it rounds
    want = by_hand(net, r)
    assert r.weights_only==set(r.layers)=={'out',*(f'rnn.weight_{k}_l{l}' for k in ('ih','hh') for l in range(net.rnn.num_layers))} and not r.float_layers
    sim = convert(copy_model(rounded))
    data = to_onnx(sim, x, dynamic=(1,)).SerializeToString()
    report,plain,ours = verify(net, rounded, sim, data, [(x,)], others=[(x[:,:4],)]),ort.InferenceSession(data),Engine(data)
    assert report.weights_only=={k:r.weights['out'].grid.bits for k in ('out','rnn')} and report.kind=='weights only' and not report.n_int8 and report.n_layers==2
    for xs in x,x[:1],x[:,:3]:
        for m in rounded,sim,ours,lambda x: map(torch.tensor, plain.run(None, {'input':x.numpy()})):
            for a,b in zip(want(xs), m(xs)): assert sqnr(a, b)>100

@pytest.mark.parametrize('kind', order)
def test_made_floats_once(kind):
    "A fraction of the bytes, and nothing to be done in a run that the float file has not"
    torch.manual_seed(0)
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = kind(64, 128, batch_first=True)
        def forward(self, x): return self.rnn(x)[0]
    net,x = Whole().eval(),torch.randn(2,5,64)
    full = to_onnx(copy_model(net), x)
    def nodes(proto): return sorted(n.op_type for n in optimized(proto.SerializeToString()).graph.node)
    for spec,share in ('w8',.28),('w4',.18),(specs_here['rows'],.16):
        proto = of_net(net, x, spec).proto
        assert nodes(proto)==nodes(full) and proto.ByteSize()<share*full.ByteSize()
        assert Engine(proto.SerializeToString()).n_params==Engine(full.SerializeToString()).n_params

@pytest.mark.parametrize('kind', order)
def test_older_versions_and_openvino(kind):
    for spec in specs_here:
        net,x = net_of(kind, 'deep')
        sim = convert(rounds(net, specs_here[spec], x))
        want = sim(x)
        for opset in 13,None:
            data = to_onnx(copy_model(sim), x, opset=opset).SerializeToString()
            for e in Engine(data),Openvino(data):
                for a,b in zip(want, e(x)): assert sqnr(a, b)>80

def test_states_that_are_given():
    "To a GRU and an LSTM that run twice, and go on where they were"
    torch.manual_seed(0)
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b,self.first = nn.LSTM(8, 8, 2, batch_first=True),nn.GRU(8, 8, 2, batch_first=True),nn.Linear(8, 16)
        def forward(self, x):
            h = self.first(x[:,0]).view(-1, 2, 8).transpose(0, 1).contiguous()
            y,state = self.a(x, (h,h.tanh()))
            z,h = self.b(self.a(y, state)[0], h)
            return self.b(z, h)[0]
    net,x = Twice().eval(),torch.randn(4,5,8)
    for spec in 'w8','w4':
        f = of_net(net, x, spec)
        f.gate()
        assert sqnr(f.sim(x), Engine(f.data)(x))>80 and sqnr(net(x), f.sim(x))>15

def test_beside_others():
    "One on integers, one whose weights are, and one that only its own spec rounds"
    torch.manual_seed(0)
    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b,self.c,self.out = nn.LSTM(8, 8, batch_first=True),nn.LSTM(8, 8, batch_first=True),nn.GRU(8, 8, batch_first=True),nn.Linear(8, 2)
        def forward(self, x):
            for m in self.a,self.b,self.c: x = m(x)[0]
            return self.out(x[:,-1])
    net,x = Three().eval(),torch.randn(4,5,8)
    live,w8 = find_spec('dynamic'),find_spec('w8')
    for spec,alone,floats in (replace(live, overrides=(('b',w8),)),{'b':8},{'c'}),(replace(live, overrides=(('b',w8),('c',w8))),{'b':8, 'c':8},set()),(replace(w8, overrides=(('a',live),('c',None))),{'b':8, 'out':8},{'c'}):
        f = of_net(net, x, spec)
        f.gate()
        report = verify(net, f.rounded, f.sim, f.data, [(x,)])
        assert report.weights_only==alone and report.float_layers.keys()==floats and report.n_int8==4-len(alone)-len(floats)

def test_a_fault_is_seen():
    "In an integer and in a scale, by name"
    for kind in order:
        net,x = net_of(kind, 'deep')
        f = of_net(net, x, 'w8')
        f.gate()
        for k in 'rnn.weight_hh_l1.weight','rnn.weight_ih_l0.weight_scale':
            proto = copy.deepcopy(f.proto)
            i = next(i for i in proto.graph.initializer if i.name==k)
            a = onnx.numpy_helper.to_array(i).copy()
            a.flat[3] += a.dtype.type(1)
            i.CopyFrom(onnx.numpy_helper.from_array(a, k))
            with pytest.raises(ExportMismatch, match=f"weight of '{k.rpartition('.')[0]}'"): f.gate(proto)

def test_those_that_stay_in_float():
    "With projections, with computed weights, with packed sequences, or left out by name; and what is neither LSTM nor GRU"
    torch.manual_seed(0)
    x = torch.randn(4,5,8)
    class Both(nn.Module):
        def __init__(self, m, packs=False):
            super().__init__()
            self.rnn,self.out,self.packs = m,nn.Linear(6,2),packs
        def forward(self, x):
            if not self.packs: return self.out(self.rnn(x)[0])
            y,_ = self.rnn(nn.utils.rnn.pack_padded_sequence(x, [5]*len(x), batch_first=True))
            return self.out(nn.utils.rnn.pad_packed_sequence(y, batch_first=True)[0])
    norm = nn.utils.parametrizations.weight_norm
    odd = [(nn.LSTM(8, 9, proj_size=6, batch_first=True),),(norm(nn.GRU(8, 6, batch_first=True), 'weight_hh_l0'),),(nn.GRU(8, 6, batch_first=True),True),(nn.RNN(8, 6, batch_first=True),)]
    for args in odd:
        r = fake_quant_of(rounds(Both(*args).eval(), 'w8', x))
        assert 'has no integer kernel' in r.float_layers['rnn'] and r.layers.keys()=={'out'}
    net,x = net_of(nn.GRU)
    r = fake_quant_of(rounds(net, find_spec('w8').excluding('rnn'), x))
    assert r.float_layers=={'rnn':'excluded'} and r.layers.keys()=={'out'}

@pytest.mark.parametrize('kind', order)
def test_training(kind, tmp_path):
    "Every parameter moves, and what is shipped is what was trained; a checkpoint brings all of it along"
    set_seed(0)
    learn = classifier(loaders(noise(1, 6, 40, n=32), bs=8), FromRows(kind, num_layers=2, dropout=.1), tmp_path)
    learn.fit(1, 1e-3, cbs=QuantAwareCallback('w8', start=.5))
    assert fake_quant_of(learn.model).lstms.keys()=={'rnn'}
    check_owned(learn)
    every_parameter_moves(learn)
    q = learn.quantize(timed=False)
    assert q.model.report.trained and q.model.report.agrees_rounded==1 and q.model.report.weights_only=={'rnn':8, 'out':8}
    assert learn.compare(q, n=2, warmup=0).MACs.nunique()==1
    learn.save('here')
    want,fresh = learn.get_preds()[0],classifier(learn.dls, FromRows(kind, num_layers=2), tmp_path)
    assert fresh.load('here').get_preds()[0].equal(want)
    learn.remove_quant()
    errors = learn.layer_errors('w8', show_plot=False)
    assert set(errors.layer)=={'rnn','out'} and errors.output.min()>30

@pytest.mark.parametrize('kind', order)
def test_weights_make_up_for_each_other(kind):
    "In both layers and directions, with 4 bits"
    gained = []
    for seed in range(3):
        torch.manual_seed(seed)
        net = Reads(kind, num_layers=2, bidirectional=True).eval()
        x,other = (torch.randn(64,12,8)@torch.randn(8,40) for _ in range(2))
        near = rounds(copy.deepcopy(net), 'w4', x)
        before = {k:p.clone() for k,p in near.named_parameters()}
        moved = compensate(copy_model(near), [(x,)])
        assert all(not p.equal(before[k]) for k,p in moved.named_parameters() if '.weight' in k)
        y = net(x)[0]
        gained.append(sqnr(y, moved(x)[0])-sqnr(y, near(x)[0]))
        made(moved, x).gate()
    assert sum(gained)/3>1
