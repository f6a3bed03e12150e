"Data parallel training with a teacher, with peers, or with oneself: two processes with gloo on a CPU, by fastai's own `distrib_ctx`"
import pytest, torch
from fastai.vision.all import Callback, SGD, get_model, set_seed
from torch import nn
from fastquant.all import *
from tests.helpers.data import in_order
from tests.helpers.ddp import joined, two_processes
from tests.helpers.learners import classifier
from tests.helpers.nets import for_ranks, state

n,bs = 160,16 # of each process

def made(seed, width=4, norm=False):
    set_seed(seed)
    return for_ranks(width, norm)

class PlainHeads(SelfDistillCallback):
    "Without batchnorms in the heads"
    def begin(self, *xb):
        found = super().begin(*xb)
        for h in found[:len(self.heads)]: h[0][1] = nn.Identity()
        return found

projected = ['0', Match('1', loss='mse'), Match('1', loss='attention')]
kinds = dict(soft=lambda: DistillCallback(made(1, 16)), features=lambda: DistillCallback(made(1, 16), features=projected), heads=lambda: PlainHeads('[01]', width=8), hint=lambda: PlainHeads('0', width=8, hint='1'),
    mutual=lambda: MutualCallback(made(2, 6), made(3)), past=lambda: PastSelfCallback(), average=lambda: AverageSelfCallback(.8, features='1'))
normed = dict(heads_norm=lambda: SelfDistillCallback('[01]', width=8), mutual_norm=lambda: MutualCallback(made(2, 6, True)), average_norm=lambda: AverageSelfCallback(.8))
cases = {'none':lambda: None, **kinds, **normed}

class Note(Callback):
    "After each step the student, what trains along, and who teaches"
    order,run_valid = 50,False
    def __init__(self, cb): self.cb,self.log = cb,[]
    def after_batch(self):
        guide = getattr(self.cb, 'guide', None)
        parts = dict(student=get_model(self.model), extra=getattr(self.cb, 'extra', None), guide=guide)
        self.log.append({k:state(m) for k,m in parts.items() if m is not None})

def learner(idxs, bs, norm=False):
    return classifier(in_order((idxs,bs), (range(1000,1040),20)), made(0, norm=norm), opt_func=SGD, metrics=None)

def differ(rank, *models):
    "What one starts with is random, and not the same in each process"
    for p in (p for m in models for p in m.parameters()): p.data.add_(.1*rank*torch.randn_like(p))

def fit(learn, cb, rank=0):
    note = Note(cb)
    set_seed(rank)
    differ(rank, learn.model, *getattr(cb, 'peers', ()))
    learn.fit_one_cycle(2, 5e-2, cbs=[note] if cb is None else [cb,note])
    return note.log,[state(m) for m in getattr(cb, 'peers', ())]

def work(rank, folder):
    for k,make in cases.items():
        learn,cb = learner(range(2*n), bs, 'norm' in k),make()
        with learn.distrib_ctx(sync_bn=False, cpu=True): done = fit(learn, cb, rank)
        torch.save(done, f'{folder}/{k}.{rank}.pt')

@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "By case: what both processes noted, and what one process on the joined batches"
    folder = tmp_path_factory.mktemp('ddp')
    two_processes(work, folder)
    one = {k:fit(learner(joined(n, bs), 2*bs), make()) for k,make in cases.items() if k not in normed}
    return {k:(*(torch.load(folder/f'{k}.{r}.pt') for r in (0,1)), one.get(k)) for k in cases}

local = 'running_mean','running_var' # those of its own batches, until rank 0's are broadcast
def distance(a, b): return max((v.float()-b[k].float()).abs().max().item() for k,v in a.items() if not k.endswith(local))

@pytest.mark.parametrize('case', [*kinds,*normed])
def test_same_on_both_ranks(runs, case):
    "Student, projections, heads, peers and averages, after every step, whatever each process started with"
    (a,peers_a),(b,peers_b),_ = runs[case]
    assert len(a)==len(b)==2*n//bs and all(s.keys()==t.keys() for s,t in zip(a, b))
    apart = {k:max(distance(s[k], t[k]) for s,t in zip(a, b) if k in s) for k in a[-1] if a[-1][k]}
    assert all(v==0 for v in apart.values()), apart
    assert all(torch.equal(p[k], q[k]) for p,q in zip(peers_a, peers_b) for k in p)

def test_something_trained_along(runs):
    "Of each callback what it brings, and all of it moved"
    for case,what in (('features','extra'), ('heads','extra'), ('hint','extra'), ('mutual','extra'), ('average','guide')):
        log = runs[case][0][0]
        assert log[0][what] and not any(torch.equal(v, log[-1][what][k]) for k,v in log[0][what].items())

@pytest.mark.parametrize('case', kinds)
def test_equals_one_process(runs, case):
    "On the joined batches all of it comes as close as data parallel training does without a callback"
    (plain,_),_,(plain_one,_) = runs['none']
    (two,_),_,(one,_) = runs[case]
    moved,near = distance(plain_one[0]['student'], plain_one[-1]['student']),distance(plain[-1]['student'], plain_one[-1]['student'])
    far = {k:distance(two[-1][k], one[-1][k]) for k in one[-1] if one[-1][k]}
    assert moved>1e-2 and near<1e-5*moved
    assert all(v<1e-4*moved for v in far.values()), (far,near,moved)
    assert distance(one[-1]['student'], plain_one[-1]['student'])>1e-3 # the callback does something
