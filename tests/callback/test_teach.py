"Who may teach whom, what of several outputs, and how it is read; and copies of models that hold more than parameters"
import pytest, threading, torch, warnings
import torch.nn.functional as F
from collections import Counter
from fastai.callback.rnn import rnn_cbs
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat, DiceLoss, FocalLossFlat, L1LossFlat, LabelSmoothingCrossEntropyFlat, MSELossFlat
from fastai.text.all import AWD_LSTM, awd_lstm_clas_config, get_text_classifier
from fastai.vision.all import Callback, Learner, MixUp, OptimWrapper, partial, ranger, set_seed
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm
from fastquant.all import *
from fastquant.core.model import clean_copy
from tests.helpers.data import loaders
from tests.helpers.learners import check_owned, quiet
from tests.helpers.nets import same, state

set_seed(0)
X,W = torch.randn(96, 2, 4, 4),torch.randn(32, 3)
Y = (X.flatten(1)@W).argmax(1)
several = F.one_hot(Y, 3).float()

def body(): return nn.Sequential(nn.Flatten(), nn.Linear(32, 8), nn.BatchNorm1d(8), nn.ReLU())
def net(of=None): return nn.Sequential(of or body(), nn.Linear(8, 3))
def learner(model, loss_func=None, *ys, x=X, **kwargs):
    set_seed(0)
    items = list(zip(x, *(ys or (Y,))))
    dls = loaders(items[:64], items[64:], bs=16)
    dls.n_inp = 1
    return quiet(Learner(dls, model, loss_func=loss_func or CrossEntropyLossFlat(), **kwargs))

def states(*ms): return [state(m) for m in ms]
def all_same(a, b): return all(same(x, y) for x,y in zip(a, b, strict=True))
def owned(learn): return Counter(id(p) for ps in learn.opt.param_lists for p in ps)
def still(model, was): return [k for k,p in model.named_parameters() if p.requires_grad and torch.equal(p, was[k])]

# Models made of each other

class Around(nn.Module):
    def __init__(self, m):
        super().__init__()
        self.m,self.out = m,nn.Linear(3, 3)
    def forward(self, x): return self.out(self.m(x))
class Ensemble(nn.Module):
    "In a plain list, which PyTorch does not see"
    def __init__(self, *ms):
        super().__init__()
        self.ms = list(ms)
    def forward(self, x): return sum(m(x) for m in self.ms)/len(self.ms)

def tied(t):
    s = net()
    s[1].weight = t[1].weight
    return s
def part(t):
    s = net()
    s[0][1].weight = nn.Parameter(t[0][1].weight.data[:8])
    return s
def assigned(t):
    s = net()
    s.load_state_dict(t.state_dict(), assign=True)
    return s
def norm_only(t):
    s = net()
    s[0][2].register_buffer('running_mean', t[0][2].running_mean)
    return s
made_of = dict(slice=lambda t: (nn.Sequential(*t[:2]),t), other_head=lambda t: (net(t[0]),t), tied=lambda t: (tied(t),t), part=lambda t: (part(t),t),
    assigned=lambda t: (assigned(t),t), statistics=lambda t: (norm_only(t),t), inside=lambda t: (Around(t),t), around=lambda t: (t,Around(t)),
    parallel=lambda t: (net(t[0]),nn.DataParallel(t)), listed=lambda t: (net(t[0]),Ensemble(net(),t)))

opts = dict(adam={}, ranger=dict(opt_func=ranger), torch=dict(opt_func=partial(OptimWrapper, opt=torch.optim.AdamW)))

@pytest.mark.parametrize('make', made_of.values(), ids=made_of)
@pytest.mark.parametrize('cb', [DistillCallback,MutualCallback], ids=['teacher','peer'])
def test_shares_with_the_student(make, cb):
    "An error that names what is shared, before anything has changed; with a copy, both are their own"
    student,other = make(net())
    learn = learner(student)
    learn.fit(1, 1e-3)
    was,groups = states(student, other),[[id(p) for p in ps] for ps in learn.opt.param_lists]
    say = r'shares .*(weight|running_mean).* with the student.*copy_model\(model\)'
    with pytest.raises(ValueError, match=say): learn.fit(1, 1e-3, cbs=cb(other))
    assert all_same(was, states(student, other)) and [[id(p) for p in ps] for ps in learn.opt.param_lists]==groups
    twin = copy_model(other)
    before = states(twin)
    learn.fit(1, 1e-2, cbs=cb(twin))
    check_owned(learn)
    assert all_same(before, states(twin))==(cb is DistillCallback) or isinstance(other, Ensemble)

@pytest.mark.parametrize('kwargs', opts.values(), ids=opts)
def test_peers_that_share(kwargs):
    "With each other, or with who teaches in another callback, whichever comes first"
    trunk,other,learn = body(),net(),learner(net(), **kwargs)
    was = states(other)
    def twice(): return DistillCallback(other),MutualCallback(other)
    for cbs,who in (([MutualCallback(net(trunk), net(trunk))], 'A peer'), (twice(), 'The teacher'), (twice()[::-1], 'The teacher')):
        say = f'{who} shares .* with a peer'
        with pytest.raises(ValueError, match=say): learn.fit(1, 1e-2, cbs=list(cbs))
        check_owned(learn)
    assert all_same(was, states(other))

@pytest.mark.parametrize('kwargs', opts.values(), ids=opts)
@pytest.mark.parametrize('cb', [DistillCallback,MutualCallback], ids=['teacher','peer'])
def test_what_is_frozen_may_be_shared(cb, kwargs):
    first = nn.Sequential(nn.Flatten(), nn.Linear(32, 8)).requires_grad_(False)
    student,other = net(first),net(first)
    learn,was = learner(student, **kwargs),states(first, other)
    before = dict(state(student))
    learn.fit(1, 1e-2, cbs=cb(other))
    assert all_same(was[:1], states(first)) and still(student, before)==[] and max(owned(learn).values())==1
    assert all_same(was, states(first, other))==(cb is DistillCallback)

def test_frozen_for_now_may_not_be_shared():
    "A stage that is only frozen can be thawed in the next fit"
    trunk = nn.Sequential(nn.Flatten(), nn.Linear(32, 8))
    learn = learner(net(trunk), splitter=lambda m: [[*m[0].parameters()],[*m[1].parameters()]])
    learn.freeze()
    with pytest.raises(ValueError, match='The teacher shares 0.1.weight, 0.1.bias with the student'): learn.fit(1, cbs=DistillCallback(net(trunk)))

def test_ensemble_in_a_list_stays_what_it_is():
    "Batchnorms that PyTorch does not see do not go on counting"
    a,b = net(),net().train()
    was = states(a, b)
    learner(net()).fit(1, 1e-2, cbs=DistillCallback(Ensemble(a, b)))
    assert all_same(was, states(a, b)) and b[0][2].training

class Keeps(nn.Module):
    "Subtracts a buffer, which `write` may change in training"
    def __init__(self, write=None):
        super().__init__()
        self.write = write
        self.register_buffer('mean', torch.zeros(32))
    def forward(self, x):
        x = x.flatten(1)
        if self.training and self.write: self.write(self, x.mean(0).detach())
        return x-self.mean
def averaged(m, x): m.mean.lerp_(x, .1)
def replaced(m, x): m.mean = .9*m.mean+.1*x
def behind(m, x): m.mean.data += x
def same_value(m, x): m.mean.mul_(1)
def headed(m, *more): return nn.Sequential(m, nn.Linear(32, 3), *more)
def with_mean(m):
    new = Keeps(averaged)
    new.mean = m.mean
    return new

constants = dict(module=lambda k: k, buffer=lambda k: setattr(new:=Keeps(), 'mean', k.mean) or new, listed=lambda k: Ensemble(k))
@pytest.mark.parametrize('theirs', constants.values(), ids=constants)
@pytest.mark.parametrize('cb', [DistillCallback,MutualCallback], ids=['teacher','peer'])
def test_constants_may_be_shared(theirs, cb):
    keeps = Keeps()
    other,learn = headed(theirs(keeps), nn.BatchNorm1d(3)),learner(headed(keeps, nn.BatchNorm1d(3)))
    was = states(other)
    learn.fit(1, 1e-2, cbs=cb(other))
    check_owned(learn)
    assert keeps.mean.abs().sum()==0 and all_same(was, states(other))==(cb is DistillCallback)

class Shut(nn.BatchNorm1d):
    "Whose statistics stay"
    def train(self, mode=True): return super().train(False)
class Odd(Keeps):
    def forward(self, x):
        if self.training and len(x)<3: raise ValueError('too few items')
        return super().forward(x)
def flat(*ms): return nn.Sequential(nn.Flatten(), *ms)
frozen_spectral = parametrizations.spectral_norm(nn.Linear(32, 32)).requires_grad_(False)
instance = nn.Unflatten(1, (2,16)),nn.InstanceNorm1d(2, track_running_stats=True),nn.Flatten()
moving = dict(average=Keeps(averaged), another=Keeps(replaced), behind=Keeps(behind), same_value=Keeps(same_value), fails=Odd(),
    inside=nn.Sequential(Keeps(), Keeps(averaged)), hidden=Ensemble(Keeps(averaged)), instance=flat(*instance), spectral=flat(frozen_spectral))
@pytest.mark.parametrize('keeps', moving.values(), ids=moving)
def test_what_training_writes_may_not_be_shared(keeps):
    learn = learner(headed(keeps))
    was = states(keeps)
    with pytest.raises(ValueError, match=r'The teacher shares 0\..* with the student.*copy_model'): learn.fit(1, 1e-3, cbs=DistillCallback(headed(keeps)))
    assert all_same(was, states(keeps))
    learn.fit(1, 1e-3, cbs=DistillCallback(copy_model(headed(keeps))))

def test_it_is_who_writes_that_counts():
    "A constant of the student's is an average to a peer, who would move it"
    keeps = Keeps()
    with pytest.raises(ValueError, match='The student shares 0.mean with a peer'): learner(headed(keeps)).fit(1, 1e-3, cbs=MutualCallback(headed(with_mean(keeps))))
    learner(headed(keeps)).fit(1, 1e-3, cbs=DistillCallback(headed(with_mean(keeps)))) # a teacher does not train

class Warms(Callback):
    def after_step(self): self.learn.model[0].mean.add_(.1)
def test_what_a_callback_changes_is_said():
    keeps = Keeps()
    learn = learner(headed(keeps))
    with pytest.warns(UserWarning, match='changed 0.mean of the student and the teacher in this fit.*copy_model'): learn.fit(1, 1e-3, cbs=[DistillCallback(headed(keeps)),Warms()])
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        learn.fit(1, 1e-3, cbs=[DistillCallback(copy_model(headed(keeps))),Warms()])
        learn.fit(1, 1e-3, cbs=DistillCallback(headed(keeps)))

def test_statistics_that_stay_may_be_shared():
    norm = nn.Sequential(nn.Flatten(), Shut(32).requires_grad_(False))
    was = states(norm)
    learner(headed(norm)).fit(1, 1e-3, cbs=DistillCallback(headed(norm)))
    assert all_same(was, states(norm))

def test_looking_at_buffers_leaves_no_trace():
    "Neither in random numbers nor in the student"
    def fitted(share):
        set_seed(1)
        student,keeps = headed(Keeps(), nn.Dropout(.5)),Keeps()
        if share: keeps = student[0]
        learner(student).fit(1, 1e-2, cbs=DistillCallback(headed(keeps)))
        return states(student)
    assert all_same(fitted(True), fitted(False))

# How outputs are read

class Seen(Callback):
    order = 70
    def before_fit(self): self.log.append(next(cb.how for cb in self.learn.cbs if hasattr(cb, 'asked')))
    def __init__(self): self.log = []
def read_as(learn, cb):
    seen = Seen()
    learn.fit(1, 1e-3, cbs=[cb,seen])
    check_owned(learn)
    return seen.log[0]

def own_ce(p, y): return F.cross_entropy(p, y)
def own_bce(p, y): return F.binary_cross_entropy_with_logits(p, y)
class Combined:
    def __call__(self, p, y): return FocalLossFlat()(p, y)
    def activation(self, x): return x.softmax(-1)
losses = [(f,several,'soft_labels') for f in (BCEWithLogitsLossFlat(),nn.BCEWithLogitsLoss(),F.multilabel_soft_margin_loss)]
losses += [(f,several,'mse') for f in (MSELossFlat(),L1LossFlat())]
exclusive = nn.CrossEntropyLoss(),LabelSmoothingCrossEntropyFlat(),Combined(),partial(F.cross_entropy, label_smoothing=.1),own_ce
losses += [(f,Y,'soft_targets') for f in exclusive]
callbacks = dict(teacher=lambda: DistillCallback(net()), past=PastSelfCallback, average=AverageSelfCallback,
    depth=lambda: SelfDistillCallback('0.1'), peer=lambda: MutualCallback(net()))

@pytest.mark.parametrize('loss_func,y,want', losses, ids=[getattr(f, '__name__', type(f).__name__) for f,*_ in losses])
def test_loss_implies(loss_func, y, want): assert read_as(learner(net(), loss_func, y), DistillCallback(net()))=={'':want}

@pytest.mark.parametrize('make', callbacks.values(), ids=callbacks)
def test_all_follow_the_loss(make):
    for loss_func,y,want in losses[:1]+losses[3:4]: assert read_as(learner(net(), loss_func, y), make())=={'':want}
    assert read_as(learner(net(), cbs=MixUp()), make())=={'':'soft_targets'}
    learn = learner(net(), own_bce, several)
    was = states(learn.model)
    say = "own_bce, does not show how the teacher is to be read. Pass loss='soft_targets' for classes, 'soft_labels'"
    with pytest.raises(ValueError, match=say): learn.fit(1, cbs=make())
    assert all_same(was, states(learn.model))

def test_classes_of_pixels():
    y = torch.randint(0, 3, (96,4,4))
    for f in (CrossEntropyLossFlat(axis=1),DiceLoss()): assert read_as(learner(nn.Conv2d(2, 3, 1), f, y), DistillCallback(nn.Conv2d(2, 3, 1)))=={'':'soft_targets'}

# Which outputs

class Heads(nn.Module):
    def __init__(self, kind=tuple, n=8, outs=(3,2)):
        super().__init__()
        self.body,self.kind = nn.Sequential(nn.Flatten(), nn.Linear(32, n), nn.ReLU()),kind
        self.a,self.b = (nn.Linear(n, o) for o in outs)
    def forward(self, x):
        a,b = self.a(x:=self.body(x)),self.b(x)
        return dict(a=a, b=b) if self.kind is dict else dict(b=b, a=a) if self.kind is reversed else self.kind((a, b))
def both(p, y, z):
    a,b = (p['a'],p['b']) if isinstance(p, dict) else p
    return F.cross_entropy(a, y)+F.cross_entropy(b, z)
Z = (X[:,0].mean((1,2))>0).long()

@pytest.mark.parametrize('kind,theirs', [(tuple,tuple),(list,tuple),(dict,dict),(dict,reversed)])
def test_all_outputs_are_taught(kind, theirs):
    student,teacher,seen = Heads(kind),Heads(theirs, 16),[]
    learn,was = learner(student, both, Y, Z),state(student)
    def parts(p): return [p['a'],p['b']] if isinstance(p, dict) else p
    class Note(Callback):
        order = DistillCallback.order+1
        def after_loss(self):
            if not self.training: return
            def kl(s, t): return 16*F.kl_div((s/4).log_softmax(1), (t/4).softmax(1), reduction='batchmean')
            with torch.no_grad(): want = sum(map(kl, parts(self.pred), parts(teacher(*self.xb))))
            seen.append(torch.allclose(self.distill.losses[-1], want, atol=1e-5))
    learn.fit(1, 1e-2, cbs=[DistillCallback(teacher, weight=1.),Note()])
    assert len(seen)==4 and all(seen) and still(student, was)==[]

@pytest.mark.parametrize('make', [lambda: PastSelfCallback(), lambda: AverageSelfCallback(), lambda: MutualCallback(Heads(dict, 16))], ids=['past','average','peer'])
def test_all_outputs_of_oneself(make):
    cb = make()
    was = [state(p) for p in getattr(cb, 'peers', ())]
    assert read_as(learner(Heads(dict), both, Y, Z), cb)=={'a':'soft_targets', 'b':'soft_targets'}
    assert all(still(p, w)==[] for p,w in zip(getattr(cb, 'peers', ()), was))

def one_of_each(p, y, z): return F.cross_entropy(p[0], y)+F.mse_loss(p[1][:,0], z.float())
class Aux(nn.Module):
    "Says more in training, like Inception"
    def __init__(self):
        super().__init__()
        self.m,self.aux = body(),nn.ModuleList([nn.Linear(8, 3),nn.Linear(8, 3)])
    def forward(self, x):
        out,aux = (h(x:=self.m(x)) if i==0 else h(x) for i,h in enumerate(self.aux))
        return (out,aux) if self.training else out
def aux_loss(p, y): return F.cross_entropy(p, y) if isinstance(p, torch.Tensor) else F.cross_entropy(p[0], y)+.3*F.cross_entropy(p[1], y)
which = dict(
    two_of_one=(lambda: learner(Heads(), both, Y, Z), net, "The teacher gives one output, and the student '0', '1'. Say which", {0:'auto'}),
    one_of_two=(lambda: learner(net()), Heads, "The teacher gives '0', '1', and the student one output. Say which", {'0':'soft_targets'}),
    names=(lambda: learner(Heads(dict), both, Y, Z), Heads, "The teacher gives '0', '1', and the student 'a', 'b'. Say which", None),
    tasks=(lambda: learner(Heads(), one_of_each, Y, Z), Heads, r"how the teacher is to be read for output '1'.*loss=\{'0':'soft_targets'\}", {'0':'auto', '1':'mse'}),
    sizes=(lambda: learner(Heads(), both, Y, Z), lambda: Heads(outs=(3,4)), "The student's output '1' is 2 an item and that of the teacher 4", {0:'soft_targets'}),
    auxiliary=(lambda: learner(Aux(), aux_loss), net, r"The student has several outputs: '0', '1'. Say which.*loss=\{'0'", {'0':'soft_targets'}))

@pytest.mark.parametrize('make,teacher,say,loss', which.values(), ids=which)
def test_which_outputs(make, teacher, say, loss):
    learn = make()
    with pytest.raises(ValueError, match=f'(?s){say}'): learn.fit(1, 1e-3, cbs=DistillCallback(teacher()))
    if loss: assert read_as(learn, DistillCallback(teacher(), loss)).keys()==set(map(str, loss))

def test_which_is_no_output():
    learn = learner(Heads(dict), both, Y, Z)
    with pytest.raises(ValueError, match="The student has no output 'c', but 'a', 'b'"): learn.fit(1, cbs=DistillCallback(Heads(dict), {'c':'mse'}))
    with pytest.raises(ValueError, match="several outputs: 'a', 'b'. `PastSelf"): learn.fit(1, cbs=SelfDistillCallback('body.1'))
    for loss,say in (({}, 'say of at least one output'), ({0:'soft'}, 'No distillation loss'), ({0:None}, 'loss=None: pass a function')):
        with pytest.raises(ValueError, match=say): DistillCallback(net(), loss)

# Copies

def text_learner(n=12):
    config = {**awd_lstm_clas_config, 'emb_sz':8, 'n_hid':n, 'n_layers':2}
    model = get_text_classifier(AWD_LSTM, 20, 3, seq_len=8, config=config)
    return learner(model, None, Y, x=torch.randint(2, 20, (96,6)), cbs=rnn_cbs(alpha=2., beta=1.))

def test_copies_of_text_models():
    "At any moment; what comes out can be validated and trained, alone and with who teaches"
    learn = text_learner()
    for _ in range(2):
        pruned = learn.prune(.5)
        assert sparsity(pruned.model)==pytest.approx(.5, abs=.01)
        pruned.validate()
        copied = copy_model(learn.model).eval()
        assert torch.equal(copied(X_:=torch.randint(2, 20, (4,6)))[0], learn.model.eval()(X_)[0])
        learn.model.reset()
        learn.fit(1, 1e-2)
    teacher = text_learner(16).model
    for cb in (DistillCallback(teacher),AverageSelfCallback(),MutualCallback(copy_model(teacher))): assert read_as(learn, cb)=={'0':'soft_targets'}

class Cached(nn.Module):
    "Keeps a view of its weight, and what it has computed"
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(3, 3)
        self.turned,self.seen = self.lin.weight.T,{}
    def forward(self, x):
        self.seen['last'] = x@self.turned+self.lin.bias
        return self.seen['last']

norms = dict(old_weight_norm=torch.nn.utils.weight_norm, weight_norm=parametrizations.weight_norm,
    old_spectral_norm=spectral_norm, spectral_norm=parametrizations.spectral_norm)
@pytest.mark.filterwarnings('ignore:.*weight_norm. is deprecated')
@pytest.mark.parametrize('norm', norms.values(), ids=norms)
def test_copies_of_normed_weights(norm):
    "Before and after a step, and the copy trains on its own"
    m,x = nn.Sequential(norm(nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 2)),torch.randn(5, 4)
    for _ in range(2):
        m(x).sum().backward()
        twin = clean_copy(m)
        assert torch.allclose(twin.eval()(x), m.eval()(x))
        m.train(), twin.train()
    was,mine = states(m),state(twin)
    opt = torch.optim.SGD(twin.parameters(), lr=.1)
    for _ in range(2):
        opt.zero_grad()
        twin(x).square().sum().backward()
        opt.step()
    assert all_same(was, states(m)) and still(twin, mine)==[]

def test_copies_of_cached_tensors():
    "A view of a weight follows the copy's weight, in values and gradients"
    m,x = Cached(),torch.randn(5, 3)
    m(x)
    twin = clean_copy(clean_copy(m))
    assert torch.equal(twin.seen['last'], m.seen['last'])
    twin.lin.weight.data.mul_(2)
    assert torch.equal(twin(x), x@twin.lin.weight.T+twin.lin.bias) and not torch.equal(twin(x), m(x))
    twin(x).sum().backward()
    assert twin.lin.weight.grad.any() and m.lin.weight.grad is None

def test_what_cannot_be_copied():
    m = net()
    m[0][1].lock = threading.Lock()
    learn = learner(m)
    for verb in (lambda: learn.prune(.5), lambda: learn.fit(2, cbs=PastSelfCallback())):
        with pytest.raises(ValueError, match=r"cannot be copied, since '0.1.lock' cannot be: cannot pickle .*__getstate__"): verb()
    del m[0][1].lock
    learn.prune(.5)
