"What answers where a model is served: from its file, with numpy, Pillow and ONNX Runtime alone, and no code that the file brings. `predict.py` of an app is the same"
from .app.prepare import BadInput
from .app.predict import Model
