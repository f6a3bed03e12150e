"Channels removed in one shot: what is left trains on, saves, loads, exports and quantizes"
import pandas as pd, pytest, torch
from fastai.tabular.all import Categorify, Normalize, tabular_learner
from fastai.vision.all import Dice, MaskBlock, accuracy, load_learner, resnet18, set_seed, unet_learner, vision_learner
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from fastquant.all import *
from fastquant.prune.select import Selection
from fastquant.prune.channels.check import channel_groups
from fastquant.prune.channels.select import score_group
from fastquant.prune.channels.target import plan_for
from tests.helpers.data import first, ink, loaders, noise, picture, pictures, rows, table, xs
from tests.helpers.learners import classifier, every_parameter_moves, quiet, widths
from tests.helpers.nets import classify, conv, encoder, same, state, three_convs

def learner(path='.', **kwargs):
    set_seed(0)
    return classifier(loaders(*first(256, 64)), three_convs(), path, **kwargs)

# In one shot

@pytest.mark.parametrize('criterion', sorted(set(criteria)-{'movement'}))
def test_one_shot(criterion):
    learn = learner()
    learn.fit(1, 1e-2)
    before = state(learn.model)
    s = quiet(learn.prune(.5, structure='channel', criterion=criterion, scope='local'))
    assert widths(s.model)==[8,16,16,10] and widths(learn.model)==[16,32,32,10]
    assert same(state(learn.model), before)
    every_parameter_moves(s)
    assert s.predict is not None and s.validate()[0]<10

def test_one_of_ones_own():
    s = learner().prune(.5, structure=Channel(4), criterion=lambda w: w.std(1), scope='local')
    assert widths(s.model)==[8,16,16,10]
    s = learner().prune({'1':.25}, structure=Channel(4), scope='local')
    assert widths(s.model)==[16,24,32,10]

@pytest.mark.parametrize('what,share', [('macs',.5),('macs',.8),('params',.5),('params',.3)])
def test_target(what, share):
    learn = classifier(loaders(*first(256, 64)), nn.Sequential(conv(1,32), conv(32,64,2), conv(64,64), *classify(64)))
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
    model = nn.Sequential(conv(1,128), conv(128,128), *classify(128))
    items = noise(1, 24, 24, n=16, classes=10)
    learn = classifier(loaders(items, bs=8), model)
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
    once = quiet(learn.prune(.25, structure='channel', scope='local'))
    once.fit(1, 1e-2)
    second = quiet(once.prune(.34, structure='channel', scope='local'))
    assert widths(once.model)==[8,24,24,10] and widths(second.model)==[8,16,16,10]
    assert recipe_of(second.model).shapes['1.0.weight']==(32,16,3,3)
    second.save('second')
    fresh = learner().load('second')
    assert fresh.validate()==second.validate()

def test_masked_then_removed():
    learn = learner()
    plan = plan_for(s := Selection(.5, 'channel', scope='local'))(learn.model, s, xs[:4])
    learn.fit(1, 1e-2)
    set_masks(learn.model, plan.choose({}))
    learn.fit(1, 1e-2)
    with evaluating(learn.model): before = learn.model(xs[:320])
    s = learn.prune(structure='channel')
    with evaluating(s.model): assert (s.model(xs[:320])-before).abs().max()<1e-5
    assert widths(s.model)==[8,16,16,10] and widths(learn.model)==[16,32,32,10]

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

# Files, and other kinds of Learners

def test_file(tmp_path):
    "Weights and recipe in a safetensors file: a freshly built architecture, and no pickle"
    learn = learner(tmp_path)
    learn.fit(1, 1e-2)
    s = quiet(learn.prune(.5, structure='channel', scope='local', fname='s.safetensors'))
    s.fit(1, 1e-2)
    s.save_sparse('s.safetensors')
    assert (tmp_path/'s.safetensors').stat().st_size<4*n_params(s.model)+9000
    back = quiet(learner(tmp_path).load_sparse('s.safetensors'))
    assert same(state(s.model), state(back.model))
    assert back.validate()==s.validate()
    every_parameter_moves(back)
    both = quiet(s.prune(.5))
    both.save_sparse('both.safetensors')
    again = learner(tmp_path).load_sparse('both.safetensors')
    assert sparsity(again.model)==sparsity(both.model)>.45 and widths(again.model)==[8,16,16,10]

def test_vision_learner(tmp_path):
    "A body that is frozen, and a head, as `fine_tune` trains them; exported and loaded; quantized"
    learn = quiet(vision_learner(pictures(96), resnet18, pretrained=False, metrics=accuracy, path=tmp_path))
    learn.fit(1, 1e-3)
    learn.freeze()
    s = quiet(learn.prune(target={'macs':.5}))
    frozen = [not p.requires_grad for p in learn.model.parameters()]
    assert [not p.requires_grad for p in s.model.parameters()]==frozen and any(frozen)
    assert 'layer' not in str(recipe_of(learn.model).left) and any(k.startswith('1.') for k in recipe_of(s.model).left)
    s.fine_tune(1, 1e-3)
    every_parameter_moves(s)
    with s.no_bar():
        compared = learn.compare(s, n=2)
        assert abs(compared['MACs']['float 2']/compared['MACs']['float']-.5)<.02 and compared['parameters']['float 2']<.8*compared['parameters']['float']
        q = s.quantize(n_batches=2)
        assert q.model.n_macs==n_macs(s.model, torch.randn(1,3,32,32)) and q.model.report.float_layers=={}
        s.export_onnx('s.onnx')
        s.export('s.pkl')
    back = load_learner(tmp_path/'s.pkl')
    with back.no_bar(): assert back.predict(picture(3))[2].shape==(10,)

def test_unet():
    learn = quiet(unet_learner(pictures(64, MaskBlock(['bg','ink']), ink), encoder, pretrained=False, n_out=2, metrics=Dice()))
    learn.fit(1, 1e-3)
    with learn.no_bar(): before = learn.get_preds()[0].shape
    s = quiet(learn.prune(.5, structure='channel', scope='local'))
    assert n_params(s.model)<.7*n_params(learn.model)
    every_parameter_moves(s)
    with s.no_bar(): assert s.get_preds()[0].shape==before

def test_tabular(tmp_path):
    set_seed(0)
    df = table(400)
    data = rows(df, 300, (Categorify,Normalize))
    learn = quiet(tabular_learner(data, layers=[64,32], metrics=accuracy, path=tmp_path))
    learn.fit(2, 1e-2)
    s = quiet(learn.prune(.5, structure='channel', scope='local'))
    assert widths(s.model)==[32,16,2] and s.model.embeds[0].weight.shape==learn.model.embeds[0].weight.shape
    every_parameter_moves(s)
    with s.no_bar(): assert s.predict(df.iloc[0].drop('y'))[2].shape==(2,)

# Rounding afterwards, and looking at it

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

def test_channel_report():
    learn = learner()
    s = learn.prune({'1':.5}, structure='channel', scope='local')
    r = s.channel_report()
    assert list(r.index)==['0.0','1.0','2.0','5'] and list(r.before)==[16,32,32,10] and list(r.after)==[16,16,32,10]
    assert list(learn.channel_report(show_plot=False).after)==[16,32,32,10]
