"`Learner.export_app` of a text classifier: numbers and answers are the Learner's, where no spaCy is"
import json, os, random, subprocess, sys
import numpy as np, pandas as pd, pytest
from fastai.text.all import AWD_LSTM, BaseTokenizer, SpacyTokenizer, TextDataLoaders, Tokenizer, awd_lstm_clas_config, set_seed, text_classifier_learner
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine
from fastquant.all import *
from fastquant.app.text import Words, text_rules
from fastquant.learner.text import tables_of
from fastquant.runtime import BadInput, Model
from ..helpers.learners import quiet

pieces = '''don't I'm U.S.A. e-mail http://a.b.com/x?y=1, (see foo@bar.com 3.5kg $5.00 10am ... "Hi," well-known C++ #tag :-) a.m. WORLD Über naïve 日本語 🙂 'Tis 1,000.5% x/y
    &amp; — “quote” soooo i.e., -5°C a=b <br /> xxbos can't've o'clock'''.split()+['\n','\n\n','\t','  ',' ','\u00a0','\u3000',': )','yes yes yes yes']

def odd_texts(n):
    "What people write, and what they do not"
    draw = random.Random(0)
    def piece(): return draw.choice(pieces) if draw.random()<.8 else draw.choice('abXY .,;:!?\'"()-/\n')
    for _ in range(n): yield ''.join(piece()+draw.choice(['',' ',' ','\n','.']) for _ in range(draw.randint(1, 30)))

@pytest.mark.parametrize('lang', ['en','fr'])
def test_tokens_are_those_of_fastai(lang):
    theirs = Tokenizer(SpacyTokenizer(lang))
    words = Words(json.loads(json.dumps(tables_of(theirs.tok)['spacy'])))
    described = [f().DESCR for f in (load_breast_cancer,load_diabetes,load_wine)]
    for t in [*odd_texts(150),*described]:
        mine = t
        for f in theirs.rules: mine = text_rules[f.__name__](mine)
        assert words(mine)==list(theirs(t)), t

def rows(n=60):
    draw = random.Random(0)
    def words(good): return ' '.join(draw.choice(['Good','fine,'] if good else ['BAD','sad.']) if draw.random()<.4 else draw.choice(pieces) for _ in range(draw.randint(3, 30)))
    return pd.DataFrame([(words(i%2), ['no','yes'][i%2]) for i in range(n)], columns=['what','label'])

def learner(path, dls=None, tok=None):
    set_seed(0)
    dls = dls or TextDataLoaders.from_df(rows(), text_col='what', label_col='label', valid_pct=.3, seed=0, bs=8, seq_len=12, num_workers=0, device='cpu', tok_tfm=tok)
    learn = quiet(text_classifier_learner(dls, AWD_LSTM, pretrained=False, seq_len=12, path=path, config={**awd_lstm_clas_config, 'emb_sz':8, 'n_hid':12, 'n_layers':2}))
    with learn.no_bar(): learn.fit(1, 1e-2)
    return learn

@pytest.fixture(scope='module')
def app(tmp_path_factory):
    learn = learner(tmp_path_factory.mktemp('text'))
    with learn.no_bar(): q = learn.quantize(timed=False)
    return q,q.export_app('app', gradio=True)

def program(app, *args):
    "`python predict.py *args`, where none of our libraries can be imported"
    blocked = dict.fromkeys('torch fastai fastcore fastquant onnx pandas spacy'.split())
    code = f"import runpy, sys; sys.modules.update({blocked}); sys.argv = ['predict.py', *{[*map(str, args)]!r}]; runpy.run_path('predict.py', run_name='__main__')"
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=app, env={k:v for k,v in os.environ.items() if k!='PYTHONPATH'})

def test_answers_are_those_of_the_learner(app):
    q,to = app
    model = Model(to/'model.onnx')
    for t in [*rows(8).what,*odd_texts(20)]:
        if not t.strip(): continue
        with q.no_bar(): x,p,_ = q.get_preds(dl=q.dls.test_dl([t], num_workers=0), with_input=True)
        assert model.inputs(t)[0].tolist()==x[0].tolist()
        assert np.allclose([model(t)[v] for v in q.dls.vocab[1]], p[0], atol=1e-4)
    assert model('Good')==model(b'Good')

def test_on_the_command_line(app, tmp_path):
    (tmp_path/'good.txt').write_text('Good, fine', encoding='utf-8')
    rows(3).to_csv(tmp_path/'rows.csv')
    r = program(app[1], '--check', 'A good day', tmp_path/'good.txt', tmp_path/'rows.csv', 'examples', 'long '*500)
    assert r.returncode==0 and r.stdout.count('the same')==3 and r.stdout.count('yes 0.')==9 and r.stdout.count('row ')==3, r.stderr

@pytest.mark.parametrize('name,data,says', [('a.txt', b'', 'is an empty text'), ('a.txt', b' \n', 'is an empty text'), ('a.txt', b'\xff\xfe\x00', 'no text in UTF-8'), ('a.txt', None, 'no such file'),
    ('a.csv', b'text\nhi\n', 'missing column: what'), ('a.csv', b'', 'has no rows'), ('a.csv', b'what,b\n,1\n', 'is an empty text'), ('', None, 'no texts in this folder')])
def test_what_is_wrong_with_a_text(name, data, says, app, tmp_path):
    if data is not None: (tmp_path/name).write_bytes(data)
    r = program(app[1], tmp_path/name)
    assert r.returncode==1 and says in r.stderr and len(r.stderr.splitlines())==1, r.stderr

def test_an_argument_that_is_no_text(app):
    model = Model(app[1]/'model.onnx')
    for bad in 3,None,['a'],'': pytest.raises(BadInput, model, bad)

def test_texts_in_files(tmp_path):
    for i,r in rows(30).iterrows():
        f = tmp_path/'texts'/r.label/f'{i}.txt'
        f.parent.mkdir(parents=True, exist_ok=True)
        f.write_text(r.what+'\r\nlast', encoding='utf-8')
    dls = TextDataLoaders.from_folder(tmp_path/'texts', valid_pct=.3, seed=0, bs=8, seq_len=12, num_workers=0, device='cpu')
    assert program(learner(tmp_path, dls).export_app('app'), '--check').stdout.count('the same')==3

def test_a_tokenizer_that_cuts_at_spaces(tmp_path):
    to = learner(tmp_path, tok=BaseTokenizer()).export_app('app')
    assert program(to, '--check').stdout.count('the same')==3

class Mine(SpacyTokenizer): "A tokenizer of somebody's own"

def test_a_tokenizer_that_is_refused_by_name(tmp_path):
    learn = learner(tmp_path, tok=Mine())
    with pytest.raises(ValueError, match='Mine cuts texts cannot.*BaseTokenizer'): learn.export_app('app')
    assert not (tmp_path/'app').exists()

def test_the_page_takes_no_text(app, tmp_path):
    (tmp_path/'dist').mkdir()
    for k in 'ort.wasm.min.js','ort-wasm-simd-threaded.mjs','ort-wasm-simd-threaded.wasm': (tmp_path/'dist'/k).write_text('')
    with pytest.raises(ValueError, match='those of `page` pictures, and this Learner takes a text'): app[0].export_app('other', page=tmp_path)
