"""Small kernels with and without faults, for the tests of the test harness."""

import triton
import triton.language as tl
from lares_fast.kernels import _random


@triton.jit
def copy(X, Y, shift, S: tl.constexpr):
    at = tl.program_id(0) * S + tl.arange(0, S)
    tl.store(Y + at, tl.load(X + at + shift))


@triton.jit
def scatter(X, shift, S: tl.constexpr):
    tl.store(X + tl.program_id(0) * S + tl.arange(0, S) + shift, 1.0)


@triton.jit
def overlap(X, S: tl.constexpr):
    tl.store(X + tl.program_id(0) * (S - 1) + tl.arange(0, S), 1.0)


@triton.jit
def spell(X):
    tl.store(X, tl.load(X) * 10 + tl.program_id(0) + 1)


@triton.jit
def round_trip(X, NARROW, BACK, n, S: tl.constexpr):
    at = tl.arange(0, S)
    narrow = tl.load(X + at, mask=at < n).to(tl.bfloat16)
    tl.store(NARROW + at, narrow, mask=at < n)
    tl.store(BACK + at, narrow.to(tl.float32), mask=at < n)


@triton.jit
def product(A, B, C, S: tl.constexpr):
    at = tl.arange(0, S)[:, None] * S + tl.arange(0, S)[None, :]
    tl.store(C + at, tl.dot(tl.load(A + at), tl.load(B + at), input_precision="ieee"))


@triton.jit
def double(X, S: tl.constexpr):
    at = tl.arange(0, S)
    x = tl.load(X + at)
    tl.store(X + at, x + x)


@triton.jit
def normals(WORDS, OUT, S: tl.constexpr):
    """Store the numbers of h0 that belong to the random words."""
    at = tl.program_id(0) * S + tl.arange(0, S)
    tl.store(OUT + at, _random._normal(tl.load(WORDS + at).to(tl.uint32)))


@triton.jit
def _sum(x, y, OPERATION: tl.constexpr):
    if OPERATION == "add":
        return x + y
    if OPERATION == "sub":
        return x - y
    return x * y


@triton.jit
def arithmetic(X, Y, OUT, OPERATION: tl.constexpr):
    tl.store(OUT, _sum(tl.load(X), tl.load(Y), OPERATION))
