"The support matrix's models: Learners around nets that people have, by name"
from copy import deepcopy
import numpy as np, pandas as pd, pytest, torch, torchvision
from fastai.tabular.all import Categorify, FillMissing, Normalize, TabularDataLoaders, tabular_learner
from fastai.vision.all import CrossEntropyLossFlat, Learner, accuracy, create_unet_model, create_vision_model, resnet18, set_seed
from fastai.vision.models.xresnet import xresnet18
from fastquant.core.model import batchnorms
from .data import loaders, noise

def images(model, size, n_out=10, chans=3):
    "A Learner around `model`, with batchnorms that have seen some batches, on noise"
    set_seed(0)
    model.train()
    with torch.no_grad():
        for _ in range(15 if any(isinstance(m, batchnorms) for m in model.modules()) else 0): model(torch.randn(8, chans, size, size))
    return Learner(loaders(noise(chans, size, size, classes=n_out), bs=8), model, loss_func=CrossEntropyLossFlat())

def unet():
    learn = images(create_unet_model(resnet18, 3, (32,32), pretrained=False), 32)
    masks = [(x, torch.zeros(32, 32).long()) for x,_ in learn.dls.train_ds]
    learn.dls = loaders(masks, bs=4)
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

def timm(name, **kwargs): return lambda: pytest.importorskip('timm').create_model(name, num_classes=10, **kwargs)
def tv(name, **kwargs): return lambda: torchvision.models.get_model(name, num_classes=10, **kwargs)
def seen(build, size=64): return lambda: images(build(), size)

models = dict(resnet18=seen(tv('resnet18')), resnet50=seen(tv('resnet50')), mobilenet_v2=seen(tv('mobilenet_v2')), mobilenet_v3_small=seen(tv('mobilenet_v3_small')),
    densenet121=seen(tv('densenet121')), squeezenet1_1=seen(tv('squeezenet1_1')), efficientnet_b0=seen(tv('efficientnet_b0')),
    xresnet18=seen(lambda: xresnet18(n_out=10)), vision_learner=seen(lambda: create_vision_model(resnet18, 10, pretrained=False)),
    unet_learner=unet, tabular=tabular, mobilenetv4=seen(timm('mobilenetv4_conv_small')), convnext_atto=seen(timm('convnext_atto')),
    vit_tiny=seen(timm('vit_tiny_patch16_224', img_size=96), 96))

_last = {}

def learner_of(name, seed=0):
    "A copy of the Learner by that name, which is built when it is not the one that was asked for last"
    if (name,seed) not in _last:
        _last.clear()
        set_seed(seed)
        _last[name,seed] = models[name]()
    set_seed(seed)
    return deepcopy(_last[name,seed])
