"Laws of the sparse file, on inputs nobody thought of"
import torch
from hypothesis import given, settings, strategies as st
from fastquant.export.sparse import decode, encode, from_sparse, to_sparse

dtypes = torch.float32,torch.float64,torch.float16,torch.bfloat16,torch.int8,torch.uint8,torch.int16,torch.int32,torch.int64,torch.bool
shapes = st.lists(st.integers(0, 9), max_size=4)

def bits(t): return t.contiguous().reshape(-1).view(torch.uint8)
def random_tensor(shape, dtype, left, seed):
    g = torch.Generator().manual_seed(seed)
    t = torch.randn(shape, generator=g)*40*(torch.rand(shape, generator=g)<left)
    return t.clamp(0 if dtype is torch.uint8 else -100, 100).to(dtype)

@settings(max_examples=150, deadline=None)
@given(shapes, st.sampled_from(dtypes), st.sampled_from([0,.01,.1,.5,1]), st.integers(0, 1000))
def test_tensor_there_and_back(shape, dtype, left, seed):
    t = random_tensor(shape, dtype, left, seed)
    data,facts = encode(t)
    back = decode(data, facts)
    assert back.dtype==t.dtype and back.shape==t.shape and bits(back).equal(bits(t))
    assert len(data)<=t.numel()*t.element_size()

@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(shapes, st.sampled_from(dtypes)), max_size=4), st.integers(0, 1000), st.data())
def test_damaged_files(tensors, seed, data):
    "Any byte changed: an error that is a `ValueError`, or the very same tensors"
    want = {f't{i}':random_tensor(s, d, .3, seed) for i,(s,d) in enumerate(tensors)}
    file = to_sparse(want, about='me')
    bad = bytearray(file)
    bad[data.draw(st.integers(0, len(bad)-1))] ^= data.draw(st.integers(1, 255))
    try: got,about = from_sparse(bytes(bad), max_bytes=2**24)
    except ValueError: return
    assert about==dict(about='me') and got.keys()==want.keys() and all(bits(got[k]).equal(bits(t)) for k,t in want.items())
