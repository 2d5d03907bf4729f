"""A batch that is filled from a log on the device equals the batch that the host makes."""

import pytest
import torch

from lares_fast.data import leave_one_out, make_batch, synthetic_log
from lares_fast.ops import _pack, _triton
from lares_fast.ops._pack import pack, pack_by_torch

HUGE, LOW = 2**62, -(2**63)


@pytest.fixture
def interpreted(monkeypatch):
    from tests.support import triton_interpreter

    with triton_interpreter.interpreted(monkeypatch) as memory:
        yield memory


def case(batch, max_len):
    """Return a batch of the host, and the arguments with which :func:`pack` fills the same batch."""
    log = synthetic_log(n_users=60, n_items=40, seed=3)
    rows = leave_one_out(log).train
    index = torch.randint(len(rows), (batch,))
    wanted = make_batch(log, rows, index, max_len)
    starts = torch.from_numpy(rows.ends[index.numpy()]) - wanted.offsets.diff()
    return wanted, (torch.from_numpy(log.items), starts, wanted.offsets, len(wanted.items))


def check(function, batch, max_len, targets=None):
    wanted, arguments = case(batch, max_len)
    items, found = function(*arguments, batch if targets is None else targets)
    assert items.dtype == found.dtype == torch.int64
    assert torch.equal(items, wanted.items) and torch.equal(found, wanted.target[:targets])


SIZES = [(1, 1), (1, 20), (7, 3), (8, 3), (300, 1), (256, 20), (257, 20)]


@pytest.mark.parametrize("size", SIZES)
def test_operations_of_pytorch(size):
    check(pack_by_torch, *size)


def test_the_cpu_needs_no_kernel():
    check(pack, 40, 6, targets=13)


@pytest.mark.interpreted
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("size", SIZES)
def test_the_kernel(size):
    check(pack, *size)


@pytest.mark.interpreted
@pytest.mark.parametrize("targets", [0, 1, 299])
def test_fewer_targets_than_sequences(targets, interpreted):
    check(pack, 300, 6, targets)
    assert interpreted.launches == 1


@pytest.mark.interpreted
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("starts", "offsets"),
    [
        ([0, 5, 9], [0, 4, 40, 300]), ([HUGE, LOW, -1], [0, 4, 40, 300]), ([0, 5, 9], [7, 4, HUGE, LOW]),
        ([0, 5, 9], [LOW, LOW, LOW, LOW]), ([LOW, LOW, LOW], [HUGE, HUGE, HUGE, HUGE]), ([2**31, 2**33, 9], [0, 1, 2, 300]),
    ],
    ids=str,
)  # fmt: skip
def test_any_values_stay_within_the_tensors(starts, offsets):
    """Every address is checked, and every element is written."""
    log = torch.arange(1, 31, dtype=torch.int32)
    items, targets = pack(log, torch.tensor(starts), torch.tensor(offsets), 300, 3)
    for found in (items, targets):
        assert found.min() >= 1 and found.max() <= 30


PLANTED = {
    "the first sequence that begins at a place": ("<= place", "< place"),
    "one halving is left out": ("range(halvings)", "range(halvings - 1)"),
    "the place in the batch instead of the sequence": ("(place - tl.load(OFFSETS + low))", "place"),
    "the last item instead of the next one": (
        "tl.load(STARTS + row, mask=inside, other=0) + length",
        "tl.load(STARTS + row, mask=inside, other=0) + length - 1",
    ),
    "events of the first program": ("(pid - tiles).to(tl.int64)", "pid.to(tl.int64)"),
}


@pytest.mark.interpreted
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_found(bug, monkeypatch, tmp_path):
    from tests.support import triton_interpreter

    triton_interpreter.plant(monkeypatch, tmp_path, ("_pack",), "_pack", *PLANTED[bug])
    with pytest.raises(AssertionError):
        check(_triton.kernels("_pack").packed, 257, 6)


def test_a_kernel_that_fails_its_check_is_reported(monkeypatch):
    class Wrong:
        @staticmethod
        def packed(log, starts, offsets, n_tokens, n_targets):
            items, targets = _pack.pack_by_torch(log, starts, offsets, n_tokens, n_targets)
            return items + 1, targets

    monkeypatch.setattr(_triton, "kernels", lambda stem: Wrong)
    with pytest.warns(UserWarning, match="packs batches failed its check on cpu, so PyTorch packs them"):
        assert not _pack._kernel_is_right.__wrapped__(torch.device("cpu"))
