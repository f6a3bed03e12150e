"Factors against what they have to be: by the singular values, by TensorLy, written out as a matrix, and by finite differences"
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from fastquant.all import *
from fastquant.lowrank.layers import factorise
from fastquant.lowrank.ranks import rank_options

@settings(max_examples=25, deadline=None)
@given(st.integers(1,12), st.integers(1,12), st.integers(0,10**6))
def test_svd_is_the_best_of_its_rank(no, ni, seed):
    "Eckart & Young: what is lost is the squares of the singular values that are left out"
    torch.manual_seed(seed)
    m = nn.Linear(ni, no)
    s = np.linalg.svd(m.weight.detach().double().numpy(), compute_uv=False)
    for r in range(1, min(no, ni)+1):
        f = factorise(m, 'svd', r)
        assert ((m.weight-f[1].weight@f[0].weight)**2).sum().item()==pytest.approx((s[r:]**2).sum(), abs=1e-4)
        assert torch.equal(f[1].bias, m.bias)

@settings(max_examples=10, deadline=None)
@given(st.sampled_from([1,3,(3,5)]), st.sampled_from([1,2,(2,1)]), st.sampled_from([1,2]), st.booleans(), st.integers(0,10**6))
def test_full_rank_is_exact(k, stride, dilation, bias, seed):
    torch.manual_seed(seed)
    m,x = nn.Conv2d(5, 7, k, stride, 2, dilation, bias=bias),torch.randn(2,5,11,12)
    f = factorisations['svd' if k==1 else 'tucker2']
    with torch.no_grad(): assert torch.allclose(m(x), factorise(m, f, f.full(m))(x), atol=1e-5)

def test_tucker_is_what_tensorly_says():
    import tensorly as tl
    from tensorly.decomposition import partial_tucker
    m = nn.Conv2d(8, 12, 3)
    f = factorise(m, 'tucker2', (5,4))
    w = torch.einsum('oa,abhw,bi->oihw', f[2].weight[:,:,0,0], f[1].weight, f[0].weight[:,:,0,0]).detach().numpy()
    (core,factors),_ = partial_tucker(m.weight.detach().double().numpy(), rank=[5,4], modes=[0,1], init='svd')
    assert np.allclose(w, tl.tenalg.multi_mode_dot(core, factors, modes=[0,1]), atol=1e-4)

def test_tensor_train_is_a_matrix():
    "Layer and embedding do what the matrix does that is written out"
    m,e = nn.Linear(36, 60),nn.Embedding(60, 36)
    f,g = factorise(m, 'tensor_train', (6,5)),factorise(e, 'tensor_train', (6,5))
    with torch.no_grad():
        w = f(torch.eye(36))-f[0].bias
        x = torch.randn(4,3,36)
        assert torch.allclose(f(x), x@w+f[0].bias, atol=1e-5)
        full = g(torch.arange(60))
        i = torch.randint(60, (4,3))
        assert torch.equal(g(i), full[i]) and full.shape==(60,36)
        lost = ((m.weight-w.T)**2).sum()/(m.weight**2).sum()
        rows = rank_options(m, 'tensor_train')
        assert 0<lost<=rows[0].lost+sum(o.lost for o in rows if o.rank==(6,5))+1

def test_gradients_by_finite_differences():
    for m,kind,rank,x in ((nn.Linear(8,12),'tensor_train',(3,3),torch.randn(2,8)), (nn.Conv2d(3,4,3),'cp',3,torch.randn(1,3,5,5))):
        f = factorise(m, kind, rank).double()
        assert torch.autograd.gradcheck(f, x.double().requires_grad_())
