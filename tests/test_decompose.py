"What a fastai user does before and after `decompose`, and each kind of bad input"
import builtins, numpy as np, pytest, torch
from fastai.vision.all import (CategoryBlock, CrossEntropyLossFlat, DataBlock, DataLoaders, ImageBlock, L, Learner, MixUp, PILImage, RandomSplitter, SaveModelCallback, accuracy,
    load_learner, noop, params, resnet18, set_seed, vision_learner)
from hypothesis import given, settings, strategies as st
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset
from fastquant.all import *
from fastquant.lowrank.layers import factorise
from fastquant.lowrank.ranks import rank_options

digits = load_digits()
xs,ys = torch.tensor(digits.images/16-.5).float()[:,None],torch.tensor(digits.target)
idx = torch.randperm(len(xs), generator=torch.Generator().manual_seed(0))
train,valid = [TensorDataset(xs[i], ys[i]) for i in (idx[:640],idx[640:960])]

def conv(i, o, stride=1): return nn.Sequential(nn.Conv2d(i,o,3,stride,1,bias=False), nn.BatchNorm2d(o), nn.ReLU())
def net(): return nn.Sequential(conv(1,16), conv(16,32,2), nn.Sequential(conv(32,64,2), nn.Flatten(), nn.Linear(256,64), nn.ReLU(), nn.Linear(64,10)))
def stages(m): return L(m[0], m[1], m[2]).map(params)

def learner(path, model=None, **kwargs):
    set_seed(0)
    dls = DataLoaders.from_dsets(train, valid, bs=32, device='cpu', num_workers=0)
    learn = Learner(dls, model or net(), loss_func=CrossEntropyLossFlat(), metrics=accuracy, path=path, **kwargs)
    learn.remove_cbs([cb for cb in learn.cbs if cb.name=='progress'])
    learn.logger = noop
    return learn

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

def state(m): return {k:v.detach().clone() for k,v in m.state_dict().items()}
def same(a, b): return a.keys()==b.keys() and all(torch.equal(v, b[k]) for k,v in a.items())
def check_owned(learn): assert sorted(id(p) for ps in learn.opt.param_lists for p in ps)==sorted(id(p) for p in learn.model.parameters())

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
    def picture(i): return PILImage.create(np.stack([(digits.images[i]*15.9).astype('uint8').repeat(4, 0).repeat(4, 1)]*3, -1))
    set_seed(0)
    dls = DataBlock((ImageBlock,CategoryBlock), get_x=picture, get_y=label, splitter=RandomSplitter(.2, seed=0)).dataloaders(range(40), bs=16, num_workers=0, device='cpu')
    learn = vision_learner(dls, resnet18, pretrained=False, metrics=accuracy, path=tmp_path)
    with learn.no_bar(), learn.no_logging(): d = learn.decompose(params=.5)
    with d.no_bar(), d.no_logging():
        assert n_params(d.model)<=.5*n_params(learn.model)
        d.freeze()
        d.fit(1)
        d.export('d.pkl')
        want = d.predict(3)[2]
        loaded = load_learner(tmp_path/'d.pkl')
        with loaded.no_bar(): assert torch.equal(loaded.predict(3)[2], want)

def label(i): return str(digits.target[i])

# Against oracles

@settings(max_examples=25, deadline=None)
@given(st.integers(1,12), st.integers(1,12), st.integers(0,10**6))
def test_svd_is_the_best_of_its_rank(no, ni, seed):
    "Eckart & Young: what is lost is the squares of the singular values that are left out"
    torch.manual_seed(seed)
    m = nn.Linear(ni, no)
    s = np.linalg.svd(m.weight.detach().double().numpy(), compute_uv=False)
    for r in range(1, min(no, ni)+1):
        f = factorise(m, 'svd', r)
        assert ((m.weight-f[1].weight@f[0].weight)**2).sum().item()==pytest.approx((s[r:]**2).sum(), abs=1e-4)
        assert torch.equal(f[1].bias, m.bias)

@settings(max_examples=10, deadline=None)
@given(st.sampled_from([1,3,(3,5)]), st.sampled_from([1,2,(2,1)]), st.sampled_from([1,2]), st.booleans(), st.integers(0,10**6))
def test_full_rank_is_exact(k, stride, dilation, bias, seed):
    torch.manual_seed(seed)
    m,x = nn.Conv2d(5, 7, k, stride, 2, dilation, bias=bias),torch.randn(2,5,11,12)
    f = factorisations['svd' if k==1 else 'tucker2']
    with torch.no_grad(): assert torch.allclose(m(x), factorise(m, f, f.full(m))(x), atol=1e-5)

def test_tucker_is_what_tensorly_says():
    import tensorly as tl
    from tensorly.decomposition import partial_tucker
    m = nn.Conv2d(8, 12, 3)
    f = factorise(m, 'tucker2', (5,4))
    w = torch.einsum('oa,abhw,bi->oihw', f[2].weight[:,:,0,0], f[1].weight, f[0].weight[:,:,0,0]).detach().numpy()
    (core,factors),_ = partial_tucker(m.weight.detach().double().numpy(), rank=[5,4], modes=[0,1], init='svd')
    assert np.allclose(w, tl.tenalg.multi_mode_dot(core, factors, modes=[0,1]), atol=1e-4)

def test_tensor_train_is_a_matrix():
    "Layer and embedding do what the matrix does that is written out"
    m,e = nn.Linear(36, 60),nn.Embedding(60, 36)
    f,g = factorise(m, 'tensor_train', (6,5)),factorise(e, 'tensor_train', (6,5))
    with torch.no_grad():
        w = f(torch.eye(36))-f[0].bias
        x = torch.randn(4,3,36)
        assert torch.allclose(f(x), x@w+f[0].bias, atol=1e-5)
        full = g(torch.arange(60))
        i = torch.randint(60, (4,3))
        assert torch.equal(g(i), full[i]) and full.shape==(60,36)
        lost = ((m.weight-w.T)**2).sum()/(m.weight**2).sum()
        rows = rank_options(m, 'tensor_train')
        assert 0<lost<=rows[0].lost+sum(o.lost for o in rows if o.rank==(6,5))+1

def test_gradients_by_finite_differences():
    for m,kind,rank,x in ((nn.Linear(8,12),'tensor_train',(3,3),torch.randn(2,8)), (nn.Conv2d(3,4,3),'cp',3,torch.randn(1,3,5,5))):
        f = factorise(m, kind, rank).double()
        assert torch.autograd.gradcheck(f, x.double().requires_grad_())

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
    kinds_name=(noop,dict(params=.5,kinds={'2.20':'svd'}),"'2.20' matches no module. Did you mean"), exclude_number=(noop,dict(params=.5,exclude=2),"2 matches no module. Did you mean '2'"),
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
