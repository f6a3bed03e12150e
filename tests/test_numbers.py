"Every number in prose that looks measured comes from a cell of its page or from a committed result"
import functools, json, re
from pathlib import Path
import pytest

root = Path(__file__).parent.parent
pages = sorted(root.glob('nbs/*.ipynb'))
quoted = re.compile(r'```.*?```|`[^`]*`|\$\$.*?\$\$|\$[^$\n]*\$|\]\([^)]*\)|^\s*#.*$', re.S|re.M)
number = r'(?:\d+(?:,\d{3})*)?\.?\d+'
# A decimal number, or one with a unit of what is measured; versions, years, bits, equations and sections are none
measured = re.compile(rf'(?<![\w.,-])({number})(?=\s?(?:%|dB\b|ms\b|kB\b|MB\b|seconds\b|points?\b|percent\b|s\b|x\b|times\b))|(?<![\w.,-])(\d+\.\d+)(?![\w.])')
said = re.compile(r'(?:Python|ONNX Runtime|ONNX|torch|numpy|opset|version|eq\.|eqs\.|section|from|at least) $')
# What is true by definition, was decided by who wrote the page, or is the difference of two numbers in a cell
known = {'10_glossary.ipynb':{'20','40'}, '70_benchmarks.ipynb':{'10'}, '80_howto.int8.ipynb':{'95'}, '81_howto.accuracy.ipynb':{'6','20','40'}, '86_howto.supported.ipynb':{'10'}, '90_lesson.quant.ipynb':{'6','40','6.02'},
    '94_lesson.distill.ipynb':{'1.2'}, '97_lesson.binary.ipynb':{'4.4'}}

def prose(cells): return [quoted.sub(' ', ''.join(c['source'])) for c in cells if c['cell_type']=='markdown']
def numbers(text): return {float(n.replace(',', '')) for n in re.findall(number, text)}
def shown(cells): return numbers(' '.join(''.join(c['source'])+json.dumps([{k:v for k,v in o.get('data', {}).items() if k.startswith('text')} or o.get('text') for o in c['outputs']])
    for c in cells if c['cell_type']=='code'))

@functools.cache
def committed(): return numbers(' '.join(f.read_text() for f in root.glob('benchmarks/results/*.json')))

def is_one_of(n, values):
    "Whether `n`, as it is written, is one of `values` to as many digits, or as a share of it in percent"
    digits = len(n.partition('.')[2])
    value = float(n.replace(',', ''))
    return any(round(v*k, digits)==value for v in values for k in (1,100))

def made_up(cells, allowed=()):
    "Numbers in the prose of a notebook's `cells` that nothing stands behind, with the words around"
    own = shown(cells)
    for text in prose(cells):
        for m in measured.finditer(text):
            n = m[1] or m[2]
            if n in allowed or m[2] and said.search(text[:m.start()]) or is_one_of(n, own): continue
            if len(re.sub(r'\D', '', n).lstrip('0'))<3 or not is_one_of(n, committed()): yield ' '.join(text[max(0, m.start()-50):m.end()+20].split())

@pytest.mark.parametrize('page', pages, ids=lambda f: f.stem)
def test_numbers_have_a_source(page):
    assert not list(made_up(json.loads(page.read_text(encoding='utf-8'))['cells'], known.get(page.name, ())))

def test_what_is_made_up_is_found():
    text = lambda s: dict(cell_type='markdown', source=[s])
    cell = dict(cell_type='code', source=['1+1'], outputs=[dict(text=['lost 0.0731'])])
    assert len(list(made_up([text('It is 8.7 times faster, loses 12 % and takes 7,319.4 s')])))==3
    assert not list(made_up([text('7.3 % are lost, or 0.07; in 2019, with 8 bits and ONNX Runtime 1.16, as `f(3.5)` says'), cell]))
