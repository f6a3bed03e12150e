"Files that are exported: names that are taken, sizes that are free, versions of the standard, and a run before they are handed over"
import fastquant.learner.quant, onnx, pytest, torch
import torch.nn.functional as F
from dataclasses import replace
from functools import lru_cache
from torch import nn
from fastai.vision.all import ConvLayer, CrossEntropyLossFlat, DataLoaders, Learner, ProgressCallback, noop, set_seed
from fastcore.test import test_close as close, test_eq as eq
from fastquant.all import *
from fastquant.export.engine import Engine, load_engine
from fastquant.export.graph import values_of
from fastquant.export.older import opset_of
from fastquant.export.onnx import layer_nodes, to_onnx
from fastquant.quant.spec import find_spec

gen = torch.Generator().manual_seed(0)
pics,ys = torch.randn(32,3,8,8,generator=gen),torch.arange(32)%3

def learner(model, *xs, y=ys, loss=CrossEntropyLossFlat(), path='.', bs=8):
    items = list(zip(*(xs or [pics]), y))
    dls = DataLoaders.from_dsets(items[:16], items[16:], bs=bs, device='cpu', num_workers=0, shuffle=False, n_inp=max(1, len(xs)))
    learn = Learner(dls, model, loss_func=loss, path=path)
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn

def head(n): return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n,3))

class Named(nn.Module):
    "Its parameters and modules are called what values and nodes of a graph are called"
    def __init__(self):
        super().__init__()
        set_seed(0)
        self.input,self.output,self.mean,self.linear,self.val_0 = (nn.Parameter(torch.full((1,3,1,1), v)) for v in (.5,2.,.1,.2,.3))
        self.model = nn.Module()
        self.model.conv_quant,self.model.input = nn.Conv2d(3,16,3),nn.Parameter(torch.ones(1))
        self.node_linear,self.conv = nn.Linear(16,3),nn.Conv2d(16,16,1)
    def forward(self, x):
        x = ((x-self.input)*self.output-self.mean)*self.linear-self.val_0
        x = self.conv(torch.relu(self.model.conv_quant(x)))*self.model.input
        return self.node_linear(x.mean((2,3)))

@pytest.mark.parametrize('spec', ['int8','w4a8','w2a8'])
def test_names_that_are_taken(tmp_path, spec):
    learn = learner(Named(), path=tmp_path)
    f = learn.export_onnx()
    close(load_engine(f)(pics), learn.model.eval()(pics).detach(), 1e-4)
    q = learn.quantize(spec, timed=False)
    eq(q.model.report.n_int8, 3)
    for data in q.model.data,f.read_bytes():
        proto = onnx.load_from_string(data)
        onnx.checker.check_model(proto, full_check=True)
        made = [v for n in proto.graph.node for v in n.output]+[i.name for i in proto.graph.initializer]+['input']
        eq(len(made), len(set(made)))
        eq([o.name for o in (*proto.graph.input,*proto.graph.output)], ['input','output'])
        eq(set(layer_nodes(proto)), {'model.conv_quant','conv','node_linear'})

class Beside(nn.Linear):
    "Has a parameter of the name that packing gives to what it makes of the weight"
    def __init__(self):
        super().__init__(192, 3)
        self.weight_int8 = nn.Parameter(torch.ones(1))
    def forward(self, x): return F.linear(x.flatten(1), self.weight, self.bias)*self.weight_int8

class Outside(nn.Module):
    "Has one of a name that packing gives to what is on the way there"
    def __init__(self):
        super().__init__()
        self.layer,self.u0 = Beside(),nn.Parameter(torch.full((1,), 2.))
    def forward(self, x): return self.layer(x)+self.u0

def test_names_that_packing_makes():
    for spec in 'w4a8','w2a8':
        q = learner(Outside()).quantize(replace(find_spec(spec), ends=None), timed=False)
        eq((q.model.report.n_int8,q.model.report.agrees), (1,1.))
        eq({'layer.weight_int8','layer.weight_int8_','u0','u0_'}-set(values_of(onnx.load_from_string(q.model.data).graph)), set())

class Taken(nn.Conv2d):
    def __init__(self):
        super().__init__(3, 4, 3)
        self.weight_scale = nn.Parameter(torch.ones(1))

def test_names_that_quantization_needs():
    learn = learner(nn.Sequential(nn.Conv2d(3,3,3), Taken(), head(4)))
    with pytest.raises(ValueError, match="'1' has a 'weight_scale' of its own.*exclude='1'"): learn.quantize(timed=False)
    eq(learn.quantize(exclude='1', timed=False).model.report.n_int8, 2)
    class Site(nn.Sequential): fake_quant_scale = 1
    with pytest.raises(ValueError, match="Site has a 'fake_quant_scale' of its own"): learner(Site(nn.Conv2d(3,4,3), head(4))).quantize(timed=False)

class Passes(nn.Module):
    "Returns what it got, the same twice, and a parameter"
    def __init__(self):
        super().__init__()
        self.fc,self.bias = nn.Linear(192,3),nn.Parameter(torch.ones(1,3))
    def forward(self, x):
        y = self.fc(x.flatten(1))
        return y,x,y,self.bias

def test_outputs_that_nothing_makes(tmp_path):
    learn = learner(Passes(), loss=lambda o,y: F.cross_entropy(o[0], y), path=tmp_path)
    run = load_engine(learn.export_onnx())
    for a,b in zip(run(pics), learn.model(pics), strict=True): close(a, b.detach(), 1e-5)

class Skip(nn.Module):
    "Needs sizes that are a multiple of 2"
    def __init__(self):
        super().__init__()
        set_seed(0)
        self.a,self.b,self.up,self.c = nn.Conv2d(3,16,3,padding=1),nn.Conv2d(16,16,3,2,1),nn.ConvTranspose2d(16,16,2,2),nn.Conv2d(32,3,1)
    def forward(self, x):
        a = self.a(x).relu()
        return self.c(torch.cat([a,self.up(self.b(a).relu())], 1))

class Bilinear(nn.Module):
    def __init__(self):
        super().__init__()
        set_seed(0)
        self.a,self.b,self.c = nn.Conv2d(3,16,3,padding=1),nn.Conv2d(16,16,3,2,1),nn.Conv2d(32,3,1)
    def forward(self, x):
        a = self.a(x).relu()
        return self.c(torch.cat([a,F.interpolate(self.b(a).relu(), size=a.shape[-2:], mode='bilinear')], 1))

class Times(nn.Module):
    "A recording, as spectrum and as it is"
    def __init__(self):
        super().__init__()
        self.a,self.b,self.h = nn.Conv1d(2,16,5,2),nn.Conv1d(1,16,5,2),nn.Linear(16,3)
    def forward(self, x, y): return self.h((self.a(x).relu()+self.b(y).relu()).mean(2))

class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.e,self.t,self.h = nn.Embedding(9,16),nn.TransformerEncoderLayer(16,2,32,batch_first=True),nn.Linear(16,3)
    def forward(self, x): return self.h(self.t(self.e(x)).mean(1))

times = torch.randn(32,2,24,generator=gen),torch.randn(32,1,24,generator=gen)
tokens = torch.randint(0, 9, (32,10), generator=gen)
kinds = dict(skip=(Skip,True,(pics,)), bilinear=(Bilinear,(2,3),(pics,)),
    times=(Times,[(2,),(2,)],times), tokens=(Tokens,True,(tokens,)))

@pytest.mark.parametrize('kind', kinds)
def test_sizes_may_be_free(kind, tmp_path):
    cls,dynamic,xs = kinds[kind]
    learn = learner(cls(), *xs, loss=lambda o,y: o.sum(), path=tmp_path)
    run = load_engine(learn.export_onnx(dynamic=dynamic))
    free = run.metadata['dynamic']
    longer = [torch.cat([x,x,x], ds[-1])[:3] for x,ds in zip(xs, free)]
    want = learn.model.eval()(*longer).detach()
    close(run(*longer), want, 1e-4)
    if kind=='tokens': return
    q = learn.quantize(dynamic=dynamic, timed=False)
    eq(q.model.metadata['dynamic'], free)
    assert sqnr(want, q.model(*longer))>15
    if kind!='skip': return
    fixed = learn.quantize(timed=False)
    eq((q.model.n_macs,q.model.report.n_int8), (fixed.model.n_macs,fixed.model.report.n_int8))

class Attends(nn.Module):
    "Takes a dictionary, with a mask that is the same for all items"
    def __init__(self):
        super().__init__()
        set_seed(0)
        self.a,self.h = nn.Conv1d(2,16,3,padding=1),nn.Linear(16,3)
    def forward(self, d):
        x = self.a(d['x']).relu()
        return {'y':self.h((x@d['mask']).mean(2))}

def attended(n):
    "Recordings of length `n`, a batch of 8 at a time, and their mask"
    xs = torch.randn(32, 2, n, generator=gen)
    def collate(rows): return dict(x=torch.stack([x for x,_ in rows]), mask=torch.eye(n).roll(1, 0)),torch.stack([y for _,y in rows])
    items = list(zip(xs, ys))
    dls = [torch.utils.data.DataLoader(o, batch_size=8, collate_fn=collate) for o in (items[:16],items[16:])]
    return DataLoaders(*dls),dict(x=xs[:8], mask=torch.eye(n).roll(1, 0))

def test_sizes_of_nested_inputs_may_be_free(tmp_path):
    dls,_ = attended(12)
    learn = Learner(dls, Attends(), loss_func=lambda o,y: o['y'].sum(), path=tmp_path)
    learn.remove_cb(ProgressCallback)
    _,longer = attended(18)
    free = [(2,),(0,1)]
    run,q = load_engine(learn.export_onnx(dynamic=free, opset=17)),learn.quantize(dynamic=free, opset=17, timed=False)
    want = learn.model.eval()(longer)['y'].detach()
    close(run(longer)['y'], want, 1e-5)
    assert sqnr(want, q.model(longer)['y'])>20
    eq((q.model.metadata['dynamic'],q.model.metadata['preprocess']['size']), ([[2],[0,1]],[[2,12],[12,12]]))
    fixed = learn.quantize(timed=False).model
    eq(q.model.n_macs, fixed.n_macs)
    with pytest.raises(ValueError, match='runs on no other sizes'): learn.quantize(dynamic=True)
    with pytest.raises(ValueError, match="'input_1' of this file takes the size 12x12, and was given 18x18"): fixed(dict(longer, x=longer['x'][...,:12]))

def test_a_file_says_which_sizes_it_takes():
    q = learner(Bilinear(), loss=lambda o,y: o.sum()).quantize(dynamic=(3,), timed=False)
    with pytest.raises(ValueError, match=r'takes items of size 3x8xany, and was given 3x16x8'): q.model(torch.cat([pics,pics], 2))

def flat(): return nn.Sequential(nn.Conv2d(3,8,3), nn.ReLU(), nn.Flatten(), nn.Linear(288,3))

@pytest.mark.parametrize('dynamic,why', [(True,'runs on no other sizes'), ((1,),'runs on no other sizes'), ((4,),'dynamic=\\(4,\\)'), ('height',"dynamic='height'"), ([(2,),(3,)],'dynamic=')])
def test_sizes_that_cannot_be_free(dynamic, why, tmp_path):
    learn = learner(flat(), path=tmp_path)
    for go in (lambda: learn.export_onnx(dynamic=dynamic), lambda: learn.quantize(dynamic=dynamic, fname='q.onnx')):
        with pytest.raises(ValueError, match=why): go()
    eq(list(tmp_path.glob('*.onnx')), [])

class Sizes(torch.utils.data.Dataset):
    def __init__(self, *sizes): self.sizes = sizes
    def __len__(self): return 12
    def __getitem__(self, i):
        n = self.sizes[i%len(self.sizes)]
        x = torch.randn(3,n,n,generator=torch.Generator().manual_seed(i))
        return x,torch.zeros(n,n).long()

def test_batches_of_several_sizes():
    net = nn.Sequential(ConvLayer(3,16,norm_type=None), ConvLayer(16,16,norm_type=None), nn.Conv2d(16,4,1))
    dls = DataLoaders.from_dsets(Sizes(8,12,8), Sizes(8,12,10), bs=1, device='cpu', num_workers=0, shuffle=False)
    learn = Learner(dls, net, loss_func=CrossEntropyLossFlat(axis=1))
    with learn.no_bar(), learn.no_logging():
        with pytest.raises(ValueError, match=r'Batches have different sizes.*dynamic=True'): learn.quantize(timed=False, dl=dls.train.new(shuffle=False), n_batches=12)
        q = learn.quantize(timed=False, dynamic=True)
        assert abs(q.validate()[0]-learn.validate()[0])<.05

def net():
    set_seed(0)
    return nn.Sequential(nn.Conv2d(3,16,3,padding=1), nn.ReLU(), nn.Conv2d(16,8,3,groups=2), nn.SiLU(), head(8))

@lru_cache
def newest(spec): return learner(net()).quantize(spec, timed=False)

@pytest.mark.parametrize('opset,spec', [(13,'int8'),(13,'w4a8'),(15,'w2a8'),(19,'w4a8'),(21,'w4a8')])
def test_versions(opset, spec, tmp_path):
    learn = learner(net(), path=tmp_path)
    q,same = learn.quantize(spec, opset=opset, timed=False),newest(spec)
    proto = onnx.load_from_string(q.model.data)
    onnx.checker.check_model(proto, full_check=True)
    eq((opset_of(proto),proto.ir_version), (opset,onnx.helper.find_min_ir_version_for(list(proto.opset_import))))
    eq(q.model(pics), same.model(pics))
    eq((q.model.n_params,q.model.n_macs), (same.model.n_params,same.model.n_macs))

@pytest.mark.parametrize('opset', [13,16])
def test_what_is_newer_is_written_out(opset, tmp_path):
    for m,xs in ((Tokens(),[tokens]), (nn.Sequential(nn.Conv2d(3,8,3), nn.GroupNorm(2,8), nn.Mish(), head(8)),[pics])):
        learn = learner(m, *xs, loss=lambda o,y: o.sum(), path=tmp_path)
        proto = onnx.load(learn.export_onnx(opset=opset, dynamic=True))
        onnx.checker.check_model(proto, full_check=True)
        eq(opset_of(proto), opset)

def test_versions_that_there_are_none_of(tmp_path):
    learn = learner(net(), path=tmp_path)
    for bad in 12,22,'17',17.,True:
        for go in (lambda: learn.export_onnx(opset=bad), lambda: learn.quantize(opset=bad)):
            with pytest.raises(ValueError, match='opset=.*from 13.*to 21'): go()
    q = learn.quantize(timed=False)
    for kwargs in dict(opset=13),dict(dynamic=True):
        with pytest.raises(ValueError, match='Pass `dynamic` and `opset` to `quantize`'): q.export_onnx(**kwargs)
    eq(list(tmp_path.glob('*.onnx')), [])

class Noisy(nn.Module):
    "Draws random numbers, in evaluation too"
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(192,3)
    def forward(self, x): return self.fc(F.dropout(x.flatten(1), .5, training=True))

class Returns(nn.Module):
    "Returns a weight beside what it computes with it"
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(192,3)
    def forward(self, x): return dict(y=self.fc(x.flatten(1)), weight=self.fc.weight, again=2*self.fc.weight)

def test_a_weight_that_is_returned_is_a_layer_still(tmp_path):
    learn = learner(Returns(), path=tmp_path)
    learn.loss_func = lambda p,y: F.cross_entropy(p['y'], y)
    report = learn.quantize(timed=False).model.report
    eq((report.n_int8,report.float_layers), (1,{}))

class Spectrum(nn.Module):
    "Complex inside, and as it is told outside"
    def __init__(self, out):
        super().__init__()
        self.out,self.fc = out,nn.Linear(192,3)
    def forward(self, x):
        z = torch.fft.rfft(self.fc(x.flatten(1)))
        return self.out(z)

def test_complex_numbers_have_no_place_in_a_file(tmp_path):
    learn = learner(Spectrum(lambda z: z), path=tmp_path)
    learn.loss_func = lambda p,y: p.abs().mean()
    for go in (learn.quantize,learn.export_onnx):
        with pytest.raises(ValueError, match='Spectrum returns complex numbers, which a file does not have'): go()
    learn.model.out = torch.view_as_real
    eq(learn.quantize(timed=False).model.report.n_int8, 1)
    with pytest.raises(ValueError, match='takes complex numbers'): to_onnx(nn.Identity(), torch.zeros(2,3, dtype=torch.cfloat))

class Mends(nn.Module):
    "Goes another way where sizes are odd, as U-nets do"
    def __init__(self):
        super().__init__()
        self.down,self.up,self.out = nn.Conv2d(3,8,3,2,1),nn.ConvTranspose2d(8,8,2,2),nn.Conv2d(11,3,1)
    def forward(self, x):
        y = self.up(self.down(x))
        if y.shape[-1]!=x.shape[-1]: y = F.interpolate(y, x.shape[-2:])
        return self.out(torch.cat([x,y], 1)).mean((2,3))

def test_another_way_for_other_sizes(tmp_path):
    learn = learner(Mends(), path=tmp_path)
    learn.quantize(timed=False)
    for go in (learn.quantize,learn.export_onnx):
        with pytest.raises((ValueError,RuntimeError), match='does not run on inputs of shape'): go(dynamic=True)
    eq(list(tmp_path.glob('*.onnx')), [])

class TiedLayers(nn.Module):
    "Two layers of one weight, of which the second comes first in a forward pass"
    def __init__(self):
        super().__init__()
        self.fc,self.a,self.b = nn.Linear(192,32),nn.Linear(32,32),nn.Linear(32,32)
        self.b.weight,self.out = self.a.weight,nn.Linear(32,3)
    def forward(self, x): return self.out(self.a(self.b(self.fc(x.flatten(1)).relu()).relu()).relu())

def test_layers_of_one_weight_are_told_apart(tmp_path):
    q = learner(TiedLayers(), path=tmp_path).quantize(timed=False)
    proto = onnx.load_from_string(q.model.data)
    eq(layer_nodes(proto).keys(), {'fc','a','b','out'})
    assert [n.name for n in proto.graph.node if n.op_type=='Gemm']==['fc','b','a','out']
    assert 'None' not in str(q.model.report.float_layers) and q.model.report.n_int8==4

class Kept(nn.Module):
    "Has a part that stays in training mode, by its own `train` or since PyTorch does not see it"
    def __init__(self, part, listed=False):
        super().__init__()
        self.listed,self.fc = listed,nn.Linear(192,3)
        if listed: self.parts = [part]
        else: self.part = part
    def train(self, mode=True):
        super().train(mode)
        if not self.listed: self.part.train()
        return self
    def forward(self, x): return self.fc((self.parts[0] if self.listed else self.part)(x.flatten(1)))

@pytest.mark.parametrize('listed', [False,True])
@pytest.mark.parametrize('part', [nn.Dropout(),nn.BatchNorm1d(192)], ids=str)
def test_what_stays_in_training_mode_is_named(tmp_path, part, listed):
    learn = learner(Kept(part, listed), path=tmp_path)
    for go in (learn.quantize,learn.export_onnx):
        with pytest.raises(ValueError, match=f"Kept keeps 'part{'s.0' if listed else ''}' in training mode"): go()
    eq(learner(Kept(nn.Linear(192,192), listed), path=tmp_path).quantize(timed=False).model.report.n_layers, 2-listed)

def test_a_file_that_does_something_else_is_not_handed_over(tmp_path, monkeypatch):
    (tmp_path/'model.onnx').write_bytes(b'from before')
    with pytest.raises(ValueError, match="random in evaluation: 'dropout'"): learner(Noisy(), path=tmp_path).export_onnx()
    def wrong(model, *xb, **how):
        other = copy_model(model)
        with torch.no_grad(): other[0].weight *= 1.01
        return to_onnx(other, *xb, **how)
    monkeypatch.setattr(fastquant.learner.quant, 'to_onnx', wrong)
    with pytest.raises(ExportMismatch, match=r'on inputs of shapes \[\(5, 3, 8, 8\)\]: of output 0, it is .* dB away. Nothing was written'): learner(net(), path=tmp_path).export_onnx()
    eq((tmp_path/'model.onnx').read_bytes(), b'from before')

def test_other_precisions_are_exported_as_they_are(tmp_path):
    for dtype,m in (torch.float16,net()),(torch.float64,flat()[2:]):
        x = pics.expand(32,3,8,8) if dtype==torch.float16 else torch.randn(32,8,6,6)
        learn = learner(m.to(dtype), x, path=tmp_path)
        run = load_engine(learn.export_onnx())
        eq(run(x.to(dtype)).dtype, dtype)
        close(run(x.to(dtype)), learn.model.eval()(x.to(dtype)).detach(), 1e-2)

def test_other_precisions_that_cannot_be_run_are_told(tmp_path):
    learn = learner(net().to(torch.float64), path=tmp_path)
    with pytest.raises(ValueError, match=r'ONNX Runtime does not run .*Cast the model with `learn.model.float\(\)`'): learn.export_onnx()
    eq(list(tmp_path.glob('*.onnx')), [])
    learn.model.float()
    learn.export_onnx()

@pytest.mark.parametrize('layer', [nn.LSTM(16, 8, batch_first=True), nn.GRU(16, 8, 2, batch_first=True, bidirectional=True)])
def test_work_of_recurrent_layers(layer):
    "A file says of them what the model does"
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.seq,self.out = layer,nn.Linear(8*(1+layer.bidirectional), 2)
        def forward(self, x): return self.out(self.seq(x)[0][:,-1])
    x = torch.randn(2, 5, 16)
    data = to_onnx(Net(), x).SerializeToString()
    assert Engine(data).n_macs==n_macs(Net(), x)==5*sum(p.numel() for p in layer.parameters() if p.ndim==2)+2*8*(1+layer.bidirectional)
