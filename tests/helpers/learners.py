"Learners that say nothing, callbacks that look on, and what has to hold of every fit"
import random, torch
from fastai.callback.fp16 import MixedPrecision
from fastai.vision.all import Callback, CrossEntropyLossFlat, Learner, accuracy, noop
from torch import nn

def quiet(learn):
    "`learn`, without a progress bar or a table"
    learn.remove_cbs([cb for cb in learn.cbs if cb.name=='progress'])
    learn.logger = noop
    return learn

def classifier(dls, model, path='.', **kwargs):
    "A quiet Learner that tells classes apart"
    return quiet(Learner(dls, model, path=path, **{'loss_func':CrossEntropyLossFlat(), 'metrics':accuracy, **kwargs}))

# Callbacks

class Do(Callback):
    "Call `f` with the Learner at `event`"
    def __init__(self, order=50, run_valid=False, **events):
        self.order,self.run_valid = order,run_valid
        for k,f in events.items(): setattr(self, k, lambda f=f: f(self.learn))

class Seeded(Callback):
    "The same batches in an epoch, whatever came before it"
    order = -20
    def before_train(self):
        torch.manual_seed(self.epoch)
        self.dls.train.rng = random.Random(self.epoch)

class Stages(Callback):
    "Learning rates, momenta and weight decay of the last three groups of parameters, and which of them train, at every step"
    def before_fit(self): self.log = []
    def before_step(self):
        n = len(self.opt.hypers)-3 # what a callback brings comes first
        self.log.append([[(h['lr'],h['mom'],h['wd']) for h in self.opt.hypers[n:]], [[p.requires_grad for p in ps] for ps in self.opt.param_lists[n:]]])

class Bf16(Callback):
    "What `MixedPrecision` does on a GPU, on a CPU"
    order,dtypes = MixedPrecision.order,()
    def before_fit(self): self.dtypes = set()
    def before_batch(self):
        self.on = torch.autocast('cpu', dtype=torch.bfloat16)
        self.on.__enter__()
    def after_pred(self):
        self.dtypes.add(self.pred.dtype)
        self.learn.pred = self.pred.float()
    def after_loss(self): self.on.__exit__(None, None, None)

# Laws

def check_owned(learn):
    "The optimizer has every parameter of the model exactly once, and no other"
    owned = [id(p) for ps in learn.opt.param_lists for p in ps]
    assert sorted(owned)==sorted(id(p) for p in learn.model.parameters())

def every_parameter_moves(learn):
    "A law of every fit: the optimizer owns all parameters, and each moves in the next step"
    before = {k:p.detach().clone() for k,p in learn.model.named_parameters() if p.requires_grad}
    if learn.opt is not None: assert {id(p) for p in learn.opt.all_params().itemgot(0)}=={id(p) for p in learn.model.parameters()}
    learn.fit(1, 1e-2)
    stuck = [k for k,p in learn.model.named_parameters() if p.requires_grad and before[k].shape==p.shape and before[k].equal(p)]
    assert not stuck, stuck

def widths(model): return [m.weight.shape[0] for m in model.modules() if isinstance(m, (nn.Conv2d,nn.Linear))]
