"Each kind of bad input gets an error that says how to go on, and leaves the Learner and the disk as they were"
import onnx, pytest, torch
from fastai.vision.all import Learner, set_seed
from torch import nn
import fastquant.learner.quant
from fastquant.all import *
from tests.helpers.data import loaders, noise
from tests.helpers.learners import classifier
from tests.helpers.nets import classify, same_with_nan, state

def net(): return nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), *classify(8, 3))

@pytest.fixture
def learn(tmp_path):
    set_seed(0)
    learn = classifier(loaders(noise(1, 8, 8, n=24), bs=8), net(), tmp_path)
    with torch.no_grad(): learn.model.train()(learn.dls.one_batch()[0])
    return learn

def untrained(l): l.model = net()
def broken_norm(l): l.model[1].running_var[2] = torch.nan
def nan_weight(l): l.model[0].weight.data[1] = torch.nan
def nan_activation(l): l.model[2] = Log()
def spare_layer(l): l.model.add_module('spare', Spare())
def nothing(l): l.model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64, affine=True, track_running_stats=False))
def already(l): l.model = l.quantize().model
def prepared(l): l.validate(cbs=PTQCalibrate())
def data_dependent(l): l.model = DataDependent()

class Spare(nn.Identity):
    def __init__(self, unused=None):
        super().__init__()
        self.unused = unused or nn.Linear(2, 2)

class Log(nn.Module):
    def forward(self, x): return x.log()

class DataDependent(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 3)
    def forward(self, x): return self.fc(x.flatten(1))*(2 if x.sum()>0 else 1)

def as_is(l): pass
quantize = Learner.quantize
cases = dict(
    untrained_batchnorm=(untrained, dict(), ValueError, "batchnorm '1' has never been trained"),
    nan_statistics=(broken_norm, dict(), ValueError, "batchnorm '1' has NaN"),
    nan_weight=(nan_weight, dict(), ValueError, "parameter '0.weight' has NaN"),
    nan_activation=(nan_activation, dict(), ValueError, "output of '2' ranges from -?nan to"),
    empty_calibration_set=(as_is, dict(dl=[]), ValueError, "calibration set is empty"),
    no_batches=(as_is, dict(n_batches=0), ValueError, "at least one batch"),
    unknown_spec=(as_is, dict(spec='int_8'), ValueError, "Did you mean 'int8'"),
    not_a_spec=(as_is, dict(spec=8), TypeError, "not 8"),
    exclude_matches_nothing=(as_is, dict(exclude='o'), ValueError, "'o' matches no module"),
    nothing_to_quantize=(nothing, dict(), ValueError, "nothing to quantize"),
    everything_excluded=(as_is, dict(exclude='*'), ValueError, "nothing to quantize"),
    no_folder=(as_is, dict(fname='no/where.onnx'), FileNotFoundError, "there is no folder"),
    a_folder=(as_is, dict(fname='.'), IsADirectoryError, "is a folder"),
    already_quantized=(already, dict(), ValueError, "runs a file, whose weights are out of reach"),
    prepared_and_exclude=(prepared, dict(exclude='0'), ValueError, "prepared already"),
    prepared_and_spec=(prepared, dict(spec='int8_per_tensor'), ValueError, "prepared already"),
    depends_on_data=(data_dependent, dict(), RuntimeError, "cannot be exported to ONNX"),
)

def snapshot(learn): return state(learn.model),[m.training for m in learn.model.modules()],sorted(learn.path.iterdir())
def same(a, b): return a[1:]==b[1:] and same_with_nan(a[0], b[0])

@pytest.mark.parametrize('name', cases)
def test_refused(learn, name):
    spoil,kwargs,error,message = cases[name]
    spoil(learn)
    before,n_cbs,model = snapshot(learn),len(learn.cbs),learn.model
    with pytest.raises(error, match=message): learn.quantize(**{'fname':'model.onnx', **kwargs})
    assert same(before, snapshot(learn)) and len(learn.cbs)==n_cbs and learn.model is model

def test_spare_layer(learn):
    "It stays in float, with its batchnorm that was never trained, and is named"
    spare_layer(learn)
    learn.model.add_module('norm', Spare(nn.BatchNorm2d(4)))
    why = learn.quantize().model.report.float_layers
    assert all(w.startswith('it never ran') for w in why.values()) and list(why)==['spare.unused','norm.unused']
    del learn.model.norm
    assert learn.quantize(exclude='spare').model.report.float_layers=={'spare.unused':'excluded'}

def test_unknown_observer():
    with pytest.raises(ValueError, match="Did you mean 'percentile'"): TensorSpec(observer='percentil')

def test_mismatch_is_not_returned(learn, monkeypatch):
    def wrong(model, *xb, **how):
        proto = to_onnx(model, *xb, **how)
        for scale in [i for i in proto.graph.initializer if i.name=='0.weight_scale']:
            scale.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(scale)*3, scale.name))
        return proto
    monkeypatch.setattr(fastquant.export.engine, 'to_onnx', wrong)
    before = snapshot(learn)
    with pytest.raises(ExportMismatch, match="(?s)exported file and its simulation part at '0'.*Leave it in float with exclude='0'"): learn.quantize(fname='model.onnx')
    assert same(before, snapshot(learn))
    assert '0' in learn.quantize(exclude='0').model.report.float_layers # what the message says to do

@pytest.mark.parametrize('verb', ['quantize','export_onnx'])
def test_full_disk(learn, monkeypatch, verb):
    (learn.path/'model.onnx').write_bytes(b'an older model')
    before = snapshot(learn)
    def full(fd): raise OSError(28, 'No space left on device')
    monkeypatch.setattr('os.fsync', full)
    with pytest.raises(OSError, match='No space left'): getattr(learn, verb)(fname='model.onnx')
    assert same(before, snapshot(learn)) and (learn.path/'model.onnx').read_bytes()==b'an older model'

def test_folder_that_cannot_be_written(learn, monkeypatch):
    monkeypatch.setattr('os.access', lambda path, mode: False)
    with pytest.raises(PermissionError, match='cannot be written to'): learn.quantize(fname='model.onnx')

def test_files_that_are_not_ours(learn):
    f = learn.quantize(fname='model.onnx').path/'model.onnx'
    good = f.read_bytes()
    for bad in (good[:-200], b'', b'not onnx at all', good[:50]+b'\xff'*50+good[100:]):
        f.write_bytes(bad)
        with pytest.raises(ValueError, match='damaged|not written by fastquant'): learn.load_onnx('model.onnx')
    with pytest.raises(FileNotFoundError): learn.load_onnx('nothing.onnx')
    f.write_bytes(good)
    learn.dls.vocab = ['a','b','c']
    with pytest.raises(ValueError, match='predicts other classes'): learn.load_onnx('model.onnx')

def test_training_is_refused(learn):
    q = learn.quantize()
    for f in (q.fit, q.fit_one_cycle if hasattr(q, 'fit_one_cycle') else q.fit):
        with pytest.raises(RuntimeError, match='cannot be trained'), q.no_bar(), q.no_logging(): f(1)
