"fastai's text models become files of any length, which predict what the Learner predicts"
import onnxruntime, pytest, torch
from fastai.text.all import (AWD_LSTM, BaseTokenizer, RegressionBlock, accuracy, awd_lstm_clas_config, awd_lstm_lm_config, get_text_classifier, language_model_learner,
    load_learner, pad_chunk, set_seed)
from torch import nn
from fastquant.all import *
from fastquant.export.engine import layer_kernels
from fastquant.export.runnable import made_runnable, has_other
from tests.helpers.data import loaders
from tests.helpers.learners import check_owned, classifier as plain_classifier, quiet
from tests.helpers.texts import classifier, data, small, texts

def run(file, x): return torch.from_numpy(onnxruntime.InferenceSession(file).run(None, {'input':x.as_subclass(torch.Tensor).numpy()})[0])

def predicted(learn, x):
    learn.model.reset()
    with evaluating(learn.model): return learn.model(x.as_subclass(torch.Tensor))[0]

def same(learn, file, batches):
    for x in batches: assert torch.allclose(run(file, x), predicted(learn, x), atol=1e-4), x.shape

def padded(*lens, **kwargs):
    rows = [torch.randint(2, 15, (n,)) for n in lens]
    return torch.stack([pad_chunk(r, seq_len=12, pad_len=max(lens), **kwargs) for r in rows])

whole = {'plain':{}, 'both ways':dict(config=dict(bidir=True)), 'cut':dict(max_len=26), 'numbers':dict(y_range=(-1,2), n_out=1)}

@pytest.mark.parametrize('name', whole)
def test_a_file_predicts_what_the_learner_does(tmp_path, name):
    kwargs = whole[name]
    learn = classifier(tmp_path, data(label_col='number', y_block=RegressionBlock()) if 'y_range' in kwargs else None, **kwargs)
    file = learn.export_onnx()
    behind = [] if 'max_len' in kwargs else [padded(30,29,25,20, pad_first=False)]
    same(learn, file, [padded(5), padded(50), padded(37,36,14,2), padded(25,24,23,13,12,1), *behind, *[x for x,_ in learn.dls.valid]])

def test_rows_that_fastai_leaves_out_are_left_out():
    "The last chunk of a batch, where some texts have ended, is run for as many rows from the top"
    model = get_text_classifier(AWD_LSTM, 20, 2, seq_len=12, config={**awd_lstm_clas_config, **small}).eval()
    made,x = made_runnable(copy_model(model)),padded(25,23,13)
    with torch.no_grad():
        assert torch.allclose(made(x), model(x)[0], atol=1e-6) and not torch.allclose(made(x)[2], made(x[2:,12:])[0], atol=1e-6)
    assert has_other(model) and not has_other(made)

def test_a_quantized_learner_does_all_that_a_learner_does(tmp_path):
    learn = classifier(tmp_path, metrics=accuracy)
    before = {k:v.clone() for k,v in learn.model.state_dict().items()}
    q = learn.quantize(timed=False)
    assert set(q.model.report.float_layers)=={'0.module.rnns.0.module','0.module.rnns.1.module'} and q.model.report.n_int8==2
    assert sum(q.model.report.float_work.values())>.9
    for a,b in zip(learn.get_preds(), q.get_preds()): assert torch.allclose(a, b, atol=.02)
    assert q.validate()[1]==learn.validate()[1]
    for text in 'good word1 fine', '', 'unheard of '*40: assert torch.allclose(q.predict(text)[2], learn.predict(text)[2], atol=.02)
    q.export('q.pkl')
    assert load_learner(tmp_path/'q.pkl').predict('bad')[2].equal(q.predict('bad')[2])
    q.export_onnx('q.onnx')
    assert learn.load_onnx('q.onnx').predict('bad')[2].equal(q.predict('bad')[2])
    assert all(v.equal(before[k]) for k,v in learn.model.state_dict().items())

def test_ranges_of_training_are_shipped(tmp_path):
    learn = classifier(tmp_path)
    learn.fit(1, 1e-3, cbs=QuantAwareCallback('int8'))
    q = learn.quantize(timed=False)
    assert q.model.report.trained
    for (x,_) in learn.dls.valid: assert torch.allclose(q.model(x), predicted(learn, x), atol=.02)

def test_pruned_and_quantized(tmp_path):
    learn = classifier(tmp_path).prune(.5)
    same(learn, learn.export_onnx(), [x for x,_ in learn.dls.valid])
    assert learn.quantize(timed=False).model.report.n_int8==2

def test_a_file_says_what_a_string_becomes(tmp_path):
    said = load_engine(classifier(tmp_path).export_onnx()).metadata
    assert said['vocab']==['no','yes'] and {'good','xxpad','word3'}<=set(said['preprocess']['tokens'])
    assert said['preprocess']['tokenizer']['name']=='BaseTokenizer' and said['preprocess']['tokenizer']['args']==dict(split_char=' ')
    assert said['preprocess']['padding']==dict(idx=1, first=True, chunk=12) and 'also' not in said['preprocess']

def test_the_length_is_fixed_if_that_is_asked_for(tmp_path):
    learn = classifier(tmp_path)
    file = learn.export_onnx(dynamic=False)
    with pytest.raises(ValueError, match='takes items of size 22'): load_engine(file)(padded(7))

def test_the_state_of_a_language_model_is_said_to_be_missing(tmp_path):
    set_seed(0)
    learn = quiet(language_model_learner(data(is_lm=True), AWD_LSTM, pretrained=False, path=tmp_path, config={**awd_lstm_lm_config, **small}))
    with pytest.warns(UserWarning, match='keeps no state'): file = learn.export_onnx()
    same(learn, file, [x for x,_ in learn.dls.valid]+[padded(7), padded(30)])
    with pytest.warns(UserWarning, match='keeps no state'): q = learn.quantize(timed=False)
    q.model.reset()
    assert q.predict('good', 3).startswith('good')

@pytest.mark.parametrize('kind', [nn.LSTM,nn.GRU])
def test_recurrent_layers_take_any_length(kind):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn,self.head = kind(4, 6, num_layers=2, bidirectional=True, batch_first=True),nn.Linear(12, 2)
        def forward(self, x): return self.head(self.rnn(x)[0][:,-1])
    net = Net().eval()
    file = to_onnx(net, torch.randn(4,9,4), dynamic=(1,)).SerializeToString()
    for shape in (1,1,4),(3,20,4):
        x = torch.randn(shape)
        with torch.no_grad(): assert torch.allclose(run(file, x), net(x), atol=1e-5)
    assert not hasattr(net.rnn, 'packed')

class Transformer(nn.Module):
    "With positions for twelve tokens"
    def __init__(self):
        super().__init__()
        self.word,self.place = nn.Embedding(30, 16),nn.Embedding(12, 16)
        self.body,self.head = nn.TransformerEncoderLayer(16, 2, 32, 0., batch_first=True),nn.Linear(16, 3)
    def forward(self, x): return self.head(self.body(self.word(x)+self.place.weight[:x.shape[1]]).mean(1))

def tokens(n):
    x = torch.randint(0, 30, (48,n))
    return loaders([(a,int(a[0]%3)) for a in x], bs=8)

def test_as_many_tokens_as_there_are_positions(tmp_path):
    "Texts that have as many leave shorter ones free, and more, or none, are refused in words"
    torch.manual_seed(0)
    learn = plain_classifier(tokens(12), Transformer(), tmp_path)
    q = learn.quantize('dynamic', dynamic=True, timed=False)
    x = torch.randint(0, 30, (2,12))
    for n in 1,5,12: assert sqnr(learn.model.eval()(x[:,:n]), q.model(x[:,:n]))>20
    with pytest.raises(ValueError, match=r'\(2, 13\).*as many tokens as it has'): q.model(torch.randint(0, 30, (2,13)))
    with pytest.raises(ValueError, match='one token at least'): q.model(x[:,:0])

@pytest.mark.parametrize('way', [lambda: QuantAwareCallback('dynamic'), lambda: PruneScheduleCallback(.5), lambda: DistillCallback(Transformer())], ids=['dynamic','pruned','taught'])
def test_a_fit_of_a_transformer(tmp_path, way):
    learn = plain_classifier(tokens(6), Transformer(), tmp_path)
    learn.fit(1, 1e-3, cbs=way())
    check_owned(learn)
    if fake_quant_of(learn.model): assert learn.quantize(timed=False).model.report.agrees_rounded==1

def test_a_transformer_of_low_rank(tmp_path):
    learn = plain_classifier(tokens(6), Transformer(), tmp_path)
    few = learn.decompose(.5)
    assert n_params(few.model)<n_params(learn.model)
    few.fit(1, 1e-3)
    check_owned(few)

def test_a_fit_that_removes_widths_of_a_transformer(tmp_path):
    "Of its feed-forward layers; what is left trains on and quantizes"
    learn = plain_classifier(tokens(6), Transformer(), tmp_path)
    learn.fit(1, 1e-3, cbs=PruneScheduleCallback(.3, structure='channel'))
    assert learn.model.body.linear1.out_features<32 and learn.model.head.out_features==3
    check_owned(learn)
    q,x = learn.quantize('dynamic', timed=False),torch.randint(0, 30, (4,6))
    assert sqnr(learn.model.eval()(x), q.model(x))>20

class Headed(Transformer):
    "With the attention of timm, whose heads can be counted"
    def __init__(self):
        super().__init__()
        timm = pytest.importorskip('timm.layers')
        self.body = nn.Sequential(nn.LayerNorm(16), timm.Attention(16, num_heads=4))

def test_a_fit_that_removes_heads(tmp_path):
    learn = plain_classifier(tokens(6), Headed(), tmp_path)
    learn.fit(1, 1e-3, cbs=PruneScheduleCallback(.5, structure='channel'))
    assert learn.model.body[1].num_heads<4 and learn.model.body[0].weight.shape==(16,)
    check_owned(learn)
    assert learn.quantize(timed=False).model.report.n_int8==3

class Large(Transformer):
    "With many words"
    def __init__(self):
        super().__init__()
        self.word = nn.Embedding(1024, 16)

def test_a_table_as_a_tensor_train(tmp_path):
    "Its embeddings are trained on, and go into a file"
    torch.manual_seed(0)
    learn = plain_classifier(tokens(6), Large(), tmp_path)
    few = learn.decompose(ranks={'word':6}, kinds={'word':'tensor_train'})
    assert n_params(few.model)<n_params(learn.model)/2 and not isinstance(few.model.word, nn.Embedding)
    few.fit(1, 1e-3)
    check_owned(few)
    x = torch.randint(0, 30, (2,6))
    assert torch.allclose(run(few.export_onnx(), x), few.model.eval()(x), atol=1e-5)

def test_a_table_that_groups_do_not_divide(tmp_path):
    "Rows are filled up; a group has to be a number of neighbours"
    learn = plain_classifier(tokens(6), Transformer(), tmp_path)
    spec = Spec(TensorSpec(Grid(4), 'search', PerGroup(24)), act=None, compensate=True)
    q = learn.quantize(spec, timed=False)
    x = torch.randint(0, 30, (2,6))
    assert sqnr(learn.model.eval()(x), q.model(x))>10
    with pytest.raises(ValueError, match='n=1: pass how many weights share a scale'): PerGroup(1)

def test_on_integers_with_ranges_found_while_it_runs(tmp_path):
    "The LSTMs too, of any batch and length, within what 8 bits do; the Learner is left as it is"
    learn = classifier(tmp_path, **whole['both ways'])
    q = learn.quantize('dynamic', timed=False)
    report = q.model.report
    assert report.n_int8==report.n_layers and 'DynamicQuantizeLSTM' in layer_kernels(q.model.data).values() and q.model.metadata['spec']=='dynamic'
    for x in padded(5),padded(50),padded(37,36,14,2): assert sqnr(predicted(learn, x), q.model(x))>25
    assert not fake_quant_of(learn.model)

@pytest.mark.parametrize('spec,least', [('w8',35),('w4',12)])
def test_weights_only(spec, least, tmp_path):
    "Of everything: the table, the LSTMs of both directions, and the head; of any batch and length"
    learn = classifier(tmp_path, **whole['both ways'])
    q = learn.quantize(spec, timed=False)
    report = q.model.report
    assert len(report.weights_only)==report.n_layers==7 and not report.float_layers and q.model.metadata['spec']==spec
    for x in padded(5),padded(50),padded(37,36,14,2): assert sqnr(predicted(learn, x), q.model(x))>least

@pytest.mark.parametrize('spec,more', [('dynamic',set()),('w8',{'0.module.encoder'})])
def test_training_it_rounds_the_head(spec, more, tmp_path):
    "The LSTMs of AWD_LSTM drop weights in training, so they stay in float there, by name; and so does its table, of rows"
    learn = classifier(tmp_path)
    learn.fit(1, 1e-3, cbs=QuantAwareCallback(spec))
    report = learn.quantize(timed=False).model.report
    assert report.trained and report.float_layers.keys()=={'0.module.rnns.0.module','0.module.rnns.1.module',*more} and report.agrees_rounded==1
