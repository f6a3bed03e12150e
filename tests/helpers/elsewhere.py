"What Learners do whose model and data are on another device than the CPU, and what the same ones do on the CPU: `python -m tests.helpers.elsewhere` prints both, or what went wrong, a line of JSON for each"
import json, tempfile, traceback, warnings
import torch
from fastai.vision.all import DataLoader, DataLoaders, ImageBlock, PILImageBW, SaveModelCallback, load_learner, set_seed
from torch import nn
from torch.utils.data import TensorDataset
from fastquant.all import *
from . import texts
from .data import digits, gray, pictures
from .learners import classifier
from .nets import classify, staged, three_convs

checks = {}
def check(f): checks[f.__name__] = f
def of(name, f, *args): checks[name] = lambda make: f(make, *args)

class Words(nn.Module):
    "Tells what four words are about"
    def __init__(self):
        super().__init__()
        self.emb,self.mix,self.out = nn.Embedding(17, 16),nn.Linear(16, 32),nn.Linear(32, 10)
    def forward(self, x): return self.out(self.mix(self.emb(x)).relu().amax(1))

class Rows(nn.Module):
    "Reads a picture from top to bottom"
    def __init__(self, kind):
        super().__init__()
        self.rnn,self.out = kind(8, 16, batch_first=True, bidirectional=True),nn.Linear(32, 10)
    def forward(self, x): return self.out(self.rnn(x.squeeze(1))[0].amax(1))
def lstm(): return Rows(nn.LSTM)
def gru(): return Rows(nn.GRU)

class Attentive(nn.Module):
    "Lets rows of a picture look at each other"
    def __init__(self):
        super().__init__()
        self.mix,self.out = nn.TransformerEncoderLayer(8, 2, 16, dropout=0., batch_first=True),nn.Linear(8, 10)
    def forward(self, x): return self.out(self.mix(x.squeeze(1)).mean(1))

class Alone(nn.Module):
    "A batchnorm that no layer takes in, a sum, and pieces that are joined"
    def __init__(self):
        super().__init__()
        self.bn,self.first,self.then = nn.BatchNorm2d(1),nn.Conv2d(1, 8, 3, padding=1),nn.Conv2d(8, 8, 3, padding=1)
        self.end = nn.Sequential(nn.BatchNorm2d(16), nn.ReLU(), *classify(16))
    def forward(self, x):
        x = self.first(self.bn(x).relu())
        return self.end(torch.cat([x, x+self.then(x)], 1))

def learner(device, model=three_convs, **kwargs):
    set_seed(0)
    x,y = torch.tensor(digits.images/16).float()[:,None],torch.tensor(digits.target)
    if model is Words: x = x[:,0,::2,3].mul(16).long()
    dls = DataLoaders(*(DataLoader(TensorDataset(x[s], y[s]), bs=64, num_workers=0, device=device) for s in (slice(256),slice(256,384))), device=device)
    return classifier(dls, model().to(device), path=tempfile.mkdtemp(), **kwargs)

def fitted(learn, n=1, **kwargs):
    learn.fit(n, 1e-2, **kwargs)
    return learn

def quantized(make, spec, model=three_convs):
    return fitted(make(model)).quantize(spec, timed=False)
def trained_through(make, spec, model=three_convs):
    return fitted(make(model), cbs=QuantAwareCallback(spec)).quantize(timed=False)
def pruned_while(make, criterion): return fitted(make(), cbs=PruneScheduleCallback(.5, criterion=criterion))
def pruned(make, criterion): return fitted(make()).prune(.5, criterion=criterion)
def taught(make, cb): return fitted(make(), cbs=cb(fitted(make())))

for s in 'int8','int8_per_tensor','int8_full','int8_symmetric','w4a8','w4','fp16','fp16_arithmetic','dynamic': of(f'quantize {s}', quantized, s)
for s in 'int8','w4a4','w8','dynamic': of(f'train through {s}', trained_through, s)
for s in 'dynamic','w8': of(f'words {s}', quantized, s, Words)
for m,s in (lstm,'dynamic'),(lstm,'fp16_arithmetic'),(gru,'w8'),(gru,'fp16'): of(f'{m.__name__} {s}', quantized, s, m)
for s in 'int8','w4','fp16_arithmetic': of(f'attention {s}', quantized, s, Attentive)
of('train attention through int8', trained_through, 'int8', Attentive)
of('train an LSTM through dynamic', trained_through, 'dynamic', lstm)
of('batchnorm alone', quantized, 'int8', Alone)
for s in 'magnitude','taylor','wanda': of(f'prune in one shot by {s}', pruned, s)
for s in 'magnitude','movement': of(f'prune while it trains by {s}', pruned_while, s)

@check
def calibrate_by_hand(make):
    learn = fitted(make())
    learn.validate(cbs=PTQCalibrate())
    return learn.quantize(timed=False)

@check
def find_a_learning_rate_and_fine_tune(make):
    learn = make(cbs=QuantAwareCallback())
    learn.lr_find(num_it=4, show_plot=False)
    learn.fine_tune(1, 1e-2)
    return learn.quantize(timed=False)

@check
def keep_the_best(make): return fitted(make(cbs=[QuantAwareCallback(), SaveModelCallback()]), 2)

@check
def grow_again(make): return fitted(make(), 2, cbs=RigLCallback(.5))

@check
def promise(make): return fitted(make()).quantize(max_drop=.3, timed=False)

@check
def climb(make):
    try: return fitted(make()).quantize('int8_per_tensor', max_drop=0., timed=False)
    except MaxDropExceeded as e: return e.best

@check
def compare(make):
    learn = fitted(make())
    learn.compare(learn.quantize(timed=False))
    learn.layer_errors()
    return learn

@check
def prune_then_round(make): return fitted(fitted(make(), cbs=PruneScheduleCallback(.5)), cbs=QuantAwareCallback()).quantize(timed=False)

@check
def find_what_pruning_costs(make):
    learn = fitted(make())
    learn.prune_sensitivity(amounts=[.5], show_plot=False)
    return learn

@check
def factorise(make): return fitted(make()).decompose(params=.5)

@check
def distill(make): return taught(make, DistillCallback)

@check
def learn_together(make): return fitted(make(), cbs=MutualCallback(three_convs()))

@check
def climb_all_rungs(make): return fitted(make(staged)).quantize('w4a8', max_drop=.2, ladder=('mse','equalize','bias','adaround'), timed=False)

@check
def keep_to_a_budget(make): return fitted(make(staged)).quantize(target=dict(bits=4), timed=False)

@check
def find_what_bits_cost(make):
    learn = fitted(make())
    for metric in None,'accuracy': learn.quant_sensitivity((4,8), metric=metric, show_plot=False)
    return learn

@check
def train_bits_of_a_budget(make):
    learn = fitted(make())
    return fitted(learn, cbs=QuantAwareCallback(learn.quant_sensitivity(show_plot=False).spec(bits=4))).quantize(timed=False)

@check
def train_in_mixed_precision(make):
    learn = make(cbs=QuantAwareCallback())
    if learn.dls.device.type=='cuda': learn.to_fp16()
    return fitted(learn).to_fp32().quantize(timed=False)

@check
def half(make):
    learn = fitted(make())
    learn.model.half().float()
    return learn.quantize('bf16', timed=False)

@check
def pack_and_load(make):
    device = make().dls.device
    learn = fitted(classifier(pictures(96, get_x=gray, block=ImageBlock(PILImageBW), device=device), three_convs().to(device), path=tempfile.mkdtemp(), cbs=QuantAwareCallback()))
    for name,o in dict(trained=learn, rounded=learn.quantize(timed=False)).items():
        o.export(f'{name}.pkl')
        new = load_learner(learn.path/f'{name}.pkl', cpu=False)
        new.predict(gray(0))
    new.dls = learn.dls
    return new

@check
def read_texts(make):
    device = make().dls.device
    learn = fitted(texts.classifier(tempfile.mkdtemp(), texts.data(device=device)))
    learn.quantize('dynamic', timed=False)
    return fitted(learn, cbs=QuantAwareCallback('dynamic')).quantize(timed=False)

@check
def save_and_go_on(make):
    learn = fitted(make(cbs=QuantAwareCallback()))
    learn.save('there')
    return fitted(learn.load('there')).quantize(timed=False)

@check
def remove_channels(make): return fitted(make(staged)).prune(.4, 'channel')

@check
def find_a_lottery_ticket(make): return fitted(make().lottery_ticket(.5, 1, 1e-2, rounds=2))

@check
def teach_oneself(make): return fitted(make(staged), cbs=SelfDistillCallback('[01]', width=8))

@check
def predict(make):
    learn = fitted(make()).quantize(timed=False)
    learn.get_preds(with_decoded=True)
    return learn

@check
def write(make):
    learn = fitted(make())
    learn.export_onnx('float.onnx')
    return learn.quantize(timed=False)

def result(check, device):
    "What the Learner of `check` loses and reaches on `device`, or what went wrong"
    def make(model=three_convs, **kwargs): return learner(device, model, **kwargs)
    try: return [round(o, 4) for o in check(make).validate()]
    except Exception: return traceback.format_exc(limit=-8)

if __name__=='__main__':
    device = 'cuda' if torch.cuda.is_available() else 'other'
    if device=='other':
        from .device import registered
        lib = registered()
    warnings.simplefilter('ignore')
    for k,f in checks.items(): print(json.dumps([device, k, *(result(f, torch.device(d)) for d in (device,'cpu'))]), flush=True)
