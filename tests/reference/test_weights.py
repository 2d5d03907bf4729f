"""The layout of a recurrence's weights agrees with its modules, and modules keep their parameters in one piece of memory."""

import copy

import pytest
import torch
from torch import nn

from lares_fast import LARESConfig
from lares_fast.reference.backbone import build_block
from lares_fast.reference.recurrence import Recurrence
from lares_fast.reference.weights import WeightLayout

ADAPTERS = ["none", "add", "concat", "linear"]


def module_of(adapter, **changes):
    config = {"n_items": 2, "hidden_size": 16, "n_heads": 2, "inner_size": 48, "n_core_layers": 2, **changes}
    config = LARESConfig(**config, **({} if adapter == "none" else {"adapter": adapter}))
    return build_block(config, 2) if adapter == "none" else Recurrence(config)


def in_one_piece(module, adapter):
    """Return whether the flat tensor of the parameters is a view of them."""
    parameters = list(module.parameters())
    flat = WeightLayout.of(parameters, adapter, 16).flatten_detached(parameters)
    memory = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    return memory == {flat.untyped_storage().data_ptr()}


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


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_modules_keep_their_parameters_in_one_piece(adapter):
    module = module_of(adapter)
    before = [x.clone() for x in module.parameters()]
    objects = [id(x) for x in module.parameters()]
    assert in_one_piece(module, adapter)
    module.double()
    assert in_one_piece(module, adapter)
    assert [id(x) for x in module.parameters()] == objects
    assert all(torch.equal(x, y.double()) for x, y in zip(module.parameters(), before, strict=True))
    module.load_state_dict({name: x + 1 for name, x in module.state_dict().items()})
    assert in_one_piece(module, adapter)
    assert all(torch.equal(x, y.double() + 1) for x, y in zip(module.parameters(), before, strict=True))


def test_weights_in_another_order_in_memory_are_copied():
    module = module_of("add")
    scattered = copy.deepcopy(module)
    first, second = (module.core.layers[i].attention.query.weight for i in range(2))
    first.data, second.data = second.data, first.data
    for changed in (scattered, module):
        parameters = list(changed.parameters())
        layout = WeightLayout.of(parameters, "add", 16)
        assert not in_one_piece(changed, "add")
        assert torch.equal(layout.flatten_detached(parameters), layout.flatten(parameters))


def test_memory_that_ends_too_early_is_not_read():
    """The first weight of the flat tensor stands alone in its memory, and the others claim to follow it."""
    module = module_of("none")
    parameters = list(module.parameters())
    layout = WeightLayout.of(parameters, "none", 16)
    parameters[0] = parameters[0].detach().clone()
    assert torch.equal(layout.flatten_detached(parameters), layout.flatten(parameters))


def test_shared_memory_and_shared_parameters_stay_shared():
    module = module_of("none")
    module.share_memory()
    assert all(x.is_shared() for x in module.parameters())
    tied = module_of("none")
    tied.layers[1].attention.query = tied.layers[0].attention.query
    tied.double()
    assert tied.layers[1].attention.query.weight is tied.layers[0].attention.query.weight
    assert all(x.dtype == torch.float64 for x in tied.parameters())


def test_a_module_with_other_parameters_stays_as_it_is():
    module = module_of("none")
    module.layers[0].extra = nn.Parameter(torch.zeros(3))
    module.double()
    assert module.layers[0].extra.dtype == torch.float64
