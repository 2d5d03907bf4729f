"""Make Triton's interpreter compute bf16 as a GPU does. Without these patches it multiplies raw bits and truncates casts.

Tests on a machine without a GPU use this. ``TRITON_INTERPRET`` must be 1 before Triton is first imported.
"""

from contextlib import contextmanager

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

BF16 = tl.bfloat16


def to_bf16(x):
    """Round fp32 to the nearest bf16, ties to even. Return the bits as uint16."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def from_bf16(bits):
    """Return the fp32 numbers of bf16 ``bits`` (uint16), which are exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def wide(handle):
    """Return the NumPy numbers of a handle; bf16 becomes fp32."""
    return from_bf16(handle.data) if handle.dtype.scalar == BF16 else handle.data


def cast(self, source, to, *_):
    """Cast to another type. Casts to bf16 round to the nearest number, ties to even."""
    data = wide(source)
    data = to_bf16(data) if to.scalar == BF16 else data.astype(interpreter._get_np_dtype(to.scalar))
    return TensorHandle(data, to.scalar)


def dot(self, a, b, c, *_):
    """Multiply matrices. Products of bf16 are exact in fp32, so only the order of sums differs from a tensor core's order."""
    return TensorHandle(np.matmul(wide(a), wide(b), dtype=c.data.dtype) + c.data, c.dtype.scalar)


def arithmetic(self, left, right, op):
    """Compute as the interpreter does. Operands in bf16 raise AssertionError."""
    assert BF16 not in (left.dtype.scalar, right.dtype.scalar), "bf16 may only be loaded, stored, cast and multiplied by tl.dot"
    return stock_arithmetic(self, left, right, op)


stock_arithmetic = InterpreterBuilder.binary_op


def patch_tensor(tensor, *scope):
    """Patch a tensor as Triton does, and let a tensor that holds a single number be an index.

    Up to Triton 3.8 the interpreter converts an array of one element to an int, which NumPy 2.5 does not allow.
    """
    stock_patch_tensor(tensor, *scope)
    index = lambda self: self.handle.data.item()  # noqa: E731
    if scope:
        scope[0].set_attr(tensor, "__index__", index)
    else:
        tensor.__index__ = index


def patch_language(function):
    """Patch the functions of Triton's language as Triton does, but once in a launch, and not for each device function."""
    languages = [x for x in function.__globals__.values() if x is tl or x is tl.core]
    if any(tl.core.is_builtin(language.load) for language in languages):
        return stock_patch_language(function)
    # Triton 3.5 has no scopes, and never undoes its patches.
    return interpreter._LangPatchScope() if hasattr(interpreter, "_LangPatchScope") else None


def refuse_overflow(self, left, right, operation):
    """Raise AssertionError if ``operation`` on integers of less than 64 bits overflows.

    Triton computes this, too, and then throws the result away unless it debugs. That would take half of the time of a kernel.
    """
    scalar = left.type.scalar
    if scalar.int_bitwidth >= 64:
        return
    function = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[operation.__name__]
    exact = function(left.handle.data.astype(np.int64), right.handle.data.astype(np.int64))
    inside = (exact >= scalar.get_int_min_value()) & (exact <= scalar.get_int_max_value())
    assert inside.all(), f"int{scalar.int_bitwidth} overflow detected for operation {operation.__name__}"


stock_patch_tensor, stock_patch_language = interpreter._patch_lang_tensor, interpreter._patch_lang
# These patches change no number, so they are never undone.
interpreter._patch_lang_tensor, interpreter._patch_lang = patch_tensor, patch_language
TritonSemantic.binary_op_sanitize_overflow_impl = refuse_overflow

# Method of the interpreter -> its replacement.
AS_ON_GPU = {"cast_impl": cast, "create_fp_to_fp": cast, "create_dot": dot, "binary_op": arithmetic}


@contextmanager
def bf16_as_on_gpu():
    """Make the interpreter compute bf16 as a GPU does within the ``with`` block."""
    before = {name: getattr(InterpreterBuilder, name) for name in AS_ON_GPU}
    for name, method in AS_ON_GPU.items():
        setattr(InterpreterBuilder, name, method)
    try:
        yield
    finally:
        for name, method in before.items():
            setattr(InterpreterBuilder, name, method)
