"What the benchmarks share: data, nets, training, a command line, and results with what made them"
from __future__ import annotations
import argparse, fastquant, io, json, os, platform, sys, time
import numpy as np, pandas as pd, torch
import torch.nn.functional as F
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from unittest import mock
from PIL import Image
from safetensors.torch import load_file, save
from torch.utils.data import TensorDataset
from torchvision.models import MobileNetV2
from fastai.vision.all import *
from fastprogress.fastprogress import progress_bar
from fastquant.core.basics import *
from fastquant.export.sparse import pack_model, unpack_model

results = Path(__file__).parent/'results'

@dataclass(frozen=True)
class Options:
    "What the command line says"
    data:Path        # The folder with the data sets
    cache:Path       # Where nets that were trained here are kept
    quick:bool=False # Small subsets, to see that everything runs
    packages:Path|None=None # Where packages with trained nets are installed
    busy:bool=False  # Do others use the machine too? See `clock`
    most:int|None=None # Items of a test set, where a section takes fewer than all
    def some(self,
        n:int,    # A number of images, epochs or rounds
        few:int=0 # Instead of it if `quick`
    )->int: return min(n, few) if self.quick else n

# Data

def spread(total, n):
    "`n` of the first `total` numbers, evenly spread: the data sets are sorted by class"
    return np.arange(n)*total//n

def decode(jpegs, i): return np.asarray(Image.open(io.BytesIO(jpegs['jpeg'][jpegs['offset'][i]:jpegs['offset'][i+1]])))

@lru_cache
def cifar10(
    o:Options
)->tuple: # Training and test set
    "CIFAR-10 from its JPEG copy, normalised with ImageNet's statistics"
    with np.load(o.data/'cifar10_jpeg.npz') as f: sets = [{k:f[f'{s}_{k}'] for k in ('jpeg','offset','label')} for s in ('train','test')]
    mean,std = (tensor(s).view(3,1,1) for s in imagenet_stats)
    def images(jpegs, n):
        idxs = spread(len(jpegs['label']), n)
        x = torch.from_numpy(np.stack([decode(jpegs, i) for i in idxs])).permute(0,3,1,2)
        return TensorDataset((x/255-mean)/std, torch.from_numpy(jpegs['label'][idxs]).long())
    return tuple(images(s, o.some(len(s['label']), few)) for s,few in zip(sets, (2048,1000)))

@lru_cache
def mnist_images(
    o:Options
)->tuple: # Training and test set
    "MNIST, from 0 to 1"
    with np.load(o.data/'mnist.npz') as f: d = {k:torch.from_numpy(f[k]) for k in f}
    def images(s, few):
        x,y = d['x'+s],d['y'+s]
        idxs = spread(len(y), o.some(len(y), few))
        return TensorDataset(x[idxs,None]/255, y[idxs].long())
    return images('tr', 4096),images('te', 1000)

def learner(
    model:nn.Module,
    train,          # A dataset
    test,           # Another one
    bs:int=64
)->Learner:
    "A Learner as anybody would make it, without progress bars"
    learn = Learner(DataLoaders.from_dsets(train, test, bs=bs, val_bs=4*bs, num_workers=0, device='cpu'), model, CrossEntropyLossFlat(), metrics=accuracy)
    return learn.remove_cb(ProgressCallback)

# Nets

class Block(nn.Module):
    "Two convolutions and a shortcut that, where sizes change, is a convolution too if `project`, and otherwise slices and pads"
    def __init__(self, ni, nf, stride, project):
        super().__init__()
        self.conv1,self.bn1 = nn.Conv2d(ni, nf, 3, stride, 1, bias=False),nn.BatchNorm2d(nf)
        self.conv2,self.bn2 = nn.Conv2d(nf, nf, 3, 1, 1, bias=False),nn.BatchNorm2d(nf)
        self.stride,self.pad = stride,(nf-ni)//2
        if project and ni!=nf: self.project = nn.Sequential(nn.Conv2d(ni, nf, 1, stride, bias=False), nn.BatchNorm2d(nf))
    def shortcut(self, x):
        if hasattr(self, 'project'): return self.project(x)
        return F.pad(x[:,:,::self.stride,::self.stride], (0,0,0,0,self.pad,self.pad)) if self.pad else x
    def forward(self, x): return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))+self.shortcut(x))

class CifarResNet(nn.Module):
    "ResNet for 32 px (He et al. 2016, section 4.2), of 6`n`+2 layers"
    def __init__(self,
        n:int=3,           # Blocks in each of the three stages
        width:int=16,      # Channels of the first stage
        project:bool=False # Shortcuts with parameters (B in the paper) instead of without (A)
    ):
        super().__init__()
        stage = lambda ni, nf, stride: nn.Sequential(Block(ni, nf, stride, project), *[Block(nf, nf, 1, project) for _ in range(n-1)])
        self.conv1,self.bn1 = nn.Conv2d(3, width, 3, 1, 1, bias=False),nn.BatchNorm2d(width)
        self.layer1,self.layer2,self.layer3 = stage(width, width, 1),stage(width, 2*width, 2),stage(2*width, 4*width, 2)
        self.linear = nn.Linear(4*width, 10)
    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))

def resnet20(o)->nn.Module:
    "The trained net of the data folder"
    model = CifarResNet()
    model.load_state_dict(load_file(o.data/'resnet20_cifar10.safetensors'))
    return model.eval()

def resnet14b(): return CifarResNet(2, project=True)

def mobilenet():
    "MobileNetV2 for 32 px: depthwise convolutions, inverted residuals, ReLU6"
    model = MobileNetV2(10, inverted_residual_setting=[[1,16,1,1],[4,24,2,2],[4,40,2,2],[4,80,2,2]])
    model.features[0][0].stride = 1,1
    return model

def vgg():
    "Convolutions one after the other, max-pooling, and two linear layers"
    sizes = 16,'pool',32,32,'pool',64,64,'pool',128,128
    convs,ni = [],3
    for nf in sizes:
        convs.append(nn.MaxPool2d(2) if nf=='pool' else ConvLayer(ni, nf))
        if nf!='pool': ni = nf
    return nn.Sequential(*convs, nn.Flatten(), nn.Linear(128*16, 128), nn.ReLU(), nn.Dropout(.3), nn.Linear(128, 10))

def digits():
    "A small net for 28 px in grey"
    convs = [ConvLayer(1, 16, 5), nn.MaxPool2d(2), ConvLayer(16, 32), nn.MaxPool2d(2), ConvLayer(32, 64), nn.MaxPool2d(2)]
    return nn.Sequential(*convs, nn.Flatten(), nn.Linear(64*9, 10))

def settled(
    net, # A function that makes the net
    px:int=224
)->nn.Module:
    "The net with random weights, and batchnorms that have seen random images: untrained ones are refused"
    set_seed(42)
    model = net()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d): m.momentum = None
    with torch.no_grad():
        for _ in range(3): model.train()(torch.randn(8, 3, px, px))
    return model.eval()

def noise(n, px): return TensorDataset(torch.randn(n, 3, px, px), torch.zeros(n, dtype=torch.long))

# Training

class Flip(Callback):
    "Mirror a random half of each batch"
    run_valid = False
    def before_batch(self):
        x = self.x
        self.learn.xb = (torch.where(torch.rand(len(x),1,1,1)<.5, x.flip(3), x),)

class Crop(Callback):
    "Move each image of a batch by up to four pixels"
    run_valid = False
    def before_batch(self):
        n,_,h,w = self.x.shape
        i,j = (torch.randint(0, 9, (n,1))+torch.arange(k) for k in (h,w))
        x = F.pad(self.x, (4,4,4,4))[torch.arange(n)[:,None,None],:,i[:,:,None],j[:,None,:]]
        self.learn.xb = (x.permute(0,3,1,2),)

class Bf16(Callback):
    "Train in 16 bits on a CPU, where fastai's `MixedPrecision` changes nothing; with avx512_bf16 that takes three fifths of the time"
    order,run_valid = MixedPrecision.order,False
    def before_batch(self): self.on = torch.autocast('cpu', dtype=torch.bfloat16).__enter__()
    def after_pred(self): self.learn.pred = to_float(self.pred)
    def after_loss(self): self.on.__exit__(None, None, None)

def around():
    "What every fit on CIFAR-10 has besides what is measured"
    return [Flip(),Crop(),Bf16()]

def train(
    o:Options,
    net,                # A function that makes the net
    data:tuple,         # Training and test set
    epochs:int=5,
    lr:float=4e-3,
    cbs=None
)->nn.Module:
    "The net, trained; from the cache if it has been trained before"
    fname = o.cache/f"{net.__name__}-{epochs}{'-quick' if o.quick else ''}.safetensors"
    set_seed(42)
    if not fname.exists():
        learn = learner(net(), *data, bs=128).to_channelslast(use_amp=False)
        learn.fit_one_cycle(o.some(epochs, 1), lr, cbs=cbs)
        fname.parent.mkdir(parents=True, exist_ok=True)
        write_whole(fname, save({k:t.contiguous() for k,t in learn.model.state_dict().items()}))
    model = net()
    model.load_state_dict(load_file(fname))
    return model.eval()

def right(learn)->float:
    "Top-1 on the test set, in percent"
    return 100*learn.validate()[1]

def trained(
    o:Options,
    name:str,   # Of what comes out; found under it if it was trained before
    learn,      # A Learner to start from, changed by training
    epochs:int,
    lr:float,
    cbs=None
)->Learner:
    "`learn` after a fit, or as it was after one; what is kept is the library's own sparse file"
    fname = o.cache/f"{name}-{epochs}{'-quick' if o.quick else ''}.safetensors"
    if not fname.exists():
        set_seed(42)
        learn.fit_one_cycle(o.some(epochs, 1), lr, reset_opt=True, cbs=cbs)
        fname.parent.mkdir(parents=True, exist_ok=True)
        write_whole(fname, pack_model(learn.model))
    learn.model,_ = unpack_model(fname.read_bytes(), learn.model)
    return learn

# Results

def target(
    what:str,       # What was measured
    value:float,    # How much it is
    at_least:float, # How much it must be; less is better where the aim is smaller than this
    aim:float,      # How much it should be
    digits:int=3    # After the point
)->dict:
    "A row that says how far a measured value got"
    value = round(value, digits)
    got = lambda goal: value<=goal if aim<at_least else value>=goal
    return dict(what=what, value=value, at_least=at_least, aim=aim, reached='aim' if got(aim) else 'floor' if got(at_least) else 'no')

def processor():
    "Model, and flags for integer dot products, of the processor; nothing is known of them outside Linux"
    info = Path('/proc/cpuinfo')
    lines = [l.partition(':')[::2] for l in info.read_text().splitlines()] if info.exists() else []
    facts = {k.strip():v.strip() for k,v in lines}
    if 'WITHOUT_VNNI' in os.environ: return f"{facts['model name']}, of which engines see no VNNI and no AVX-512",[] # see `scripts/without_vnni`
    return facts.get('model name', platform.processor()),[f for f in facts.get('flags', '').split() if 'vnni' in f or 'amx' in f]

def made_by(module):
    "What the results of `module` depend on besides its code"
    cpu,flags = processor()
    versions = dict(fastquant=fastquant.__version__, **{p:installed(p) for p in ('torch','torchvision','fastai','onnxruntime','openvino')})
    args = [Path(a).name if Path(a).is_absolute() else a for a in sys.argv[1:]]
    how = ['scripts/without_vnni']*('WITHOUT_VNNI' in os.environ)
    return dict(date=f'{pd.Timestamp.now():%Y-%m-%d}', command=' '.join([*how, 'python -m', module, *args]), cpu=cpu, cores=os.cpu_count(),
        int8_flags=flags, python=platform.python_version(), versions=versions)

@contextmanager
def clock(o:Options):
    "Let `latency` count the time that passes or, where others use the machine, the time that this process computes: on a quiet one and one thread they are the same"
    with mock.patch.object(time, 'perf_counter', time.process_time if o.busy else time.perf_counter): yield

def installed(package):
    try: return version(package)
    except PackageNotFoundError: return None

def show(name, rows, targets):
    with pd.option_context('display.width', 200, 'display.max_columns', None, 'display.float_format', '{:.4g}'.format):
        for title,o in ((name, rows),('reached', targets)): print(f'\n{title}', pd.DataFrame(o).to_string(index=False), sep='\n', flush=True)

def kind_of(flags)->str:
    "The kind of processor that has the `flags`: does it multiply integers of 8 bits without saturating?"
    return 'VNNI' if any('vnni' in f for f in flags) else 'no VNNI'

def per_processor(section):
    "Mark a section whose results depend on the kind of processor: those of each kind are kept"
    section.per_processor = True
    return section

def kept_as(section, name, flags)->str:
    "Where results of the function `section` are kept: under its `name`, and beside it on a processor without VNNI if that matters"
    kind = kind_of(flags)
    return f'{name} ({kind})' if kind!='VNNI' and getattr(section, 'per_processor', False) else name

def add_result(
    fname,      # A JSON file, new or from before
    name:str,   # Section
    **result    # Replaces what the file says of that section
):
    "Write `result` into `fname`, beside the other sections"
    found = json.loads(fname.read_text()) if fname.exists() else {}
    write_whole(fname, (json.dumps({**found, name:result}, indent=1)+'\n').encode())

def run(
    sections:Registry, # Functions from `Options` to rows and targets, by name
    name:str           # Of the benchmark, and of its file in `results`
):
    "The command line of a benchmark: run its sections one by one, print what they find, and write it down"
    p = argparse.ArgumentParser(prog=f'python -m benchmarks.{name}')
    p.add_argument('--data', type=Path, required=True, help='the folder with the data sets')
    p.add_argument('--cache', type=Path, default=Path.home()/'.cache'/'fastquant-benchmarks', help='where nets trained here are kept (%(default)s)')
    p.add_argument('--packages', type=Path, help='a folder with packages that carry trained nets, for sections that want them')
    p.add_argument('--busy', action='store_true', help='others use the machine: in latencies count the time this process computes, not the time that passes')
    p.add_argument('--most', type=int, help='at most so many texts of the test set, evenly spread, in sections that run long over all of them')
    p.add_argument('--only', nargs='+', choices=sections, default=list(sections), help='sections to run; the others stay as they are in the results')
    p.add_argument('--quick', action='store_true', help='small subsets, to see that everything runs; writes no results')
    a = p.parse_args()
    torch.set_num_threads(1)
    for section in progress_bar(a.only):
        rows,targets = sections[section](Options(a.data, a.cache, a.quick, a.packages, a.busy, a.most))
        show(section, rows, targets)
        made = made_by(f'benchmarks.{name}')
        where = kept_as(sections[section], section, made['int8_flags'])
        if not a.quick: add_result(results/f'{name}.json', where, made=made, rows=rows, targets=targets)
