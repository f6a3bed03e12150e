"`fastquant.runtime`: what answers where a model is served, without PyTorch or fastai"
import os, subprocess, sys
import numpy as np, pytest
from fastai.vision.all import Learner, Normalize, Resize, imagenet_stats, nn
from fastquant.all import *
from .helpers.data import picture, pictures
from .helpers.learners import quiet

heavy = 'torch','torchvision','fastai','fastcore','pandas','matplotlib','onnx','scipy'

def python(code, *args):
    "What a fresh process prints"
    return subprocess.run([sys.executable, '-c', code, *map(str, args)], capture_output=True, text=True, check=True, env=dict(os.environ, OMP_NUM_THREADS='1')).stdout

@pytest.mark.parametrize('name', ['fastquant','fastquant.runtime'])
def test_nothing_heavy_is_imported(name): assert python(f'import sys, {name}; print([k for k in {heavy} if k in sys.modules])')=='[]\n'

@pytest.fixture(scope='module')
def learn(tmp_path_factory):
    dls = pictures(40, item_tfms=Resize(16), batch_tfms=Normalize.from_stats(*imagenet_stats))
    net = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, dls.c))
    return quiet(Learner(dls, net, path=tmp_path_factory.mktemp('runtime')))

def test_it_answers_where_none_of_them_can_be(learn):
    f,im = learn.export_onnx('model.onnx'),picture(7)
    im.save(learn.path/'7.png')
    code = f'import sys; sys.modules.update(dict.fromkeys({heavy}))\nfrom fastquant.runtime import Model; print(Model(sys.argv[1])(sys.argv[2]))'
    said = eval(python(code, f, learn.path/'7.png'))
    with learn.no_bar(): p = learn.predict(im)[2]
    assert np.allclose([said[v] for v in learn.dls.vocab], p, atol=1e-4)

def test_a_file_that_some_processors_run_wrong(learn):
    from fastquant.runtime import BadInput, Model
    f = learn.quantize('int8_full', timed=False).export_onnx('full.onnx')
    with pytest.raises(BadInput, match="saturate.*Quantize with 'int8'"): Model(f)
