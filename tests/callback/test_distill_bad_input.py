"Each kind of bad input to distillation gets an error that says how to go on, and leaves the Learner, and who teaches, as they were"
import copy, pytest, torch
from fastai.vision.all import CrossEntropyLossFlat, Datasets, SchedCos, load_learner, ranger, set_seed
from torch import nn
from fastquant.all import *
from tests.helpers.data import loaders, noise
from tests.helpers.learners import classifier
from tests.helpers.nets import opts, same_with_nan as same, state, two_convs

def net(mid=4, n_out=3): return two_convs(mid, 6, n_out)

def learner(model, path='.', vocab=None, **kwargs):
    set_seed(0)
    dls = loaders(noise(2, 8, 8), bs=8)
    if vocab: dls.vocab = vocab
    return classifier(dls, model, path, metrics=None, **kwargs)

opts = dict(adam=opts['adam'], ranger=ranger, torch=opts['torch'])

@pytest.fixture(params=opts)
def learn(request, tmp_path):
    learn = learner(net(), tmp_path, opt_func=opts[request.param])
    learn.fit(1, 1e-3) # so that the optimizer has something to lose
    return learn

class Alike(nn.Module):
    "A net of another kind, with a module that never runs and one that gives integers"
    def __init__(self):
        super().__init__()
        self.wide,self.flat,self.never,self.out = nn.Conv2d(2, 4, (1,8), padding=(2,0)),nn.Flatten(),nn.Linear(3, 3),nn.Linear(48, 3)
        self.ints = Ints()
    def forward(self, x): return self.out(self.flat(self.wide(x)))+0*self.ints(x)[:,None]
class Ints(nn.Module):
    def forward(self, x): return x.flatten(1).argmax(1)
class Says(nn.Module):
    "Says `o` whatever it is asked"
    def __init__(self, o):
        super().__init__()
        self.o,self.p = o,nn.Parameter(torch.zeros(1))
    def forward(self, x): return self.o

def broken(path, value=torch.nan):
    model = net(8)
    model.get_submodule(path).weight.data[0] = value
    return model

def distill(teacher, *args, **kwargs): return lambda learn: DistillCallback(teacher() if callable(teacher) and not isinstance(teacher, nn.Module) else teacher, *args, **kwargs)
def at(t): return 4*(1-t) # a temperature that goes to 0

# What shows when the callback is made

made = dict(
    teacher=(distill('resnet18'), "teacher='resnet18': pass a trained Learner or model"),
    teacher_none=(distill(None), "teacher=None: pass a trained Learner or model"),
    teacher_class=(lambda l: DistillCallback(nn.Linear), "teacher=<class .*: pass a trained"),
    temperature=(distill(net(), temperature=0), "temperature=0: a temperature divides .*must be above 0. From 2 to 8 is usual"),
    temperature_low=(distill(net(), temperature=-1.), "temperature=-1.0: .*above 0"),
    temperature_nan=(distill(net(), temperature=torch.nan), "temperature=nan: .*above 0"),
    temperature_text=(distill(net(), temperature='4'), "temperature='4': .*above 0"),
    temperature_curve=(distill(net(), temperature=SchedCos(4, 0)), "temperature=0.0 at 1.00 of the fit: .*above 0"),
    temperature_own=(distill(net(), temperature=at), "temperature=0.0 at 1.00 of the fit"),
    weight=(distill(net(), weight=30), "weight=30: pass the share of the loss that is not the labels', from 0 to 1"),
    weight_curve=(distill(net(), weight=lambda t: t-.5), "weight=-0.5 at 0.00 of the fit: pass the share"),
    loss=(distill(net(), 'soft_target'), "No distillation loss is called 'soft_target'. Did you mean 'soft_targets'.*Pass one of"),
    loss_number=(distill(net(), 3), "loss=3: pass a function of student and teacher, or the name of one: attention"),
    loss_none=(distill(net(), None), "loss=None and no features: there is nothing to learn. Pass one of them"),
    features=(distill(net(), features=3), "features=3: pass .*name or pattern.*Match"),
    features_list=(distill(net(), features=['3',None,4.5]), "features=4.5: pass .*name or pattern.*Match"),
    match_name=(lambda l: Match(3), "student=3: pass the name of a module, or a pattern"),
    match_loss=(lambda l: Match('3', loss='atention'), "Did you mean 'attention'"),
    match_weight=(lambda l: Match('3', weight=0), "weight=0: pass a positive number, or leave the match out"),
    match_weight_text=(lambda l: Match('3', weight='1'), "weight='1': pass a positive number"),
    mom=(lambda l: AverageSelfCallback(1), "mom=1: pass the share of the average that stays in each step, above 0 and below 1"),
    mom_text=(lambda l: AverageSelfCallback('soft_targets'), "mom='soft_targets': pass the share of the average"),
    heads_loss=(lambda l: SelfDistillCallback('3', None), "loss=None: heads learn from the net's outputs, so say how"),
    heads_width=(lambda l: SelfDistillCallback('3', width=0), "width=0: a head needs at least one channel"),
    heads_width_share=(lambda l: SelfDistillCallback('3', width=.5), "width=0.5: a head needs at least one channel"),
    heads_none=(lambda l: SelfDistillCallback([]), r"at=\[\]: name the modules that are to predict"),
    heads_number=(lambda l: SelfDistillCallback(3), "at=3: pass a module's name"),
    hint_number=(lambda l: SelfDistillCallback('0', hint=3), "hint=3: pass the name of a module, or a pattern"),
    hint_weight=(lambda l: SelfDistillCallback('0', hint='3', hint_weight=-1), "hint_weight=-1: pass what the difference .*0 or more"),
    nobody=(lambda l: MutualCallback(), "There is nobody to learn with: pass one or more Learners"),
    peer=(lambda l: MutualCallback('resnet18'), "peer='resnet18': pass a trained Learner or model"),
    peers_list=(lambda l: MutualCallback([net()]), r"peer=\[.*Learner or model"),
    peers_loss=(lambda l: MutualCallback(net(), loss=None), "loss=None: peers learn from each other's outputs, so say how"))

@pytest.mark.parametrize('make,say', made.values(), ids=made)
def test_made(make, say):
    with pytest.raises(ValueError, match=f'(?s){say}'): make(None)

# What shows at the start of a fit

fits = dict(
    outputs=(distill(net(n_out=5)), "student's output is 3 an item and that of the teacher 5: .*Compare features only, with loss=None, or take another"),
    outputs_none=(distill(Says({'n':torch.ones(2, dtype=torch.long)})), "The teacher gives no floating-point tensor .*dict"),
    one_number=(lambda l: DistillCallback(net(n_out=1)), "student's output is 3 an item and that of the teacher 1"),
    input=(distill(nn.Sequential(nn.Flatten(), nn.Linear(30, 3))), r"The teacher cannot be run on what the student gets, 2×8×8 an item: .*shapes cannot be multiplied.*same inputs"),
    name=(distill(net(), features='33'), "'33' matches no module of the student. Did you mean '3'.*Patterns are names as in `model.named_modules"),
    name_teacher=(distill(Alike(), features={'3':'wid'}), "'wid' matches no module of the teacher. Did you mean 'wide'"),
    name_parts=(distill(net(), features='3.*'), r"'3\.\*' matches no module of the student.* within each part"),
    many=(distill(net(), features={'[03]':'3'}), r"'\[03\]' matches 2 modules of the student \(0, 3\), but '3' 1 of the teacher \(3\). They are taken in pairs, so there must be as many"),
    size=(distill(Alike(), features={'0':'wide'}), "student's features are 4×6×6 an item and the teacher's 4×12×1, and there is no way to match.*Choose modules .*or loss='similarity'"),
    size_flat=(distill(Alike(), features={'0':'flat'}), "4×6×6 an item and the teacher's 48, and there is no way"),
    never=(distill(Alike(), features={'0':'never'}), "'never' of the teacher gave nothing when it ran.*Choose a module that runs and returns a tensor"),
    ints=(distill(Alike(), features={'0':'ints'}), "'ints' of the teacher gave nothing"),
    attention_flat=(distill(net(), features=Match('7', loss='attention')), "attention.*places.*3 an item.*Choose a module before.*loss='mse'"),
    attention_outputs=(distill(net(), 'attention'), "attention.*places.*3 an item"),
    no_number=(distill(net(), lambda s,t: (s-t).square().mean(1)), "does not give one number, but a tensor of shape 2: take the mean over the items"),
    loss_nan=(distill(net(), lambda s,t: (s-t).mean()/0*0), "gives nan on the training data"),
    itself=(lambda l: DistillCallback(l), "The teacher is the student itself.*Pass a copy, `DistillCallback\\(copy_model.*or see `PastSelfCallback`"),
    its_model=(lambda l: DistillCallback(l.model), "The teacher is the student itself"),
    nan=(distill(lambda: broken('7')), "The teacher gives NaN or infinity on the training data.*Look at its weights, or load them again"),
    inf=(distill(lambda: broken('7', torch.inf)), "The teacher gives NaN or infinity"),
    nan_features=(distill(lambda: broken('3'), None, features='3'), "The teacher gives NaN or infinity"),
    heads_name=(lambda l: SelfDistillCallback('33'), "'33' matches no module of the model. Did you mean '3'"),
    hint_name=(lambda l: SelfDistillCallback('0', hint='33'), "'33' matches no module of the model. Did you mean '3'"),
    hint_many=(lambda l: SelfDistillCallback('0', hint='[35]'), r"hint='\[35\]' matches 2 modules \(3, 5\): name one"),
    peer_outputs=(lambda l: MutualCallback(net(n_out=5)), "student's output is 3 an item and that of a peer 5.*Take another"),
    peer_nan=(lambda l: MutualCallback(net(), broken('7')), "A peer gives NaN or infinity"),
    peer_itself=(lambda l: MutualCallback(l), "A model is its own peer.*Every Learner needs a model of its own"),
    peer_twice=(lambda l: MutualCallback(*[net()]*2), "A model is its own peer"),
    peer_input=(lambda l: MutualCallback(nn.Sequential(nn.Flatten(), nn.Linear(30, 3))), "A peer cannot be run on what the student gets"))

def all_of(learn):
    "Whatever a fit could have changed about a Learner, to compare"
    opt = learn.opt
    groups = [[id(p) for p in ps] for ps in opt.param_lists],[dict(h) for h in opt.hypers],type(opt),copy.deepcopy(opt.state_dict()['state'])
    modes = [(k,m.training) for k,m in learn.model.named_modules()],[p.requires_grad for p in learn.model.parameters()]
    return groups,modes,list(learn.cbs),sorted(vars(learn)),len(torch.nn.modules.module._global_forward_hooks)
def check_same(learn, was):
    now = all_of(learn)
    assert str(now[0])==str(was[0]) and now[1:]==was[1:]

@pytest.mark.parametrize('make,say', fits.values(), ids=fits)
def test_fit(learn, make, say):
    "Before the first batch; and a fit with another teacher goes on from there"
    cb = make(learn)
    others = [m if isinstance(m, nn.Module) else m.model for m in (*getattr(cb, 'peers', ()),getattr(cb, 'teacher', None)) if m is not None]
    weights,theirs,was = state(learn.model),[state(m) for m in others],all_of(learn)
    with pytest.raises(ValueError, match=f'(?s){say}'): learn.fit(1, 1e-3, cbs=cb)
    assert same(state(learn.model), weights) and all(same(state(m), s) for m,s in zip(others, theirs))
    assert cb.learn is None
    learn.model.train(was[1][0][0][1])
    check_same(learn, was)
    learn.fit(1, 1e-3, cbs=DistillCallback(net(8)))
    assert not same(state(learn.model), weights)

def test_student_with_nan(learn):
    "A student that is lost learns nothing from anybody"
    learn.model[3].weight.data[0] = torch.nan
    was = state(learn.model)
    for cb in (DistillCallback(net()),DistillCallback(net(), None, features='0'),AverageSelfCallback(),SelfDistillCallback('0'),MutualCallback(net())):
        with pytest.raises(ValueError, match='NaN or infinity on the training data.*load them again'): learn.fit(1, cbs=cb)
        assert same(state(learn.model), was)

def test_other_classes(tmp_path):
    student,teacher = learner(net(), tmp_path, ['a','b','c']),learner(net(), tmp_path, ['a','c','b'])
    student.fit(1)
    weights,was = state(student.model),all_of(student)
    with pytest.raises(ValueError, match=r"The teacher predicts other classes than the student: \['a', 'c', 'b'\], not \['a', 'b', 'c'\].*teacher's model"): student.fit(1, cbs=DistillCallback(teacher))
    assert same(state(student.model), weights)
    check_same(student, was)
    student.fit(1, cbs=DistillCallback(teacher.model)) # who knows better passes the model

def picture(i): return torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(i))
def label(i): return torch.tensor(i%3)

@pytest.mark.parametrize('make', [lambda: DistillCallback(net(8)), lambda: MutualCallback(net())], ids=['teacher','peers'])
def test_nobody_after_export(learn, make):
    "What was exported with the callback on it says that somebody is missing, and how to go on"
    learn.dls = Datasets(range(32), [[picture],[label]], splits=[range(24),range(24,32)]).dataloaders(bs=8, device='cpu', num_workers=0)
    learn.add_cb(make())
    learn.export('e.pkl')
    loaded = load_learner(learn.path/'e.pkl')
    loaded.dls = learn.dls
    loaded.create_opt()
    weights = state(loaded.model)
    with pytest.raises(ValueError, match=r"not in an exported file. Take this callback off with `learn.remove_cb\((Distill|Mutual)Callback\)`, and pass a new one"): loaded.fit(1)
    assert same(state(loaded.model), weights) and len(loaded.opt.param_lists)==1
    loaded.remove_cb(type(make()))
    loaded.fit(1, cbs=make())
    assert not same(state(loaded.model), weights)

def test_regression_and_softmax(tmp_path):
    "The softmax of one number is 1 whatever it is"
    learn = learner(net(n_out=1), tmp_path)
    for cb in (DistillCallback(net(n_out=1)),SelfDistillCallback('0'),MutualCallback(net(n_out=1))):
        with pytest.raises(ValueError, match="The output is one number an item, of which the softmax is always 1. Use loss='soft_labels'.*loss='mse'"): learn.fit(1, cbs=cb)

def test_hint_of_another_size(tmp_path):
    learn = learner(Alike(), tmp_path)
    with pytest.raises(ValueError, match="no way to match"): learn.fit(1, cbs=SelfDistillCallback('flat', hint='wide'))

def test_heads_for_pixels(tmp_path):
    learn = learner(nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 3, 3)), tmp_path)
    learn.loss_func = CrossEntropyLossFlat(axis=1)
    with pytest.raises(ValueError, match="Heads predict one vector an item, and this model 3×4×4. `PastSelfCallback` and `AverageSelfCallback` work"): learn.fit(1, cbs=SelfDistillCallback('0'))

def test_peer_that_runs_a_file(learn):
    q = learn.quantize(timed=False)
    with pytest.raises(ValueError, match='A peer runs a file, which learns nothing'): MutualCallback(q)
    learn.fit(1, 1e-3, cbs=DistillCallback(q))
