"""Triton's interpreter with bf16 as a GPU computes it: stock, it multiplies the raw bits and truncates casts.

For proofs on a machine without a GPU; ``TRITON_INTERPRET`` must be 1 before Triton is first imported.
"""

from contextlib import contextmanager

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

BF16 = tl.bfloat16


def to_bf16(x):
    """Round fp32 to the nearest bf16, ties to even; bits as uint16."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def from_bf16(bits):
    """The inverse of :func:`to_bf16`, exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def wide(handle):
    """The numbers of a handle."""
    return from_bf16(handle.data) if handle.dtype.scalar == BF16 else handle.data


def cast(self, source, to, *_):
    """Rounded to nearest even."""
    data = wide(source)
    data = to_bf16(data) if to.scalar == BF16 else data.astype(interpreter._get_np_dtype(to.scalar))
    return TensorHandle(data, to.scalar)


def dot(self, a, b, c, *_):
    """Products of bf16 are exact in fp32, so only the order of the sums differs from a tensor core's."""
    return TensorHandle(np.matmul(wide(a), wide(b), dtype=c.data.dtype) + c.data, c.dtype.scalar)


def arithmetic(self, left, right, op):
    """Of anything but bf16."""
    assert BF16 not in (left.dtype.scalar, right.dtype.scalar), "bf16 may only be loaded, stored, cast and multiplied by tl.dot"
    return stock_arithmetic(self, left, right, op)


stock_arithmetic = InterpreterBuilder.binary_op


def patch_tensor(tensor, *scope):
    """As Triton patches its tensors, and one that holds a single number can be an index.

    Up to Triton 3.8 the interpreter makes an int of an array of one element, which NumPy 2.5 refuses.
    """
    stock_patch_tensor(tensor, *scope)
    index = lambda self: self.handle.data.item()  # noqa: E731
    if scope:
        scope[0].set_attr(tensor, "__index__", index)
    else:
        tensor.__index__ = index


stock_patch_tensor = interpreter._patch_lang_tensor
# Changes no number, so it is not undone.
interpreter._patch_lang_tensor = patch_tensor

# Method of the interpreter -> what takes its place.
HONEST = {"cast_impl": cast, "create_fp_to_fp": cast, "create_dot": dot, "binary_op": arithmetic}


@contextmanager
def honest():
    """Interpret bf16 as a GPU computes it within the ``with`` block."""
    before = {name: getattr(InterpreterBuilder, name) for name in HONEST}
    for name, method in HONEST.items():
        setattr(InterpreterBuilder, name, method)
    try:
        yield
    finally:
        for name, method in before.items():
            setattr(InterpreterBuilder, name, method)
