"The support matrix: each of these models quantizes, verifies, and runs every layer in int8 unless it is named here"
import json
from collections import Counter
from copy import deepcopy
from pathlib import Path
import onnx, openvino as ov, pytest, torch
from fastai.callback.training import ShortEpochCallback
from torch import nn
from fastquant.all import *
from fastquant.core.basics import write_whole
from fastquant.export.engine import optimized
from fastquant.callback.data import inputs
from tests.helpers.integers import assert_saturates_nowhere
from tests.helpers.learners import check_owned
from tests.helpers.models import learner_of, models
from tests.helpers.nets import same, state

in_float = {} # By model, the layers that stay in float
not_to_the_bit = 'convnext_atto','vit_tiny' # since they normalize and attend in floats

columns = 'int8','OpenVINO','pruned','channels','trained'
committed = Path(__file__).parent/'support.json'

@pytest.fixture(scope='module', params=models)
def name(request):
    "Each model, with all its tests in turn, so that it is built once"
    return request.param

@pytest.fixture
def supports(request, name):
    "Note that the model can do something: `support.json` has to say the same, or is written with `--write-support`"
    def note(column, what='yes'):
        said = json.loads(committed.read_text()) if committed.exists() else {}
        if request.config.getoption('--write-support'):
            row = {**said.get(name, {}), column:what}
            said[name] = {c:row[c] for c in columns if c in row}
            write_whole(committed, (json.dumps({k:said[k] for k in models if k in said}, indent=1)+'\n').encode())
        else: assert said.get(name, {}).get(column)==what, f'{column} of {name} is {what!r}, and tests/support.json says otherwise: pytest tests/test_models.py --write-support'
    return note

@pytest.fixture(scope='module')
def quantized(name):
    "A Learner, what its model held, and the Learner in int8"
    learn = learner_of(name)
    before = state(learn.model)
    with learn.no_bar(): return before,learn,learn.quantize(n_batches=2, timed=False)

def test_model(name, quantized, supports):
    before,learn,qlearn = quantized
    report = qlearn.model.report
    print(f'{name}: {report}, {report.sqnr:.1f} dB from its simulation, {report.sqnr_float:.1f} dB from float')
    assert set(report.float_layers)==set(in_float.get(name, []))
    assert report.sqnr==200 or name in not_to_the_bit
    kernels = Counter(n.op_type for n in optimized(qlearn.model.data).graph.node)
    assert not {'Conv','FusedConv','Gemm','FusedGemm'} & set(kernels)
    assert kernels['QLinearConv']==sum(isinstance(m, nn.Conv2d) for m in learn.model.modules())
    assert same(state(learn.model), before)
    with qlearn.no_bar(), learn.no_bar(): p,q = learn.get_preds()[0],qlearn.get_preds()[0]
    assert sqnr(p, q)>10
    supports('int8', f'{report.n_int8} of {report.n_layers}')
    xb = inputs(learn, learn.dls.valid, 1)[0]
    ours = qlearn.model(*xb)
    theirs, = ov.Core().compile_model(ov.Core().read_model(qlearn.model.data))([x.numpy() for x in xb]).values()
    assert sqnr(ours, torch.from_numpy(theirs))>10
    supports('OpenVINO')

def test_saturating_equals_exact(quantized):
    "All integers and outputs of the file are the same to the bit where products are added in 16 bits"
    _,learn,qlearn = quantized
    proto,xb = onnx.load_from_string(qlearn.model.data),inputs(learn, learn.dls.valid, 1)[0]
    feeds = {i.name:x[:2 if xb[0].shape[-1]<96 else 1].numpy() for i,x in zip(proto.graph.input, xb)}
    assert_saturates_nowhere(proto, feeds)

def test_prune_model(name, supports):
    "A fit that prunes leaves as many zeros as it was told to"
    learn = learner_of(name)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-4, cbs=[PruneScheduleCallback(.5, scope='local', end=.2),ShortEpochCallback(.25)])
    w = torch.cat([m.weight.flatten() for m in masked(learn.model).values()])
    assert len(w) and abs((w==0).float().mean()-.5)<.01 and abs(sparsity(learn.model)-.5)<.001
    supports('pruned')

def test_cut_model(name, supports, tmp_path):
    "A fit removes channels, with the whole model as teacher, and a fresh Learner does the same from the file"
    learn = learner_of(name)
    whole = deepcopy(learn)
    cbs = [PruneScheduleCallback(.5, structure='channel', scope='local', end=.2),DistillCallback(whole),ShortEpochCallback(.25)]
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-4, cbs=cbs)
    assert n_params(learn.model)<.95*n_params(whole.model)
    check_owned(learn)
    cut = whole.load_sparse(learn.save_sparse(tmp_path/'cut.safetensors'))
    with learn.no_bar(), cut.no_bar(): assert learn.get_preds()[0].equal(cut.get_preds()[0])
    supports('channels')

def test_parity_after_training(name, supports):
    "After a fit through rounding the engine predicts what the rounded model does, and every parameter and step has had its part in it"
    learn,spec = learner_of(name),'w4a8' if name in ('resnet18','mobilenet_v2','tabular') else 'int8'
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-4, cbs=[QuantAwareCallback(spec, start=.2),ShortEpochCallback(.25)])
        qlearn = learn.quantize(n_batches=1, timed=False)
    report = qlearn.model.report
    print(f'{name}, {spec}: {report}, {report.sqnr:.1f} dB from its simulation')
    assert report.trained and set(report.float_layers)==set(in_float.get(name, []))
    check_owned(learn)
    with qlearn.no_bar(), learn.no_bar(): p,q = learn.get_preds()[0],qlearn.get_preds()[0]
    assert sqnr(p, q)>10
    supports('trained', spec)

def test_nothing_else_is_said():
    "Every entry of the matrix is one that a test below makes"
    said = json.loads(committed.read_text())
    assert list(said)==list(models) and all(tuple(row)==columns for row in said.values())
