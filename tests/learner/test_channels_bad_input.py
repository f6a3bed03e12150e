"Each kind of bad input to the removal of channels gets an error that says how to go on, and leaves the Learner and the disk as they were"
import builtins, json, pytest, torch
from fastai.vision.all import noop, set_seed
from safetensors import safe_open
from torch import nn
from fastquant.all import *
from fastquant.core.model import clean_copy
from fastquant.prune.select import Selection
from fastquant.prune.shrink import recipe_from_json
from fastquant.prune.channels.check import channel_groups
from fastquant.prune.channels.target import plan_for
from tests.helpers.data import loaders, noise
from tests.helpers.files import rounds
from tests.helpers.learners import classifier
from tests.helpers.nets import same_with_nan as same, state, two_convs

def net(mid=16): return two_convs(mid, 12)

def learner(model, path='.'):
    set_seed(0)
    return classifier(loaders(noise(2, 8, 8), bs=8), model, path)

@pytest.fixture
def learn(tmp_path): return learner(net(), tmp_path)

def nan_weight(l): l.model[3].weight.data[1] = torch.nan

cases = dict(
    too_much=(noop, dict(amount=.97), "Nothing would be left of the channels of '(0|3)'. Prune less, exclude it, or .* scope='local'"),
    too_much_local=(noop, dict(amount=.99, scope='local'), "Nothing would be left of the channels of '0'"),
    percent=(noop, dict(amount=30), 'so 0.3 for 30%'),
    output=(noop, dict(amount={'7':.5}), "No channels of '7' can be removed: '7': it reaches the output. Leave it out"),
    last=(noop, dict(amount=.5, last=True), "last=True: what the last layer makes is the model's output"),
    nothing=(noop, dict(amount=.5, exclude=['0','3']), "No channels can be removed from Sequential: .*'0': excluded"),
    narrow=(noop, dict(amount=.5, structure=Channel(64)), "it has 16 channels, and round_to=64 leaves no fewer"),
    step=(noop, dict(amount=.5, structure=lambda: Channel(0)), 'pass the number that channel counts shall be multiples of'),
    pattern=(noop, dict(amount=.5, exclude='head'), "'head' matches no module"),
    criterion=(noop, dict(amount=.5, criterion='magnitud'), "Did you mean 'magnitude'"),
    scores=(noop, dict(amount=.5, criterion=lambda w: w), 'must give one score for each of the 16 rows'),
    nan=(nan_weight, dict(amount=.5), "NaN"),
    no_batchnorm=(noop, dict(amount=.5, criterion='bn_scale', exclude='0'), "needs the scale of a batchnorm, and the channels of '3' have none"),
    target_and_amount=(noop, dict(amount=.5, target={'macs':.5}), 'one of the two says how much'),
    target_percent=(noop, dict(target={'macs':50}), 'above 0 and below 1'),
    target_many=(noop, dict(target={'macs':.5, 'params':.5}), 'pass one measure'),
    target_name=(noop, dict(target={'mac':.5}), "No target is called 'mac'. Did you mean 'macs'"),
    target_low=(noop, dict(target={'macs':.05}), 'with everything removed that can be, 0.3.* would be left. Pass more than that'),
    target_coarse=(noop, dict(target={'macs':.8}), 'the nearest that can be had with multiples of 8 is 0.*Channel'))

@pytest.mark.parametrize('case', cases)
def test_prune(learn, case):
    change,kwargs,message = cases[case]
    change(learn)
    before = state(learn.model)
    kwargs = dict(structure='channel') | kwargs
    with pytest.raises(ValueError, match=message):
        if case=='step': kwargs['structure'] = kwargs['structure']()
        learn.prune(**kwargs, fname='m.safetensors')
    assert same(state(learn.model), before) and masked(learn.model)=={} and not recipe_of(learn.model) and not list(learn.path.glob('*.safetensors'))

@pytest.mark.parametrize('case', [k for k in cases if k not in ('step','nan','too_much','too_much_local')])
def test_fit(learn, case):
    "In a fit: before anything is removed, and one can go on"
    change,kwargs,message = cases[case]
    kwargs = dict(structure='channel') | kwargs
    with pytest.raises(ValueError, match=message): learn.fit(1, 1e-9, cbs=PruneScheduleCallback(**kwargs, schedule='one_shot'))
    assert not recipe_of(learn.model) and learn.model[0].out_channels==16 and sparsity(learn.model)==0
    learn.fit(1)

def test_target_for_zeros(learn):
    with pytest.raises(ValueError, match="target=.*zeros change no target.*structure='channel'"): learn.prune(structure='weight', target={'macs':.5})

def test_nothing_pruned_yet(learn):
    with pytest.raises(ValueError, match='Nothing has been pruned yet'): learn.prune(structure='channel')
    slearn = learn.prune(.3)
    with pytest.raises(ValueError, match='No channel is masked entirely'): slearn.prune(structure='channel')

class Severed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a,self.b = nn.Conv2d(2, 16, 3),nn.Linear(16, 3)
    def forward(self, x): return self.b(self.a(x).mean((2,3)).detach()).argmax(1).float()

def test_no_trace():
    "A model that cannot be traced names the operation"
    learn = learner(Severed())
    with pytest.raises(ValueError, match="Severed cannot be traced: behind '(argmax|detach)' in .* no gradient leads back"): learn.prune(.5, structure='channel')

class Mixed(nn.Module):
    "Channels that are normalised together, shuffled, and added to the input"
    def __init__(self):
        super().__init__()
        self.a,self.norm,self.b = nn.Linear(8, 16),nn.LayerNorm(16),nn.Linear(16, 8)
        self.out = nn.Linear(8, 3)
    def forward(self, x):
        x = x.flatten(1)[:,:8]
        return self.out(self.b(self.norm(self.a(x)))+x)

def test_groups_that_are_left_alone_say_why():
    with pytest.raises(ValueError, match="'a': it goes through 'norm', a LayerNorm.*'b': .*fails") as e: channel_groups(Mixed(), torch.randn(4, 8), round_to=1)
    assert "'out': it reaches the output" in str(e.value)

def test_tied_weights():
    m = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    m[4].weight = m[2].weight
    with pytest.raises(ValueError, match="used twice under different names"): channel_groups(m, torch.randn(4, 8), round_to=1)

def test_weight_used_by_another_product():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.enc,self.out,self.shift = nn.Linear(8, 16),nn.Linear(8, 3),nn.Parameter(torch.zeros(8))
        def forward(self, x): return self.out(nn.functional.linear(self.enc(x).relu(), self.enc.weight.t(), self.shift).relu())
    with pytest.raises(ValueError, match="'enc': 'enc.weight' is used outside of its layer too .*structure='weight'.*fails"): channel_groups(Tied(), torch.randn(4, 8), round_to=1)

def test_integers_are_not_cut(learn):
    "A model whose weights are integers already is left as it is"
    s,x = learn.prune(.5, structure='channel', scope='local'),torch.randn(4, 2, 8, 8)
    learn.fit(1, 1e-3)
    model = rounds(clean_copy(learn.model), 'int8', x, fold=False)
    convert(model)
    before = state(model)
    with pytest.raises(ValueError, match='Remove channels before `convert`'): shrink(model, recipe_of(s.model))
    assert same(model.state_dict(), before)

def test_engine(learn):
    learn.fit(1, 1e-3)
    with pytest.raises(ValueError, match='Call `prune` on the float Learner it came from'): learn.quantize().prune(.5, structure='channel')

def test_recipe_that_does_not_fit(learn, tmp_path):
    "A recipe for another architecture: in a file, in a checkpoint, by hand"
    s = learn.prune(.5, structure='channel', scope='local', fname='s.safetensors')
    s.save('s')
    other = learner(net(24), tmp_path)
    before = state(other.model)
    message = r"'0.weight' is of shape \(24, 2, 3, 3\) in the model, and was of shape \(16, 2, 3, 3\)"
    for f in (lambda: other.load_sparse('s.safetensors'), lambda: other.load('s'), lambda: shrink(other.model, recipe_of(s.model))):
        with pytest.raises(ValueError, match=message): f()
    assert same(state(other.model), before) and not recipe_of(other.model)
    less = learner(nn.Sequential(nn.Flatten(), nn.Linear(128, 3)), tmp_path)
    with pytest.raises(ValueError, match="'0.weight' is missing in the model"): less.load('s')
    twice = learner(net(), tmp_path).prune(.5, structure='channel', scope='local', criterion=lambda w: -w.abs().mean(1))
    with pytest.raises(ValueError, match='cut differently'): twice.load('s')

def test_recipe_that_is_damaged(learn, tmp_path):
    s = learn.prune(.5, structure='channel', scope='local')
    text = recipe_of(s.model).to_json()
    d = json.loads(text)
    for bad in ('', 'x', text[:-5], '[1]', '{"lists":[],"tensors":{"0.weight":[[16,2,3,3],{"0":0}]}}', json.dumps({**d, 'lists':[[5,3]]*len(d['lists'])}),
        json.dumps({**d, 'lists':[[99]]*len(d['lists'])}), json.dumps({**d, 'lists':[[]]*len(d['lists'])}), json.dumps({**d, 'lists':[['a']]*len(d['lists'])})):
        with pytest.raises(ValueError): recipe_from_json(bad)

def test_file_is_plain_data(learn):
    "The recipe in the file is JSON, and there is no pickle"
    learn.prune(.5, structure='channel', scope='local', fname='s.safetensors')
    with safe_open(learn.path/'s.safetensors', 'pt') as f: about = json.loads(f.metadata()['about'])
    assert recipe_from_json(about['recipe']).shapes['0.weight']==(16,2,3,3)

def test_without_torch_pruning(learn, monkeypatch):
    real = builtins.__import__
    def no(name, *args, **kwargs):
        if name.startswith('torch_pruning'): raise ImportError(name)
        return real(name, *args, **kwargs)
    monkeypatch.setattr(builtins, '__import__', no)
    with pytest.raises(ImportError, match='pip install torch-pruning$'): learn.prune(.5, structure='channel')

@pytest.mark.parametrize('kwargs', [dict(reg=0), dict(reg=-1), dict(alpha=-1)], ids=str)
def test_pull(kwargs):
    with pytest.raises(ValueError, match=f"{[*kwargs][0]}=.*pass|{[*kwargs][0]}=.*Pass"): GroupLassoCallback(**kwargs)

def test_other_uses_of_the_structure(learn):
    "What works on single layers says that channels are not of one"
    for f in (lambda: learn.prune_sensitivity(structure='channel'), lambda: learn.lottery_ticket(.5, 1, structure='channel')):
        with pytest.raises(ValueError, match='channels go through several layers'): f()

def test_channels_that_cannot_be_followed():
    "Windows that are moved about lead round in circles: those channels are left alone and named, the others can go"
    from torchvision.models import SwinTransformer
    m,x = SwinTransformer([4,4], 24, [2,2], [3,6], [4,4], num_classes=10).eval(),torch.randn(2, 3, 64, 64)
    groups,why = channel_groups(m, x)
    assert {g.name for g in groups}=={f'features.{i}.{j}.mlp.0' for i in (1,3) for j in (0,1)}
    assert why['features.2.reduction']=='Torch-Pruning cannot follow where its channels go: they would be more than there are places'
    with pytest.raises(ValueError, match="No channels of 'features.2.reduction' can be removed: .*cannot follow"): channel_groups(m, x, only='features.2.reduction')

def test_channels_that_are_shuffled():
    "What goes through a shuffle is left alone and named, what is inside of a branch can go, and the smaller net does what the masked one did"
    from torchvision.models import ShuffleNetV2
    torch.manual_seed(0)
    m,x = ShuffleNetV2([4,2,2], [16,32,64,128,64], num_classes=10).eval(),torch.randn(2, 3, 64, 64)
    groups,why = channel_groups(m, x)
    assert {k for g in groups for k in g.layers}>={f'stage{i}.{j}.branch2.0' for i in (2,3,4) for j in (0,1)}
    assert why['stage2.1.branch2.5']=='Torch-Pruning cannot follow where its channels go: it has no rule for an operation there'
    assert why['stage3.1.branch2.5'] and why['stage4.1.branch2.5']
    plan = plan_for(s := Selection(.5, 'channel', scope='local'))(m, s, x)
    set_masks(m, plan.choose({}))
    with evaluating(m): before = m(x)
    plan.settle()
    with evaluating(m): assert (m(x)-before).abs().max()<1e-5 and m.stage2[0].branch2[0].out_channels==8

def test_joined_windows():
    "Where Torch-Pruning adds up sizes that it does not know, as for a Swin of many blocks, the MLPs can go all the same"
    from torchvision.models import SwinTransformer
    m,x = SwinTransformer([4,4], 24, [2,2,10,2], [3,6,12,24], [4,4], num_classes=10).eval(),torch.randn(2, 3, 64, 64)
    groups,why = channel_groups(m, x)
    assert {g.name for g in groups}=={k for k,_ in m.named_modules() if k.endswith('mlp.0')} and len(groups)==16
    assert any('cannot follow' in v for v in why.values())
