"Programs for phones: what XNNPACK computes is the simulation, what it cannot have is refused by name, and a wrong one is found"
import copy, pickle, pytest, torch, torch.nn.functional as F, warnings
from fastai.vision.all import CrossEntropyLossFlat, DataLoaders, Learner, MSELossFlat, accuracy, set_seed
from torch import nn
from fastquant.all import *
from fastquant.export.engine import engines
from fastquant.export.executorch import Executorch
from fastquant.export.integers import ExportMismatch
from fastquant.export import executorch as module
from fastquant.quant.spec import find_spec

try: Executorch.check()
except ImportError: here = False
else: here = True
runs = pytest.mark.skipif(not here, reason='ExecuTorch is not installed: pip install executorch')

class Joined(nn.Module):
    "Depthwise and pointwise convolutions, a join of two grids, both kinds of pooling, two outputs"
    def __init__(self):
        super().__init__()
        self.a,self.b,self.c = nn.Conv2d(2, 8, 3, padding=1),nn.Conv2d(8, 8, 3, padding=1, groups=8),nn.Conv2d(16, 8, 1)
        self.bn,self.head,self.other = nn.BatchNorm2d(8),nn.Linear(16, 3),nn.Linear(16, 2)
    def forward(self, x):
        x = F.relu6(self.bn(self.a(x)))
        x = F.relu(self.c(torch.cat([x, self.b(x)], 1)))
        x = torch.cat([F.adaptive_avg_pool2d(x, 1), F.adaptive_max_pool2d(x, 1)], 1).flatten(1)
        return self.head(x),self.other(x)

class First(nn.Module):
    "The first output of a model"
    def __init__(self, model):
        super().__init__()
        self.model = model
    def forward(self, x): return self.model(x)[0]

@pytest.fixture(scope='module')
def learn(tmp_path_factory):
    set_seed(0)
    x = torch.randn(96, 2, 8, 8)
    y = x[:,:,2:6,2:6].mean((1,2,3)).mul(3).round().clamp(-1, 1).long()+1
    ds = list(zip(x, y))
    dls = DataLoaders.from_dsets(ds[:64], ds[64:], bs=16, num_workers=0, device='cpu')
    l = Learner(dls, First(Joined()), CrossEntropyLossFlat(), metrics=accuracy, path=tmp_path_factory.mktemp('et'))
    with l.no_bar(), l.no_logging(): l.fit(3, 5e-3)
    return l

@pytest.fixture(scope='module')
def made(learn):
    if not here: pytest.skip('ExecuTorch is not installed: pip install executorch')
    with learn.no_bar(): return learn.quantize(engine='executorch', fname='m.pte', timed=False)

def outputs(learn): return learn.get_preds(act=nn.Identity())[0]

@runs
def test_a_program_does_what_the_onnx_file_does(learn, made):
    with learn.no_bar(), made.no_bar(): mine,theirs = outputs(made),outputs(learn.quantize(timed=False))
    assert (mine-theirs).abs().max()<1e-4*theirs.abs().max()
    r = made.model.report
    assert r.n_int8==3 and r.float_layers['model.head']=='Executorch runs it as XNNPACK in float' and r.agrees==1 and r.sqnr>100

class Summed(nn.Module):
    "Sums of activations on grids that are no multiples of each other, in place and not"
    def __init__(self):
        super().__init__()
        self.a,self.b,self.c,self.d = nn.Conv2d(2, 32, 3, padding=1),nn.Conv2d(32, 32, 3, padding=1),nn.Conv2d(32, 32, 1),nn.Conv2d(32, 32, 1)
        self.head = nn.Conv2d(32, 3, 1)
    def forward(self, x):
        x = F.relu(self.a(x))
        x = F.relu(x+self.b(x))
        y = self.c(x)
        y += 3*torch.tanh(self.d(x))
        y += x
        return self.head(F.relu(y))

@runs
def test_sums_are_those_of_xnnpack(learn):
    "A simulation that adds as ONNX Runtime does is below 100 dB here: it is another model where ties fall otherwise"
    torch.manual_seed(0)
    ds = [(torch.randn(2, 24, 24),torch.zeros(3, 24, 24)) for _ in range(32)]
    other = Learner(DataLoaders.from_dsets(ds, ds, bs=16, num_workers=0, device='cpu'), Summed(), MSELossFlat(), path=learn.path)
    with other.no_bar(): assert other.quantize(engine='executorch', timed=False).model.report.sqnr>100

@runs
def test_a_file_is_the_program_and_comes_back(learn, made):
    f = learn.path/'m.pte'
    assert f.read_bytes()==made.model.data and made.model.data[4:6]==b'ET'
    back = learn.load_onnx('m.pte', engine='executorch')
    again,x = pickle.loads(pickle.dumps(made.model)),learn.dls.valid.one_batch()[0]
    other = Executorch(f.read_bytes())
    other.load_state_dict(made.model.state_dict())
    for m in (back.model,again,other,copy.deepcopy(made.model)): assert m(x).equal(made.model(x)) and m(x[:1]).shape==(1,3)
    assert back.model.metadata['preprocess'] is not None and n_params(back.model)==sum(p.numel() for k,p in learn.model.named_parameters() if 'bn' not in k and 'other' not in k)

@runs
def test_a_damaged_file_is_refused(learn, made):
    data,f = made.model.data,learn.path/'bad.pte'
    for at in (40,len(data)//2,len(data)-200,len(data)-20):
        f.write_bytes(data[:at]+bytes([data[at]^1])+data[at+1:])
        with pytest.raises(ValueError, match='damaged|not a program'): learn.load_onnx('bad.pte', engine='executorch')
    for bad in (data[:-1],data[:999],b'',b'x'*500):
        f.write_bytes(bad)
        with pytest.raises(ValueError, match='not a program that fastquant wrote.*quantize'): learn.load_onnx('bad.pte', engine='executorch')
    f.unlink()
    with pytest.raises(ValueError, match='not an ONNX file'): learn.load_onnx('m.pte')

@runs
def test_what_wants_an_onnx_file_says_so(learn, made):
    with pytest.raises(ValueError, match=r"runs a \.pte, made for executorch.*engine='onnxruntime'"): made.export_onnx()
    with learn.no_bar(), made.no_bar():
        table = learn.compare(made)
        assert table.loc['int8, executorch','agrees']>.9 and table['in float there (ms)'].isna().all()

wrong = dict( # what to ask for, and what is said
    w8=(dict(spec='w8'),'weights alone'), fp16=(dict(spec='fp16'),'weights alone'), dynamic=(dict(spec='dynamic'),'found while it runs'), w4a4=(dict(spec='w4a4'),'other than 8 bits'),
    sizes=(dict(dynamic=True),'inputs of one size'), opset=(dict(opset=17),'version of ONNX'), target=(dict(target={'bytes':.2}),'takes a byte'))

@runs
@pytest.mark.parametrize('how', wrong)
def test_what_xnnpack_has_nothing_for_is_refused_before_anything_is_done(learn, how):
    asked,said = wrong[how]
    with pytest.raises(ValueError, match=said): learn.quantize(engine='executorch', fname='no.pte', **asked)
    assert not (learn.path/'no.pte').exists() and not hasattr(learn, 'fake_quant')

@pytest.mark.parametrize('how', [k for k,(asked,_) in wrong.items() if 'spec' in asked])
def test_specs_are_refused_also_without_executorch(how):
    asked,said = wrong[how]
    with pytest.raises(ValueError, match=said): Executorch.check_wanted(find_spec(asked['spec']))

def test_a_missing_engine_says_what_to_install(learn):
    if here: pytest.skip('ExecuTorch is installed')
    with pytest.raises(ImportError, match='pip install executorch'): learn.quantize(engine='executorch')

def heavier(gm, rounds):
    "One weight of the second convolution is another one"
    k = next(n.target for n in gm.graph.nodes if n.op=='get_attr' and n.target.endswith('b.weight'))
    w = gm.get_parameter(k) if k in dict(gm.named_parameters()) else gm.get_buffer(k)
    w.view(-1)[0] += 20

def higher(gm, rounds):
    "The zero point of the third activation is one more"
    q = rounds[2][0]
    q.args = (*q.args[:2],q.args[2]+1,*q.args[3:])

@runs
@pytest.mark.parametrize('fault', [heavier,higher])
def test_the_gate_finds_a_program_that_computes_something_else(learn, made, monkeypatch, fault):
    right = module.rewritten
    def wrong(sim, xb):
        gm,rounds,paths = right(copy.deepcopy(sim), xb)
        fault(gm, rounds)
        return gm,rounds,paths
    class Same(Executorch):
        "Makes the same file as before"
        @classmethod
        def write(cls, sim, xb, **how): return made.model.data
    monkeypatch.setattr(module, 'rewritten', wrong)
    with learn.no_bar(), pytest.raises(ExportMismatch, match="part at 'model|rounds other values"): learn.quantize(engine=Same, fname='wrong.pte', timed=False)
    assert not (learn.path/'wrong.pte').exists()

@runs
def test_signed_activations_and_layers_in_float(learn):
    with learn.no_bar(): q = learn.quantize('int8_symmetric', engine='executorch', exclude='model.b', timed=False)
    assert q.model.report.n_int8==2 and q.model.report.float_layers['model.b']=='excluded' and q.model.report.agrees==1
