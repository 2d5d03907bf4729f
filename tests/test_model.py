"""``LARES.recommend``: comparison with a sort of the scores, exclusion, backends, errors."""

import threading
import warnings

import pytest
import torch

import lares_fast
from lares_fast import LARESConfig, _native
from lares_fast._errors import InputError

N = 40


@pytest.fixture
def model():
    return lares_fast.LARES(LARESConfig.preset("tiny", n_items=N)).eval()


def histories():
    return torch.tensor([[3, 5, 0, 0], [7, 0, 0, 0], [9, 8, 7, 6]]), torch.tensor([2, 1, 4])


@pytest.mark.parametrize("similarity", ["dot", "cos"])
def test_equals_the_sorted_scores(similarity):
    model = lares_fast.LARES(LARESConfig.preset("tiny", n_items=N, similarity=similarity, tau=0.07)).eval()
    seq, lengths = histories()
    scores, ids = model.recommend(seq, lengths, k=N - 1)
    dense = model(seq, lengths)
    assert dense.shape == (3, N)
    expected = dense[:, 1:].sort(dim=1, descending=True)
    torch.testing.assert_close(scores, expected.values)
    torch.testing.assert_close(dense.gather(1, ids), expected.values)
    assert (ids > 0).all(), "PAD is never recommended"


def test_excludes_seen_items_and_ignores_padding(model):
    seq, lengths = histories()
    exclude = (torch.tensor([0, 4, 8, 12]), seq.flatten())
    _, ids = model.recommend(seq, lengths, k=N - 1, exclude=exclude)
    for row, seen in zip(ids.tolist(), seq.tolist(), strict=True):
        assert not set(row) & set(seen)
        assert row.count(-1) == len(set(seen) - {0})


def test_backends_agree(model):
    if not _native.available()[0]:
        pytest.skip(_native.available()[1])
    seq, lengths = histories()
    a, b = (model.recommend(seq, lengths, k=5, backend=backend) for backend in ("reference", "native"))
    torch.testing.assert_close(a[0], b[0])
    assert torch.equal(a[1], b[1])


@pytest.mark.parametrize("k", [0, N, -1])
def test_k_out_of_range(model, k):
    with pytest.raises(InputError, match=r"k must be in 1\.\.39, the number of items"):
        model.recommend(*histories(), k=k)


@pytest.mark.parametrize("backbone", ["transformer", "with a dropout of its own"])
def test_the_mode_of_the_model_changes_no_answer_and_stays(backbone):
    """A block of another backbone may read a mode of its own. Two names of one block are one block."""

    class Dropout(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = self.again = torch.nn.Dropout(0.5)

        def forward(self, x, mask, *, draw, step):
            assert self.inner is self.again
            return self.inner(x)

    lares_fast.reference.register_backbone("with a dropout of its own", lambda config, n_layers: Dropout())
    made = lares_fast.LARES(LARESConfig.preset("tiny", n_items=N, backbone=backbone, dropout=0.5)).eval()
    served = lares_fast.Recommender(made, [""] + [str(n) for n in range(1, N)])
    expected, answers = made.recommend(*histories(), k=5), served.recommend([[3, 5], [7]], 5)
    queries = served.encode([[3, 5]])
    for inner in (True, False):
        made.train()
        made.pre_block.train(inner)
        modes = [part.training for part in made.modules()]
        for found, sought in zip(made.recommend(*histories(), k=5), expected, strict=True):
            assert torch.equal(found, sought)
        again = served.recommend([[3, 5], [7]], 5)
        assert again.ids == answers.ids and torch.equal(again.scores, answers.scores)
        assert torch.equal(served.encode([[3, 5]]), queries)
        with pytest.raises(InputError, match="num_steps"):
            made.recommend(*histories(), num_steps=0)
        lares_fast.Recommender(made, ["", *served.item_ids])
        assert [part.training for part in made.modules()] == modes
    made.train()
    assert not torch.equal(made.encode(*histories()), made.encode(*histories())), "the model itself still trains"
    _flip_while(made, lambda: [served.recommend([[3, 5], [7]], 5).ids for _ in range(20)] == [answers.ids] * 20)


def _flip_while(model, holds):
    """Assert that ``holds()`` while another thread changes the mode of ``model`` all the time."""
    stop = threading.Event()

    def flip():
        while not stop.is_set():
            model.train(not model.training)

    thread = threading.Thread(target=flip)
    thread.start()
    try:
        assert holds()
    finally:
        stop.set()
        thread.join()


def test_a_parametrised_model_in_training_mode_answers_as_in_evaluation_mode(model):
    torch.nn.utils.parametrizations.weight_norm(model.pre_block.layers[0].feed_forward.up)
    with pytest.warns(UserWarning, match="encoded by its modules"):
        expected = model.recommend(*histories(), k=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = model.train().recommend(*histories(), k=5)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_survives_deepcopy_and_torch_save(model, tmp_path):
    import copy

    torch.save(model.state_dict(), tmp_path / "weights.pt")
    other = copy.deepcopy(model)
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(other.encode(*histories()), model.encode(*histories()))


@pytest.mark.parametrize(("offsets", "ids", "message"), [
    ([0, -3, 2, 3], [1, 2, 3], "exclude offsets must rise from 0 to the number of ids, 3"),
    ([0, 1, 2, 9], [1, 2, 3], "exclude offsets must rise from 0 to the number of ids, 3"),
    ([0, 1, 2], [1, 2], "exclude offsets must have B \\+ 1 = 4 entries, but got 3"),
    ([0, 1, 2, 3], [1, 2, N], "exclude ids must be in 0..39, but got values in 1..40"),
    ([0, 1, 2, 3], [1, 2, -1], "exclude ids must be in 0..39, but got values in -1..2"),
    ([0.0, 1.0, 2.0, 3.0], [1, 2, 3], "exclude offsets must be 1-D torch.int64"),
])  # fmt: skip
def test_exclusions_are_checked_before_they_are_read(model, offsets, ids, message):
    """The messages name the ids that the caller gave. PAD's 0 is allowed."""
    with pytest.raises(InputError, match=message):
        model.recommend(*histories(), k=3, exclude=(torch.tensor(offsets), torch.tensor(ids)))
    with pytest.raises(InputError, match="exclude must be a pair"):
        model.recommend(*histories(), k=3, exclude=torch.tensor(ids))
