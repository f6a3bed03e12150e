"""Measure the house: layers, lengths, density, names. Anyone can run it, on this or on another commit.

    python scripts/house.py                 # this checkout
    python scripts/house.py FOLDER          # another checkout, measured with the same rules

Only files are read, nothing is imported, but for the number of names in `fastquant.all`.
"""
import ast, json, re, subprocess, sys
from pathlib import Path
from statistics import median, quantiles

order = 'core quant lowrank distill prune export app callback learner'.split()
functions = ast.FunctionDef,ast.AsyncFunctionDef
wide = 120

def modules(root):
    "The modules of the package by dotted name, without what nbdev writes for itself"
    files = [f for f in sorted((root/'fastquant').rglob('*.py')) if f.name not in ('_modidx.py','__init__.py','all.py','runtime.py')]
    return {'.'.join(f.relative_to(root/'fastquant').with_suffix('').parts):f.read_text(encoding='utf-8') for f in files}

def imports(name, tree):
    "Modules of the package that the module `name` imports from, with the names it takes"
    here = name.split('.')
    for n in ast.walk(tree):
        if not isinstance(n, ast.ImportFrom): continue
        path = (n.module or '').split('.')
        if n.level: yield '.'.join([*here[:len(here)-n.level], *filter(None, path)]),[a.name for a in n.names]
        elif path[0]=='fastquant': yield '.'.join(path[1:]),[a.name for a in n.names]

def folder(name): return name.partition('.')[0]

def folders(root):
    "What importing the package leaves in its namespace besides names: its folders"
    return {f.name for f in (root/'fastquant').iterdir() if f.is_dir()}

def arrows(trees):
    "Pairs of folders of which the first imports the second"
    return {(folder(m),folder(to)) for m,t in trees.items() for to,_ in imports(m, t) if '.' in m and to and folder(m)!=folder(to)}

def upward(trees):
    "Arrows that lead up; all that are between folders which `order` does not know"
    rank = {f:i for i,f in enumerate(order)}
    return sorted((a,b) for a,b in arrows(trees) if rank.get(b, 0)>rank.get(a, len(order)))

def cycles(trees):
    "Folders that import each other"
    found = arrows(trees)
    return sorted((a,b) for a,b in found if a<b and (b,a) in found)

def borrowed(trees):
    "Underscore names that one module imports from another"
    return [(m,n) for m,t in trees.items() for _,names in imports(m, t) for n in names if n.startswith('_') and not n.startswith('__')]

def private(tree):
    "Uses of private attributes of others"
    mine = 'self','cls'
    attrs = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and re.match('_[^_]', n.attr)]
    return [n for n in attrs if not (isinstance(n.value, ast.Name) and n.value.id in mine)]

def is_docstring(n): return isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant) and isinstance(n.value.value, str)

def statements(tree):
    "Nodes of each simple statement: an assignment, an expression, a return, a raise"
    simple = ast.Assign,ast.AugAssign,ast.AnnAssign,ast.Expr,ast.Return,ast.Raise,ast.Assert
    return [len(list(ast.walk(n))) for n in ast.walk(tree) if isinstance(n, simple) and not is_docstring(n)]

def lengths(tree):
    "Lines of each function's body, without its docstring"
    for n in ast.walk(tree):
        if not isinstance(n, functions): continue
        body = [s for s in n.body if not is_docstring(s)] or n.body
        yield body[-1].end_lineno-body[0].lineno+1

def is_all(n): return isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name) and n.targets[0].id=='__all__'

def too_wide(src, tree):
    "Lines over 120 columns that are neither of a signature (a dataclass's fields are one), nor of a message, nor written by nbdev"
    spared = set()
    def spare(a, b): spared.update(range(a, b+1))
    for n in ast.walk(tree):
        if isinstance(n, functions): spare(n.lineno, n.body[0].lineno-1)
        if isinstance(n, ast.Raise) or is_all(n): spare(n.lineno, n.end_lineno)
        if isinstance(n, ast.ClassDef): [spare(f.lineno, f.end_lineno) for f in n.body if isinstance(f, ast.AnnAssign)]
        if isinstance(n, ast.Constant) and isinstance(n.value, str) and len(n.value)>60: spare(n.lineno, n.end_lineno)
    return [i for i,l in enumerate(src.splitlines(), 1) if len(l)>wide and i not in spared and not re.match(r'\s*#', l)]

def code_lines(src): return sum(bool(l.strip()) and not l.strip().startswith('#') for l in src.splitlines())

def cells_to_assertion(nb):
    "How many cells, prose included, each exported cell with a definition is from the next assertion"
    cells = [(c['cell_type']=='code', ''.join(c['source'])) for c in nb['cells']]
    exported = [code and bool(re.search(r'^#\|\s*export', s, re.M)) for code,s in cells]
    tests = [i for i,(code,s) in enumerate(cells) if code and not exported[i] and re.search(r'\b(assert|test_\w+|expect_fail)\b', s)]
    defs = [i for i,(_,s) in enumerate(cells) if exported[i] and re.search(r'^(def|class) ', s, re.M)]
    return [next((t for t in tests if t>i), len(cells))-i for i in defs]

def p90(xs): return quantiles(xs, n=10)[-1]

def star_names(root):
    code = 'ns={}; exec("from fastquant.all import *", ns); print(len(ns)-1)'
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], cwd=root, capture_output=True, text=True, env={'PYTHONPATH':str(root)}, check=True)
    return int(done.stdout)

def measure(root):
    "The table of the house, by what is measured"
    srcs = modules(root)
    trees = {k:ast.parse(s) for k,s in srcs.items()}
    n_lines,n_code = (sum(map(f, srcs.values())) for f in (lambda s: len(s.splitlines()), code_lines))
    longest = max(srcs, key=lambda k: len(srcs[k].splitlines()))
    body = [n for t in trees.values() for n in lengths(t)]
    nbs = {f.stem:cells_to_assertion(json.loads(f.read_text(encoding='utf-8'))) for f in sorted((root/'nbs').rglob('[0-9]*.ipynb'))}
    worst = max((k for k,v in nbs.items() if v), key=lambda k: median(nbs[k]))
    flat = any('.' not in m for m in trees)
    return {'arrows up between folders':'no folders' if flat else f'{len(upward(trees))} {upward(trees) or ""}', 'cycles between folders':f'{len(cycles(trees))} {cycles(trees) or ""}',
        'longest module, lines':f'{len(srcs[longest].splitlines())} ({longest})',
        'lines over 120 columns, messages and signatures aside, %':f'{100*sum(len(too_wide(s, trees[k])) for k,s in srcs.items())/n_code:.1f}',
        'syntax nodes a statement, p90':f'{p90([n for t in trees.values() for n in statements(t)]):.0f}',
        'names in fastquant.all':star_names(root), 'underscore names from another module':f'{len(borrowed(trees))} {borrowed(trees) or ""}',
        'private attributes of others, a thousand lines':f'{1000*sum(len(private(t)) for t in trees.values())/n_lines:.1f}',
        'cells to the next assertion, worst notebook':f'{median(nbs[worst]):.0f} ({worst})', 'function lines: median, p90, most':f'{median(body):.0f}, {p90(body):.0f}, {max(body)}',
        'lines in all':n_lines}

if __name__=='__main__':
    root = Path(sys.argv[1] if len(sys.argv)>1 else Path(__file__).parent.parent).resolve()
    for k,v in measure(root).items(): print(f'{k:58}{v}')
