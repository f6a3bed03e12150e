"Files of others: whatever is done to one, it is refused by a `ValueError` that says why, or what comes out is what was in it"
import copy, json, os, random, subprocess, sys, time, tracemalloc, warnings
import numpy as np, onnx, pytest, torch
from onnx import numpy_helper as nh
from torch import nn
from fastquant.all import *
from fastquant.core.attach import load_attached, structure_steps, text_to_tensor, tensor_to_text
from fastquant.core.plain import digest_of
from fastquant.export.engine import load_engine, to_bytes
from fastquant.export.intact import seal, unseal
from fastquant.export.onnx import to_onnx
from fastquant.export.packed import decode, from_sparse, to_sparse
from fastquant.export.sparse import pack_model, unpack_model
from fastquant.lowrank.layers import factorise, find_layers, put_factors
from fastquant.prune.mask import set_mask
from fastquant.prune.recipe import Recipe, recipe_from_json
from fastquant.quant.convert import convert
from fastquant.quant.prepare import prepare
from fastquant.quant.spec import low_bits
from fastquant.quant.written import spec_from_json, spec_to_json
from tests.helpers.files import rounds

torch.manual_seed(0)
x = torch.randn(4,2,6,6)
def net():
    convs = nn.Conv2d(2,8,3),nn.BatchNorm2d(8),nn.ReLU(),nn.Conv2d(8,6,3),nn.ReLU()
    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6,3))

def simulated():
    m = net()
    for _ in range(3): m(x)
    m = rounds(m.eval(), 'int8', x)
    return convert(m)

vocab = dict(vocab=['a','b','c'])
file = to_bytes(to_onnx(simulated(), x), **vocab, preprocess=dict(size=[[2,6,6]]), report=None)

def masked_net():
    m = net()
    set_mask(m[3], torch.rand_like(m[3].weight)<.3)
    return m

def factorised_net():
    m = net().eval()
    layers,_ = find_layers(m, x)
    return put_factors(m, {k:factorise(l, f, 2 if k=='7' else (3,3)) for k,(l,f) in layers.items() if k!='0'})

cut = Recipe({'0.weight':{0:[0,2,5]}, '0.bias':{0:[0,2,5]}, **{f'1.{k}':{0:[0,2,5]} for k in ('weight','bias','running_mean','running_var')}, '3.weight':{1:[0,2,5]}},
    {'0.weight':(8,2,3,3), '0.bias':(8,), **{f'1.{k}':(8,) for k in ('weight','bias','running_mean','running_var')}, '3.weight':(6,8,3,3)})
def cut_net(): return shrink(net(), cut)
def prepared_net(): return prepare(net(), 'w4a4', x)
nets = dict(masks=masked_net, channels=cut_net, factors=factorised_net, rounding=prepared_net)

# Mutations

def flip(b, g):
    b = bytearray(b)
    for _ in range(g.choice([1,1,1,4])): b[g.randrange(len(b))] ^= 1<<g.randrange(8)
    return bytes(b)
def shorten(b, g): return b[:g.randrange(len(b))]
def drop(b, g):
    at = g.randrange(len(b))
    return b[:at]+b[at+g.randrange(1, 9):]
def double(b, g):
    at = g.randrange(len(b))
    return b[:at]+b[at:at+g.randrange(1, 9)]+b[at:]

others = [None, True, False, 0, -1, 3.5, 10**30, -10**30, float('nan'), float('inf'), '', 'x', [], {}, [[]], [None], {'':0}, '\x00', 2**31, 2**63]

def places(o, path=()):
    "Every place in plain data"
    yield path
    for k,v in o.items() if isinstance(o, dict) else enumerate(o) if isinstance(o, list) else (): yield from places(v, (*path,k))

def plain(text, g):
    "JSON with another value somewhere, a key less, or a key twice"
    o = json.loads(text)
    *path,k = g.choice([p for p in places(o) if p])
    at = o
    for p in path: at = at[p]
    what = g.choice(['other','other','less','twice'])
    if what=='less' or what=='twice' and isinstance(at, list): del at[k]
    elif what=='other': at[k] = copy.deepcopy(g.choice(others))
    else: at['twice!'] = g.choice(others)
    return json.dumps(o).replace('"twice!"', json.dumps(k))

def bytewise(b, g): return g.choice([flip,flip,shorten,drop,double])(b, g)
def textwise(t, g):
    if g.random()<.6: return plain(t, g)
    return bytewise(t.encode(), g).decode(errors='surrogateescape')

def as_tensor(b): return torch.tensor(list(b), dtype=torch.uint8)
def bits(t): return t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).tolist()
def said(model): return {k:bits(v) for k,v in model.state_dict().items()}

def read_file(b, tmp):
    (tmp/'m.onnx').write_bytes(b)
    e = load_engine(tmp/'m.onnx')
    return e(x).tolist(),e.metadata.get('vocab'),e.report
def read_sparse(b, tmp):
    tensors,about = from_sparse(b, max_bytes=2**24)
    return {k:(t.dtype,t.shape,bits(t)) for k,t in tensors.items()},about
def read_engine(b, tmp):
    e,about = unpack_model(b, None, 2**24)
    return e(x).tolist(),about

def structure(what): return tensor_to_text(nets[what]().state_dict()['structure'])
def structure_json(what): return json.loads(structure(what))['steps'][0][1]
def read_recipe(t, tmp): return recipe_from_json(t).to_json()
def read_factors(t, tmp): return structure_steps['factors'].from_json(t).to_json()
formats = dict(onnx=(lambda: file, read_file), sparse=(lambda: pack_model(masked_net(), **vocab), read_sparse))
formats |= dict(sparse_engine=(lambda: pack_model(Engine(file), **vocab), read_engine), recipe=(cut.to_json, read_recipe))
formats |= dict(factors=(lambda: structure_json('factors'), read_factors), spec=(lambda: spec_to_json(low_bits(4, 8).excluding('0')), lambda t,_: spec_from_json(t)))

@pytest.mark.parametrize('name', formats)
def test_mutations(name, tmp_path):
    "500 of each format, the same every time: a `ValueError` with something to say, or what was there before"
    make,read = formats[name]
    whole,g = make(),random.Random(0)
    want,refused = read(whole, tmp_path),0
    for i in range(500):
        bad = textwise(whole, g) if isinstance(whole, str) else bytewise(whole, g)
        try:
            with warnings.catch_warnings(): got = read(bad, tmp_path)
        except ValueError as e:
            assert type(e) is ValueError and len(str(e))>20, (i,bad,repr(e))
            refused += 1
            continue
        assert got==want, (i,bad)
    assert refused>400

@pytest.mark.parametrize('what', ['structure','fake_quant_spec','_extra_state'])
def test_mutations_of_what_is_said_in_a_state_dict(what):
    "The text in a checkpoint: refused, and the model that it was for is as it was"
    state = nets['rounding' if what=='fake_quant_spec' else 'factors']().state_dict()
    key = next(k for k in state if k.endswith(what))
    g,text = random.Random(0),tensor_to_text(state[key])
    fresh = net()
    before,mods,refused = said(fresh),list(fresh.modules()),0
    for i in range(40):
        new = plain(text, g).encode() if i%2 else bytewise(text.encode(), g)
        bad = {**state, key:as_tensor(new)}
        try: load_attached(copy.deepcopy(fresh), bad, lambda: (x,))
        except ValueError as e:
            assert type(e) is ValueError and len(str(e))>20
            with pytest.raises(ValueError): load_attached(fresh, bad, lambda: (x,))
            assert said(fresh)==before and all(a is b for a,b in zip(mods, fresh.modules(), strict=True))
            refused += 1
    assert refused>30

# A digest does not help against who can write one: fields are looked at one by one

def resealed(text, g):
    o = json.loads(plain(text, g))
    if isinstance(o, dict):
        o.pop('.digest', None)
        o['.digest'] = digest_of(o)
    return json.dumps(o)

@pytest.mark.parametrize('name', ['recipe','factors','spec'])
def test_mutations_with_a_digest_of_their_own(name):
    "What gets through is a thing of its kind, and what does not is a `ValueError`"
    make,read = formats[name]
    text,g,refused = make(),random.Random(0),0
    for i in range(500):
        try: read(resealed(text, g), None)
        except ValueError as e:
            assert type(e) is ValueError and len(str(e))>20
            refused += 1
    assert refused>200

def reread(data, change):
    p = onnx.load_from_string(data)
    change(p)
    return seal(p).SerializeToString()

def test_mutations_of_metadata(tmp_path):
    g = random.Random(0)
    for i in range(60):
        def change(p):
            o = g.choice([o for o in p.metadata_props if o.key!='digest'])
            o.value = json.dumps(g.choice(others))
        try: read_file(reread(file, change), tmp_path)
        except ValueError as e: assert type(e) is ValueError and "metadata" in str(e) or 'changed after' in str(e)

def test_mutations_of_a_graph_without_digest(tmp_path):
    "It can be wrong, but it fails as a `ValueError`"
    g,whole = random.Random(0),unseal(onnx.load_from_string(file)).SerializeToString()
    for i in range(500):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                read_file(bytewise(whole, g), tmp_path)
        except ValueError as e: assert type(e) is ValueError and len(str(e))>20

# By hand

def flipped(data, at):
    b = bytearray(data)
    b[at] ^= 0x80
    return bytes(b)

def weight_at(name):
    i = next(i for i in onnx.load_from_string(file).graph.initializer if i.name==name)
    return file.find(i.raw_data)

@pytest.mark.parametrize('name', ['0.weight','3.weight','7.weight'])
def test_a_damaged_weight_is_named(tmp_path, name):
    "In the file itself, in a state dict, in a sparse file around it, in a pickle"
    bad = flipped(file, weight_at(name)+3)
    engine = Engine(file)
    before = engine(x)
    state = {**engine.state_dict(), '_extra_state':as_tensor(bad)}
    loads = [lambda: read_file(bad, tmp_path), lambda: engine.load_state_dict(state)]
    loads += [lambda: unpack_model(pack_model(Engine(bad)), None), lambda: copy.deepcopy(Engine(bad))]
    for load in loads:
        with pytest.raises(ValueError, match='changed after it was written') as e: load()
        assert repr(name) in str(e.value)
    assert engine(x).equal(before)

def elsewhere(t, where):
    t.ClearField('raw_data')
    t.data_location = onnx.TensorProto.EXTERNAL
    for k,v in dict(location=where, offset='0', length='24').items(): t.external_data.add(key=k, value=v)

def a_weight(p, where): elsewhere(p.graph.initializer[0], where)
def a_constant(p, where):
    t = nh.from_array(np.ones(6, np.float32), 'inner')
    elsewhere(t, where)
    p.graph.node.insert(0, onnx.helper.make_node('Constant', [], ['c'], value=t))
def in_a_branch(p, where):
    a_constant(p, where)
    inner = onnx.helper.make_graph([p.graph.node.pop(0)], 'then', [], [])
    p.graph.node.insert(0, onnx.helper.make_node('If', ['input'], ['z'], then_branch=inner, else_branch=inner))
def in_a_function(p, where):
    a_constant(p, where)
    p.functions.add(name='f', domain='own').node.append(p.graph.node.pop(0))
def sparse_values(p, where): elsewhere(p.graph.sparse_initializer.add().values, where)

@pytest.mark.parametrize('where', ['secret.txt','../secret.txt','/etc/hostname'])
@pytest.mark.parametrize('put', [a_weight,a_constant,in_a_branch,in_a_function,sparse_values], ids=lambda f: f.__name__)
def test_no_other_file_is_read(tmp_path, monkeypatch, put, where):
    (tmp_path/'secret.txt').write_text('x'*100)
    monkeypatch.chdir(tmp_path)
    for s in (seal,unseal):
        p = onnx.load_from_string(file)
        put(p, where)
        data = s(p).SerializeToString()
        for load in (lambda: read_file(data, tmp_path), lambda: Engine(data)(x), lambda: unpack_model(pack_model(Engine(data)), None)):
            with pytest.raises(ValueError, match='lies in another file. fastquant reads no file but the one that it is given'): load()

def quick(f, match):
    start = time.process_time()
    with pytest.raises(ValueError, match=match): f()
    assert time.process_time()-start<1

many = '[['+','.join(map(str, range(10_000)))+']]'
@pytest.mark.parametrize('text,match', [('{"lists":[[0]],"tensors":{"0.weight":[[%d,2,3,3],{"0":0}]}}'%10**9, 'of shape'), ('{"lists":[[0]],"tensors":{"0.weight":[[%d,2,3,3],{"0":0}]}}'%10**30, 'should be a list of sizes'),
    ('{"lists":%s,"tensors":{%s}}'%(many, ','.join(f'"{i}":[[10000],{{"0":0}}]' for i in range(5000))), 'positions, more than any model'), ('['*10**6, 'cannot be read'),
    ('{"lists":[['+'9'*5000+']],"tensors":{}}', 'cannot be read'), ('{"lists":[[0,0]],"tensors":{"0.weight":[[8,2,3,3],{"0":0}]}}', 'no rising list'), ('{"lists":[[true]],"tensors":{}}', 'list of positions'),
    ('{"lists":[],"lists":[],"tensors":{}}', 'twice'), ('{"lists":[[0]],"tensors":{"0.weight":[[8,2,3,3],{" 0":0}]}}', 'A dimension'), ('null', 'should be an object'), ('{"lists":[[0]],"tensors":{"0.weight":[[8],{"0":-1}]}}', 'the number of one of')], ids=range(11))
def test_recipes_that_claim_too_much(text, match):
    "Refused in no time, on a fresh model and on one that was cut before"
    for model in (net(),cut_net()): quick(lambda: shrink(model, recipe_from_json(text)), match)
    state = {**net().state_dict(), 'channels_left':text_to_tensor(text)}
    for model in (net(),cut_net()): quick(lambda: load_attached(model, state), '.')

def test_factors_that_claim_too_much():
    state = factorised_net().state_dict()
    for rank in ([10**9,1], [2**60,2], [3], [3,3,3], [], [3.,3], ['3',3], [True,3], 3):
        text = json.dumps(dict(steps=[['factors',json.dumps({'3':dict(kind='tucker2', rank=rank)})]]))
        quick(lambda: load_attached(net(), {**state, 'structure':text_to_tensor(text)}), 'rank')
    for kind in ('Svd ', 3, None, 'nn.Linear'):
        text = json.dumps(dict(steps=[['factors',json.dumps({'3':dict(kind=kind, rank=[3,3])})]]))
        quick(lambda: load_attached(net(), {**state, 'structure':text_to_tensor(text)}), 'factorisation')

def test_nodes_that_claim_too_much(tmp_path):
    "A few bytes that a node makes terabytes of, when the file is opened"
    for kind,attrs in (('ConstantOfShape',{}),('Expand',{}),('Tile',{})):
        p = onnx.load_from_string(file)
        p.graph.initializer.extend([nh.from_array(np.array([2**20,2**20]), 'shape'), nh.from_array(np.ones((1,1), np.float32), 'one')])
        ins = ['shape'] if kind=='ConstantOfShape' else ['one','shape']
        p.graph.node.insert(0, onnx.helper.make_node(kind, ins, ['big'], **attrs))
        quick(lambda: read_file(seal(p).SerializeToString(), tmp_path), "the shape of 'big'")

def test_a_tensor_of_many_small_values_takes_little_more_than_itself():
    "Positions of values are not all in memory at once"
    n = 2**22
    facts = dict(dtype='uint8', shape=[n], how='deltas', parts=[[n,n],[n,n]], digest='')
    data = bytes(n)+bytes([1])*n
    tracemalloc.start()
    with pytest.raises(ValueError, match='checksum'): decode(data, facts)
    _,peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak<n*16

def test_fields_of_a_sparse_file():
    tensors,about = from_sparse(pack_model(masked_net(), **vocab))
    def again(**new): return to_sparse(tensors, **{**about, **new})
    wrong = [(dict(masks='3'),"'masks' in the file is '3'"), (dict(masks=['nowhere']),"One of 'masks'"), (dict(masks=[3]),"One of 'masks'"), (dict(same=[]),"'same' in the file")]
    wrong += [(dict(same={'a':'b'}),"What 'a' is the same as"), (dict(recipe=3),"'recipe' in the file"), (dict(recipe='{}'),'The recipe'), (dict(engine='nobody'),'No engine is called')]
    wrong += [(dict(engine=3),"'engine' in the file"), (dict(engine=True),'no graph among the tensors')]
    for new,match in wrong:
        model = net()
        before = said(model)
        with pytest.raises(ValueError, match=match): unpack_model(again(**new), model)
        assert said(model)==before

program = '''
import hashlib, torch
from fastquant.export.packed import to_sparse
print(hashlib.md5(to_sparse({k:torch.arange(300)%7 for k in 'cab'}, vocab=['a','b'], masks=['0'])).hexdigest())
'''
def test_the_same_bytes_for_the_same_model():
    "In other processes, with other orders of sets, and after it was loaded"
    def run(seed): return subprocess.Popen([sys.executable,'-c',program], env={**os.environ,'PYTHONHASHSEED':seed}, stdout=subprocess.PIPE, text=True)
    runs = [run(s) for s in '123']
    assert len({r.communicate()[0] for r in runs})==1
    for make in nets.values():
        data = pack_model(make(), **vocab)
        model,about = unpack_model(data, net(), batch=lambda: (x,))
        assert pack_model(model, **about)==data
    e,about = unpack_model(pack_model(Engine(file), **vocab), None)
    assert e.data==file and pack_model(e, **about)==pack_model(Engine(file), **vocab)

def test_files_of_before():
    "Without a digest they load: recipes, specs, steps, sparse files"
    def bare(text): return json.dumps({k:v for k,v in json.loads(text).items() if k!='.digest'})
    assert recipe_from_json(bare(cut.to_json()))==cut and spec_from_json(bare(spec_to_json(Spec())))==Spec()
    state = cut_net().state_dict()
    older = {**state, 'structure':text_to_tensor(json.dumps([['recipe',bare(cut.to_json())]]))}
    assert recipe_of(load_attached(net(), older))==cut
