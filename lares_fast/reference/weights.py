"""The weights of a recurrence: their names and shapes, and their order in one flat tensor."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from lares_fast._errors import InputError

# Name -> shape. D is the width, E is 2 D, and I is the inner size. The order is the order of the modules' parameters.
_LAYER = {
    "attention.query.weight": "DD", "attention.query.bias": "D",
    "attention.key.weight": "DD", "attention.key.bias": "D",
    "attention.value.weight": "DD", "attention.value.bias": "D",
    "attention.output.weight": "DD", "attention.output.bias": "D",
    "attention.norm.weight": "D", "attention.norm.bias": "D",
    "feed_forward.up.weight": "ID", "feed_forward.up.bias": "I",
    "feed_forward.down.weight": "DI", "feed_forward.down.bias": "D",
    "feed_forward.norm.weight": "D", "feed_forward.norm.bias": "D",
}  # fmt: skip
_NORM = {"norm.weight": "D", "norm.bias": "D"}
# Adapter -> the weights before the layers. ``none`` is a block without an adapter.
_AHEAD = {
    "none": {},
    "add": _NORM,
    "concat": {"adapter.linear.weight": "DE", "adapter.linear.bias": "D", **_NORM},
    "linear": {"adapter.gate": "", **_NORM},
}
# A layer's weights in the flat tensor: for each half first the matrices, then the biases, then the norm.
_FLAT_LAYER = sorted(_LAYER, key=lambda name: (name.startswith("feed"), ".norm." in name, name.endswith("bias")))


@dataclass(frozen=True)
class WeightLayout:
    """Names, shapes and places of the weights of ``n_layers`` layers, with the adapter and its norm.

    The flat tensor holds the layers, then the norm, then the adapter. The Triton kernels read it in this order, and parts that
    begin at a multiple of 16 bytes stand before the gate of ``linear``, which is a single number.
    """

    adapter: str
    width: int
    inner_size: int
    n_layers: int

    @classmethod
    def of(cls, weights: Sequence[Tensor], adapter: str, width: int) -> WeightLayout:
        """Return the layout of ``weights``; raise :class:`InputError` if their number does not fit the adapter."""
        if adapter not in _AHEAD:
            raise InputError(
                f"adapter must be one of {', '.join(name for name in _AHEAD if name != 'none')}, but got {adapter!r}."
            )
        ahead = len(_AHEAD[adapter])
        n_layers, rest = divmod(len(weights) - ahead, len(_LAYER))
        if n_layers < 1 or rest:
            raise InputError(
                f"weights must be the {ahead} of the adapter and its norm and {len(_LAYER)} of each layer, "
                f"but there are {len(weights)}."
            )
        up = weights[ahead + list(_LAYER).index("feed_forward.up.weight")]
        return cls(adapter, width, up.shape[0] if up.dim() else 0, n_layers)

    @staticmethod
    def guess_adapter(weights: Sequence[Tensor]) -> str:
        """Return the adapter of ``weights``; its weights and the weights of its norm give it away by their number."""
        counts = {len(names): adapter for adapter, names in _AHEAD.items()}
        return counts.get(len(weights) % len(_LAYER), "none")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each weight by name, in the order of the modules' parameters."""
        sizes = {"D": self.width, "E": 2 * self.width, "I": self.inner_size}
        letters = [*_AHEAD[self.adapter].items()]
        letters += [(f"layers.{layer}.{name}", shape) for layer in range(self.n_layers) for name, shape in _LAYER.items()]
        return {name: tuple(sizes[letter] for letter in shape) for name, shape in letters}

    def flat_order(self) -> list[str]:
        """Return the names in the order of the flat tensor."""
        layers = [f"layers.{layer}.{name}" for layer in range(self.n_layers) for name in _FLAT_LAYER]
        return [*layers, *sorted(_AHEAD[self.adapter], key=lambda name: name.startswith("adapter"))]

    def flatten(self, weights: Sequence[Tensor]) -> Tensor:
        """Return all ``weights``, which stand in the order of the modules' parameters, as one flat tensor."""
        named = dict(zip(self.shapes(), weights, strict=True))
        return torch.cat([named[name].reshape(-1) for name in self.flat_order()])

    def cut(self, flat: Tensor) -> dict[str, Tensor]:
        """Return views of ``flat``, the result of :meth:`flatten`, by name in the order of the modules' parameters."""
        shapes = self.shapes()
        order = self.flat_order()
        parts = dict(zip(order, flat.split([prod(shapes[name]) for name in order]), strict=True))
        return {name: parts[name].view(shape) for name, shape in shapes.items()}

    def places(self) -> tuple[int, ...]:
        """Return where each weight begins in the flat tensor, in the order of the modules' parameters."""
        return _places(self)


@functools.lru_cache
def _places(layout: WeightLayout) -> tuple[int, ...]:
    shapes, places, place = layout.shapes(), {}, 0
    for name in layout.flat_order():
        places[name] = place
        place += prod(shapes[name])
    return tuple(places[name] for name in shapes)
