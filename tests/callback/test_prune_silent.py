"Pruning in a fit leaves alone what it cannot do, says what was not reached, counts steps, and leaves nothing behind"
import math, pickle, pytest, torch, warnings
from fastai.callback.core import Callback, CancelBackwardException, CancelBatchException, CancelFitException
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.optimizer import OptimWrapper
from fastai.learner import Learner
from fastai.torch_core import noop, set_seed
from fastcore.all import L
from functools import partial
from torch import nn, Tensor
from fastquant.all import *
from fastquant.core.optim import remembered
from fastquant.prune.channels.check import channel_groups
from fastquant.prune.mask import mask_of
from tests.helpers.data import loaders
from tests.helpers.learners import classifier

def mlp(*mid, n_in=16):
    ns = [n_in,*mid]
    layers = [l for a,b in zip(ns, ns[1:]) for l in (nn.Linear(a, b),nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(ns[-1], 3))

def convs(norm=nn.BatchNorm2d):
    return nn.Sequential(nn.Conv2d(2, 16, 3), norm(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3))

def learner(model, n=48, bs=8, path='.', **kwargs):
    set_seed(0)
    shape = (2,8,8) if isinstance(model[0], nn.Conv2d) else (16,)
    items = [(torch.randn(shape),torch.tensor(i%3)) for i in range(n)]
    return classifier(loaders(items, items[:8], bs=bs), model, path, metrics=None, **kwargs)

def said(f):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        f()
    return [str(w.message) for w in caught if 'fastquant' in w.filename]

# What cannot be followed, or has not run

class Graph(nn.Module):
    "For nodes, and a matrix that says which of them are joined"
    def __init__(self):
        super().__init__()
        self.a,self.b,self.c = nn.Linear(4, 16),nn.Linear(16, 16),nn.Linear(16, 3)
    def forward(self, x, adj): return self.c((adj@self.b((adj@self.a(x)).relu())).relu())

def graphs():
    data = DataLoader([(torch.randn(10, 4),torch.rand(10, 10),torch.arange(10)%3)]*4, bs=None, n_inp=2)
    return classifier(DataLoaders(data, data), Graph(), metrics=None)

@pytest.mark.parametrize('cb', [partial(PruneScheduleCallback, .5), partial(PruneScheduleCallback, .5, criterion='wanda'), partial(RigLCallback, .5)])
def test_weights_of_a_model_whose_batch_cannot_be_divided(cb):
    learn = graphs()
    learn.fit(2, 1e-3, cbs=cb())
    assert list(masked(learn.model))==['a','b'] and abs(sparsity(learn.model)-.5)<.01

@pytest.mark.parametrize('how', [dict(), dict(criterion='wanda'), dict(criterion='taylor'), dict(structure='row'), dict(scope='local')], ids=str)
def test_the_verb_takes_it_too(how):
    new = graphs().prune(.5, **how)
    assert list(masked(new.model))==['a','b'] and abs(sparsity(new.model)-.5)<.05
    new.fit(1, 1e-3)
    assert abs(sparsity(new.model)-.5)<.05

def test_other_verbs_of_pruning_take_it_too(tmp_path):
    learn = graphs()
    found = learn.prune_sensitivity(amounts=[.5], show_plot=False)
    assert list(found.table.index)==['a','b']
    ticket = learn.lottery_ticket(.5, 1, rounds=1)
    assert abs(sparsity(ticket.model)-.5)<.01
    ticket.path = tmp_path
    ticket.save_sparse('g.safetensors')
    learn.path = tmp_path
    assert abs(sparsity(learn.load_sparse('g.safetensors').model)-.5)<.01
    ticket.save('g')
    assert abs(sparsity(learn.load('g').model)-.5)<.01

@pytest.mark.parametrize('how', [dict(amount=.5, structure='channel'), dict(target={'macs':.5})], ids=str)
def test_the_verb_says_likewise_of_channels(how):
    with pytest.raises(ValueError, match="Graph runs on 10 items and not on the first 9.*a dimension for the batch first"): graphs().prune(**how)

@pytest.mark.parametrize('cb', [partial(PruneScheduleCallback, .5, structure='channel'), GroupLassoCallback])
def test_channels_of_a_model_whose_batch_cannot_be_divided(cb):
    with pytest.raises(ValueError, match="Graph runs on 10 items and not on the first 9.*a dimension for the batch first"): graphs().fit(1, 1e-3, cbs=cb())

class Spare(nn.Sequential):
    def __init__(self, *layers):
        super().__init__(*layers)
        self.spare = nn.Conv2d(16, 16, 3)
    def forward(self, x):
        for m in list(self)[:-1]: x = m(x)
        return x

def computed(f):
    m = convs()
    m[3] = f(m[3])
    return m

class Half(nn.Module):
    def forward(self, w): return w/2
def halved(m): return nn.utils.parametrize.register_parametrization(m, 'weight', Half()) or m

class Const(nn.Conv2d):
    "Its weight is made of another tensor each time it is asked for"
    def __init__(self, *args):
        super().__init__(*args)
        self.raw = self._parameters.pop('weight')
    @property
    def weight(self): return self.raw*1
def const(m): return Const(16, 16, 3)

odd = dict(weight_norm=(computed(nn.utils.parametrizations.weight_norm), 'is computed'), spectral_norm=(computed(nn.utils.parametrizations.spectral_norm), 'is computed'),
    old_norm=(computed(nn.utils.spectral_norm), 'is computed'), halved=(computed(halved), 'is computed'), const=(computed(const), 'is computed'),
    instance_norm=(convs(nn.InstanceNorm2d), "it goes through '1'"), bare_norm=(convs(lambda n: nn.BatchNorm2d(n, affine=False, track_running_stats=False)), "it goes through '1'"),
    never_ran=(Spare(*convs()), 'it never ran'))

@pytest.mark.parametrize('name', odd)
def test_one_odd_layer(name):
    "It is named, and the others lose channels"
    model,why = odd[name]
    groups,left = channel_groups(model, torch.randn(4, 2, 8, 8))
    assert groups and any(why in w for w in left.values())
    l = learner(model)
    l.fit(2, 1e-2, cbs=PruneScheduleCallback(.5, structure='channel', scope='local'))
    assert {g.name for g in groups}<=set(l.model.state_dict() and {k for k,r in l.channel_report(show_plot=False).iterrows() if r.after==8})

def test_dead_layer_is_not_counted():
    "Weights that nobody uses are no place to be sparse in"
    l,cb = learner(Spare(*convs())),PruneScheduleCallback(.5)
    l.model.spare.weight.data.mul_(1e-3)
    l.fit(2, 1e-3, cbs=cb)
    assert cb.left_alone['spare']=='it never ran' and 'spare' not in masked(l.model)
    small = l.prune(.7)
    assert small.not_pruned['spare']=='it never ran' and abs(sparsity(small.model)-.7)<1e-3

class Switched(nn.Module):
    "A branch that starts at zero, and whose channels depend on each other"
    def __init__(self, n=16):
        super().__init__()
        self.a,self.b,self.scale = nn.Linear(16, n),nn.Linear(n, 16),nn.Parameter(torch.zeros(16))
    def forward(self, x):
        h = self.a(x).relu()
        return x+self.scale*self.b(h/(h.sum(-1, keepdim=True)+.1)*h.std(-1, keepdim=True))

def test_switched_off():
    "What hides behind a zero is found at the start, and the others lose channels"
    l = learner(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), Switched(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)))
    cb = PruneScheduleCallback(.5, structure='channel', scope='local')
    l.fit(3, 1e-1, cbs=cb)
    assert (l.model[2].a.out_features,l.model[3].out_features)==(16,8) and 'not the same' in cb.left_alone['2.a']

def test_group_that_fails_at_the_end(monkeypatch):
    "Its channels stay, at zero, and are named; the others go"
    l,cb = learner(mlp(16, 16)),PruneScheduleCallback(.5, structure='channel', scope='local')
    class Late(Callback):
        def before_batch(self):
            if self.epoch==1: self.learn.model[3].forward = lambda x: x.relu()+.1*x.std(-1, keepdim=True)
    l.model[3].forward = lambda x: x.relu()
    texts = said(lambda: l.fit(3, 1e-2, cbs=[cb,Late()]))
    assert [l.model[i].out_features for i in (0,2)]==[8,16] and (l.model[2].weight==0).all(1).sum()==8
    assert "Left alone: '2': removing channels is not the same" in texts[0] and len(texts)==1

def test_layer_without_gradient():
    "`taylor` leaves alone what no gradient reaches, and says so when it is over"
    class Aside(nn.Sequential):
        def forward(self, x): return self[4]((self[2](x)+self[0](x).detach()).relu())
    m = Aside(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    l,cb = learner(m),PruneScheduleCallback(.5, criterion='taylor', start=.3)
    texts = said(lambda: l.fit(2, 1e-2, cbs=cb))
    assert "'0': the criterion 'taylor' needs the loss's gradient, and it has none" in texts[0]
    assert (m[2].weight==0).float().mean()==.5 and (m[0].weight!=0).all()
    shot = learner(Aside(*mlp(16, 16)))
    with pytest.warns(UserWarning, match="Left alone: '0': the criterion 'taylor'"): assert '0' in shot.prune(.5, criterion='taylor').not_pruned

class CancelFirst(Callback):
    "Cancels what `event` begins, in the first batch"
    order = 90
    def __init__(self, event, error): setattr(self, event, lambda: self.cancel(error))
    def cancel(self, error):
        if self.training and self.train_iter==0: raise error()

@pytest.mark.parametrize('event,error', [('before_backward',CancelBackwardException), ('after_pred',CancelBatchException), ('after_loss',CancelBatchException)])
@pytest.mark.parametrize('criterion', ['movement','taylor'])
def test_waits_for_a_gradient(criterion, event, error):
    learn = learner(mlp(32, 32))
    cb = PruneScheduleCallback(.5, criterion=criterion, schedule='one_shot')
    assert not said(lambda: learn.fit(2, 1e-3, cbs=[cb, CancelFirst(event, error)]))
    assert abs(sparsity(learn.model)-.5)<.01

def test_criterion_is_tried_at_the_start():
    "What would be an error later is one in the first batch, and nothing is masked"
    l = learner(mlp(128, 128))
    for bad,say in (('fpgm',"compares each of"), ('bn_scale',"needs the scale of a batchnorm"), (lambda w: w,'one score')):
        with pytest.raises(ValueError, match=say): l.fit(1, cbs=PruneScheduleCallback(.5, criterion=bad, start=.9, end=1.))
        assert masked(l.model)=={}

def test_target_is_tried_at_the_start():
    "Not when pruning starts, and nothing is masked"
    l = learner(convs())
    for target,say in (({'macs':.05},'would be left'), ({'macs':.85},'multiples of 8')):
        with pytest.raises(ValueError, match=say): l.fit(2, cbs=PruneScheduleCallback(target=target, structure='channel', start=.6))
        assert masked(l.model)=={}
    l.fit(2, 1e-2, cbs=PruneScheduleCallback(target={'params':.6}, structure=Channel(1), start=.6))
    assert abs(sum(p.numel() for p in l.model.parameters())/sum(p.numel() for p in convs().parameters())-.6)<.02

def test_layer_that_would_be_gone():
    "It keeps a weight, the amount is met, and that is said once"
    l = learner(mlp(8, 64, 64))
    l.model[0].weight.data.mul_(1e-3)
    texts = said(lambda: l.fit(3, 1e-4, cbs=PruneScheduleCallback(.9)))
    assert len(texts)==1 and texts[0].startswith("Of '0' all would have gone")
    assert (l.model[0].weight!=0).sum()==1 and abs(sparsity(l.model)-.9)<1e-3
    with pytest.raises(ValueError, match="Nothing would be left of '0'"): learner(l.model).prune(.97)

# What was not reached

def best_is_early(l): return [PruneScheduleCallback(.9),SaveModelCallback(comp=lambda a,b: l.epoch<=1)]
def stops_early(l): return [PruneScheduleCallback(.9),EarlyStoppingCallback(comp=lambda a,b: False, patience=1)]
def two_bodies(m): return [L(m[:2].parameters()),L(m[2:].parameters())]

def test_best_epoch_was_less_sparse(tmp_path):
    l = learner(mlp(32, 32), path=tmp_path)
    text, = said(lambda: l.fit(6, 1e-2, cbs=best_is_early(l)))
    assert text.startswith('Pruning went to 0.9 of the weights, for amount=0.9, but the model has 0.7')
    assert abs(sparsity(l.prune(.9).model)-.9)<1e-3 # what it says to do

def test_stopped_early():
    l = learner(mlp(32, 32))
    text, = said(lambda: l.fit(6, 1e-2, cbs=stops_early(l)))
    assert 'the fit ended before it got there' in text and abs(sparsity(l.prune(.9).model)-.9)<1e-3
    l = learner(mlp(32, 32))
    text, = said(lambda: l.fit(6, 1e-2, cbs=[PruneScheduleCallback(.5, structure='channel'),*stops_early(l)[1:]]))
    small = l.prune(.5, structure='channel', scope='local').model
    assert 'the fit ended before it got there' in text and [small[i].out_features for i in (0,2)]==[16,16]

@pytest.mark.parametrize('cb', [PruneScheduleCallback,RigLCallback])
def test_frozen(cb):
    l = learner(mlp(32, 32), splitter=two_bodies)
    l.create_opt()
    l.freeze()
    text, = said(lambda: l.fit(2, cbs=cb(.9)))
    assert text.startswith("Nothing was done about amount=0.9: what is frozen could not make up for it ('0')") and masked(l.model)=={}
    assert said(lambda: l.fit(2, cbs=cb(.9, exclude='0')))==[]
    l.unfreeze()
    assert said(lambda: l.fit(2, cbs=PruneScheduleCallback(.9, scope='local')))==[] and abs(sparsity(l.model)-.9)<1e-2

@pytest.mark.parametrize('cb', [PruneScheduleCallback,RigLCallback])
def test_frozen_by_hand(cb):
    "The optimizer does not know of it, and `learn.unfreeze()` would not thaw it"
    l = learner(mlp(32, 32))
    l.model[0].requires_grad_(False)
    text, = said(lambda: l.fit(2, cbs=cb(.9)))
    assert "set `requires_grad_()` of '0', and call `learn.create_opt()` and `learn.unfreeze()`, before" in text
    l.model[0].requires_grad_()
    l.create_opt()
    l.unfreeze()
    assert said(lambda: l.fit(2, cbs=cb(.9)))==[] and sparsity(l.model)>.85

@pytest.mark.parametrize('kwargs', [dict(every=10**6), dict(every=10**6, end=1.), dict(every=7, start=.5, end=.5), dict(end=.1)])
@pytest.mark.parametrize('start_epoch', [0,3])
def test_reached(kwargs, start_epoch):
    "However few changes there are, and wherever the fit starts"
    l = learner(mlp(32, 32))
    with l.no_mbar(): assert said(lambda: l.fit(4, cbs=PruneScheduleCallback(.9, **kwargs), start_epoch=start_epoch))==[]
    assert abs(sparsity(l.model)-.9)<1e-3

def test_nothing_trained():
    l = learner(mlp(32))
    assert said(lambda: l.fit(2, cbs=PruneScheduleCallback(.9), start_epoch=2))==['No batch was trained, so nothing was done about amount=0.9.']

def test_validation_in_a_fit():
    "It changes nothing about pruning, and is no fit"
    class Look(Callback):
        def after_train(self): self.learn.validate()
    l,plain = learner(mlp(32, 32)),learner(mlp(32, 32))
    plain.model.load_state_dict(l.model.state_dict())
    for o,cbs in ((plain,[]),(l,[Look()])): assert said(lambda: o.fit(3, 1e-2, cbs=[PruneScheduleCallback(.9, 'weight', 'movement'),*cbs]))==[]
    assert abs(sparsity(l.model)-.9)<1e-3

def test_rigl_on_other_masks():
    l = learner(mlp(32, 32)).prune(.5)
    text, = said(lambda: l.fit(2, cbs=RigLCallback(.9)))
    assert text.startswith('amount=0.9 was to be zero all the time, and 0.5 of the weights are') and abs(sparsity(l.model)-.5)<1e-2
    remove_masks(l.model)
    assert said(lambda: l.fit(2, cbs=RigLCallback(.9)))==[] and abs(sparsity(l.model)-.9)<1e-2

@pytest.mark.parametrize('bad', [lambda l,a: {k:2. for k in l}, lambda l,a: {}, lambda l,a: dict.fromkeys(l, math.nan), lambda l,a: .5])
def test_densities(bad):
    l = learner(mlp(32, 32))
    with pytest.raises(ValueError, match="The amount for '0' is"): l.fit(1, cbs=RigLCallback(.5, densities=bad))
    assert masked(l.model)=={}

def test_schedule_is_clamped():
    "Between the positions that are tried when it is made"
    l = learner(mlp(32, 32), n=160)
    l.fit(1, 1e-3, cbs=PruneScheduleCallback(.5, schedule=lambda p: p if p*64%1==0 else 1.7, start=.1, end=.9, every=1))
    assert abs(sparsity(l.model)-.5)<1e-3

# What is left behind

class Stop(Callback):
    order = 80
    def __init__(self, error): self.error = error
    def after_batch(self):
        if self.training and self.train_iter==9: raise self.error

@pytest.mark.parametrize('error', [None,CancelFitException,KeyboardInterrupt,OSError('disk full')], ids=str)
@pytest.mark.parametrize('cb', [lambda: PruneScheduleCallback(.5, criterion='movement'), lambda: PruneScheduleCallback(.5, 'channel', 'taylor'), lambda: PruneScheduleCallback(.5, criterion='wanda'),
    lambda: RigLCallback(.5, every=3)])
def test_statistics_leave(cb, error, tmp_path):
    "However the fit ends, neither the callback nor the model holds anything, or makes an exported file larger"
    l,o = learner(mlp(64, 64), path=tmp_path),cb()
    l.add_cb(o)
    cbs = [] if error is None else [Stop(error)]
    try: l.fit(2, 1e-2, cbs=cbs)
    except (KeyboardInterrupt,OSError): pass
    held = [t for v in vars(o).values() for t in tensors_in(v)]
    assert not held and all(mask_of(m).dense is None for m in masked(l.model).values())
    with_cb = pickle.dumps((l.model,{k:v for k,v in vars(o).items() if k!='learn'}))
    assert len(with_cb)<len(pickle.dumps(l.model))+5000

def tensors_in(o):
    if isinstance(o, Tensor): return [o]
    if isinstance(o, dict): return [t for v in o.values() for t in tensors_in(v)]
    if isinstance(o, (list,tuple,set)): return [t for v in o for t in tensors_in(v)]
    return [p for p in o.parameters()] if isinstance(o, nn.Module) else []

# Steps of the optimizer

class Masks(Callback):
    order,run_valid = 60,False
    def before_fit(self): self.seen = []
    def before_batch(self): self.seen.append(torch.cat([m.weight_mask.flatten().clone() for m in masked(self.learn.model).values()]))
    @property
    def changes(self): return [i for i,(a,b) in enumerate(zip(self.seen, self.seen[1:]), 1) if (a!=b).any()]

@pytest.mark.parametrize('acc', [1,2,3,4])
def test_every_counts_steps(acc):
    "A step may be several batches: changes come after each so many steps, whatever the two numbers have in common"
    for cb in (RigLCallback(.8, every=4, end=1.), PruneScheduleCallback(.8, every=4, end=1., schedule='linear')):
        l,seen = learner(mlp(32, 32), n=192),Masks()
        l.fit(2, 1e-2, cbs=[cb,seen,*([GradientAccumulation(8*acc)] if acc>1 else [])])
        want = [*range(4*acc, 48, 4*acc)] # at the very end next to nothing moves
        assert seen.changes[:len(want)-1]==want[:-1] and set(seen.changes)<=set(want)

def test_without_every():
    "About a hundred changes, with accumulation too"
    n = []
    for acc in (1,4):
        l,seen = learner(mlp(32, 32), n=1600),Masks()
        l.fit(3, 1e-2, cbs=[RigLCallback(.8, end=1.),seen,*([GradientAccumulation(8*acc)] if acc>1 else [])])
        n.append(len(seen.changes))
    assert 80<=n[1]<=n[0]<=100

def test_gradient_of_a_whole_step():
    "What RigL looks at is the gradient of all batches of the step in which it moves"
    l,seen = learner(mlp(32), n=64),[]
    class Note(Callback):
        order = 40
        def after_backward(self): seen.append([(m.weight.grad is not None,mask_of(m).watching) for m in masked(self.learn.model).values()])
    l.fit(1, 1e-2, cbs=[RigLCallback(.5, every=2, end=1.),GradientAccumulation(16),Note()])
    assert [s[0][1] for s in seen]==[False,False,True,True]*2

# Values inside a fit

def test_how_much_moves():
    "The cosine of Evci et al. 2020, of the weights that are left in each layer"
    l,seen = learner(mlp(64, 64), n=160),Masks()
    l.fit(2, 1e-2, cbs=[RigLCallback(.5, uniform_, alpha=.4, every=5, end=.9),seen])
    left = [m.weight_mask.sum().item() for m in masked(l.model).values()]
    sizes = [m.weight_mask.numel() for m in masked(l.model).values()]
    for i in seen.changes:
        for a,b,n in zip(seen.seen[i-1].split(sizes), seen.seen[i].split(sizes), left):
            moved = (a&~b).sum().item()
            most = int(.2*(1+math.cos(math.pi*i/36))*n)
            assert .5*most<=moved<=most
    assert seen.changes[:6]==[5,10,15,20,25,30]
def uniform_(layers, amount): return dict.fromkeys(layers, amount)

def test_second_fit_goes_on():
    "RigL takes the masks that are there, all of them or some"
    l = learner(mlp(32, 32))
    l.fit(1, 1e-2, cbs=RigLCallback(.8, every=10**6))
    before = {k:m.weight_mask.clone() for k,m in masked(l.model).items()}
    seen = Masks()
    l.fit(1, 1e-2, cbs=[RigLCallback(.8, every=10**6),seen])
    assert seen.changes==[] and all(m.weight_mask.equal(before[k]) for k,m in masked(l.model).items())
    remove_masks(l.model, ['0'])
    said(lambda: l.fit(1, 1e-2, cbs=[RigLCallback(.8, every=10**6),seen]))
    assert l.model[2].weight_mask.equal(before['2']) and l.model[0].weight_mask.all()

@pytest.mark.parametrize('criterion', ['gradient','taylor'])
def test_gradients_since_the_last_change(criterion):
    "What is pruned is what the sum of gradients since then says, and nothing from before"
    l,grads,chosen = learner(mlp(32), n=96),[],[]
    class Note(Callback):
        order,run_valid = 49,False
        def before_step(self): grads.append(self.learn.model[0].weight.grad.clone())
        def after_batch(self): chosen.append((self.learn.model[0].weight.detach().clone(),self.learn.model[0].weight_mask.clone()))
    l.fit(1, 1e-1, cbs=[PruneScheduleCallback(.6, criterion=criterion, every=4, schedule='linear', end=1.),Note()])
    for at in (8,12):
        g = sum(grads[at-4:at])
        w,before = chosen[at-1]
        after = chosen[at][1] if at<len(chosen) else l.model[0].weight_mask
        score = g.abs() if criterion=='gradient' else (w*g).pow(2)
        n = (~after).sum().item()-(~before).sum().item()
        low = score.masked_fill(~before, torch.inf).flatten().topk(n, largest=False).indices
        assert n>0 and not after.flatten()[low].any()

# Optimizers and scales

class Blocks(torch.optim.SGD):
    "Remembers a number for each of eight weights, from the start"
    def __init__(self, params, lr=.1, **kwargs):
        super().__init__(params, lr)
        for g in self.param_groups:
            for p in g['params']: self.state[p]['block'] = torch.zeros(-(-p.numel()//8))
    def step(self):
        for g in self.param_groups:
            for p in g['params']: p.data -= self.state[p]['block'].repeat_interleave(8)[:p.numel()].view_as(p)

class LazyBlocks(torch.optim.SGD):
    @torch.no_grad()
    def step(self):
        for g in self.param_groups:
            for p in g['params']:
                if p.grad is None: continue
                block = self.state[p].setdefault('block', torch.zeros(-(-p.numel()//8)))
                block += nn.functional.pad(p.grad.flatten(), (0,-p.numel()%8)).view(-1, 8).mean(1)
                p -= g['lr']*block.repeat_interleave(8)[:p.numel()].view_as(p)

class Around(torch.optim.Optimizer):
    "Has an optimizer inside, as SAM has"
    def __init__(self, params, lr=.1, **kwargs):
        super().__init__(params, dict(lr=lr))
        self.base_optimizer = torch.optim.AdamW(self.param_groups, lr=lr)
    def step(self): self.base_optimizer.step()

@pytest.mark.parametrize('opt', [torch.optim.Adafactor,torch.optim.NAdam,torch.optim.Adagrad,torch.optim.Rprop,torch.optim.ASGD,LazyBlocks,Around])
def test_optimizers(opt):
    "Whatever is remembered, training goes on when channels are gone, and what is remembered fits"
    l = learner(convs(), opt_func=partial(OptimWrapper, opt=opt))
    l.fit(3, 1e-2, cbs=PruneScheduleCallback(.5, structure='channel', end=.5))
    assert l.model[0].out_channels<16 and all(p.isfinite().all() for p in l.model.parameters())
    for p in l.model.parameters(): assert all(box[k].numel()<=p.numel() for box,k in remembered(l.opt, p))

def test_optimizer_that_cannot():
    l = learner(convs(), opt_func=partial(OptimWrapper, opt=Blocks))
    with pytest.raises(ValueError, match="Blocks remembers something of shape .* another optimizer, like Adam"): l.fit(2, cbs=PruneScheduleCallback(.5, structure='channel'))
    assert masked(l.model)=={}
    small = l.prune(.5, structure='channel')
    small.fit(1)
    assert small.model[0].out_channels<16

def test_scales_of_some_layers():
    "Channels go from some layers of a model that rounds: each that is left keeps its scale"
    l = learner(convs())
    l.fit(2, 1e-2, cbs=QuantAwareCallback('w4a4', start=0.))
    r = fake_quant_of(l.model)
    scales = {k:r.weight_scale[rows].detach().clone() for k,rows in r.slices.items()}
    small = l.prune({'3':.5}, structure='channel').model
    r,kept = fake_quant_of(small),recipe_of(small).left
    assert kept['3.weight'][0] and '0.weight' not in kept
    for k,rows in r.slices.items():
        stay = kept.get(f'{k}.weight', {}).get(0, range(len(scales[k])))
        assert r.weight_scale[rows].equal(scales[k][list(stay)] if len(scales[k])>1 else scales[k])

class Reads(nn.Module):
    "Computes a layer by itself, as attention does in evaluation"
    def __init__(self):
        super().__init__()
        self.body,self.read,self.head = convs(),nn.Linear(3, 3),nn.Linear(3, 2)
    def forward(self, x):
        x = self.body(x)
        return self.head(x+nn.functional.linear(x, self.read.weight, self.read.bias))

def test_a_layer_whose_weight_the_model_reads_has_run():
    _,left = channel_groups(Reads(), torch.randn(4, 2, 8, 8))
    assert left['read']=='its weight is used by linear outside of it'

def test_a_part_that_is_torchscript_is_named():
    "Nobody reaches its weights, so it stays as large as it is"
    def net():
        part = torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
        return nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 8), part, nn.Linear(8, 3))
    why,cb = 'it is TorchScript, whose weights are out of reach',PruneScheduleCallback(.5)
    l = learner(net())
    l.fit(1, 1e-3, cbs=cb)
    assert cb.left_alone['6']==why
    assert learner(net()).prune(.5).not_pruned['6']==why
    assert learner(net()).decompose(params=.9).not_factorised['6']==why
    assert learner(net()).prune(.5, structure='channel').not_pruned['6']==why

class Stepped(Learner):
    "Has a step of its own, which may give the model something else than the batch"
    change = staticmethod(noop)
    def _do_one_batch(self):
        xb,self.xb = self.xb,tuple(map(self.change, self.xb))
        try: super()._do_one_batch()
        finally: self.xb = xb

verbs = dict(prune=lambda l: l.prune(.5), schedule=lambda l: l.fit(1, cbs=PruneScheduleCallback(.5)), rigl=lambda l: l.fit(1, cbs=RigLCallback(.5)),
    quantize=lambda l: l.quantize(timed=False), rounding=lambda l: l.fit(1, cbs=QuantAwareCallback()), teacher=lambda l: l.fit(1, cbs=DistillCallback(mlp(32))),
    export=lambda l: l.export_onnx(), decompose=lambda l: l.decompose(params=.9))

@pytest.mark.parametrize('verb', verbs.values(), ids=verbs)
def test_a_step_of_its_own(verb, tmp_path):
    "What it gives to the model nobody else can, so it has to be the batch"
    def made():
        l = learner(mlp(32))
        l.__class__,l.path = Stepped,tmp_path
        return l
    verb(made())
    l = made()
    l.change = lambda x: x*50
    was = l.model.state_dict()
    with pytest.raises(ValueError, match='Stepped calls its model with something else than `xb`.*Let a callback change'): verb(l)
    assert was.keys()==l.model.state_dict().keys() and list(masked(l.model))==[]
