"A second device for machines that have one: it computes on the CPU, and refuses tensors that are elsewhere, as a GPU does"
from contextlib import nullcontext
import torch
from torch._decomp.decompositions import gru_impl, lstm_impl
from torch.utils import _pytree as tree, backend_registration

name = 'other'
aten = torch.ops.aten
indexing = aten.index,aten.index_put_,aten._index_put_impl_
# `detach` is left to PyTorch: what it gives shares its storage, by which values are found
views = 'permute transpose select slice expand squeeze unsqueeze t unfold diagonal split split_with_sizes unbind'.split()
resizing = 'abs angle isclose allclose equal nan_to_num histc cumsum sort topk median arange linspace remainder'.split() # these would give an empty tensor another size

class Module(backend_registration._DummyBackendModule):
    "What PyTorch asks of a device, besides operators"
    def get_rng_state(self, device=None): return torch.get_rng_state()
    def set_rng_state(self, state, device=None): torch.set_rng_state(state)
    def manual_seed_all(self, seed): pass
    def device(self, device): return nullcontext()
    def synchronize(self, device=None): pass

def here(x): return isinstance(x, torch.Tensor) and x.device.type==name
def raw(x): return x.untyped_storage().raw

def wrap(values):
    x = torch._C._acc.create_empty_tensor(values.shape, values.dtype)
    x.untyped_storage().raw = values
    return x

def run(op, *args, **kwargs):
    "`op` of values on the CPU; what it changes in place, or looks at in another way, stays what it was made of"
    xs = [o for o in tree.tree_leaves((args, kwargs)) if isinstance(o, torch.Tensor)]
    needed = [args[0]] if op.overloadpacket in indexing else xs # indices may be elsewhere
    if any(x.ndim and not here(x) for x in needed):
        raise RuntimeError(f'{op}: Expected all tensors to be on the same device, but found at least two devices, {name}:0 and cpu!')
    given = {id(raw(x)):x for x in xs if here(x)}
    parts = {raw(x).untyped_storage().data_ptr() for x in given.values()}
    args,kwargs = tree.tree_map(lambda o: raw(o) if here(o) else torch.device('cpu') if isinstance(o, torch.device) else o, (args, kwargs))
    def back(o):
        if not isinstance(o, torch.Tensor): return o
        if id(o) in given: return given[id(o)]
        return wrap(o if o.untyped_storage().data_ptr() in parts else o.contiguous())
    return tree.tree_map(back, op(*args, **kwargs))

def kernel(of):
    "Let the function be what the operator `of` does on the device"
    return torch.library.impl(f'aten::{of}', 'PrivateUse1')

def to_values(of):
    for overload in getattr(aten, of).overloads():
        if overload.endswith(('out','Dimname')): continue
        op = getattr(getattr(aten, of), overload)
        kernel(of if overload=='default' else f'{of}.{overload}')(lambda *args, _op=op, **kwargs: run(_op, *args, **kwargs))

def registered():
    "Tell PyTorch of the device, for as long as this process runs"
    backend_registration._setup_privateuseone_for_python_backend(name, backend_module=Module())
    lib = torch.library.Library('_', 'IMPL')
    lib.fallback(run, 'PrivateUse1')
    for of in (*views,*resizing): to_values(of)
    kernel('empty.memory_format')(lambda size, dtype=None, *_, **__: wrap(torch.empty(size, dtype=dtype)))
    kernel('empty_strided')(lambda size, stride, dtype=None, *_, **__: wrap(torch.empty_strided(size, stride, dtype=dtype)))
    kernel('_local_scalar_dense')(lambda x: raw(x).item())
    kernel('_copy_from')(copied)
    for of in 'view','_unsafe_view','_reshape_alias': kernel(of)(lambda x, size, *_: wrap(raw(x).reshape(size)))
    kernel('as_strided')(strided)
    kernel('convolution_overrideable')(lambda *args: run(aten.convolution.default, *args))
    kernel('convolution_backward_overrideable')(convolved_back)
    for of,steps in {'lstm.input':lstm_impl, 'gru.input':gru_impl}.items(): # of what it has; their own cells are for GPUs
        for key in 'PrivateUse1','AutogradPrivateUse1': torch.library.impl(f'aten::{of}', key)(steps)
    torch.Tensor.__deepcopy__,torch.Tensor._reduce_ex_internal = deepcopied(torch.Tensor.__deepcopy__),reduced(torch.Tensor._reduce_ex_internal)
    torch.serialization.register_package(0, lambda storage: None, lambda storage, where: storage if where.startswith(name) else None)
    return lib

def copied(x, to, non_blocking=False):
    (raw(to) if here(to) else to).copy_(raw(x) if here(x) else x)
    return to

def strided(x, size, stride, offset=None):
    values = raw(x).contiguous()
    return wrap(values.as_strided(size, stride, values.storage_offset()+(offset or 0)))

def convolved_back(grad, x, w, stride, padding, dilation, transposed, output_padding, groups, mask):
    sizes = [w.shape[1]*groups if transposed else w.shape[0]]
    return run(aten.convolution_backward.default, grad, x, w, sizes, stride, padding, dilation, transposed, output_padding, groups, mask)

def deepcopied(deepcopy):
    def f(self, memo):
        if not here(self): return deepcopy(self, memo)
        if id(self) not in memo: memo[id(self)] = wrap(raw(self).clone()).requires_grad_(self.requires_grad)
        return memo[id(self)]
    return f

def reduced(reduce):
    def f(self, proto):
        if not here(self): return reduce(self, proto)
        return torch._utils._rebuild_device_tensor_from_cpu_tensor,(self.detach().cpu(), self.dtype, str(self.device), self.requires_grad)
    return f
