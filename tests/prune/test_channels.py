"Channels of models that people have, really removed: what is left does what masks did, trains, and is built again from its recipe"
import pytest, torch, torchvision
from functools import partial
from fastai.vision.all import set_seed
from fastai.vision.models.xresnet import xresnet18
from torch import nn
from torchvision.models.vgg import cfgs, make_layers
from fastquant.all import *
from fastquant.core.model import clean_copy, tensors
from fastquant.prune.select import Selection
from fastquant.prune.shrink import recipe_from_json
from fastquant.prune.channels.check import channel_groups
from fastquant.prune.channels.target import plan_for
from tests.helpers.models import timm, tv

# Models that people have

def vgg():
    "The convolutions of VGG, and a head that sees 4 places of each channel: the original has 49, and nine of ten weights there"
    wide = nn.Linear(4*512, 1024),nn.ReLU(),nn.Dropout(),nn.Linear(1024, 1024),nn.ReLU(),nn.Dropout(),nn.Linear(1024, 10)
    return nn.Sequential(make_layers(cfgs['A'], batch_norm=True), nn.AdaptiveAvgPool2d(2), nn.Flatten(), *wide)

models = dict(resnet18=(tv('resnet18'), .45), resnet50=(tv('resnet50'), .45), mobilenet_v2=(tv('mobilenet_v2'), .45), mobilenet_v3=(tv('mobilenet_v3_small'), .6),
    efficientnet=(tv('efficientnet_b0'), .5), densenet=(tv('densenet121'), .45), convnext=(timm('convnext_atto'), .65), vit=(timm('vit_tiny_patch16_224', img_size=64), .65),
    timm_resnet=(timm('resnet18'), .45), timm_mobilenet=(timm('mobilenetv3_small_050'), .7), timm_efficientnet=(timm('efficientnet_lite0'), .5),
    xresnet=(partial(xresnet18, n_out=10), .45), regnet=(tv('regnet_y_400mf'), .75),
    convnext_tv=(partial(torchvision.models.ConvNeXt, [torchvision.models.convnext.CNBlockConfig(32,64,1),torchvision.models.convnext.CNBlockConfig(64,None,2)], num_classes=10), .65),
    timm_densenet=(timm('densenet121', growth_rate=16, block_config=(2,2,2,2)), .5), vit_tv=(partial(torchvision.models.VisionTransformer, 64, 16, 2, 4, 64, 256, num_classes=10), .8), googlenet=(tv('googlenet', init_weights=False), .6), vgg=(vgg, .45))

@pytest.mark.parametrize('name', models)
def test_model(name):
    "Half of the channels of each group: masked and removed agree, the classes stay, it trains, and is smaller"
    set_seed(0)
    build,most = models[name]
    model,x = build(),torch.randn(2,3,64,64)
    plan = plan_for(s := Selection(.5, 'channel', scope='local'))(model, s, x)
    masks = plan.choose({})
    whole = n_macs(model, x)
    set_masks(model, masks)
    with evaluating(model): before = model(x)
    plan.settle()
    with evaluating(model): after = model(x)
    assert after.shape==(2,10) and (after-before).abs().max()<=1e-5*max(1, before.abs().max().item())
    assert n_macs(model, x)<most*whole and masked(model)=={}
    out = model.train()(x)
    sum(t.square().sum() for t in tensors(out)).backward()
    ran = {k for k,p in model.named_parameters() if p.grad is not None}
    assert ran>={k.rpartition('.')[0]+'.weight' for k in recipe_of(model).left if k.endswith('weight')}
    fresh = shrink(build(), recipe_from_json(recipe_of(model).to_json()))
    fresh.load_state_dict({k:v for k,v in model.state_dict().items()})
    with evaluating(fresh), evaluating(model): assert fresh(x).equal(model(x))

def test_heads():
    "Heads of an attention go as a whole, and the others do what they did"
    model = timm('vit_tiny_patch16_224', img_size=32)()
    x = torch.randn(2,3,32,32)
    found,_ = channel_groups(model, x)
    heads = [g for g in found if g.heads]
    assert len(heads)==12 and {len(g) for g in heads}=={3} and {g.step(8) for g in heads}=={1}
    plan = plan_for(s := Selection({'blocks.*.attn.qkv':.34}, 'channel', scope='local'))(model, s, x)
    set_masks(model, plan.choose({}))
    plan.settle()
    a = model.blocks[0].attn
    assert (a.num_heads,a.head_dim,a.attn_dim,a.qkv.out_features,a.proj.in_features)==(2,64,128,384,128)

def test_attention_of_torchvision():
    "All weights of `nn.MultiheadAttention` are one parameter of a fused operation: its heads stay, the width of the MLPs goes"
    model,x = models['vit_tv'][0](),torch.randn(2,3,64,64)
    found,why = channel_groups(model, x)
    assert {g.name:len(g) for g in found}=={f'encoder.layers.encoder_layer_{i}.mlp.0':256 for i in (0,1)}
    assert 'LayerNorm' in why['encoder.layers.encoder_layer_1.mlp.3']
    with pytest.raises(ValueError, match="No channels of '\\*self_attention\\*' can be removed"): channel_groups(model, x, only='*self_attention*')

def test_macs_by_two_others():
    "Our count of multiplications against Torch-Pruning's, which counts what is element by element too"
    tp = pytest.importorskip('torch_pruning')
    x = torch.randn(1,3,64,64)
    for build in (tv('resnet18'),vgg):
        model = build()
        small = clean_copy(model)
        plan = plan_for(s := Selection(.5, 'channel'))(small, s, x.repeat(2,1,1,1))
        set_masks(small, plan.choose({}))
        plan.settle()
        for m in (model,small):
            theirs = tp.utils.count_ops_and_params(m, x)
            assert .93<n_macs(m, x)/theirs[0]<=1 and n_params(m)==theirs[1]
