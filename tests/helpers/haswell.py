"A processor with AVX2 and without VNNI, emulated"
import numpy as np, onnx, os, platform, pytest, shutil, subprocess, sys
from fastquant.export import portable
from pathlib import Path

script = """import sys, numpy as np
def ort_outputs(path, feeds):
    import onnxruntime as ort
    o = ort.SessionOptions()
    o.log_severity_level,o.intra_op_num_threads = 4,1
    s = ort.InferenceSession(path, o, providers=['CPUExecutionProvider'])
    return dict(zip([i.name for i in s.get_outputs()], s.run(None, feeds)))
def openvino_outputs(path, feeds):
    import openvino as ov
    m = ov.Core().compile_model(ov.Core().read_model(path), 'CPU', dict(INFERENCE_NUM_THREADS=1))
    found = m(feeds)
    return {o.any_name:found[o] for o in m.outputs}
run = dict(ort=ort_outputs, openvino=openvino_outputs)[sys.argv[1]]
for name in sys.argv[2:]: np.savez(name+'_out.npz', **run(name+'.onnx', dict(np.load(name+'_in.npz'))))
"""

def emulated(folder, code, *args, timeout=300):
    "Run Python `code` on an emulated processor with AVX2 and without VNNI"
    if not shutil.which('qemu-x86_64'): pytest.skip("Debian's qemu-user is not installed")
    if platform.machine()!='x86_64': pytest.skip(f'This Python is built for {platform.machine()}, and not for x86-64')
    (folder/'run.py').write_text(code)
    env = {**os.environ, 'OMP_NUM_THREADS':'1', 'PYTHONPATH':str(Path(portable.__file__).parents[2])}
    command = ['qemu-x86_64','-cpu','Haswell',sys.executable,str(folder/'run.py'),*map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env)
    assert not done.returncode, done.stderr[-2000:]
    return done.stdout

def on_haswell(folder, by='ort', **files):
    "Outputs of each of `files`, a model and its inputs, in an engine there"
    for k,(proto,feeds) in files.items():
        onnx.save(proto, folder/f'{k}.onnx')
        np.savez(folder/f'{k}_in.npz', **feeds)
    emulated(folder, script, by, *(folder/k for k in files))
    return {k:dict(np.load(folder/f'{k}_out.npz')) for k in files}
