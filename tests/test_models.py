"The support matrix: each of these models quantizes, verifies, and runs every layer in int8 unless it is named here"
import json
from collections import Counter
from copy import deepcopy
from pathlib import Path
import numpy as np, openvino as ov, pandas as pd, pytest, torch, torchvision
from fastai.callback.training import ShortEpochCallback
from fastai.tabular.all import Categorify, FillMissing, Normalize, TabularDataLoaders, tabular_learner
from fastai.vision.all import CrossEntropyLossFlat, DataLoaders, Learner, accuracy, create_unet_model, create_vision_model, resnet18, set_seed
from fastai.vision.models.xresnet import xresnet18
from torch import nn
from fastquant.all import *
from fastquant.core.basics import write_whole
from fastquant.export.engine import optimized
from fastquant.callback.data import inputs

def images(model, size, n_out=10, chans=3):
    "A Learner around `model`, with batchnorms that have seen some batches, on noise"
    set_seed(0)
    model.train()
    with torch.no_grad():
        for _ in range(15): model(torch.randn(8, chans, size, size))
    ds = [(torch.randn(chans, size, size), torch.tensor(i%n_out)) for i in range(32)]
    dls = DataLoaders.from_dsets(ds, ds, bs=8, device='cpu', num_workers=0)
    return Learner(dls, model, loss_func=CrossEntropyLossFlat())

def unet():
    learn = images(create_unet_model(resnet18, 3, (64,64), pretrained=False), 64)
    masks = [(x, torch.zeros(64, 64).long()) for x,_ in learn.dls.train_ds]
    learn.dls = DataLoaders.from_dsets(masks, masks, bs=4, device='cpu', num_workers=0)
    learn.loss_func = CrossEntropyLossFlat(axis=1)
    return learn

def tabular():
    set_seed(0)
    df = pd.DataFrame(dict(cat=np.random.choice(list('abcd'), 600), flag=np.random.choice(list('xy'), 600), num=np.random.randn(600), big=np.random.randn(600)*100))
    df['y'] = ((df.cat=='a')^(df.num>0)).map({True:'yes', False:'no'})
    dls = TabularDataLoaders.from_df(df, procs=[Categorify,FillMissing,Normalize], cat_names=['cat','flag'], cont_names=['num','big'],
        y_names='y', valid_idx=list(range(500,600)), bs=64, device='cpu')
    learn = tabular_learner(dls, layers=[50,20], metrics=accuracy)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(3, 1e-2)
    return learn

def timm(name, size):
    def build(): return images(pytest.importorskip('timm').create_model(name, num_classes=10), size)
    return build
def tv(name, size=64):
    def build(): return images(torchvision.models.get_model(name, num_classes=10), size)
    return build

models = dict(resnet18=tv('resnet18'), resnet50=tv('resnet50'), mobilenet_v2=tv('mobilenet_v2'), mobilenet_v3_small=tv('mobilenet_v3_small'),
    densenet121=tv('densenet121'), squeezenet1_1=tv('squeezenet1_1'), efficientnet_b0=tv('efficientnet_b0'),
    xresnet18=lambda: images(xresnet18(n_out=10), 64), vision_learner=lambda: images(create_vision_model(resnet18, 10, pretrained=False), 64),
    unet_learner=unet, tabular=tabular, mobilenetv4=timm('mobilenetv4_conv_small', 64), convnext_atto=timm('convnext_atto', 64),
    vit_tiny=timm('vit_tiny_patch16_224', 224))
in_float = {} # By model, the layers that stay in float

columns = 'int8','OpenVINO','pruned','channels','trained'
committed = Path(__file__).parent/'support.json'

@pytest.fixture
def supports(request, name):
    "Note that the model can do something: `support.json` has to say the same, or is written with `--write-support`"
    def note(column, what='yes'):
        said = json.loads(committed.read_text()) if committed.exists() else {}
        if request.config.getoption('--write-support'):
            row = {**said.get(name, {}), column:what}
            said[name] = {c:row[c] for c in columns if c in row}
            write_whole(committed, (json.dumps({k:said[k] for k in models if k in said}, indent=1)+'\n').encode())
        else: assert said.get(name, {}).get(column)==what, f'{column} of {name} is {what!r}, and tests/support.json says otherwise: pytest tests/test_models.py --write-support'
    return note

@pytest.mark.parametrize('name', models)
def test_model(name, supports):
    learn = models[name]()
    before = {k:v.clone() for k,v in learn.model.state_dict().items()}
    with learn.no_bar(): qlearn = learn.quantize(n_batches=2)
    report = qlearn.model.report
    print(f'{name}: {report}, {report.sqnr:.1f} dB from its simulation, {report.sqnr_float:.1f} dB from float')
    assert set(report.float_layers)==set(in_float.get(name, []))
    kernels = Counter(n.op_type for n in optimized(qlearn.model.data).graph.node)
    assert not {'Conv','FusedConv','Gemm','FusedGemm'} & set(kernels)
    assert kernels['QLinearConv']==sum(isinstance(m, nn.Conv2d) for m in learn.model.modules())
    assert all(v.equal(before[k]) for k,v in learn.model.state_dict().items())
    with qlearn.no_bar(), learn.no_bar(): p,q = learn.get_preds()[0],qlearn.get_preds()[0]
    assert sqnr(p, q)>10
    supports('int8', f'{report.n_int8} of {report.n_layers}')
    xb = inputs(learn, learn.dls.valid, 1)[0]
    ours = qlearn.model(*xb)
    theirs, = ov.Core().compile_model(ov.Core().read_model(qlearn.model.data))([x.numpy() for x in xb]).values()
    assert sqnr(ours, torch.from_numpy(theirs))>10
    supports('OpenVINO')

@pytest.mark.parametrize('name', models)
def test_prune_model(name, supports):
    "A fit that prunes leaves as many zeros as it was told to"
    learn = models[name]()
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-4, cbs=[PruneScheduleCallback(.5, scope='local', end=.2),ShortEpochCallback(.25)])
    w = torch.cat([m.weight.flatten() for m in masked(learn.model).values()])
    assert len(w) and abs((w==0).float().mean()-.5)<.01 and abs(sparsity(learn.model)-.5)<.001
    supports('pruned')

@pytest.mark.parametrize('name', models)
def test_cut_model(name, supports, tmp_path):
    "A fit removes channels, with the whole model as teacher, and a fresh Learner does the same from the file"
    learn = models[name]()
    whole = deepcopy(learn)
    cbs = [PruneScheduleCallback(.5, structure='channel', scope='local', end=.2),DistillCallback(whole),ShortEpochCallback(.25)]
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-4, cbs=cbs)
    assert n_params(learn.model)<.95*n_params(whole.model)
    assert sorted(id(p) for ps in learn.opt.param_lists for p in ps)==sorted(id(p) for p in learn.model.parameters())
    cut = whole.load_sparse(learn.save_sparse(tmp_path/'cut.safetensors'))
    with learn.no_bar(), cut.no_bar(): assert learn.get_preds()[0].equal(cut.get_preds()[0])
    supports('channels')

@pytest.mark.parametrize('name', models)
def test_parity_after_training(name, supports):
    "After a fit through rounding the engine predicts what the rounded model does, and every parameter and step has had its part in it"
    learn,spec = models[name](),'w4a8' if name in ('resnet18','mobilenet_v2','tabular') else 'int8'
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-4, cbs=[QuantAwareCallback(spec, start=.2),ShortEpochCallback(.25)])
        qlearn = learn.quantize(n_batches=1)
    report = qlearn.model.report
    print(f'{name}, {spec}: {report}, {report.sqnr:.1f} dB from its simulation')
    assert report.trained and set(report.float_layers)==set(in_float.get(name, []))
    assert sorted(id(p) for ps in learn.opt.param_lists for p in ps)==sorted(id(p) for p in learn.model.parameters())
    with qlearn.no_bar(), learn.no_bar(): p,q = learn.get_preds()[0],qlearn.get_preds()[0]
    assert sqnr(p, q)>10
    supports('trained', spec)

def test_nothing_else_is_said():
    "Every entry of the matrix is one that a test below makes"
    said = json.loads(committed.read_text())
    assert list(said)==list(models) and all(tuple(row)==columns for row in said.values())
