"""The layout of a recurrence's weights agrees with its modules."""

import pytest
import torch
from safetensors.torch import load_model, save_model

from lares_fast import LARES, LARESConfig
from lares_fast.reference.backbone import build_block
from lares_fast.reference.recurrence import Recurrence
from lares_fast.reference.weights import WeightLayout

ADAPTERS = ["none", "add", "concat", "linear"]


def module_of(adapter, **changes):
    config = {"n_items": 2, "hidden_size": 16, "n_heads": 2, "inner_size": 48, "n_core_layers": 2, **changes}
    config = LARESConfig(**config, **({} if adapter == "none" else {"adapter": adapter}))
    return build_block(config, 2) if adapter == "none" else Recurrence(config)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_names_and_shapes_are_those_of_the_modules(adapter):
    module = module_of(adapter)
    layout = WeightLayout.of(list(module.parameters()), adapter, 16)
    found = [(name.removeprefix("core."), tuple(x.shape)) for name, x in module.named_parameters()]
    assert found == list(layout.shapes.items())
    assert (layout.inner_size, layout.n_layers) == (48, 2)
    assert WeightLayout.guess_adapter(list(module.parameters())) == adapter


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_flat_tensor_is_cut_into_the_weights(adapter):
    weights = [torch.randn_like(x).requires_grad_() for x in module_of(adapter).parameters()]
    layout = WeightLayout.of(weights, adapter, 16)
    flat = layout.flatten(weights)
    assert len(flat) == layout.size == sum(x.numel() for x in weights)
    for weight, place, part in zip(weights, layout.places, layout.cut(flat).values(), strict=True):
        assert torch.equal(part, weight)
        assert torch.equal(flat[place : place + weight.numel()], weight.flatten())
    upstream = torch.randn_like(flat)
    grads = torch.autograd.grad(flat, weights, upstream)
    assert all(map(torch.equal, grads, layout.cut(upstream).values()))


def test_every_parameter_has_memory_of_its_own(tmp_path):
    """``save_model`` of safetensors, and other code that stores models, rejects parameters that share memory."""
    model = LARES(LARESConfig(n_items=9, hidden_size=16, n_heads=2, inner_size=48))
    assert len({x.untyped_storage().data_ptr() for x in model.parameters()}) == len(list(model.parameters()))
    save_model(model, str(tmp_path / "model.safetensors"))
    other = LARES(model.config)
    load_model(other, tmp_path / "model.safetensors")
    assert all(map(torch.equal, other.parameters(), model.parameters()))
