"Models that are wrapped, compiled, recomputed in the backward pass, or of another precision"
import pytest, torch
import torch.nn.functional as F
from functools import partial
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from fastai.vision.all import ConvLayer, CrossEntropyLossFlat, Learner, MSELossFlat, set_seed
from fastcore.test import test_close as close, test_eq as eq
from fastquant.all import *
from fastquant.core.model import inner_model
from fastquant.quant.site import Site
from fastquant.quant.train import follow, guess, start
from tests.helpers.data import loaders
from tests.helpers.files import rounds
from tests.helpers.learners import quiet

xs,ys = torch.randn(64,3,8,8,generator=torch.Generator().manual_seed(0)),torch.arange(64)%3

def learner(model, x=xs, y=ys, loss=CrossEntropyLossFlat(), **kwargs):
    items = list(zip(x, y))
    return quiet(Learner(loaders(items[:48], items[48:], bs=16, shuffle=False), model, loss_func=loss, **kwargs))

def net():
    set_seed(0)
    return nn.Sequential(ConvLayer(3,16), ConvLayer(16,16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16,3))

def compiled_in_place(m):
    m.compile(backend='eager')
    return m

def part_compiled(m):
    m[1] = torch.compile(m[1], backend='eager')
    return m

eager = partial(torch.compile, backend='eager')
wrappers = dict(parallel=nn.DataParallel, compiled=eager, both=lambda m: eager(nn.DataParallel(m)), in_place=compiled_in_place)

def run_once(learn):
    "So that there is something compiled before anything is put on the model"
    with torch.no_grad(): learn.model.eval()(xs[:16])

@pytest.mark.parametrize('kind', wrappers)
def test_training_through_rounding_does_not_see_the_wrapper(kind, tmp_path):
    want,got = learner(net()),learner(wrappers[kind](net()), path=tmp_path)
    outer = got.model
    run_once(got)
    for l in want,got:
        set_seed(1)
        l.fit(2, 1e-2, cbs=QuantAwareCallback('w4a8'))
    assert got.model is outer
    assert ranges(got.model).equals(ranges(want.model))
    for a,b in zip(want.model.parameters(), inner_model(got.model).parameters(), strict=True): eq(a, b)
    q = got.quantize(timed=False)
    eq(q.model.report.n_int8, 3)
    close(q.model(xs), want.quantize(timed=False).model(xs))
    assert list(want.compare(got, q, n=1, warmup=0).index)==['rounded','rounded 2','int8']
    got.save('it')
    fresh = learner(net(), path=tmp_path).load('it')
    assert ranges(fresh.model).equals(ranges(want.model))
    learner(wrappers[kind](net()), path=tmp_path).load('it')
    got.remove_quant()
    assert got.model is outer and fake_quant_of(got.model) is None
    close(got.model.eval()(xs), want.remove_quant().model.eval()(xs))

@pytest.mark.parametrize('kind', wrappers)
def test_pruning_does_not_see_the_wrapper(kind, tmp_path):
    want,got = learner(net()),learner(wrappers[kind](net()), path=tmp_path)
    run_once(got)
    for l in want,got: l.fit(2, 1e-2, cbs=PruneScheduleCallback(.5, end=.5, criterion='wanda'))
    assert list(masked(got.model))==list(masked(want.model)) and sparsity(got.model)==sparsity(want.model)>.49
    for k,m in masked(got.model).items(): eq(m.weight==0, masked(want.model)[k].weight==0)
    small = learner(wrappers[kind](net())).prune(.5, structure='channel')
    assert n_params(small.model)<n_params(want.model)
    got.save('pruned')
    eq(sparsity(learner(net(), path=tmp_path).load('pruned').model), sparsity(want.model))

def test_a_part_may_be_compiled():
    want,got = learner(net()),learner(part_compiled(net()))
    run_once(got)
    for l in want,got: l.fit(2, 1e-2, cbs=[QuantAwareCallback(), PruneScheduleCallback(.5)])
    for a,b in zip(want.model.parameters(), got.model.parameters(), strict=True): eq(a, b)
    close(got.quantize(timed=False).model(xs), want.quantize(timed=False).model(xs))
    unrounded = learner(part_compiled(net()))
    unrounded.fit(1, 1e-2)
    eq(unrounded.quantize(timed=False).model.report.n_int8, 3)

def test_features_of_a_compiled_student_are_seen():
    teacher = net()
    want,got = learner(net()),learner(eager(net()))
    run_once(got)
    for l,t in (want,teacher),(got,eager(teacher)): l.fit(1, 1e-2, cbs=DistillCallback(t, features={'1':'1'}))
    for a,b in zip(want.model.parameters(), got.model.parameters(), strict=True): close(a, b)

def test_weights_of_a_compiled_model_from_plain_fastai_load(tmp_path):
    m = eager(net())
    (tmp_path/'models').mkdir()
    torch.save(m.state_dict(), tmp_path/'models'/'old.pth')
    learn = learner(net(), path=tmp_path)
    with torch.no_grad(): learn.model[4].weight.zero_()
    eq(learn.load('old').model[4].weight, inner_model(m)[4].weight)

def test_several_devices_are_refused():
    for go in (lambda l: l.fit(1, cbs=QuantAwareCallback()), lambda l: l.validate(cbs=PTQCalibrate())):
        learn = learner(nn.DataParallel(net()))
        learn.model.device_ids = [0,1]
        with pytest.raises(ValueError, match='learn.distrib_ctx'): go(learn)
        assert fake_quant_of(learn.model) is None

@pytest.mark.filterwarnings('ignore')
def test_a_scripted_model_is_refused():
    for m in torch.jit.script(net()),torch.jit.trace(net().eval(), xs[:2]):
        learn = learner(m)
        fits = [partial(learn.fit, 1, cbs=cb) for cb in (QuantAwareCallback(),PruneScheduleCallback(.5))]
        for go in (learn.quantize, partial(learn.prune, .5), *fits):
            with pytest.raises(ValueError, match='on the model that it was made of'): go()

class Blocks(nn.Module):
    "Two blocks and what functions compute, run as `how` says; one block twice"
    def __init__(self, how):
        super().__init__()
        self.how,self.stem,self.a,self.b = how,nn.Conv2d(3,8,3),ConvLayer(8,8),nn.Sequential(nn.Conv2d(8,8,3,padding=1), nn.Dropout(.2))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8,3))
    def mixed(self, x, y): return torch.relu(self.b(x)+y)*.5+self.b(y)
    def forward(self, x):
        x = self.stem(x)
        y = self.how(self.a, x)
        return self.head(self.how(self.mixed, y, x))

def plain(f, *args): return f(*args)
def nested(f, *args): return checkpoint(lambda *a: checkpoint(f, *a, use_reentrant=False), *args, use_reentrant=True)
again = dict(reentrant=partial(checkpoint, use_reentrant=True), other=partial(checkpoint, use_reentrant=False), nested=nested)

def blocks(how):
    set_seed(0)
    return Blocks(how)

@pytest.mark.parametrize('how', again)
@pytest.mark.parametrize('spec', ['int8','w4a4'])
def test_what_runs_again_in_the_backward_pass_rounds_as_before(how, spec):
    found = []
    for f in plain,again[how]:
        m = prepare(blocks(f), spec, xs[:8]).train()
        guess(m, xs[:8])
        r,grads = fake_quant_of(m),[]
        for i in range(4):
            if i==2: start(m)
            r.how = Site.follow
            set_seed(i)
            loss = F.cross_entropy(m(xs[i*8:i*8+8]), ys[i*8:i*8+8])
            follow(m, .3)
            m.zero_grad()
            loss.backward()
            grads.append([p.grad.clone() for p in m.parameters() if p.grad is not None])
        found.append((grads,r.range.clone(),r.scale.detach().clone(),r.weight_scale.detach().clone(),r.batches.item()))
    (g1,*one),(g2,*two) = found
    for a,b in zip(sum(g1, []), sum(g2, []), strict=True): assert (a-b).abs().max()<1e-6
    for a,b in zip(one, two): assert torch.equal(torch.as_tensor(a).nan_to_num(), torch.as_tensor(b).nan_to_num())

@pytest.mark.parametrize('how', again)
def test_fits_of_recomputed_models_are_the_same(how):
    found = []
    for f in plain,again[how]:
        learn = learner(blocks(f))
        for m in learn.model.modules():
            if isinstance(m, nn.BatchNorm2d): m.momentum = 0. # PyTorch counts batches twice with checkpointing
        set_seed(1)
        learn.fit(2, 1e-2, cbs=[QuantAwareCallback('w4a8', start=.2), PruneScheduleCallback(.5, end=.6)])
        found.append([*learn.model.parameters(), fake_quant_of(learn.model).range])
    for a,b in zip(*found, strict=True): close(a.detach().nan_to_num(), b.detach().nan_to_num(), 1e-5)

def test_masks_hold_in_a_recomputed_model():
    found = []
    for f in plain,*again.values():
        learn = learner(blocks(f))
        set_seed(1)
        learn.fit(2, 1e-2, cbs=RigLCallback(.5, every=2))
        for m in masked(learn.model).values(): eq(m.weight!=0, m.weight_mask)
        found.append([p.detach() for k,p in learn.model.named_parameters()])
    for o in found[1:]:
        for a,b in zip(found[0], o, strict=True): close(a, b, 1e-5)

def test_checkpoint_sequential_rounds_too():
    class Sequence(nn.Module):
        def __init__(self, n):
            super().__init__()
            self.n,self.head = n,nn.Linear(8,3)
            self.body = nn.Sequential(*[nn.Sequential(nn.Linear(8,8), nn.ReLU()) for _ in range(4)])
        def forward(self, x):
            if not self.n: return self.head(self.body(x))
            return self.head(checkpoint_sequential(self.body, self.n, x, use_reentrant=False))
    x,grads = torch.randn(16,8),[]
    for n in 0,2:
        set_seed(0)
        m = rounds(Sequence(n), 'int8', x, fold=False)
        m(x).square().sum().backward()
        grads.append([p.grad for p in m.parameters()])
    for a,b in zip(*grads, strict=True): eq(a, b)

class Recomputed(torch.autograd.Function):
    "Checkpointing by hand"
    @staticmethod
    def forward(ctx, x, m):
        ctx.save_for_backward(x)
        ctx.m = m
        return m(x)
    @staticmethod
    def backward(ctx, g):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad(): ctx.m(x).backward(g)
        return x.grad,None

class ByHand(nn.Module):
    def __init__(self):
        super().__init__()
        self.a,self.b,self.c = nn.Linear(8,8),nn.Linear(8,8),nn.Linear(8,3)
    def forward(self, x): return self.c(Recomputed.apply(self.a(x), self.b).relu())

def test_what_recomputes_itself_by_hand_is_told():
    x = torch.randn(64,8)
    with pytest.raises(RuntimeError, match="'b' runs in the backward pass.*exclude='b'"): learner(ByHand(), x).fit(1, cbs=QuantAwareCallback())
    learn = learner(ByHand(), x)
    learn.fit(2, cbs=QuantAwareCallback(exclude='b'))
    assert learn.quantize(timed=False).model.report.float_layers=={'b':'excluded'}
    calls = len(learn.model.b._forward_pre_hooks)
    learn.remove_quant()
    eq((calls,len(learn.model.a._forward_pre_hooks)), (0,0))

dtypes = [torch.float16,torch.bfloat16,torch.float64]

def of(dtype, **kwargs):
    m = net()
    for _ in range(8): m(xs)
    return learner(m.to(dtype), xs.to(dtype), **kwargs)

@pytest.mark.parametrize('dtype', dtypes)
def test_other_precisions_are_calibrated_in_float32(dtype):
    learn = of(dtype)
    q = learn.quantize(timed=False)
    eq((q.model.report.n_int8,inner_model(learn.model)[4].weight.dtype), (3,dtype))
    want = of(torch.float32).quantize(timed=False).model(xs)
    assert sqnr(want, q.model(xs))>20
    eq(q.model(xs.to(dtype)).dtype, dtype)
    assert len(q.validate())==1 and len(learn.layer_errors(show_plot=False))
    for go in (lambda: learn.fit(1, cbs=QuantAwareCallback()), lambda: learn.validate(cbs=PTQCalibrate())):
        with pytest.raises(ValueError, match='learn.model.float()'): go()
    assert fake_quant_of(learn.model) is None

@pytest.mark.parametrize('dtype', dtypes)
def test_other_precisions_are_pruned(dtype, tmp_path):
    learn = of(dtype, path=tmp_path)
    for criterion in 'magnitude','l2','taylor','wanda':
        new = learn.prune(.5, criterion=criterion)
        assert abs(sparsity(new.model)-.5)<.01
    if dtype==torch.float64: new.fit(1, 1e-3) # fastai's Recorder takes no losses of half precision
    assert abs(sparsity(new.model)-.5)<.01 and new.model[0][0].weight.dtype==dtype
    eq(learn.load_sparse(new.save_sparse('it.safetensors')).model[0][0].weight, new.model[0][0].weight)
    small = learn.prune(.5, structure='channel')
    assert n_params(small.model)<n_params(learn.model)
    assert n_bytes(small.quantize(timed=False).model)

def test_squares_do_not_leave_the_range_of_half_precision():
    m = nn.Sequential(nn.Linear(8,8), nn.ReLU(), nn.Linear(8,3)).half()
    x = (torch.randn(64,8)*1000).half()
    with torch.no_grad():
        m[0].weight.mul_(1e-4)
        m[2].weight.mul_(1e-4)
    for criterion in 'wanda','l2','taylor':
        new,same = (learner(m.to(d), x.to(d)).prune(.5, criterion=criterion) for d in (torch.float32,torch.float16))
        if criterion!='taylor': eq(new.model[0].weight==0, same.model[0].weight==0)
        close(sparsity(same.model), .5, .02)

class Casts(nn.Module):
    "Has a dtype of its own in its forward pass"
    def __init__(self, dtype):
        super().__init__()
        self.dtype,self.lin,self.out = dtype,nn.Linear(192,8),nn.Linear(8,3)
    def forward(self, x): return self.out(torch.relu(self.lin(x.flatten(1).to(self.dtype or x.dtype))))

class OfWeight(Casts):
    def __init__(self): super().__init__(None)
    def forward(self, x): return self.out(self.lin(x.flatten(1)).relu().to(self.out.weight.dtype))

def test_a_model_that_casts_by_itself_is_told():
    with pytest.raises(ValueError, match='does not run in float32.*dtype by itself'): learner(Casts(torch.float16).half(), xs.half()).quantize(timed=False)
    eq(learner(OfWeight(), xs).quantize(timed=False).model.report.n_int8, 2) # its weight stays, and the integers lie beside the model
    eq(learner(Casts(None).half(), xs.half()).quantize(timed=False).model.report.n_int8, 2)

def test_a_loss_on_numbers_of_half_precision_takes_what_the_file_gives():
    x,y = torch.randn(64,8).half(),torch.rand(64,3).half()
    learn = learner(nn.Sequential(nn.Linear(8,16), nn.ReLU(), nn.Linear(16,3)).half(), x, y, loss=MSELossFlat())
    assert abs(learn.quantize(timed=False).validate()[0]-learn.validate()[0])<.05
