"""Wrong values of every kind for arguments of the native module."""

from __future__ import annotations

import random
from typing import Any

# The errors with which the module refuses a call. MemoryError and OverflowError are for a list of an impossible length.
# OSError is the error of an object of the caller itself.
REFUSED = (TypeError, ValueError, MemoryError, OverflowError, OSError)


class Odd:
    """An object whose conversions to numbers fail or lie."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __index__(self) -> int:
        if isinstance(self.value, Exception):
            raise self.value
        return self.value  # type: ignore[no-any-return]

    __int__ = __len__ = __bool__ = __index__

    def __float__(self) -> float:
        return float(self.__index__())

    def __getitem__(self, place: int) -> int:
        return self.__index__()


# Numbers that no size, address or id may have: all are outside of the limits of the native code.
NUMBERS = [-1, -2, -(2**31), -(2**62), -(2**63), 2**61 + 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**400, -(10**400)]


SIZES = {"B", "N", "D", "M", "P", "H", "L", "k", "width", "inner_size", "n_layers", "batch"}


def wrong_number(rng: random.Random) -> int:
    """Return an int64 that is no id, row or position."""
    return rng.choice([-1, -(2**31), -(2**63), 2**33, 2**62, 2**63 - 1])


def wrong_type(rng: random.Random) -> Any:
    """Return an object that is nearly certainly of a wrong type."""
    return rng.choice([
        None, "", "3", "\ud800", "a" * 10_000, b"3", bytearray(8), 3.5, float("nan"), float("inf"), 3j, (), [], {}, set(),
        object(), Ellipsis, int, len, lambda: 3, range(2**62), Odd("x"), Odd(-1), Odd(2**200), Odd(OSError("no")), Odd(None),
        [None], ["1", "2"], (1, 2, 3), [2**70] * 2, [[1, 2]], iter([1, 2]), memoryview(b"12"),
    ])  # fmt: skip


def hostile(rng: random.Random, arguments: dict[str, Any]) -> None:
    """Spoil one to three of ``arguments`` in place, or leave one out, or add one."""
    for name in rng.sample(list(arguments), min(len(arguments), rng.randint(1, 3))) or [""]:
        kind = rng.random()
        if kind < 0.08 or not name:
            other = rng.choice(["seed", "", "B ", "\ud800", "x" * 1000, "query", "N", "name"])
            # An argument that is there is spoilt once only.
            arguments.setdefault(other, rng.choice([0, wrong_type(rng)]))
        elif kind < 0.16:
            del arguments[name]
        elif kind < 0.45:
            arguments[name] = wrong_type(rng)
        else:
            arguments[name] = spoilt(rng, name, arguments[name])


def spoilt(rng: random.Random, name: str, value: Any) -> Any:
    """Return a wrong value, or a smaller one, for the argument ``name`` whose value is ``value``."""
    if isinstance(value, bool):
        return rng.choice([0, 1, 2, "yes", None, not value] if name != "bf16" else [2, "yes", None])
    if isinstance(value, float):
        return rng.choice([0, -1, 1, 1e308, -1e308, 5e-324, float("nan"), float("inf")])
    if isinstance(value, str):
        return rng.choice(["", "Last", "last", "steps", "tokens", "none", "add", "concat\0", "é" * 100, "x" * 100_000])
    if isinstance(value, tuple | list):
        return spoilt_list(rng, list(value), addresses="weight" in name)
    if name == "threads":
        return rng.choice([0, -1, -(2**63), 2**62, 2**63 - 1, 2**63, 5])
    if name in {"first_step", "hidden_threshold", "attention_threshold", "threshold", "step", "layer", "site", "n_heads"}:
        return rng.choice([*NUMBERS, 0, 65534, 65535, 65536, 2**32 - 1, 3])
    if name not in SIZES:
        # Only null among the addresses can be noticed.
        return rng.choice([0, 0, 0, -1, -(2**63), 2**64, 2**70])
    # A smaller size stays within the memory.
    return rng.choice(NUMBERS) if value <= 0 or rng.random() < 0.6 else rng.randrange(value)


def spoilt_list(rng: random.Random, values: list[Any], *, addresses: bool) -> Any:
    """Return ``values`` with another length, a null address, or a number out of range or, among addresses, of a wrong type."""
    if not values:
        return rng.choice([[0], None, [None]])
    place = rng.randrange(len(values))
    kind = rng.randrange(6)
    if kind == 0:
        return [*values[:place], *values[place + 1 :]]
    if kind == 1:
        return [*values, values[place]]
    if kind == 2:
        return [0] * rng.choice([0, 1, 70_000])
    if kind == 3:
        return Odd(2**62)
    wrong = [None, "1", 1.5, -1, 2**64, *([] if addresses else NUMBERS)]
    values[place] = 0 if kind == 4 else rng.choice(wrong)
    return values
