"Other people's quantizers, as their documentation uses them: each makes an ONNX file, which ONNX Runtime runs"
from __future__ import annotations
import logging, onnx, sys
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from fastquant.core.model import copy_model
from fastquant.export.engine import Engine
from fastquant.export.onnx import quiet, to_onnx
from fastquant.export.portable import session
from .common import *

class Batches(CalibrationDataReader):
    def __init__(self, name, batches): self.batches = iter({name:xb[0].numpy()} for xb in batches)
    def get_next(self): return next(self.batches, None)

def plain_export(model, x)->bytes:
    "A float file, as PyTorch's own exporter writes it"
    with tempfile.TemporaryDirectory() as d, quiet():
        fname = f'{d}/float.onnx'
        torch.onnx.export(copy_model(model), (x,), fname, dynamo=True, dynamic_shapes=({0:torch.export.Dim('batch')},), verbose=False)
        onnx.save(onnx.load(fname), fname)
        return Path(fname).read_bytes()

def ort_file(
    model:nn.Module,  # A float model
    batches:list,     # Tuples of inputs to calibrate on
    float_:bytes=None, # Its float file; exported in the way of fastquant if None
    per_channel=True  # A scale for each output channel of a weight?
)->bytes:
    "The file that ONNX Runtime's own `quantize_static` makes of `model`"
    float_ = float_ or to_onnx(copy_model(model), *batches[0]).SerializeToString()
    with tempfile.TemporaryDirectory() as d, quiet():
        given,pre,int8 = (Path(d)/f'{k}.onnx' for k in ('float','pre','int8'))
        given.write_bytes(float_)
        quant_pre_process(given, pre)
        name = onnx.load_from_string(float_).graph.input[0].name
        quantize_static(pre, int8, Batches(name, batches), quant_format=QuantFormat.QDQ, per_channel=per_channel,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, calibrate_method=CalibrationMethod.MinMax)
        return int8.read_bytes()

def nncf_there(o):
    "NNCF, from the folder `--packages`; None if it is not there"
    if o.packages and str(o.packages) not in sys.path: sys.path.append(str(o.packages))
    try: import nncf
    except ImportError: return None
    nncf.set_log_level(logging.ERROR)
    return nncf

def nncf_file(
    nncf,         # From `nncf_there`
    model:nn.Module, # A float model
    batches:list, # Tuples of inputs to calibrate on
    **how         # Further arguments of its `quantize`
)->bytes:
    "The file that NNCF's `quantize` makes of `model`, with its fast bias correction"
    proto = to_onnx(copy_model(model), *batches[0])
    data = nncf.Dataset([{proto.graph.input[0].name:xb[0].numpy()} for xb in batches])
    with quiet(): return nncf.quantize(proto, data, subset_size=len(batches), **{'fast_bias_correction':True, **how}).SerializeToString()

def nncf_promise(
    nncf,          # From `nncf_there`
    learn:Learner, # A float one, that is measured by accuracy
    batches:list,  # Tuples of inputs to calibrate on
    max_drop:float # What may be lost
)->tuple: # The file, and how often it ran the validation set
    "What NNCF's `quantize_with_accuracy_control` makes of a Learner"
    proto,runs = to_onnx(copy_model(learn.model), *batches[0]),[]
    name = proto.graph.input[0].name
    def data(sets): return nncf.Dataset([(xb[0].numpy(),None) if len(xb)==1 else tuple(t.numpy() for t in xb) for xb in sets], lambda b: {name:b[0]})
    def right(ready, items):
        runs.append(1)
        made = session(ready.SerializeToString())
        hits = [made.run(None, {name:x})[0].argmax(1)==y for x,y in items]
        return float(np.concatenate(hits).mean()),None
    with quiet():
        made = nncf.quantize_with_accuracy_control(proto, calibration_dataset=data(batches), validation_dataset=data(learn.dls.valid), validation_fn=right,
            max_drop=max_drop, subset_size=len(batches))
    return made.SerializeToString(),len(runs)

def peer_files(
    o:Options,
    model:nn.Module,  # A float model
    batches:list,     # Tuples of inputs to calibrate on
    per_channel=True  # As in `ort_file`
)->dict: # By name an `Engine`; None where the peer is not there
    "What other quantizers make of `model`"
    made = {'ONNX Runtime':Engine(ort_file(model, batches, per_channel=per_channel))}
    nncf = nncf_there(o)
    how = {} if per_channel or not nncf else dict(advanced_parameters=nncf.AdvancedQuantizationParameters(weights_quantization_params=nncf.quantization.advanced_parameters.QuantizationParameters(per_channel=False)))
    return made|{'NNCF, fast bias correction':nncf and Engine(nncf_file(nncf, model, batches, **how))}
