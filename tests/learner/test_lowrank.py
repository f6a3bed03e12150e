"What a fastai user does before and after `decompose`, and each kind of bad input"
import builtins, pytest, torch
from fastai.vision.all import MixUp, SaveModelCallback, accuracy, load_learner, noop, set_seed, vision_learner
from torch import nn
from fastquant.all import *
from tests.helpers.data import loaders, pictures, shuffled
from tests.helpers.learners import check_owned, classifier
from tests.helpers.nets import conv, encoder, same, stages, state

train,valid = shuffled(640, 320)

def net(): return nn.Sequential(conv(1,16), conv(16,32,2), nn.Sequential(conv(32,64,2), nn.Flatten(), nn.Linear(256,64), nn.ReLU(), nn.Linear(64,10)))

def learner(path, model=None, **kwargs):
    set_seed(0)
    return classifier(loaders(train, valid), model or net(), path, **kwargs)

@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    learn = learner(tmp_path_factory.mktemp('float'))
    learn.fit_one_cycle(4, 1e-2)
    assert learn.validate()[1]>.93
    return learn.model.state_dict()

@pytest.fixture
def learn(weights, tmp_path):
    learn = learner(tmp_path, splitter=stages)
    learn.model.load_state_dict(weights)
    return learn

ways = dict(energy=dict(energy=.7), params=dict(params=.4), macs=dict(macs=.5), ranks=dict(ranks={'1':6,'2.2':8}), cp=dict(params=.5, kinds='cp'), train=dict(ranks={'2.2':4}, kinds={'2.2':'tensor_train'}),
    aware=dict(params=.4, aware=True, n_batches=2))

@pytest.mark.parametrize('way', ways.values(), ids=ways)
def test_trains_saves_and_loads(learn, tmp_path, way):
    "Every parameter is in the optimizer, in its stage, and moves; what is saved and loaded predicts the same"
    was = state(learn.model)
    d = learn.decompose(**way)
    assert same(was, state(learn.model)) and n_params(d.model)<n_params(learn.model) and d.opt is None
    before = state(d.model)
    d.fine_tune(1, 2e-3)
    assert len(d.opt.param_lists)==3
    check_owned(d)
    assert [k for k,p in d.model.named_parameters() if torch.equal(p, before[k])]==[]
    d.save('d')
    fresh = learner(tmp_path, splitter=stages).load('d')
    check_owned(fresh)
    assert same(state(fresh.model), state(d.model)) and fresh.validate()==d.validate() and factor_recipe(fresh.model)==factor_recipe(d.model)
    fresh.fit(1, 1e-3)
    d.save_decomposed('d.safetensors')
    back = learn.load_decomposed('d.safetensors')
    assert same(state(back.model), state(d.model)) and same(was, state(learn.model))

@pytest.mark.parametrize('way', ['params','cp','train'])
def test_quantizes_prunes_and_exports(learn, way):
    d = learn.decompose(**ways[way])
    d.fit_one_cycle(1, 3e-3, cbs=[MixUp(),PruneScheduleCallback(.3)])
    assert sparsity(d.model)==pytest.approx(.3, abs=1e-3)
    d.fit_one_cycle(1, 1e-3, cbs=[QuantAwareCallback('int8'),SaveModelCallback()])
    q = d.quantize(n_batches=2)
    assert abs(q.validate()[1]-d.validate()[1])<=.02
    d.remove_quant()
    f = d.export_onnx('d.onnx')
    x = valid.tensors[0][:8]
    with evaluating(d.model): assert torch.allclose(Engine(f.read_bytes())(x), d.model(x), atol=1e-4)

def test_float_checkpoint_is_not_disturbed(learn, tmp_path):
    learn.save('plain')
    assert factor_recipe(learner(tmp_path, splitter=stages).load('plain').model)=={}

def test_load_onto_another_recipe(learn):
    a,b = learn.decompose(ranks={'1':6}),learn.decompose(ranks={'1':7})
    a.save('a')
    with pytest.raises((ValueError,RuntimeError), match='size mismatch|These are the weights of'): b.load('a')

def test_vision_learner(tmp_path):
    "fastai's own: a pickle that predicts, a head that is batchnorm before linear"
    dls = pictures(40, valid=.2)
    learn = vision_learner(dls, encoder, pretrained=False, metrics=accuracy, path=tmp_path)
    with learn.no_bar(), learn.no_logging(): d = learn.decompose(params=.5)
    with d.no_bar(), d.no_logging():
        assert n_params(d.model)<=.5*n_params(learn.model)
        d.freeze()
        d.fit(1)
        d.export('d.pkl')
        want = d.predict(3)[2]
        loaded = load_learner(tmp_path/'d.pkl')
        with loaded.no_bar(): assert torch.equal(loaded.predict(3)[2], want)

@pytest.mark.parametrize('way', [dict(params=.8), dict(macs=.8), dict(ranks={'*':4})], ids=str)
def test_layer_that_cannot_be_factorised(tmp_path, way):
    "CP finds nothing in zeros: that layer stays as it is and is named"
    m = net()
    m[1][0].weight.data.zero_()
    d = learner(tmp_path, model=m).decompose(kinds='cp', **way)
    assert d.not_factorised['1.0'].startswith('it cannot be factorised') and type(d.model[1][0]) is nn.Conv2d and factor_recipe(d.model)

def test_shared_read_and_tied_weights_are_left(tmp_path):
    "A weight that somebody else reads would be gone; a module that is used twice is the same one afterwards"
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.att,self.a,self.b,self.read,self.twice = nn.MultiheadAttention(16, 2, batch_first=True),nn.Linear(16,16),nn.Linear(16,16),nn.Linear(16,16),nn.Linear(16,16)
            self.b.weight,self.also,self.out = self.a.weight,self.twice,nn.Linear(16,10)
        def forward(self, x):
            x = x.flatten(1).view(-1,4,16)
            x = self.b(self.a(self.att(x, x, x)[0]))
            return self.out(self.also(self.twice(nn.functional.linear(x, self.read.weight))).mean(1))
    learn = learner(tmp_path, model=Odd())
    d = learn.decompose(ranks={'*':2})
    assert {k for k in factor_recipe(d.model)}=={'twice','out'} and d.model.twice is d.model.also
    assert {k:d.not_factorised[k].split()[-1] for k in ('a','b','read')}=={'a':'layer','b':'layer','read':'linear'} and 'att.out_proj' in d.not_factorised
    d.fit(1, 1e-3)

def test_layers_that_are_asked_for_more_than_to_be_called(tmp_path):
    "An autoencoder with one weight for both directions, and a model that asks for a layer's size, keep these layers"
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.enc,self.wide,self.hid,self.out = nn.Linear(64,16),nn.Linear(64,64),nn.Linear(64,64),nn.Linear(64,10)
        def forward(self, x):
            x = self.enc(x.flatten(1)).relu()@self.enc.weight
            return self.out(self.hid(self.wide(x).relu()*self.wide.in_features**-.5).relu())
    learn = learner(tmp_path, model=Tied())
    d = learn.decompose(energy=.5)
    assert 'hid' in factor_recipe(d.model) and not {'enc','wide'}&set(factor_recipe(d.model))
    assert 'weight is used outside of it' in d.not_factorised['enc'] and "no attribute 'in_features'" in d.not_factorised['wide']
    d.fit(1, 1e-3)
    with pytest.raises(ValueError, match="'enc': its weight is used outside of it too"): learn.decompose(ranks={'enc':2})

# Bad input

def nan(l): l.model[1][0].weight.data[0] = torch.nan
def inf(l): l.model[1][0].weight.data[0] = torch.inf
def rounded(l): l.validate(cbs=PTQCalibrate())
def pruned(l): set_masks(l.model, {'2.2':torch.rand(64,256)<.5})
cases = dict(nothing=(noop,dict(),'in one way'), two=(noop,dict(params=.5,macs=.5),'params and macs given'), percent=(noop,dict(params=50),'so 0.5 for a half'), zero=(noop,dict(energy=0),'above 0'),
    nan=(nan,dict(params=.5),"'1.0.weight' has NaN"), rounded=(rounded,dict(params=.5),'remove_quant'), pruned=(pruned,dict(params=.5),'pruning masks'),
    rank_0=(noop,dict(ranks={'2.2':0}),"'2.2': rank=0.*from 1 to 64"), rank_large=(noop,dict(ranks={'2.2':65}),'from 1 to 64'), ranks_many=(noop,dict(ranks={'1':(3,3,3)}),'has 2 ranks'),
    batchnorm=(noop,dict(ranks={'1.1':3}),"'1.1' is BatchNorm2d, which cannot be factorised"), kind=(noop,dict(params=.5,kinds={'1.1':'svd'}),"'1.1' is BatchNorm2d, which 'svd' cannot factorise"),
    name=(noop,dict(ranks={'2.20':3}),"'2.20' matches no module. Did you mean"), unknown=(noop,dict(params=.5,kinds='tucker'),"Did you mean 'tucker2'"), exclude=(noop,dict(params=.5,exclude='head'),"'head' matches no module"),
    excluded=(noop,dict(ranks={'2.2':3},exclude='2.2'),"'2.2': excluded"), unreachable=(noop,dict(params=.01),'cannot be reached.*are left'), unreachable_macs=(noop,dict(macs=.01),'cannot be reached'),
    inf=(inf,dict(params=.5),"'1.0.weight' has NaN or infinity"), energy=(noop,dict(energy=1.5),'energy=1.5: pass the share to keep, above 0 and up to 1'), all_=(noop,dict(params=1),'above 0 and below 1'),
    rank_half=(noop,dict(ranks={'2.2':3.5}),"'2.2': rank=3.5: .*from 1 to 64"), rank_text=(noop,dict(ranks={'2.2':'3'}),"rank='3': .*from 1 to 64"), rank_bool=(noop,dict(ranks={'2.2':True}),'rank=True: .*from 1 to 64'),
    rank_pair=(noop,dict(ranks={'1.0':(0,3)}),r"'1.0': rank=\(0, 3\): .*from 1 to \(32, 16\)"), ranks_none=(noop,dict(ranks={}),"pass a dictionary of ranks by module pattern, like"), ranks_list=(noop,dict(ranks=[3]),'pass a dictionary of ranks'),
    number=(noop,dict(ranks={2:3}),"2 matches no module. Did you mean '2'"), kinds_list=(noop,dict(params=.5,kinds=['svd']),r"kinds=\['svd'\]: pass the name of a factorisation, svd, tucker2"),
    kinds_name=(noop,dict(params=.5,kinds={'2.20':'svd'}),"'2.20' matches no module. Did you mean"), exclude_number=(noop,dict(params=.5,exclude=2),"exclude=2: pass a module's name"),
    batches=(noop,dict(params=.5,aware=True,n_batches=0),'at least one batch'), no_data=(noop,dict(params=.5,aware=True,dl=[]),'calibration set is empty'),
    grows=(noop,dict(ranks={'2.4':10}),"nothing to gain.*'2.4': it would grow"), train_aware=(noop,dict(ranks={'2.2':3},kinds='tensor_train',aware=True),'cannot weigh errors'))

@pytest.mark.parametrize('do,kwargs,say', cases.values(), ids=cases)
def test_bad_input(learn, do, kwargs, say):
    "Nothing of the Learner changes: weights, modes, optimizer, callbacks"
    learn.create_opt()
    do(learn)
    def all_():
        weights = {k:v.nan_to_num(-7) if v.is_floating_point() else v for k,v in state(learn.model).items()}
        return weights,([m.training for m in learn.model.modules()],[[id(p) for p in ps] for ps in learn.opt.param_lists],str(learn.opt.hypers),list(learn.cbs),sorted(vars(learn)))
    was = all_()
    with pytest.raises(ValueError, match=say): learn.decompose(**kwargs)
    assert same(was[0], all_()[0]) and was[1]==all_()[1]

def test_without_tensorly(learn, monkeypatch):
    "The error names what to install"
    real = builtins.__import__
    def absent(name, *args, **kwargs):
        if name.startswith('tensorly'): raise ModuleNotFoundError("No module named 'tensorly'")
        return real(name, *args, **kwargs)
    monkeypatch.setattr(builtins, '__import__', absent)
    with pytest.raises(ModuleNotFoundError, match='pip install tensorly$'): learn.decompose(params=.5)

def test_damaged_files(learn):
    f = learn.decompose(ranks={'1':6}).save_decomposed('d.safetensors')
    data = f.read_bytes()
    for bad,say in ((data[:40],'damaged'), (b'',"damaged")):
        f.write_bytes(bad)
        with pytest.raises(ValueError, match=say): learn.load_decomposed('d.safetensors')
    f.write_bytes(data)
    other = learner(learn.path, model=nn.Sequential(nn.Flatten(), nn.Linear(64,10)))
    with pytest.raises(ValueError, match="has '1.0', and this model has no module"): other.load_decomposed('d.safetensors')
    with pytest.raises(ValueError, match='Nothing in this model is factorised'): learn.save_decomposed('e.safetensors')
    assert not (learn.path/'e.safetensors').exists()

def test_rank_sensitivity(learn):
    was = state(learn.model)
    s = learn.rank_sensitivity(shares=(.2,.5), n_batches=2, show_plot=False)
    assert same(was, state(learn.model)) and set(s.table.columns)=={'layer','rank','parameters','lost','accuracy'}
    d = learn.decompose(ranks=s.suggest(.02))
    assert n_params(d.model)<n_params(learn.model)
    for kwargs in (dict(shares=(0,)), dict(shares=(50,)), dict(shares=())):
        with pytest.raises(ValueError, match="shares?.* of a layer's parameters"): learn.rank_sensitivity(**kwargs)
