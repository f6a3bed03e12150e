"What post-training quantization costs in accuracy, and what it buys: `python -m benchmarks.ptq --data ../shared/data`"
from __future__ import annotations
import onnx
from torchvision import models
from fastquant.quant.convert import *
from fastquant.callback.data import *
from fastquant.export.engine import *
from fastquant.export.onnx import *
from fastquant.learner.quant import *
from fastquant.quant.prepare import *
from fastquant.core.measure import latency as in_turns, n_bytes
from fastquant.core.trace import *
from .common import *
from .peers import ort_file
from fastquant.core.model import copy_model, evaluating
from fastquant.export.portable import session

sections = Registry('section')

# Other quantizers

def fx_model(model, batches)->nn.Module|None:
    "`model` through torch's FX graph mode; None where torch no longer has it"
    try:
        from torch.ao.quantization import get_default_qconfig_mapping
        from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
    except ImportError: return None
    torch.backends.quantized.engine = 'x86'
    with quiet(), torch.no_grad():
        model = prepare_fx(copy_model(model).eval(), get_default_qconfig_mapping('x86'), batches[0])
        for xb in batches: model(*xb)
        return convert_fx(model)

# Accuracy

def calibration_set(
    learn:Learner,
    n_batches:int=8
)->list: # Tuples of inputs
    "The batches that `learn.quantize()` calibrates on"
    with calibration_dl(learn, n_batches=n_batches) as dl: return [b[:1] for b in dl]

def simulation(
    learn:Learner,
    qlearn:Learner, # From `learn.quantize()`
    batches:list,   # What it was calibrated on
    spec='int8'     # And how it is rounded
)->nn.Module:
    "What the file of `qlearn` was made of; raises `RuntimeError` if that is not so"
    sim = prepare(copy_model(learn.model), spec, *batches[0], fold=True)
    for xb in batches: watch(sim, *xb)
    set_ranges(sim)
    if to_onnx(convert(sim), *batches[0]).graph!=onnx.load_from_string(qlearn.model.data).graph:
        raise RuntimeError("The simulation made here gives another file than `quantize`.")
    return sim

def predictions(model, x):
    with evaluating(model): return torch.cat([model(b) for b in x.split(256)]).argmax(1)

def accuracies(
    net:str,         # Its name
    model:nn.Module, # A trained model
    data:tuple       # Training and test set
)->list: # Rows, the float model first
    "Top-1 on the test set, and share of equal predictions, for `model` and what quantizers make of it"
    learn = learner(model, *data)
    qlearn = learn.quantize()
    batches = calibration_set(learn)
    peers = {'simulation':simulation(learn, qlearn, batches), 'ONNX Runtime':Engine(ort_file(model, batches)), 'torch FX':fx_model(model, batches)}
    x,y = data[1].tensors
    with qlearn.no_bar(): mine = qlearn.get_preds()[0].argmax(1)
    found = {'float':learn.get_preds()[0].argmax(1), 'fastquant':mine, **{k:predictions(m, x) for k,m in peers.items() if m}}
    return [*[row(net, k, c, y, found) for k,c in found.items()], *[dict(net=net, by=f'{k}: absent') for k,m in peers.items() if not m]]

def percent(o): return round(100*o.float().mean().item(), 3)

def row(net, by, c, y, found):
    "What there is to say of the predictions `c` where `y` is right; `lost_error` is the standard error of `lost`, were the test set another one"
    lost = 100*((found['float']==y).float()-(c==y).float())
    return dict(net=net, by=by, top1=percent(c==y), lost=round(lost.mean().item(), 3), lost_error=round(lost.std().item()/len(y)**.5, 3),
        equal_to_float=percent(c==found['float']), equal_to_simulation=percent(c==found['simulation']) if by=='fastquant' else None)

def lost(rows, at_least, aim): return [target(f"{r['net']}: top-1 lost (points)", r['lost'], at_least, aim) for r in rows if r['by']=='fastquant']

@sections
def cifar(o):
    rows = accuracies('resnet20', resnet20(o), cifar10(o))
    mine = rows[1]
    return rows, [*lost(rows, .15, 0), target('resnet20: predictions equal to float (%)', mine['equal_to_float'], 98.5, 99.3),
        target('resnet20: predictions equal to the simulation (%)', mine['equal_to_simulation'], 99.5, 99.9)]

@sections
def other(o):
    rows = [r for net in (vgg,resnet14b,mobilenet) for r in accuracies(net.__name__, train(o, net, cifar10(o), cbs=Flip()), cifar10(o))]
    return rows, lost(rows, .15, 0)

@sections
def mnist(o):
    rows = accuracies('digits', train(o, digits, mnist_images(o)), mnist_images(o))
    return rows, lost(rows, .05, 0)

# Size and speed

@sections
def size(o):
    model = settled(models.resnet18, 64)
    learn = learner(model, noise(64, 64), noise(64, 64))
    float_,int8 = n_bytes(model),n_bytes(learn.quantize(n_batches=1).model)
    return [dict(net='resnet18', float_bytes=float_, int8_bytes=int8)], [target('resnet18: times smaller', float_/int8, 3.8, 3.95)]

def float_file(model, x)->bytes:
    "The float model as a file"
    return to_onnx(copy_model(model), x).SerializeToString()

def ort_run(data, x):
    s = session(data)
    feed = {s.get_inputs()[0].name:x.numpy()}
    return lambda: s.run(None, feed)

def openvino_run(data, x):
    import openvino as ov
    net = ov.compile_model(ov.Core().read_model(data), 'CPU', {'INFERENCE_NUM_THREADS':1, 'PERFORMANCE_HINT':'LATENCY'})
    return lambda: net(x.numpy())

def runners(
    model:nn.Module, # A float model
    px:int=224
)->dict:
    "Functions that run one image through `model` and through what is made of it, each on one thread"
    data = noise(16, px)
    learn,x = learner(model, data, data, bs=8),data.tensors[0][:1]
    mine,batches = learn.quantize().model.data,calibration_set(learn)
    files = {'float, ONNX Runtime':float_file(model, x), 'fastquant, ONNX Runtime':mine, 'ONNX Runtime, its own':ort_file(model, batches)}
    found = {'eager float':lambda: model(x), **{k:ort_run(f, x) for k,f in files.items()}}
    if installed('openvino'): found['fastquant, OpenVINO'] = openvino_run(mine, x)
    return found

def timed(
    o:Options,
    name:str, # Of the net
    fns:dict  # Functions that run it, as from `runners`
)->tuple: # Rows, and medians by name
    "How long `fns` take in turns, against eager float and against float in the engine"
    with torch.inference_mode(), clock(o): ms = in_turns(fns, o.some(50, 5), seconds=600).round(3)
    found = ms['median']
    against = lambda v: dict(speedup=round(found['eager float']/v, 3), against_float_engine=round(v/found['float, ONNX Runtime'], 3))
    return [dict(net=name, by=k, median_ms=r['median'], spread_ms=r['spread'], **against(r['median'])) for k,r in ms.iterrows()],found

def latencies(o, net):
    "Rows and targets for one net"
    name = net.__name__
    rows,ms = timed(o, name, runners(settled(net)))
    eager,mine,its = (ms[k] for k in ('eager float','fastquant, ONNX Runtime','ONNX Runtime, its own'))
    return rows, [target(f'{name}: times faster than eager float', eager/mine, 4, 5.5), target(f"{name}: times the time of ONNX Runtime's own", mine/its, 1.1, 1)]

@sections
@per_processor
def latency(o):
    rows,targets = zip(*[latencies(o, net) for net in (models.resnet18,models.resnet50,models.mobilenet_v2)])
    return sum(rows, []),sum(targets, [])

def forward(model, x):
    with evaluating(model): model(x)

def calibrate(model, batches):
    for x in batches: watch(model, x)
    set_ranges(model)

def calibration_times(o, threads):
    "Time of 8 batches through the float model, and through the prepared one that watches them and then sets its ranges"
    torch.set_num_threads(threads)
    model,batches = settled(models.resnet18),[torch.randn(o.some(64, 4), 3, 224, 224) for _ in range(8)]
    watching = [prepare(copy_model(model), 'int8', batches[0], fold=True) for _ in range(3)]
    fns = {'float':lambda: [forward(model, x) for x in batches], 'calibration':lambda: calibrate(watching.pop(), batches)}
    forward(model, batches[0])
    ms = in_turns(fns, len(watching), warmup=0, seconds=600).round(3)['median']
    return dict(net='resnet18', threads=threads, float_ms=ms['float'], calibration_ms=ms['calibration'], ratio=round(ms['calibration']/ms['float'], 3))

@sections
@per_processor
def calibration(o):
    rows = [calibration_times(o, n) for n in sorted({1,os.cpu_count()})]
    torch.set_num_threads(1)
    return rows, [target(f"resnet18, {r['threads']} threads: calibration against plain forward passes", r['ratio'], 2., 1.3) for r in rows]

@sections
@per_processor
def pareto(o):
    "Size and latency of the nets whose accuracy `cifar` and `other` measure, and the latency of float in the same engine"
    rows = []
    for net in (partial(resnet20, o),vgg,resnet14b,mobilenet):
        name,model,data = getattr(net, '__name__', 'resnet20'),settled(net, 32),noise(16, 32)
        learn,x = learner(model, data, data, bs=8),data.tensors[0][:1]
        file = learn.quantize().model.data
        runs = {'float':lambda: model(x), 'float, ONNX Runtime':ort_run(float_file(model, x), x), 'int8':ort_run(file, x)}
        with torch.inference_mode(): ms = in_turns(runs, o.some(200, 5), seconds=60).round(3)
        bytes_ = {**dict.fromkeys(runs, n_bytes(model)), 'int8':len(file)}
        rows += [dict(net=name, by=k, bytes=bytes_[k], median_ms=r['median'], spread_ms=r['spread']) for k,r in ms.iterrows()]
    return rows, []

if __name__=='__main__': run(sections, 'ptq')
