"Texts that are good or bad, and a Learner of fastai's that reads them"
import random
import pandas as pd
from fastai.text.all import AWD_LSTM, BaseTokenizer, TextDataLoaders, awd_lstm_clas_config, set_seed, text_classifier_learner
from .learners import quiet

small = dict(emb_sz=8, n_hid=12, n_layers=2)

def texts(n=40, longest=40):
    "Good and bad ones, of different lengths"
    draw = random.Random(0)
    def word(good): return draw.choice(['good','fine'] if good else ['bad','sad']) if draw.random()<.4 else f'word{draw.randint(0, 9)}'
    rows = [(' '.join(word(i%2) for _ in range(draw.randint(3, longest))), ['no','yes'][i%2], float(i%2), i>=n*2//3) for i in range(n)]
    return pd.DataFrame(rows, columns=['text','label','number','is_valid'])

def data(**kwargs):
    "`DataLoaders` of `texts`"
    how = dict(text_col='text', label_col='label', valid_col='is_valid', bs=8, seq_len=12, num_workers=0, device='cpu', tok_tfm=BaseTokenizer())
    return TextDataLoaders.from_df(texts(), **{**how, **kwargs})

def classifier(path='.', dls=None, config=None, **kwargs):
    "A small AWD_LSTM that tells good texts from bad ones"
    set_seed(0)
    config = {**awd_lstm_clas_config, **small, **(config or {})}
    learn = quiet(text_classifier_learner(dls or data(), AWD_LSTM, pretrained=False, seq_len=12, path=path, config=config, **kwargs))
    learn.model.to(learn.dls.device)(learn.dls.one_batch()[0]) # so that batchnorms have seen something
    learn.model.reset()
    return learn
