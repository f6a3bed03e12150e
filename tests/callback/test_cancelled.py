"However a fit ends, and wherever: another one works, the optimizer owns every parameter of the model once and moves it, and a checkpoint fits a fresh Learner"
import pytest, torch
from fastai.vision.all import CancelBackwardException, CancelBatchException, CancelEpochException, CancelFitException
from fastai.vision.all import CancelStepException, CancelTrainException, CancelValidException, CrossEntropyLossFlat, DataLoaders, Learner, LRFinder, set_seed
from torch import nn
from fastquant.all import *

events = '''before_fit before_epoch before_train before_batch after_pred after_loss before_backward after_backward before_step after_step after_batch after_train
    before_validate after_validate after_epoch after_fit'''.split()
cancels = dict(fit=CancelFitException, epoch=CancelEpochException, train=CancelTrainException, valid=CancelValidException,
    batch=CancelBatchException, step=CancelStepException, backward=CancelBackwardException, interrupt=KeyboardInterrupt, error=ZeroDivisionError)
# Where fastai catches what cancels; elsewhere it is an error like others
caught = dict(fit=events[:-1], epoch=events[1:-2], train=events[2:11], valid=['before_validate'], batch=events[3:10], step=['before_step'], backward=['before_backward'])

def net():
    convs = nn.Conv2d(2, 8, 3, bias=False),nn.BatchNorm2d(8),nn.ReLU(),nn.Conv2d(8, 8, 3),nn.LeakyReLU()
    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))

@pytest.fixture(scope='module')
def dls():
    set_seed(0)
    items = [(torch.randn(2, 8, 8), torch.tensor(i%3)) for i in range(8)]
    return DataLoaders.from_dsets(items, items[:4], bs=4, device='cpu', num_workers=0)

def learner(dls, path):
    "A Learner whose fits show nothing"
    learn = Learner(dls, net(), loss_func=CrossEntropyLossFlat(), path=path)
    learn.remove_cb(learn.progress)
    learn.logger = lambda o: None
    return learn

class Ends(FitCallback):
    "Ends a fit, or a validation pass, at an event, the second time that it comes if it comes often"
    def __init__(self, event, how, first, a_pass=False):
        self.event,self.how,self.times,self.a_pass = event,how,0,a_pass
        self.order = -200 if first else 200
        setattr(self, event, self.come)
    def come(self):
        if self.fitting==self.a_pass: return # somebody looks at batches before the fit
        self.times += 1
        again = self.event in events[1:-1] and not getattr(self.learn, 'once', True)
        if self.times==1+again: raise self.how('ended')

def channels(**kwargs): return PruneScheduleCallback(.5, structure=Channel(2), every=1, **kwargs)
makes = dict(int8=lambda: QuantAwareCallback('int8'), w4a4=lambda: QuantAwareCallback('w4a4', start=0., freeze_bn=.5, freeze=.9),
    weights=lambda: PruneScheduleCallback(.5, every=1), channels=channels, late=lambda: channels(end=1.), rigl=lambda: RigLCallback(.5, every=1),
    lasso=GroupLassoCallback, distill=lambda: DistillCallback(net(), features='3'), heads=lambda: SelfDistillCallback('0', hint='3'), past=PastSelfCallback,
    average=AverageSelfCallback, mutual=lambda: MutualCallback(net()))

def owned_once(learn):
    "Whether the optimizer owns each parameter of the model once, and no other"
    owned = [id(p) for ps in learn.opt.param_lists for p in ps]
    return sorted(owned)==sorted(map(id, learn.model.parameters()))

def check(learn):
    "That `learn` is as good as any"
    assert not hasattr(learn.opt, 'guests') or all(not g.passing for g in learn.opt.guests.values())
    assert owned_once(learn)
    learn.save('s')
    fresh = learner(learn.dls, learn.path)
    fresh.load('s')
    assert all(v.nan_to_num(7).equal(fresh.model.state_dict()[k].nan_to_num(7)) for k,v in learn.model.state_dict().items())
    before = {k:p.detach().clone() for k,p in learn.model.named_parameters()}
    learn.fit(1, 1e-2)
    assert owned_once(learn)
    unused = not (r:=fake_quant_of(learn.model)) or not r.ready # the step sizes of a model that rounds nothing yet
    assert not [k for k,p in learn.model.named_parameters() if p.equal(before[k]) and not (unused and k.startswith('fake_quant'))]

def ended(learn, cb, event, how, first, once):
    "Fit with `cb`, and end that in this way"
    learn.once = once
    cbs = [*([cb] if cb else []),Ends(event, cancels[how], first)]
    try: learn.fit(1+(not once), 1e-2, cbs=cbs)
    except cancels[how]: assert event not in caught.get(how, ())

sure = [('before_fit','fit',True,True),('before_batch','fit',False,True),('before_batch','interrupt',True,False)]
def places(i):
    "What is tried: each way that fastai catches somewhere, and what nobody catches, before and after all other callbacks, each time with other callbacks in turn"
    every = [(e,h,f,o) for e in events for h in cancels for f in (True,False) for o in (True,False) if (e,h)!=('before_epoch','epoch')] # of which the recorder makes an error
    return every[i%12::12]+sure

@pytest.mark.filterwarnings('error::UserWarning', 'ignore:.*was to .*the fit ended before', 'ignore:No batch was trained', 'ignore:.*was to be zero all the time')
@pytest.mark.parametrize('event', events)
@pytest.mark.parametrize('make', makes)
def test_cancelled(dls, tmp_path, make, event):
    for e,how,first,once in places(list(makes).index(make)+events.index(event)):
        if e!=event: continue
        learn = learner(dls, tmp_path)
        ended(learn, makes[make](), event, how, first, once)
        check(learn)

@pytest.mark.filterwarnings('ignore::UserWarning')
@pytest.mark.parametrize('make', makes)
def test_attached(dls, tmp_path, make):
    "A callback that stays is ready for another fit too, after a learning rate finder that was interrupted as well"
    learn = learner(dls, tmp_path)
    learn.add_cb(makes[make]())
    kept = learn.cbs[-1]
    for cbs in ([],[LRFinder(num_it=4)]):
        with pytest.raises(KeyboardInterrupt): learn.fit(1, 1e-2, cbs=[*cbs,Ends('before_step', KeyboardInterrupt, True)])
        assert kept.run and kept.learn is learn
    learn.fit(1, 1e-2)
    if make in ('int8','w4a4'): assert fake_quant_of(learn.model).ready
    if isinstance(kept, PruneScheduleCallback): assert recipe_of(learn.model) if make in ('channels','late') else sparsity(learn.model)
    learn.remove_cb(kept)
    check(learn)

@pytest.mark.parametrize('event', ['before_validate','before_batch','after_pred','after_loss','after_batch','after_validate'])
@pytest.mark.parametrize('how', ['valid','batch','interrupt','error'])
def test_calibration(dls, tmp_path, event, how):
    "A pass that is ended: the model is calibrated then, or as it was"
    for first in (True,False):
        learn = learner(dls, tmp_path)
        learn.fit(1, 1e-2)
        learn.once,n = True,len(learn.model.state_dict())
        try: learn.validate(dl=dls.train, cbs=[PTQCalibrate(2),Ends(event, cancels[how], first, True)])
        except (ValueError,cancels[how]): assert len(learn.model.state_dict())==n or fake_quant_of(learn.model).ready
        else: assert fake_quant_of(learn.model).ready
        learn.validate(dl=dls.train, cbs=PTQCalibrate(2))
        assert fake_quant_of(learn.model).ready
        check(learn)
