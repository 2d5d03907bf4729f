"""CPU tensors that claim to be on another device. They show without a GPU what a program would do on one.

Their device is ``meta``, because a build of PyTorch for the CPU aborts at ``cuda``. Under :class:`FakeDevice` every call on
such tensors runs on the CPU. A call fails if it mixes devices, or if PyTorch could answer it only after waiting for a GPU.
"""

import sys
from contextlib import ExitStack
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.optim import adam
from torch.optim import optimizer as optimizers
from torch.utils import _foreach_utils as foreach
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.launches import Launches, autograd_works, replaced_kernels, run_below

DEVICE = torch.device("meta")
CPU = torch.device("cpu")
aten = torch.ops.aten
# The size of the result, or the result itself, is known to the device only.
WAITS = {
    aten._local_scalar_dense.default, aten.item.default, aten.equal.default, aten.nonzero.default, aten.masked_select.default,
    aten._unique.default, aten._unique2.default, aten.unique_dim.default, aten.unique_consecutive.default,
    aten.bincount.default, aten.allclose.default,
}  # fmt: skip
# With a mask among the indices, only the device knows the size of the result.
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
COPIES = {aten._to_copy.default, aten.copy_.default}


class Wait(NamedTuple):
    """A wait of the host for the device.

    ``what`` says what waits. ``places`` are the functions of the package that were running, the innermost one first, such as
    ``train.epoch.train_epoch``. Outside of the package it is the function that waits.
    """

    what: str
    places: tuple[str, ...]

    @property
    def place(self):
        """Return the innermost function."""
        return self.places[0]


class DeviceTensor(Tensor):
    """A tensor that holds ``inner`` on the CPU and claims to be on another device."""

    # PyTorch does not copy values into tensors that are ``meta``.
    is_meta = False

    @staticmethod
    def __new__(cls, inner):
        options = {"dtype": inner.dtype, "device": DEVICE, "strides": inner.stride(), "storage_offset": inner.storage_offset()}
        return Tensor._make_wrapper_subclass(cls, inner.shape, **options)

    def __init__(self, inner):
        assert type(inner) is Tensor, f"a {type(inner).__name__} cannot be on the device"
        self.inner = inner

    def data_ptr(self):
        return self.inner.data_ptr()

    def tolist(self):
        return self.cpu().tolist()

    def __repr__(self):
        return f"DeviceTensor({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function} was called outside of FakeDevice")


class FakeDevice(TorchDispatchMode):
    """Runs calls on :class:`DeviceTensor`.

    Args:
        allowed: where the host may wait for the device. ``True`` allows every wait, and a collection allows the waits within
            the functions of these names, see :class:`Wait`.
        compute: run the ops of the package on the CPU, so that results are real numbers. Without it they run as on a GPU, but
            their kernels are not launched, so that their results are arbitrary.

    ``waits`` lists all waits. A copy to the device waits unless it is ``non_blocking``; :func:`to_fake_device` does not wait.
    ``launches`` counts all launches. With ``compute`` an op of the package is one launch. Memory of the CPU is never
    page-locked: ``pin_memory`` returns its tensor.
    """

    def __init__(self, allowed=False, *, compute=False):
        super().__init__()
        self.allowed, self.compute = allowed, compute
        self.waits, self.launches = [], Launches()
        self._entered = []

    def __enter__(self):
        self._entered.append(ExitStack() if self._entered else self._patches())
        return super().__enter__()

    def __exit__(self, *error):
        self._entered.pop().close()
        return super().__exit__(*error)

    def _patches(self):
        # The device has the fused optimizers and the multi-tensor functions of a GPU.
        stack = ExitStack()
        for where, name in (
            (optimizers, "_get_fused_kernels_supported_devices"), (optimizers, "_get_foreach_kernels_supported_devices"),
            (adam, "_get_capturable_supported_devices"), (foreach, "_get_foreach_kernels_supported_devices"),
        ):  # fmt: skip
            original = getattr(where, name)
            stack.enter_context(mock.patch.object(where, name, lambda *a, _f=original, **k: [*_f(*a, **k), DEVICE.type]))
        for where in (optimizers, foreach):
            types = [*where._foreach_supported_types, DeviceTensor]
            stack.enter_context(mock.patch.object(where, "_foreach_supported_types", types))
        # torch.tensor(..., device=DEVICE) would lose the values before this mode sees them.
        for name in ("tensor", "as_tensor"):
            stack.enter_context(mock.patch.object(torch, name, _then_moved(getattr(torch, name))))
        if not self.compute:
            stack.enter_context(replaced_kernels(DEVICE, lambda name: self.launches.update([name])))
        return stack

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function.namespace == "lares_fast":
            return self._package_op(function, args, kwargs)
        if function == aten._pin_memory.default:
            return args[0]
        kwargs.pop("pin_memory", None)
        on_device, involved = self._check(function, args, kwargs)
        inner_args, inner_kwargs = _inner((args, kwargs))
        out = function(*inner_args, **inner_kwargs)
        if involved:
            self.launches.add(function, out)
        if function._schema.is_mutable:
            return _written(function, args, kwargs, out)
        return _wrapped(out) if on_device else out

    def _package_op(self, function, args, kwargs):
        if not self.compute:
            return run_below(self, function, args, kwargs)
        on_device = any(isinstance(x, DeviceTensor) for x in args)
        backends = [argument.name == "backend" for argument in function._schema.arguments]
        args = ["auto" if is_backend else x for is_backend, x in zip(backends, _inner(args), strict=True)]
        with autograd_works():
            out = function(*args, **kwargs)
        if not on_device:
            return out
        self.launches.add(function, out)
        return _wrapped(out)

    def _check(self, function, args, kwargs):
        """Return whether the result is on the device, and whether the device has any part in the call.

        Record a wait. Fail if it is not allowed, and if devices are mixed.
        """
        leaves = pytree.tree_leaves((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        devices = [x for x in leaves if isinstance(x, torch.device)]
        there = [x for x in tensors if isinstance(x, DeviceTensor)]
        here = [x for x in tensors if not isinstance(x, DeviceTensor)]
        assert all(x.device != DEVICE for x in here), f"{function} has a tensor that was made outside of FakeDevice"
        on_device = DEVICE in devices if devices else bool(there)
        if function in COPIES:
            onto = isinstance(args[0], DeviceTensor) if function == aten.copy_.default else on_device
            if there and not onto:
                self._wait("a copy to the CPU")
            elif here and onto and not (kwargs.get("non_blocking") or (function == aten.copy_.default and args[2:] == (True,))):
                self._wait("a copy to the device, which is not non_blocking,")
            return onto, bool(there) or onto
        if there:
            masks = function in INDEXING and any(x is not None and x.dtype == torch.bool for x in args[1])
            sizes = function == aten.repeat_interleave.Tensor and kwargs.get("output_size") is None
            if function in WAITS or masks or sizes:
                self._wait(str(function))
            written = here and function._schema.is_mutable and args[0] is here[0]
            assert not written and not any(x.dim() for x in here), f"{function} has tensors on the CPU and on the device"
        return on_device, bool(there) or on_device

    def _wait(self, what):
        wait = Wait(what, _places())
        self.waits.append(wait)
        allowed = self.allowed if isinstance(self.allowed, bool) else not set(self.allowed).isdisjoint(wait.places)
        assert allowed, f"{what} waits for the device, in {' < '.join(wait.places)}"


def _then_moved(make):
    def moved(data, *, device=None, **options):
        tensor = make(data, **options)
        return tensor if device is None else tensor.to(device)

    return moved


def _places():
    frame, outside, places = sys._getframe(), None, []
    while frame is not None:
        module, function = frame.f_globals.get("__name__", ""), frame.f_code.co_qualname
        if module.startswith("lares_fast."):
            places.append(f"{module.removeprefix('lares_fast.')}.{function}")
        elif outside is None and module.split(".")[0] not in ("torch", "unittest") and module != __name__:
            outside = f"{module}.{function}"
        frame = frame.f_back
    return tuple(places) or (outside,)


def _inner(values):
    values = pytree.tree_map_only(torch.device, lambda x: CPU if x == DEVICE else x, values)
    return pytree.tree_map_only(DeviceTensor, lambda x: x.inner, values)


def _wrapped(values):
    return pytree.tree_map_only(Tensor, DeviceTensor, values)


def _written(function, args, kwargs, out):
    """Return what ``function`` returns: the arguments that it has written, in the order of its schema."""
    given = {argument.name: kwargs.get(argument.name) for argument in function._schema.arguments}
    given.update(zip(given, args, strict=False))
    written = [
        given[argument.name]
        for argument in function._schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    for tensor in pytree.tree_leaves(written):
        if isinstance(tensor, DeviceTensor):
            same = tensor.shape == tensor.inner.shape and tensor.stride() == tensor.inner.stride()
            assert same, f"{function} changes the shape of its argument, which FakeDevice cannot follow"
    if out is None:
        return None
    if all(isinstance(x, Tensor) for x in written) and len(written) == len(function._schema.returns):
        return written[0] if len(written) == 1 else tuple(written)
    raise AssertionError(f"FakeDevice does not know what {function} returns")


def to_fake_device(tensor):
    return DeviceTensor(tensor.detach().clone())


class NoScalarReads(TorchDispatchMode):
    """Fails at every read of a number from a tensor. On a GPU each such read waits for all work before it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))
