"""The catalog: the shift of PAD in one place, and a normalised item table that is never stale."""

import copy
import io
import pickle

import pytest
import torch

import lares_fast
from lares_fast import LARESConfig, ops
from lares_fast._errors import InputError
from lares_fast.catalog import Catalog, KeptTable

N, D = 700, 16


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = lares_fast.LARES(LARESConfig.preset("tiny", n_items=N, similarity="cos", tau=0.07)).eval()
    torch.nn.init.normal_(model.item_embedding.weight)
    return model


def fresh(model):
    """Return the items as they must be scored now."""
    return torch.nn.functional.normalize(model.item_embedding.weight.detach(), dim=-1)[1:]


class TestShift:
    queries, table = torch.randn(3, D), torch.randn(N, D)
    exclude = torch.tensor([0, 3, 3, 5]), torch.tensor([0, 5, N - 1, 1, 2])

    def test_ids_are_those_of_the_whole_table(self):
        scores, ids = Catalog(self.table).topk(self.queries, N - 1, exclude=self.exclude)
        dense = self.queries @ self.table.T
        dense[:, 0] = -torch.inf
        dense[[0, 0, 2, 2], [5, N - 1, 1, 2]] = -torch.inf
        expected = dense.sort(dim=1, descending=True)
        assert (ids < 0).sum(1).tolist() == [2, 0, 2]
        assert len(Catalog(self.table)) == N - 1
        for row, found in enumerate(ids):
            real = found >= 0
            assert torch.equal(found[real], expected.indices[row, : real.sum()])
            torch.testing.assert_close(scores[row, real], expected.values[row, : real.sum()])

    def test_ranks_are_places_in_topk(self):
        target = torch.tensor([9, 1, N - 1])
        kept = torch.tensor([0, 2, 2, 4]), torch.tensor([0, 5, 1, 2])
        catalog = Catalog(self.table)
        for rank, exclude in zip(catalog.target_ranks(self.queries, target, kept), (None, kept), strict=True):
            _, ids = catalog.topk(self.queries, N - 1, exclude=exclude)
            assert torch.equal(rank, (ids == target[:, None]).int().argmax(1))

    @pytest.mark.parametrize("wrong", [N, -1])
    def test_an_excluded_id_must_be_an_item_or_pad(self, wrong):
        with pytest.raises(InputError, match=f"exclude ids must be in 0..{N - 1}"):
            Catalog(self.table).topk(self.queries, 3, exclude=(self.exclude[0], torch.tensor([0, 5, wrong, 1, 2])))


def test_with_dot_products_the_items_are_a_view():
    model = lares_fast.LARES(LARESConfig.preset("tiny", n_items=N))
    items = model.catalog().items
    assert items.data_ptr() == model.item_embedding.weight[1].data_ptr()
    assert not items.requires_grad
    assert model._kept_table is None


def test_the_table_is_normalised_once(model, monkeypatch):
    tables, normalise = [], model.normalise
    monkeypatch.setattr(model, "normalise", lambda x: tables.append(x) or normalise(x) if len(x) == N else normalise(x))
    batch = torch.tensor([[3, 5]]), torch.tensor([2])
    first = model.recommend(*batch, k=5)
    for found in (model.recommend(*batch, k=5), model.recommend(*batch, k=5, exclude=(torch.tensor([0, 0]), batch[0][0, :0]))):
        assert all(map(torch.equal, found, first))
    served = lares_fast.Recommender(model, range(N))
    served.recommend([[3, 5], [7]], 5, batch_size=1)
    served.item_vectors()
    assert len(tables) == 1
    assert torch.equal(model.catalog().items, fresh(model))


def fused_step(model):
    weight = model.item_embedding.weight
    weight.grad = torch.ones_like(weight)
    torch.optim.Adam([weight], lr=1e-6, fused=True).step()


def in_place(write):
    def act(model):
        with torch.no_grad():
            write(model.item_embedding.weight)

    return act


def new_parameter(model):
    model.item_embedding.weight = torch.nn.Parameter(model.item_embedding.weight.detach() * -1)


def swapped_rows(weight):
    weight[[3, 4]] = weight[[4, 3]]


def swapped_columns(weight):
    weight[5, [0, 1]] = weight[5, [1, 0]]


def numpy_write(weight):
    weight.numpy()[123] = 7


# 700 rows: a watch compares every second one, so rows 3, 5 and 123 are not among them.
CHANGES = {
    "an operation in place": in_place(lambda weight: weight[123].mul_(-1)),
    "a fused optimizer step": fused_step,
    "a checkpoint is loaded": lambda model: model.load_state_dict({k: v.flip(0) for k, v in model.state_dict().items()}),
    "another parameter": new_parameter,
    "other memory": lambda model: setattr(model.item_embedding.weight, "data", model.item_embedding.weight.data * -1),
    "another dtype": lambda model: model.double(),
    ".data of one row": lambda model: model.item_embedding.weight.data[123].mul_(-1),
    ".data, rows swapped": lambda model: swapped_rows(model.item_embedding.weight.data),
    ".data, two numbers of a row swapped": lambda model: swapped_columns(model.item_embedding.weight.data),
    ".data, NaN in one row": lambda model: model.item_embedding.weight.data[123].fill_(torch.nan),
    "NumPy": lambda model: numpy_write(model.item_embedding.weight.detach()),
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_change_is_noticed(name, model):
    before = model.catalog().items.clone()
    assert model.catalog().items.data_ptr() == model.catalog().items.data_ptr(), "nothing is kept, so nothing can be stale"
    CHANGES[name](model)
    found = model.catalog().items
    torch.testing.assert_close(found, fresh(model), rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(found, before.to(found))


def test_without_the_products_a_write_past_pytorch_is_missed(model, monkeypatch):
    """This shows that the test above can fail."""
    monkeypatch.setattr("lares_fast.catalog._Kept._products_of", lambda self, weight: torch.zeros(1))
    before = model.catalog().items
    CHANGES[".data of one row"](model)
    assert torch.equal(model.catalog().items, before)
    assert not torch.equal(before, fresh(model))


def test_autocast_changes_nothing(model):
    expected = model.catalog().items
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.catalog().items.data_ptr() == expected.data_ptr()
        CHANGES[".data of one row"](model)
        assert torch.equal(model.catalog().items, fresh(model))
    assert torch.equal(model.catalog().items, fresh(model))


def test_a_nan_does_not_make_a_table_stale(model):
    model.item_embedding.weight.data[7] = torch.nan
    assert model.catalog().items.data_ptr() == model.catalog().items.data_ptr()


def test_a_table_from_inference_mode_is_of_use_outside(model):
    with torch.inference_mode():
        inside = model.catalog().items
    outside = model.catalog().items
    assert outside.data_ptr() == inside.data_ptr()
    assert not outside.is_inference()
    ops.CatalogIndex(outside)
    query = torch.randn(2, D, requires_grad=True)
    (query @ outside.T).sum().backward()
    assert query.grad is not None


def test_weights_that_cannot_be_watched_are_normalised_at_every_call(model):
    with torch.inference_mode():
        model.item_embedding.weight = torch.nn.Parameter(model.item_embedding.weight.clone(), requires_grad=False)
    first, second = model.catalog().items, model.catalog().items
    assert first.data_ptr() != second.data_ptr() and torch.equal(first, second)


def test_a_weight_on_another_device_is_not_compared():
    """A comparison would wait for the device. A meta tensor could not even answer."""
    made = []
    table = KeptTable()
    for _ in range(2):
        table.table(torch.empty(N, D, device="meta"), lambda weight: made.append(weight) or weight)
    assert len(made) == 2


def test_copies_do_not_carry_the_table(model):
    expected = model.catalog().items
    stored = io.BytesIO()
    torch.save(model, stored)
    assert len(stored.getvalue()) < 2 * expected.nbytes
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other._kept_table is None
        assert torch.equal(other.catalog().items, expected)
        in_place(lambda weight: weight[5].mul_(-1))(other)
        assert torch.equal(other.catalog().items, fresh(other))
    assert torch.equal(model.catalog().items, expected)
