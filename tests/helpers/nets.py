"Nets for tests, their stages, and what is in them"
from functools import partial
from fastai.vision.all import Adam, L, Lookahead, OptimWrapper, RAdam, SGD, params
from torch import nn
import torch

def conv(i, o, stride=1): return nn.Sequential(nn.Conv2d(i,o,3,stride,1,bias=False), nn.BatchNorm2d(o), nn.ReLU())
def classify(n, n_out=10): return nn.AdaptiveAvgPool2d(1),nn.Flatten(),nn.Linear(n,n_out)
def staged(n=16, n_out=10): return nn.Sequential(conv(1,n), conv(n,2*n,2), nn.Sequential(conv(2*n,4*n,2), *classify(4*n,n_out)))
def encoder(pretrained=False, **kwargs):
    "A small one that `unet_learner` takes in place of `resnet18`"
    return nn.Sequential(conv(3,16,2), conv(16,32,2), conv(32,64,2), *classify(64))
def three_convs(): return nn.Sequential(conv(1,16), conv(16,32,2), conv(32,32), *classify(32))
def stages(m): return L(m[0], m[1], m[2]).map(params)

def two_convs(first, then, n_out=3):
    "For images of two channels, one convolution with a batchnorm and one without"
    convs = nn.Conv2d(2, first, 3, bias=False),nn.BatchNorm2d(first),nn.ReLU(),nn.Conv2d(first, then, 3),nn.ReLU()
    return nn.Sequential(*convs, *classify(then, n_out))

def for_ranks(n, norm):
    "With batchnorms each process computes statistics of its own half of a batch; without, both together do what one process does"
    def conv(i, o): return nn.Sequential(nn.Conv2d(i, o, 3, 2, 1), nn.BatchNorm2d(o) if norm else nn.Identity(), nn.ReLU())
    return nn.Sequential(conv(1, n), conv(n, 2*n), nn.Flatten(), nn.Linear(8*n, 10))

class Raise(nn.Module):
    "Raises in the middle of a forward pass, once"
    def __init__(self, error, at):
        super().__init__()
        self.error,self.at,self.n = error,at,0
    def forward(self, x):
        if self.training:
            self.n += 1
            if self.n==self.at: raise self.error('stop')
        return x

def inner(model): return getattr(model, 'module', model)
def state(model): return {k:v.detach().clone() for k,v in model.state_dict().items()}
def same(a, b): return a.keys()==b.keys() and all(torch.equal(v, b[k]) for k,v in a.items())
def same_with_nan(a, b):
    "The same bit for bit, where NaN equals itself"
    def equal(v, w): return v.shape==w.shape and torch.isclose(v, w, rtol=0, atol=0, equal_nan=True).all()
    return a.keys()==b.keys() and all(equal(v, b[k]) for k,v in a.items())

opts = dict(momentum=partial(SGD, mom=.9), adam=Adam, l2=partial(Adam, decouple_wd=False), radam=RAdam, lookahead=lambda p, lr: Lookahead(Adam(p, lr), k=3),
    torch=partial(OptimWrapper, opt=torch.optim.AdamW))
