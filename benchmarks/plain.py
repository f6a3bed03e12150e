"Outputs of an ONNX file in a session with nothing set, for `portable`, which also runs this on other processors: `python benchmarks/plain.py ENGINE FILE INPUT OUTPUT`"
import sys
import numpy as np

def onnxruntime(fname, x):
    import onnxruntime as ort
    s = ort.InferenceSession(fname)
    return s.run(None, {s.get_inputs()[0].name:x})[0]

def openvino(fname, x):
    import openvino as ov
    return ov.Core().compile_model(fname, 'CPU')([x])[0]

if __name__=='__main__':
    engine,fname,given,out = sys.argv[1:]
    np.save(out, globals()[engine](fname, np.load(given)))
