"""The stand-in device: it computes what the CPU computes, and it notices waits, mixed devices and launches."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lares_fast import LARES, LARESConfig, ops, reference
from lares_fast._finite import all_finite
from lares_fast._random import Draw
from lares_fast.sequences import Sequences
from tests.support.fake_device import DEVICE, DeviceTensor, FakeDevice, to_fake_device

CONFIG = LARESConfig(
    n_items=40, hidden_size=16, n_heads=2, inner_size=32, n_pre_layers=1, n_core_layers=1, max_len=6, dropout=0.2, tau=0.1,
    similarity="cos",
)  # fmt: skip
LENGTHS = torch.tensor([4, 1, 6, 2])


def there(*shape):
    return to_fake_device(torch.randn(*shape))


def reading_function(tensor):
    return tensor.sum().item()


WAITS = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x[0, 0]),
    "truth": lambda x: bool(x.any()),
    "tolist": lambda x: x.tolist(),
    "copy to the CPU": lambda x: x.cpu(),
    "copy into a CPU tensor": lambda x: torch.empty(3, 2).copy_(x),
    "assignment to a CPU tensor": lambda x: torch.empty(4, 2)[1:].copy_(x),
    "mask": lambda x: x[x > 0],
    "assignment by a mask": lambda x: x.index_put_((x > 0,), x[0, 0]),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "repeat_interleave": lambda x: torch.repeat_interleave(x, (x[:, 0] * 0).long() + 1, dim=0),
    "equal": lambda x: torch.equal(x, x),
    "allclose": lambda x: torch.allclose(x, x),
    "blocking copy to the device": lambda x: x + torch.ones(3, 2).to(DEVICE),
    "blocking copy into a tensor of the device": lambda x: x.copy_(torch.ones(3, 2)),
    "number from Python": lambda x: torch.tensor([1.0], device=DEVICE),
}
FREE_OF_WAITS = {
    "copy to the device": lambda x: x + torch.ones(3, 2).pin_memory().to(DEVICE, non_blocking=True),
    "copy into a tensor of the device": lambda x: x.copy_(torch.ones(3, 2).pin_memory(), non_blocking=True),
    "page-locked memory": lambda x: x.copy_(torch.ones(3, 2, pin_memory=True), non_blocking=True),
    "index": lambda x: x[to_fake_device(torch.tensor([0, 1]))],
    "repeat_interleave": lambda x: torch.repeat_interleave(x, (x[:, 0] * 0).long() + 1, dim=0, output_size=3),
    "scalar of the CPU": lambda x: x * torch.tensor(2.0),
    "factory": lambda x: x + torch.full((3, 2), 1.0, device=DEVICE),
}
MIXES = {
    "sum": lambda x: x + torch.ones(3, 2),
    "product": lambda x: x.T @ torch.ones(3, 2),
    "list": lambda x: torch.cat((x, torch.ones(3, 2))),
    "index": lambda x: x[torch.tensor([0, 1])],
    "write into a CPU tensor": lambda x: torch.zeros(3, 2).add_(x),
    "write into a CPU scalar": lambda x: torch.zeros(()).add_(x.sum()),
}


@pytest.mark.parametrize("name", WAITS)
def test_each_wait_is_noticed(name):
    with FakeDevice() as device:
        x = there(3, 2)
        with pytest.raises(AssertionError, match="waits for the device"):
            WAITS[name](x)
    assert len(device.waits) == 1


@pytest.mark.parametrize("name", FREE_OF_WAITS)
def test_nothing_else_is_a_wait(name):
    with FakeDevice() as device:
        assert FREE_OF_WAITS[name](there(3, 2)).device == DEVICE
    assert not device.waits


@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.parametrize("name", MIXES)
def test_mixed_devices_are_noticed(name, allowed):
    with FakeDevice(allowed), pytest.raises(AssertionError, match="on the CPU and on the device"):
        MIXES[name](there(3, 2))


def test_a_tensor_that_was_made_outside_is_noticed():
    outside = torch.empty(3, device=DEVICE)
    with FakeDevice(True), pytest.raises(AssertionError, match="made outside of FakeDevice"):
        outside + 1
    with pytest.raises(AssertionError, match="called outside of FakeDevice"):
        there(3) + 1


def test_allowed_waits_are_listed_with_their_places():
    here = f"{__name__}.{reading_function.__name__}"
    with FakeDevice(True) as device:
        x = to_fake_device(torch.ones(3))
        assert reading_function(x) == 3
        assert x.tolist() == [1, 1, 1]
    assert device.waits[0].place == here
    assert [wait.what for wait in device.waits] == ["aten._local_scalar_dense.default", "a copy to the CPU"]
    with FakeDevice({here}) as device:
        reading_function(x)
        with pytest.raises(AssertionError, match=r"waits for the device, in .*test_allowed_waits"):
            x.sum().item()
    assert len(device.waits) == 2


def test_a_place_is_a_function_of_the_package():
    with FakeDevice({"sequences.Sequences.from_padded"}) as device:
        Sequences.from_padded(there(2, 3).long(), to_fake_device(torch.tensor([3, 1])))
        assert [wait.places[:3] for wait in device.waits] == [
            ("sequences.row_positions", "sequences.unpad", "sequences.Sequences.from_padded")
        ]
        with pytest.raises(AssertionError, match=r"in _finite\.largest < _finite\.all_finite"):
            all_finite([there(2)])


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda x: x.view(2, 3).T[0].unsqueeze(0).expand(4, -1).detach(), {}),
        (lambda x: torch.empty_like(x).new_empty(3).resize_(3), {}),
        (lambda x: x.split(2)[0].unbind(0)[0], {}),
        (lambda x: x[:0] + 1, {}),
        (lambda x: x.contiguous().reshape(6), {}),
        (lambda x: x.T.contiguous(), {"aten.clone.default": 1}),
        (lambda x: x.T.reshape(6), {"aten.clone.default": 1}),
        (lambda x: x.to(torch.float64), {"aten._to_copy.default": 1}),
        (lambda x: x.add_(1).mul(2), {"aten.add_.Tensor": 1, "aten.mul.Tensor": 1}),
        (lambda x: torch.zeros(3, device=DEVICE), {"aten.zeros.default": 1}),
        (lambda x: torch.ones(3).to(DEVICE, non_blocking=True), {"aten._to_copy.default": 1}),
        (lambda x: torch._foreach_add_([x, x], 1), {"aten._foreach_add_.Scalar": 1}),
        (lambda x: torch.ones(3) + 1, {}),
        (
            lambda x: F.linear(x, x, x[:, 0]).relu().sum(),
            {"aten.addmm.default": 1, "aten.relu.default": 1, "aten.sum.default": 1},
        ),
    ],
)
def test_launches_are_counted(call, names):
    with FakeDevice() as device:
        call(there(3, 2))
    assert dict(device.launches) == names, device.launches.table()


def test_kernels_are_counted_in_both_directions():
    with FakeDevice() as device:
        hidden, items = there(3, 16).requires_grad_(), there(9, 16)
        ops.linear_cross_entropy(hidden, items, to_fake_device(torch.tensor([1, 2, 3]))).backward()
        ops.topk(hidden.detach(), items, 2)
    kernels = {name: number for name, number in device.launches.items() if "." not in name}
    assert kernels == {
        "softmax_forward": 1, "merge_sums": 1, "prepare_backward": 1, "softmax_backward_hidden": 1, "topk": 1,
    }  # fmt: skip
    assert device.launches.table().splitlines()[0] == f"{device.launches.total():6} launches"
    assert "     1 softmax_forward" in device.launches.table()


def test_a_module_moves_to_the_device_and_back():
    model, x = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)), torch.randn(5, 4)
    expected = model(x)
    with FakeDevice(True) as device:
        moved = copy.deepcopy(model).to(DEVICE)
        assert all(isinstance(p, DeviceTensor) and isinstance(p, nn.Parameter) for p in moved.parameters())
        copied = copy.deepcopy(moved)
        assert torch.equal(moved(x.to(DEVICE)).cpu(), expected)
        with torch.no_grad():
            moved[0].weight.zero_()
        assert copied[0].weight.device == DEVICE
        assert torch.equal(copied(x.to(DEVICE)).cpu(), expected)
        moved.load_state_dict(copied.state_dict())
        moved.load_state_dict({name: value.cpu() for name, value in copied.state_dict().items()})
        assert torch.equal(moved(x.to(DEVICE)).cpu(), expected)
        moved.cpu()
    assert torch.equal(moved(x), expected)
    assert all(type(p) is nn.Parameter for p in moved.parameters())
    assert device.waits


@pytest.mark.parametrize(
    "how", [{}, {"foreach": True}, {"foreach": True, "capturable": True}, {"fused": True, "capturable": True}], ids=str
)
def test_adam_steps_on_the_device(how):
    """The moments move to the device, and a saved optimizer continues there."""
    start, gradients = torch.randn(4, 3), torch.randn(3, 4, 3)

    def run(device, usual):
        weight = nn.Parameter(start.clone().to(device))
        settings = dict(lr=0.1, weight_decay=0.01, **usual)
        optimizer = torch.optim.Adam([weight], **settings)
        for number, gradient in enumerate(gradients):
            weight.grad = gradient.to(device)
            optimizer.step()
            if number == 1:
                saved = {**optimizer.state_dict(), "state": {0: {k: v.cpu() for k, v in optimizer.state[weight].items()}}}
                optimizer = torch.optim.Adam([weight], **settings)
                optimizer.load_state_dict(saved)
        assert optimizer.state[weight]["exp_avg"].device == torch.device(device)
        return weight.detach().cpu()

    expected = run("cpu", {k: v for k, v in how.items() if k != "capturable"})
    with FakeDevice(True):
        found = run(DEVICE, how)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-6)


def test_a_fused_step_is_few_launches_and_no_wait():
    with FakeDevice() as device:
        weights = [there(3).requires_grad_() for _ in range(5)]
        optimizer = torch.optim.Adam(weights, fused=True, capturable=True)
        for weight in weights:
            weight.grad = there(3)
        optimizer.step()
        device.launches.clear()
        optimizer.step()
    assert device.launches == {"aten._foreach_add_.Scalar": 1, "aten._fused_adam_.default": 1}


def batch(device):
    sequences = torch.arange(1, 25).view(4, 6) % CONFIG.n_items
    items, offsets = Sequences.from_padded(sequences, LENGTHS)
    return (items.to(device, non_blocking=True), offsets), torch.tensor([7, 3, 9, 11]).to(device, non_blocking=True)


def spt(model, frozen, step, device):
    sequences, target = batch(device)
    depths = (torch.tensor([2, 1, 3, 2]), torch.tensor([3, 3, 1, 2]), torch.tensor([1, 2, 3, 2]))
    passes = tuple(reference.Pass(depth, Draw((step, i), torch.arange(4))) for i, depth in enumerate(depths))
    return reference.spt_loss(model, sequences, target, sequences, passes, 1, alpha=0.1, gamma=0.5).total


def rpt(model, frozen, step, device):
    sequences, target = batch(device)
    group = reference.Pass(torch.tensor([[2, 1, 3, 2], [3, 1, 1, 2]]), Draw((step, 5), torch.arange(8)))
    return reference.rpt_loss(model, frozen, sequences, target, group, group, k=10, beta=0.5, reward="ndcg").total


def losses(loss, device):
    """Return the losses of four steps of Adam, as numbers on the CPU, and the weights after them."""
    torch.manual_seed(1)
    model = LARES(CONFIG).to(device).train()
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=True, capturable=torch.device(device) == DEVICE)
    found = []
    for step in range(4):
        optimizer.zero_grad()
        value = loss(model, frozen, step, device)
        value.backward()
        optimizer.step()
        found.append(value.detach())
    return torch.stack(found).cpu(), {name: weight.cpu() for name, weight in model.state_dict().items()}


@pytest.mark.parametrize("loss", [spt, rpt])
def test_training_on_the_device_gives_the_losses_of_the_cpu(loss):
    expected, weights = losses(loss, "cpu")
    with FakeDevice(True, compute=True) as device:
        found, there = losses(loss, DEVICE)
    assert len(set(expected.tolist())) == 4
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(there, weights, rtol=1e-5, atol=1e-6)
    # The model is copied to the device once, and the losses and weights come back at the end.
    assert {wait.places for wait in device.waits} == {(f"{__name__}.losses",), (f"{__name__}.losses.<locals>.<dictcomp>",)}


def test_kernels_that_do_not_run_are_noticed():
    """Without ``compute`` the results are arbitrary, so the comparison above can fail."""
    with FakeDevice(True):
        logprob = ops.target_logprob(there(3, 16), there(9, 16), to_fake_device(torch.tensor([1, 2, 3])))
        real = reference.target_logprob(torch.zeros(3, 16), torch.zeros(9, 16), torch.tensor([1, 2, 3]))
        assert not torch.allclose(logprob.cpu(), real)
