"What a fastai user does to a Learner, done to one that trains through rounding: it survives, and does what it should"
import copy, numpy as np, onnx, pytest, torch
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError
from fastai.callback.rnn import ModelResetter
from fastai.tabular.all import tabular_learner
from fastai.text.models.awdlstm import AWD_LSTM, awd_lstm_clas_config
from fastai.text.models.core import get_text_classifier
from fastai.vision.all import (Adam, Callback, CancelFitException, CrossEntropyLossFlat, DataLoader, DataLoaders, EarlyStoppingCallback,
    GradientAccumulation, GradientClip, ImageBlock, L, Learner, MaskBlock, MixUp, PILImageBW, ReduceLROnPlateau, SGD, SaveModelCallback, accuracy,
    aug_transforms, load_learner, ranger, resnet18, set_seed, unet_learner, vision_learner)
from fastai.vision.models.xresnet import xresnet18
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn
from torch.overrides import _get_current_function_mode_stack as modes
from torch.utils.data import TensorDataset
from fastquant.all import *
from fastquant.export.portable import misfits
from fastquant.export.engine import optimized
from fastquant.quant.pairs import pairs_fit
from fastquant.quant.spec import find_spec
from fastquant.quant.train import steps
from tests.helpers.data import gray, ink, loaders, pictures, rows, shuffled, table
from tests.helpers.learners import Bf16, Do, Seeded, Stages, check_owned, classifier, quiet
from tests.helpers.nets import Raise, encoder, same_with_nan as same, staged, stages, state

train,valid = shuffled(640, 320)

def learner(path, model=None, **kwargs):
    set_seed(0)
    return classifier(loaders(train, valid), model or staged(), path, **kwargs)

@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    "Of a float net that knows the digits"
    learn = learner(tmp_path_factory.mktemp('float'))
    learn.fit_one_cycle(5, 1e-2)
    assert learn.validate()[1]>.95
    return learn.model.state_dict()

@pytest.fixture
def make(weights, tmp_path):
    "Makes Learners around that net"
    def _make(**kwargs):
        learn = learner(tmp_path, **kwargs)
        learn.model.load_state_dict(weights)
        return learn
    return _make

@pytest.fixture(autouse=True)
def no_mode_left():
    "What one test leaves on must not change what others compute"
    yield
    while modes(): torch._C._pop_torch_function_stack()

both = pytest.mark.parametrize('spec', ['int8','w4a4'])

def of_ranges(model): return {k:v for k,v in state(model).items() if k.startswith('fake_quant_')}
def opt_state(opt): return [{k:v.clone() if isinstance(v, torch.Tensor) else v for k,v in s.items()} for s in opt.state_dict()['state']]
def same_opt(a, b):
    equal = lambda s,t: s.keys()==t.keys() and all(torch.equal(torch.as_tensor(v), torch.as_tensor(t[k])) for k,v in s.items())
    return len(a)==len(b) and all(map(equal, a, b))
def learned_steps(model):
    "Step sizes that learn, without those that follow ranges"
    r = fake_quant_of(model)
    acts,weights = [s.i for s in r.all if s.spec.learned],[torch.arange(v.start, v.stop) for k,v in r.slices.items() if r.weights[k].learned]
    return torch.cat([r.scale[acts],*[r.weight_scale[i] for i in weights]]).detach().clone()
def eager(learn):
    with evaluating(learn.model): return learn.model(valid.tensors[0]).softmax(1)
def preds(learn): return learn.get_preds()[0]

def check_rounds(learn, at_least=.93, engine=False):
    "The model rounds and is good at it; and so is the engine made of it, which predicts the same"
    assert fake_quant_of(learn.model).ready and all(v.isfinite().all() for k,v in of_ranges(learn.model).items() if k!='fake_quant_range')
    assert modes()==[]
    check_owned(learn)
    acc = learn.validate()[1]
    assert acc>=at_least, acc
    if not engine: return
    q = learn.quantize(n_batches=1)
    p,r = preds(q),preds(learn)
    assert q.model.report.trained and (p.argmax(1)==r.argmax(1)).float().mean()>=.99 and abs(q.validate()[1]-acc)<=.01

# What it does to a fit

@both
def test_every_parameter_moves(make, spec):
    learn = make()
    learn.fit(1, 1e-3, cbs=QuantAwareCallback(spec))
    was = {k:p.detach().clone() for k,p in learn.model.named_parameters()}
    learn.fit(1, 1e-3, cbs=QuantAwareCallback(spec))
    assert [k for k,p in learn.model.named_parameters() if torch.equal(p, was[k])]==[]
    check_rounds(learn, engine=True)

@both
def test_lr_find_leaves_no_trace(make, spec):
    "Fits with `lr_find` before, between and after end where those without do, bit for bit"
    a,b = make(),make()
    for learn in (a,b):
        for _ in range(2):
            if learn is b:
                was = state(learn.model)
                lr = learn.lr_find(show_plot=False, num_it=20)
                assert 0<lr.valley<10 and same(state(learn.model), was)
            learn.fit_one_cycle(1, 1e-3, cbs=[QuantAwareCallback(spec),Seeded()])
    was,opt = state(b.model),opt_state(b.opt)
    b.lr_find(show_plot=False, num_it=20)
    assert same(state(b.model), was) and same_opt(opt_state(b.opt), opt)
    assert same(state(a.model), was)
    check_rounds(b)

@both
def test_fit_after_fit(make, spec):
    "The next fit starts with the ranges of the one before, with the same optimizer or a new one, with the callback or without"
    learn = make()
    learn.fit_one_cycle(1, 2e-3, cbs=QuantAwareCallback(spec))
    model,r = learn.model,fake_quant_of(learn.model)
    for kwargs in (dict(cbs=QuantAwareCallback(spec)), dict(cbs=QuantAwareCallback(spec), reset_opt=True), dict()):
        want,got = of_ranges(model),[]
        learn.fit_one_cycle(1, 2e-3, **{**kwargs, 'cbs':[*L(kwargs.get('cbs')),Do(order=-8, before_batch=lambda l: got.append(of_ranges(l.model)))]})
        assert same(got[0], want) and learn.model is model and fake_quant_of(model) is r and len(model._load_state_dict_pre_hooks)==1
        check_owned(learn)
    assert same({**got[-1], **{k:want[k] for k in ('fake_quant_scale','fake_quant_weight_scale')}}, want), 'without the callback only learned steps may move'
    assert same(got[-1], want)==(spec=='int8')
    check_rounds(learn, engine=True)

# Stages, and their learning rates

def vision(path, **kwargs):
    set_seed(0)
    return quiet(vision_learner(pictures(valid=.2, **{'n':80, **kwargs}), resnet18, pretrained=False, metrics=accuracy, path=path))

def in_stages(learn, cbs):
    "Fits in all stages of freezing; what was logged in them, and names of parameters that moved"
    log = Stages()
    def run(lr, f=None):
        if f: f()
        was = {k:p.detach().clone() for k,p in learn.model.named_parameters() if not k.startswith('fake_quant_')}
        learn.fit_one_cycle(1, lr, cbs=[log,*cbs()])
        out.append((log.log, [k for k,p in was.items() if not torch.equal(p, learn.model.get_parameter(k))]))
    out = []
    run(1e-3, learn.freeze)
    run(slice(1e-3), lambda: learn.freeze_to(-2))
    run(slice(1e-5,1e-3), learn.unfreeze)
    run([1e-5,1e-4,1e-3], lambda: learn.freeze_to(1))
    return out

def test_stages_of_a_vision_learner(tmp_path):
    "Freezing and discriminative learning rates are exactly those of a fit without the callback, and all steps move all the time"
    torch.manual_seed(0)
    plain = vision(tmp_path, n=40)
    want = in_stages(plain, lambda: [])
    for spec in ('int8','w4a4'):
        learn,moved = vision(tmp_path, n=40),[]
        def note(l): moved.append(learned_steps(l.model))
        got = in_stages(learn, lambda: [QuantAwareCallback(spec, start=0),Do(before_train=note, after_train=note)])
        assert got==want and len(want[0][1])<len(want[2][1])
        assert len(learn.opt.param_lists)==(3 if spec=='int8' else 4)
        assert all((a!=b).float().mean()>.9 for a,b in zip(moved[2::2], moved[3::2]) if len(a)) and len(moved)==8
        check_owned(learn)

def test_step_group_follows_the_head(make):
    "Steps learn at the share asked for of the head's rate in every batch of a schedule, without weight decay"
    learn,got = make(splitter=stages),[]
    def note(l): got.append([(h['lr'],h['wd']) for h in l.opt.hypers])
    learn.fit_one_cycle(1, slice(1e-4,1e-2), wd=.1, cbs=[QuantAwareCallback('w4a4', step_lr=.1),Do(before_step=note)])
    assert all(len(hs)==4 and hs[0]==(pytest.approx(.1*hs[-1][0]),0) for hs in got) and len({hs[-1] for hs in got})>5
    assert {h[1] for hs in got for h in hs[1:]}=={.1}

@both
def test_fine_tune(make, spec):
    "`fine_tune` with the callback: the first fit trains the head and the steps, the second everything"
    learn,frozen = make(splitter=stages),[]
    learn.fine_tune(2, 4e-3, cbs=[QuantAwareCallback(spec),Do(before_fit=lambda l: frozen.append(l.opt.frozen_idx))])
    assert frozen==[2,0]
    check_rounds(learn, engine=True)

# Precision, gradients, and data that is mixed

@both
def test_bf16(make, spec):
    learn,bf16 = make(),Bf16()
    learn.fit_one_cycle(2, 2e-3, cbs=[QuantAwareCallback(spec),bf16])
    assert bf16.dtypes=={torch.bfloat16} and {v.dtype for v in state(learn.model).values() if v.is_floating_point()}=={torch.float}
    assert (torch.stack([e for _,e in learn.recorder.ranges])[-1][:,1]>0).all()
    check_rounds(learn)
    assert learn.validate(cbs=Bf16())[1]>.93

@pytest.mark.parametrize('how', ['to_fp16','to_bf16'])
@pytest.mark.filterwarnings('ignore:User provided device_type')
def test_mixed_precision_callback(make, how):
    "Without a GPU `MixedPrecision` computes in 32 bits, but all of its events run"
    learn = getattr(make(), how)()
    learn.fit_one_cycle(1, 2e-3, cbs=QuantAwareCallback('w4a4'))
    check_rounds(learn)

@both
def test_gradient_accumulation(make, spec):
    "Ranges follow every batch, weights and steps move at every second"
    learn,moves = make(),[]
    learn.fit(1, 1e-3, cbs=QuantAwareCallback(spec))
    def note(l):
        weights = [p.detach().clone() for k,p in l.model.named_parameters() if 'fake_quant' not in k]
        moves.append((fake_quant_of(l.model).batches.item(), [learned_steps(l.model),*weights]))
    learn.fit(1, 1e-3, cbs=[QuantAwareCallback(spec, freeze_bn=1, freeze=1),GradientAccumulation(64),Do(before_batch=note)])
    assert [b-a for (a,_),(b,_) in zip(moves, moves[1:])]==[1]*(len(learn.dls.train)-1)
    moved = [[(p!=q).any().item() for p,q in zip(a, b)] for (_,a),(_,b) in zip(moves, moves[1:])]
    assert not any(map(any, moved[::2])) and all(all(m[spec=='int8':]) for m in moved[1::2])
    check_rounds(learn, engine=True)

def test_gradient_clip(make):
    "The norm that is clipped is that of all gradients, steps included"
    learn,norms = make(),[]
    def norm(l): norms.append(torch.cat([p.grad.flatten() for p in l.model.parameters() if p.grad is not None]).norm().item())
    learn.fit(1, 1e-3, cbs=[QuantAwareCallback('w4a4', start=0),GradientClip(.01),Do(order=99, before_step=norm)])
    assert max(norms)<=.0101 and all(p.grad is not None for p in steps(learn.model))
    check_rounds(learn)

@both
def test_mixup(make, spec):
    learn = make()
    learn.fit_one_cycle(2, 2e-3, cbs=[QuantAwareCallback(spec),MixUp(.2)])
    check_rounds(learn, engine=True)

# Callbacks that stop, save and load

@both
def test_early_stopping(make, spec):
    learn = make()
    learn.fit(8, 1e-3, cbs=[QuantAwareCallback(spec),EarlyStoppingCallback(min_delta=9, patience=1)])
    assert learn.epoch==1
    check_rounds(learn, engine=True)

def test_early_stopping_before_rounding_has_started(make):
    "No ranges have been put to use, so `quantize` calibrates, with the spec of the fit"
    learn = make()
    learn.fit(8, 1e-3, cbs=[QuantAwareCallback('w4a8', start=.5),EarlyStoppingCallback(min_delta=9, patience=1)])
    assert learn.epoch==1 and not fake_quant_of(learn.model).ready
    q = learn.quantize('w4a8')
    assert not q.model.report.trained and q.validate()[1]>.8
    learn.fit(1, 1e-3, cbs=QuantAwareCallback('w4a8'))
    check_rounds(learn)

class Remember(Callback):
    "The model's state and its predictions after every epoch"
    order = 50
    def before_fit(self): self.log = []
    def after_epoch(self): self.log.append((state(self.model),eager(self.learn)))

@both
def test_save_model(make, spec):
    "The best epoch is loaded when the fit ends, with its ranges, and trains on"
    learn,log = make(),Remember()
    learn.fit(3, 1e-3, cbs=[QuantAwareCallback(spec),SaveModelCallback(with_opt=True, comp=lambda a,b: learn.epoch==1),log])
    assert not same(log.log[1][0], log.log[2][0])
    assert same(state(learn.model), log.log[1][0]) and torch.equal(eager(learn), log.log[1][1])
    learn.fit(1, 1e-3, cbs=QuantAwareCallback(spec))
    check_rounds(learn)

@both
def test_save_model_every_epoch(make, spec):
    "Each file makes a fresh Learner predict as the model did then"
    learn,log = make(),Remember()
    learn.fit_one_cycle(3, 1e-3, cbs=[QuantAwareCallback(spec),SaveModelCallback(every_epoch=True),log])
    for i,(want,p) in enumerate(log.log):
        other = make()
        other.load(f'model_{i}', with_opt=False)
        assert same(state(other.model), want) and torch.equal(eager(other), p)
        check_owned(other)

def test_reduce_lr_on_plateau(make):
    "The rates of steps go down with the others"
    learn,lrs = make(splitter=stages),[]
    def note(l): lrs.append([h['lr'] for h in l.opt.hypers])
    learn.fit(3, 1e-3, cbs=[QuantAwareCallback('w4a4', step_lr=.1),ReduceLROnPlateau(min_delta=9, patience=1),Do(before_train=note)])
    assert np.allclose(lrs, [[1e-4,1e-3,1e-3,1e-3]]*2+[[1e-5,1e-4,1e-4,1e-4]])
    check_rounds(learn)

# Averages of weights

class Average(Callback):
    "An average of the weights over the batches of a fit, from `start` on"
    order = 50
    def __init__(self, start=0., **kwargs): self.start,self.kwargs = start,kwargs
    def before_fit(self): self.avg = AveragedModel(self.model, **self.kwargs)
    def after_step(self):
        if self.pct_train>=self.start: self.avg.update_parameters(self.model)

averages = dict(ema=dict(avg_fn=get_ema_avg_fn(.9)), ema_of_buffers=dict(avg_fn=get_ema_avg_fn(.9), use_buffers=True), swa=dict(start=.5))
@both
@pytest.mark.parametrize('name', averages)
def test_average_of_weights(make, spec, name):
    "An average from the first batch on, or from the middle, is a model that rounds, and makes a Learner that can be quantized"
    learn,avg = make(),Average(**averages[name])
    learn.fit_one_cycle(2, 2e-3, cbs=[QuantAwareCallback(spec),avg])
    model = avg.avg.module
    assert fake_quant_of(model) is not fake_quant_of(learn.model) and not torch.equal(model[0][0].weight, learn.model[0][0].weight)
    learn.model.load_state_dict(model.state_dict())
    learn.opt = None
    learn.create_opt()
    check_rounds(learn, engine=True)

def test_lookahead(make):
    "`ranger` keeps slow copies of all parameters: steps learn on, and are not thrown back to where they started"
    learn,got = make(opt_func=ranger),[]
    learn.fit(1, 1e-2, cbs=[QuantAwareCallback('w4a4', start=.1, step_lr=1),Do(after_step=lambda l: got.append(learned_steps(l.model)))])
    first = next(i for i,s in enumerate(got) if s.isfinite().all())
    assert first<=2 and all(s.isfinite().all() for s in got[first:])
    check_rounds(learn)

# Checkpoints

def test_checkpoint_size(tmp_path):
    "What rounding adds to a file is next to nothing, and there is nothing else in it"
    plain,sizes = vision(tmp_path, n=20, bs=8),{}
    plain.fit(1, 1e-4)
    for spec in ('float','int8','w4a4'):
        if spec!='float': plain.fit(1, 1e-4, cbs=QuantAwareCallback(spec))
        for with_opt in (False,True): sizes[spec,with_opt] = plain.save(f'{spec}{with_opt}', with_opt=with_opt).stat().st_size
        plain.remove_quant()
    assert all(sizes[spec,o]<1.05*sizes['float',o] for spec in ('int8','w4a4') for o in (False,True)), sizes

@both
@pytest.mark.parametrize('with_opt', [True,False])
def test_checkpoint_of_the_middle(make, spec, with_opt):
    "Saved in the middle of a fit, loaded into a Learner that has never heard of fake-quant: predictions, ranges and optimizer are equal, and it trains"
    learn,other,was = make(splitter=stages),make(splitter=stages),[]
    def save(l):
        if l.train_iter!=30: return
        l.save('mid', with_opt=with_opt)
        was.append((state(l.model),opt_state(l.opt)))
    learn.fit_one_cycle(3, 2e-3, cbs=[QuantAwareCallback(spec),Do(after_batch=save, order=99)])
    other.load('mid', with_opt=with_opt)
    assert len(was)==1 and same(state(other.model), was[0][0])
    if with_opt: assert same_opt(opt_state(other.opt), was[0][1])
    learn.model.load_state_dict(was[0][0])
    assert torch.equal(eager(other), eager(learn)) and torch.equal(preds(other), eager(learn))
    check_owned(other)
    other.fit(1, 1e-3)
    check_rounds(other, engine=True)

@pytest.mark.parametrize('spec,opt_func', [('int8',SGD),('w4a4',SGD),('int8',Adam),('w4a4',Adam)])
def test_resumed_fit(make, spec, opt_func):
    "A fit that is resumed in another Learner ends where the uninterrupted one ended, bit for bit"
    def fit(learn, **kwargs):
        learn.fit_one_cycle(4, 2e-3, cbs=[QuantAwareCallback(spec),Seeded(),SaveModelCallback(every_epoch=True, with_opt=True)], **kwargs)
        return learn
    a = fit(make(opt_func=opt_func, splitter=stages))
    b = make(opt_func=opt_func, splitter=stages).load('model_1', with_opt=True)
    assert not same(state(a.model), state(b.model))
    fit(b, start_epoch=2)
    assert same(state(a.model), state(b.model)) and same_opt(opt_state(a.opt), opt_state(b.opt))
    check_rounds(b)

def test_load_where_rounding_is_on_already(make):
    "A checkpoint with optimizer state goes into a Learner whose model rounds, but whose optimizer is new"
    learn = make(splitter=stages)
    learn.fit(1, 1e-3, cbs=QuantAwareCallback('w4a4'))
    learn.save('done')
    was,learn.opt = opt_state(learn.opt),None
    learn.load('done', with_opt=True)
    assert same_opt(opt_state(learn.opt), was)
    check_rounds(learn)

class Sly:
    "Runs code where it is unpickled"
    def __reduce__(self): return Path.touch,(Path('ran'),)

def test_load_runs_no_code(make, tmp_path, monkeypatch):
    "A file that is not only tensors is refused as fastai refuses it, and nothing in it runs"
    monkeypatch.chdir(tmp_path)
    learn = make()
    torch.save({'model':learn.model.state_dict(),'opt':Sly()}, learn.save('sly', with_opt=False))
    with pytest.raises(UnpicklingError, match='weights_only|Unsupported'): learn.load('sly')
    assert not Path('ran').exists() and 'load_state_dict' not in vars(learn.model)

# A callback that is left attached

@pytest.fixture
def digit_learner(weights, tmp_path):
    "Around the same net, with fastai's data blocks and augmentation"
    dls = pictures(200, valid=.2, bs=32, get_x=gray, block=ImageBlock(PILImageBW), batch_tfms=aug_transforms(size=8, do_flip=False))
    learn = classifier(dls, staged(), tmp_path, splitter=stages)
    learn.model.load_state_dict(weights)
    return learn

def everything(learn):
    "All that one does with a Learner besides fitting it"
    learn.validate()
    learn.predict(gray(3))
    learn.get_preds(ds_idx=0)
    learn.tta(n=2)
    learn.summary()
    learn.show_results(max_n=2)
    learn.lr_find(show_plot=False, num_it=6)
    learn.export('it.pkl')

@both
def test_left_attached(digit_learner, spec):
    "Nothing is prepared, converted or moved by what is not a fit, before one and after; and the fit is not disturbed by it"
    learn = digit_learner
    learn.add_cb(QuantAwareCallback(spec))
    was = state(learn.model)
    everything(learn)
    assert fake_quant_of(learn.model) is None and same(state(learn.model), was) and not learn.model._forward_pre_hooks
    learn.fit_one_cycle(1, 1e-3)
    check_owned(learn)
    was,opt,p = state(learn.model),opt_state(learn.opt),preds(learn)
    everything(learn)
    assert same(state(learn.model), was) and same_opt(opt_state(learn.opt), opt) and torch.equal(preds(learn), p)
    check_owned(learn)
    check_rounds(learn, 0, engine=True)
    learn.fit_one_cycle(1, 1e-3)
    assert not same(of_ranges(learn.model), {k:v for k,v in was.items() if k.startswith('fake_quant_')})

@both
def test_export_and_load_learner(digit_learner, spec):
    "In the middle of training through rounding: `learn` goes on as if nothing had been, and the loaded Learner predicts, quantizes and trains"
    learn,other = digit_learner,copy.deepcopy(digit_learner)
    for l in (learn,other):
        l.fit_one_cycle(1, 1e-3, cbs=[QuantAwareCallback(spec),Seeded()])
        if l is learn: learn.export('mid.pkl')
        assert len(l.dls.train) and type(l.opt).__name__=='Optimizer'
        before = state(l.model)
        l.fit_one_cycle(1, 1e-3, cbs=[QuantAwareCallback(spec),Seeded()])
    assert same(state(learn.model), state(other.model))
    loaded = quiet(load_learner(learn.path/'mid.pkl'))
    assert same(state(loaded.model), before)
    learn.model.load_state_dict(before)
    assert torch.equal(loaded.predict(gray(7))[2], learn.predict(gray(7))[2])
    dl = learn.dls.test_dl(list(range(64)))
    q = loaded.quantize(dl=dl, n_batches=1)
    assert q.model.report.trained and (q.get_preds(dl=dl)[0].argmax(1)==loaded.get_preds(dl=dl)[0].argmax(1)).float().mean()>.98
    loaded.dls = learn.dls
    loaded.fit(1, 1e-3, cbs=QuantAwareCallback(spec))
    check_rounds(loaded, 0, engine=True)

# Fits that end early

@both
@pytest.mark.parametrize('where,error', [('forward',KeyboardInterrupt),('forward',RuntimeError),('after_pred',KeyboardInterrupt),
    ('before_step',RuntimeError),('after_batch',KeyboardInterrupt)])
def test_interrupted(make, spec, where, error):
    "After a fit that was stopped, nothing of it is left over: the model predicts, quantizes, and trains"
    learn,cbs = make(),[]
    def stop(l):
        if l.train_iter==6: raise error('stop')
    if where=='forward': learn.model[1].append(Raise(error, 6))
    else: cbs = [Do(**{where:stop})]
    with pytest.raises(error): learn.fit(1, 1e-3, cbs=[QuantAwareCallback(spec),*cbs])
    assert modes()==[] and fake_quant_of(learn.model).ready
    was = of_ranges(learn.model)
    assert torch.equal(preds(learn), eager(learn)) and same(of_ranges(learn.model), was)
    assert learn.quantize(n_batches=1).model.report.trained
    learn.fit(1, 1e-3, cbs=QuantAwareCallback(spec))
    check_rounds(learn)

@pytest.mark.parametrize('error', [KeyboardInterrupt,RuntimeError])
def test_what_a_broken_batch_saw_is_forgotten(make, error):
    "A pass that broke down in the middle has moved no range, and does not when training goes on"
    learn = make()
    learn.fit(1, 1e-3, cbs=QuantAwareCallback())
    learn.model[1].append(Raise(error, 1))
    was = of_ranges(learn.model)
    def huge(l): l.xb = (l.x*1000,)
    def one_is_enough(l): raise CancelFitException
    with pytest.raises(error): learn.fit(1, 1e-9, cbs=[QuantAwareCallback(),Do(before_batch=huge)])
    assert same(of_ranges(learn.model), was)
    learn.fit(1, 1e-9, cbs=[QuantAwareCallback(),Do(after_batch=one_is_enough)])
    assert (learn.model.fake_quant_range-was['fake_quant_range'])[:,:2].abs().max()<1

@both
def test_interrupted_lr_find(make, spec):
    learn = make()
    def stop(l):
        if l.train_iter==6: raise KeyboardInterrupt
    with learn.added_cbs([QuantAwareCallback(spec),cb:=Do(after_step=stop)]):
        with pytest.raises(KeyboardInterrupt): learn.lr_find(show_plot=False, num_it=20)
    assert fake_quant_of(learn.model) is None
    learn.fit_one_cycle(1, 1e-3, cbs=QuantAwareCallback(spec))
    check_rounds(learn)

# Batches of any size

def sized(learn, n, bs):
    "Data in plain `DataLoader`s, which keep the last batch"
    plain = lambda ds, n, bs: DataLoader(TensorDataset(*[t[:n] for t in ds.tensors]), bs=bs, shuffle=ds is train, num_workers=0)
    learn.dls = DataLoaders(plain(train, n, bs), plain(valid, 320, 64))

@both
def test_ragged_batches(make, spec):
    "A last batch of one counts as a batch, and ranges before rounding starts are plain averages over batches"
    learn,seen = make(),[]
    sized(learn, 65, 32)
    def note(l): seen.append([len(l.x),l.x.min().item(),l.x.max().item()])
    learn.fit(1, 1e-3, cbs=[QuantAwareCallback(spec, start=1, freeze_bn=1, freeze=1),Do(before_batch=note)])
    assert [o[0] for o in seen]==[32,32,1] and fake_quant_of(learn.model).batches==3
    assert torch.allclose(learn.model.fake_quant_range[0,:2], torch.tensor(seen)[:,1:].mean(0))
    learn.fit(1, 1e-3, cbs=QuantAwareCallback(spec))
    check_rounds(learn, .8, engine=True)

@both
def test_batches_of_one(make, spec):
    learn = make()
    sized(learn, 24, 1)
    learn.fit(1, 1e-5, cbs=QuantAwareCallback(spec, freeze_bn=.1))
    assert fake_quant_of(learn.model).batches==22 and fake_quant_of(learn.model).ready
    q,x = learn.quantize(n_batches=8),valid.tensors[0][:16]
    one,all_ = torch.cat([q.model(o[None]) for o in x]),q.model(x)
    assert torch.allclose(one, all_, atol=1e-4) and (all_.argmax(1)==eager(learn)[:16].argmax(1)).all()

# Looking at it

@both
def test_predictions_during_a_fit(make, spec):
    "From a callback, predictions are those of the model as it is, they move nothing, and training goes on as without"
    a,b,n = make(),make(),[]
    def look(l):
        was = state(l.model)
        p = l.get_preds(inner=True)[0]
        assert torch.equal(p, eager(l)) and same(state(l.model), was)
        n.append(len(p))
    for learn in (a,b): learn.fit(2, 1e-3, cbs=[QuantAwareCallback(spec),Seeded()]+([Do(after_epoch=look)] if learn is b else []))
    assert n==[320,320] and same(state(a.model), state(b.model))
    assert torch.equal(preds(b), eager(b))

@both
def test_summary(make, spec):
    "Says what it says of the float model, but for the number of learned steps"
    learn = make()
    learn.create_opt()
    lines = lambda: [o for o in learn.summary().splitlines() if 'params' not in o and 'Callback' not in o]
    want = lines()
    learn.fit(1, 1e-3, cbs=QuantAwareCallback(spec))
    assert lines()==want and len(want)>20

@both
def test_deepcopy(make, spec):
    "Copies of a Learner and of its model round as the original does, and nothing they do touches it"
    learn = make()
    learn.fit(1, 1e-3, cbs=QuantAwareCallback(spec))
    was,p = state(learn.model),eager(learn)
    other,model = copy.deepcopy(learn),copy.deepcopy(learn.model)
    assert fake_quant_of(model) is not fake_quant_of(learn.model) and fake_quant_of(model).model is model and fake_quant_of(other.model).model is other.model
    with evaluating(model): assert torch.equal(model(valid.tensors[0]).softmax(1), p)
    check_owned(other)
    moved = learned_steps(other.model)
    other.fit(1, 1e-2, cbs=QuantAwareCallback(spec, step_lr=1))
    assert spec=='int8' or not torch.equal(learned_steps(other.model), moved)
    other.remove_quant()
    assert same(state(learn.model), was) and torch.equal(eager(learn), p) and fake_quant_of(learn.model) is not None

# Models

def check_model(learn, spec='int8', epochs=1, lr=1e-3, within=.02, **kwargs):
    "What the engine predicts is what the model in training does"
    before = {k:(type(m),getattr(m, 'p', None),getattr(m, 'eps', None),getattr(m, 'momentum', None)) for k,m in learn.model.named_modules()}
    learn.fit_one_cycle(epochs, lr, cbs=QuantAwareCallback(spec, **kwargs))
    assert {k:(type(m),getattr(m, 'p', None),getattr(m, 'eps', None),getattr(m, 'momentum', None)) for k,m in learn.model.named_modules()}==before
    check_owned(learn)
    q = learn.quantize(n_batches=2)
    rounds,shipped = learn.validate(),q.validate()
    assert q.model.report.trained and q.model.report.float_layers=={}
    assert round(rounds[1]-shipped[1], 6)<=within, (rounds, shipped) # accuracies are float32: .30-.25 is .05
    return rounds[1]

@pytest.mark.parametrize('act', [nn.ReLU6, lambda: nn.Hardtanh(0., 1.)], ids=['relu6','hardtanh'])
def test_steps_learn_where_the_model_clips(weights, tmp_path, act):
    "They reach no further than the model lets values go, so that its own clipping is gone from what the engine runs"
    model,got = staged(),[]
    for block in (model[0],model[1],model[2][0]): block[2] = act()
    learn = learner(tmp_path, model)
    learn.model.load_state_dict(weights)
    def note(l):
        if (r:=fake_quant_of(l.model)).ready: got.append(r.scale[r.capped].detach().clone())
    learn.fit_one_cycle(3, 4e-3, cbs=[QuantAwareCallback('w4a8'),Do(after_step=note)])
    cap = model[0][2].max_val/255
    assert len(got[0])==2 and all((s<=cap*1.0001).all() for s in got)
    assert (got[0]!=got[-1]).all() if act is nn.ReLU6 else any((s>.999*cap).any() for s in got) # a ReLU6 clips next to nothing here, the other much
    check_rounds(learn, engine=True)
    q = learn.quantize(n_batches=1)
    assert q.model.report.float_layers=={} and not [n for n in optimized(q.model.data).graph.node if n.op_type=='Clip']

def test_unet(tmp_path):
    data = pictures(24, MaskBlock(['bg','ink']), ink, .2, bs=8)
    learn = quiet(unet_learner(data, encoder, pretrained=False, n_out=2, metrics=pixels, path=tmp_path))
    check_model(learn, within=.01)

def pixels(p, y): return (p.argmax(1)==y).float().mean()

@pytest.mark.parametrize('spec,seed', [('int8',0),('int8',1),('int8',2),('w4a4',0)])
def test_tabular(tmp_path, spec, seed):
    "Inputs of the `cat` keep grids of their own: nothing is lost between the rounded model and the engine"
    set_seed(seed)
    dls = rows(table(1600), 1200)
    learn = quiet(tabular_learner(dls, layers=[50,20], metrics=accuracy, path=tmp_path))
    learn.fit_one_cycle(4, 1e-2)
    assert check_model(learn, spec, epochs=2, lr=5e-3)>.93

def test_xresnet_from_scratch(tmp_path):
    "Batchnorms that start with gamma 0 put out zeros, and learn"
    learn = quiet(Learner(pictures(100, valid=.2), xresnet18(n_out=10), metrics=accuracy, path=tmp_path))
    zeros = [k for k,p in learn.model.named_parameters() if (p==0).all() and k.endswith('weight')]
    assert len(zeros)==8
    check_model(learn, 'w4a4', epochs=2, lr=4e-3, within=.05)
    assert all((learn.model.get_parameter(k)!=0).all() for k in zeros)
    assert all(v.isfinite().all() for v in [*learn.model.parameters(),learn.model.fake_quant_scale,learn.model.fake_quant_weight_scale])

def test_dropout_and_batchnorm_stay(tmp_path):
    "Classes, dropout probabilities, eps and momentum are what they were, over epochs of training and validating, and during them"
    first = nn.Conv2d(1,16,3,2), nn.BatchNorm2d(16, eps=1e-2, momentum=.3), nn.ReLU()
    m = nn.Sequential(*first, nn.Dropout2d(.15), nn.Flatten(), nn.Dropout(.25), nn.Linear(144,10))
    learn,seen = learner(tmp_path, m),set()
    def note(l): seen.add((l.model.training,m[1].eps,m[1].momentum,m[3].p,m[5].p,type(m),type(m[0]),m[5].training,type(m[0].weight)))
    learn.fit(2, 1e-3, cbs=Do(before_batch=note, run_valid=True))
    want = set(seen)
    seen.clear()
    assert check_model(learn, epochs=3, lr=5e-3, within=.01)>.5
    learn.fit(2, 1e-3, cbs=[QuantAwareCallback(),Do(before_batch=note, run_valid=True)])
    assert seen==want and learn.model is m

@both
def test_remove_quant(make, spec):
    "The float model is left, bit for bit where the optimizer left it, with the optimizer's state, and trains on as a plain one"
    learn = make(splitter=stages)
    learn.fit_one_cycle(1, 1e-3, cbs=QuantAwareCallback(spec))
    trained,opt = {k:v for k,v in state(learn.model).items() if not k.startswith('fake_quant_')},opt_state(learn.opt)
    assert learn.remove_quant() is learn and same(state(learn.model), trained)
    assert not learn.model._forward_pre_hooks and not learn.model._forward_hooks and not learn.model._load_state_dict_pre_hooks
    n = len(list(learn.model.parameters()))
    assert same_opt(opt_state(learn.opt), opt[-n:])
    check_owned(learn)
    plain = make(splitter=stages)
    plain.create_opt()
    plain.model.load_state_dict(trained)
    plain.opt.load_state_dict(copy.deepcopy(learn.opt.state_dict()))
    assert torch.equal(eager(plain), eager(learn))
    for l in (learn,plain): l.fit_one_cycle(1, 1e-3, cbs=Seeded())
    assert same(state(learn.model), state(plain.model))
    learn.fit_one_cycle(1, 1e-3, cbs=QuantAwareCallback('w2a4'))
    check_rounds(learn, .8, engine=True)

# Text

class Attention(nn.Module):
    "A transformer that says whether there is a 7 in a sequence"
    def __init__(self, embed):
        super().__init__()
        self.embed,self.layer,self.head = embed,nn.TransformerEncoderLayer(32, 2, 64, dropout=0., batch_first=True),nn.Linear(32, 2)
    def forward(self, x): return self.head(self.layer(self.embed(x)).amax(1))

projections = 'layer.self_attn.in_proj_weight','layer.self_attn.out_proj'

def sequences(path, model, prep=lambda x: x):
    set_seed(0)
    x = torch.randint(0, 12, (800,6))
    y = (x==7).any(1).long()
    dls = loaders(TensorDataset(prep(x[:600]), y[:600]), TensorDataset(prep(x[600:]), y[600:]), bs=50)
    return classifier(dls, model(), path)

@both
def test_transformer(tmp_path, spec):
    "Linear layers in int8, those of attention too, its own products in float, and it learns"
    learn = sequences(tmp_path, lambda: Attention(nn.Linear(12, 32)), lambda x: nn.functional.one_hot(x, 12).float())
    learn.fit_one_cycle(4, 3e-3)
    learn.fit_one_cycle(2, 1e-3, cbs=QuantAwareCallback(spec))
    q = learn.quantize()
    assert list(fake_quant_of(learn.model).layers)==['embed',*projections,'layer.linear1','layer.linear2','head']
    assert learn.validate()[1]>.95 and abs(q.validate()[1]-learn.validate()[1])<=.01
    check_owned(learn)

texts = dict(transformer=lambda: Attention(nn.Embedding(12, 32)),
    awd_lstm=lambda: get_text_classifier(AWD_LSTM, 12, 2, config={**awd_lstm_clas_config, 'emb_sz':16, 'n_hid':16, 'n_layers':2, 'pad_token':0}))
in_int8 = dict(transformer=[*projections,'layer.linear1','layer.linear2','head'], awd_lstm=['1.layers.0.2','1.layers.1.2'])
@pytest.mark.parametrize('name', texts)
def test_tokens(tmp_path, name):
    "What comes out of an embedding is an activation: a model of integers trains through the rounding like others"
    learn = sequences(tmp_path, texts[name])
    if name=='awd_lstm': learn.add_cb(ModelResetter())
    learn.loss_func = lambda p,*y: CrossEntropyLossFlat()(p[0] if isinstance(p, tuple) else p, *y)
    learn.metrics = []
    learn.fit(1, 1e-3, cbs=QuantAwareCallback())
    r = fake_quant_of(learn.model)
    assert r.ready and list(r.layers)==in_int8[name]
    if name=='transformer': assert learn.quantize(timed=False).model.report.agrees_rounded==1

# From a calibration

@both
def test_ladder(make, spec):
    "A fit on a calibrated Learner starts from those ranges, bit for bit, and rounds from the first batch"
    learn,first = make(),[]
    learn.validate(cbs=PTQCalibrate(spec=spec))
    was,p = of_ranges(learn.model),preds(learn)
    assert fake_quant_of(learn.model).ready
    def note(l):
        first.append((of_ranges(l.model),eager(l)))
        l.model.train()
    learn.fit(1, 1e-3, cbs=[QuantAwareCallback(spec, start=.5, freeze_bn=.7),Do(before_train=note, order=-8)])
    assert same(first[0][0], was) and torch.equal(first[0][1], p)
    assert not same(of_ranges(learn.model), was)
    check_rounds(learn, engine=True)

def test_ladder_rounds_from_the_first_batch(make):
    "With a calibration before it training computes rounded values at once, without one not before `start`"
    out = {}
    for calibrated in (False,True):
        learn,ready = make(),[]
        if calibrated: learn.validate(cbs=PTQCalibrate())
        learn.fit(1, 1e-3, cbs=[QuantAwareCallback(start=.48),Do(after_pred=lambda l: ready.append(bool(fake_quant_of(l.model).ready)))])
        out[calibrated] = ready
    assert out=={True:[True]*20, False:[False]*10+[True]*10}

# Schedule

def test_schedule(make):
    "Rounding starts, batchnorms rest and ranges freeze when they are told to; ranges never move in validation"
    learn,log = make(),[]
    def note(l): log.append((bool(fake_quant_of(l.model).ready),l.model[0][1].running_mean.clone(),l.model.fake_quant_scale.clone(),l.model.fake_quant_range.clone()))
    learn.fit(2, 1e-3, cbs=[QuantAwareCallback(start=.24, freeze_bn=.49, freeze=.74),Do(after_batch=note)])
    assert [o[0] for o in log]==[False]*10+[True]*30
    moved = lambda k: [not torch.equal(a[k].nan_to_num(), b[k].nan_to_num()) for a,b in zip(log, log[1:])]
    assert moved(1)==[True]*19+[False]*20 and moved(3)==[True]*29+[False]*10 and moved(2)[9:]==[True]*20+[False]*10
    was = of_ranges(learn.model)
    learn.validate(dl=[(valid.tensors[0]*50, valid.tensors[1])])
    assert same(of_ranges(learn.model), was)

# Bad input

def refused(learn, message, fit=True, error=ValueError, **kwargs):
    "The fit is refused with `message`, and leaves model, optimizer and callbacks as they were"
    was,cbs,hooks = state(learn.model) if not isinstance(learn.model, Engine) else {},len(learn.cbs),len(learn.model._forward_pre_hooks)
    with pytest.raises(error, match=message): learn.fit(1, 1e-3, **kwargs)
    assert len(learn.cbs)==cbs and len(learn.model._forward_pre_hooks)==hooks and modes()==[]
    if was: assert same(state(learn.model), was)

@pytest.mark.parametrize('bits', [-1,0,1,9,16])
def test_bits(bits):
    for f in (lambda: low_bits(bits, 8), lambda: low_bits(8, bits)):
        with pytest.raises(ValueError, match=f'bits={bits}: int8 storage holds 2 to 8 bits'): QuantAwareCallback(f())

@pytest.mark.parametrize('kwargs', [dict(start=-.1), dict(start=.8), dict(freeze_bn=.95), dict(freeze=.5), dict(freeze=1.5), dict(start=float('nan'))])
def test_schedule_out_of_order(kwargs):
    with pytest.raises(ValueError, match='shares of the fit.*in this order'): QuantAwareCallback(**kwargs)

def test_two_callbacks(make):
    learn = make(cbs=QuantAwareCallback())
    refused(learn, 'two `QuantAwareCallback`s', cbs=QuantAwareCallback())
    refused(learn, 'two `QuantAwareCallback`s', cbs=QuantAwareCallback('w4a4'))
    learn.fit(1, 1e-3)
    assert fake_quant_of(learn.model).ready

def test_two_specs(make):
    learn = make()
    learn.fit(1, 1e-3, cbs=QuantAwareCallback('w4a4'))
    refused(learn, 'prepared with another spec already.*remove_quant', cbs=QuantAwareCallback('w2a2'))
    refused(learn, 'prepared with another spec already.*remove_quant', cbs=QuantAwareCallback('w4a4', exclude='0'))
    with pytest.raises(ValueError, match='prepared already.*remove_quant'): learn.quantize('w2a2')
    learn.remove_quant().fit(1, 1e-3, cbs=QuantAwareCallback('w2a2'))
    assert fake_quant_of(learn.model).spec==find_spec('w2a2')

def test_spec_that_matches_nothing(make):
    learn = make()
    refused(learn, "'head' matches no module", cbs=QuantAwareCallback(exclude='head'))
    refused(learn, "'2.9' matches no module", cbs=QuantAwareCallback(Spec(overrides=(('2.9', low_bits(4, 4)),))))
    refused(learn, "'2.1' has a spec of its own, but matches no layer", cbs=QuantAwareCallback(Spec(overrides=(('2.1', low_bits(4, 4)),))))
    refused(learn, 'nothing to quantize', cbs=QuantAwareCallback(exclude='*'))
    learn.fit(1, 1e-3)
    assert fake_quant_of(learn.model) is None

def test_quantized_learner(make):
    refused(make().quantize(), 'runs a file, whose weights are out of reach. Call `fit` on the float Learner', cbs=QuantAwareCallback())

@pytest.mark.parametrize('spec,start', [('int8',.05),('int8',.9),('w4a4',.05)])
def test_nan(make, spec, start):
    "Names the first site that it reached, the batch and the epoch, and has moved no range"
    learn = make()
    class Nan(nn.Module):
        def forward(self, x): return x*torch.nan if learn.training and learn.train_iter==27 else x
    learn.model[1].append(Nan())
    with pytest.raises(ValueError, match="The output of '2.0.0' ranges from .* to nan in batch 7 of epoch 1"):
        learn.fit(2, 1e-3, cbs=QuantAwareCallback(spec, start=start, freeze_bn=.9))
    assert fake_quant_of(learn.model).range[:,:2].isfinite().all() and modes()==[]

learned_8 = Spec(weight=TensorSpec(Grid(8), granularity=PerChannel(), learned=True), act=TensorSpec(Grid(8, signed=False), learned=True))
one_scale_8 = Spec(weight=TensorSpec(Grid(8), learned=True))

@pytest.mark.parametrize('spec', ['int8','int8_per_tensor','int8_symmetric','w4a8','w3a8',learned_8,one_scale_8], ids=str)
def test_what_trains_fits_every_processor(make, spec):
    "Neighbouring weights add up to no more than 16 bits hold, in training as in the file, whether scales follow or learn"
    learn = make()
    learn.fit(2, 1e-3, cbs=QuantAwareCallback(spec))
    r = fake_quant_of(learn.model)
    for k in r.paired:
        w,s = learn.model.get_submodule(k).weight.detach(),r.weight_scale[r.slices[k]].detach()
        r.refresh()
        r.only = {k}
        assert pairs_fit((r.round_weight(k, w)/s.view(-1,*[1]*(w.ndim-1))).round())
    r.only = None
    qlearn = learn.quantize()
    assert qlearn.model.report.portable and not misfits(onnx.load_from_string(qlearn.model.data))
    assert qlearn.model.report.agrees_rounded>.98 and qlearn.validate()[1]>.9

def test_full_range_is_for_who_asks(make):
    "Training with `int8_full` uses weights that a portable file may not have"
    learn = make()
    learn.fit(2, 1e-3, cbs=QuantAwareCallback('int8_full'))
    report = learn.quantize().model.report
    assert not fake_quant_of(learn.model).paired and report.portable is False and 'whole range' in str(report)

# Published formulas, by value inside a fit

class Lsq(torch.autograd.Function):
    "Rounding with the gradient of its step as Esser et al. 2020 print it: equation 3, times what section 2.2 says for `n` numbers; what rounds to the last integer is on the grid"
    @staticmethod
    def forward(ctx, v, s, lo, hi, n, most):
        ctx.save_for_backward(v, s)
        ctx.rest = lo,hi,n*most
        return (v/s).clamp(lo, hi).round()*s
    @staticmethod
    def backward(ctx, g):
        v,s = ctx.saved_tensors
        lo,hi,n = ctx.rest
        r = v/s
        q = r.round()
        each = torch.where(q<lo, lo, torch.where(q>hi, hi, q-r))
        return g*(lo<=q)*(q<=hi),(g*each).sum_to_size(s.shape)/n**.5,None,None,None,None

@pytest.mark.parametrize('bits', [3,4])
def test_gradients_of_learned_steps(bits, tmp_path):
    "Of weights with a step for each channel, of inputs of both signs, and of activations that are never negative"
    spec,got = replace(find_spec(f'w{bits}a{bits}'), ends=None, stream=None),[]
    learn = learner(tmp_path, nn.Sequential(nn.Flatten(), nn.Linear(64,16), nn.ReLU(), nn.Linear(16,10)))
    def note(l):
        r = fake_quant_of(l.model)
        if r.ready: got.append((r,state(l.model),r.scale.grad.clone(),r.weight_scale.grad.clone(),l.x.clone(),l.y.clone()))
    learn.fit(1, 1e-3, cbs=[QuantAwareCallback(spec, start=0.), Do(before_step=note, order=-1)])
    r,at,of_acts,of_weights,x,y = got[-1]
    s,sw = (at[f'fake_quant_{k}'].requires_grad_() for k in ('scale','weight_scale'))
    h,most,hi = x.flatten(1),2**(bits-1)-1,2**bits-1
    for k,n in ('1',64),('3',16):
        i = r.layers[k].i
        z = at['fake_quant_zero_point'][i].round()
        h = Lsq.apply(h.relu() if k=='3' else h, s[i], -z, hi-z, n, hi)
        w = Lsq.apply(at[f'{k}.weight'], sw[r.slices[k]][:,None], -most, most, n, most)
        h = nn.functional.linear(h, w, at[f'{k}.bias'])
    nn.functional.cross_entropy(h, y).backward()
    for a,b in (of_acts,s.grad),(of_weights,sw.grad): torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
    assert of_acts.all() and of_weights.count_nonzero()>20

def test_rounding_that_starts_at_the_end(make):
    "With start=1 the whole fit is in float, and what it ends with is rounded"
    learn,seen = make(),[]
    cb = QuantAwareCallback('int8', start=1., freeze_bn=1., freeze=1.)
    learn.fit(2, 1e-3, cbs=[cb, Do(after_pred=lambda l: seen.append(fake_quant_of(l.model).rounds))])
    assert not any(seen) and fake_quant_of(learn.model).ready
    assert learn.quantize(timed=False).model.report.n_int8==4
