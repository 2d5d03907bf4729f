"""The weights of a recurrence or block: their names, their shapes, and their order in one flat tensor."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

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
_UP = list(_LAYER).index("feed_forward.up.weight")
# A layer's weights in the flat tensor: for each half first the matrices, then the biases, then the norm.
_FLAT_LAYER = sorted(_LAYER, key=lambda name: (name.startswith("feed"), ".norm." in name, name.endswith("bias")))


class WeightLayout:
    """The names, shapes and places of the weights of ``n_layers`` layers, with the adapter and its norm.

    Lists are in the order of the modules' parameters. The flat tensor holds the layers, then the norm, then the adapter. This
    is the order in which the Triton kernels read it. The gate of ``linear`` comes last, because it is a single number. So all
    other parts begin at a multiple of 16 bytes for the sizes that kernels take.
    """

    def __init__(self, adapter: str, width: int, inner_size: int, n_layers: int) -> None:
        self.adapter = adapter
        self.width = width
        self.inner_size = inner_size
        self.n_layers = n_layers
        sizes = {"D": width, "E": 2 * width, "I": inner_size}
        letters = [*_AHEAD[adapter].items()]
        letters += [(f"layers.{layer}.{name}", shape) for layer in range(n_layers) for name, shape in _LAYER.items()]
        # The shape of each weight by name.
        self.shapes = {name: tuple([sizes[letter] for letter in shape]) for name, shape in letters}
        flat = [f"layers.{layer}.{name}" for layer in range(n_layers) for name in _FLAT_LAYER]
        flat += sorted(_AHEAD[adapter], key=lambda name: name.startswith("adapter"))
        numbers = {name: i for i, name in enumerate(self.shapes)}
        # The positions of the weights, in the order of the flat tensor.
        self.order = [numbers[name] for name in flat]
        begin, end = {}, 0
        for name in flat:
            begin[name] = end
            end += prod(self.shapes[name])
        # The place in the flat tensor where each weight begins, and the number of elements of the flat tensor.
        self.places = [begin[name] for name in self.shapes]
        self.size = end

    @staticmethod
    def of(weights: Sequence[Tensor], adapter: str, width: int) -> WeightLayout:
        """Return the layout of ``weights``. Raises :class:`InputError` if their number does not fit the adapter."""
        if adapter not in _AHEAD:
            raise InputError(f"adapter must be one of {', '.join(_AHEAD)}, but got {adapter!r}.")
        ahead = len(_AHEAD[adapter])
        n_layers, rest = divmod(len(weights) - ahead, len(_LAYER))
        if n_layers < 1 or rest:
            raise InputError(
                f"weights must have {ahead} tensors of the adapter and its norm and {len(_LAYER)} tensors of each layer, "
                f"but there are {len(weights)} tensors."
            )
        up = weights[ahead + _UP]
        return layout_of(adapter, width, up.shape[0] if up.dim() else 0, n_layers)

    @staticmethod
    def guess_adapter(weights: Sequence[Tensor]) -> str:
        """Return the adapter of ``weights``, which follows from their number."""
        counts = {len(names): adapter for adapter, names in _AHEAD.items()}
        return counts.get(len(weights) % len(_LAYER), "none")

    def flatten(self, weights: Sequence[Tensor]) -> Tensor:
        """Return all ``weights`` as one flat tensor. Gradients of the flat tensor reach every weight."""
        flat: Tensor = _flatten_dense_tensors([weights[i] for i in self.order])
        return flat

    def cut(self, flat: Tensor) -> dict[str, Tensor]:
        """Return views of ``flat``, the result of :meth:`flatten`, by name."""
        shapes = list(self.shapes.values())
        parts = dict(zip(self.order, flat.split([prod(shapes[i]) for i in self.order]), strict=True))
        return {name: parts[i].view(shapes[i]) for i, name in enumerate(self.shapes)}


def layout_of(adapter: str, width: int, inner_size: int, n_layers: int) -> WeightLayout:
    """Return the layout of these sizes, kept from an earlier call unless a compiler traces. A call needs its layout twice."""
    if torch.compiler.is_compiling():
        return WeightLayout(adapter, width, inner_size, n_layers)
    return _kept_layout(adapter, width, inner_size, n_layers)


_kept_layout = functools.lru_cache(WeightLayout)
