"""Counter-based random numbers: a draw depends on its address only, never on the order in which a program draws.

The generator is Philox4x32-10 (Salmon et al., SC'11). The C++ and the Triton code use the same layout of addresses.
docs/numerics.md states the layout and the test vectors, which never change.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lares_fast._errors import InputError
from lares_fast._numbers import shown, whole
from lares_fast._transfer import to_device

Key = tuple[int, int]

# The kinds of draws. The site field of an address holds one of them.
SITE_INPUT, SITE_ATTENTION_OUT, SITE_FEED_FORWARD_OUT, SITE_ATTENTION, SITE_STATE = range(5)

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF
_ROUNDS = 10
_CALLS_IN_CACHE = 16384


@dataclass(frozen=True)
class RoundKeys:
    """The keys of Philox's ten rounds, as pairs of integers or of int64 tensors [].

    They replace a key whose value is on a GPU, so that the host need not wait for it.
    """

    pairs: tuple[tuple[Any, Any], ...]

    @classmethod
    def of(cls, key: AnyKey) -> RoundKeys:
        """Return the round keys of a key in any form."""
        if isinstance(key, RoundKeys):
            return key
        return cls.of_seed(key) if isinstance(key, Tensor) else cls.of_key(key)

    @classmethod
    def of_key(cls, key: Key) -> RoundKeys:
        """Return the round keys of ``key``."""
        k0, k1 = key
        return cls(tuple(((k0 + i * _WEYL[0]) & _WORD, (k1 + i * _WEYL[1]) & _WORD) for i in range(_ROUNDS)))

    @classmethod
    def of_seed(cls, seed: Tensor) -> RoundKeys:
        """Return the round keys of the key in ``seed``, the result of :func:`seed_of`, on the device of ``seed``."""
        rounds = torch.arange(_ROUNDS, device=seed.device)
        k0, k1 = ((seed >> shift) + rounds * weyl & _WORD for shift, weyl in zip((0, 32), _WEYL, strict=True))
        return cls(tuple(zip(k0.unbind(), k1.unbind(), strict=True)))


# A key as two integers, as the int64 tensor [1] that :func:`seed_of` returns, or as the keys of all rounds.
AnyKey = Key | Tensor | RoundKeys


def philox(counter: tuple[Any, Any, Any, Any], key: AnyKey) -> tuple[Any, Any, Any, Any]:
    """Return the four words of Philox4x32 after ten rounds. A word has 32 bits, in an integer or in an int64 tensor.

    The tensors of ``counter`` broadcast with each other.
    """
    c0, c1, c2, c3 = counter
    for k0, k1 in RoundKeys.of(key).pairs:
        # int64 multiplication wraps modulo 2**64, so the high word survives the arithmetic shift and the mask.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & _WORD) ^ c1 ^ k0, p1 & _WORD, ((p0 >> 32) & _WORD) ^ c3 ^ k1, p0 & _WORD
    return c0, c1, c2, c3


def seed_of(key: Key, device: torch.device) -> Tensor:
    """Return ``key`` as one number, ``key[0] + key[1] * 2**32`` in an int64 tensor [1]; all ops take their key in this form.

    A kernel fills the tensor. A copy from the host would make the host wait.
    """
    packed = key[0] | key[1] << 32
    return torch.full((1,), packed - (packed >> 63 << 64), dtype=torch.int64, device=device)


def checked_key(name: str, key: object) -> Key:
    """Return ``key``. Raises :class:`InputError` unless it is a pair of integers of 32 bits."""
    if not isinstance(key, tuple | list) or len(key) != 2:
        raise InputError(f"{name} must be two integers or int64 [1], but got {shown(key)}.")
    words = whole(name, key[0]), whole(name, key[1])
    if not all(0 <= word <= _WORD for word in words):
        raise InputError(f"{name} must hold integers in 0..2^32-1, but got {words[0]} and {words[1]}.")
    return words


def key_of(seed: Tensor) -> Key:
    """Return the key in ``seed``, the result of :func:`seed_of`. If ``seed`` is on a GPU, the host waits for it."""
    packed = int(seed)
    return packed & _WORD, packed >> 32 & _WORD


def fold(key: Key, *data: int) -> Key:
    """Derive a key from ``key`` and a path of integers in [0, 2**64). One path always gives one key."""
    for value in data:
        w0, w1, _, _ = philox((value & _WORD, value >> 32 & _WORD, 0, 0), key)
        key = (w0, w1)
    return key


def root_key(seed: int) -> Key:
    """Return the key for ``seed``, an integer in [0, 2**64). All other keys of a run are folded from it."""
    return fold((0, 0), seed)


def generator(key: Key) -> torch.Generator:
    """Return a CPU generator seeded by ``key``, for draws that no kernel repeats (shuffles, depths, partners)."""
    return torch.Generator().manual_seed((key[1] << 31) ^ key[0])


# The names of PyTorch's functions and methods that draw random numbers and take a generator.
_DRAWS = {
    "bernoulli", "bernoulli_", "cauchy_", "exponential_", "geometric_", "kaiming_uniform_", "log_normal_", "multinomial",
    "normal", "normal_", "poisson", "rand", "rand_like", "randint", "randint_like", "randn", "randn_like", "randperm",
    "random_", "uniform_",
}  # fmt: skip


class DrawFrom(TorchFunctionMode):
    """Let PyTorch's functions draw from ``generator`` within the ``with`` block, in this thread only.

    ``torch.manual_seed(s)`` and ``DrawFrom(torch.Generator().manual_seed(s))`` give the same numbers on the CPU. But the
    former seeds the generator that all threads share.
    """

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self._generator = generator

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call ``func`` with the generator, unless the caller names one."""
        kwargs = dict(kwargs or {})
        if getattr(func, "__name__", None) in _DRAWS and kwargs.get("generator") is None:
            kwargs["generator"] = self._generator
        return func(*args, **kwargs)


def drop_threshold(p: float) -> int:
    """Return ``p`` in units of 1/65536. A 16-bit draw below it is dropped, so the realised p is threshold / 65536."""
    return min(round(p * 65536), 65535)


def _sixteen_bit(words: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """Split four ``words`` [..., 8] of eight calls into draws of 16 bits [..., 4, 16].

    Row w holds the draws of word w, and column 2 c + h is the half h of call c. The low half is half 0.
    """
    stacked = torch.stack(words, dim=-2)
    return torch.stack((stacked & 0xFFFF, stacked >> 16), dim=-1).flatten(-2)


def _by_rows(mask: Callable[[Tensor], Tensor], rows: Tensor, calls_per_row: int) -> Tensor:
    """Return ``mask(rows)``, on the CPU slice by slice: this is twice as fast, because int64 temporaries stay in the cache."""
    size = max(1, _CALLS_IN_CACHE // max(1, calls_per_row))
    if rows.device.type != "cpu" or len(rows) <= size:
        return mask(rows)
    return torch.cat([mask(part) for part in rows.split(size)])


def _beside(key: AnyKey, tensor: Tensor) -> Tensor:
    """Return ``tensor`` on the device of ``key``, if the key is a tensor: there the numbers are drawn."""
    return to_device(tensor, key.device) if isinstance(key, Tensor) else tensor


def keep_hidden(
    key: AnyKey, threshold: int, *, site: int, step: int, layer: int, rows: Tensor, length: int, width: int
) -> Tensor:
    """Return the keep-mask [B, L, D] (bool) of a hidden activation; ``rows`` [B] int64 are global batch rows."""
    rows, key = _beside(key, rows), RoundKeys.of(key)
    positions = torch.arange(length, device=rows.device)
    address = {"site": site, "step": step, "layer": layer, "width": width}

    def some(rows: Tensor) -> Tensor:
        return keep_hidden_at(key, threshold, **address, rows=rows[:, None], positions=positions)

    return _by_rows(some, rows, calls_per_row=length * -(-width // 64) * 8)


def keep_hidden_at(
    key: AnyKey, threshold: int, *, site: int, step: int, layer: int, rows: Tensor, positions: Tensor, width: int
) -> Tensor:
    """Return the keep-mask [..., D] (bool) at ``rows`` and ``positions``, int64 of shapes that broadcast to [...]."""
    rows, positions = _beside(key, rows), _beside(key, positions)
    groups = -(-width // 64)
    count = functools.partial(torch.arange, device=rows.device)
    c0 = count(8) | count(groups)[:, None] << 3 | site << 16
    words = philox((c0, positions[..., None, None], rows[..., None, None], step << 16 | layer), key)
    # [..., groups, 4, 16]
    return (_sixteen_bit(words) >= threshold).flatten(-3)[..., :width]


def keep_attention(key: AnyKey, threshold: int, *, step: int, layer: int, rows: Tensor, heads: int, length: int) -> Tensor:
    """Return the keep-mask [B, H, L, L] (bool) of attention probabilities, indexed (row, head, query, key)."""
    rows, key = _beside(key, rows), RoundKeys.of(key)
    quads, tiles = -(-length // 4), -(-length // 16)
    count = functools.partial(torch.arange, device=rows.device)
    c0 = count(8) | count(heads)[:, None, None, None] << 3 | SITE_ATTENTION << 16
    c1 = count(quads)[:, None, None] | count(tiles)[:, None] << 16
    c3 = step << 16 | layer

    def some(rows: Tensor) -> Tensor:
        # [R, H, quads, tiles, 4, 16]
        draws = _sixteen_bit(philox((c0, c1, rows[:, None, None, None, None], c3), key))
        keep = (draws >= threshold).transpose(3, 4).reshape(len(rows), heads, quads * 4, tiles * 16)
        return keep[:, :, :length, :length]

    return _by_rows(some, rows, calls_per_row=heads * quads * tiles * 8)


def truncated_normal(key: AnyKey, rows: Tensor, positions: Tensor, width: int, bound: float = 3.0) -> Tensor:
    """Return standard normal draws [..., D] (fp32), truncated to [-bound, bound], at the quantiles :func:`state_uniforms`."""
    return normal_of(state_uniforms(key, rows, positions, width), bound)


def state_uniforms(key: AnyKey, rows: Tensor, positions: Tensor, width: int) -> Tensor:
    """Return uniform draws [..., D] (fp64) in (0, 1), with 32 random bits each.

    ``rows`` and ``positions`` are int64 of shapes that broadcast to [...].
    """
    rows, positions = _beside(key, rows), _beside(key, positions)
    c0 = torch.arange(-(-width // 4), device=rows.device) | SITE_STATE << 16
    words = philox((c0, positions[..., None], rows[..., None], 0), key)
    return (torch.stack(words, dim=-1).flatten(-2)[..., :width].double() + 0.5) / 2**32


def normal_of(uniform: Tensor, bound: float = 3.0) -> Tensor:
    """Return standard normal numbers truncated to [-bound, bound] at the quantiles ``uniform`` (fp64), which it overwrites."""
    return exact_normal_of(uniform, bound).float()


def exact_normal_of(uniform: Tensor, bound: float = 3.0) -> Tensor:
    """Return the numbers of :func:`normal_of` before they are rounded to fp32; they overwrite ``uniform``."""
    edge = math.erf(bound / math.sqrt(2))
    return uniform.mul_(2).sub_(1).mul_(edge).erfinv_().mul_(math.sqrt(2))


@dataclass(frozen=True)
class Draw:
    """The random numbers of one forward pass: h0 and dropout masks, addressed by (key, row).

    A draw that is used twice gives the same numbers. ``rows`` [B] int64 are rows of the *global* batch.

    ``key`` is a pair of integers, or the int64 tensor [1] that :func:`seed_of` makes of it, on the device where numbers are
    drawn. A captured CUDA graph reads the tensor at every replay, so a new value in it gives new numbers.
    """

    key: Key | Tensor
    rows: Tensor

    def seed(self, device: torch.device) -> Tensor:
        """Return the key as an int64 tensor [1] on ``device``; a key that is such a tensor is returned as it is.

        Raises :class:`InputError` for any other key.
        """
        if not isinstance(self.key, Tensor):
            return seed_of(checked_key("draw.key", self.key), device)
        if self.key.is_nested or self.key.shape != (1,) or self.key.dtype != torch.int64 or self.key.is_meta:
            raise InputError(f"draw.key must be two integers or int64 [1], but got {shown(self.key)}.")
        return to_device(self.key, device)

    def generator(self) -> torch.Generator:
        """Return a generator for draws that belong to the pass as a whole, such as its depth.

        Raises :class:`InputError` if the key is a tensor, because the host may have to wait for its value.
        """
        if isinstance(self.key, Tensor):
            raise InputError("a draw whose key is a tensor has no generator: give num_steps, or a key of two integers.")
        return generator(self.key)

    def initial_state(self, rows: Tensor, positions: Tensor, width: int) -> Tensor:
        """Return standard normal draws [..., D] (fp32) at ``rows`` and ``positions`` [...], truncated to [-3, 3]."""
        return truncated_normal(self.key, rows, positions, width)

    def hidden(self, x: Tensor, p: float, *, site: int, step: int, layer: int) -> Tensor:
        """Apply dropout to a hidden activation ``x`` [B, L, D]."""
        if not (threshold := drop_threshold(p)):
            return x
        _, length, width = x.shape
        keep = keep_hidden(self.key, threshold, site=site, step=step, layer=layer, rows=self.rows, length=length, width=width)
        return apply_dropout(x, keep, threshold)

    def attention(self, probabilities: Tensor, p: float, *, step: int, layer: int) -> Tensor:
        """Apply dropout to attention ``probabilities`` [B, H, L, L]."""
        if not (threshold := drop_threshold(p)):
            return probabilities
        _, heads, length, _ = probabilities.shape
        keep = keep_attention(self.key, threshold, step=step, layer=layer, rows=self.rows, heads=heads, length=length)
        return apply_dropout(probabilities, keep, threshold)


def apply_dropout(x: Tensor, keep: Tensor, threshold: int) -> Tensor:
    """Return ``x`` times 1 / (1 - threshold / 65536) where ``keep`` is true, and 0 elsewhere."""
    return x * dropout_factor(x, keep, threshold)


def dropout_factor(x: Tensor, keep: Tensor, threshold: int) -> Tensor:
    """Return the factors of ``x`` in :func:`apply_dropout`, in its dtype and on its device."""
    return keep.to(x).mul_(1 / (1 - threshold / 65536))
