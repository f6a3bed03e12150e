"Data parallel training through rounding: two processes with gloo on a CPU, by fastai's own `distrib_ctx`"
import pytest, torch
from fastai.vision.all import Adam, Callback, SGD, set_seed
from fastquant.all import *
from tests.helpers.data import in_order
from tests.helpers.ddp import joined, single, two_processes
from tests.helpers.learners import classifier
from tests.helpers.nets import for_ranks, inner, state

n,bs = 320,16 # of each process

def net(norm): return for_ranks(16, norm)

class Note(Callback):
    "The model's tensors after each step"
    order,run_valid = 50,False
    def before_fit(self): self.log = []
    def after_batch(self): self.log.append(state(inner(self.model)))

def learner(weights, norm, idxs, bs, opt_func=SGD):
    set_seed(0)
    learn = classifier(in_order((idxs,bs), (range(1000,1200),40)), net(norm), opt_func=opt_func)
    learn.model.load_state_dict(weights)
    return learn

def fit(learn, spec):
    note = Note()
    learn.fit_one_cycle(2, 2e-2, cbs=[note,*([QuantAwareCallback(spec)] if spec else [])])
    return note.log

def work(rank, folder, weights, cases):
    "What each of the two processes does"
    for i,(spec,norm,calibrated) in enumerate(cases):
        learn,done = learner(weights[norm], norm, range(2*n), bs),None
        if calibrated:
            with single(): learn.validate(cbs=PTQCalibrate(spec=spec))
        with learn.distrib_ctx(sync_bn=False, cpu=True): log = fit(learn, spec)
        if spec and rank==0:
            with single(): done = learn.validate(),learn.quantize(n_batches=1).validate()
        torch.distributed.barrier()
        torch.save((log,done), f'{folder}/{i}.{rank}.pt')

cases = [(None,False,False),(None,True,False),*[(s,norm,False) for s in ('int8','w4a4') for norm in (False,True)],('int8',False,True),('w4a4',False,True)]

@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "By case: the logs of both processes, that of one process on the joined batches, and what came of it"
    weights,folder = {},tmp_path_factory.mktemp('ddp')
    for norm in (False,True):
        torch.manual_seed(0)
        weights[norm] = net(norm).state_dict()
        learn = learner(weights[norm], norm, range(1000), 32, Adam)
        learn.fit_one_cycle(4, 1e-2)
        weights[norm] = state(learn.model)
    two_processes(work, folder, weights, cases)
    def one(spec, norm, calibrated):
        learn = learner(weights[norm], norm, joined(n, bs), 2*bs)
        if calibrated: learn.validate(cbs=PTQCalibrate(spec=spec))
        return fit(learn, spec)
    return {c:(*(torch.load(folder/f'{i}.{r}.pt', weights_only=False) for r in (0,1)), one(*c)) for i,c in enumerate(cases)}

rounds = pytest.mark.parametrize('case', [c for c in cases if c[0]], ids=lambda c: f"{c[0]}{'-norm' if c[1] else ''}{'-calibrated' if c[2] else ''}")

@rounds
def test_same_on_both_ranks(runs, case):
    "Ranges, grids, step sizes and weights, after every step"
    (a,_),(b,_),_ = runs[case]
    assert len(a)==len(b)==2*n//bs
    local = 'running_mean','running_var' # those of its own batches, until rank 0's are broadcast
    for s,t in zip(a, b):
        assert s.keys()==t.keys() and all(torch.equal(v.float().nan_to_num(-7), t[k].float().nan_to_num(-7)) for k,v in s.items() if not k.endswith(local))
    assert a[-1]['fake_quant_scale'].isfinite().all() and not torch.equal(a[-1]['fake_quant_range'], a[len(a)//2]['fake_quant_range'])

def distance(a, b): return max((a[k]-b[k]).abs().max().item() for k in a if k.endswith(('weight','bias')))

@pytest.mark.parametrize('calibrated', [False,True])
@pytest.mark.parametrize('spec', ['int8','w4a4'])
def test_equals_one_process(runs, spec, calibrated):
    "On the joined batches ranges and steps are those of one process, and weights are as close as data parallel training comes without rounding"
    (plain,_),_,plain_one = runs[None,False,False]
    (two,_),_,one = runs[spec,False,calibrated]
    moved,near,far = distance(plain_one[0], plain_one[-1]),distance(plain[-1], plain_one[-1]),distance(two[-1], one[-1])
    print(f'{spec}: {far:.2g} from one process, {near:.2g} without rounding, of {moved:.2g} that weights moved')
    assert moved>1e-2 and near<1e-5*moved and far<1e-4*moved
    two,one = ([s for s in log if (s['fake_quant_zero_point']>=0).all()] for log in (two,one)) # before rounding starts, scales are a guess that nobody uses
    for k in ('fake_quant_range','fake_quant_scale','fake_quant_weight_scale'):
        a,b = (torch.stack([s[k] for s in log]).nan_to_num(-7) for log in (two,one))
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6), (k, (a-b).abs().max())
        assert not torch.equal(b[-1], b[len(b)//2])

@rounds
def test_quantizes(runs, case):
    "What the fit leaves is an ordinary Learner that rounds, and an engine that predicts the same"
    (_,(rounded,shipped)),_,_ = runs[case]
    assert rounded[1]>.85 and abs(rounded[1]-shipped[1])<=.01
