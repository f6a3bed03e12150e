"A Learner that several tests make files of"
import pytest
from fastai.vision.all import set_seed
from torch import nn
from tests.helpers.data import loaders, noise
from tests.helpers.learners import classifier
from tests.helpers.nets import classify

@pytest.fixture
def learn(tmp_path):
    set_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 64, 3), nn.ReLU(), *classify(64, 3))
    learn = classifier(loaders(noise(1, 8, 8, n=48), bs=8), net, tmp_path)
    learn.fit(1, 1e-2)
    return learn
