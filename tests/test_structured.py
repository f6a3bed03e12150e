"Channels really removed: what is left does what masks did, trains on, saves, loads, exports and quantizes"
import numpy as np, pandas as pd, pytest, torch, torchvision
from ddp import two_processes
from dataclasses import replace
from functools import partial
from fastai.tabular.all import Categorify, Normalize, TabularDataLoaders, tabular_learner
from fastai.vision.all import (Adam, Callback, CategoryBlock, CrossEntropyLossFlat, DataBlock, DataLoaders, Dice, GradientAccumulation, ImageBlock, Learner,
    Lookahead, MaskBlock, MixUp, OptimWrapper, PILImage, PILMask, RandomSplitter, SaveModelCallback, SGD, accuracy, get_model, load_learner, resnet18, set_seed,
    unet_learner, vision_learner)
from fastai.vision.models.xresnet import xresnet18
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from fastquant.all import *
from fastquant.core.model import clean_copy, tensors
from fastquant.quant.train import steps
from fastquant.prune.select import Selection
from fastquant.prune.shrink import cut_tensor, recipe_from_json, with_attached
from fastquant.prune.channels.check import channel_groups
from fastquant.prune.channels.select import score_group
from fastquant.prune.channels.target import plan_for

digits = load_digits()
xs,ys = torch.tensor(digits.images/16-.5).float()[:320,None],torch.tensor(digits.target)[:320]

def conv(i, o, stride=1): return nn.Sequential(nn.Conv2d(i,o,3,stride,1,bias=False), nn.BatchNorm2d(o), nn.ReLU())
def net(): return nn.Sequential(conv(1,16), conv(16,32,2), conv(32,32), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32,10))
def dls():
    items = list(zip(xs, ys))
    return DataLoaders.from_dsets(items[:256], items[256:], bs=32, device='cpu', num_workers=0)
def learner(path='.', **kwargs):
    set_seed(0)
    learn = Learner(dls(), net(), loss_func=CrossEntropyLossFlat(), metrics=accuracy, path=path, **kwargs)
    learn.remove_cb(learn.progress)
    learn.logger = lambda o: None
    return learn
def quiet(learn):
    if hasattr(learn, 'progress'): learn.remove_cb(learn.progress)
    learn.logger = lambda o: None
    return learn

def picture(i): return PILImage.create(np.stack([(digits.images[i]*15.9).astype('uint8').repeat(4,0).repeat(4,1)]*3, -1))
def label(i): return str(digits.target[i])
def ink(i): return PILMask.create((digits.images[i]>8).astype('uint8').repeat(4,0).repeat(4,1))
def pictures(n=96, y_block=CategoryBlock, get_y=label):
    set_seed(0)
    return DataBlock((ImageBlock,y_block), get_x=picture, get_y=get_y, splitter=RandomSplitter(.25, seed=0)).dataloaders(range(n), bs=16, num_workers=0, device='cpu')

def widths(model): return [m.weight.shape[0] for m in model.modules() if isinstance(m, (nn.Conv2d,nn.Linear))]
def every_parameter_moves(learn):
    "A law of every fit: the optimizer owns all parameters, and each moves in the next step"
    before = {k:p.detach().clone() for k,p in learn.model.named_parameters() if p.requires_grad}
    if learn.opt is not None: assert {id(p) for p in learn.opt.all_params().itemgot(0)}=={id(p) for p in learn.model.parameters()}
    learn.fit(1, 1e-2)
    stuck = [k for k,p in learn.model.named_parameters() if p.requires_grad and before[k].shape==p.shape and before[k].equal(p)]
    assert not stuck, stuck

# Models that people have

def timm(name, **kwargs): return lambda: pytest.importorskip('timm').create_model(name, num_classes=10, **kwargs)
def tv(name, **kwargs): return lambda: torchvision.models.get_model(name, num_classes=10, **kwargs)

models = dict(resnet18=(tv('resnet18'), .45), resnet50=(tv('resnet50'), .45), mobilenet_v2=(tv('mobilenet_v2'), .45), mobilenet_v3=(tv('mobilenet_v3_small'), .6),
    efficientnet=(tv('efficientnet_b0'), .5), densenet=(tv('densenet121'), .45), convnext=(timm('convnext_atto'), .65), vit=(timm('vit_tiny_patch16_224', img_size=64), .65),
    timm_resnet=(timm('resnet18'), .45), timm_mobilenet=(timm('mobilenetv3_small_050'), .7), timm_efficientnet=(timm('efficientnet_lite0'), .5),
    xresnet=(partial(xresnet18, n_out=10), .45), regnet=(tv('regnet_y_400mf'), .75),
    convnext_tv=(partial(torchvision.models.ConvNeXt, [torchvision.models.convnext.CNBlockConfig(32,64,1),torchvision.models.convnext.CNBlockConfig(64,None,2)], num_classes=10), .65),
    timm_densenet=(timm('densenet121', growth_rate=16, block_config=(2,2,2,2)), .5), vit_tv=(partial(torchvision.models.VisionTransformer, 64, 16, 2, 4, 64, 256, num_classes=10), .8), googlenet=(tv('googlenet', init_weights=False), .6), vgg=(tv('vgg11_bn'), .45))

@pytest.mark.parametrize('name', models)
def test_model(name):
    "Half of the channels of each group: masked and removed agree, the classes stay, it trains, and is smaller"
    set_seed(0)
    build,most = models[name]
    model,x = build(),torch.randn(2,3,64,64)
    plan = plan_for(s := Selection(.5, 'channel', scope='local'))(model, s, x)
    masks = plan.choose({})
    whole = n_macs(model, x)
    set_masks(model, masks)
    with evaluating(model): before = model(x)
    plan.settle()
    with evaluating(model): after = model(x)
    assert after.shape==(2,10) and (after-before).abs().max()<=1e-5*max(1, before.abs().max().item())
    assert n_macs(model, x)<most*whole and masked(model)=={}
    out = model.train()(x)
    sum(t.square().sum() for t in tensors(out)).backward()
    ran = {k for k,p in model.named_parameters() if p.grad is not None}
    assert ran>={k.rpartition('.')[0]+'.weight' for k in recipe_of(model).left if k.endswith('weight')}
    fresh = shrink(build(), recipe_from_json(recipe_of(model).to_json()))
    fresh.load_state_dict({k:v for k,v in model.state_dict().items()})
    with evaluating(fresh), evaluating(model): assert fresh(x).equal(model(x))

def test_heads():
    "Heads of an attention go as a whole, and the others do what they did"
    model = timm('vit_tiny_patch16_224', img_size=32)()
    x = torch.randn(2,3,32,32)
    found,_ = channel_groups(model, x)
    heads = [g for g in found if g.heads]
    assert len(heads)==12 and {len(g) for g in heads}=={3} and {g.step(8) for g in heads}=={1}
    plan = plan_for(s := Selection({'blocks.*.attn.qkv':.34}, 'channel', scope='local'))(model, s, x)
    set_masks(model, plan.choose({}))
    plan.settle()
    a = model.blocks[0].attn
    assert (a.num_heads,a.head_dim,a.attn_dim,a.qkv.out_features,a.proj.in_features)==(2,64,128,384,128)

def test_attention_of_torchvision():
    "All weights of `nn.MultiheadAttention` are one parameter of a fused operation: its heads stay, the width of the MLPs goes"
    model,x = models['vit_tv'][0](),torch.randn(2,3,64,64)
    found,why = channel_groups(model, x)
    assert {g.name:len(g) for g in found}=={f'encoder.layers.encoder_layer_{i}.mlp.0':256 for i in (0,1)}
    assert 'LayerNorm' in why['encoder.layers.encoder_layer_1.mlp.3']
    with pytest.raises(ValueError, match="No channels of '\\*self_attention\\*' can be removed"): channel_groups(model, x, only='*self_attention*')

def test_macs_by_two_others():
    "Our count of multiplications against Torch-Pruning's, which counts what is element by element too"
    tp = pytest.importorskip('torch_pruning')
    x = torch.randn(1,3,64,64)
    for name in ('resnet18','vgg11_bn'):
        model = tv(name)()
        small = clean_copy(model)
        plan = plan_for(s := Selection(.5, 'channel'))(small, s, x.repeat(2,1,1,1))
        set_masks(small, plan.choose({}))
        plan.settle()
        for m in (model,small):
            theirs = tp.utils.count_ops_and_params(m, x)
            assert .93<n_macs(m, x)/theirs[0]<=1 and n_params(m)==theirs[1]

# In one shot

@pytest.mark.parametrize('criterion', sorted(set(criteria)-{'movement'}))
def test_one_shot(criterion):
    learn = learner()
    learn.fit(1, 1e-2)
    before = {k:v.clone() for k,v in learn.model.state_dict().items()}
    s = quiet(learn.prune(.5, structure='channel', criterion=criterion, scope='local'))
    assert widths(s.model)==[8,16,16,10] and widths(learn.model)==[16,32,32,10]
    assert all(v.equal(before[k]) for k,v in learn.model.state_dict().items())
    every_parameter_moves(s)
    assert s.predict is not None and s.validate()[0]<10

def test_one_of_ones_own():
    s = learner().prune(.5, structure=Channel(4), criterion=lambda w: w.std(1), scope='local')
    assert widths(s.model)==[8,16,16,10]
    s = learner().prune({'1':.25}, structure=Channel(4), scope='local')
    assert widths(s.model)==[16,24,32,10]

@pytest.mark.parametrize('what,share', [('macs',.5),('macs',.8),('params',.5),('params',.3)])
def test_target(what, share):
    learn = Learner(dls(), nn.Sequential(conv(1,32), conv(32,64,2), conv(64,64), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64,10)), loss_func=CrossEntropyLossFlat())
    s = learn.prune(target={what:share})
    of = lambda l: n_macs(l.model, xs[:1]) if what=='macs' else n_params(l.model)
    assert abs(of(s)/of(learn)-share)<.02 and all(w%8==0 for w in widths(s.model)[:-1])

def test_target_of_ones_own():
    "Anything that is a number of a model can be a target"
    @targets
    def widest(model, *xb): return float(sum(widths(model)))
    try: s = learner().prune(target={'widest':.55})
    finally: del targets['widest']
    assert abs(sum(widths(s.model))/90-.55)<.02

def test_latency_target(monkeypatch):
    "A stopwatch that counts multiplications: what really takes how long depends on who else uses the machine"
    def counted(fns, n):
        with FlopCounterMode(display=False) as c: fns['']()
        return pd.DataFrame({'median':[c.get_total_flops()]}, index=list(fns))
    set_seed(0)
    model = nn.Sequential(conv(1,128), conv(128,128), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128,10))
    items = [(torch.randn(1,24,24), torch.tensor(i%10)) for i in range(16)]
    learn = Learner(DataLoaders.from_dsets(items, items, bs=8, device='cpu', num_workers=0), model, loss_func=CrossEntropyLossFlat())
    latency = targets['latency'](model, items[0][0][None])
    monkeypatch.setattr('fastquant.prune.channels.target.in_turns', counted)
    s = learn.prune(target={'latency':.6})
    assert latency>0 and abs(n_macs(s.model, items[0][0][None])/n_macs(model, items[0][0][None])-.6)<=.02

def test_few_channels():
    "Layers with 8 channels or fewer are left whole, unless a finer step is asked for"
    learn = learner()
    learn.model[0] = conv(1,6)
    learn.model[1][0] = nn.Conv2d(6,32,3,2,1)
    assert widths(learn.prune(.5, structure='channel', scope='local').model)==[6,16,16,10]
    assert widths(learn.prune(.5, structure=Channel(1), scope='local').model)==[3,16,16,10]

def test_iterative():
    "Prune, train, prune: one recipe in the end, and a fresh Learner takes it"
    learn = learner()
    learn.fit(1, 1e-2)
    first = quiet(learn.prune(.25, structure='channel', scope='local'))
    first.fit(1, 1e-2)
    second = quiet(first.prune(.34, structure='channel', scope='local'))
    assert widths(first.model)==[8,24,24,10] and widths(second.model)==[8,16,16,10]
    assert recipe_of(second.model).shapes['1.0.weight']==(32,16,3,3)
    second.save('second')
    fresh = learner().load('second')
    assert fresh.validate()==second.validate()

# In a fit

opts = dict(momentum=partial(SGD, mom=.9), adam=Adam, lookahead=lambda p, lr: Lookahead(Adam(p, lr), k=3), torch=partial(OptimWrapper, opt=torch.optim.AdamW))

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

class Agree(Callback):
    "The forward pass right before channels are removed, and right after"
    order = PruneScheduleCallback.order-1
    def before_fit(self): self.seen = []
    def out(self):
        with evaluating(self.model): return self.model(xs[:16])
    def after_batch(self):
        if self.training: self.seen.append((widths(self.model)[1],sparsity(self.model),self.out()))

def test_masked_then_removed():
    learn = learner()
    plan = plan_for(s := Selection(.5, 'channel', scope='local'))(learn.model, s, xs[:4])
    learn.fit(1, 1e-2)
    set_masks(learn.model, plan.choose({}))
    learn.fit(1, 1e-2)
    with evaluating(learn.model): before = learn.model(xs)
    s = learn.prune(structure='channel')
    with evaluating(s.model): assert (s.model(xs)-before).abs().max()<1e-5
    assert widths(s.model)==[8,16,16,10] and widths(learn.model)==[16,32,32,10]

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

def test_pull():
    "Training with the pull on groups: what is removed afterwards matters less"
    lost = {}
    for reg in (0.,.3):
        learn = learner()
        learn.fit_one_cycle(6, 1e-2, cbs=GroupLassoCallback(reg) if reg else None)
        s = learn.prune(.5, structure='channel', criterion='l2', scope='local')
        gone = lambda l: torch.cat([score_group(g, l.model, 'l2').sort().values/score_group(g, l.model, 'l2').mean() for g in channel_groups(l.model, xs[:4])[0]])
        lost[reg] = (quiet(s).validate()[0]-learn.validate()[0],gone(learn).min().item())
    assert lost[.3][0]<lost[0.][0] and lost[.3][1]<lost[0.][1], lost

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

def test_file(tmp_path):
    "Weights and recipe in a safetensors file: a freshly built architecture, and no pickle"
    learn = learner(tmp_path)
    learn.fit(1, 1e-2)
    s = quiet(learn.prune(.5, structure='channel', scope='local', fname='s.safetensors'))
    s.fit(1, 1e-2)
    s.save_sparse('s.safetensors')
    assert (tmp_path/'s.safetensors').stat().st_size<4*n_params(s.model)+9000
    back = quiet(learner(tmp_path).load_sparse('s.safetensors'))
    assert all(v.equal(back.model.state_dict()[k]) for k,v in s.model.state_dict().items())
    assert back.validate()==s.validate()
    every_parameter_moves(back)
    both = quiet(s.prune(.5))
    both.save_sparse('both.safetensors')
    again = learner(tmp_path).load_sparse('both.safetensors')
    assert sparsity(again.model)==sparsity(both.model)>.45 and widths(again.model)==[8,16,16,10]

def test_vision_learner(tmp_path):
    "A body that is frozen, and a head, as `fine_tune` trains them; exported and loaded; quantized"
    learn = quiet(vision_learner(pictures(), resnet18, pretrained=False, metrics=accuracy, path=tmp_path))
    learn.fit(1, 1e-3)
    learn.freeze()
    s = quiet(learn.prune(target={'macs':.5}))
    frozen = [not p.requires_grad for p in learn.model.parameters()]
    assert [not p.requires_grad for p in s.model.parameters()]==frozen and any(frozen)
    assert 'layer' not in str(recipe_of(learn.model).left) and any(k.startswith('1.') for k in recipe_of(s.model).left)
    s.fine_tune(1, 1e-3)
    every_parameter_moves(s)
    with s.no_bar():
        table = learn.compare(s, n=2)
        assert abs(table['MACs']['float 2']/table['MACs']['float']-.5)<.02 and table['parameters']['float 2']<.8*table['parameters']['float']
        q = s.quantize(n_batches=2)
        assert q.model.n_macs==n_macs(s.model, torch.randn(1,3,32,32)) and q.model.report.float_layers=={}
        s.export_onnx('s.onnx')
        s.export('s.pkl')
    back = load_learner(tmp_path/'s.pkl')
    with back.no_bar(): assert back.predict(picture(3))[2].shape==(10,)

def test_fine_tune_prunes_when_it_thaws():
    learn = quiet(vision_learner(pictures(), resnet18, pretrained=False, metrics=accuracy))
    learn.fine_tune(1, 1e-3, cbs=PruneScheduleCallback(.5, structure='channel', scope='local', every=1))
    assert learn.model[0][4][0].conv1.out_channels==32
    every_parameter_moves(learn)

def test_unet():
    learn = quiet(unet_learner(pictures(64, MaskBlock(['bg','ink']), ink), resnet18, pretrained=False, n_out=2, metrics=Dice()))
    learn.fit(1, 1e-3)
    with learn.no_bar(): before = learn.get_preds()[0].shape
    s = quiet(learn.prune(.5, structure='channel', scope='local'))
    assert n_params(s.model)<.7*n_params(learn.model)
    every_parameter_moves(s)
    with s.no_bar(): assert s.get_preds()[0].shape==before

def test_tabular(tmp_path):
    set_seed(0)
    df = pd.DataFrame(dict(cat=np.random.choice(list('abcd'), 400), num=np.random.randn(400), big=100*np.random.randn(400)))
    df['y'] = np.where((df.cat<'c')^(df.num>0), 'yes', 'no')
    data = TabularDataLoaders.from_df(df, procs=[Categorify,Normalize], cat_names=['cat'], cont_names=['num','big'], y_names='y', bs=64, valid_idx=list(range(300,400)))
    learn = quiet(tabular_learner(data, layers=[64,32], metrics=accuracy, path=tmp_path))
    learn.fit(2, 1e-2)
    s = quiet(learn.prune(.5, structure='channel', scope='local'))
    assert widths(s.model)==[32,16,2] and s.model.embeds[0].weight.shape==learn.model.embeds[0].weight.shape
    every_parameter_moves(s)
    with s.no_bar(): assert s.predict(df.iloc[0].drop('y'))[2].shape==(2,)

# Together with rounding

def test_quantize_and_train_through_rounding():
    learn = learner()
    learn.fit(2, 1e-2)
    s = quiet(learn.prune(.5, structure='channel', scope='local'))
    s.fit(2, 1e-2)
    q = s.quantize()
    with q.no_bar(): assert abs(q.validate()[1]-s.validate()[1])<.06
    assert q.model.report.float_layers=={} and q.model.n_macs==n_macs(s.model, xs[:1])
    s.fit(2, 1e-3, cbs=QuantAwareCallback('int8'))
    s.save('rounded')
    fresh = learner().load('rounded')
    assert fake_quant_of(fresh.model) and widths(fresh.model)==[8,16,16,10]
    with s.no_bar(): assert s.quantize().model.report.trained and fresh.validate()==s.validate()

both_specs = pytest.mark.parametrize('spec', ['int8','w4a4'])
def state(model): return {k:v.detach().nan_to_num(-7) for k,v in model.state_dict().items()}
def scores(learn):
    with evaluating(learn.model): return learn.model(xs)
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
    learn = quiet(vision_learner(pictures(), resnet18, pretrained=False, metrics=accuracy))
    learn.fit(1, 1e-3)
    learn.unfreeze()
    learn.fit_one_cycle(2, 1e-3, cbs=[PruneScheduleCallback(target={'macs':.5}, structure='channel', every=2),QuantAwareCallback('int8')])
    r,n = fake_quant_of(learn.model),sum(len(learn.model.get_submodule(k).weight) for k in fake_quant_of(learn.model).layers)
    assert len(r.weight_scale)==n<4800 and r.ready and learn.model[0][4][0].conv1.out_channels<64
    every_parameter_moves(learn)
    assert predicts_alike(learn.quantize(n_batches=2), learn)

# Looking at it

def test_channel_report():
    learn = learner()
    s = learn.prune({'1':.5}, structure='channel', scope='local')
    r = s.channel_report()
    assert list(r.index)==['0.0','1.0','2.0','5'] and list(r.before)==[16,32,32,10] and list(r.after)==[16,16,32,10]
    assert list(learn.channel_report(show_plot=False).after)==[16,32,32,10]
