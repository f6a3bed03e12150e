"Everything at once, as fastai's own `all` modules do: `from fastquant.all import *`"
from .basics import *
from .affine import *
from .observe import *
from .spec import *
from .trace import *
from .prepare import *
from .convert import *
from .export import *
from .report import *
from .callback.quant import *
from .learner import *
