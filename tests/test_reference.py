"The reference: every public name says what it is, and is used somewhere in the docs"
import ast, importlib, inspect, json, pkgutil, re
from pathlib import Path
from fastai.basics import Learner
from fastai.learner import Recorder
import fastquant, fastquant.all, pytest

root = Path(__file__).parent.parent
modules = [m.name for m in pkgutil.walk_packages(fastquant.__path__, 'fastquant.') if not m.name.endswith(('all','runtime','_modidx')) and not m.ispkg]

def public():
    "Names of functions and classes in the modules' `__all__`, and of the methods that they add to fastai's classes"
    for m in modules:
        mod = importlib.import_module(m)
        for n in mod.__all__:
            o = getattr(mod, n)
            ours = getattr(o, '__module__', '').startswith('fastquant') # and not a class of PyTorch's, under a name of ours
            if ours and (inspect.isfunction(o) or inspect.isclass(o)): yield f'{m}.{n}',o
    for c in (Learner,Recorder):
        for n,o in vars(c).items():
            if inspect.isfunction(o) and not n.startswith('_') and o.__module__.startswith('fastquant'): yield f'{c.__name__}.{n}',o

def used():
    "Names that cells of the docs use, other than those that define the package"
    found = set()
    for f in root.glob('nbs/**/[!_.]*.ipynb'):
        for c in json.loads(f.read_text(encoding='utf-8'))['cells']:
            src = ''.join(c['source'])
            if c['cell_type']!='code' or re.search(r'^#\|\s*(export|hide)', src, re.M): continue
            tree = ast.parse(re.sub(r'^\s*[%!].*$', '', src, flags=re.M))
            found |= {n.id if isinstance(n, ast.Name) else n.attr for n in ast.walk(tree) if isinstance(n, (ast.Name,ast.Attribute))}
            found |= {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)} # what is chosen by name
    return found

names = dict(public())

# What others are made of, documented beside them: nobody calls these from outside, and the docs show what they do as a part of the whole
parts = '''agree as_float check_facts check_fit check_fits check_free check_parts check_portable create_opt cut_tensor find_rungs first_scale first_scales check_scores
    from_graph gamma_of group_pools head_group inner_graphs is_attention is_in kind_name make_ready MaskPlan naming new_names Obstacle own_outputs
    opened_by_openvino plot_channels put_all reason rename replace_layers rows_of set_constants set_integers shape_of sound_groups stay_inside steps_in take_out Tracer
    rounding_errors try_first Tried which_metric unrounded Unwatched Gather visiting warn_if_slow wants with_torch'''.split()

def test_there_are_names(): assert len(names)>100

def test_no_name_hides_another():
    "`from fastquant.all import *` would bring only the last of two"
    given = [n for m in modules for n in importlib.import_module(m).__all__]
    assert len(given)==len(set(given)), sorted({n for n in given if given.count(n)>1})

@pytest.mark.parametrize('name', names)
def test_has_a_docstring(name):
    o = names[name]
    assert o.__doc__ and len(o.__doc__)>10 and not o.__doc__.startswith(f'{o.__name__}('), 'say in a sentence what it is'

def test_every_name_has_an_example():
    found = used()
    last = {n:n.split('.')[-1] for n in names}
    assert not [n for n,l in last.items() if l not in found and l not in parts]
    assert not [p for p in parts if p in found or p not in last.values()], 'not parts any more'

def silent(o):
    "Arguments of `o` that neither a comment nor its docstring explains; those that it hands on or inherits are explained where they come from"
    if inspect.isclass(o) and not {'__init__','__dataclass_fields__'} & set(vars(o)): return []
    f = o.__init__ if inspect.isclass(o) else o
    src,doc = inspect.getsource(o),o.__doc__ or ''
    code = getattr(inspect.unwrap(f), '__code__', None)
    own = code.co_varnames[:code.co_argcount+code.co_kwonlyargcount] if code else inspect.signature(o).parameters
    of_base = {p for b in getattr(o, '__mro__', ())[1:] if inspect.isfunction(vars(b).get('__init__')) for p in inspect.signature(b).parameters}
    named = lambda p: re.search(rf'^[^#\n]*\b{p}\b[^#\n]*#\s*\S', src, re.M) or f'`{p}`' in doc
    return [p for p in own if p not in {'self','args','kwargs','cls','ctx','ax'} | of_base and not named(p)]

def test_arguments_are_explained():
    assert not {n:s for n,o in names.items() if n.split('.')[-1] not in [*parts,'load','save','fit','TeachingCallback'] and (s:=silent(o))} # fastai's own, and a base class
