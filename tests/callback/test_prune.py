"Sparsity stays through everything that fastai users do around a fit"
import numpy as np, pytest, torch
from functools import partial
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from fastai.vision.all import (Callback, Dice, GradientAccumulation, GradientClip, Learner, MaskBlock, MixUp, SaveModelCallback, accuracy,
    load_learner, resnet18, set_seed, unet_learner, vision_learner)
from fastai.callback.core import CancelFitException
from torch import nn
from fastquant.all import *
from fastquant.prune.structures import cut, find_structure
from tests.helpers.data import first, ink, loaders, picture, pictures, xs
from tests.helpers.ddp import two_processes
from tests.helpers.learners import classifier
from tests.helpers.nets import classify, conv, encoder, inner, opts, same, state

def net(): return nn.Sequential(conv(1,8), conv(8,16,2), *classify(16))
def learner(path='.', **kwargs):
    set_seed(0)
    return classifier(loaders(*first(256, 64)), net(), path, **kwargs)

class Zeros(Callback):
    "After every step, what is pruned is zero, and nothing comes back"
    order = PruneScheduleCallback.order+1
    def before_fit(self): self.gone,self.n = {},0
    def check(self):
        for k,m in masked(inner(self.learn.model)).items():
            pruned = ~m.weight_mask
            assert (m.weight[pruned]==0).all(), k
            assert (pruned|self.gone.get(k, pruned)).equal(pruned), k
            self.gone[k] = pruned
    def after_step(self): self.check()
    def after_batch(self):
        self.check()
        self.n += 1

def is_sparse(learn, amount=.8):
    ms = masked(learn.model)
    assert ms and sum((m.weight==0).sum().item() for m in ms.values())==round(amount*sum(m.weight.numel() for m in ms.values()))
    return True

@pytest.mark.parametrize('opt', opts)
def test_zero_after_every_step(opt):
    learn = learner(opt_func=opts[opt])
    learn.fit(2, 1e-2, wd=.1, cbs=[PruneScheduleCallback(.8, every=2), Zeros()])
    assert is_sparse(learn)
    learn.fit(2, 1e-2, wd=.1, cbs=Zeros())
    learn.fit_one_cycle(2, 1e-2)
    assert is_sparse(learn)

@pytest.mark.parametrize('cbs', [partial(GradientAccumulation, 96), partial(GradientClip, .1), MixUp], ids=['accumulation','clip','mixup'])
def test_with_other_callbacks(cbs):
    learn = learner()
    learn.fit(3, 1e-2, cbs=[PruneScheduleCallback(.8, every=2), cbs(), Zeros()])
    assert is_sparse(learn)
    learn.fit(2, 1e-2, cbs=[cbs(), Zeros()])
    assert is_sparse(learn)

@pytest.mark.parametrize('how', ['to_fp16','to_bf16'])
def test_mixed_precision(how):
    learn = getattr(learner(), how)()
    learn.fit(2, 1e-2, cbs=[PruneScheduleCallback(.8, criterion='taylor', every=2), Zeros()])
    learn.fit(1, 1e-2)
    assert is_sparse(learn)

def test_average_of_weights():
    "An EMA of the model is as sparse as the model"
    class EMA(Callback):
        def before_fit(self): self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(.9))
        def after_step(self): self.ema.update_parameters(self.model)
    learn = learner()
    learn.fit(1, cbs=PruneScheduleCallback(.3))
    learn.fit(2, 1e-2, cbs=[PruneScheduleCallback(.8), ema:=EMA()])
    ema.ema.eval()(xs[:4])
    assert is_sparse(learn)
    for m,e in zip(masked(learn.model).values(), masked(ema.ema.module).values(), strict=True): assert (e.weight[~m.weight_mask]==0).all()

def test_optimizer_keeps_its_parameters():
    learn = learner()
    learn.create_opt()
    params = [id(p) for p in learn.opt.all_params().itemgot(0)]
    learn.fit(2, 1e-2, cbs=PruneScheduleCallback(.8))
    assert params==[id(p) for p in learn.opt.all_params().itemgot(0)]==[id(p) for p in learn.model.parameters()]
    before = [p.clone() for p in learn.model.parameters()]
    learn.fit(1, 1e-2)
    assert not any(a.equal(b) for a,b in zip(before, learn.model.parameters()))

def test_validation_in_the_middle_is_masked():
    class Look(Callback):
        def after_validate(self): seen.append((sparsity(self.model), sum((m.weight==0).sum().item() for m in masked(self.model).values())))
    seen,learn = [],learner()
    learn.fit(4, 1e-2, cbs=[PruneScheduleCallback(.8, 'weight', schedule='linear', end=1.), Look()])
    n = sum(m.weight.numel() for m in masked(learn.model).values())
    assert [round(s, 2) for s,_ in seen]==[.2,.4,.6,.8] and [z for _,z in seen]==[round(s*n) for s,_ in seen]

def test_column_in_the_table():
    learn,rows = learner(),[]
    learn.logger = lambda o: rows.append(list(o))
    learn.fit(3, 1e-2, cbs=PruneScheduleCallback(.8, schedule='linear', end=1.))
    assert learn.recorder.metric_names==['epoch','train_loss','valid_loss','accuracy','sparsity','time']
    assert np.allclose([r[4] for r in rows], [.8/3,1.6/3,.8], atol=1e-3)
    assert len(learn.recorder.final_record)==4 and len(learn.validate())==2

def test_fine_tune_prunes_after_the_head_is_trained():
    learn = vision_learner(pictures(120), resnet18, pretrained=False, metrics=accuracy)
    class Look(Callback):
        def after_fit(self): seen.append(sparsity(self.model))
    seen = []
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(2, cbs=[PruneScheduleCallback(.8, every=3), Look()])
    assert seen[0]==0 and abs(seen[1]-.8)<1e-4 and is_sparse(learn)
    assert '1.8' not in masked(learn.model) and '1.4' in masked(learn.model)
    with learn.no_bar(), learn.no_logging():
        learn.freeze()
        learn.fit(1)
        learn.summary()
        learn.unfreeze()
        learn.fit_one_cycle(1, slice(1e-5,1e-3))
    assert is_sparse(learn)

def test_unet_trains_sparse():
    learn = unet_learner(pictures(48, MaskBlock(['bg','ink']), ink), encoder, pretrained=False, n_out=2, metrics=Dice())
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=PruneScheduleCallback(.7))
        s = learn.prune()
        s.fit(1)
        assert s.predict(picture(0))[0].shape==(32,32) and [type(m) for m in s.model.modules()]==[type(m) for m in learn.model.modules()]
    assert is_sparse(s, .7)

def test_save_model_callback(tmp_path):
    "The best model comes back with the masks that it had"
    learn = learner(tmp_path)
    learn.fit(4, 1e-2, cbs=[PruneScheduleCallback(.8, end=.5), SaveModelCallback(every_epoch=True)])
    sparse = []
    for i in range(4):
        fresh = learner(tmp_path).load(f'model_{i}', with_opt=False)
        sparse.append(sparsity(fresh.model))
        assert is_sparse(fresh, sparse[-1])
    assert sparse==sorted(sparse) and abs(sparse[-1]-.8)<1e-3 and sparse[0]<.75
    learn.fit(2, 1e-2, cbs=SaveModelCallback(fname='best'))
    assert is_sparse(learn)

def test_checkpoint_into_a_fresh_learner(tmp_path):
    "From the middle of a fit, no larger than the dense one plus a bit a weight, and training goes on from there"
    class Middle(Callback):
        order = 60
        def after_epoch(self):
            if self.epoch==1: self.learn.save('middle')
    dense = learner(tmp_path)
    dense.fit(1)
    dense.save('dense')
    learn = learner(tmp_path)
    learn.fit(4, 1e-2, cbs=[PruneScheduleCallback(.8, schedule='linear', end=1.), Middle()])
    n = sum(m.weight.numel() for m in masked(learn.model).values())
    size = lambda f: (tmp_path/'models'/f'{f}.pth').stat().st_size
    assert size('middle')<size('dense')+n/8+1500 # the rest is two more entries of torch's zip file
    fresh = learner(tmp_path).load('middle')
    assert abs(sparsity(fresh.model)-.4)<1e-3
    fresh.fit(4, 1e-2, start_epoch=2, cbs=[PruneScheduleCallback(.8, schedule='linear', end=1.), z:=Zeros()])
    assert is_sparse(fresh) and z.n>=16
    assert fresh.recorder.sparsities[:1] and abs(fresh.recorder.sparsities[0]-.4)<.06

def test_float_checkpoint_into_a_masked_learner(tmp_path):
    dense = learner(tmp_path)
    dense.fit(1)
    dense.save('dense')
    learn = learner(tmp_path)
    learn.fit(1, cbs=PruneScheduleCallback(.8))
    masks = {k:m.weight_mask.clone() for k,m in masked(learn.model).items()}
    learn.load('dense')
    for k,mask in masks.items(): assert learn.model.get_submodule(k).weight.equal(dense.model.get_submodule(k).weight*mask)
    dense.model.load_state_dict({k:v for k,v in learn.model.state_dict().items() if 'mask' not in k})

def test_lr_find(tmp_path):
    "Leaves a masked model as it was, and the callback does nothing in it"
    learn = learner(tmp_path)
    learn.fit(1, cbs=PruneScheduleCallback(.8))
    before = state(learn.model)
    learn.add_cb(PruneScheduleCallback(.95))
    learn.lr_find(num_it=10, show_plot=False)
    assert same(state(learn.model), before)

def test_left_attached(tmp_path):
    "Predicting, validating, exporting and loading with the callback still there"
    model = nn.Sequential(conv(3,8,2), conv(8,16,2), *classify(16))
    learn = Learner(pictures(120), model, metrics=accuracy, path=tmp_path, cbs=PruneScheduleCallback(.8))
    with learn.no_bar(), learn.no_logging():
        learn.fit(2, 1e-2)
        want = learn.get_preds()[0]
        learn.validate()
        learn.summary()
        learn.predict(picture(0))
        learn.tta()
        learn.export('all.pkl')
        assert learn.export_onnx('m.onnx').exists() and learn.quantize(n_batches=2).model.report.float_layers=={}
    loaded = load_learner(tmp_path/'all.pkl')
    with loaded.no_bar(): assert loaded.get_preds(dl=learn.dls.valid)[0].equal(want)
    assert is_sparse(learn) and is_sparse(loaded)

def test_attached_but_never_fitted():
    learn = learner(cbs=[PruneScheduleCallback(.8),RigLCallback(.8)])
    learn.validate()
    learn.get_preds()
    assert masked(learn.model)=={}

class Crash(Callback):
    order = 90
    def __init__(self, error, at): self.error,self.at = error,at
    def after_batch(self):
        if self.training and self.epoch*self.n_iter+self.iter==self.at: raise self.error

@pytest.mark.parametrize('error', [RuntimeError('crash'), KeyboardInterrupt()], ids=['crash','interrupt'])
def test_interrupted_fit(error):
    "What is pruned by then stays so, and the fit can be started again"
    learn = learner()
    with pytest.raises(type(error)): learn.fit(4, 1e-2, cbs=[PruneScheduleCallback(.8, every=2), Crash(error, 9)])
    now = sparsity(learn.model)
    assert 0<now<.8 and is_sparse(learn, now)
    learn.fit(1, 1e-2, cbs=Zeros())
    assert is_sparse(learn, now)
    learn.fit(2, 1e-2, cbs=[PruneScheduleCallback(.8, every=2), Zeros()])
    assert is_sparse(learn)

def test_cancelled_fit():
    learn = learner()
    learn.fit(4, 1e-2, cbs=[PruneScheduleCallback(.8, every=2), Crash(CancelFitException(), 9)])
    assert is_sparse(learn, sparsity(learn.model))

def test_a_resumed_fit_is_as_sparse_as_a_whole_one():
    whole,parts = learner(),learner()
    whole.fit(4, 1e-2, cbs=PruneScheduleCallback(.8, every=3))
    with pytest.raises(KeyboardInterrupt): parts.fit(4, 1e-2, cbs=[PruneScheduleCallback(.8, every=3), Crash(KeyboardInterrupt(), 15)])
    first = parts.recorder.sparsities[:16]
    parts.fit(4, 1e-2, start_epoch=2, cbs=PruneScheduleCallback(.8, every=3))
    assert first+parts.recorder.sparsities==whole.recorder.sparsities

@pytest.mark.parametrize('schedule', schedules)
@pytest.mark.parametrize('every', [1,7,1000])
def test_target_is_met_exactly(schedule, every):
    learn = learner()
    learn.fit(2, 1e-2, cbs=PruneScheduleCallback(.77, schedule=schedule, every=every, end=.9))
    assert is_sparse(learn, .77)
    assert learn.recorder.sparsities[-2]==learn.recorder.sparsities[-1]

def test_twice():
    "A second schedule goes on from where the first has ended; less than there is leaves it as it is"
    learn = learner()
    learn.fit(1, cbs=PruneScheduleCallback(.5))
    learn.fit(1, cbs=[PruneScheduleCallback(.8), Zeros()])
    assert is_sparse(learn)
    learn.fit(1, cbs=PruneScheduleCallback(.3))
    assert is_sparse(learn)

def test_rigl_keeps_its_amount():
    learn = learner()
    learn.fit(3, 1e-2, cbs=RigLCallback(.8, every=2))
    assert len(set(learn.recorder.sparsities))==1
    s = sparsity(learn.model)
    learn.fit(2, 1e-2, wd=.1, cbs=Zeros())
    assert sparsity(learn.model)==s and abs(s-.8)<2e-3
    for m in masked(learn.model).values(): assert (m.weight[~m.weight_mask]==0).all()

def test_rigl_under_mixed_precision_and_accumulation():
    learn = learner().to_fp16()
    learn.fit(3, 1e-2, cbs=[RigLCallback(.8, every=4), GradientAccumulation(64)])
    assert abs(sparsity(learn.model)-.8)<2e-3
    for m in masked(learn.model).values(): assert (m.weight[~m.weight_mask]==0).all()

def test_a_criterion_made_on_the_spot():
    @criteria
    def smallest_first(w): return torch.arange(len(w)).float()
    try:
        learn = learner()
        learn.fit(1, cbs=PruneScheduleCallback(.5, criterion='smallest_first', scope='local'))
        for m in masked(learn.model).values(): assert not m.weight_mask.flatten()[:m.weight.numel()//2].any()
    finally: del criteria['smallest_first']

@pytest.mark.parametrize('structure', ['row','kernel','filter',NM(2,4),NM(1,8)], ids=str)
def test_structures_in_a_fit(structure):
    learn = learner()
    learn.fit(2, 1e-2, cbs=[PruneScheduleCallback(None if isinstance(structure, NM) else .5, structure, scope='local'), Zeros()])
    learn.fit(1, 1e-2)
    for m in masked(learn.model).values():
        groups = cut(m, m.weight!=0, find_structure(structure))
        if isinstance(structure, NM): assert (groups.squeeze(-1).sum(-1)==structure.n).all()
        else: assert (groups.all(-1)|~groups.any(-1)).all() and groups.float().mean()==.5

def in_process(rank, path, cbs):
    found = {}
    for name,cb in cbs.items():
        learn = learner(path)
        torch.manual_seed(rank) # what is random differs from process to process
        with learn.distrib_ctx(sync_bn=False, cpu=True): learn.fit(2, 1e-2, cbs=[cb, Zeros()] if name!='rigl' else cb)
        with learn.distrib_ctx(sync_bn=False, cpu=True): learn.fit(1, 1e-2, cbs=Zeros())
        found[name] = {k:(m.weight_mask,m.weight.detach()) for k,m in masked(inner(learn.model)).items()}
    torch.save(found, f'{path}/{rank}.pt')

def test_two_processes(tmp_path):
    "Data parallel on two gloo processes: the same masks and weights on both, though what is random or measured differs"
    cbs = {k:PruneScheduleCallback(.8, criterion=k, every=3) for k in ('magnitude','random','taylor','wanda')}
    two_processes(in_process, tmp_path, {**cbs, 'rigl':RigLCallback(.8, every=3)})
    first,second = (torch.load(tmp_path/f'{r}.pt') for r in (0,1))
    for name,a in first.items():
        b = second[name]
        assert a.keys()==b.keys()!=set()
        for k in a:
            assert a[k][0].equal(b[k][0]) and torch.allclose(a[k][1], b[k][1], atol=1e-6), name
            assert (a[k][1][~a[k][0]]==0).all()
        assert abs(1-sum(m.sum().item() for m,_ in a.values())/sum(m.numel() for m,_ in a.values())-.8)<2e-3
