"The house: who imports whom, and how many names a star import brings"
import ast, importlib.util
from pathlib import Path
import fastquant.all

root = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location('house', root/'scripts'/'house.py')
house = importlib.util.module_from_spec(spec)
spec.loader.exec_module(house)
trees = {k:ast.parse(s) for k,s in house.modules(root).items()}

def test_every_module_is_in_a_folder(): assert {house.folder(m) for m in trees}==set(house.order) and all('.' in m for m in trees)
def test_folders_import_only_lower_ones(): assert house.upward(trees)==[]
def test_folders_do_not_import_each_other(): assert house.cycles(trees)==[]
def test_no_underscore_name_is_borrowed(): assert house.borrowed(trees)==[]
def test_the_rules_find_what_is_wrong():
    "What each of them is to find"
    bad = {k:ast.parse(s) for k,s in {'core.a':'from ..quant.b import *', 'quant.b':'from ..core.a import _x', 'export.c':'from fastquant.learner.d import y'}.items()}
    assert house.upward(bad)==[('core','quant'),('export','learner')] and house.cycles(bad)==[('core','quant')] and house.borrowed(bad)==[('quant.b','_x')]
def test_a_star_import_brings_what_users_need():
    names = {k for k in vars(fastquant.all) if not k.startswith('_')}-house.folders(root)
    assert len(names)<=80 and {'QuantAwareCallback','PruneScheduleCallback','Spec','NM','engines','n_bytes'}<=names and not {'trace','start','steps','options'}&names
