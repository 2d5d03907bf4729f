"""``lares_fast.LARES`` compared with ``reference.LARES``: training, backends, use in its place, ``accelerate``."""

import copy
import pickle
import sys
from collections import Counter

import pytest
import torch

import lares_fast
from lares_fast import LARESConfig, _dispatch, _native, reference
from lares_fast._errors import BackendError, InputError
from lares_fast._random import Draw
from lares_fast.data import leave_one_out, make_batch, synthetic_log
from lares_fast.sequences import Sequences
from tests.support import oracle

needs_native = pytest.mark.skipif(not _native.available()[0], reason=_native.available()[1])
N, L = 60, 12


def config(**changes):
    return LARESConfig.preset(
        "tiny", **{"n_items": N, "max_len": L, "hidden_size": 32, "inner_size": 64, "dropout": 0.3, "eval_depth": 3, **changes}
    )


def batch(B=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, L + 1, (B,), generator=generator)
    items = torch.randint(1, N, (B, L), generator=generator)
    return torch.where(torch.arange(L) < lengths[:, None], items, 0), lengths


def twins(**changes):
    """Return (reference, fast) with equal weights, in training mode."""
    torch.manual_seed(0)
    slow = reference.LARES(config(**changes)).train()
    fast = lares_fast.LARES(slow.config).train()
    fast.load_state_dict(slow.state_dict())
    return slow, fast


def spt(model, step, B=24):
    passes = tuple(reference.Pass(T, Draw((step, i), torch.arange(B))) for i, T in enumerate((3, 4, 4)))
    target = torch.randint(1, N, (B,), generator=torch.Generator().manual_seed(step))
    return reference.spt_loss(model, batch(B, step), target, batch(B, step + 1000), passes, 1, alpha=0.1, gamma=0.5).total


@needs_native
def test_fifty_training_steps_follow_the_reference():
    """Rounding errors grow step by step. They change the loss far less than a wrong gradient does."""
    losses = []
    for model in twins():
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        losses.append([])
        for step in range(50):
            optimizer.zero_grad()
            loss = spt(model, step)
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0][-1] < losses[0][0] - 0.1, "the model learned nothing, so the comparison shows nothing"
    torch.testing.assert_close(losses[1], losses[0], rtol=2e-4, atol=0)


@needs_native
def test_a_wrong_dropout_site_is_noticed(monkeypatch):
    slow, fast = twins()
    expected, found = spt(slow, 0), spt(fast, 0)
    torch.testing.assert_close(found, expected)
    monkeypatch.setattr(sys.modules["lares_fast.reference.embedding"], "SITE_INPUT", 2)
    assert (spt(fast, 0) - expected).abs() > 1e-3


@needs_native
def test_the_native_op_ran_where_it_was_asked_to():
    before = Counter(_dispatch.calls)
    model = lares_fast.LARES(config(), backend="native").eval()
    model.encode(*batch())
    ran = _dispatch.calls - before
    assert ran == Counter({("recurrence", "native"): 2, ("embedding", "native"): 1, ("initial_state", "native"): 1})


def test_a_backend_chosen_by_name_does_not_fall_back():
    model = lares_fast.LARES(config(hidden_size=24, n_heads=2), backend="native")
    with pytest.raises(BackendError, match="multiples of 16"):
        model.encode(*batch())
    with pytest.raises(InputError, match="backend must be one of"):
        lares_fast.LARES(config(), backend="fast")
    fallback = lares_fast.LARES(config(hidden_size=24, n_heads=2))
    assert fallback.eval().encode(*batch()).shape == (24, 24)


@pytest.mark.parametrize("state_init", ["normal", "normal_zero", "zero"])
def test_per_sequence_depth_and_all_steps(state_init):
    slow, fast = twins(state_init=state_init, dropout=0.0)
    depth = torch.arange(24) % 5 + 1
    for steps in (False, True):
        a, b = (model.eval().encode(*batch(), num_steps=depth, return_all_steps=steps) for model in (slow, fast))
        truth = copy.deepcopy(slow).double().encode(*batch(), num_steps=depth, return_all_steps=steps)
        oracle.check("forward", {"h": b.detach()}, {"h": a.detach()}, {"h": truth.detach()})


def test_gradient_accumulation_is_a_sum():
    _, model = twins(dropout=0.0)
    one, two = spt(model, 0), spt(model, 1)
    (one + two).backward()
    at_once = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for step in range(2):
        spt(model, step).backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, at_once[name], rtol=1e-4, atol=1e-6)


class _Rows(torch.utils.data.Dataset):
    """A data set of the numbers of the training rows of a log."""

    def __init__(self):
        self.log = synthetic_log(n_users=100, n_items=40)
        self.rows = leave_one_out(self.log).train

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, row):
        return row

    def collate(self, index):
        return make_batch(self.log, self.rows, torch.tensor(index), L)


def test_batches_of_loader_workers_are_those_of_this_process():
    rows = _Rows()
    model = lares_fast.LARES(config()).eval()
    loaded = [
        list(torch.utils.data.DataLoader(rows, batch_size=200, collate_fn=rows.collate, num_workers=workers))
        for workers in (0, 2)
    ]
    assert len(loaded[0]) == len(loaded[1]) > 1
    for here, there in zip(*loaded, strict=True):
        with torch.no_grad():
            assert torch.equal(model.encode(*here.sequences), model.encode(*there.sequences))


def test_bf16_is_of_evaluation_alone():
    _, fast = twins()
    with torch.no_grad():
        exact = fast.eval().encode(*batch(), num_steps=3)
        fast.bf16 = True
        rounded = fast.encode(*batch(), num_steps=3)
    assert 1e-4 < (rounded - exact).abs().max() < 0.1
    # The reference computes it, because the C++ code has no gradients with bf16.
    fast.encode(*batch(), num_steps=3).sum().backward()
    fast.train().encode(*batch(), num_steps=3).sum().backward()


def test_copies_and_pickles_answer_alike():
    _, model = twins()
    expected = model.eval().encode(*batch())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.encode(*batch()), expected)


def test_autocast_changes_nothing_that_is_fp32():
    _, model = twins(dropout=0.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model.eval().encode(*batch())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, model.encode(*batch()), rtol=0.1, atol=0.1)


def test_compiles():
    _, model = twins(dropout=0.0)
    compiled = torch.compile(model.eval(), backend="aot_eager")
    torch.testing.assert_close(compiled(*batch()), model(*batch()))


class TestAccelerate:
    def test_the_same_model_answers_faster(self):
        slow, fast = twins()
        optimizer = torch.optim.SGD(slow.parameters(), lr=0.1)
        expected = fast.eval().encode(*batch())
        report = lares_fast.accelerate(slow)
        assert "recurrence" in report
        assert "topk" in report
        assert torch.equal(slow.eval().encode(*batch()), expected)
        assert optimizer.param_groups[0]["params"][0] is next(slow.parameters())
        assert isinstance(slow, reference.LARES)

    def test_a_model_of_another_kind_is_refused(self):
        with pytest.raises(InputError, match=r"model must be a reference\.LARES, but is a Linear"):
            lares_fast.accelerate(torch.nn.Linear(2, 2))


@needs_native
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", [reference.LARES, lares_fast.LARES])
def test_trajectories_are_passes_on_their_own(kind, dropout, B=24):
    """Pass g has the masks and the h0 of its own rows, whether or not the passes share the pre-block's output."""
    model = next(model for model in twins(dropout=dropout) if type(model) is kind)
    depth, rows = torch.stack((torch.full((B,), 3), torch.arange(B) % 4 + 1)), torch.arange(2 * B)
    states = model.trajectories(*batch(), depth, draw=Draw((1, 2), rows)).split(depth.sum(1).tolist())
    packed = model.trajectories(*Sequences.from_padded(*batch()), depth, draw=Draw((1, 2), rows))
    torch.testing.assert_close(packed, torch.cat(states))
    for g, (found, part) in enumerate(zip(states, rows.split(B), strict=True)):
        alone = model.encode(*batch(), num_steps=depth[g], draw=Draw((1, 2), part), return_all_steps=True)
        own = torch.arange(alone.shape[1]) < depth[g][:, None]
        torch.testing.assert_close(found, alone[own])
