"One fact, one value: what settings.ini, pyproject.toml and the package itself say of the project."
import json, re, subprocess, tomllib
from configparser import ConfigParser
from importlib.metadata import metadata, requires
from pathlib import Path

import fastquant, pandas as pd, pytest

root = Path(__file__).parent.parent
toml = tomllib.loads((root/'pyproject.toml').read_text(encoding='utf-8'))
proj,nbdev = toml['project'],toml['tool']['nbdev']
name = proj['name'] # of the distribution; the package in it is `fastquant`
suffix = '_requirements'

@pytest.fixture
def cfg():
    c = ConfigParser(delimiters=['='], interpolation=None)
    c.read(root/'settings.ini', encoding='utf-8')
    return c['DEFAULT']

def test_names_agree(cfg):
    assert name==cfg['lib_name']==metadata(name)['Name']
    assert fastquant.__name__==cfg['lib_path']==nbdev['lib_path']==nbdev['title']
def test_version_is_the_packages(): assert metadata(name)['Version']==fastquant.__version__
def test_requirements_come_from_settings(cfg):
    marker = lambda k: f'extra == "{k.removesuffix(suffix)}"' if k.endswith(suffix) else ''
    stated = {(r,marker(k)) for k in cfg if k.endswith('requirements') for r in cfg[k].split()}
    assert {tuple(map(str.strip, (r+';').split(';')[:2])) for r in requires(name)} == stated
def test_every_extra_is_there(cfg):
    assert set(metadata(name).get_all('Provides-Extra')) == {k.removesuffix(suffix) for k in cfg if k.endswith(suffix)}
def test_nothing_stated_twice(cfg):
    assert not {'version','description','min_python','git_url','doc_host'} & set(cfg), 'pyproject.toml or __init__.py already says it'
    assert not {'dependencies','optional-dependencies','authors','version'} & set(proj)

def test_nothing_says_to_install_the_other_fastquant():
    "On PyPI `fastquant` is another project: pages, messages and scripts name it in a pip command only to warn of it"
    command = re.compile(r"""(?<!not `)pip3?\s+install\b[^`|;&\n]*?[\s'"]fastquant(?![\w/-])""")
    for o in ('fastquant', '-U fastquant', "'fastquant[decompose]'", r'\"fastquant[dev]\"', '"fastquant>=1"'): assert command.search(f'`pip install {o}`')
    for o in ('.', '-e ".[dev]"', name, 'git+https://github.com/fastquant-dev/fastquant'): assert not command.search(f'pip install {o}')
    tracked = subprocess.run(['git', 'ls-files', '-z'], cwd=root, capture_output=True, text=True, check=False).stdout.split('\0')
    files = [root/o for o in tracked if Path(o).suffix in ('','.py','.ipynb','.md','.ini','.toml','.yaml') and (root/o).is_file()]
    if not files: pytest.skip('not a clone')
    found = [f'{f.relative_to(root)}: {m[0]}' for f in files for m in command.finditer(f.read_text(encoding='utf-8'))]
    assert not found, f'{found}: name {name}, or what the extra consists of'

def test_front_page_warns_of_the_other_fastquant():
    page = ''.join(''.join(c['source']) for c in json.loads((root/'nbs'/'index.ipynb').read_text(encoding='utf-8'))['cells'])
    assert 'Do not `pip install fastquant`' in page and f'`{name}`' in page
    assert f'`{name}`' in (root/'CONTRIBUTING.md').read_text(encoding='utf-8')

def test_front_page_shows_the_committed_results():
    "What the notebook computes from `benchmarks/results/` now is what its saved output, and so README.md, shows"
    cells = [c for c in json.loads((root/'nbs'/'index.ipynb').read_text(encoding='utf-8'))['cells'] if c['cell_type']=='code']
    source = {c['id']:''.join(c['source']) for c in cells}
    table, = [c for c in cells if source[c['id']].endswith('\nmeasured')]
    results = {f.stem:json.loads(f.read_text()) for f in (root/'benchmarks'/'results').glob('*.json')}
    ns = dict(pd=pd, results=results, ptq=results['ptq'], qat=results['qat'])
    exec(source[table['id']], ns)
    saved, = table['outputs']
    texts = lambda page: re.findall(r'<t[hd]>(.*?)</t[hd]>', page)
    shown = texts(''.join(saved['data']['text/html']))
    assert len(shown)>20 and shown==texts(ns['measured'].to_html()), 'run nbs/index.ipynb again'
