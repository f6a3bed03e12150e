"Learners on another device than the CPU do what they do on the CPU: on a GPU if there is one, and else on a device that only refuses what a GPU refuses"
import json, os, subprocess, sys
import pytest
from torch.utils import backend_registration
from tests.helpers.elsewhere import checks

pytestmark = pytest.mark.skipif(not hasattr(backend_registration, '_setup_privateuseone_for_python_backend'), reason='this PyTorch takes no device that is written in Python')

@pytest.fixture(scope='module')
def found():
    "By check: the device, and what the Learner loses and reaches there and on the CPU; in a process of its own, since a device stays registered"
    env = {k:v for k,v in os.environ.items() if (k,v)!=('CUDA_VISIBLE_DEVICES','-1')} # see conftest.py
    r = subprocess.run([sys.executable, '-m', 'tests.helpers.elsewhere'], capture_output=True, text=True, env=env)
    rows = [json.loads(o) for o in r.stdout.splitlines() if o.startswith('["')]
    return {o[1]:o for o in rows},r.stderr[-2000:]

@pytest.mark.parametrize('name', checks)
def test_does_what_it_does_on_the_cpu(found, name):
    rows,said = found
    assert name in rows, said
    device,_,there,here = rows[name]
    assert isinstance(here, list), here
    assert isinstance(there, list), there
    assert there==pytest.approx(here, abs=1e-4 if device=='other' else .1)
