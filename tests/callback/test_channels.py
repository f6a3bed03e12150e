"Channels that go in a fit: it trains on, saves and loads, on one process or two, and while the model learns to round"
import numpy as np, pytest, torch
from dataclasses import replace
from functools import partial
from fastai.vision.all import Callback, GradientAccumulation, MixUp, SaveModelCallback, accuracy, get_model, resnet18, set_seed, vision_learner
from fastquant.all import *
from fastquant.core.model import clean_copy
from fastquant.quant.train import steps
from fastquant.prune.select import Selection
from fastquant.prune.shrink import cut_tensor, with_attached
from fastquant.prune.channels.target import plan_for
from tests.helpers.data import first, loaders, pictures, xs
from tests.helpers.ddp import two_processes
from tests.helpers.learners import classifier, every_parameter_moves, quiet, widths
from tests.helpers.nets import opts, three_convs

def learner(path='.', **kwargs):
    set_seed(0)
    return classifier(loaders(*first(256, 64)), three_convs(), path, **kwargs)

# In a fit

opts = {k:opts[k] for k in ('momentum','adam','lookahead','torch')}

class Witness(Callback):
    "What the optimizer knows of a layer's input weights right before and after channels are removed"
    order = PruneScheduleCallback.order-1
    def before_fit(self): self.before,self.after = None,None
    def look(self):
        p = self.model[2][0].weight
        o = self.opt.opt if hasattr(self.opt, 'opt') else self.opt
        return p.detach().clone(),{k:v.clone() for k,v in o.state[p].items() if torch.is_tensor(v) and v.shape==p.shape},L_(self.opt.hypers)
    def after_batch(self):
        if not self.training: return
        if self.model[2][0].weight.shape[1]==32: self.before = self.look()
    def before_batch(self):
        if self.training and self.after is None and self.model[2][0].weight.shape[1]<32: self.after = self.look()
def L_(hypers): return [dict(h) for h in hypers]

@pytest.mark.parametrize('opt', opts)
def test_schedule(opt):
    "Masked along the schedule, removed once, and the optimizer goes on with what it knows of the rest"
    learn = learner(opt_func=opts[opt])
    params = [*learn.model.parameters()]
    learn.fit(3, 1e-2, cbs=[PruneScheduleCallback(.5, structure='channel', scope='local', every=2, end=.6), w:=Witness()])
    assert widths(learn.model)==[8,16,16,10] and masked(learn.model)=={}
    assert all(a is b for a,b in zip(params, learn.model.parameters(), strict=True))
    left = recipe_of(learn.model).left['2.0.weight']
    (p0,s0,h0),(p1,s1,h1) = w.before,w.after
    assert s0.keys()==s1.keys() and s1 and cut_tensor(p0, left).equal(p1)
    assert all(cut_tensor(s0[k], left).equal(v) for k,v in s1.items())
    assert any(v.abs().sum()>0 for v in s1.values()) and [h['lr'] for h in h0]==[h['lr'] for h in h1]
    every_parameter_moves(learn)

@pytest.mark.parametrize('cbs', [partial(GradientAccumulation, 96), MixUp], ids=['accumulation','mixup'])
def test_with_other_callbacks(cbs):
    learn = learner()
    learn.fit(2, 1e-2, cbs=[PruneScheduleCallback(.5, structure='channel', scope='local', every=2), cbs()])
    assert widths(learn.model)==[8,16,16,10]
    every_parameter_moves(learn)

@pytest.mark.parametrize('how', ['to_fp16','to_bf16'])
def test_mixed_precision(how):
    learn = getattr(learner(), how)()
    learn.fit(2, 1e-2, cbs=PruneScheduleCallback(.5, structure='channel', scope='local', criterion='taylor', every=2))
    assert widths(learn.model)==[8,16,16,10]
    learn.fit(1, 1e-2)

def test_target_in_a_fit():
    learn = learner()
    whole = n_macs(learn.model, xs[:1])
    learn.fit(2, 1e-2, cbs=PruneScheduleCallback(target={'macs':.6}, structure=Channel(4), every=2))
    assert abs(n_macs(learn.model, xs[:1])/whole-.6)<.02

def test_nothing_happens_where_there_is_no_fit():
    learn = learner(cbs=PruneScheduleCallback(.5, structure='channel'))
    learn.validate()
    learn.lr_find(show_plot=False, num_it=6)
    assert widths(learn.model)==[16,32,32,10]

def test_pull_and_schedule():
    learn = learner()
    learn.fit(2, 1e-2, cbs=[GroupLassoCallback(), PruneScheduleCallback(.5, structure='channel', scope='local', end=.5, every=2)])
    assert widths(learn.model)==[8,16,16,10]
    every_parameter_moves(learn)

# On two processes

class Masks(Callback):
    "The masks after each step"
    order,run_valid = PruneScheduleCallback.order+1,False
    def before_fit(self): self.log = []
    def after_batch(self): self.log.append({k:m.weight_mask.clone() for k,m in masked(get_model(self.learn.model)).items()})

def in_process(rank, path, cases): torch.save({name:shrunk_in_parallel(rank, path, **kwargs) for name,kwargs in cases.items()}, f'{path}/{rank}.pt')

def shrunk_in_parallel(rank, path, spec=None, **kwargs):
    "Masks, the model after a fit that removes channels, and what a plain fit after that does not move"
    learn,m,at = learner(path),Masks(),lambda: {k:v.clone() for k,v in learn.model.state_dict().items()}
    torch.manual_seed(rank) # what is random differs from process to process
    with learn.distrib_ctx(sync_bn=False, cpu=True): learn.fit(3, 1e-2, cbs=[PruneScheduleCallback(structure='channel', every=2, **kwargs),m,*([QuantAwareCallback(spec)] if spec else [])])
    owned,first = {id(p) for p in learn.opt.all_params().itemgot(0)}=={id(p) for p in learn.model.parameters()},at()
    with learn.distrib_ctx(sync_bn=False, cpu=True): learn.fit(1, 1e-2)
    stuck = [k for k,p in learn.model.named_parameters() if p.equal(first[k])]
    return dict(masks=m.log, first=first, owned=owned, second=at(), stuck=stuck, recipe=recipe_of(learn.model).to_json(), widths=widths(learn.model))

def test_two_processes(tmp_path):
    "Data parallel on two gloo processes: the same masks at every step, and the same smaller weights, which go on to train"
    cases = dict(local=dict(amount=.5, scope='local'), all=dict(amount=.5), random=dict(amount=.5, scope='local', criterion='random'),
        taylor=dict(amount=.5, criterion='taylor', scope='local'), target=dict(target={'macs':.5}), rounded=dict(amount=.5, scope='local', spec='w4a4'))
    two_processes(in_process, str(tmp_path), cases)
    first,second = (torch.load(tmp_path/f'{r}.pt') for r in (0,1))
    for name,a in first.items():
        b = second[name]
        assert len(a['masks'])==len(b['masks'])==12 and any(not m.all() for s in a['masks'] for m in s.values()), name
        for s,t in zip(a['masks'], b['masks']): assert s.keys()==t.keys() and all(m.equal(t[k]) for k,m in s.items()), name
        assert a['recipe']==b['recipe'] and a['widths']==b['widths']!=[16,32,32,10], name
        for when in ('first','second'):
            for k,v in a[when].items():
                w = b[when][k]
                assert v.shape==w.shape and ('running' in k or torch.allclose(v, w, atol=1e-6, equal_nan=True)), (name,when,k)
        assert a['owned'] and b['owned'] and a['stuck']==b['stuck']==[], name
    assert first['local']['widths']==[8,16,16,10]

# Around a fit

@pytest.mark.parametrize('with_opt', [True,False])
def test_save_model_callback(tmp_path, with_opt):
    "The best epoch may be from before channels were removed: its weights are cut as the model is, and its optimizer too"
    learn = learner(tmp_path)
    worst = SaveModelCallback(comp=np.greater, with_opt=with_opt) # the first epoch has the largest loss
    learn.fit(3, 1e-2, cbs=[PruneScheduleCallback(.5, structure='channel', scope='local', every=2),worst])
    saved = torch.load(learn.path/learn.model_dir/'model.pth', weights_only=False)
    w = (saved['model'] if with_opt else saved)['2.0.weight']
    assert widths(learn.model)==[8,16,16,10] and w.shape[:2]==(32,32)
    assert cut_tensor(w, recipe_of(learn.model).left['2.0.weight']).equal(learn.model[2][0].weight)
    every_parameter_moves(learn)

def test_checkpoint(tmp_path):
    learn = learner(tmp_path)
    learn.fit(2, 1e-2, cbs=PruneScheduleCallback(.5, structure='channel', scope='local', every=2))
    learn.save('m', with_opt=True)
    fresh = learner(tmp_path).load('m', with_opt=True)
    assert fresh.validate()==learn.validate() and recipe_of(fresh.model)==recipe_of(learn.model)
    every_parameter_moves(fresh)

def test_fine_tune_prunes_when_it_thaws():
    learn = quiet(vision_learner(pictures(96), resnet18, pretrained=False, metrics=accuracy))
    learn.fine_tune(1, 1e-3, cbs=PruneScheduleCallback(.5, structure='channel', scope='local', every=1))
    assert learn.model[0][4][0].conv1.out_channels==32
    every_parameter_moves(learn)

# Together with rounding

both_specs = pytest.mark.parametrize('spec', ['int8','w4a4'])
def state(model): return {k:v.detach().nan_to_num(-7) for k,v in model.state_dict().items()}
def scores(learn):
    with evaluating(learn.model): return learn.model(xs[:320])
def predicts_alike(a, b):
    with a.no_bar(), b.no_bar(): p,q = a.get_preds()[0],b.get_preds()[0]
    return (p.argmax(1)==q.argmax(1)).float().mean()>=.98 and (p-q).abs().mean()<.01
def steps_state(learn):
    "What the optimizer knows of learned steps of weights"
    o = learn.opt.opt if hasattr(learn.opt, 'opt') else learn.opt
    p = learn.model.fake_quant_weight_scale
    return {k:v.clone() for k,v in o.state.get(p, {}).items() if torch.is_tensor(v) and v.shape==p.shape}

class Removal(Callback):
    "The model and the optimizer in the step in which channels are removed: before that, and right after; and zeros stay zeros until then"
    order,run_valid = PruneScheduleCallback.order-.1,False
    def look(self): return widths(self.model),state(self.model),steps_state(self.learn)
    def before_fit(self): self.before,self.after,self.rounded = None,None,0
    def after_batch(self):
        if masked(self.model): self.before = self.look()
        r = fake_quant_of(self.model)
        for k,m in masked(self.model).items():
            if k not in r.layers or not r.ready: continue
            assert (r.round_weight(k, m.weight)[~m.weight_mask]==0).all(), k
            self.rounded += (~m.weight_mask).sum().item()
    def before_batch(self):
        if self.before and not masked(self.model) and not self.after: self.after = self.look()

@both_specs
@pytest.mark.parametrize('opt,first', [('adam',True),('adam',False),('lookahead',True),('torch',True)])
def test_both_callbacks_in_one_fit(tmp_path, spec, opt, first):
    "Channels go while the model learns to round: what it knows of the rest goes on, step sizes and their optimizer's state included"
    learn = learner(tmp_path, opt_func=opts[opt])
    learn.fit(2, 1e-2)
    params,cbs = [*learn.model.parameters()],[PruneScheduleCallback(.5, structure='channel', scope='local', every=2),QuantAwareCallback(spec, start=.2)]
    learn.fit_one_cycle(4, 1e-2, cbs=[*(cbs if first else cbs[::-1]),w:=Removal()])
    (wide,old,s0),(narrow,new,s1) = w.before,w.after
    assert (wide,narrow,widths(learn.model))==([16,32,32,10],[8,16,16,10],[8,16,16,10]) and masked(learn.model)=={} and w.rounded>0
    assert {id(p) for p in learn.model.parameters()}=={id(p) for p in [*params,*steps(learn.model)]}
    left = with_attached(recipe_of(learn.model), learn.model).left['fake_quant_weight_scale']
    assert new['fake_quant_weight_scale'].equal(cut_tensor(old['fake_quant_weight_scale'], left)) and len(left[0])==50
    assert all(new[k].equal(old[k]) for k in ('fake_quant_scale','fake_quant_zero_point','fake_quant_range','fake_quant_batches'))
    assert s0.keys()==s1.keys() and all(cut_tensor(s0[k], left).equal(v) for k,v in s1.items()) and bool(s1)==(spec=='w4a4')
    assert [id(p) for p in learn.opt.param_lists[0]]==[id(p) for p in steps(learn.model)] or spec=='int8'
    q = learn.quantize()
    assert q.model.report.trained and q.model.report.float_layers=={} and predicts_alike(q, learn)
    learn.save('both', with_opt=True)
    fresh = learner(tmp_path, opt_func=opts[opt]).load('both', with_opt=True)
    assert state(fresh.model).keys()==state(learn.model).keys() and all(v.equal(state(fresh.model)[k]) for k,v in state(learn.model).items())
    assert scores(fresh).equal(scores(learn)) and recipe_of(fresh.model)==recipe_of(learn.model)
    for l in (learn,fresh): every_parameter_moves(l)
    assert scores(fresh).isfinite().all()

whole_range = replace(low_bits(4, 4), ends=int8_full())

@pytest.mark.parametrize('spec,far', [('int8_full',1e-3),(whole_range,1e-3),('int8',.08),('w4a4',.08)], ids=['int8_full','w4a4 with whole ends','int8','w4a4'])
def test_remove_channels_of_a_model_that_rounds(tmp_path, spec, far):
    "In one shot, and those that are masked already: the rounded model does without them what it did with zeros, but for weights that have to fit new neighbours"
    learn = learner(tmp_path)
    learn.fit(2, 1e-2)
    learn.fit_one_cycle(2, 1e-2, cbs=QuantAwareCallback(spec))
    was = state(learn.model)
    s = quiet(learn.prune(.5, structure='channel', scope='local'))
    assert all(v.equal(was[k]) for k,v in state(learn.model).items()) and widths(s.model)==[8,16,16,10] and fake_quant_of(s.model).ready
    t = quiet(learn.prune(structure=Channel(4), target={'macs':.6}))
    assert abs(n_macs(unprepare(clean_copy(t.model)), xs[:1])/n_macs(unprepare(clean_copy(learn.model)), xs[:1])-.6)<.02
    plan = plan_for(o := Selection(.5, 'channel', scope='local'))(learn.model, o, xs[:4])
    set_masks(learn.model, plan.choose({}))
    before,r = scores(learn),fake_quant_of(learn.model)
    out = quiet(learn.prune(structure='channel'))
    assert (scores(out)-before).abs().mean()<far*before.abs().mean() and widths(out.model)==[8,16,16,10]
    assert torch.allclose(scores(s), scores(out))
    assert [x.source for x in fake_quant_of(out.model).all]==[x.source for x in r.all] and fake_quant_of(out.model).spec==r.spec
    every_parameter_moves(out)
    assert predicts_alike(out.quantize(), out)
    assert fake_quant_of(out.remove_quant().model) is None and widths(out.model)==[8,16,16,10]
    every_parameter_moves(out)

@pytest.mark.parametrize('with_opt', [True,False])
def test_best_epoch_of_both(tmp_path, with_opt):
    "A checkpoint from before channels were removed fits afterwards: weights, scales, and what the optimizer knows of both"
    learn = learner(tmp_path)
    learn.fit(1, 1e-2)
    worst = SaveModelCallback(comp=np.greater, with_opt=with_opt) # the first epoch has the largest loss
    learn.fit(3, 1e-3, cbs=[PruneScheduleCallback(.5, structure='channel', scope='local', every=2),QuantAwareCallback('w4a4', start=0),worst])
    saved = torch.load(learn.path/learn.model_dir/'model.pth', weights_only=False)
    saved = saved['model'] if with_opt else saved
    left = with_attached(recipe_of(learn.model), learn.model).left['fake_quant_weight_scale']
    if saved['2.0.weight'].shape[0]==32: assert cut_tensor(saved['fake_quant_weight_scale'], left).equal(learn.model.fake_quant_weight_scale.detach())
    assert len(learn.model.fake_quant_weight_scale)==50
    every_parameter_moves(learn)

def test_rounding_of_a_vision_learner():
    "A body with shared streams, and a head, of which channels go while it trains through rounding"
    learn = quiet(vision_learner(pictures(96), resnet18, pretrained=False, metrics=accuracy))
    learn.fit(1, 1e-3)
    learn.unfreeze()
    learn.fit_one_cycle(2, 1e-3, cbs=[PruneScheduleCallback(target={'macs':.5}, structure='channel', every=2),QuantAwareCallback('int8')])
    r,n = fake_quant_of(learn.model),sum(len(learn.model.get_submodule(k).weight) for k in fake_quant_of(learn.model).layers)
    assert len(r.weight_scale)==n<4800 and r.ready and learn.model[0][4][0].conv1.out_channels<64
    every_parameter_moves(learn)
    assert predicts_alike(learn.quantize(n_batches=2), learn)
