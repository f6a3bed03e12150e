"The pages of the docs: what they show runs as it stands, and says nothing of the machine that it was made on"
import ast, importlib.util, json, os, re, subprocess, sys
from pathlib import Path
import pytest

root = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location('visible', root/'scripts'/'visible.py')
visible = importlib.util.module_from_spec(spec)
spec.loader.exec_module(visible)
notebooks = sorted(root.glob('nbs/**/[!_.]*.ipynb'))
name = lambda fn: fn.relative_to(root/'nbs').as_posix()
fast = '83_howto.deploy',

def lacking(fn):
    "Names that the code on a page uses, and neither it nor the imports that a page of a module begins with have made"
    first = visible.imports(fn) if visible.module(fn) else ''
    return {*visible.missing(fn)} - visible.names(first)[0]

def test_each_name_is_made_on_the_page(): assert not {name(fn):bad for fn in notebooks if (bad:=lacking(fn))}

def test_finds_what_is_missing(tmp_path):
    cells = ['#| hide\npath = 1', 'path+1', 'def f(): return g()', '#| hide\nimport os', 'os.sep\nx = [o for o in path]', '#| echo: false\nx = 2', 'x']
    (tmp_path/'bad.ipynb').write_text(json.dumps(dict(cells=[dict(cell_type='code', source=[o]) for o in cells])))
    assert lacking(tmp_path/'bad.ipynb')=={'path','g','os'} and visible.imports(tmp_path/'bad.ipynb')=='import os'

@pytest.mark.parametrize('fn', notebooks, ids=name)
def test_runs_when_it_is_copied(fn, tmp_path, request):
    if not fn.stem in fast and 'slow' not in request.config.getoption('--flags'): pytest.skip('takes long: --flags slow')
    r = subprocess.run([sys.executable, '-c', visible.code(fn)], cwd=tmp_path, capture_output=True, text=True, env={**os.environ, 'PYTHONPATH':str(root)})
    assert r.returncode==0, r.stderr[-3000:]

# What is saved in notebooks

machine = re.compile(rf'(?<![\w.~:/])/(?:home|root|tmp|var|usr|opt|mnt|work|private|Users)/|[A-Z]:\\|{re.escape(str(root))}|object at 0x|function .* at 0x')

def written(out):
    "What an output says in words"
    return [''.join(v) for v in [out.get('text', ''), *(v for k,v in out.get('data', {}).items() if k.startswith('text/'))]]

def test_no_output_names_the_machine():
    assert machine.search('in /tmp/x') and machine.search(str(root)) and not machine.search('https://arxiv.org/tmp/x')
    found = {(name(fn),c['id']):m[0] for fn in notebooks for c in json.loads(fn.read_text())['cells']
        for o in c.get('outputs', []) for s in written(o) if (m:=machine.search(s))}
    assert not found

def prints(node):
    "Whether what is run here, and not in a function that is made here, prints"
    if isinstance(node, (ast.FunctionDef,ast.ClassDef,ast.Lambda)): return False
    return isinstance(node, ast.Call) and getattr(node.func, 'id', '') in ('print','display') or any(map(prints, ast.iter_child_nodes(node)))

def says(src):
    "Whether a cell ends in a value, other than of a call, which may be None, or prints something"
    *_,last = body = ast.parse(src).body
    value = isinstance(last, ast.Expr) and not isinstance(last.value, (ast.Call,ast.Constant)) and not src.rstrip().endswith(';')
    return value or any(map(prints, body))

def silent(fn):
    "Cells of a page that say something, and of which nothing is saved"
    shown = {src for shown,_,src in visible.cells(fn) if shown and 'exec_doc' not in src}
    code = [(c,''.join(c['source'])) for c in json.loads(fn.read_text())['cells'] if c['cell_type']=='code']
    return [c['id'] for c,src in code if src in shown and not c['outputs'] and says(src)]

def test_each_output_is_saved(tmp_path):
    cells = ['x = 1\nx', 'print(1)', 'x;', 'f(x)', 'def f(x): return print(x)', '"only words"', '#| hide\nx', '#| exec_doc\nx']
    (tmp_path/'bad.ipynb').write_text(json.dumps(dict(cells=[dict(cell_type='code', id=i, source=[o], outputs=[]) for i,o in enumerate(cells)])))
    assert silent(tmp_path/'bad.ipynb')==[0,1]
    assert not {name(fn):bad for fn in notebooks if (bad:=silent(fn))}

# Where a page leads to

def prose(fn): return '\n'.join(''.join(c['source']) for c in json.loads(fn.read_text(encoding='utf-8'))['cells'] if c['cell_type']=='markdown')
def lacks(pattern, *wanted): return [name(fn) for fn in root.glob(f'nbs/{pattern}') if not all(o in prose(fn) for o in wanted)]
def test_each_how_to_says_what_to_do_next(): assert lacks('8*.ipynb', '## What do I do next?')==[]
def test_each_lesson_has_an_exercise_and_says_where_next(): assert lacks('9*.ipynb', '## Exercise', '## Where next')==[]
