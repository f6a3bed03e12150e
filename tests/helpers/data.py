"Data for tests: scikit-learn's digits as tensors and as pictures, a table, and noise"
import numpy as np, pandas as pd, torch
from fastai.tabular.all import Categorify, FillMissing, Normalize, TabularDataLoaders
from fastai.vision.all import CategoryBlock, DataBlock, DataLoader, DataLoaders, ImageBlock, PILImage, PILImageBW, PILMask, RandomSplitter, set_seed
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset

digits = load_digits()
xs,ys = torch.tensor(digits.images/16-.5).float()[:,None],torch.tensor(digits.target)

def shuffled(n_train, n_valid):
    "Digits to train and to validate on, in an order of their own"
    idx = torch.randperm(len(xs), generator=torch.Generator().manual_seed(0))
    return [TensorDataset(xs[i], ys[i]) for i in (idx[:n_train],idx[n_train:n_train+n_valid])]

def first(n_train, n_valid):
    "The first digits there are, as lists"
    items = list(zip(xs[:n_train+n_valid], ys))
    return items[:n_train],items[n_train:]

def noise(*shape, n=32, classes=3):
    "Random inputs, and classes in turn"
    return [(torch.randn(shape), torch.tensor(i%classes)) for i in range(n)]

def loaders(train, valid=None, bs=32, **kwargs):
    "`DataLoaders` in this process, on the CPU"
    return DataLoaders.from_dsets(train, valid or train, bs=bs, device='cpu', num_workers=0, **kwargs)

def in_order(*parts):
    "`DataLoaders` of digits that are never shuffled, from indices and batch size of each part"
    dls = [DataLoader(TensorDataset(xs[i], ys[i]), bs=bs, shuffle=False, num_workers=0, device=torch.device('cpu')) for i,bs in parts]
    return DataLoaders(*dls, device=torch.device('cpu'))

# Pictures

def pixels(i): return (digits.images[i]*15.9).astype('uint8')
def larger(a): return a.repeat(4, 0).repeat(4, 1)
def gray(i): return PILImageBW.create(pixels(i))
def picture(i): return PILImage.create(np.stack([larger(pixels(i))]*3, -1))
def label(i): return str(digits.target[i])
def ink(i): return PILMask.create(larger((digits.images[i]>8).astype('uint8')))

def pictures(n, y_block=CategoryBlock, get_y=label, valid=.25, bs=16, get_x=picture, block=ImageBlock, device='cpu', **kwargs):
    "The first `n` digits through fastai's data blocks, always the same"
    set_seed(0)
    block = DataBlock((block,y_block), get_x=get_x, get_y=get_y, splitter=RandomSplitter(valid, seed=0), **kwargs)
    return block.dataloaders(range(n), bs=bs, num_workers=0, device=device)

# A table

def table(n):
    "Rows of a category and two numbers, with the answer in `y`"
    df = pd.DataFrame(dict(cat=np.random.choice(list('abcd'), n), num=np.random.randn(n), big=100*np.random.randn(n)))
    df['y'] = np.where((df.cat<'c')^(df.num>0), 'yes', 'no')
    return df

def rows(df, n_train, procs=(Categorify,FillMissing,Normalize)):
    "`DataLoaders` of a `table`"
    return TabularDataLoaders.from_df(df, procs=list(procs), cat_names=['cat'], cont_names=['num','big'], y_names='y', bs=64,
        valid_idx=list(range(n_train, len(df))), device='cpu')
