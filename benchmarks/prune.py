"What pruning costs in accuracy, and what it buys: `python -m benchmarks.prune --data ../shared/data`"
from __future__ import annotations
import re, tempfile
from torchvision.models import resnet18
from fastquant.quant.grid import *
from fastquant.callback.distill import *
from fastquant.callback.prune import *
from fastquant.callback.rigl import *
from fastquant.export.engine import *
from fastquant.export.onnx import *
from fastquant.learner.quant import *
from fastquant.prune.structures import *
from fastquant.learner.prune import *
from fastquant.prune.mask import *
from fastquant.export.sparse import *
from fastquant.core.measure import latency as in_turns
from fastquant.quant.spec import *
from .common import *
from .qat import long, longer_float, teacher
from fastquant.core.model import copy_model

sections = Registry('section')

def copy_of(learn): return learner(copy_model(learn.model), learn.dls.train_ds, learn.dls.valid_ds, bs=learn.dls.train.bs)

# MNIST

@sections
def mnist(o):
    "The claim this project started from: nine of ten weights of a small conv net on MNIST cost next to nothing"
    data = mnist_images(o)
    start = learner(train(o, digits, data), *data, bs=128)
    n = 5
    longer = trained(o, 'prune-mnist-float', copy_of(start), n, 2e-3)
    rows = [dict(net='as trained', sparsity=0., top1=right(start)), dict(net=f'{n} epochs more', sparsity=0., top1=right(longer))]
    for amount in (.9,.95,.98):
        l = trained(o, f'prune-mnist-{amount}', copy_of(start), n, 2e-3, PruneScheduleCallback(amount))
        rows.append(dict(net=f'{n} epochs more, cubic schedule', sparsity=sparsity(l.model), top1=right(l)))
    rows += [dict(net='one shot', sparsity=a, top1=right(start.prune(a))) for a in (.5,.9)]
    for r in rows: r['lost'] = rows[1]['top1']-r['top1']
    return rows,[target('points lost at 90%', rows[2]['lost'], .1, 0)]

# LeNet: pruned, quantized, packed

def lenet_300_100():
    first = nn.Flatten(),nn.Linear(784,300),nn.ReLU(),nn.Dropout(.2)
    return nn.Sequential(*first, nn.Linear(300,100), nn.ReLU(), nn.Dropout(.2), nn.Linear(100,10))

def lenet_5():
    convs = nn.Conv2d(1,20,5),nn.MaxPool2d(2),nn.Conv2d(20,50,5),nn.MaxPool2d(2)
    return nn.Sequential(*convs, nn.Flatten(), nn.Linear(800,500), nn.ReLU(), nn.Dropout(.2), nn.Linear(500,10))

# Of each: how to make it, amounts, bits, epochs at first and afterwards, the temperature at which it is taught, and what the paper reaches
lenets = dict(lenet_5=(lenet_5, {'0':.2, '2':.8, '5':.95, '8':.7}, 5, (8,12), 2, 39), lenet_300_100=(lenet_300_100, {'1':.92, '4':.86, '7':.3}, 6, (12,24), 4, 40))

@sections
def lenet(o):
    "Bytes of a pruned, quantized and packed net against its weights as float32, as in Deep Compression (Han et al. 2016, table 1); the float LeNet-5 that was trained on is the teacher of both"
    rows,targets,data,best = [],[],mnist_images(o),None
    for name,(net,amounts,bits,(first,more),temperature,aim) in lenets.items():
        set_seed(42)
        start = trained(o, f'prune-{name}', learner(net(), *data, bs=128), first, 2e-3)
        longer = trained(o, f'prune-{name}-longer', copy_of(start), more, 2e-3)
        best = best or longer
        cbs = [PruneScheduleCallback(amounts, last=True, end=.6),DistillCallback(best, weight=.9, temperature=temperature)]
        pruned = trained(o, f'prune-{name}-taught', copy_of(start), more, 2e-3, cbs)
        q = pruned.quantize(Spec(weight=TensorSpec(Grid(bits), 'mse', granularity=PerChannel())))
        size,loaded = packed(q)
        floats = 4*sum(p.numel() for p in start.model.parameters())
        sizes = {'float':(start,floats), f'float, {more} epochs more':(longer,floats), f'pruned, {more} epochs more':(pruned,len(pack_model(pruned.model))),
            f'and weights of {bits} bits, as ONNX':(q,len(q.model.data)), 'and packed':(loaded,size)}
        than = max(right(start), right(longer))
        rows += [dict(net=name, what=k, bytes=b, times_smaller=floats/b, top1=right(l), lost=than-right(l)) for k,(l,b) in sizes.items()]
        targets += [target(f'{name}: times smaller', floats/size, 30, aim), target(f'{name}: points lost', rows[-1]['lost'], 0., -.01)]
    return rows,targets

def packed(q)->tuple:
    "Bytes of the sparse file of `q`, and what is loaded from it"
    with tempfile.TemporaryDirectory() as d:
        fname = q.save_sparse(Path(d)/'q.safetensors')
        size,loaded = fname.stat().st_size,q.load_sparse(fname)
    if loaded.model.data!=q.model.data: raise RuntimeError("The file does not give back the model that it was made of.")
    return size,loaded

# CIFAR-10

def cifar_learner(o, model): return learner(model, *cifar10(o), bs=128).to_channelslast(use_amp=False)

@sections
def cifar(o, epochs=8):
    "The trained ResNet-20 along schedules to 80% and 90%, and to 2:4, with the float net as teacher, against the float net fine-tuned for longer (that of `benchmarks.qat --only longer`)"
    start,targets = cifar_learner(o, resnet20(o)),[]
    rows = [dict(net=f'float, {long} epochs', sparsity=0., top1=right(longer_float(o))),dict(net='as it came', sparsity=0., top1=right(start))]
    for name,how,lr,*goal in (('80%',dict(amount=.8),1e-3,.7,.3), ('90%',dict(amount=.9),2e-3,2.,1.2), ('2:4',dict(structure=NM(2,4)),1e-3,.3,0)):
        cbs = [*around(),PruneScheduleCallback(**how, end=.4),teacher(o)]
        l = trained(o, f"prune-taught-{re.sub('%|:', '', name)}", cifar_learner(o, resnet20(o)), epochs, lr, cbs)
        rows += [dict(net=f'{name}, {k}', sparsity=sparsity(n.model), top1=right(n)) for k,n in (('one shot',start.prune(**how)), (f'{epochs} epochs',l))]
        targets.append(target(f'points lost, {name}, with the float net as teacher', rows[0]['top1']-rows[-1]['top1'], *goal))
    for r in rows: r['lost'] = rows[0]['top1']-r['top1']
    return rows,targets

@sections
def rigl(o):
    "RigL, a random mask that stays, and gradual pruning: ResNet-8 from random weights to 90%, the same number of epochs"
    runs = {'dense':None, 'random mask that stays':RigLCallback(.9, every=10**9), 'RigL':RigLCallback(.9), 'gradual pruning':PruneScheduleCallback(.9)}
    rows = []
    for name,cb in runs.items():
        set_seed(42)
        l = trained(o, f"prune-rigl-{name.replace(' ','-')}", cifar_learner(o, CifarResNet(1)), 4, 8e-3, [*around(),*L(cb)])
        rows.append(dict(training=name, sparsity=sparsity(l.model), top1=right(l)))
    return rows,[]

# Time

@sections
@per_processor
def steps(o):
    "A training step of ResNet-18 with a mask of 90%, against one without; 128 px, batches of 16, in turns"
    x,y = torch.randn(16,3,128,128),torch.randint(0, 10, (16,))
    def step(prune):
        set_seed(42)
        model = resnet18(num_classes=10).train()
        if prune: set_masks(model, {k:torch.rand_like(m.weight)<.1 for k,m in groups(model, 'weight', x)[0].items()})
        opt = Adam(model.parameters(), lr=1e-4)
        def one():
            F.cross_entropy(model(x), y).backward()
            opt.step()
            opt.zero_grad()
        return one
    table = in_turns({'float':step(False), 'masked':step(True)}, n=o.some(40, 3), seconds=o.some(300, 20))
    ratio = table['median']['masked']/table['median']['float']
    return table.rename_axis('step').reset_index().to_dict('records'),[target('step with a mask / step without', ratio, 1.1, 1.03)]

@sections
@per_processor
def latency(o):
    "What scattered zeros do for the speed of engines for dense matrices, which is nothing: ResNet-18 at 224 px in ONNX Runtime"
    set_seed(42)
    x = torch.randn(8,3,224,224)
    data = torch.utils.data.TensorDataset(x, torch.zeros(8).long())
    with torch.no_grad(): model = resnet18(num_classes=10).train()
    model(x)
    learn = learner(model, data, data, bs=4)
    sparse = learn.prune(.9)
    with tempfile.TemporaryDirectory() as d:
        files = {k:l.export_onnx(Path(d)/f'{k}.onnx').read_bytes() for k,l in dict(dense=learn, sparse=sparse).items()}
        packed = sparse.save_sparse(Path(d)/'s.safetensors').stat().st_size
    engines = {k:Engine(b) for k,b in files.items()}
    table = in_turns({k:lambda m=m: m(x[:1]) for k,m in engines.items()}, n=o.some(50, 3))
    rows = table.rename_axis('net').reset_index().to_dict('records')
    for r in rows: r['bytes'] = packed if r['net']=='sparse' else len(files['dense'])
    return rows,[]

if __name__=='__main__': run(sections, 'prune')
