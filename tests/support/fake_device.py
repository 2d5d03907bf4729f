"""CPU tensors that claim to be on another device. They show without a GPU what an op would do on one.

Their device is ``meta``, because a build of PyTorch for the CPU aborts at ``cuda``. Under :class:`FakeDevice` every call on
such tensors runs on the CPU. A call fails if PyTorch could answer it only after waiting for a GPU, or if it mixes devices.
"""

import sys

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("meta")
CPU = torch.device("cpu")
aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense.default, aten.item.default, aten.equal.default, aten.nonzero.default, aten.masked_select.default,
}  # fmt: skip
# With a mask among the indices, only the device knows the size of the result.
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


def implementations():
    """Return the Python function behind each registered op, by the name of the op."""
    found = {}
    for stem in ("attention", "embedding", "initial_state", "linear_cross_entropy", "recurrence", "target_rank", "topk"):
        module = sys.modules[f"lares_fast.ops.{stem}"]
        for op, run in (("_OP", "_run"), ("_BACKWARD", "_run_backward"), ("_BACKWARD_OP", "_run_backward")):
            if hasattr(module, op):
                found[getattr(module, op)._qualified_op_name] = getattr(module, run)
    return found


class DeviceTensor(Tensor):
    """A tensor that holds ``inner`` on the CPU and claims to be on another device."""

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
        raise AssertionError(f"{function} was called outside of FakeDevice")


class FakeDevice(TorchDispatchMode):
    """Runs calls on :class:`DeviceTensor`. With ``allowed`` a call may wait for the device."""

    def __init__(self, allowed=False):
        super().__init__()
        self.allowed = allowed

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function.namespace == "lares_fast":
            with self:
                return implementations()[function._schema.name](*args, **kwargs)
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        there = [x for x in tensors if isinstance(x, DeviceTensor)]
        devices = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.device)]
        on_device = DEVICE in devices if devices else bool(there)
        if there and not self.allowed:
            masks = function in INDEXING and any(x is not None and x.dtype == torch.bool for x in args[1])
            assert function not in WAITS and not masks, f"{function} waits for the device"
            assert on_device, "a copy to the CPU waits for the device"
            strangers = [x for x in tensors if not isinstance(x, DeviceTensor) and x.dim()]
            copies = devices or function == aten.copy_.default
            assert copies or not strangers, f"{function} has tensors on the CPU and on the device"
        args, kwargs = pytree.tree_map_only(torch.device, lambda x: CPU if x == DEVICE else x, (args, kwargs))
        args, kwargs = pytree.tree_map_only(DeviceTensor, lambda x: x.inner, (args, kwargs))
        out = function(*args, **kwargs)
        return pytree.tree_map_only(Tensor, DeviceTensor, out) if on_device else out


def to_fake_device(tensor):
    return DeviceTensor(tensor.detach().clone())


class NoScalarReads(TorchDispatchMode):
    """Fails at every read of a number from a tensor. On a GPU each such read waits for all work before it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))
