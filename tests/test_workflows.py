"What fastai users do before and after `quantize`, with fastai's own data blocks and learners"
import numpy as np, pandas as pd, pytest, re, torch
from fastai.tabular.all import tabular_learner
from fastai.vision.all import (CrossEntropyLossFlat, Dice, Learner, MaskBlock, MixUp, RegressionBlock, Resize, SegmentationInterpretation, accuracy,
    aug_transforms, load_learner, mae, resnet18, set_seed, unet_learner, vision_learner)
from fastquant.all import *
from tests.helpers.data import digits, ink, loaders, picture, pictures, rows, table
from tests.helpers.nets import encoder

def number(i): return float(digits.target[i])

def fitted(learn, epochs=1, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(epochs, 3e-3, **kwargs)
    return learn

@pytest.fixture(scope='module')
def vision():
    data = pictures(240, item_tfms=Resize(32), batch_tfms=aug_transforms(do_flip=False))
    return fitted(vision_learner(data, resnet18, pretrained=False, metrics=accuracy), 3, cbs=MixUp())

def test_vision_learner(vision, tmp_path):
    with vision.no_bar(): q = vision.quantize()
    assert q.model.report.float_layers=={} and q.model.report.n_layers==22
    with q.no_bar(), vision.no_bar():
        assert q.predict(picture(0))[2].shape==(10,)
        compared = vision.compare(q, n=3)
        q.path = tmp_path
        q.export('q.pkl')
        loaded = load_learner(tmp_path/'q.pkl')
    with loaded.no_bar(): assert torch.equal(loaded.predict(picture(3))[2], q.predict(picture(3))[2])
    assert compared.bytes['int8']*3.5 < compared.bytes['float'] and compared.agrees['int8']>.8
    assert list(q.dls.vocab)==list('0123456789')

def test_trains_on_after_quantize(vision):
    "Quantizing leaves optimizer, freezing and parameter groups as they were, and training goes on"
    opt,frozen = vision.opt,vision.opt.frozen_idx
    with vision.no_bar(): vision.quantize(n_batches=1)
    assert vision.opt is opt and vision.opt.frozen_idx==frozen
    before = [p.clone() for p in vision.model.parameters()]
    fitted(vision)
    moved = [not torch.equal(a, b) for a,b in zip(before, vision.model.parameters()) if b.requires_grad]
    assert all(moved)

def test_quantize_after_load_learner(vision, tmp_path):
    "A loaded Learner has no data, so calibrating wants some, and says so"
    vision.path = tmp_path
    vision.export('float.pkl')
    loaded = load_learner(tmp_path/'float.pkl')
    with loaded.no_bar():
        with pytest.raises(ValueError, match='calibration set is empty'): loaded.quantize()
        with pytest.raises(ValueError, match='has no data'): loaded.export_onnx('m.onnx')
        q = loaded.quantize(dl=loaded.dls.test_dl(list(range(32))))
        assert q.predict(picture(1))[0] in list('0123456789')

@pytest.mark.parametrize('how', ['to_fp16','to_bf16'])
def test_mixed_precision(how):
    learn = fitted(getattr(vision_learner(pictures(64), encoder, pretrained=False, metrics=accuracy), how)())
    with learn.no_bar(): assert learn.quantize(n_batches=2).model.report.float_layers=={}

def test_unet_learner():
    learn = fitted(unet_learner(pictures(64, MaskBlock(['bg','ink']), ink), encoder, pretrained=False, n_out=2, metrics=Dice()))
    with learn.no_bar(): q = learn.quantize(n_batches=2)
    assert q.model.report.float_layers=={}
    with q.no_bar(), learn.no_bar():
        a,b = learn.get_preds()[0].argmax(1),q.get_preds()[0].argmax(1)
        q.show_results(max_n=2)
        SegmentationInterpretation.from_learner(q).top_losses(2)
        assert q.predict(picture(0))[0].shape==(32,32)
    assert (a==b).float().mean()>.97

def test_regression():
    data = pictures(160, RegressionBlock(), number)
    learn = fitted(vision_learner(data, encoder, pretrained=False, n_out=1, y_range=(0,9), metrics=mae), 3)
    with learn.no_bar(): q = learn.quantize()
    with q.no_bar(), learn.no_bar(): compared = learn.compare(q, n=3)
    assert q.model.report.agrees is None and np.isnan(compared.agrees['int8'])
    assert abs(compared.mae['int8']-compared.mae['float'])<.1

def test_tabular_learner(tmp_path):
    set_seed(0)
    df = table(800)
    df.loc[::7,'big'] = np.nan
    data = rows(df, 650)
    learn = tabular_learner(data, layers=[50,20], metrics=accuracy)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(8, 1e-2)
    with learn.no_bar(): q = learn.quantize()
    with q.no_bar(), learn.no_bar():
        (_,a),(_,b) = learn.validate(),q.validate()
        row = df.iloc[0].drop('y')
        assert q.predict(row)[1]==learn.predict(row)[1]
    assert a>.9 and abs(a-b)<.02, (a, b)
    assert q.model.report.float_layers=={}

def test_iterable_of_batches(vision):
    "Calibration data may be any iterable of batches with a length"
    b = vision.dls.valid.one_batch()
    with vision.no_bar(): assert vision.quantize(dl=[b, b]).model.report.n_items==32

def test_shared_layer_and_float_input_list():
    "A net nobody tuned for: a layer that runs twice, a slice, a functional ReLU and two inputs"
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b,self.out = torch.nn.Linear(6, 8),torch.nn.Linear(8, 8),torch.nn.Linear(16, 2)
        def forward(self, x, y):
            h = torch.relu(self.b(torch.relu(self.a(torch.cat([x, y[:,:2]], 1)))))
            return self.out(torch.cat([self.b(h)+h, h[:,[1,0,2,3,4,5,6,7]]], dim=-1))
    set_seed(0)
    items = [(torch.randn(4), torch.randn(3), torch.tensor(i%2)) for i in range(64)]
    learn = Learner(loaders(items, bs=16), Odd(), loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    with learn.no_bar(): q = learn.quantize()
    assert q.model.report.float_layers=={} and q.model.report.n_layers==3
    with learn.no_bar(), q.no_bar(): assert sqnr(learn.get_preds()[0], q.get_preds()[0])>30

def test_quiet(vision, recwarn, capsys):
    "No warnings and nothing printed, where there is nothing to say"
    with vision.no_bar(): vision.quantize(n_batches=2)
    assert [str(w.message) for w in recwarn]==[] and capsys.readouterr().out==''

def test_one_scale_for_a_weight(vision):
    "`int8_per_tensor` has one scale for each weight in the file, for engines that know nothing else"
    import onnx
    with vision.no_bar(): q = vision.quantize('int8_per_tensor', n_batches=2)
    dims = [len(i.dims) for i in onnx.load_from_string(q.model.data).graph.initializer if i.name.endswith('.weight_scale')]
    assert len(dims)==q.model.report.n_int8==22 and set(dims)=={0}

def test_without_batchnorm_float_is_the_standard():
    "A net without batchnorms that was only calibrated is compared with float, and warned of if rounding ruins it"
    learn = tiny()
    model = learn.model
    with learn.no_bar(): report = learn.quantize(n_batches=2).model.report
    assert not report.trained and 'equal to float' in str(report)
    with torch.no_grad():
        for p in model[0].parameters(): p[0] *= 1000
        model[2].weight[:,0] /= 1000
    with learn.no_bar(), pytest.warns(UserWarning, match='layer_errors'): learn.quantize(n_batches=2)

def tiny():
    set_seed(0)
    ds = [(o,o.argmax()) for o in torch.randn(32, 8)]
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 8))
    return Learner(loaders(ds, bs=16), model, CrossEntropyLossFlat(), metrics=accuracy)

def test_displays():
    "Tables and reports have a rich form for notebooks, and a plain one that says the same in a terminal"
    learn = tiny()
    with learn.no_bar():
        q = learn.quantize(n_batches=1)
        shown = [q.model.report, learn.compare(q, n=2), learn.layer_errors(n_batches=1, show_plot=False), learn.prune_sensitivity((.5,), show_plot=False), learn.prune_report(show_plot=False)]
        learn.validate(cbs=PTQCalibrate(1))
        shown.append(ranges(learn.model))
    for o in shown:
        rich = (getattr(o, '_repr_html_', None) or o._repr_markdown_)()
        numbers = set(re.findall(r'\d\.\d{2,4}', str(o)))
        assert rich and len(str(o))>20 and '<' not in str(o).replace('<NA>', '') and all(n in rich for n in numbers)

def test_progress(monkeypatch):
    "Whatever takes longer than a moment shows a bar, unless the Learner shows none"
    import fastquant.callback.data
    shown = []
    def spy(items, **kwargs):
        shown.append(items)
        return items
    monkeypatch.setattr(fastquant.callback.data, 'progress_bar', spy)
    learn = tiny()
    for f in (lambda: learn.quantize(n_batches=1), lambda: learn.layer_errors(show_plot=False), lambda: learn.prune_sensitivity((.5,), show_plot=False)):
        f()
        with learn.no_bar(): f()
        assert len(shown)==1
        shown.clear()

@pytest.mark.parametrize('int8,in_float,says', [(1.25,1.,True),(1.,1.25,False),(.02,.01,False)])
def test_says_if_int8_is_not_faster(monkeypatch, recwarn, int8, in_float, says):
    "What it takes in float in the same engine decides; where a call takes longer than the net, nothing is said, nor if nobody asks"
    ms = pd.DataFrame(dict(median=[int8,in_float], spread=[.001,.001]), index=['int8','float'])
    monkeypatch.setattr('fastquant.export.report.against_float', lambda *args, **kwargs: ms)
    learn = tiny()
    with learn.no_bar():
        for timed in True,False: learn.quantize(n_batches=1, timed=timed)
    assert ['not faster than float in the same engine: 1.25 ms' in str(w.message) for w in recwarn]==[True]*says
