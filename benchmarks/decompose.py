"What low rank costs in accuracy, and what it buys in time: `python -m benchmarks.decompose --data ../shared/data`"
from __future__ import annotations
import tempfile
from torchvision.models import resnet18
from fastquant.learner.lowrank import *
from fastquant.export.engine import Engine
from fastquant.learner.quant import *
from fastquant.lowrank.layers import *
from fastquant.core.measure import latency as in_turns, layer_macs, n_params
from fastquant.core.model import evaluating, copy_model
from .common import *
from .qat import long, longer_float, teacher
from fastquant.lowrank.factors import factorisations

sections = Registry('section')

@sections
def exact(o):
    "Outputs at full rank, against those of the model as it was, relative to the largest"
    rows = []
    for name,model,x in (('resnet20',resnet20(o),cifar10(o)[1].tensors[0][:64]), ('resnet18',settled(resnet18, 64),torch.randn(4, 3, 128, 128))):
        layers,_ = find_layers(model, x)
        new = replace_layers(copy_model(model), {k:factorise(m, f, factorisations.find(f).full(m)) for k,(m,f) in layers.items()})
        with evaluating(model), evaluating(new): a,b = model(x),new(x)
        rows.append(dict(net=name, layers=len(layers), difference=((a-b).abs().max()/a.abs().max()).item()))
    worst = max(r['difference'] for r in rows)
    return rows,[target('largest difference at full rank', worst, 1e-4, 1e-5, digits=9)]

@sections
@per_processor
def latency(o):
    "ResNet-18 at 224 px with half the MACs in ONNX Runtime, against as it was"
    px = 224
    with torch.no_grad(): learn = learner(settled(resnet18, px), noise(8, px), noise(8, px), bs=4)
    half = learn.decompose(macs=.5)
    x = torch.randn(1, 3, px, px)
    with tempfile.TemporaryDirectory() as d: engines = {k:Engine(l.export_onnx(Path(d)/f'{k}.onnx').read_bytes()) for k,l in dict(dense=learn, half=half).items()}
    ms = in_turns({k:lambda e=e: e(x) for k,e in engines.items()}, n=o.some(50, 3), seconds=60)
    nets = dict(dense=learn.model, half=half.model)
    rows = [dict(net=k, macs=sum(layer_macs(nets[k], x).values()), params=n_params(nets[k]), median_ms=r['median'].round(2), spread_ms=r['spread'].round(2)) for k,r in ms.iterrows()]
    return rows,[target('ResNet-18 with half the MACs: times faster in ONNX Runtime', ms['median']['dense']/ms['median']['half'], 1.3, 1.6)]

@sections
def cifar(o):
    "ResNet-20 with half its parameters by Tucker-2, before and after fine-tuning, against the float net fine-tuned as long (that of `benchmarks.qat --only longer`)"
    learn = learner(resnet20(o), *cifar10(o), bs=128).to_channelslast(use_amp=False)
    row = lambda what,l: dict(net=what, params=n_params(l.model), top1=right(l))
    rows = [row(f'float, {long} epochs', longer_float(o)),row('as it came', learn)]
    for aware in (False,True):
        half = learn.decompose(params=.5, aware=aware)
        rows.append(row(f"half the parameters{', weighed by inputs' if aware else ''}", half))
    half = learner(half.model, *cifar10(o), bs=128).to_channelslast(use_amp=False)
    rows.append(row(f'the last, after {long} epochs', trained(o, 'decompose-taught', half, long, 2e-3, [*around(),teacher(o)])))
    for r in rows: r['lost'] = rows[0]['top1']-r['top1']
    return rows,[target('ResNet-20, half the parameters by Tucker-2: points above float', -rows[-1]['lost'], -1.5, -.5)]

if __name__=='__main__': run(sections, 'decompose')
