"""Random calls of the ops: valid ones, and ones with wrong arguments."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from random import Random
from typing import Any

from hypothesis import strategies as st
from torch import Tensor

from lares_fast._random import Draw
from lares_fast.reference.weights import WeightLayout
from tests.reliability.fuzzing.values import (
    FLOATS,
    SEEDS,
    SIZES,
    VIEWS,
    Example,
    Floats,
    Ints,
    damaged,
    made,
    odd_value,
    odd_version,
)

# The number of calls with wrong arguments for each valid call.
DAMAGED = 9

BACKENDS = st.sampled_from((None, None, "auto", "native", "reference"))
_WIDTHS = st.sampled_from((0, 1, 2, 3, 8, 15, 16, 17, 33, 64))
# Values whose sums are exact in every order, so that the results of two backends have the same bits.
_EXACT = ("integers", "integers", "integers", "special", "tiny", "zero", "equal")
_DTYPES = st.sampled_from(("float32",) * 6 + FLOATS)
_COUNTS = st.sampled_from((1, 2, 3, 7, 16, 40, 65, 130, 300))
_VIEWS = ("plain",) * 6 + VIEWS
_INDEX_VIEWS = ("plain", "plain", "plain", "strided", "shifted", "negative", "inference")


@dataclass(frozen=True)
class Drawn:
    """A ``Draw``."""

    key: Any
    rows: Any

    def make(self, _: str | None = None) -> Draw:
        """Return the object."""
        return Draw(made(self.key), made(self.rows))


@dataclass(frozen=True)
class Weights:
    """The weights of a recurrence."""

    adapter: str
    sizes: tuple[int, int, int]
    dtype: str = "float32"
    seed: int = 0
    change: tuple[int, Any] | None = None

    def make(self, dtype: str | None = None) -> list[Tensor]:
        """Return the list of tensors. ``change`` replaces one of them, or leaves it out."""
        shapes = WeightLayout(self.adapter, *self.sizes).shapes
        weights = []
        for at, (name, shape) in enumerate(shapes.items()):
            weight = Floats(shape, "normal", "plain", self.dtype, self.seed + at, 0.3).make(dtype)
            weights.append(weight + 1 if name.endswith("norm.weight") else weight)
        if self.change is not None:
            at, value = self.change
            if value is None:
                del weights[at % len(weights)]
            else:
                weights[at % len(weights)] = made(value, dtype)
        return weights


class Source:
    """Choices for one example. Hypothesis makes those that shape the call, and a seed that it draws makes all others."""

    def __init__(self, draw: Any) -> None:
        self.draw = draw
        self.random = Random(draw(SEEDS))

    def ids(self, count: int, first: int, end: int) -> tuple[int, ...]:
        """Return ``count`` integers in ``first`` .. ``end`` - 1."""
        return tuple(self.random.randrange(first, end) for _ in range(count)) if end > first else ()

    def offsets(self, count: int, least: int, most: int) -> tuple[int, ...]:
        """Return the offsets of ``count`` lists of ``least`` to ``most`` entries."""
        return tuple(accumulate((self.random.randint(least, most) for _ in range(count)), initial=0))

    def index(self, values: tuple[int, ...]) -> Ints:
        """Return ``values`` as a tensor in memory of any form."""
        return Ints(values, view=self.random.choice(_INDEX_VIEWS))

    def floats(self, shape: tuple[int, ...], dtype: str, fills: tuple[str, ...] = ("normal",)) -> Floats:
        """Return a tensor of this shape and dtype."""
        view, size, fill = (self.random.choice(choices) for choices in (_VIEWS, (1.0, 1.0, 0.01, 3.0), fills))
        return Floats(shape, fill, view, dtype, self.random.randrange(10**6), size)

    def options(self, **choices: tuple[Any, ...]) -> dict[str, Any]:
        """Return some of the options, each with one of its values."""
        chosen = self.draw(st.integers(0, 2 ** len(choices) - 1))
        return {name: self.random.choice(values) for at, (name, values) in enumerate(choices.items()) if chosen >> at & 1}

    def catalog(self, first: str = "query") -> dict[str, Any]:
        """Return the arguments that all ops of a catalog have."""
        dtype, fills = self.draw(_DTYPES), ("normal",) if self.random.random() < 0.25 else _EXACT
        width, count = self.draw(_WIDTHS), self.draw(_COUNTS)
        return {
            first: self.floats((self.draw(SIZES), width), dtype, fills),
            "items": self.floats((count, width), dtype, fills),
            "backend": self.draw(BACKENDS),
        }

    def exclude(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return lists of exclusions or none, and a bias or none."""
        query, items, more = arguments["query"], arguments["items"], {}
        kind = self.draw(st.integers(0, 3))
        if kind & 1:
            offsets = self.offsets(query.shape[0], 0, self.random.choice((2, 2, items.shape[0])))
            more["exclude"] = (self.index(offsets), self.index(self.ids(offsets[-1], 0, items.shape[0])))
        if kind & 2:
            more["bias"] = self.floats(items.shape[:1], items.dtype, _EXACT)
        return more

    def dropout(self, batch: int, *names: str) -> dict[str, Any]:
        """Return a draw and the rates ``names``, or nothing."""
        if self.draw(st.booleans()):
            return {}
        return {"draw": self.drawn(batch), **{name: self.random.choice((0, 0.0, 1e-9, 0.1, 0.5, 0.9)) for name in names}}

    def drawn(self, batch: int) -> Drawn:
        """Return a ``Draw`` for ``batch`` sequences."""
        key = self.random.choice(((0, 0), (1, 2), (2**32 - 1, 2**32 - 1), Ints((2**62 + 5,)), Ints((-7,))))
        return Drawn(key, Ints(self.ids(batch, 0, 1000)))


@st.composite
def topk(draw: Any) -> Example:
    """Return a call of ``topk``, in one of five cases with an index."""
    source = Source(draw)
    arguments = source.catalog()
    arguments |= source.exclude(arguments)
    arguments["k"] = source.random.randint(1, arguments["items"].shape[0])
    notes = {}
    if draw(st.integers(0, 4)) == 0:
        arguments = {name: replace(x, dtype="float32") if isinstance(x, Floats) else x for name, x in arguments.items()}
        arguments["items"] = replace(arguments["items"], view="plain")
        # An empty table has no values that could change.
        notes["index"] = draw(st.sampled_from(("own", "own", "other", "stale"))) if arguments["items"].shape[1] else "own"
    right = notes.get("index", "own") == "own"
    return Example("topk", arguments, right=right, refused=not right, notes=notes)


@st.composite
def target_rank(draw: Any) -> Example:
    """Return a call of ``target_rank`` or ``target_ranks``."""
    source = Source(draw)
    arguments = source.catalog()
    arguments |= source.exclude(arguments)
    query, items = arguments["query"], arguments["items"]
    arguments["target"] = source.index(source.ids(query.shape[0], 0, items.shape[0]))
    arguments |= source.options(ties=("order", "strict"))
    both = "exclude" in arguments and draw(st.booleans())
    return Example("target_ranks" if both else "target_rank", arguments, right=True)


@st.composite
def softmax(draw: Any) -> Example:
    """Return a call of ``linear_cross_entropy``, ``target_logprob`` or ``target_logprob_and_rank``."""
    source = Source(draw)
    name = draw(st.sampled_from(("linear_cross_entropy", "target_logprob", "target_logprob_and_rank")))
    arguments = source.catalog("hidden")
    fills = ("normal", "normal", "normal", "integers", "special", "tiny", "zero", "equal")
    # With equal items the exact gradient of hidden is 0, and the computed one is a rounding error.
    hidden, items = (
        replace(arguments[name], fill=source.random.choice(fills[:n])) for name, n in (("hidden", 8), ("items", 7))
    )
    arguments |= source.options(scale=(1.0, 0.5, 7, 0.01), skip_pad=(True, False))
    if draw(st.integers(0, 9)) == 0:
        arguments["bf16"] = True
    form, (rows, width) = draw(st.integers(0, 3)), hidden.shape
    if form == 0:
        groups = source.random.choice((0, 1, 2, 3))
        hidden = replace(hidden, shape=(groups, rows, width))
        items = replace(items, shape=(*((groups,) if draw(st.booleans()) else ()), *items.shape))
    elif form == 1:
        hidden = replace(hidden, shape=source.random.choice(((width,), (1, 1, rows, width), (rows, 1, width))))
    if arguments.get("skip_pad") and items.shape[-2] < 2:
        items = replace(items, shape=(*items.shape[:-2], 2, items.shape[-1]))
    shape = hidden.shape[:-1]
    count = math.prod(shape)
    ids = source.ids(count, int(bool(arguments.get("skip_pad"))), items.shape[-2])
    target = source.index(ids) if len(shape) == 1 else Ints(ids, shape)
    arguments |= {"hidden": hidden, "items": items, "target": target}
    if name == "linear_cross_entropy":
        arguments |= source.options(reduction=("none", "mean", "sum"))
    if name == "target_logprob_and_rank":
        arguments |= source.options(ties=("order", "strict"), ranked=range(count + 1))
    return Example(name, arguments, right=True)


@st.composite
def attention(draw: Any) -> Example:
    """Return a call of ``attention``."""
    source = Source(draw)
    offsets = source.offsets(draw(st.integers(0, 5)), 0, source.random.choice((1, 5, 20)))
    shape = (offsets[-1], draw(st.sampled_from((1, 2, 3))), draw(st.sampled_from((1, 2, 8, 16, 17))))
    dtype, fills = draw(_DTYPES), ("normal", "normal", "normal", "integers", "zero", "special", "huge")
    longest = max([1, *(b - a for a, b in pairwise(offsets))]) + source.random.choice((0, 0, 5, 2**20))
    arguments = {name: source.floats(shape, dtype, fills) for name in ("query", "key", "value")}
    arguments |= {"offsets": source.index(offsets), "longest": longest, **source.dropout(len(offsets) - 1, "dropout")}
    arguments |= source.options(step=(0, 1, 65535), layer=(0, 7, 65535))
    arguments["backend"] = draw(st.sampled_from((None, "auto", "reference")))
    return Example("attention", arguments, right=True)


@st.composite
def embedding(draw: Any) -> Example:
    """Return a call of ``embedding``."""
    source = Source(draw)
    offsets = source.offsets(draw(st.integers(0, 5)), 0, 6)
    count, width, dtype = draw(st.sampled_from((2, 3, 40))), draw(st.sampled_from((1, 2, 16, 17, 64, 65))), draw(_DTYPES)
    fills = ("normal", "normal", "normal", "integers", "special", "equal")
    shapes = {"item_table": (count, width), "position_table": (source.random.randint(6, 9), width)}
    shapes |= {"weight": (width,), "bias": (width,)}
    arguments = {name: source.floats(shape, dtype, fills) for name, shape in shapes.items()}
    arguments |= {"items": source.index(source.ids(offsets[-1], 1, count)), "offsets": source.index(offsets)}
    arguments |= source.dropout(len(offsets) - 1, "dropout") | source.options(eps=(1e-12, 1e-5, 1))
    return Example("embedding", arguments | {"backend": draw(BACKENDS)}, right=True)


@st.composite
def initial_state(draw: Any) -> Example:
    """Return a call of ``initial_state``."""
    source = Source(draw)
    offsets = source.offsets(draw(st.integers(0, 5)), 0, 6)
    arguments = {
        "draw": source.drawn(len(offsets) - 1),
        "offsets": source.index(offsets),
        "n_tokens": offsets[-1] + source.random.choice((0, 0, 1, 9)),
        "width": draw(st.sampled_from((1, 2, 3, 4, 5, 16, 63, 257))),
        "backend": draw(BACKENDS),
    }
    return Example("initial_state", arguments | source.options(std=(0, 1, 0.5, -2.0, 1e30)), right=True)


@st.composite
def recurrence(draw: Any) -> Example:
    """Return a call of ``recurrence``."""
    source = Source(draw)
    offsets = source.offsets(draw(st.integers(0, 4)), 1, source.random.choice((1, 4, 9)))
    batch, width, dtype = len(offsets) - 1, draw(st.sampled_from((1, 2, 6, 16, 16, 32))), draw(_DTYPES)
    adapter = draw(st.sampled_from(("none", "add", "concat", "linear")))
    sizes = (width, draw(st.sampled_from((1, 3, 16, 16, 32))), draw(st.sampled_from((1, 1, 2))))
    arguments: dict[str, Any] = {
        "h": source.floats((offsets[-1], width), dtype),
        "offsets": source.index(offsets),
        "weights": Weights(adapter, sizes, dtype, source.random.randrange(10**6)),
        "n_heads": source.random.choice([n for n in (1, 2, 3) if width % n == 0]),
        "output": draw(st.sampled_from(("last", "steps", "tokens"))),
        "backend": draw(st.sampled_from((None, "auto", "native", "layers", "reference"))),
    }
    if adapter != "none":
        arguments |= {"pre": source.floats((offsets[-1], width), dtype), "adapter": adapter}
    arguments["depth"] = draw(st.integers(1, 3)) if draw(st.booleans()) else Ints(source.ids(batch, 1, 4))
    arguments |= source.dropout(batch, "dropout", "attention_dropout")
    arguments |= source.options(longest=(9,), deepest=(3,), eps=(1e-12, 1e-5))
    return Example("recurrence", arguments, right=True)


@st.composite
def pack(draw: Any) -> Example:
    """Return a call of ``pack``."""
    source = Source(draw)
    log = source.ids(draw(st.integers(1, 30)), 0, 100)
    offsets = source.offsets(draw(st.integers(1, 5)), 1, 5)
    starts = source.ids(len(offsets) - 1, 0, len(log) + 3)
    arguments = {"log": Ints(log, dtype="int32"), "starts": Ints(starts), "offsets": Ints(offsets), "n_tokens": offsets[-1]}
    return Example("pack", arguments | {"n_targets": source.random.randint(0, len(starts))}, right=True)


@st.composite
def catalog_index(draw: Any) -> Example:
    """Return a call of ``CatalogIndex``."""
    source = Source(draw)
    shape = (draw(st.sampled_from((0, 1, 7, 130))), draw(_WIDTHS))
    return Example("CatalogIndex", {"items": source.floats(shape, draw(_DTYPES), _EXACT)})


OPS: dict[str, Any] = {
    "topk": topk(),
    "target_rank": target_rank(),
    "softmax": softmax(),
    "attention": attention(),
    "embedding": embedding(),
    "initial_state": initial_state(),
    "recurrence": recurrence(),
    "pack": pack(),
    "CatalogIndex": catalog_index(),
}


def _inner_damage(example: Example, random: Random) -> Example:
    """Return ``example`` with a part of a group changed: a member of ``draw`` or ``exclude``, or one of the weights."""
    names = ("draw", "weights", "exclude")
    groups = [name for name in names if isinstance(example.arguments.get(name), Drawn | Weights | tuple)]
    if not groups:
        return damaged(example, random)
    name = random.choice(groups)
    value = example.arguments[name]
    new, odd = odd_value(random)
    if isinstance(value, Weights):
        changed: Any = replace(value, change=(random.randrange(40), new))
        odd = odd and new is not None
    elif isinstance(value, Drawn):
        part = random.choice(("key", "rows"))
        if part == "rows" and random.random() < 0.5:
            new, odd = odd_version(value.rows, random), False
        changed = replace(value, **{part: new})
        # The key of a draw is not read if nothing is dropped.
        odd = odd and part == "rows"
    else:
        at = random.randrange(2)
        if random.random() < 0.5:
            new, odd = odd_version(value[at], random), False
        changed = (*value[:at], new, *value[at + 1 :])
    return replace(example, arguments={**example.arguments, name: changed}, wrong=(name,), refused=odd, right=False)


@st.composite
def calls(draw: Any, valid: Any) -> list[Example]:
    """Return a call that the strategy ``valid`` makes, and ``DAMAGED`` versions of it."""
    example = draw(valid)
    random = Random(draw(SEEDS))
    if example.refused:
        return [example]
    return [example, *((_inner_damage if i == 0 else damaged)(example, random) for i in range(DAMAGED))]
