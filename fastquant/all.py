"What a user needs, as fastai's own `all` modules bring it: verbs, callbacks, specs, registries, and what is made with them. Everything else is imported by module"
from .core.basics import Registry
from .core.model import evaluating, copy_model
from .core.measure import n_bytes, n_params, n_macs, latency
from .core.outputs import sqnr
from .core.attach import Attachment, attach, attached, attachments, restorable
from .quant.grid import Grid, quantize, dequantize, fake_quant, qparams
from .quant.observe import Observer, observers
from .quant.spec import Spec, TensorSpec, PerTensor, PerChannel, PerGroup, low_bits, int8, int8_per_tensor, int8_full, int8_symmetric, specs
from .quant.prepare import prepare, unprepare, watch, set_ranges, fake_quant_of, rounding
from .quant.convert import convert
from .lowrank.factors import factorisations
from .lowrank.layers import factor_recipe
from .distill.losses import distill_losses, Match, agree
from .prune.criteria import criteria
from .prune.structures import structures, NM, Channel
from .prune.schedule import schedules, plot_schedules
from .prune.mask import masked, sparsity, set_masks, remove_masks
from .prune.shrink import recipe_of, shrink
from .prune.channels.target import targets
from .export.onnx import to_onnx
from .export.summary import Report
from .export.engine import Engine, engines, load_engine
from .export.openvino import Openvino
from .export.integers import ExportMismatch
from .export.report import ranges
from .callback.core import FitCallback
from .callback.quant import PTQCalibrate, QuantAwareCallback
from .callback.prune import PruneScheduleCallback, GroupLassoCallback, RewindCallback
from .callback.rigl import RigLCallback
from .callback.distill import DistillCallback
from .callback.selfdistill import SelfDistillCallback, PastSelfCallback, AverageSelfCallback, MutualCallback
from .learner.core import describe
from .learner.ladder import MaxDropExceeded
from .learner.quant import *
from .learner.lottery import *
from .learner.prune import Sensitivity
from .learner.lowrank import RankSensitivity
from .learner.compare import *
from .learner.app import *
