"Exported files, with what they were made from"
import onnx, torch
from dataclasses import dataclass
from fastai.callback.training import ShortEpochCallback
from functools import lru_cache
from torch import nn
from fastquant.all import *
from fastquant.callback.data import inputs
from fastquant.export.verify import gate
from .layers import Net
from .models import learner_of

@dataclass(frozen=True)
class Made:
    "A file, and what it was made from"
    rounded:nn.Module      # The model that rounds
    sim:nn.Module          # The same, converted
    proto:onnx.ModelProto  # The file made of that
    xb:tuple               # A few inputs
    @property
    def data(self): return self.proto.SerializeToString()
    def feeds(self, n=None):
        "`n` inputs as a session takes them"
        return {i.name:x[:n].numpy() for i,x in zip(self.proto.graph.input, self.xb)}
    def gate(self, proto=None, n=None, **kw):
        "Show the gate the file, or another one, on `n` inputs"
        gate(self.rounded, self.sim, proto or self.proto, [x[:n] for x in self.xb], **kw)

def few(learn):
    "As many inputs as the gate is shown"
    return tuple(x[:8].detach().as_subclass(torch.Tensor) for x in inputs(learn, learn.dls.valid, 1)[0])

def rounds(model, spec, *xb, fold=True):
    "`model` with ranges from `xb`"
    prepare(model, spec, *xb, fold=fold)
    watch(model, *xb)
    set_ranges(model)
    return model

def calibrated(learn, spec):
    "The model of `learn`, rounded after training"
    return rounds(copy_model(learn.model).eval(), spec, *few(learn))

def trained(learn, spec):
    "The model of `learn` after a few batches of training through rounding"
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-4, cbs=[QuantAwareCallback(spec, start=.2),ShortEpochCallback(.25)])
    model = copy_model(learn.model).eval()
    fake_quant_of(model).refresh()
    return model

def made(model, *xb):
    "The file of the rounded `model`"
    rounded,sim = copy_model(model),convert(model)
    return Made(rounded, sim, to_onnx(sim, *xb), xb)

def of_net(net, x, spec):
    "The file of `net`, rounded after training"
    return made(rounds(copy_model(net), spec, x), x)

def make(name, spec, how=calibrated, seed=0):
    "The file of a model of the support matrix, with weights from `seed`"
    learn = learner_of(name, seed)
    return made(how(learn, spec), *few(learn))

kept = lru_cache(make) # files that several tests look at

def small():
    "A small net with statistics, and inputs for it"
    torch.manual_seed(0)
    net,x = Net(),torch.randn(16, 3, 12, 12)
    with torch.no_grad():
        for _ in range(20): net(x)
    return net.eval(),x
