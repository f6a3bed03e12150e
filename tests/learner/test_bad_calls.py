"What is no value for an argument of a public name gets an error of our own that names it, and leaves the Learner as it was"
import inspect, numpy as np, pandas as pd, pytest, re, torch, traceback
from fastai.vision.all import Callback, CrossEntropyLossFlat, DataLoaders, Learner, Recorder, accuracy, set_seed
from torch import nn
import fastquant.all
from fastquant.all import *
from fastquant.core.model import FileModel
from fastquant.quant.spec import find_spec

nan,inf = float('nan'),float('inf')
class Own: "An object of a kind that nothing takes"

# What is no value, by what is wanted

number = '.5',nan,inf,True,[.5],None,Own()
share = (*number,-.1,1.5)
optional = tuple(o for o in share if o is not None)
count = '2',0,-1,1.5,nan,inf,True,[2],None
count_or_0 = tuple(o for o in count if o!=0 or o is False)
flag = 'no',2,nan,None,[]
name = 3,None,True,['a']
names = 3,True,['a',3],'',[''],Own()
spec = 'int9',3,True,['int8'],Own(),nan
choice = 'nothing',3,True,['a'],Own()
module = 'resnet',3,None,nn.Linear,[nn.ReLU()]
tensor = 'x',3,None,[1.],np.ones(2)
batch = 'x',3,Own(),'nothing'
fname = 3,True,['a'],'','a\0b',Own()
data = 3,'train',True,{},Own(),[3],['ab']
free,version = ('x',3,(0,),(4,),(1.5,),(True,),[],(-1,),nan,{2:3},[(2,),(3,)],Own()),('17',12,22,17.5,nan,True,[17],0,-1,Own())
function = 3,'nothing',True,lambda: 1
curve = lambda: 1,lambda p: 'x',lambda p: nan,lambda p: None,lambda p: -p-1,lambda p: [p]
kind = 3,'Fake',None

def net():
    convs = nn.Conv2d(2, 8, 3, bias=False),nn.BatchNorm2d(8),nn.ReLU(),nn.Conv2d(8, 6, 3),nn.ReLU()
    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))

@pytest.fixture(scope='module')
def learn(tmp_path_factory):
    set_seed(0)
    items = [(torch.randn(2, 8, 8), torch.tensor(i%3)) for i in range(16)]
    dls = DataLoaders.from_dsets(items, items, bs=8, device='cpu', num_workers=0)
    learn = Learner(dls, net(), loss_func=CrossEntropyLossFlat(), metrics=accuracy, path=tmp_path_factory.mktemp('bad'))
    learn.logger = lambda o: None
    with learn.no_bar():
        learn.fit(1, cbs=PruneScheduleCallback(.2, schedule='one_shot', end=.4))
        learn.fit(1, cbs=QuantAwareCallback('w4a4', start=0., freeze_bn=.5, freeze=.6))
        learn.recorder.sparsities = [0.]
        yield learn

@pytest.fixture(scope='module')
def plain(learn):
    "A Learner whose model is plain"
    new = Learner(learn.dls, net(), loss_func=CrossEntropyLossFlat(), metrics=accuracy, path=learn.path)
    new.logger = lambda o: None
    with new.no_bar():
        new.fit(1)
        (new.path/'model.onnx').write_bytes(b'')
        yield new

# Of each public name: what is right, given a Learner `l` and one with things on its model `o`, and what is not, by argument

def x(): return torch.randn(4, 2, 8, 8)
def g(): return Grid(8)
def call(good=lambda l, o: {}, **bad): return good,bad
def of_model(**bad): return call(lambda l, o: dict(model=l.model), model=module, **bad)
def on_model(**bad): return call(lambda l, o: dict(model=o.model), model=module, **bad)
def loss(): return dict(loss=(*choice,{},{'0':'nothing'},{'0':3},{'0':None}), weight=(*share,*curve,lambda p: 2), temperature=(*number,*curve,0,-1,lambda p: 0))
def integers(): return dict(scale=tensor, zero_point=tensor, grid=(8,None,'int8'), axis=('0',1.5,nan,True,[0],None,5,-9))
def ready(): return dict(scale=torch.ones(()), zero_point=torch.zeros((), dtype=torch.int32), grid=g())
def selection(): return dict(amount=(30,0,1,'x',nan,True,[.5],{},{'0':2},{3:.5},{'':.5}), structure=choice, criterion=(*choice,lambda: 1),
    scope=choice, exclude=names, last=flag,
    target=(.5,'macs',[.5],{},{'macs':50},{'macs':nan},{'macs':'x'},{'macs':True},{'mac':.5},{3:.5}))
def table(): return pd.DataFrame({.5:[.9]}, index=['0'])

public = dict(
    Registry=call(lambda l, o: dict(kind='thing'), kind=(3,None), ok=(3,None,lambda: True)),
    evaluating=of_model(compiled=flag), copy_model=of_model(), n_bytes=of_model(), n_params=of_model(), n_macs=of_model(xb=batch),
    latency=call(lambda l, o: dict(fns={'a':lambda: 0}, n=1), fns=(3,{},[len],{'a':3},None), n=count, warmup=count_or_0, seconds=(*number,0,-1)),
    Attachment=call(),
    attach=call(lambda l, o: dict(m=nn.ReLU(), a=Attachment()), m=module, a=kind),
    attached=call(lambda l, o: dict(m=l.model, cls=Attachment), m=module, cls=kind),
    attachments=of_model(),
    restorable=call(o=(3,None,'x',len)),
    Grid=call(bits=(*count,1,9,8.), signed=flag, whole=flag),
    quantize=call(lambda l, o: dict(x=x(), **ready()), x=tensor, **integers()),
    dequantize=call(lambda l, o: dict(q=torch.ones(2, dtype=torch.int8), **{k:v for k,v in ready().items() if k!='grid'}), q=tensor,
        **{k:v for k,v in integers().items() if k!='grid'}),
    fake_quant=call(lambda l, o: dict(x=x(), **ready()), x=tensor, k=number, **{k:v for k,v in integers().items() if k!='axis'}),
    qparams=call(lambda l, o: dict(lo=-torch.ones(2), hi=torch.ones(2), grid=g()), lo=tensor, hi=(*tensor,torch.ones(3)), grid=(8,None,'int8')),
    Observer=call(n=count),
    Spec=call(weight=(8,None,'int8'), act=(8,'int8'), stream=(8,'int8'), ends=(8,'int8',TensorSpec()),
        overrides=(3,'0',(3,),(('0',3),),((3,None),),{'0':None}), portable=flag, float_bias=flag, compensate=flag, smooth=flag),
    TensorSpec=call(grid=(8,None,'int8',torch.float32), observer=(*choice,len,None), granularity=(3,'per_channel',PerChannel,None), learned=flag,
        dynamic=flag, per_channel=('x',3)),
    PerTensor=call(), PerChannel=call(), PerGroup=call(n=(*count,1)),
    low_bits=call(lambda l, o: dict(weight=4, act=4), weight=(*count,1,9), act=(*count,1,9)),
    int8=call(), int8_per_tensor=call(), int8_full=call(), int8_symmetric=call(),
    prepare=call(lambda l, o: dict(model=net(), spec='int8', xb=x()), model=module, spec=spec, xb=batch, fold=flag),
    unprepare=of_model(),
    watch=call(lambda l, o: dict(model=o.model, xb=x()), model=(*module,net()), xb=batch),
    set_ranges=on_model(), fake_quant_of=of_model(), rounding=of_model(), convert=of_model(adding=function),
    factor_recipe=of_model(),
    Match=call(lambda l, o: dict(student='0'), student=(*name,''), teacher=(3,True,['a']), loss=(*choice,None,lambda: 1), weight=(*number,0,-1)),
    agree=call(lambda l, o: dict(), what=('heigth',3,None)),
    NM=call(n=(*count,4,5), m=(*count,1)), Channel=call(round_to=count),
    plot_schedules=call(names=('cubik',3,['cubic',3],True), ax=(3,'ax')),
    masked=of_model(), sparsity=of_model(),
    set_masks=call(lambda l, o: dict(model=l.model, keep={}), model=module,
        keep=(3,None,{'9':torch.ones(1)},{'0':3},{'0':torch.ones(3)},{3:torch.ones(1)},{'0':torch.ones(8,2,3,3)},{'2':torch.ones(1)>0})),
    remove_masks=on_model(only=(3,'9',['9'],[3])),
    recipe_of=of_model(),
    shrink=call(lambda l, o: dict(model=l.model, recipe=recipe_of(l.model)), model=module, recipe=(3,None,{},'x'), opt=(3,'adam')),
    to_onnx=call(lambda l, o: dict(model=l.model, xb=x()), model=module, xb=batch, dynamic=free, opset=version),
    Engine=call(data=(3,None,'model.onnx')), Openvino=call(data=(3,None,'model.onnx')),
    load_engine=call(lambda l, o: dict(fname=l.path/'model.onnx'), fname=(*fname,None), engine=(*choice,len,None)),
    sqnr=call(lambda l, o: dict(x=torch.ones(2), y=torch.ones(2)), x=tensor, y=(*tensor,torch.ones(3))),
    ranges=call(lambda l, o: dict(), model=(*module,net())),
    FitCallback=call(),
    PTQCalibrate=call(n_batches=count, spec=(*spec,None), exclude=names),
    QuantAwareCallback=call(spec=(*spec,None), exclude=names, start=(*share,.8), freeze_bn=(*share,0), freeze=(*share,0), mom=(*share,5,-1,0),
        step_lr=(*number,0,-1)),
    PruneScheduleCallback=call(lambda l, o: dict(amount=.5), **{k:v for k,v in selection().items() if k!='target'},
        schedule=(*choice,lambda: 1,lambda p: 'x',lambda p: nan,lambda p: None,lambda p: p/2),
        start=(*share,.8), end=share, every=tuple(o for o in count if o is not None)),
    GroupLassoCallback=call(reg=(*number,0,-1), alpha=(*number,-1), exclude=names),
    RigLCallback=call(lambda l, o: dict(amount=.5), amount=(30,0,1,'x',nan,True,[.5],None), densities=('erk',3,None,lambda: 1), alpha=(*share,0,1),
        every=tuple(o for o in count if o is not None), end=(*share,0), exclude=names, last=flag),
    RewindCallback=call(step=count_or_0),
    DistillCallback=call(lambda l, o: dict(teacher=net()), teacher=module, features=(3,True,[3],{3:'a'},{'a':3},''), **loss()),
    SelfDistillCallback=call(lambda l, o: dict(at='0'), at=(*names,None,[]), width=count, hint=(3,True,['a','b']), hint_weight=(*number,*curve,-1),
        **{**loss(), 'loss':(*choice,None)}),
    PastSelfCallback=call(features=(3,True,[3]), **loss()), AverageSelfCallback=call(mom=(*share,0,1), features=(3,True,[3]), **loss()),
    MutualCallback=call(lambda l, o: dict(peers=net()), peers=module, **{**loss(), 'loss':(*choice,None)}),
    describe=call(lambda l, o: dict(), learn=(*module,net())))

methods = {
    'Sensitivity.suggest':call(lambda l, o: dict(self=Sensitivity(table(), .9, 'accuracy')), change=(*number,-1)),
    'Sensitivity.plot':call(lambda l, o: dict(self=Sensitivity(table(), .9, 'accuracy')), ax=(3,'ax')),
    'RankSensitivity.suggest':call(lambda l, o: dict(self=RankSensitivity(table(), {}, .9, 'accuracy')), change=(*number,-1)),
    'Spec.at':call(lambda l, o: dict(self=Spec()), path=name), 'Spec.excluding':call(lambda l, o: dict(self=Spec()), patterns=names),
    'TensorSpec.rows':call(lambda l, o: dict(self=TensorSpec()), w=tensor),
    'TensorSpec.from_rows':call(lambda l, o: dict(self=TensorSpec(), rows=torch.ones(1,6), shape=(2,3)), rows=tensor, shape=(3,None,'x')),
    'TensorSpec.watcher':call(lambda l, o: dict(self=TensorSpec()), n=count),
    'Match.pairs':call(lambda l, o: dict(self=Match('0'), student=l.model, teacher=l.model), student=module, teacher=module),
    'NM.__call__':call(lambda l, o: dict(self=NM(), w=x()), w=tensor),
    'Registry.find':call(lambda l, o: dict(self=criteria), o=choice), 'Registry.__call__':call(lambda l, o: dict(self=Registry('thing')),
        o=(3,None,'x')),
    'Recorder.plot_ranges':call(lambda l, o: dict(self=o.recorder), layers=names, ax=(3,'ax')),
    'Recorder.plot_sparsity':call(lambda l, o: dict(self=o.recorder), skip_start=count_or_0, ax=(3,'ax'))}

def verb(good=lambda l, o: {}, **bad): return lambda l, o: dict(self=l, **good(l, o)),bad
verbs = dict(
    quantize=verb(lambda l, o: dict(max_drop=.5), spec=spec, dl=data, n_batches=count, exclude=(*names,'head'), fname=fname, timed=flag, engine=(*choice,len,None),
        dynamic=free, opset=version, max_drop=('.5',nan,inf,True,[.5],Own(),-1,2), metric=(*choice,Own(),'acuracy'), comp=('less',max,3,True), valid=data,
        ladder=(*choice,None,lambda: 1,nan), target=(.5,'bytes',[.5],{},{'bytes':50},{'bytes':nan},{'bits':'x'},{'bits':0},{'byte':.1},{3:.5})),
    quant_sensitivity=verb(bits=('x',[],[1],[9],[nan],['a'],None,True), spec=spec, metric=(*choice,Own(),'acuracy'), dl=data, n_batches=count,
        exclude=(*names,'head'), show_plot=flag),
    export_app=verb(folder=(*fname,None), gradio=flag, page=fname), remove_quant=verb(), export_onnx=verb(fname=(*fname,None), dynamic=free, opset=version), load_onnx=verb(lambda l, o: dict(fname='model.onnx'), fname=(*fname,None),
        engine=(*choice,len,None)),
    prune=verb(lambda l, o: dict(amount=.5), **{k:v for k,v in selection().items() if k!='target'}, dl=data, n_batches=count, fname=fname),
    save_sparse=verb(fname=(*fname,None)), load_sparse=verb(lambda l, o: dict(fname='no'), fname=(*fname,None), max_bytes=count),
    prune_report=verb(show_plot=flag), channel_report=verb(show_plot=flag),
    prune_sensitivity=verb(amounts=('x',[],[2],[nan],['a'],None,True), structure=choice, criterion=(*choice,'movement',lambda: 1), dl=data,
        n_batches=count, exclude=(*names,'head'), last=flag, show_plot=flag),
    lottery_ticket=verb(lambda l, o: dict(amount=.5, n_epoch=1), amount=(30,0,1,'x',nan,True,[.5],{},{'0':2}), n_epoch=count,
        lr=('x',nan,0,-1,True,[.1]), rounds=count, rewind=(*count_or_0,99), structure=choice, scope=choice, exclude=(*names,'head'), last=flag),
    reinit=verb(),
    decompose=verb(lambda l, o: dict(energy=.9), energy=('x',nan,0,2,True,[.5]), kinds=(*choice,{'0':'nothing'},{'9':'svd'},{3:'svd'}),
        exclude=(*names,'head'), aware=flag, dl=data, n_batches=count),
    save_decomposed=verb(fname=(*fname,None)), load_decomposed=verb(lambda l, o: dict(fname='no'), fname=(*fname,None)),
    rank_sensitivity=verb(shares=('x',[],[2],[nan],['a'],None,True), kinds=(*choice,{'9':'svd'}), exclude=(*names,'head'), aware=flag, dl=data,
        n_batches=count, show_plot=flag),
    compare=verb(lambda l, o: dict(n=1), others=(3,'x',None,net()), dl=data, names=(3,['a','b'],[3],[],''), n=count, warmup=count_or_0,
        seconds=(*number,0)),
    layer_errors=verb(spec=(*spec,None), dl=data, n_batches=count, exclude=(*names,'head'), show_plot=flag),
    load=verb(lambda l, o: dict(file='no'), file=(*fname,None), strict=flag), save=verb(file=(*fname,None)), fit=verb(),
    create_opt=verb())
targets_ = dict(prune=verb(target=selection()['target']), PruneScheduleCallback=call(target=selection()['target']))
ways = dict(decompose=verb(params=('x',nan,0,2,True,[.5])), macs=verb(macs=('x',nan,0,2,True,[.5])),
    ranks=verb(ranks=(3,{},{'0':0},{'0':'x'},{'0':True},{'9':2},{3:2},{'0':None})))

calls = {**public, **methods, **{f'Learner.{k}':v for k,v in verbs.items()}, 'prune to a target':targets_['prune'],
    'a callback to a target':targets_['PruneScheduleCallback'],
    **{f'decompose by {k}':v for k,v in ways.items()}}
fs = {**{'prune to a target':Learner.prune, 'a callback to a target':PruneScheduleCallback}, **{f'decompose by {k}':Learner.decompose for k in ways}}
owners = {**vars(fastquant.all), 'Learner':Learner, 'Recorder':Recorder}

def function_of(key):
    if key in fs: return fs[key]
    owner,_,f = key.rpartition('.')
    return getattr(owners[owner] if owner else fastquant.all, f)

def tried(f, kwargs):
    "Call `f`, with the tensors of `xb` and the like where they belong"
    ps = inspect.signature(f).parameters.values() if f is not restorable else ()
    star = next((p.name for p in ps if p.kind==p.VAR_POSITIONAL), None)
    kwargs = dict(kwargs)
    rest = [kwargs.pop(star)] if star in kwargs else []
    first = [kwargs.pop(p.name) for p in ps if p.name in kwargs and p.kind==p.POSITIONAL_OR_KEYWORD] if rest else []
    if f is evaluating:
        with f(**kwargs): return
    return f(*first, *rest, **kwargs)

def state(learn):
    "Whatever a call could change about a Learner"
    opt,model = learn.opt,learn.model
    params = [p for ps in opt.param_lists for p in ps]
    groups = [list(map(id, ps)) for ps in opt.param_lists],[dict(h) for h in opt.hypers],[sorted(map(str, opt.state[p])) for p in params]
    mods = [(k,id(m),m.training,len(m._forward_pre_hooks),len(m._forward_hooks)) for k,m in model.named_modules()]
    ps = [(k,id(p),p.requires_grad) for k,p in model.named_parameters()]
    about = sorted(vars(learn)),list(learn.cbs),sorted(learn.path.rglob('*'))
    rest = *about,len(attachments(model)),model.__dict__.get('forward'),len(nn.modules.module._global_forward_hooks)
    return (groups,mods,ps,rest),{k:v.clone().nan_to_num(-7) for k,v in model.state_dict().items()}

def same(a, b): return a[0]==b[0] and a[1].keys()==b[1].keys() and all(v.equal(b[1][k]) for k,v in a[1].items())

def given(o):
    "How an error may repeat what was given, or what is in it"
    inside = [*o.items(),*o.keys(),*o.values()] if isinstance(o, dict) else list(o) if isinstance(o, (list,tuple)) else []
    return [repr(o),str(o),*(repr(i) for i in inside if i is not None)]

cases = {f'{k}-{arg}':(k,arg) for k,(_,bad) in calls.items() for arg in bad}

# Of verbs of fastai's that we add to: what is not ours
fastais = {Learner.load:('device','with_opt'), Learner.fit:('n_epoch','lr','wd','cbs','reset_opt','start_epoch'), Learner.save:('with_opt','pickle_protocol')}

def arguments(f):
    "Those of `f` that are its own, and not any layer's, function's or figure's"
    ps = inspect.signature(f).parameters.values()
    return {p.name for p in ps if p.kind!=p.VAR_KEYWORD and p.name!='self'}

def ours(o): return callable(o) and getattr(o, '__module__', '').startswith('fastquant') and not isinstance(o, Registry)
# Who makes these is the library itself
made_here = 'Report ExportMismatch MaxDropExceeded Sensitivity RankSensitivity'.split()
# Who calls what these have, fastai's events and what one's own subclasses write over, is the library too
called_here = Callback,Attachment,Observer,FileModel,Channel

def methods_of(c):
    "Public methods of the class `c` that take something, and are ours"
    own = {k:f for k,f in vars(c).items() if inspect.isfunction(f) and ours(f) and (k=='__call__' or not k.startswith('_'))}
    return {f'{c.__name__}.{k}' for k,f in own.items() if len(inspect.signature(f).parameters)>1}

def test_every_public_name_is_here():
    names = {k:o for k,o in vars(fastquant.all).items() if ours(o) and not k.startswith('_')}
    classes = [o for o in names.values() if inspect.isclass(o) and not issubclass(o, called_here)]
    found = set(names)-set(made_here) | {m for c in (Learner,Recorder,*classes) for m in methods_of(c)}
    assert not found-set(calls) and sum(len(vs) for _,bad in calls.values() for vs in bad.values())>1500

registries = {k:o for k,o in vars(fastquant.all).items() if isinstance(o, Registry)}
@pytest.mark.parametrize('name', registries)
def test_registries(name):
    find = find_spec if name=='specs' else registries[name].find
    for o in (3,None,['a'],'nothing',Own()):
        with pytest.raises((ValueError,TypeError), match='nothing' if o=='nothing' else re.escape(repr(o))): find(o)
    with pytest.raises(ValueError, match='o=3: a'): registries[name](3)

@pytest.mark.parametrize('key', [k for k in calls if k!='restorable'])
def test_every_argument_is_here(key):
    "Of a public name, or of those that it is with others"
    f = function_of(key)
    if f is FitCallback: return # has none
    bad = {a for k,(_,bad) in calls.items() for a in bad if function_of(k) is f}
    assert not arguments(f)-bad-{*fastais.get(f, ())}

def refused(l, o, key, arg, value):
    "What is wrong with how a bad value is refused; nothing is"
    good,_ = calls[key]
    before = state(l),state(o)
    try: tried(function_of(key), {**good(l, o), arg:value})
    except (ValueError,TypeError) as e:
        said,where = str(e),traceback.extract_tb(e.__traceback__)[-1].filename
        if 'fastquant/' not in where.replace('\\', '/'): return f'raised in {where}: {e}'
        if not re.search(rf'\b{arg}\b', said) and not any(v in said for v in given(value)): return f'does not say what was given: {e}'
    except Exception as e: return f'{type(e).__name__}: {e}'
    else: return 'accepted'
    if not all(map(same, before, (state(l),state(o)))): return 'the Learner is another one'

@pytest.mark.parametrize('key,arg', cases.values(), ids=cases)
def test_bad_calls(plain, learn, key, arg):
    found = {repr(v):refused(plain, learn, key, arg, v) for v in calls[key][1][arg]}
    assert not {v:why for v,why in found.items() if why}

scalars = [np.float32(.5),np.float64(.5),torch.tensor(.5),np.array(.5)]
@pytest.mark.parametrize('half', scalars, ids=lambda o: type(o).__name__)
def test_scalars_are_welcome(plain, half):
    "Whose numbers they are does not matter"
    one,eight = (np.int64(1),np.int32(8)) if isinstance(half, np.generic) else (torch.tensor(1),torch.tensor(8))
    assert PruneScheduleCallback(half, start=half*0, end=half, every=one, last=np.bool_(False)).selection.amount==.5
    assert QuantAwareCallback(start=half*0, freeze_bn=half, freeze=half, mom=half, step_lr=half).mom==.5
    assert RigLCallback(half, alpha=half, end=half, every=one).alpha==.5 and GroupLassoCallback(half, half).reg==.5
    assert DistillCallback(net(), weight=half, temperature=half).weight==.5 and AverageSelfCallback(half).mom==.5
    assert Grid(eight)==Grid(8) and NM(one, eight)==NM(1, 8) and Channel(eight)==Channel(8) and PerGroup(eight)==PerGroup(8)
    assert 0<sparsity(plain.prune(half, n_batches=one).model)<1 and plain.prune({'3':half}).model
    assert RewindCallback(one).step==1 and PTQCalibrate(one).n_batches==1 and plain.decompose(ranks={'3':one}).not_factorised
