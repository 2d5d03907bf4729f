"""Random calls of the model, of the recommender, of the configuration and of the functions that make batches."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import fields
from random import Random
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from lares_fast import LARES, LARESConfig, reference
from lares_fast.config import ADAPTERS, DEPTH_SAMPLINGS, SIMILARITIES, STATE_INITS
from lares_fast.data import epoch_order, leave_one_out, log_from_sequences, make_batch
from lares_fast.serve import Recommender
from tests.reliability.fuzzing.op_examples import Source
from tests.reliability.fuzzing.values import SEEDS, Example, Floats, Ints

ITEMS, WIDTH, LONGEST = 23, 16, 10


@functools.cache
def model(backend: str | None, dtype: str, similarity: str = "dot") -> reference.LARES:
    """Return a model with fixed weights. ``reference`` gives the model of the package's reference."""
    torch.manual_seed(1)
    config = LARESConfig.preset("tiny", n_items=ITEMS, similarity=similarity, initializer_range=0.2)
    weights = reference.LARES(config)
    made = reference.LARES(config) if backend == "reference" else LARES(config, backend=backend)
    made.load_state_dict(weights.state_dict())
    return made.eval().to(getattr(torch, dtype))


def _of_model(method: str) -> Callable[..., Any]:
    def call(backend: str | None, dtype: str = "float32", **arguments: Any) -> Tensor:
        with torch.no_grad():
            found: Tensor = getattr(model(backend, dtype), method)(**arguments)
            return found

    return call


def _recommend(backend: str | None, dtype: str = "float32", **arguments: Any) -> tuple[Tensor, Tensor]:
    if backend != "reference":
        return model(backend, dtype).recommend(**arguments)
    ours = model(backend, dtype)
    with torch.no_grad():
        k, exclude = arguments.pop("k"), arguments.pop("exclude", None)
        queries = ours.queries(ours.encode(**arguments))
        shifted = None if exclude is None else (exclude[0], exclude[1] - 1)
        scores, rows = reference.topk(queries, ours.item_table()[1:], k, exclude=shifted)
    return scores, torch.where(rows < 0, rows, rows + 1)


@functools.cache
def _recommender(backend: str | None) -> Recommender:
    return Recommender(LARES(model("reference", "float32").config, backend=backend), list(range(ITEMS)))


def _serve(method: str) -> Callable[..., Any]:
    def call(backend: str | None, dtype: str = "float32", **arguments: Any) -> Any:
        recommender = _recommender(backend)
        recommender.model.load_state_dict(model("reference", "float32").state_dict())
        found = getattr(recommender, method)(**arguments)
        if method == "recommend":
            ids = [[*map(int, row), *[-1] * (arguments["k"] - len(row))] for row in found.ids]
            return found.scores, torch.tensor(ids, dtype=torch.int64), torch.tensor([found.unknown, *found.empty])
        return torch.tensor(found) if isinstance(found, bool) else found

    return call


@functools.cache
def _log() -> Any:
    return log_from_sequences({user: [1 + user * at % 7 for at in range(1, 9)] for user in range(1, 6)})


def _batch(index: Any, max_len: Any) -> Tensor:
    batch = make_batch(_log(), leave_one_out(_log()).train, index, max_len)
    return torch.cat((batch.items, batch.offsets, batch.target))


def _order(n_rows: Any, key: Any) -> Tensor:
    return epoch_order(n_rows, key)


def _config(**values: Any) -> Tensor:
    config = LARESConfig.from_dict(values)
    for name, value in values.items():
        found = getattr(config, name)
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.item()
        assert found == value or (isinstance(found, float) and abs(found - value) <= 1e-6 * abs(found)), name
    return torch.zeros(0)


MODEL_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "encode": _of_model("encode"),
    "forward": _of_model("forward"),
    "trajectories": _of_model("trajectories"),
    "recommend": _recommend,
    "Recommender.recommend": _serve("recommend"),
    "Recommender.encode": _serve("encode"),
    "Recommender.knows": _serve("knows"),
    "make_batch": _batch,
    "epoch_order": _order,
    "LARESConfig": _config,
}


@st.composite
def encode(draw: Any) -> Example:
    """Return a call of ``encode``, ``forward``, ``trajectories`` or ``recommend``."""
    source = Source(draw)
    name = draw(st.sampled_from(("encode", "forward", "trajectories", "recommend")))
    lengths = [source.random.randint(1, LONGEST) for _ in range(draw(st.integers(0, 4)))]
    lists = [source.ids(length, 1, ITEMS) for length in lengths]
    flat = tuple(item for items in lists for item in items)
    width = max([1, *lengths])
    arguments: dict[str, Any] = {"backend": draw(st.sampled_from((None, "native", "layers")))}
    if draw(st.booleans()):
        arguments |= {"item_seq": source.index(flat), "item_seq_len": source.index(_sums(lengths))}
        shape: tuple[int, ...] = (len(flat), WIDTH)
    else:
        padded = tuple(items[at] if at < len(items) else 0 for items in lists for at in range(width))
        arguments |= {"item_seq": Ints(padded, (len(lists), width)), "item_seq_len": source.index(tuple(lengths))}
        shape = (len(lists), width, WIDTH)
    if name == "trajectories":
        passes = draw(st.integers(1, 2))
        arguments["num_steps"] = Ints(source.ids(passes * len(lists), 1, 4), (passes, len(lists)))
        arguments |= source.options(deepest=(3,))
        shape = (passes * shape[0], *shape[1:])
    elif draw(st.booleans()):
        arguments["num_steps"] = source.random.choice((1, 2, 3, Ints(source.ids(len(lists), 1, 4))))
    if name != "forward" and draw(st.booleans()):
        arguments["state"] = Floats(shape, "normal", "plain", "float32", source.random.randrange(10**6))
    if name == "encode":
        arguments |= source.options(return_all_steps=(True, False))
    if name == "recommend":
        arguments["k"] = source.random.randint(1, ITEMS - 1)
        if draw(st.booleans()):
            arguments["exclude"] = (Ints(_sums([2] * len(lists))), Ints(source.ids(2 * len(lists), 1, ITEMS)))
    return Example(name, arguments, right=True, notes={"fixed": ("backend",)})


def _sums(lengths: list[int]) -> tuple[int, ...]:
    return tuple(sum(lengths[:at]) for at in range(len(lengths) + 1))


@st.composite
def serve(draw: Any) -> Example:
    """Return a call of the recommender."""
    source = Source(draw)
    name = draw(st.sampled_from(("recommend", "recommend", "encode", "knows")))
    notes = {"fixed": ("backend",), "loose": ("histories", "item")}
    if name == "knows":
        item = source.random.choice((1, "2", 3.0, 99, "x", Ints((4,), ())))
        return Example("Recommender.knows", {"item": item, "backend": None}, right=True, notes=notes)
    kinds = (list, tuple, lambda ids: list(map(str, ids)), source.index, lambda ids: [*ids, 77, "unknown"])
    histories = [
        source.random.choice(kinds)(source.ids(source.random.randint(1, 14), 1, ITEMS)) for _ in range(draw(st.integers(0, 4)))
    ]
    arguments: dict[str, Any] = {"histories": histories, "backend": None}
    arguments |= source.options(num_steps=(1, 2), batch_size=(1, 2, 256))
    if name == "recommend":
        arguments["k"] = source.random.randint(1, ITEMS - 1)
        arguments |= source.options(exclude_seen=(True, False))
    return Example(f"Recommender.{name}", arguments, right=True, notes=notes)


@st.composite
def batches(draw: Any) -> Example:
    """Return a call of ``make_batch`` or ``epoch_order``."""
    source = Source(draw)
    if draw(st.booleans()):
        return Example("epoch_order", {"n_rows": draw(st.integers(1, 50)), "key": (1, 2)}, right=True)
    index = source.index(source.ids(draw(st.integers(0, 6)), 0, 20))
    return Example("make_batch", {"index": index, "max_len": draw(st.integers(1, 12))}, right=True)


_FIELDS: dict[str, tuple[Any, ...]] = {
    "int": (1, 2, 4, 64),
    "float": (0.5, 0.25, 1e-3),
    "bool": (True, False),
    "adapter": ADAPTERS,
    "depth_sampling": DEPTH_SAMPLINGS,
    "state_init": STATE_INITS,
    "similarity": SIMILARITIES,
}


@st.composite
def configurations(draw: Any) -> Example:
    """Return a call of ``LARESConfig.from_dict``."""
    random = Random(draw(SEEDS))
    values: dict[str, Any] = {"n_items": random.choice((2, 50))}
    for each in fields(LARESConfig):
        kind = str(each.type).split(" | ")[0]
        choices = _FIELDS.get(each.name) or _FIELDS.get(kind)
        if choices and each.name != "n_items" and random.random() < 0.4:
            values[each.name] = random.choice(choices)
    values["hidden_size"] = 64
    return Example("LARESConfig", values, right=True)


MODELS: dict[str, Any] = {"model": encode(), "recommender": serve(), "batches": batches(), "configuration": configurations()}
