"""``Watch`` notices every kind of change that its docstring names."""

import gc

import pytest
import torch

from lares_fast import _watch
from lares_fast._watch import Watch

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int8]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (300,), (5000, 8), (0, 4), (20, 3, 2)])
def test_a_tensor_that_is_left_alone_has_not_changed(dtype, shape):
    watch = Watch(torch.ones(shape, dtype=dtype))
    assert watch.changed() is None
    assert watch.changed() is None


def test_a_nan_is_equal_to_itself():
    assert Watch(torch.full((3, 2), torch.nan)).changed() is None


def test_an_in_place_operation_is_noticed_in_any_row():
    tensor = torch.zeros(5000, 2)
    watch = Watch(tensor[10:])
    tensor[4321, 1] = 1
    assert watch.changed() == "an in-place operation changed it"


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_of_an_optimizer_is_noticed_in_any_row(fused):
    weight, other = torch.nn.Parameter(torch.zeros(5000, 8)), torch.zeros(4, 8)
    optimizer = torch.optim.SGD([weight], lr=1.0, fused=fused)
    watch, stranger = Watch(weight.detach()[1:]), Watch(other)
    weight.grad = torch.zeros_like(weight)
    weight.grad[1234] = 1.0
    optimizer.step()
    assert watch.changed() in ("an in-place operation changed it", "an optimizer changed it")
    assert stranger.changed() is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 255, 257, 5000])
def test_a_write_past_pytorch_to_every_row_is_noticed(dtype, count):
    tensor = torch.ones(count, 3, dtype=dtype)
    watch = Watch(tensor)
    tensor.data.fill_(2)
    assert watch.changed() == "its values changed"


def test_a_write_past_pytorch_to_a_row_that_is_not_sampled_is_not_noticed():
    """The docstring of ``Watch`` states this limit."""
    tensor = torch.zeros(5000, 3)
    watch = Watch(tensor)
    tensor.data[1] = 1
    assert watch.changed() is None


def test_an_inference_tensor_is_compared_by_its_rows():
    with torch.inference_mode():
        tensor = torch.ones(10, 2)
        watch = Watch(tensor)
        assert watch.changed() is None
        tensor.mul_(2)
        assert watch.changed() == "its values changed"


def test_a_tensor_on_another_device_is_not_read():
    tensor = torch.ones(10, 2, device="meta")
    watch = Watch(tensor)
    assert watch.changed() is None
    tensor.mul_(2)
    assert watch.changed() == "an in-place operation changed it"


def test_a_watch_that_nobody_keeps_is_dropped():
    before = len(_watch._watches)
    watch = Watch(torch.ones(3))
    assert len(_watch._watches) == before + 1
    del watch
    gc.collect()
    assert len(_watch._watches) == before
