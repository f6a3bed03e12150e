"Pruning and quantization on one model: zeros stay zeros through rounding"
import onnx, pytest, torch
from fastai.vision.all import Callback, set_seed
from torch import nn
from fastquant.all import *
from tests.helpers.data import first, loaders
from tests.helpers.learners import classifier
from tests.helpers.nets import classify, conv

def net(): return nn.Sequential(conv(1,16), conv(16,32,2), *classify(32))

def learner(path):
    set_seed(0)
    return classifier(loaders(*first(512, 128)), net(), path)

@pytest.fixture
def learn(tmp_path):
    learn = learner(tmp_path)
    with learn.no_bar():
        learn.fit_one_cycle(3, 1e-2)
        yield learn

def zeros(learn): return {k:m.weight==0 for k,m in masked(learn.model).items()}
def ints(qlearn):
    arrays = {i.name:onnx.numpy_helper.to_array(i) for i in onnx.load_from_string(qlearn.model.data).graph.initializer}
    return {k.removesuffix('.weight'):torch.tensor(v) for k,v in arrays.items() if k.endswith('.weight')}
def stay_zero(learn, qlearn): return all((ints(qlearn)[k][z]==0).all() for k,z in zeros(learn).items())

class Zeros(Callback):
    order = PruneScheduleCallback.order+1
    def after_batch(self):
        for m in masked(self.model).values(): assert (m.weight[~m.weight_mask]==0).all()

@pytest.mark.parametrize('first', [True,False])
def test_both_callbacks_in_one_fit(learn, first):
    "In either order, and sparse in the float model, in what it computes with, and in the file"
    cbs = [PruneScheduleCallback(.8, every=2),QuantAwareCallback('int8')]
    learn.fit_one_cycle(4, 1e-2, cbs=[*(cbs if first else cbs[::-1]),Zeros()])
    assert abs(sparsity(learn.model)-.8)<1e-3 and fake_quant_of(learn.model).ready
    q = learn.quantize()
    assert stay_zero(learn, q) and q.model.report.float_layers=={}
    with q.no_bar(): assert abs(q.validate()[1]-learn.validate()[1])<.05
    learn.fit(1, 1e-3, cbs=Zeros())
    assert abs(sparsity(learn.model)-.8)<1e-3

def test_prune_then_train_through_rounding(learn):
    slearn = learn.prune(.7)
    slearn.logger = learn.logger
    with slearn.no_bar():
        slearn.fit_one_cycle(2, 1e-2)
        before = zeros(slearn)
        slearn.fit_one_cycle(2, 1e-3, cbs=[QuantAwareCallback('int8'),Zeros()])
        assert all(z.equal(zeros(slearn)[k]) for k,z in before.items())
        assert stay_zero(slearn, slearn.quantize())

def test_prune_a_model_that_rounds(learn):
    "The other way round: rounding first, then masks, in a fit and in one shot"
    learn.fit_one_cycle(2, 1e-3, cbs=QuantAwareCallback('int8'))
    s = learn.prune(.5)
    assert fake_quant_of(s.model) and abs(sparsity(s.model)-.5)<1e-3 and masked(learn.model)=={}
    learn.fit_one_cycle(2, 1e-3, cbs=[QuantAwareCallback('int8'),PruneScheduleCallback(.5),Zeros()])
    assert list(masked(learn.model))==['0.0','1.0'] and stay_zero(learn, learn.quantize())

def test_checkpoint_of_both(learn):
    learn.fit_one_cycle(2, 1e-2, cbs=[PruneScheduleCallback(.8),QuantAwareCallback('int8')])
    learn.save('both')
    fresh = classifier(learn.dls, net(), learn.path)
    with fresh.no_bar():
        fresh.load('both')
        assert all(z.equal(zeros(learn)[k]) for k,z in zeros(fresh).items()) and zeros(fresh)
        assert fresh.validate()==learn.validate()

@pytest.mark.parametrize('bits', [2,3,4,5,8])
def test_file_of_both(learn, bits):
    "Integers that are left, entropy-coded, give the same file back; those of 3 bits, eleven to a number, leave less to gain"
    s = learn.prune(.8)
    q = s.quantize(Spec(weight=TensorSpec(Grid(bits), 'mse', granularity=PerChannel())))
    q.save_sparse('q.safetensors')
    back = learn.load_sparse('q.safetensors')
    assert back.model.data==q.model.data and (learn.path/'q.safetensors').stat().st_size<(.65 if bits==3 else .6)*len(q.model.data)

def test_a_model_in_training_is_saved_sparse(learn):
    learn.fit(1, 1e-3, cbs=QuantAwareCallback('int8'))
    learn.save_sparse('m.safetensors')
    back = learner(learn.path).load_sparse('m.safetensors')
    with back.no_bar(): assert fake_quant_of(back.model).spec==fake_quant_of(learn.model).spec and back.validate()==learn.validate()

def test_remove_masks_from_quantized_training(learn):
    learn.fit(1, 1e-2, cbs=[PruneScheduleCallback(.8),QuantAwareCallback('int8')])
    learn.remove_quant()
    assert fake_quant_of(learn.model) is None and masked(learn.model)
    remove_masks(learn.model)
    learn.fit(1, 1e-2)
    assert all((m.weight==0).float().mean()<.2 for m in (learn.model[0][0],learn.model[1][0]))
