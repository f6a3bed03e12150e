"Let pytest run the notebooks in nbs/ as nbdev-test does: one test a notebook, each in a process of its own."
import ctypes, gc, io, multiprocessing as mp, os, sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

# Before anything imports torch or matplotlib, so that a bare `pytest` and the processes it starts have them too
os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('MALLOC_ARENA_MAX', '2') # threads of engines leave little behind that nobody can use
os.environ['MPLBACKEND'] = 'agg'
os.environ.setdefault('CUDA_VISIBLE_DEVICES', '-1') # tests compare to the bit; tests/test_device.py looks for a GPU by itself

import pytest
from nbdev.config import get_config

pytest.register_assert_rewrite('tests.helpers')

def start_from(seed):
    "Chance is the same in each run, whatever ran before: fastai shuffles by Python's own `random`"
    from fastai.torch_core import set_seed
    set_seed(seed)

def run_nb(path, seed, kwargs):
    "Whether the notebook ran, and what it wrote to standard error"
    from nbdev.test import test_nb
    start_from(seed)
    mp.set_start_method('fork', force=True) # workers of DataLoaders start at once, as they do in a notebook; from the server they take seconds
    sys.__stderr__ = err = io.StringIO()
    ok,_ = test_nb(path, **kwargs)
    return ok,err.getvalue()

def pytest_addoption(parser):
    parser.addoption('--flags', default='', help='nbdev test flags to run that are normally skipped, e.g. "slow"')
    parser.addoption('--seed', type=int, default=0, help='what chance starts from, in each test and notebook anew: with another one all of them have to pass too')
    parser.addoption('--write-support', action='store_true', help='write tests/support.json, which the docs show, instead of comparing with it')

def pytest_configure(config):
    # The server imports what takes long once; every notebook starts as a fork of it, so that none leans on what another did.
    mp.set_forkserver_preload('fastai.vision.all nbdev.test onnxscript onnxruntime torch._dynamo torch.onnx sklearn.datasets'.split())
    config.nb_context = mp.get_context('forkserver')

def resident(): return int(Path('/proc/self/statm').read_text().split()[1])*os.sysconf('SC_PAGE_SIZE')

def pytest_collection_finish(session):
    gc.freeze() # what was imported stays, so that looking for garbage is quick
    session.config.enough = 0

@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item): start_from(item.config.getoption('--seed'))

@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    "Free what tests have left, if it is much: Learners go round in circles, so they stay until somebody looks, and memory of PyTorch's makes nobody look"
    done = yield
    if sys.platform=='linux' and resident()>item.config.enough:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        item.config.enough = resident()+2**27
    return done

def pytest_collect_file(file_path, parent):
    hidden = any(o[0] in '_.' for o in file_path.relative_to(parent.config.rootpath).parts) # built docs, checkpoints
    if file_path.suffix=='.ipynb' and not hidden: return Notebook.from_parent(parent, path=file_path)

class Notebook(pytest.File):
    def collect(self): yield NotebookTest.from_parent(self, name='cells')

class NotebookTest(pytest.Item):
    def runtest(self):
        cfg,seed,flags = get_config(self.path.parent),self.config.getoption('--seed'),self.config.getoption('--flags').split()
        kwargs = dict(skip_flags=cfg.tst_flags, force_flags=flags, basepath=cfg.config_path, cell_timeout=cfg.cell_timeout)
        with ProcessPoolExecutor(1, mp_context=self.config.nb_context) as pool: ok,err = pool.submit(run_nb, self.path, seed, kwargs).result()
        if not ok: pytest.fail(err, pytrace=False)
    def reportinfo(self): return self.path,None,self.path.name
