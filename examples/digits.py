"Train a small conv net on the handwritten digits of scikit-learn, make it int8, and compare the two"
import pandas as pd, torch, warnings
from fastai.vision.all import *
from fastquant.all import *
from sklearn.datasets import load_digits

def data():
    digits = load_digits()
    xs,ys = torch.tensor(digits.images/16).float()[:,None],torch.tensor(digits.target)
    items = list(zip(F.interpolate(xs, scale_factor=4, mode='bilinear'), ys))
    idxs = torch.randperm(len(items), generator=torch.Generator().manual_seed(0)).tolist()
    train,valid = [[items[i] for i in o] for o in (idxs[:1400], idxs[1400:])]
    return DataLoaders.from_dsets(train, valid, bs=64, device='cpu', num_workers=0)

def net(): return nn.Sequential(ConvLayer(1, 32), ConvLayer(32, 64, stride=2), ResBlock(1, 64, 64), ConvLayer(64, 128, stride=2),
    ResBlock(1, 128, 128), nn.AdaptiveAvgPool2d(1), Flatten(), nn.Linear(128, 10))

if __name__=='__main__':
    warnings.filterwarnings('ignore')
    set_seed(42)
    learn = Learner(data(), net(), loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    print('Training a float model ...')
    with learn.no_bar(): learn.fit_one_cycle(4, 5e-3)
    print('\nQuantizing it: learn.quantize() ...')
    with learn.no_bar(): qlearn = learn.quantize(fname='digits.int8.onnx')
    print(qlearn.model.report, '\n')
    with learn.no_bar(), qlearn.no_bar(): table = learn.compare(qlearn)
    print(table.T.to_string(float_format=lambda v: f'{v:,.0f}' if abs(v)>=100 else f'{v:.4f}'))
    print(f'\nWritten to {(learn.path/"digits.int8.onnx").resolve()}: it runs in ONNX Runtime and OpenVINO.')
