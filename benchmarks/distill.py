"What a teacher, a peer and oneself are worth, and what a step with a teacher costs: `python -m benchmarks.distill --data ../shared/data`"
from __future__ import annotations
from torchvision.models import resnet18
from fastquant.callback.distill import *
from fastquant.distill.losses import *
from fastquant.learner.quant import *
from fastquant.core.measure import latency as in_turns
from .common import *
from .qat import teacher, two_bits
from fastquant.callback.selfdistill import MutualCallback

sections = Registry('section')

def small(): return CifarResNet(1, 8)
def resnet8(): return CifarResNet(1)

def fitted(
    o:Options,
    net,          # A function that makes the net
    epochs:int,
    lr:float,
    seed:int=0,
    cbs=()        # Besides augmentation
)->Learner:
    "`net` from random weights, after a fit on CIFAR-10"
    set_seed(seed)
    learn = learner(net(), *cifar10(o), bs=128).to_channelslast(use_amp=False)
    learn.fit_one_cycle(o.some(epochs, 1), lr, cbs=[*around(),*cbs])
    return learn

def gain(rows, ways):
    "How much better the second of `ways` is than the first, on the average over seeds"
    a,b = ([r['top1'] for r in rows if r['way']==w] for w in ways)
    return np.mean(b)-np.mean(a)

@sections
@per_processor
def time(o):
    "A step of fastai's loop at 128 px, batches of 16, with a ResNet-18 as teacher and without, on the average of fits of ten; both in the layout that trains faster here"
    set_seed(42)
    ds = TensorDataset(torch.randn(16, 3, 128, 128), torch.randint(0, 10, (16,)))
    def learn():
        l = learner(resnet18(num_classes=10), ds, ds, bs=16)
        l.add_cb(NoValid())
        return l.to_channelslast(use_amp=False)
    teacher,steps = resnet18(num_classes=10).to(memory_format=torch.channels_last),o.some(10, 1)
    ways = {'alone':[], 'soft targets':[DistillCallback(teacher)], 'soft targets and attention':[DistillCallback(teacher, features=Match('layer*', loss='attention'))]}
    learns = {k:learn() for k in ways}
    fns = {k:lambda k=k: learns[k].fit(steps, 1e-4, cbs=ways[k]) for k in ways}
    ms = in_turns(fns, o.some(8, 1), warmup=1, seconds=600)/steps
    base = ms['median']['alone']
    rows = [dict(way=k, median_ms=r['median'].round(1), spread_ms=r['spread'].round(1), ratio=(r['median']/base).round(3)) for k,r in ms.iterrows()]
    return rows,[target('distillation step against plain step, ResNet-18', ms['median']['soft targets']/base, 1.35, 1.29)]

class NoValid(Callback):
    "A fit is its training"
    def before_validate(self): raise CancelValidException

@sections
def student(o, epochs=6):
    "A ResNet-8 of half the width with ResNet-20 as teacher, against itself alone"
    ways = {'alone':lambda: [], 'soft targets':lambda: [teacher(o, temperature=2.)]}
    rows = [dict(way=k, seed=s, epochs=epochs, top1=right(fitted(o, small, epochs, 1e-2, s, cbs()))) for s in range(o.some(3, 1)) for k,cbs in ways.items()]
    return rows,[target('small student with ResNet-20 as teacher against alone (points)', gain(rows, ways), .5, 1.5)]

@sections
def w2a2(o, epochs=1):
    "Training ResNet-20 through the rounding of w2a2, with the float net as teacher and without"
    rows = [dict(way=way, epochs=epochs, top1=right(two_bits(o, taught, epochs))) for way,taught in (('labels only',False), ('with the float net as teacher',True))]
    return rows,[target('w2a2 with the float net as teacher against without (points)', rows[1]['top1']-rows[0]['top1'], 0, .5)]

@sections
def mutual(o, epochs=6):
    "Pairs of ResNet-8s that learn from each other, less and less towards the end of the fit, against each alone"
    ways,rows = ('alone','mutual'),[]
    for a in range(0, o.some(4, 2), 2):
        b = a+1
        set_seed(b)
        peer = learner(resnet8(), *cifar10(o), bs=128).to_channelslast(use_amp=False)
        first = fitted(o, resnet8, epochs, 1e-2, a, [MutualCallback(peer, weight=SchedLin(.5, 0))])
        nets = dict(alone=[fitted(o, resnet8, epochs, 1e-2, s) for s in (a,b)], mutual=[first,peer])
        rows += [dict(way=w, net=i, epochs=epochs, top1=right(l)) for w in ways for i,l in zip((a,b), nets[w])]
    return rows,[target('mutual learning of two ResNet-8s against each alone (points)', gain(rows, ways), 0, .5)]

if __name__=='__main__': run(sections, 'distill')
