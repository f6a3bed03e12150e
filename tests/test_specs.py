"Text models, recurrent nets and transformers by spec: how much of each runs how, or is stored in fewer bits"
import json, pandas as pd, pytest, torch
from pathlib import Path
from fastai.collab import CollabDataLoaders, collab_learner
from fastai.vision.all import set_seed
from torch import nn
from fastquant.all import *
from fastquant.core.basics import write_whole
from tests.helpers.data import loaders, noise
from tests.helpers.learners import classifier as plain_classifier, quiet
from tests.helpers.models import images
from tests.learner.test_text import Transformer, classifier as text_classifier, tokens

committed = Path(__file__).parent/'specs.json'
specs_shown = 'int8','dynamic','w8','w4','fp16','fp16_arithmetic'

class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn,self.head = kind(8, 16, batch_first=True),nn.Linear(16, 3)
    def forward(self, x): return self.head(self.rnn(x.squeeze(1))[0][:,-1])

class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention,self.head = nn.MultiheadAttention(8, 2, batch_first=True),nn.Linear(8, 3)
    def forward(self, x):
        x = x.squeeze(1)
        return self.head(self.attention(x, x, x)[0].mean(1))

def steps(model): return lambda path: plain_classifier(loaders(noise(1, 6, 8, n=32), bs=8), model(), path)

def collab(path):
    torch.manual_seed(0)
    df = pd.DataFrame(dict(user=torch.randint(0, 40, (300,)).tolist(), item=torch.randint(0, 50, (300,)).tolist(), rating=torch.rand(300).tolist()))
    dls = CollabDataLoaders.from_df(df, bs=32, device='cpu', num_workers=0)
    learn = quiet(collab_learner(dls, use_nn=True, layers=[16], emb_szs=dict(user=16, item=16), path=path))
    learn.fit(1)
    return learn

def vit(path):
    timm = pytest.importorskip('timm')
    return images(timm.create_model('vit_tiny_patch16_224', img_size=32, depth=1, embed_dim=48, num_classes=10), 32)

nets = {'text_classifier_learner (AWD_LSTM)':text_classifier, 'nn.LSTM':steps(lambda: Recurrent(nn.LSTM)), 'nn.GRU':steps(lambda: Recurrent(nn.GRU)),
    'nn.TransformerEncoderLayer':lambda path: plain_classifier(tokens(6), Transformer(), path), 'nn.MultiheadAttention':steps(Attention),
    'vit_tiny (timm)':vit, 'collab_learner (EmbeddingNN)':collab}

def said_of(report):
    "Layers with integer kernels, those of which weights are stored in fewer bits, and all"
    stored = len(set(report.weights_only))
    if report.arithmetic: return f'{stored} of {report.n_layers}'
    if not report.n_int8: return f'{stored} of {report.n_layers} stored'
    return f'{report.n_int8} of {report.n_layers}' + (f', {stored} stored' if stored else '')

@pytest.mark.parametrize('name', nets)
def test_specs(name, request, tmp_path):
    "`specs.json` says what happens, or is written with `--write-support`"
    set_seed(0)
    learn,said = nets[name](tmp_path),json.loads(committed.read_text()) if committed.exists() else {}
    row = {s:said_of(learn.quantize(s, n_batches=2, timed=False).model.report) for s in specs_shown}
    if request.config.getoption('--write-support'):
        said[name] = row
        write_whole(committed, (json.dumps({k:said[k] for k in nets if k in said}, indent=1)+'\n').encode())
    assert said.get(name)==row, f'{name} is {row}, and tests/specs.json says otherwise: pytest tests/test_specs.py --write-support'

def test_nothing_else_is_said(): assert list(json.loads(committed.read_text()))==list(nets)
