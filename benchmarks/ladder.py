"What rungs, bits where they count, and a promise are worth: `python -m benchmarks.ladder --data ../shared/data --packages FOLDER`"
from __future__ import annotations
from math import log2
from sklearn.datasets import load_digits
from fastquant.core.measure import n_bytes
from fastquant.core.model import copy_model, evaluating
from fastquant.core.outputs import sqnr
from fastquant.learner.ladder import MaxDropExceeded
from fastquant.learner.quant import *
from fastquant.quant.prepare import prepare
from fastquant.quant.rungs import recalibrate
from .common import *
from .portable import crops, efficientnet_lite0, enlarged, photo_files, same_top

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

# Few bits by calibration only

few_bits = 'mse','equalize','bias','adaround'

def at_bits(o, spec, max_drop):
    "Rows for ResNet-20 by `spec`, points lost by rounding to the nearest and with rungs, and how long `adaround` took"
    learn = learner(resnet20(o), *cifar10(o))
    _,t = climbed(o, learn, spec, max_drop=max_drop, ladder=few_bits)
    lost = 100*t['drop']
    return list(table_rows('resnet20', spec, t)),lost['calibrated'],lost.get('with what helps', lost['calibrated']),t['seconds']['adaround']

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
    n = q.model.report.n_layers
    return list(table_rows('outliers', 'int8', t)), [target('outliers: top-1 lost (points)', 100*t['drop'].iloc[-1], .5, 0),
        target('outliers: bytes against all in int8', t['bytes'].iloc[-1]/t['bytes']['calibrated'], 1.05, 1),
        target(f'outliers: evaluations (at most {3+log2(n):.1f} for {n} layers)', evaluations(t), 6, 3, 0)]

# Depthwise convolutions, one scale for each weight

@sections
def per_tensor(o):
    learn = learner(train(o, mobilenet, cifar10(o), cbs=Flip()), *cifar10(o))
    _,t = climbed(o, learn, 'int8_per_tensor', max_drop=.003, ladder=few_bits)
    helped = 100*t['drop'].get('with what helps', t['drop']['calibrated'])
    return list(table_rows('mobilenet', 'int8_per_tensor', t)), [target('mobilenet, int8_per_tensor: top-1 lost with all layers in int8 (points)', helped, 1, .3)]

# ImageNet weights on photos, where decisions of the float net are the labels

def decided(model, x, bs=16):
    with torch.no_grad(): return torch.cat([model(b) for b in x.split(bs)])

@sections
def photos(o):
    "Every other crop, and as many enlarged pictures, to calibrate on; the others to compare on"
    model,x = efficientnet_lite0(o),torch.cat([crops(f) for f in photo_files(o)])
    x = x[spread(len(x), o.some(len(x), 16))]
    given,seen = (enlarged(d, len(x)//2) for d in cifar10(o))
    sets = {'photos':x[1::2], 'CIFAR-10, enlarged':seen}
    float_ = {k:decided(model, v) for k,v in sets.items()}
    train_,valid = torch.cat([x[::2],given]),torch.cat([*sets.values()])
    learn = learner(model, TensorDataset(train_, decided(model, train_).argmax(1)), TensorDataset(valid, torch.cat([*float_.values()]).argmax(1)), bs=16)
    def near(by, q): return [dict(net='EfficientNet-Lite0', by=by, items=k, n=len(v), sqnr=round(sqnr(float_[k], decided(q.model, v)), 2),
        same_top1=same_top(float_[k], decided(q.model, v))) for k,v in sets.items()]
    rows = near('int8', learn.quantize(timed=False))
    for ladder in [('equalize',),('equalize','bias'),few_bits][:o.some(3, 1)]:
        q,t = climbed(o, learn, max_drop=0, ladder=ladder)
        rows += near(' and '.join(ladder)+f", {q.model.report.n_int8} of {q.model.report.n_layers} layers", q)
    best = max((r for r in rows if r['items']=='photos'), key=lambda r: r['sqnr'])
    return rows, [target('EfficientNet-Lite0: logits on photos (dB)', best['sqnr'], 27, 31), target('EfficientNet-Lite0: agreement on photos (%)', best['same_top1'], 96, 98)]

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

if __name__=='__main__': run(sections, 'ladder')
