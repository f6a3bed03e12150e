"Each kind of bad input to pruning gets an error that says how to go on, and leaves the Learner and the disk as they were"
import json, pytest, torch
import torch.nn.functional as F
from fastai.vision.all import DataLoaders, noop, set_seed
from safetensors.torch import save
from fastquant.all import *
from fastquant.export.sparse import decode, from_sparse, to_sparse
from tests.helpers.data import loaders, noise
from tests.helpers.learners import classifier
from tests.helpers.nets import same, same_with_nan, state, two_convs

@pytest.fixture
def learn(tmp_path):
    set_seed(0)
    return classifier(loaders(noise(2, 8, 8), bs=8), two_convs(8, 6), tmp_path)

amounts = {30:'so 0.3 for 30%', -.2:'above 0 and below 1', 1.:'leaves nothing', 0:'above 0 and below 1', 300:'above 0 and below 1', 'x':'pass the share', float('nan'):'above 0'}

@pytest.mark.parametrize('amount', amounts, ids=str)
def test_amounts(learn, amount):
    by_pattern = lambda a: PruneScheduleCallback({'0':a}),lambda a: learn.prune({'0':a})
    for f in (learn.prune, PruneScheduleCallback, *by_pattern, RigLCallback, lambda a: learn.lottery_ticket(a, 1), lambda a: learn.prune_sensitivity((a,))):
        with pytest.raises(ValueError, match=amounts[amount]): f(amount)
    assert masked(learn.model)=={}

def nan_weight(l): l.model[3].weight.data[1] = torch.nan
def freeze(l): [p.requires_grad_(False) for p in l.model[:7].parameters()]
def tiny(l): l.model[0].weight.data.mul_(1e-6)

cases = dict(
    layer_gone=(tiny, dict(amount=.8), "Nothing would be left of '0'. Prune less, exclude it, or .* scope='local'"),
    nan=(nan_weight, dict(amount=.5), "The scores of '3' are NaN"),
    no_gradient=(freeze, dict(amount=.5, criterion='taylor'), "needs the loss's gradient, and '0' has none: it did not run, or is frozen"),
    nm_by_name=(noop, dict(amount={'0':.5}, structure=NM(2,4)), "'0' cannot be pruned: its 2 inputs cannot be divided by 4"),
    nm_nowhere=(noop, dict(structure=NM(8,16)), "nothing to prune in Sequential: '0': its 2 inputs cannot be divided by 16"),
    nm_amount=(noop, dict(amount=.9, structure=NM(2,4)), "prunes 0.5 of all weights, neither more nor less"),
    no_pattern=(noop, dict(amount=.5, exclude='head'), "'head' matches no module"),
    no_kernel=(noop, dict(amount={'7':.5}, structure='kernel'), "'7' cannot be pruned: it has no kernels"),
    no_layer=(noop, dict(amount=.5, exclude=['0','3']), "nothing to prune in Sequential: '0': excluded; '3': excluded; '7': it is the last layer"),
    no_criterion=(noop, dict(amount=.5, criterion='magnitud'), "No criterion is called 'magnitud'. Did you mean 'magnitude'"),
    no_structure=(noop, dict(amount=.5, structure='filtr'), "No structure is called 'filtr'. Did you mean 'filter'"),
    no_scope=(noop, dict(amount=.5, scope='globl'), "scope='globl'"),
    bad_scores=(noop, dict(amount=.5, criterion=lambda w: w), "must give one score for each of the"),
    bad_statistic=(noop, dict(amount=.5, criterion=lambda w, hessian: w), "asks for 'hessian'"))

@pytest.mark.parametrize('case', cases)
def test_prune(learn, case):
    change,kwargs,message = cases[case]
    change(learn)
    before = state(learn.model)
    with pytest.raises(ValueError, match=message): learn.prune(**kwargs, fname='m.safetensors')
    assert same_with_nan(state(learn.model), before) and masked(learn.model)=={}
    assert not list(learn.path.glob('*.safetensors'))

def test_gradients_of_data_that_say_how_many_inputs_they_have(learn):
    "Whoever says so on `dls` alone is heard"
    items = [(x,y,y) for x,y in learn.dls.train_ds]
    dls = DataLoaders.from_dsets(items, items, bs=8, device='cpu', num_workers=0)
    dls.n_inp = 1
    two = classifier(dls, two_convs(8, 6), learn.path, loss_func=lambda p,a,b: F.cross_entropy(p, a)+F.cross_entropy(p, b), metrics=None)
    assert .45<sparsity(two.prune(.5, criterion='taylor').model)<.55

@pytest.mark.parametrize('case', [k for k in cases if k not in ('no_gradient','layer_gone')])
def test_fit(learn, case):
    "In a fit: before anything is pruned"
    change,kwargs,message = cases[case]
    change(learn)
    with pytest.raises(ValueError, match=message): learn.fit(1, 1e-9, cbs=PruneScheduleCallback(**kwargs, schedule='one_shot'))
    assert sparsity(learn.model)==0
    learn.fit(1)

schedules_ = dict(order=(dict(start=.9, end=.1), 'the start comes first'), negative=(dict(start=-.1), 'parts of the fit from 0 to 1'), beyond=(dict(end=1.2), 'parts of the fit'),
    half=(dict(schedule=lambda p: p/2), 'ends at 0.5'), unknown=(dict(schedule='cubik'), "Did you mean 'cubic'"), never=(dict(every=0), 'every=0'),
    overshoot=(dict(schedule=lambda p: 3*p-2*p*p), 'stays from 0 to 1'))

@pytest.mark.parametrize('case', schedules_)
def test_schedules(case):
    kwargs,message = schedules_[case]
    with pytest.raises(ValueError, match=message): PruneScheduleCallback(.5, **kwargs)

def test_left_out_layers_are_named(learn):
    cb = PruneScheduleCallback(structure=NM(2,4))
    learn.fit(1, cbs=cb)
    assert cb.left_alone=={'0':'its 2 inputs cannot be divided by 4', '7':'it is the last layer'} and list(masked(learn.model))==['3']

def test_file(learn):
    "A file that is cut off, changed, somebody else's, or too large: refused, and nothing is loaded"
    learn.prune(.5, fname='m.safetensors')
    data = (learn.path/'m.safetensors').read_bytes()
    before = state(learn.model)
    header = int.from_bytes(data[:8], 'little')
    for at in (header+8, header+300, len(data)-1):
        bad = bytearray(data)
        bad[at] ^= 255
        (learn.path/'bad.safetensors').write_bytes(bad)
        with pytest.raises(ValueError, match="The tensor '.*' is damaged"): learn.load_sparse('bad.safetensors')
    for n in (0, 7, header//2, header+8, len(data)-1):
        (learn.path/'cut.safetensors').write_bytes(data[:n])
        with pytest.raises(ValueError, match='damaged or cut off'): learn.load_sparse('cut.safetensors')
    (learn.path/'other.safetensors').write_bytes(save({'0.weight':torch.ones(2)}))
    with pytest.raises(ValueError, match='holds no sparse tensors'): learn.load_sparse('other.safetensors')
    with pytest.raises(ValueError, match='more than max_bytes=100'): learn.load_sparse('m.safetensors', max_bytes=100)
    with pytest.raises(FileNotFoundError): learn.load_sparse('nowhere.safetensors')
    assert same(state(learn.model), before) and masked(learn.model)=={}

@pytest.mark.parametrize('shape,how,parts', [([2**20,2**20], 'dense', [[2**42,9]]), ([2**40], 'bitmask', [[2**37,9],[4,4]]), ([2**46], 'deltas', [[9,9],[36,9]])], ids=['dense','bitmask','deltas'])
def test_header_that_would_exhaust_memory(learn, shape, how, parts):
    facts = {'a':['float32',shape,how,parts,'0'*16]}
    ok = json.loads(to_sparse({})[8:])['__metadata__']
    data = save({'a':torch.zeros(sum(p[1] for p in parts), dtype=torch.uint8)}, {**ok, 'tensors':json.dumps(facts)})
    with pytest.raises(ValueError, match=f'unpacks to {4*torch.Size(shape).numel():,} bytes'): from_sparse(data)

def test_bomb():
    "A compressed part that unpacks to more than the file says is not unpacked"
    import zstandard
    bomb = zstandard.ZstdCompressor().compress(bytes(10**7))
    with pytest.raises(ValueError, match='another size than the file says'): decode(bomb, dict(dtype='uint8', shape=[20000], how='dense', parts=[[20000,len(bomb)]], digest=''))

def test_other_classes(learn):
    learn.prune(.5, fname='m.safetensors')
    learn.dls.vocab = ['a','b','c']
    with pytest.raises(ValueError, match='predicts other classes'): learn.load_sparse('m.safetensors')

@pytest.mark.parametrize('content', [[1,2], 5, None, {0:torch.ones(1)}], ids=str)
def test_checkpoint_that_is_none(learn, content):
    "What is in place of a model's tensors is said, and the Learner stays"
    was = state(learn.model)
    (learn.path/'models').mkdir()
    torch.save(dict(model=content, opt={}), learn.path/'models/bad.pth')
    with pytest.raises(ValueError, match='where the tensors of a model should be, by name'): learn.load('bad')
    assert same(was, state(learn.model))

def test_all_frozen(learn):
    learn.model.requires_grad_(False)
    with pytest.raises(ValueError, match='all parameters are frozen: set `requires_grad_'): learn.prune(.5, criterion='taylor')
    learn.model.requires_grad_()
    assert masked(learn.prune(.5, criterion='taylor').model)

@pytest.mark.parametrize('verb', [lambda l: l.prune(.5), lambda l: l.quantize(), lambda l: l.export_onnx(), lambda l: l.decompose(params=.5), lambda l: l.compare(l)])
def test_no_parameters(learn, verb):
    learn.model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.ReLU())
    with pytest.raises(ValueError, match='Sequential has no parameters'): verb(learn)
