"Files that are the same on every processor: sums that saturate in 16 bits, and the gate of every file"
import json, re
import numpy as np, onnx, pytest, torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from torch import nn
from fastquant.export import portable
from fastquant.export.onnx import quiet
from fastquant.export.portable import as_run, constants, misfits, session
from fastquant.export.engine import to_bytes
from fastquant.export.verify import activations, run_file
from fastquant.all import *
from tests.helpers.files import kept, make, of_net, small, trained
from tests.helpers.integers import assert_saturates_nowhere, different, evaluate, integer_layers, there, values
from tests.helpers.layers import plain
from tests.helpers.models import learner_of, models
from tests.helpers.nets import same_with_nan, state

low = 'w4a4','w2a2'
exported_fast = 'resnet18','squeezenet1_1','xresnet18','tabular' # in few bits too; others with --flags slow
cases = [(k,s) for k in models for s in low] # int8 is in tests/test_models.py
cases += [(k,s) for k in ('squeezenet1_1','tabular') for s in ('int8_per_tensor','int8_symmetric')]

@pytest.fixture(scope='module', params=cases, ids='-'.join)
def file(request):
    "A file of the support matrix"
    name,spec = request.param
    if spec not in low: return make(name, spec)
    if name not in exported_fast and 'slow' not in request.config.getoption('--flags'): pytest.skip('takes long: --flags slow')
    return make(name, spec, trained)

# Sums in 16 bits

def test_saturating_equals_exact(file):
    "All integers and outputs of a file are the same to the bit where products are added in 16 bits"
    assert_saturates_nowhere(file.proto, file.feeds(2))

def test_saturation_would_be_seen():
    "With the whole range of weights the two evaluations part, and the file says that it has it"
    full = kept('resnet18', 'int8_full')
    whole,less = (evaluate(full.proto, full.feeds(1), s) for s in (False,True))
    ints = {n.input[0] for n in activations(full.proto)}
    assert len(ints&set(different(whole, less)))>len(ints)/2 and 'output' in different(whole, less)
    assert len(misfits(full.proto))==len(integer_layers(full.proto))

def test_seven_bits_leave_room_for_two():
    "quant_17: weights of `Grid(7)` are stored as they are, so that no pair of them can saturate"
    seven = make('squeezenet1_1', Spec(weight=TensorSpec(Grid(7), granularity=PerChannel())))
    weights = constants(seven.proto, list(portable.int8_weights(seven.proto)))
    assert len(weights)==len(integer_layers(seven.proto)) and max(abs(w.astype(int)).max() for w in weights.values())==63
    assert_saturates_nowhere(seven.proto, seven.feeds(2))
    seven.gate()

# The gate: healthy files

def test_gate_passes_healthy_files(file):
    "What was exported as it should be is not refused"
    file.gate()

class Doors(nn.Module):
    "A tensor that goes into two layers in few bits, and into a sum in 8"
    def __init__(self):
        super().__init__()
        self.stem,self.head = nn.Conv2d(3, 8, 3),nn.Linear(8, 5)
        self.a,self.b,self.c = (nn.Conv2d(8, 8, 1) for _ in range(3))
    def forward(self, x):
        x = self.stem(x).relu()
        return self.head((x+self.c((self.a(x)+self.b(x)).relu())).mean((2,3)))

def test_gate_passes_equal_activations():
    "Two layers that round the same tensor alike"
    torch.manual_seed(0)
    of_net(Doors().eval(), torch.randn(8, 3, 8, 8), 'w4a4').gate()

@pytest.mark.parametrize('spec', ['int8','w4a4'])
@pytest.mark.parametrize('seed', [1,2])
@pytest.mark.parametrize('name', ['squeezenet1_1','vision_learner'])
def test_gate_passes_healthy_files_of_other_weights(name, seed, spec): make(name, spec, seed=seed).gate()

# A processor that saturates, emulated

@pytest.fixture
def saturating(monkeypatch):
    "As if this processor saturated"
    monkeypatch.setattr(portable, 'saturates', lambda: True)
    monkeypatch.setattr(portable, '_said', set())

def run_as_there(proto, feeds, names):
    "What a processor that saturates makes of the file that `as_run` gives it"
    return there(onnx.load_from_string(as_run(proto.SerializeToString())), feeds, names)

def test_emulated_processor_runs_full_range_exactly(saturating):
    "On a processor that saturates an `Engine` runs a full-range file exactly, and says once that it is slower"
    full = kept('resnet18', 'int8_full')
    with pytest.warns(UserWarning, match='whole range of int8') as said:
        y,_ = (Engine(full.data)(*full.xb) for _ in range(2))
    assert len(said)==1
    assert not misfits(onnx.load_from_string(as_run(full.data)))
    for run in (run_as_there,run_file): full.gate(n=2, run=run)
    outs = [o.name for o in full.proto.graph.output]
    whole,same = (f(full.proto, full.feeds(2), outs)[0] for f in (values,run_as_there))
    assert np.array_equal(whole, same)
    assert sqnr(torch.from_numpy(whole), y[:2])>30

def test_portable_files_run_unchanged(saturating, recwarn):
    "What fits is run as it is, and nothing is said"
    data = kept('tabular', 'int8').data
    assert as_run(data) is data
    Engine(data)(*kept('tabular', 'int8').xb)
    assert not [w for w in recwarn if 'whole range' in str(w.message)]

class Batches(CalibrationDataReader):
    "Hands `batches` to ONNX Runtime's quantizer"
    def __init__(self, batches): self.batches = iter(batches)
    def get_next(self): return next(self.batches, None)

def somebody_elses(folder, net, x, **kw):
    "The file that ONNX Runtime's quantizer makes of `net`"
    onnx.save(to_onnx(net, x), folder/'float.onnx')
    types = dict(activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8)
    with quiet():
        quantize_static(folder/'float.onnx', folder/'int8.onnx', Batches([{'input':x.numpy()}]), quant_format=QuantFormat.QDQ, **types, **kw)
    return (folder/'int8.onnx').read_bytes()

@pytest.mark.parametrize('per_channel', [True,False])
def test_files_of_others_run_exactly(saturating, per_channel, tmp_path):
    "A file of ONNX Runtime's own quantizer does in an `Engine` what it says, node for node"
    net,x = small()
    data = somebody_elses(tmp_path, net, x, per_channel=per_channel)
    proto = onnx.load_from_string(data)
    assert misfits(proto)
    with pytest.warns(UserWarning, match='whole range of int8'): ours = Engine(data)(x)
    theirs, = session(data, graph_optimization_level=plain).run(None, {'input':x.numpy()})
    last = [n for n in proto.graph.node if n.op_type=='DequantizeLinear'][-1]
    scale, = constants(proto, [last.input[1]]).values()
    assert abs(ours.numpy()-theirs).max()<=2.01*scale and sqnr(torch.from_numpy(theirs), ours)>30

# Bad input

def says(path, proto, portable):
    "Write `proto` with another word on whether it is portable"
    new = onnx.load_from_string(to_bytes(proto))
    for p in new.metadata_props:
        if p.key=='portable': p.value = json.dumps(portable)
    onnx.save(new, path)
    return path

def test_files_that_lie_about_their_range_are_refused(tmp_path):
    "A file is not what it says of its weights: the message names one that does not fit, if there is one"
    full,fits = (kept('tabular', s).proto for s in ('int8_full','int8'))
    for proto,truth in ((full,False),(fits,True)):
        assert load_engine(says(tmp_path/'f.onnx', proto, truth)).metadata['portable'] is truth
    name = re.escape(repr(misfits(full)[0]))
    with pytest.raises(ValueError, match=f'same on every processor.*{name}'): load_engine(says(tmp_path/'f.onnx', full, True))
    with pytest.raises(ValueError, match='has none that do'): load_engine(says(tmp_path/'f.onnx', fits, False))

def test_full_range_is_not_made_portable_afterwards():
    "A Learner prepared with whole weights does not give a file that promises to fit, and is left as it is"
    learn = learner_of('tabular')
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-4, cbs=QuantAwareCallback('int8_full'))
        before = state(learn.model)
        with pytest.raises(ValueError, match="prepared already.*whole range of int8.*remove_quant"): learn.quantize('int8')
        assert same_with_nan(state(learn.model), before)
        assert learn.quantize(n_batches=1).model.report.portable is False
        assert learn.remove_quant().quantize('int8', n_batches=1).model.report.portable is True
