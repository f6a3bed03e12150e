"One fact, one value: what settings.ini, pyproject.toml and the package itself say of the project."
import json, re, tomllib
from configparser import ConfigParser
from importlib.metadata import metadata, requires
from pathlib import Path

import fastquant, pandas as pd, pytest

root = Path(__file__).parent.parent
proj = tomllib.loads((root/'pyproject.toml').read_text(encoding='utf-8'))['project']
suffix = '_requirements'

@pytest.fixture
def cfg():
    c = ConfigParser(delimiters=['='], interpolation=None)
    c.read(root/'settings.ini', encoding='utf-8')
    return c['DEFAULT']

def test_names_agree(cfg): assert proj['name']==cfg['lib_name']==metadata('fastquant')['Name']
def test_version_is_the_packages(): assert metadata('fastquant')['Version']==fastquant.__version__
def test_requirements_come_from_settings(cfg):
    marker = lambda k: f'extra == "{k.removesuffix(suffix)}"' if k.endswith(suffix) else ''
    stated = {(r,marker(k)) for k in cfg if k.endswith('requirements') for r in cfg[k].split()}
    assert {tuple(map(str.strip, (r+';').split(';')[:2])) for r in requires('fastquant')} == stated
def test_every_extra_is_there(cfg):
    assert set(metadata('fastquant').get_all('Provides-Extra')) == {k.removesuffix(suffix) for k in cfg if k.endswith(suffix)}
def test_nothing_stated_twice(cfg):
    assert not {'version','description','min_python','git_url','doc_host'} & set(cfg), 'pyproject.toml or __init__.py already says it'
    assert not {'dependencies','optional-dependencies','authors','version'} & set(proj)

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
