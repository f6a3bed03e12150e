"Techniques on one model, one after the other: each pair trains, keeps what the first has promised, and comes back from every kind of file"
import itertools, pytest, torch
from fastai.vision.all import load_learner, set_seed
from torch import nn
from fastquant.all import *
from fastquant.core.attach import steps_of
from tests.helpers.data import loaders
from tests.helpers.learners import check_owned, classifier
from tests.helpers.nets import same, state

def net():
    return nn.Sequential(nn.Conv2d(1,16,3,padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16,32,3,padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32,32,3,padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128,4))

class Items(list):
    def new_empty(self): return Items() # as fastai's datasets, for `export`

def learner(path):
    set_seed(0)
    x = torch.randn(128,1,8,8)
    items = Items(zip(x, (x.flatten(1)@torch.randn(64,4)).argmax(1)))
    return classifier(loaders(Items(items[:96]), Items(items[96:])), net(), path)

def weights(l): return l.prune(.4 if not masked(l.model) else .7)
def two_of_four(l): return l.prune(structure='nm')
def channels(l): return l.prune(.5, structure=Channel(1), scope='local')
def low_rank(l): return l.decompose(params=.7)
def aware(l):
    l.fit(1, 1e-3, cbs=QuantAwareCallback('w4a4'))
    return l
techniques = {f.__name__:f for f in (weights,two_of_four,channels,low_rank,aware)}
refused = {('weights','low_rank'):'has pruning masks', ('two_of_four','low_rank'):'has pruning masks', ('aware','low_rank'):'prepared for quantization'}

def promises(l):
    "What can be said of a model: zeros of each kind, widths, factors, fake-quant"
    m,r = l.model,fake_quant_of(l.model)
    zeros = {k:(o.weight==0)[~o.weight_mask].all().item() for k,o in masked(m).items()}
    return dict(zeros=all(zeros.values()), masks=len(zeros), cut=bool(recipe_of(m)), factors=len(factor_recipe(m)), rounds=r and r.spec)

def outputs(l):
    x = torch.randn(8,1,8,8, generator=torch.Generator().manual_seed(1))
    with evaluating(l.model): return l.model(x)

@pytest.mark.parametrize('first,then', itertools.permutations(techniques, 2))
def test_pairs(first, then, tmp_path):
    learn = learner(tmp_path)
    learn.fit(1, 1e-2)
    one = techniques[first](learn)
    before,gone = promises(one),{k:~m.weight_mask for k,m in masked(one.model).items()}
    if (first,then) in refused:
        with pytest.raises(ValueError, match=refused[first,then]): techniques[then](one)
        return
    both = techniques[then](one)
    both.fit(1, 1e-3, cbs=[QuantAwareCallback('w4a4')] if 'aware' in (first,then) else None)
    after = promises(both)
    assert after['zeros'] and all(after[k]>=before[k] if k in ('masks','factors') else after[k]==before[k] for k in before if before[k])
    if then=='channels' and gone: assert sparsity(both.model)>.8*sparsity(one.model)
    else: assert all((both.model.get_submodule(k).weight[g]==0).all() for k,g in gone.items())
    check_owned(both)
    both.save('both')
    both.save_sparse('both.safetensors')
    both.export('both.pkl')
    want = outputs(both)
    for back in (learner(tmp_path).load('both'), learner(tmp_path).load_sparse('both.safetensors'), load_learner(tmp_path/'both.pkl')):
        assert outputs(back).equal(want) and promises(back)==after

@pytest.mark.parametrize('what', techniques)
def test_a_load_that_is_refused_changes_nothing(what, tmp_path):
    source = techniques[what](learner(tmp_path))
    if source.opt is None: source.create_opt()
    f = source.save('good')
    saved = torch.load(f, weights_only=False)
    del saved['model']['10.bias']
    torch.save(saved, tmp_path/'models'/'bad.pth')
    learn = learner(tmp_path)
    before,modules = state(learn.model),list(learn.model.modules())
    with pytest.raises(RuntimeError, match='Missing key'): learn.load('bad')
    assert learn.opt is None and attachments(learn.model)==[]
    assert all(a is b for a,b in zip(modules, learn.model.modules(), strict=True))
    assert same(state(learn.model), before)
    learn.fit(1, 1e-3)
    assert outputs(learn.load('good')).equal(outputs(source))

def test_structure_comes_back_in_the_order_it_was_made(tmp_path):
    l = channels(low_rank(channels(learner(tmp_path))))
    assert [type(s).__name__ for s in steps_of(l.model)]==['Recipe','Factors','Recipe']
    l.save('l')
    assert outputs(learner(tmp_path).load('l')).equal(outputs(l))
