"Everything at once, as fastai's own `all` modules do: `from fastquant.all import *`"
from .basics import *
from .affine import *
from .lsq import *
from .observe import *
from .spec import *
from .trace import *
from .prepare import *
from .train import *
from .convert import *
from .export import *
from .report import *
from .data import *
from .optimizer import *
from .callback.quant import *
from .learner import *
