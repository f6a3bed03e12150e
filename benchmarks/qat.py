"Training through rounding: accuracy against float trained as long, time and memory of a step"
from __future__ import annotations
import multiprocessing, resource, warnings
from functools import partial
from torchvision import models
from fastquant.callback.distill import *
from fastquant.callback.quant import *
from fastquant.export.onnx import quiet
from fastquant.learner.quant import *
from fastquant.quant.prepare import *
from fastquant.core.measure import latency as in_turns, n_bytes
from fastquant.quant.train import *
from .common import *
from fastquant.quant.fakequant import fake_quant_of
from fastquant.quant.site import Site

sections = Registry('section')

# Accuracy

def top1(
    learn:Learner,
    test            # A dataset
)->Tensor: # 1. for each image that it gets right
    x,y = test.tensors
    with torch.no_grad(): return (torch.cat([learn.model.eval()(b) for b in x.split(256)]).argmax(1)==y).float()

def tuned(
    o:Options,
    spec,           # The name of one; None for float
    data:tuple,     # Training and test set
    epochs:int,
    lr:float,       # Of the first cycle; a second one has half of it
    how:str='',     # A word for `cbs`
    cbs=(),         # Besides augmentation and rounding
    before:int=0    # Epochs of the first cycle, if this is a second one
)->Learner:
    "The trained ResNet-20, trained on for `epochs`, calibrated before and through the rounding of `spec`; from the cache if that has been done before"
    fname = o.cache/f"resnet20-{spec}{how and '-'+how}-{f'{before}-' if before else ''}{epochs}-{lr}{'-quick' if o.quick else ''}.safetensors"
    learn = tuned(o, spec, data, before, lr, how, cbs) if before else learner(resnet20(o), *data, bs=64).to_channelslast(use_amp=False)
    if not fname.exists():
        set_seed(42+before)
        if spec and not before: learn.validate(cbs=PTQCalibrate(spec=spec))
        learn.fit_one_cycle(o.some(epochs, 1), lr/2 if before else lr, reset_opt=True, cbs=[Flip(),Crop(),*([QuantAwareCallback(spec)] if spec else []),*cbs])
        fname.parent.mkdir(parents=True, exist_ok=True)
        write_whole(fname, save({k:t.contiguous() for k,t in learn.model.state_dict().items()}))
    if spec: prepare(learn.model, spec, data[1].tensors[0][:2])
    learn.model.load_state_dict(load_file(fname))
    return learn

def row(spec, how, right, than, learn):
    "Top-1 in percent, how far above float trained as long, and the standard error of that"
    gain = 100*(right-than)
    return dict(spec=spec, how=how, top1=round(100*right.mean().item(), 3), above_float=round(gain.mean().item(), 3),
        error=round(gain.std().item()/len(gain)**.5, 3), bytes=n_bytes(learn.model))

goals = dict(int8=(-.1,0.), w4a4=(-.6,-.2), w2a2=(-3.,-2.))

def against_float(
    o:Options,
    epochs:int, # Of each net, the float one too
    **lrs       # Learning rate for each spec: the fewer bits, the further weights have to go
):
    "What is shipped after calibration only, and after training through rounding, against float trained as long"
    data = cifar10(o)
    float_ = tuned(o, None, data, epochs, 3e-4)
    than = top1(float_, data[1])
    rows = [row('float', 'trained', than, than, float_)]
    for spec,lr in lrs.items():
        for how,learn in (('calibrated',float_), ('trained',tuned(o, spec, data, epochs, lr))):
            with warnings.catch_warnings(action='ignore'): shipped = learn.quantize(spec)
            rows.append(row(spec, how, top1(shipped, data[1]), than, shipped))
    above = {(r['spec'],r['how']):r['above_float'] for r in rows}
    return rows, [target(f'resnet20, {k}, {epochs} epochs: top-1 above float trained as long (points)', above[k,'trained'], *goals[k]) for k in lrs]

@sections
def cifar(o): return against_float(o, 2, int8=3e-4, w4a4=5e-4, w2a2=2e-3)

long = 12

def teacher(o, temperature=4.):
    "The float net as it came, as a teacher"
    return DistillCallback(resnet20(o).to(memory_format=torch.channels_last), weight=.9, temperature=temperature)

def longer_float(o, epochs=long, before=0): return tuned(o, None, cifar10(o), epochs, 3e-4, 'bf16', [Bf16()], before)

def two_bits(
    o:Options,
    taught:bool, # With the float net as teacher, or by labels only?
    epochs:int=long,
    before:int=0 # Epochs of a cycle before these
)->Learner:
    "The trained ResNet-20 after training through the rounding of w2a2"
    how,cbs = ('taught',[Bf16(),teacher(o)]) if taught else ('bf16',[Bf16()])
    return tuned(o, 'w2a2', cifar10(o), epochs, 3e-3, how, cbs, before)

@sections
def longer(o, again=8):
    "Two bits want more epochs, and a teacher: one cycle, and a second one with half the learning rate"
    test,rows = cifar10(o)[1],[]
    for cycles in (dict(epochs=long),dict(epochs=again, before=long)):
        float_,total = longer_float(o, **cycles),sum(cycles.values())
        with warnings.catch_warnings(action='ignore'): shipped = two_bits(o, True, **cycles).quantize('w2a2')
        than = top1(float_, test)
        rows += [row('float', f'{total} epochs', than, than, float_),row('w2a2', f'{total} epochs, with the float net as teacher', top1(shipped, test), than, shipped)]
    return rows,[target(f'resnet20, w2a2, {total} epochs, with the float net as teacher: top-1 above float trained as long (points)', rows[-1]['above_float'], *goals['w2a2'])]

# Time and memory

def through_fx(model, x):
    "`model` prepared for training by torch's FX graph mode; None where torch no longer has it"
    try:
        from torch.ao.quantization import get_default_qat_qconfig_mapping
        from torch.ao.quantization.quantize_fx import prepare_qat_fx
    except ImportError: return None
    with quiet(): return prepare_qat_fx(model.train(), get_default_qat_qconfig_mapping('x86'), (x,))

def rounded(spec, model, x):
    "`model` prepared with `spec`, with ranges"
    prepare(model, spec, x)
    fake_quant_of(model).how = Site.follow
    model.train()(x)
    follow(model)
    start(model)
    return model

ways = {'float':lambda m, x: m, 'int8, ranges follow':partial(rounded, 'int8'), 'int8, ranges frozen':partial(rounded, 'int8'),
    'w4a4, steps learn':partial(rounded, 'w4a4'), 'FX graph mode':through_fx}

def step(
    net, # A function that makes the net
    way:str # One of `ways`
):
    "A function that does a whole step: forward, backward, optimizer, and what the callback does; None if there is no such way"
    x,y = torch.randn(16, 3, 128, 128),torch.randint(0, 1000, (16,))
    model = ways[way](settled(net, 64).train(), x)
    if model is None: return None
    opt,follows = SGD(trainable_params(model), lr=1e-3, mom=.9),fake_quant_of(model) and 'frozen' not in way
    def run():
        if follows: fake_quant_of(model).how = Site.follow
        loss = F.cross_entropy(model(x), y)
        if follows: follow(model)
        loss.backward()
        was = [p.detach().clone() for p in steps(model)]
        opt.step()
        limit_change(model, was)
        opt.zero_grad()
    return run

@sections
@per_processor
def time(o):
    rows,targets = [],[]
    for net,goal in ((models.resnet18,(1.6,1.25)), (models.mobilenet_v2,(2.2,1.5))):
        fns = {k:f for k in ways if (f:=step(net, k))}
        ms = in_turns(fns, o.some(15, 2), warmup=2, seconds=600).round(3)
        name,base = net.__name__,ms['median']['float']
        rows += [dict(net=name, way=k, median_ms=r['median'], spread_ms=r['spread'], ratio=round(r['median']/base, 3)) for k,r in ms.iterrows()]
        targets.append(target(f'{name}: int8 step against float step', ms['median']['int8, ranges follow']/base, *goal))
    return rows, targets

def peak(net, way, q):
    "Put into `q` by how many bytes the net and three steps raise the peak of this process"
    torch.set_num_threads(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run = step(net, way)
    for _ in range(3): run()
    q.put((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss-before)*1024)

@sections
def memory(o):
    rows,context = [],multiprocessing.get_context('spawn')
    for net in (models.resnet18,models.mobilenet_v2)[:o.some(2, 1)]:
        for way in ways:
            if way=='FX graph mode' and through_fx(nn.Sequential(nn.Linear(1, 1)), torch.zeros(1, 1)) is None: continue
            q = context.Queue()
            p = context.Process(target=peak, args=(net, way, q))
            p.start()
            rows.append(dict(net=net.__name__, way=way, bytes=q.get()))
            p.join()
    base = {r['net']:r['bytes'] for r in rows if r['way']=='float'}
    return [dict(r, ratio=round(r['bytes']/base[r['net']], 3)) for r in rows], []

if __name__=='__main__': run(sections, 'qat')
