"What removing channels costs in accuracy, and buys in time: `python -m benchmarks.structured --data ../shared/data`"
from __future__ import annotations
import multiprocessing, torchvision
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from time import perf_counter
from torchvision.models import list_models, resnet18
from fastquant.callback.prune import *
from fastquant.export.engine import *
from fastquant.export.onnx import *
from fastquant.learner.quant import *
from fastquant.prune.structures import *
from fastquant.learner.prune import *
from fastquant.prune.mask import *
from fastquant.prune.shrink import *
from fastquant.prune.select import *
from fastquant.prune.channels import *
from fastquant.core.measure import latency as in_turns, n_macs, n_params
from fastquant.core.model import evaluating, tensors, copy_model
from .common import *
from .qat import long, longer_float, teacher
from fastquant.prune.channels.target import plan_for

sections = Registry('section')

@sections
def cifar(o, again=8):
    "Half the multiplications of ResNet-20, with the float net as teacher, against the float net fine-tuned as long (that of `benchmarks.qat --only longer`): one cycle, and a second one with half the learning rate"
    start = lambda: learner(resnet20(o), *cifar10(o), bs=128).to_channelslast(use_amp=False)
    x = torch.randn(2,3,32,32)
    def against(float_, nets):
        "A row for each, with what it loses against `float_`"
        rows = [dict(net=k, macs=n_macs(l.model, x), parameters=n_params(l.model), top1=right(l)) for k,l in {**float_,**nets}.items()]
        return [dict(r, lost=rows[0]['top1']-r['top1']) for r in rows]
    half = dict(target={'macs':.5}, structure=Channel(4), scope='local')
    once = trained(o, 'structured-taught', start(), long, 4e-3, [*around(),PruneScheduleCallback(**half, end=.3),teacher(o)])
    rows = against({f'float, {long} epochs':longer_float(o)}, {'as it came':start(), 'half, one shot':start().prune(**half), f'half along a schedule, {long} epochs':once})
    twice = trained(o, f'structured-taught-{long}', once, again, 2e-3, [*around(),teacher(o)])
    rows += against({f'float, {long+again} epochs':longer_float(o, again, long)}, {f'half along a schedule, {long+again} epochs':twice})
    return rows,[target('share of multiplications left', rows[-1]['macs']/rows[0]['macs'], .52, .5),target('points lost', rows[-1]['lost'], 1., .3)]

@sections
@per_processor
def latency(o):
    "ResNet-18 at 224 px, batch 1, one thread: half the multiplications, in PyTorch and in ONNX Runtime, and int8 on top"
    data,x = noise(16, 224),torch.randn(1,3,224,224)
    learn = learner(settled(lambda: resnet18(num_classes=10)), data, data, bs=8)
    half = learn.prune(target={'macs':.5}, scope='local')
    floats = {'float':learn,'half':half}
    engines = {f'{k}, ONNX Runtime':Engine(to_bytes(to_onnx(copy_model(l.model), x))) for k,l in floats.items()}
    ints = {f'{k}, int8':l.quantize(n_batches=1).model for k,l in floats.items()}
    nets = {**{k:l.model.eval() for k,l in floats.items()}, **engines, **ints}
    with torch.no_grad(): table = in_turns({k:lambda m=m: m(x) for k,m in nets.items()}, n=o.some(60, 3), seconds=300)
    rows = [dict(net=k, macs=n_macs(m, x), **table.loc[k], times_faster=table['median']['float']/table['median'][k]) for k,m in nets.items()]
    ms = table['median']
    return rows,[target('half, eager', ms['float']/ms['half'], 1.7, 1.9),
        target('half, ONNX Runtime', ms['float, ONNX Runtime']/ms['half, ONNX Runtime'], 1.7, 1.9), target('half and int8, against float eager', ms['float']/ms['half, int8'], 8, 10)]

def failed(name, why=''): return dict(net=name, runs=False, groups=0, macs_left=1., px=0, seconds=0., why=why)

smallest = dict(maxvit_t=224, inception_v3=299, vit_h_14=56) # px that a model takes, where 64 is too small or no multiple of its patches

def one_model(name):
    "What becomes of a model that loses half of the channels of each group: a row of the table"
    torch.set_num_threads(1)
    set_seed(42)
    px = smallest.get(name, 64)
    size = dict(image_size=px) if name.startswith('vit') else {}
    model = torchvision.models.get_model(name, num_classes=10, **size, **(dict(init_weights=False) if name in ('googlenet','inception_v3') else {}))
    x,row,begun = torch.randn(2,3,px,px),failed(name),perf_counter()
    try:
        s = Selection(.5, 'channel', scope='local')
        plan,whole = plan_for(s)(model, s, x),n_macs(model, x)
        set_masks(model, plan.choose({}))
        plan.settle()
        out = tensors(model.train()(x))
        sum(t.square().sum() for t in out).backward()
        with evaluating(model): same = model(x).shape==(2,10)
        row.update(runs=same, groups=len(plan.groups), macs_left=n_macs(model, x)/whole)
    except (ValueError,RuntimeError) as e: row['why'] = str(e).splitlines()[0][:160]
    return {**row, 'px':px, 'seconds':round(perf_counter()-begun, 1)}

def apart(f, *args):
    "What `f` returns in a process of its own, whose memory is free after that"
    processes = multiprocessing.get_context('forkserver')
    processes.set_forkserver_preload(['benchmarks.common','fastquant.learner.prune'])
    with ProcessPoolExecutor(1, mp_context=processes) as pool: return pool.submit(f, *args).result()

@sections
def models(o):
    "Every classification model of torchvision, at 64 px or the smallest size it takes: does it run forward and backward with half of the channels of each group?"
    names,rows = list_models(torchvision.models),[]
    for name in names[:o.some(len(names), 4)]:
        try: rows.append(apart(one_model, name))
        except BrokenProcessPool: rows.append(failed(name, 'its process was killed, as happens where memory runs out'))
        print(rows[-1], flush=True)
    return rows,[target('models that lose channels and run', sum(r['runs'] for r in rows), 70, 77)]

if __name__=='__main__': run(sections, 'structured')
