"""Count the launches of a program on the stand-in device. No kernel runs."""

from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from unittest import mock

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

CPU = torch.device("cpu")
aten = torch.ops.aten
# They allocate memory or change the form of a tensor. Views are free, too.
_FREE = {
    aten.empty.memory_format, aten.empty_like.default, aten.empty_strided.default, aten.new_empty.default,
    aten.new_empty_strided.default, aten._unsafe_view.default, aten.lift_fresh.default, aten.is_pinned.default,
    aten._pin_memory.default, aten.resize_.default,
}  # fmt: skip
_CUDA_OPS = ("topk", "target_rank")
# The kernel of an op of this package that runs on tensors of every device.
_ANY_DEVICE = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
# The dispatcher leaves these keys out in a program without modes. Below a mode it also leaves out autograd.
_LEFT_OUT = torch._C._dispatch_tls_local_exclude_set()


def run_below(mode, op, args, kwargs):
    """Run ``op``, an op of this package that ``mode`` has caught, so that ``mode`` sees the operations within it."""
    with autograd_works(), mode:
        return op.redispatch(_ANY_DEVICE, *args, **kwargs)


def autograd_works():
    """Let autograd work within the ``with`` block below a mode, as it does within an op that runs without a mode."""
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), _LEFT_OUT)


class Launches(Counter):
    """The number of launches by the name of the Triton kernel, the CUDA op or the operation of PyTorch.

    A launch is a launch of a kernel, or an operation of PyTorch that computes or copies. Views, allocations and operations
    whose results are empty are free.
    """

    def add(self, function, out):
        """Count the operation ``function`` with the results ``out``, unless it is free."""
        results = [x for x in pytree.tree_leaves(out) if isinstance(x, Tensor)]
        if function not in _FREE and not function.is_view and not (results and all(x.numel() == 0 for x in results)):
            self[str(function)] += 1

    def table(self):
        """Return the numbers as a text with a line for each name, the largest number first."""
        lines = [f"{number:6} {name}" for name, number in self.most_common()]
        return "\n".join([f"{self.total():6} launches", *lines])


class Counted(TorchDispatchMode):
    """Counts the operations of PyTorch, on tensors of every device, in ``launches``."""

    def __init__(self):
        super().__init__()
        self.launches = Launches()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "lares_fast":
            return run_below(self, function, args, kwargs or {})
        out = function(*args, **(kwargs or {}))
        self.launches.add(function, out)
        return out


@contextmanager
def replaced_kernels(device, launched):
    """Call ``launched`` with the name of each kernel that a call on ``device`` launches, instead of the launch.

    Kernels can run every call on ``device``. Within another block of this kind both functions are called.
    """
    from lares_fast.kernels import _launch

    from lares_fast import _dispatch
    from lares_fast.ops import _cuda_launch, _triton

    outer, obstacle, enqueue = _launch.stand_in.get(), _triton.obstacle, _cuda_launch.enqueue

    def launch(kernel, *call):
        launched(kernel.fn.__name__)
        if outer is not None:
            outer(kernel, *call)

    def launch_cuda(op, on, **arguments):
        launched(op)
        if outer is not None:
            enqueue(op, on, **arguments)

    def none_there(before, tensor_of):
        return lambda call: None if tensor_of(call).device == device else before(call)

    token = _launch.stand_in.set(launch)
    with ExitStack() as stack:
        stack.callback(_launch.stand_in.reset, token)
        stack.enter_context(mock.patch.object(_triton, "obstacle", none_there(obstacle, lambda tensor: tensor)))
        for op in _CUDA_OPS:
            first, *others = _dispatch._TABLE[op]
            able = replace(first, obstacle=none_there(first.obstacle, lambda call: call.query))
            stack.enter_context(mock.patch.dict(_dispatch._TABLE, {op: (able, *others)}))
        for name, function in {
            "device_index": lambda device: 0,
            "limits": lambda index: [],
            "plan": lambda *_, **sizes: {"workspace_bytes": 64},
            "enqueue": launch_cuda,
        }.items():
            stack.enter_context(mock.patch.object(_cuda_launch, name, function))
        yield


@contextmanager
def counted(device=CPU):
    """Yield the launches of the calls within the block on tensors of ``device``. No kernel runs."""
    with Counted() as mode, replaced_kernels(device, lambda name: mode.launches.update([name])):
        yield mode.launches
