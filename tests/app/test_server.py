"examples/server.py: answers over HTTP, on loopback"
import importlib.util, json, shutil, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from threading import Event, Thread
import pytest
from fastai.tabular.all import tabular_learner
from fastai.vision.all import Learner, Resize, nn
from fastquant.all import *
from fastquant.runtime import Model
from ..helpers.data import pictures, rows, table
from ..helpers.learners import quiet
from ..helpers.photos import huge_png

program = Path(__file__).parents[2]/'examples'/'server.py'

def ask(port, body=b'', method='POST', **headers):
    "Status and what is said"
    c = HTTPConnection('127.0.0.1', port, timeout=10)
    c.request(method, '/', body, headers)
    r = c.getresponse()
    said = r.status,json.loads(r.read())
    c.close()
    return said

@contextmanager
def started(app):
    "Its port, in an environment without fastquant"
    shutil.copy(program, app)
    p = subprocess.Popen([sys.executable, '-I', '-c', "import runpy, sys; sys.path[:0] = ['.']; sys.argv[1:] = ['--port', '0']; runpy.run_path('server.py', run_name='__main__')"],
        cwd=app, stdout=subprocess.PIPE, text=True)
    try: yield int(p.stdout.readline().rpartition(':')[2])
    finally:
        p.terminate()
        p.wait(10)

@pytest.fixture(scope='module')
def app(tmp_path_factory):
    dls = pictures(40, item_tfms=Resize(16))
    net = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, dls.c))
    return quiet(Learner(dls, net, path=tmp_path_factory.mktemp('server'))).export_app('app')

@pytest.fixture(scope='module')
def port(app):
    with started(app) as p: yield p

def test_answers_are_those_of_the_model(app, port):
    files = sorted((app/'examples').glob('*.png'))
    model = Model(app/'model.onnx')
    with ThreadPoolExecutor(8) as pool: found = list(pool.map(lambda f: ask(port, f.read_bytes()), files*8))
    assert found==[(200,model(f)) for f in files]*8 and ask(port, method='GET')[0]==200

@pytest.mark.parametrize('name,says', dict(empty='no picture', text='no picture', json='no picture', eps='no picture', short='damaged or cut short', huge='too large').items())
def test_what_is_no_picture(name, says, app, port):
    whole = (app/'examples'/'1.png').read_bytes()
    bodies = dict(empty=b'', text=b'no picture', json=b'{"a": 1}', eps=b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF', short=whole[:len(whole)//2], huge=huge_png())
    status,said = ask(port, bodies[name])
    assert status==400 and list(said)==['error'] and says in said['error'] and ask(port, whole)[0]==200

@pytest.mark.parametrize('status,headers', [(413,{'Content-Length':str(10**12)}), (411,{'Content-Length':'-1'}), (411,{'Transfer-Encoding':'chunked'})])
def test_bodies_that_are_not_read(status, headers, app, port):
    c = HTTPConnection('127.0.0.1', port, timeout=10)
    c.putrequest('POST', '/')
    for h in headers.items(): c.putheader(*h)
    c.endheaders()
    r = c.getresponse()
    assert r.status==status and 'bytes' in json.loads(r.read())['error'] and r.will_close
    assert ask(port, (app/'examples'/'1.png').read_bytes())[0]==200

def test_rows_of_a_table(tmp_path):
    to = quiet(tabular_learner(rows(table(60), 40), layers=[8], path=tmp_path)).export_app('app')
    row = json.loads((to/'examples'/'answers.json').read_text())[0]['row']
    with started(to) as port:
        assert ask(port, json.dumps(row))==(200,Model(to/'model.onnx')(row))
        for bad,says in [(b'{', 'no JSON'),(b'\xff', 'no JSON'),(b'[1]', 'no row'),(b'{}', 'Missing columns: cat, num, big'),(json.dumps({**row, 'num':'old'}), 'no number')]:
            status,said = ask(port, bad)
            assert status==400 and says in said['error']

def test_who_waits_too_long_is_told():
    spec = importlib.util.spec_from_file_location('server', program)
    server = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(server)
    begun,go = Event(),Event()
    def respond(body):
        begun.set()
        go.wait(10)
        return 200,'done'
    with server.Server(respond, 0, at_once=1, wait=.05) as s, ThreadPoolExecutor(1) as pool:
        Thread(target=s.serve_forever, daemon=True).start()
        port = s.server_address[1]
        first = pool.submit(ask, port)
        begun.wait(10)
        assert ask(port)[0]==503
        go.set()
        assert first.result()==(200,'done')==ask(port)
        s.shutdown()
