"""CPU tensors that say they are on another device, so that what an op does on a GPU can be watched without one.

They say ``meta``, because a PyTorch for the CPU aborts at ``cuda``. Under :class:`Elsewhere` every call on such tensors runs on
the CPU; what PyTorch could only answer after waiting for a GPU is refused, and so is a call that mixes devices.
"""

import sys

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("meta")
CPU = torch.device("cpu")
aten = torch.ops.aten
WAITS = {aten._local_scalar_dense.default, aten.item.default, aten.nonzero.default, aten.masked_select.default}
# With a mask among the indices, the size of the result is only known on the device.
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


def implementations():
    """The Python functions behind the registered ops, by the ops' names."""
    found = {}
    for stem in ("attention", "linear_cross_entropy", "recurrence", "target_rank", "topk"):
        module = sys.modules[f"lares_fast.ops.{stem}"]
        for op, run in (("_OP", "_run"), ("_BACKWARD", "_run_backward"), ("_BACKWARD_OP", "_run_backward")):
            if hasattr(module, op):
                found[getattr(module, op)._qualified_op_name] = getattr(module, run)
    return found


class Sent(Tensor):
    """``inner`` as if it were elsewhere."""

    @staticmethod
    def __new__(cls, inner):
        options = {"dtype": inner.dtype, "device": DEVICE, "strides": inner.stride(), "storage_offset": inner.storage_offset()}
        return Tensor._make_wrapper_subclass(cls, inner.shape, **options)

    def __init__(self, inner):
        self.inner = inner

    def data_ptr(self):
        return self.inner.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function} outside Elsewhere")


class Elsewhere(TorchDispatchMode):
    """Runs what is asked of sent tensors; ``allowed`` lifts the ban on waiting."""

    def __init__(self, allowed=False):
        super().__init__()
        self.allowed = allowed

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function.namespace == "lares_fast":
            with self:
                return implementations()[function._schema.name](*args, **kwargs)
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        sent = [x for x in tensors if isinstance(x, Sent)]
        devices = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.device)]
        here = DEVICE in devices if devices else bool(sent)
        if sent and not self.allowed:
            masks = function in INDEXING and any(x is not None and x.dtype == torch.bool for x in args[1])
            assert function not in WAITS and not masks, f"{function} waits for the device"
            assert here, "a copy to the CPU waits for the device"
            strangers = [x for x in tensors if not isinstance(x, Sent) and x.dim()]
            copies = devices or function == aten.copy_.default
            assert copies or not strangers, f"{function} has tensors on the CPU and elsewhere"
        args, kwargs = pytree.tree_map_only(torch.device, lambda x: CPU if x == DEVICE else x, (args, kwargs))
        args, kwargs = pytree.tree_map_only(Sent, lambda x: x.inner, (args, kwargs))
        out = function(*args, **kwargs)
        return pytree.tree_map_only(Tensor, Sent, out) if here else out


def sent(tensor):
    return Sent(tensor.detach().clone())


class NoScalarReads(TorchDispatchMode):
    """On a GPU each would wait for all work before it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))
