"""The code that a page of the docs shows, and what it leans on: whoever copies it can run it"""
import ast, builtins, importlib, json, re, symtable
from pathlib import Path

directive = re.compile(r'^#\|[ \t]*([\w-]+):?[ \t]*(.*)$', re.M)
always = {*dir(builtins),'__name__','__file__'}

def cells(fn):
    "For each code cell of the notebook `fn`: whether the page shows it as it stands, whether it is exported, and its code"
    for c in json.loads(Path(fn).read_text(encoding='utf-8'))['cells']:
        src = ''.join(c['source'])
        if c['cell_type']!='code' or not directive.sub('', src).strip(): continue
        d = {m[1]:m[2].strip() for m in directive.finditer(src)}
        export = any(k in d for k in ('export','exporti','exports'))
        shown = 'exports' in d or not (export or 'hide' in d or 'false' in (d.get('echo'),d.get('include')))
        if not {'notest','eval'}&{*d}: yield shown,export,src

def module(fn):
    "The module that the notebook exports to, None if it is a page only"
    found = re.search(r'#\| *default_exp +([\w.]+)', Path(fn).read_text(encoding='utf-8'))
    return found and f'fastquant.{found[1]}'

def given(stmt):
    "The names that an import statement brings"
    if isinstance(stmt, ast.ImportFrom) and stmt.names[0].name=='*':
        m = importlib.import_module(stmt.module)
        return {*getattr(m, '__all__', [o for o in dir(m) if o[0]!='_'])}
    return {a.asname or a.name.partition('.')[0] for a in stmt.names}

def imports_of(src): return [o for o in ast.walk(ast.parse(src)) if isinstance(o, (ast.Import,ast.ImportFrom)) and getattr(o, 'module', '')!='__future__']

def tables(t): return [t, *(o for c in t.get_children() for o in tables(c))]

def names(src):
    "Names that a cell makes for those after it, and those that it takes from elsewhere"
    top,*inner = tables(symtable.symtable(src, 'cell', 'exec'))
    made = {s.get_name() for s in top.get_symbols() if s.is_assigned() or s.is_imported()}
    made |= {o for s in imports_of(src) for o in given(s)}
    used = {s.get_name() for s in top.get_symbols() if s.is_referenced()}
    used |= {s.get_name() for t in inner for s in t.get_symbols() if s.is_global() and s.is_referenced()}
    return made,used

def missing(fn):
    "Names that the code on the page `fn` uses and no code on it has made, in order"
    have,out = set(always),{}
    for shown,_,src in cells(fn):
        if not shown: continue
        made,used = names(src)
        have |= made
        out.update(dict.fromkeys(sorted(used-have)))
    return list(out)

def imports(fn):
    "What to import before the code on the page `fn`: its module, and what hidden and exported cells import for it"
    need,mod = {*missing(fn)},module(fn)
    out = ['from __future__ import annotations'] if any('from __future__ import annotations' in src for *_,src in cells(fn)) else []
    for shown,_,src in cells(fn):
        for s in [] if shown else imports_of(src):
            star = isinstance(s, ast.ImportFrom) and s.names[0].name=='*'
            new = given(s)&need
            if not star: s.names = [a for a in s.names if (a.asname or a.name.partition('.')[0]) in new]
            if new: out.append(ast.unparse(s))
            need -= new
    if mod:
        m = importlib.import_module(mod)
        out.append(f'from {mod} import *')
        need -= {*m.__all__}
        if inner:=sorted(o for o in need if hasattr(m, o)): out.append(f"from {mod} import {', '.join(inner)}")
    return '\n'.join(out)

def code(fn):
    "All code on the page `fn`, as a program"
    return '\n\n'.join([imports(fn), *(src for shown,_,src in cells(fn) if shown)])
