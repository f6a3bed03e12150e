"Losses on outputs that are no classes of an item"
import torch
import torch.nn.functional as F
from fastai.vision.all import BCEWithLogitsLossFlat, CrossEntropyLossFlat, MSELossFlat, set_seed
from torch import nn
from torch.utils.data import TensorDataset
from fastquant.all import *
from tests.helpers.data import loaders, shuffled
from tests.helpers.learners import Do, classifier
from tests.helpers.nets import state

def learner(path, ds, model, loss_func):
    set_seed(0)
    return classifier(loaders(ds), model, path, loss_func=loss_func, metrics=None)

def test_segmentation_and_other_losses(tmp_path):
    "Classes are where the loss function says; several labels and quantities have losses of their own"
    x = shuffled(64, 0)[0].tensors[0]
    pixels = TensorDataset(x, (x[:,0]>0).long())
    model = lambda n: nn.Sequential(nn.Conv2d(1,n,3,padding=1), nn.ReLU(), nn.Conv2d(n,2,1))
    learn = learner(tmp_path, pixels, model(3), CrossEntropyLossFlat(axis=1))
    guide,seen = model(8),[]
    def note(l):
        with torch.no_grad(): t = guide(l.x)
        seen.append((l.distill.losses[-1], 16*F.kl_div((l.pred/4).log_softmax(1), (t/4).softmax(1), reduction='none').sum(1).mean()))
    learn.fit(1, 1e-3, cbs=[DistillCallback(guide),Do(after_loss=note)])
    assert all(torch.allclose(a, b, atol=1e-5) for a,b in seen)
    for loss,n,f in (('soft_labels',3,BCEWithLogitsLossFlat()), ('mse',1,MSELossFlat()), ('cosine',5,MSELossFlat())):
        ds = TensorDataset(x, torch.rand(64,n).round())
        head = lambda: nn.Sequential(nn.Flatten(), nn.Linear(64,n))
        learn = learner(tmp_path, ds, head(), f)
        was = state(learn.model)
        learn.fit(1, 1e-2, cbs=DistillCallback(head(), loss, weight=1))
        assert not any(torch.equal(v, was[k]) for k,v in state(learn.model).items()) or loss=='cosine'
