"What a fastai user does to a Learner, done to one that learns from a teacher, from peers or from itself"
import copy, numpy as np, pytest, torch, warnings
import torch.nn.functional as F
from fastai.vision.all import (Adam, Callback, CutMix, GradientAccumulation, ImageBlock, MixUp, OptimWrapper, PILImageBW, SaveModelCallback, SchedCos,
    accuracy, aug_transforms, load_learner, partial, ranger, resnet18, set_seed, vision_learner)
from torch import nn
from torch.utils.data import TensorDataset
from fastquant.all import *
from tests.helpers.data import gray, loaders, pictures, shuffled
from tests.helpers.learners import Bf16, Do, Seeded, Stages, classifier, quiet
from tests.helpers.nets import Raise, same, staged, stages, state

train,valid = shuffled(480, 320)

def learner(path, n=4, seed=0, model=None, **kwargs):
    set_seed(seed)
    return classifier(loaders(train, valid), model or staged(n), path, **kwargs)

@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    learn = learner(tmp_path_factory.mktemp('teacher'), 16)
    learn.fit_one_cycle(4, 1e-2)
    assert learn.validate()[1]>.9
    return learn

def hinted(teacher, **kwargs): return DistillCallback(teacher, features=['1', Match('2.0', loss='attention')], **kwargs)

kinds = dict(plain=lambda t: DistillCallback(t), features=hinted, past=lambda t: PastSelfCallback(), average=lambda t: AverageSelfCallback(.9, features='1'),
    depth=lambda t: SelfDistillCallback('[01]'), hint=lambda t: SelfDistillCallback('[01]', hint='2.0'), mutual=lambda t: MutualCallback(copy.deepcopy(t.model)))
every = pytest.mark.parametrize('make_cb', kinds.values(), ids=kinds)

def check_clean(learn, names=('train_eval','recorder','cast_to_tensor')):
    "Nothing of a callback is left: optimizer, callbacks, hooks, state dict"
    assert sorted(id(p) for ps in learn.opt.param_lists for p in ps)==sorted(id(p) for p in learn.model.parameters())
    assert type(learn.opt).__name__ in ('Optimizer','Lookahead','OptimWrapper') and type(learn.opt).__mro__[0].__module__.startswith('fastai')
    assert learn.cbs.attrgot('name')==list(names) and not hasattr(learn, 'loss_column')
    assert torch.nn.modules.module._global_forward_hooks=={} and not any(m._forward_hooks for m in learn.model.modules())

# A fit

@every
def test_every_parameter_moves(teacher, tmp_path, make_cb):
    learn = learner(tmp_path)
    was,theirs,shown = state(learn.model),state(teacher.model),[]
    learn.fit(2, 5e-3, cbs=[make_cb(teacher), Do(order=60, before_fit=lambda l: shown.append(list(l.recorder.metric_names)))])
    assert [k for k,p in learn.model.named_parameters() if torch.equal(p, was[k])]==[]
    assert same(theirs, state(teacher.model))
    name = shown[0][-2]
    assert name.endswith('_loss') and len(learn.recorder.values[1])==4 and np.isfinite(learn.recorder.values[1][-1])
    check_clean(learn)

@every
def test_column_is_the_mean(teacher, tmp_path, make_cb):
    learn,cb = learner(tmp_path),make_cb(teacher)
    learn.fit(2, 1e-3, cbs=cb)
    n = len(learn.dls.train)
    assert learn.recorder.values[1][-1]==pytest.approx(torch.stack(cb.losses[-n:]).mean().item())

@every
def test_losses_shown_are_the_students(teacher, tmp_path, make_cb):
    "`valid_loss` is that of `validate`, and the recorder has the loss of the labels"
    learn,seen = learner(tmp_path),[]
    def note(l): seen.append((l.loss.item(), F.cross_entropy(l.pred, *l.yb).item()))
    learn.fit(1, 1e-3, cbs=[make_cb(teacher),Do(after_batch=note)])
    assert all(a==pytest.approx(b) for a,b in seen)
    final = learn.recorder.values[0]
    assert list(learn.validate()[:2])==pytest.approx(list(final[1:3]))

class Tap(Callback):
    "What the student, heads and bridges were in the first step, and the gradients they got"
    order,run_valid = 60,False
    def after_pred(self):
        if not self.train_iter: self.model_,self.extra,self.x_ = (copy.deepcopy(o) for o in (self.model, self.self_distill.extra, self.x))
    def before_step(self):
        if not self.train_iter: self.grads = [p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in (*self.model.parameters(),*self.self_distill.extra.parameters())]

def test_gradient_of_the_hint(tmp_path):
    "Against finite differences of the squared distance, written out: what a hint adds, and that none of it reaches the deepest features"
    taps = []
    for w in (0.,2.):
        learn,tap = learner(tmp_path),Tap()
        learn.fit(1, 1e-3, cbs=[SelfDistillCallback('[01]', hint='2.0', hint_weight=w, width=8),tap])
        taps.append(tap)
    model,extra,x = taps[0].model_.double(),taps[0].extra.double(),taps[0].x_.double()
    for m in (model,extra): m.train()
    with torch.no_grad(): deep = model[2][0](model[:2](x))
    def hint():
        with torch.no_grad():
            a = model[0](x)
            b = model[1](a)
            narrow = [h[0][2](h[0][1](h[0][0](f))) for h,f in zip(extra, (a,b))]
            return sum((p(F.adaptive_avg_pool2d(f, deep.shape[2:]))-deep).square().sum()/deep.numel() for p,f in zip(extra[2:], narrow)).item()
    ps,diff = [*model.parameters(),*extra.parameters()],[(b-a)/2 for a,b in zip(*(t.grads for t in taps))]
    torch.manual_seed(0)
    for _ in range(4):
        ds = [torch.randn_like(p) for p in ps]
        at = []
        for e in (1e-5,-1e-5):
            for p,d in zip(ps, ds): p.data.add_(e*d)
            at.append(hint())
            for p,d in zip(ps, ds): p.data.sub_(e*d)
        want = (at[0]-at[1])/2e-5
        assert abs(want)>1e-2 and sum((d*g).sum().item() for d,g in zip(ds, diff))==pytest.approx(want, rel=1e-3)
    n = len([*model[:2].parameters()])
    assert all(g.abs().max()>0 for g in diff[:n]) and all(g.abs().max()<1e-6 for g in diff[n:len([*model.parameters()])])

def test_hint_without_weight(tmp_path):
    "is none, bit for bit"
    a,b = learner(tmp_path),learner(tmp_path)
    a.fit(2, 1e-2, cbs=[SelfDistillCallback('[01]'),Seeded()])
    b.fit(2, 1e-2, cbs=[SelfDistillCallback('[01]', hint='2.0', hint_weight=0.),Seeded()])
    assert same(state(a.model), state(b.model))

def test_hints_of_pooled_features_and_of_tokens(tmp_path):
    "Deepest features may have no places, and may be a sequence"
    for model,at,hint in ((staged(4),'[01]','2.2'), (nn.Sequential(nn.Flatten(2), nn.Linear(64,8), nn.Unflatten(1,(1,1)), nn.Flatten(1,2), nn.Linear(8,12), nn.Flatten(), nn.Linear(12,10)),'1','4')):
        learn = learner(tmp_path, model=model)
        learn.fit(1, 1e-2, cbs=SelfDistillCallback(at, hint=hint, hint_weight=SchedCos(1,0)))
        check_clean(learn)

# Everything around a fit

@every
def test_lr_find_leaves_no_trace(teacher, tmp_path, make_cb):
    "Fits with `lr_find` before and between end where those without do, bit for bit"
    a,b = learner(tmp_path),learner(tmp_path)
    cbs = [make_cb(teacher) for _ in 'ab']
    for learn,cb in zip((a,b), cbs):
        for _ in range(2):
            if learn is b:
                was = state(learn.model)
                with learn.added_cbs(cb): lr = learn.lr_find(show_plot=False, num_it=10)
                assert 0<lr.valley<10 and same(state(learn.model), was)
            learn.fit_one_cycle(1, 1e-3, cbs=[cb,Seeded()])
    assert same(state(a.model), state(b.model))
    check_clean(b)

def test_lr_find_leaves_peers(tmp_path):
    peer,learn = learner(tmp_path, seed=1),learner(tmp_path)
    was = state(peer.model)
    with learn.added_cbs(MutualCallback(peer)): learn.lr_find(show_plot=False, num_it=8)
    assert same(was, state(peer.model))

@pytest.mark.parametrize('opt_func', [Adam,ranger,partial(OptimWrapper, opt=torch.optim.AdamW)], ids=['adam','ranger','torch'])
@every
def test_stages(teacher, tmp_path, make_cb, opt_func):
    "Freezing, `fine_tune` and discriminative learning rates are those of a fit without the callback"
    logs = []
    for cbs in ([], [make_cb(teacher)]):
        learn,log = learner(tmp_path, splitter=stages, opt_func=opt_func),Stages()
        learn.fine_tune(1, 1e-2, cbs=[log,*cbs])
        first = log.log
        learn.freeze_to(-2)
        learn.fit_one_cycle(1, slice(1e-4,1e-2), wd=.1, cbs=[log,*cbs])
        logs.append(first+log.log)
    assert logs[0]==logs[1] and len({l for h,_ in logs[0] for l in h})>10
    check_clean(learn)

@pytest.mark.parametrize('opt_func', [Adam,ranger,partial(OptimWrapper, opt=torch.optim.AdamW)], ids=['adam','ranger','torch'])
@pytest.mark.parametrize('kind', ['plain','features','past','average','depth','hint'])
def test_resume(teacher, tmp_path, kind, opt_func):
    "A fit that is resumed in another Learner ends where the uninterrupted one ended, bit for bit; its file fits a plain Learner"
    whole,other = (learner(tmp_path, opt_func=opt_func) for _ in 'ab')
    whole.fit_one_cycle(3, 1e-2, cbs=[kinds[kind](teacher),SaveModelCallback(every_epoch=True, with_opt=True, fname='m'),Seeded()])
    with warnings.catch_warnings(action='error', category=UserWarning): plain = learner(tmp_path, opt_func=opt_func).load('m_1')
    check_clean(plain)
    other.load('m_1')
    other.fit_one_cycle(3, 1e-2, cbs=[kinds[kind](teacher),Seeded()], start_epoch=2)
    assert same(state(whole.model), state(other.model))
    check_clean(other)

def averaging(*cbs):
    def go(learn, **kwargs): learn.fit_one_cycle(3, 5e-3, cbs=[AverageSelfCallback(.9),*cbs,Seeded(),SaveModelCallback(every_epoch=True, with_opt=True, fname='m')], **kwargs)
    return go

def test_average_goes_on(tmp_path):
    "The averaged teacher is in a checkpoint that has an optimizer, and nowhere else: not in the model's part, nor in what is exported; one fit goes on with it"
    whole,other = (classifier(gray_pictures(), staged(32), tmp_path, metrics=None) for _ in 'ab')
    whole.export('bare.pkl')
    seen = []
    go = averaging(Do(after_epoch=lambda l: seen.append(state(l.average_self.guide))))
    go(whole)
    saved = torch.load(tmp_path/'models'/'m_1.pth', weights_only=False)
    assert saved['model'].keys()==whole.model.state_dict().keys() and list(saved['opt']['passing'])==['average_self']
    assert [*map(len, (saved['opt']['state'],saved['opt']['hypers']))]==[len(list(staged(4).parameters())),1]
    other.load('m_1')
    other.export('it.pkl')
    assert (tmp_path/'it.pkl').stat().st_size-(tmp_path/'bare.pkl').stat().st_size<n_bytes(whole.model)/4
    other.load('m_1')
    starts = []
    other.fit(1, 0., cbs=[AverageSelfCallback(.9),Do(before_train=lambda l: starts.append(state(l.average_self.guide)))])
    assert same(starts[0], seen[1]) and not same(starts[0], saved['model'])
    other.fit(1, 0., cbs=[AverageSelfCallback(.9),Do(before_train=lambda l: starts.append(state(l.average_self.guide)))])
    assert not same(starts[1], seen[1])

@pytest.mark.parametrize('spec', ['int8','w4a4'])
def test_average_under_rounding_goes_on(tmp_path, spec):
    go = averaging(QuantAwareCallback(spec))
    whole,other = learner(tmp_path),learner(tmp_path)
    go(whole)
    other.load('m_1')
    go(other, start_epoch=2)
    a,b = ({k:v.nan_to_num(-7) if v.is_floating_point() else v for k,v in state(l.model).items()} for l in (whole,other))
    assert same(a, b)

@every
def test_save_model(teacher, tmp_path, make_cb):
    "The best epoch is that of the student's own metric, or of the teacher's column"
    for monitor in ('valid_loss',f'{make_cb(teacher).name}_loss'):
        learn = learner(tmp_path)
        learn.fit_one_cycle(2, 1e-2, cbs=[make_cb(teacher),SaveModelCallback(monitor=monitor)])
        learn.load('model')
        learn.fit(1, 1e-3)
        check_clean(learn)

@every
@pytest.mark.parametrize('where,error', [('forward',KeyboardInterrupt),('forward',RuntimeError),('before_step',RuntimeError),('after_batch',KeyboardInterrupt)])
def test_interrupted(teacher, tmp_path, make_cb, where, error):
    "After a fit that was stopped nothing of it is left, and the next one runs"
    learn,cbs = learner(tmp_path),[]
    def stop(l):
        if l.train_iter==3: raise error('stop')
    if where=='forward': learn.model[1].append(Raise(error, 4))
    else: cbs = [Do(**{where:stop})]
    with pytest.raises(error): learn.fit(1, 1e-3, cbs=[make_cb(teacher),*cbs])
    check_clean(learn)
    learn.fit(1, 1e-3, cbs=make_cb(teacher))
    check_clean(learn)

def gray_pictures(): return pictures(160, valid=.2, bs=32, get_x=gray, block=ImageBlock(PILImageBW), batch_tfms=aug_transforms(size=8, do_flip=False))

@every
def test_left_attached_and_exported(teacher, tmp_path, make_cb):
    "What is no fit does nothing, before one and after; the exported file has no teacher, and predicts"
    big,learn = learner(tmp_path, 64),classifier(gray_pictures(), staged(4), tmp_path)
    learn.export('bare.pkl')
    learn.add_cb(make_cb(big))
    for _ in range(2):
        was = state(learn.model)
        learn.validate(), learn.predict(gray(3)), learn.get_preds(ds_idx=0), learn.tta(n=2), learn.summary(), learn.show_results(max_n=2)
        learn.lr_find(show_plot=False, num_it=6)
        learn.export('it.pkl')
        assert same(state(learn.model), was)
        learn.fit(1, 1e-3)
    assert (tmp_path/'it.pkl').stat().st_size<(tmp_path/'bare.pkl').stat().st_size+2e4<n_bytes(big.model)/4
    learn.model.load_state_dict(was)
    loaded = quiet(load_learner(tmp_path/'it.pkl'))
    assert torch.equal(loaded.predict(gray(7))[2], learn.predict(gray(7))[2])

# Data that is mixed, precision, gradients

class Spy(nn.Module):
    "A teacher that notes what it was asked, and how"
    def __init__(self, model):
        super().__init__()
        self.model,self.log = model,[]
    def forward(self, x):
        y = self.model(x)
        self.log.append((x.clone(), torch.is_grad_enabled(), self.training or self.model[0][1].training, y.dtype))
        return y

@pytest.mark.parametrize('mix', [None,MixUp,CutMix])
def test_teacher_sees_the_very_batch(teacher, tmp_path, mix):
    "After MixUp and CutMix, without gradients, in evaluation mode; and the mixed labels are the student's loss"
    spy,learn,seen = Spy(copy.deepcopy(teacher.model).train()),learner(tmp_path),[]
    spy.train()
    learn.fit(1, 1e-3, cbs=[DistillCallback(spy),*([mix()] if mix else []),Do(after_loss=lambda l: seen.append(l.x.clone()))])
    log = spy.log[1:] # the first is a look at two items
    assert len(log)==len(seen)==len(learn.dls.train)
    assert all(torch.equal(x, y) and not grad and not training for (x,grad,training,_),y in zip(log, seen))
    assert spy.training and spy.model[0][1].training and (mix is None)==any(torch.equal(seen[0][0], x) for x in train.tensors[0])

@every
def test_mixup_and_gradient_accumulation(teacher, tmp_path, make_cb):
    learn,moves = learner(tmp_path),[]
    was = []
    def note(l): was.append([p.detach().clone() for p in l.model.parameters()])
    learn.fit(1, 1e-3, cbs=[make_cb(teacher),MixUp(),GradientAccumulation(64),Do(after_batch=note)])
    moved = [any(not torch.equal(p, q) for p,q in zip(a, b)) for a,b in zip(was, was[1:])]
    assert moved==[i%2==0 for i in range(len(moved))]
    check_clean(learn)

def test_accumulated_gradients_are_those_of_a_larger_batch(teacher, tmp_path):
    "Without batchnorm two half batches have the gradient of a whole one, the teacher's part and the projection's included"
    flat = lambda: nn.Sequential(nn.Flatten(), nn.Linear(64,12), nn.ReLU(), nn.Linear(12,10))
    grads = []
    for bs,cbs in ((64,[]), (32,[GradientAccumulation(64)])):
        set_seed(0)
        learn = classifier(loaders(TensorDataset(*train[:64]), valid, bs=bs, shuffle=False), flat(), tmp_path, metrics=None)
        def note(l): grads.append([p.grad.clone() for ps in l.opt.param_lists for p in ps])
        learn.dls.train = learn.dls.train.new(shuffle=False)
        learn.fit(1, 1e-3, cbs=[DistillCallback(teacher, features={'2':'2.2'}),*cbs,Do(order=60, before_step=note)])
    assert len(grads)==2 and len(grads[0])==6
    for a,b in zip(*grads): assert torch.allclose(a, b, atol=1e-5)

@every
def test_bf16(teacher, tmp_path, make_cb):
    learn = learner(tmp_path)
    learn.fit(1, 1e-3, cbs=[make_cb(teacher),Bf16()])
    assert all(p.isfinite().all() and p.dtype==torch.float for p in learn.model.parameters())
    check_clean(learn)

def test_teacher_computes_in_the_same_precision(teacher, tmp_path):
    spy = Spy(teacher.model)
    learner(tmp_path).fit(1, 1e-3, cbs=[DistillCallback(spy),Bf16()])
    assert {dtype for *_,dtype in spy.log[1:]}=={torch.bfloat16}

@pytest.mark.parametrize('how', ['to_fp16','to_bf16'])
@pytest.mark.filterwarnings('ignore:User provided device_type')
def test_mixed_precision_callback(teacher, tmp_path, how):
    "Without a GPU `MixedPrecision` computes in 32 bits, but all of its events run"
    learn = getattr(learner(tmp_path), how)()
    learn.fit(1, 1e-3, cbs=hinted(teacher))
    check_clean(learn, ('train_eval','recorder','cast_to_tensor','mixed_precision'))

# Together with rounding and pruning

@every
@pytest.mark.parametrize('spec', ['int8','w4a4'])
def test_with_rounding_and_pruning(teacher, tmp_path, make_cb, spec):
    learn = learner(tmp_path, 8)
    learn.fit_one_cycle(3, 1e-2)
    learn.fit_one_cycle(2, 5e-3, cbs=[make_cb(teacher),PruneScheduleCallback(.5),QuantAwareCallback(spec)])
    assert fake_quant_of(learn.model).ready and sparsity(learn.model)==pytest.approx(.5, abs=1e-3)
    owned = sorted(id(p) for ps in learn.opt.param_lists for p in ps)
    assert owned==sorted(id(p) for p in learn.model.parameters()) and list(getattr(learn.opt, 'guests', {}))==(['steps'] if spec=='w4a4' else [])
    q = learn.quantize(n_batches=1)
    assert abs(q.validate()[1]-learn.validate()[1])<=.02

@every
@pytest.mark.parametrize('end', [.2,.5])
def test_channels_go(teacher, tmp_path, make_cb, end):
    "Channels are removed in the middle of a fit, or with the last batch of an epoch: all is learned on, and the best epoch loads into a fresh Learner"
    learn = learner(tmp_path, 16)
    before,terms,sizes = n_params(learn.model),[],[]
    cbs = [make_cb(teacher),PruneScheduleCallback(.5, structure='channel', scope='local', end=end),SaveModelCallback(every_epoch=True, with_opt=True, fname='cut'),
        Do(after_loss=lambda l: terms.append(l.loss.item()), after_batch=lambda l: sizes.append(n_params(l.model)))]
    learn.fit_one_cycle(2, 5e-3, cbs=cbs)
    assert len(terms)==30 and np.isfinite(terms).all() and sizes[0]==before and sizes[-1]<.6*before and sizes.index(sizes[-1])<=round(30*end)
    check_clean(learn)
    fresh = learner(tmp_path, 16)
    fresh.load('cut_0')
    fresh.fit(1, 1e-3, cbs=make_cb(teacher))
    fresh.load('cut_1')
    assert same(state(fresh.model), state(learn.model))

# Other outputs

def test_int8_file_as_teacher(teacher, tmp_path):
    "An engine can teach: it runs without gradients anyway"
    q = teacher.quantize(n_batches=1)
    learn = learner(tmp_path)
    learn.fit(1, 1e-3, cbs=DistillCallback(q))
    check_clean(learn)

def test_vision_learner(tmp_path):
    "fastai's own learners, tensors and transforms"
    dls = pictures(40, valid=.2, batch_tfms=aug_transforms(do_flip=False))
    student,guide = (quiet(vision_learner(dls, resnet18, pretrained=False, metrics=accuracy, path=tmp_path)) for _ in 'st')
    student.fine_tune(1, cbs=DistillCallback(guide, features=Match('0.[4567]', loss='attention')))
    check_clean(student)

def test_batches_of_another_size(teacher, tmp_path):
    "A last batch of one, and features whose size changes during the fit"
    learn = learner(tmp_path)
    class Shrink(Callback):
        run_valid = False
        def before_batch(self):
            if self.iter%2: self.learn.xb = (F.interpolate(self.x, 6),)
    learn.fit(1, 1e-3, cbs=[hinted(teacher),Shrink()])
    check_clean(learn)

@pytest.mark.parametrize('curve', [4., SchedCos(8, 1), lambda t: 2+6*t])
def test_loss_is_the_published_one_at_every_step(teacher, tmp_path, curve):
    "Hinton et al. 2015, section 2, at the temperature that the curve gives for that part of the fit"
    learn,cb,want = learner(tmp_path),DistillCallback(teacher, temperature=curve),[]
    def note(l):
        t = curve(l.pct_train) if callable(curve) else curve
        with torch.no_grad(): theirs = teacher.model.eval()(l.x)
        p,q = ((v/t).softmax(1) for v in (theirs,l.pred.detach()))
        want.append(t**2*(p*(p.log()-q.log())).sum(1).mean())
    learn.fit(2, 1e-3, cbs=[cb, Do(after_loss=note)])
    torch.testing.assert_close(torch.stack(cb.losses), torch.stack(want).as_subclass(torch.Tensor), rtol=1e-4, atol=1e-6)
