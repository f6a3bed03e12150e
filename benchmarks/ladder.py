"What rungs, bits where they count, and a promise are worth: `python -m benchmarks.ladder --data ../shared/data --packages FOLDER`"
from __future__ import annotations
import multiprocessing, onnxruntime, resource
from math import log2
from sklearn.datasets import load_digits
from fastquant.core.measure import n_bytes
from fastquant.core.model import copy_model, evaluating
from fastquant.core.outputs import sqnr
from fastquant.callback.data import calibration_dl, twin_of
from fastquant.export.engine import Engine
from fastquant.learner.ladder import MaxDropExceeded
from fastquant.learner.quant import *
from fastquant.quant.prepare import prepare
from fastquant.quant.rungs import recalibrate
from torchvision import models
from fastquant.callback import quant as callback_quant
from .common import *
from .peers import nncf_promise, nncf_there, ort_file, peer_files, plain_export
from .portable import crops, efficientnet_lite0, enlarged, photo_files, same_top, vit_tiny

sections = Registry('section')

# What a promise comes to

def climbed(
    o:Options,
    learn:Learner,
    spec='int8',
    **kwargs # As in `quantize`
)->tuple: # A Learner, and its table
    "What `quantize` makes of `learn` to hold a promise, or comes nearest to it with"
    try:
        with clock(o): new = learn.quantize(spec, timed=False, **kwargs)
    except MaxDropExceeded as e: new = e.best
    return new,new.ladder

def evaluations(table): return len(table['drop'].dropna())

def table_rows(net, spec, table):
    "The rows of a ladder's table, with accuracy in percent"
    keep = dict(accuracy='top1', drop='lost')
    for step,r in table.iterrows():
        row = {keep[k]:round(100*r[k], 3) for k in keep}
        yield dict(net=net, spec=spec, step=step, **row, bytes=r['bytes'], seconds=round(r['seconds'], 1), note=r['note'])

# Other people's quantizers

def batches_of(learn):
    "What `learn.quantize()` calibrates on"
    with calibration_dl(learn) as dl: return [b[:1] for b in dl]

def peer_rows(o, learn, row, **how):
    "What `row` says of each peer's file, by its name and an `Engine`; of one that is not there, that it is not"
    return [row(by, m) if m else dict(by=f'{by}: absent') for by,m in peer_files(o, learn.model, batches_of(learn), **how).items()]

def shown(net, learn, first):
    "A row for a peer's file, where the float net gets `first` percent right"
    def row(by, model):
        top1 = right(twin_of(learn, model))
        return dict(net=net, step=by, top1=round(top1, 3), lost=round(first-top1, 3), bytes=len(model.data))
    return row

# Few bits by calibration only

few_bits = 'mse','equalize','bias','adaround'

def at_bits(o, spec, max_drop, net='resnet20', model=None):
    "Rows for a net by `spec`, points lost by rounding to the nearest and with rungs, and how long `adaround` took"
    learn = learner(model or resnet20(o), *cifar10(o))
    _,t = climbed(o, learn, spec, max_drop=max_drop, ladder=few_bits)
    lost = 100*t['drop']
    return list(table_rows(net, spec, t)),lost['calibrated'],lost.get('with what helps', lost['calibrated']),t['seconds'].get('adaround', 0.)

@sections
def few(o):
    "The promise is half a point, on the test set"
    rows8,nearest,mended,seconds = at_bits(o, 'w4a8', .005)
    rows4,_,lost,_ = at_bits(o, 'w4a4', .01)
    return rows8+rows4, [target('resnet20, w4a8: share of the gap to float that is won back (%)', 100*(nearest-mended)/nearest, 70, 90, 1),
        target('resnet20, w4a4: top-1 lost (points)', lost, 3, 1.5), target('resnet20: seconds for adaround', seconds, 300, 60, 1)]

def weighed(net, by, learn, seconds=None):
    "A row for what a Learner gets right, and for how many bytes"
    return dict(net=net, by=by, top1=round(right(learn), 3), bytes=n_bytes(learn.model), seconds=seconds and round(seconds, 1))

def within_bytes(o, net, model):
    "Rows for `model` by `w4a8`, rounded to the nearest, and with 2 to 8 bits for each layer at as many bytes, likewise and with all rungs; by how many points these are better"
    learn = learner(model, *cifar10(o))
    def made(by, **kwargs):
        with clock(o):
            start = time.perf_counter()
            q = learn.quantize(timed=False, **kwargs)
            return weighed(net, by, q, time.perf_counter()-start)
    rows = [weighed(net, 'float', learn), made('w4a8, nearest', spec='w4a8')]
    share = rows[1]['bytes']/rows[0]['bytes']
    rows += [made(f'bits where they count, {by}', ladder=ladder, target={'bytes':share}) for by,ladder in (('nearest',()),('all rungs',few_bits))]
    top1 = {r['by']:r['top1'] for r in rows}
    return rows,[round(top1[f'bits where they count, {k}']-top1['w4a8, nearest'], 3) for k in ('nearest','all rungs')]

@sections
def mixed(o):
    "As many bytes as `w4a8` has, calibration only"
    rows,(nearest,best) = within_bytes(o, 'resnet20', resnet20(o))
    return rows, [target('resnet20: points better than w4a8 at its bytes, both rounded to the nearest', nearest, .5, 1.5),
        target('resnet20: points better than w4a8 to the nearest at its bytes, with rungs', best, .5, 1.5)]

@sections
def others(o):
    "The same on nets that are not in the data folder"
    rows,targets = [],[]
    for f in (vgg,mobilenet)[:o.some(2, 1)]:
        model,name = train(o, f, cifar10(o), cbs=Flip()),f.__name__
        (r8,nearest,mended,_),(r4,_,lost,_) = (at_bits(o, spec, drop, name, model) for spec,drop in (('w4a8',.005),('w4a4',.01)))
        mixed_,(_,best) = within_bytes(o, name, model)
        rows += [*r8,*r4,*mixed_]
        targets += [target(f'{name}, w4a8: share of the gap to float that is won back (%)', 100*(nearest-mended)/nearest, 70, 90, 1),
            target(f'{name}, w4a4: top-1 lost (points)', lost, 3, 1.5),
            target(f'{name}: points better than w4a8 to the nearest at its bytes, with rungs', best, .5, 1.5)]
    return rows, targets

# Outliers behind normalization layers

class Stream(nn.Module):
    "A residual stream of which a few channels behind each LayerNorm are huge, as in large transformers"
    def __init__(self, d=64):
        super().__init__()
        block = lambda: nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 2*d), nn.GELU(), nn.Linear(2*d, d))
        self.e,self.bl,self.n,self.h = nn.Linear(64, d),nn.ModuleList(block() for _ in range(4)),nn.LayerNorm(d),nn.Linear(d, 10)
    def forward(self, x):
        x = self.e(x.flatten(1))
        for b in self.bl: x = x+b(x)
        return self.h(self.n(x))

def outlier_learner():
    "It, trained on the digits of scikit-learn"
    digits = load_digits()
    x,y = torch.tensor(digits.images/16-.5).float()[:,None],torch.tensor(digits.target)
    i = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    set_seed(0)
    learn = learner(Stream(), *(TensorDataset(x[j], y[j]) for j in (i[:1300],i[1300:])))
    with learn.no_logging(): learn.fit_one_cycle(10, 5e-3)
    g = torch.ones(64)
    g[[3,17,40]] = torch.tensor([300.,800.,100.])
    with torch.no_grad():
        for b in learn.model.bl: b[0].weight.mul_(g), b[0].bias.mul_(g), b[1].weight.div_(g)
    return learn

@sections
def outliers(o):
    learn = outlier_learner()
    q,t = climbed(o, learn, max_drop=.005)
    n,first = q.model.report.n_layers,100*t['accuracy']['float']
    rows = list(table_rows('outliers', 'int8', t))+peer_rows(o, learn, shown('outliers', learn, first))
    if (nncf:=nncf_there(o)):
        data,runs = nncf_promise(nncf, learn, batches_of(learn), .005)
        rows.append(dict(shown('outliers', learn, first)('NNCF, accuracy control', Engine(data)), note=f'{runs} evaluations'))
    return rows, [target('outliers: top-1 lost (points)', 100*t['drop'].iloc[-1], .5, 0),
        target('outliers: bytes against all in int8', t['bytes'].iloc[-1]/t['bytes']['calibrated'], 1.05, 1),
        target(f'outliers: evaluations (at most {3+log2(n):.1f} for {n} layers)', evaluations(t), 6, 3, 0)]

@sections
def halving(o):
    "How often the validation set is run where layers have to stay in float"
    tries = ('outliers',outlier_learner(),'int8',.005),('resnet20',learner(resnet20(o), *cifar10(o)),'w2a8',.05)
    rows,targets = [],[]
    for net,learn,spec,max_drop in tries:
        q,t = climbed(o, learn, spec, max_drop=max_drop, ladder=())
        rows += table_rows(net, spec, t)
        n = q.model.report.n_layers
        targets.append(target(f'{net}, {spec}, no rungs: evaluations above 3 and the logarithm of {n} layers', evaluations(t)-3-log2(n), 0, -3))
    return rows, targets

# Depthwise convolutions, one scale for each weight

@sections
def per_tensor(o):
    learn = learner(train(o, mobilenet, cifar10(o), cbs=Flip()), *cifar10(o))
    _,t = climbed(o, learn, 'int8_per_tensor', max_drop=.003, ladder=few_bits)
    helped = 100*t['drop'].get('with what helps', t['drop']['calibrated'])
    first = 100*t['accuracy']['float']
    others = peer_rows(o, learn, shown('mobilenet', learn, first), per_channel=False)
    return list(table_rows('mobilenet', 'int8_per_tensor', t))+others, [target('mobilenet, int8_per_tensor: top-1 lost with all layers in int8 (points)', helped, 1, .3)]

# ImageNet weights on photos, where decisions of the float net are the labels

def decided(model, x, bs=16):
    with torch.no_grad(): return torch.cat([model(b) for b in x.split(bs)])

def photo_learner(o):
    "EfficientNet-Lite0, to calibrate on every other crop and as many enlarged pictures, with the others for validation; these by name"
    model,x = efficientnet_lite0(o),torch.cat([crops(f) for f in photo_files(o)])
    x = x[spread(len(x), o.some(len(x), 16))]
    given,seen = (enlarged(d, len(x)//2) for d in cifar10(o))
    train_,valid = torch.cat([x[::2],given]),torch.cat([x[1::2],seen])
    def labelled(x): return TensorDataset(x, decided(model, x).argmax(1))
    return learner(model, labelled(train_), labelled(valid), bs=16),{'photos':x[1::2], 'CIFAR-10, enlarged':seen}

@sections
def photos(o):
    "As it is, with rungs, and with layers in float; and by others"
    learn,sets = photo_learner(o)
    float_ = {k:decided(learn.model, v) for k,v in sets.items()}
    def near(by, model):
        got = {k:decided(model, v) for k,v in sets.items()}
        for k in (*sets,'both'):
            a,b = (torch.cat([*d.values()]) if k=='both' else d[k] for d in (float_,got))
            yield dict(net='EfficientNet-Lite0', by=by, items=k, n=len(a), sqnr=round(sqnr(a, b), 2), same_top1=same_top(a, b), bytes=len(model.data))
    def promised(most):
        q,t = climbed(o, learn, max_drop=most, ladder=few_bits)
        r = q.model.report
        return t,list(near(f'max_drop={most}, {r.n_int8} of {r.n_layers} layers in int8', q.model))
    rows = list(near('int8', learn.quantize(timed=False).model))
    (_,rungs),(t,held) = map(promised, (.1,.03)) # the first is kept by rungs alone
    rows += rungs+held
    rows += [dict(net='EfficientNet-Lite0', by=f'step: {k}', items='both', same_top1=round(100-100*r['drop'], 3), seconds=round(r['seconds'], 1), note=r['note']) for k,r in t.iloc[1:].iterrows()]
    for by,m in peer_files(o, learn.model, batches_of(learn)).items(): rows += list(near(by, m)) if m else [dict(by=f'{by}: absent')]
    def targets(how, found): return [target(f'EfficientNet-Lite0, {how}: logits on photos and enlarged CIFAR-10 (dB)', found[-1]['sqnr'], 27, 31),
        target(f'EfficientNet-Lite0, {how}: agreement on photos (%)', found[0]['same_top1'], 96, 98)]
    return rows, targets('a promise of 3 %', held)+targets('all in int8', rungs)

# How many images are enough

def calibrated(o, name, n, seed=0):
    "ResNet-20 that rounds by the spec `name`, with ranges of `n` training images, drawn with a `seed`"
    i = torch.randperm(len(cifar10(o)[0]), generator=torch.Generator().manual_seed(seed))[:n]
    batches = [(b,) for b in cifar10(o)[0].tensors[0][i].split(64)]
    sim = prepare(resnet20(o), name, *batches[0], fold=True)
    recalibrate(sim, batches)
    return sim

@sections
def images(o):
    "Agreement with float and dB on 2,000 test images"
    x = cifar10(o)[1].tensors[0][spread(len(cifar10(o)[1]), o.some(2000, 500))]
    float_ = decided(resnet20(o), x, 250)
    rows = []
    for spec in 'int8','w4a8','w4a4':
        for n in [2**i for i in range(0, 11, 5 if o.quick else 1)]:
            for seed in range(o.some(3, 1)):
                with evaluating(sim:=calibrated(o, spec, n, seed)): got = decided(sim, x, 250)
                rows.append(dict(net='resnet20', spec=spec, images=n, draw=seed, sqnr=round(sqnr(float_, got), 2), same_top1=same_top(float_, got)))
    return rows, []

# What it costs

@contextmanager
def timing(o, of):
    "A list that gets the seconds that calls of `of` (a module, and the name of a function in it) take"
    mod,name = of
    f,found = getattr(mod, name),[]
    def timed(*args, **kwargs):
        start = time.perf_counter()
        try: return f(*args, **kwargs)
        finally: found.append(time.perf_counter()-start)
    with mock.patch.object(mod, name, timed): yield found

def costs(o, learn, **kwargs):
    "Seconds that `learn.quantize()` takes, and that it takes for ranges"
    with clock(o), timing(o, (callback_quant,'set_ranges')) as ranges:
        start = time.perf_counter()
        learn.quantize(timed=False, **kwargs)
        return time.perf_counter()-start,sum(ranges)

def growth(sizes, seconds)->float:
    "The power of the size that seconds grow with, between the last two"
    (a,b),(s,t) = sizes[-2:],seconds[-2:]
    return float(np.log(t/s)/np.log(b/a))

def noisy_learner(model, n, px): return learner(model, noise(n, px), noise(8, px))

@sections
def depth(o):
    "Nets of 8 to 200 layers, 64 images of 32 px"
    rows = []
    for n in [1,3,8,16,33][:o.some(5, 2)]:
        learn = noisy_learner(settled(lambda: CifarResNet(n, 8), 32), 64, 32)
        whole,ranges = costs(o, learn)
        rows.append(dict(layers=6*n+2, seconds=round(whole, 2), a_layer=round(whole/(6*n+2), 4), ranges=round(ranges, 3)))
    return rows, [target('seconds of quantize() grow with the number of layers to the power of', growth([r['layers'] for r in rows], [r['seconds'] for r in rows]), 1.2, 1)]

class Drawn:
    "`n` random images that nobody keeps"
    def __init__(self, n): self.n = n
    def __len__(self): return self.n
    def __getitem__(self, i): return torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(int(i))),0

def of_items(o, n, q):
    "Put into `q` what calibrating on `n` images takes: seconds, and the peak memory of this process"
    torch.set_num_threads(1)
    learn = learner(settled(lambda: CifarResNet(1), 32), Drawn(n), Drawn(8))
    learn.quantize(timed=False, n_batches=1)
    whole,_ = costs(o, learn, n_batches=n//64)
    q.put((whole, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024))

@sections
def items(o):
    "ResNet-8, each time in a process of its own"
    rows,context = [],multiprocessing.get_context('spawn')
    for n in [64,256,1024,4096,16384][:o.some(5, 2)]:
        q = context.Queue()
        p = context.Process(target=of_items, args=(o, n, q))
        p.start()
        seconds,peak = q.get()
        p.join()
        rows.append(dict(items=n, seconds=round(seconds, 2), peak_bytes=peak))
    n,(first,*_,last) = [r['items'] for r in rows],rows
    return rows, [target('seconds of quantize() grow with the number of items to the power of', growth(n, [r['seconds'] for r in rows]), 1.2, 1),
        target(f'peak memory for {n[-1]} items against 64', last['peak_bytes']/first['peak_bytes'], 1.1, 1)]

class OneThread(onnxruntime.SessionOptions):
    "What `quantize_static` opens sessions with, on one thread as all else here"
    def __init__(self):
        super().__init__()
        self.intra_op_num_threads = 1

def both_clocks(f)->list:
    "Seconds that pass while `f` runs, and that this process computes"
    start = time.perf_counter(),time.process_time()
    f()
    return [time.perf_counter()-start[0],time.process_time()-start[1]]

def against_ort(o, net):
    "A row for a net: what `quantize()` takes, and ONNX Runtime's way, in turns"
    learn = noisy_learner(settled(net), 64, 224)
    def theirs():
        with mock.patch.object(onnxruntime, 'SessionOptions', OneThread):
            batches = batches_of(learn)
            ort_file(learn.model, batches, plain_export(learn.model, batches[0][0]))
    def mine():
        with timing(o, (callback_quant,'set_ranges')) as ranges: learn.quantize(timed=False)
        spent.append(sum(ranges))
    spent,found = [],[]
    with clock(o):
        for _ in range(o.some(4, 2)): found.append([*both_clocks(mine),*both_clocks(theirs)])
    wall,cpu,ort_wall,ort_cpu = np.median(found[1:], axis=0) # the first time things are imported and compiled
    def way(a, b): return dict(seconds=round(a, 2), onnx_runtime=round(b, 2), ratio=round(a/b, 3))
    computing = {f'computing_{k}':v for k,v in way(cpu, ort_cpu).items()}
    ranges = np.median(spent[1:])
    return dict(net=net.__name__, threads=1, **way(wall, ort_wall), **computing, ranges=round(ranges, 3), ranges_share=round(ranges/wall, 4))

@sections
def seconds(o):
    "64 images of 224 px, one thread; ONNX Runtime's way is PyTorch's export, its preprocessing and `quantize_static`, in turns with ours"
    rows = [against_ort(o, net) for net in (models.resnet18,models.efficientnet_b0,vit_tiny)[:o.some(3, 1)]]
    targets = [target(f"{r['net']}: quantize() against ONNX Runtime's whole way", r['ratio'], 1.3, .8) for r in rows]
    return rows, targets+[target('share of set_ranges in quantize(), at most (%)', 100*max(r['ranges_share'] for r in rows), 8, 3)]

if __name__=='__main__': run(sections, 'ladder')
