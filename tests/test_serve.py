"""``Recommender`` and ``load``: answers, raw ids of every kind, and errors."""

import json
import shutil

import numpy as np
import pytest
import torch

import lares_fast
from lares_fast import LARES, LARESConfig, _native, serve
from lares_fast._errors import InputError
from lares_fast._weights import save_weights
from lares_fast.serve import Recommender
from tests.support import train_run

N = 30


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = LARES(LARESConfig.preset("tiny", n_items=N + 1))
    # The official initialisation is so small that scores nearly tie.
    torch.nn.init.normal_(model.item_embedding.weight)
    return model.eval()


@pytest.fixture(scope="module")
def recommender(model):
    return Recommender(model, ["", *(f"item-{n}" for n in range(1, N + 1))])


def raw(*numbers):
    return [f"item-{n}" for n in numbers]


HISTORIES = [raw(3), raw(1, 2, 3), raw(*range(1, 16)), raw(9, 9, 4), raw(*range(20, 31)), raw(7, 30)]


def test_answers_do_not_depend_on_the_batch(recommender):
    together = recommender.recommend(HISTORIES, 5)
    for size in (1, 2, 4):
        parts = recommender.recommend(HISTORIES, 5, batch_size=size)
        assert parts.ids == together.ids
        torch.testing.assert_close(parts.scores, together.scores)
    backwards = recommender.recommend(HISTORIES[::-1], 5)
    assert backwards.ids == together.ids[::-1]
    for history, ids in zip(HISTORIES, together.ids, strict=True):
        assert recommender.recommend([history], 5).ids == [ids]


@pytest.mark.parametrize("similarity", ["dot", "cos"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_catalog_that_is_scored_often_is_indexed(similarity, mode, monkeypatch):
    torch.manual_seed(0)
    served = Recommender(LARES(LARESConfig.preset("tiny", n_items=N + 1, similarity=similarity)), ["", *raw(*range(1, N + 1))])
    built = []
    monkeypatch.setattr(serve, "_index", lambda items, build=serve._index: built.append(build(items)) or built[-1])
    with mode():
        once, often = served.recommend(HISTORIES, 5), served.recommend(HISTORIES, 5, batch_size=2)
    assert len(built) == 1
    if _native.available()[0]:
        assert built[0] is not None
    assert often.ids == once.ids


def test_answers_are_those_of_the_model(recommender, model):
    found = recommender.recommend([raw(4, 8, 15)], N, exclude_seen=False)
    scores = model(torch.tensor([[4, 8, 15]]), torch.tensor([3]))[0, 1:]
    best, order = scores.sort(descending=True, stable=True)
    assert found.ids == [raw(*(order + 1).tolist())]
    torch.testing.assert_close(found.scores[0], best)


def test_a_masked_entry_is_no_item():
    """NumPy gives it the number 0, or the number that is under the mask."""
    served = Recommender(LARES(LARESConfig.preset("tiny", n_items=4)), [-1, 0, 1, 2])
    for history in (np.ma.array([1, 2], mask=[0, 1]), [1, np.ma.masked], [1, np.ma.array(2, mask=True)]):
        with pytest.raises(InputError, match="item 1 of history 0 must be a raw id"):
            served.recommend([history], 1)
    with pytest.raises(InputError, match="item must be a raw id"):
        served.knows(np.ma.masked)
    with pytest.raises(InputError, match=r"item_ids\[1\] must be a raw id"):
        Recommender(served.model, np.ma.array([-1, 0, 1, 2], mask=[0, 1, 0, 0]))
    with pytest.raises(InputError, match="k must be an integer, but got masked"):
        served.recommend([[1]], np.ma.array([1], mask=[1])[0])
    assert served.recommend([np.ma.array([1, 2], mask=[0, 0])], 1).ids == served.recommend([[1, 2]], 1).ids


def test_all_seen_items_stay_out_though_the_model_reads_the_last_ones_only(recommender):
    long = raw(*range(1, 26))
    found = recommender.recommend([long], N)
    assert sorted(found.ids[0]) == sorted(raw(*range(26, 31)))
    assert found.scores[0, 5:].eq(-torch.inf).all() and found.scores[0, :5].isfinite().all()
    recent = recommender.recommend([long[-10:]], N, exclude_seen=False)
    torch.testing.assert_close(recommender.recommend([long], N, exclude_seen=False).scores, recent.scores)


def test_unknown_items_are_left_out_and_counted(recommender):
    found = recommender.recommend([["item-1", "x", "item-2"], ["x", "y"], []], 3)
    assert found.unknown == 3 and found.empty == [1, 2]
    assert found.ids == [recommender.recommend([raw(1, 2)], 3).ids[0], [], []]
    assert found.scores[1:].eq(-torch.inf).all()
    assert recommender.recommend([], 3).ids == []


def test_integer_ids_are_found_by_their_text(model):
    recommender = Recommender(model, [0, *range(101, 101 + N)])
    assert recommender.recommend([[101, 105]]).ids == recommender.recommend([["101", "105"]]).ids
    assert recommender.recommend([[101, "shoes", 999]]).unknown == 2
    assert recommender.knows("101") and not recommender.knows(1)


@pytest.mark.parametrize("similarity", ["dot", "cos"])
def test_vectors_give_the_scores(model, similarity):
    other = LARES(model.config.replace(similarity=similarity, tau=0.5))
    other.load_state_dict(model.state_dict())
    recommender = Recommender(other, range(N + 1))
    histories = [[1, 2], [5], list(range(1, 20))]
    scores = recommender.encode(histories, num_steps=3) @ recommender.item_vectors().T
    found = recommender.recommend(histories, 1, exclude_seen=False, num_steps=3)
    assert [[recommender.item_ids[i]] for i in scores.argmax(1).tolist()] == found.ids
    torch.testing.assert_close(scores.amax(1, keepdim=True), found.scores)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda r: r.recommend([raw(1)], N + 1), "k must be in 1..30"),
        (lambda r: r.recommend([raw(1)], 0), "k must be in 1..30"),
        (lambda r: r.recommend(["item-1"]), "history 0 must be a sequence of raw item ids, but is the text 'item-1'"),
        (lambda r: r.recommend([raw(1)], num_steps=0), "num_steps must be at least 1"),
        (lambda r: r.recommend([raw(1)], batch_size=0), "batch_size must be at least 1"),
        (lambda r: r.encode([raw(1), ["x"]]), "history 1 holds no item"),
    ],
)
def test_bad_arguments(recommender, call, expected):
    with pytest.raises(InputError, match=expected):
        call(recommender)


@pytest.fixture
def run(model, tmp_path):
    folder = tmp_path / "run"
    save_weights(folder / "model.safetensors", model.state_dict(), model.config)
    (folder / "item_ids.json").write_text(json.dumps(["", *raw(*range(1, N + 1))]))
    return folder


def test_load_gives_the_same_answers(run, recommender):
    assert lares_fast.load(str(run)).recommend(HISTORIES).ids == recommender.recommend(HISTORIES).ids


@pytest.mark.parametrize("name", ["model.safetensors", "item_ids.json"])
@pytest.mark.parametrize("harm", ["missing", "truncated", "foreign", "of another run"])
def test_damaged_runs_are_one_sentence(run, tmp_path, name, harm, model):
    path = run / name
    if harm == "missing":
        path.unlink()
    elif harm == "truncated":
        path.write_bytes(path.read_bytes()[:100])
    elif harm == "foreign":
        path.write_bytes(b'{"a": 1}')
    elif name == "item_ids.json":
        path.write_text(json.dumps(list(range(N))))
    else:
        wrong = {key: value[:1] for key, value in model.state_dict().items()}
        save_weights(path, wrong, model.config)
    before = shutil.copytree(run, tmp_path / "before")
    with pytest.raises(InputError) as error:
        lares_fast.load(run)
    assert name in str(error.value) and "\n" not in str(error.value)
    assert {file.name: file.read_bytes() for file in run.iterdir()} == {
        file.name: file.read_bytes() for file in before.iterdir()
    }


# Raw ids of every kind

FIVE = [
    5, "5", 5.0, np.int64(5), np.int32(5), np.uint8(5), np.float64(5), np.float32(5), np.float16(5), np.str_("5"), np.array(5),
    torch.tensor(5), torch.tensor(5, dtype=torch.uint8), torch.tensor(5.0), torch.tensor(5.0, dtype=torch.bfloat16),
    torch.tensor(5.0, requires_grad=True), np.array("5"), np.array(5, dtype=object),
]  # fmt: skip
NO_ID = [
    5.5, b"5", True, False, None, float("nan"), float("inf"), 2.0**54, np.float32(2**25), torch.tensor(300.0).bfloat16(),
    np.float16(4096), np.bool_(True), torch.tensor(True), torch.tensor(5.5), torch.tensor([5]), np.array([5]), [5], (5,), {5},
    {}, ..., 5 + 0j, np.datetime64("2020-01-01T00:00:00", "ns"), np.timedelta64(5, "ns"), torch.tensor(5, device="meta"),
    10**5000,
]  # fmt: skip


@pytest.fixture(scope="module", params=["integers", "texts"])
def numbered(model, request):
    ids = range(N + 1)
    return Recommender(model, list(ids) if request.param == "integers" else list(map(str, ids)))


@pytest.mark.parametrize("five", FIVE, ids=repr)
def test_a_whole_number_of_any_library_is_an_id(numbered, five):
    expected = numbered.recommend([[5, 6]], 3)
    for history in ([five, 6], (five, "6"), [five, torch.tensor(6)]):
        found = numbered.recommend([history], 3)
        assert found.ids == expected.ids and found.unknown == 0
    assert numbered.knows(five)
    torch.testing.assert_close(numbered.encode([[five, 6]]), numbered.encode([[5, 6]]))


@pytest.mark.parametrize("history", [
    torch.tensor([5, 6]), torch.tensor([5.0, 6.0]), torch.tensor([5, 6], dtype=torch.int16), torch.tensor([5.0, 6.0]).half(),
    np.array([5, 6]), np.array([5.0, 6.0]), np.array(["5", "6"]), np.array([5, "6"], dtype=object), np.array([5, 6], np.uint64),
    (5, 6), range(5, 7), np.array([[5, 6], [7, 8]])[0],
], ids=repr)  # fmt: skip
def test_a_history_may_be_an_array(numbered, history):
    assert numbered.recommend([history], 3).ids == numbered.recommend([[5, 6]], 3).ids


def test_histories_may_be_rows_of_a_matrix(numbered):
    expected = numbered.recommend([[5, 6], [7, 8]], 3).ids
    for histories in (torch.tensor([[5, 6], [7, 8]]), np.array([[5, 6], [7, 8]]), iter([[5, 6], [7, 8]])):
        assert numbered.recommend(histories, 3).ids == expected


@pytest.mark.parametrize("wrong", NO_ID, ids=range(len(NO_ID)))
def test_what_can_be_no_id_is_named(numbered, wrong):
    for call in (lambda: numbered.recommend([[6], [6, wrong]]), lambda: numbered.encode([[6], [6, wrong]])):
        with pytest.raises(InputError, match="item 1 of history 1 must be a raw id, which is text or a whole number"):
            call()
    with pytest.raises(InputError, match="item must be a raw id"):
        numbered.knows(wrong)
    with pytest.raises(InputError, match=r"item_ids\[1\] must be a raw id"):
        Recommender(numbered.model, [0, wrong, *range(2, N + 1)])


@pytest.mark.parametrize("wrong", [
    np.array([5.5, 6]), torch.tensor([True, False]), np.array([b"5"]), np.array(["2020-01-01"], dtype="datetime64[ns]"),
    torch.tensor([2.0**25, 5]), torch.zeros(1, 2, dtype=torch.int64), torch.tensor(5), np.array(5), 5, None, {5: 6}, {5, 6},
    "56", b"56", torch.tensor([5.0, torch.nan]), np.ma.masked,
], ids=repr)  # fmt: skip
def test_what_can_be_no_history_is_named(numbered, wrong):
    with pytest.raises(InputError, match="history 1"):
        numbered.recommend([[6], wrong])


@pytest.mark.parametrize("wrong", [[1], 1, None, "item", b"item", {"a": [1]}, {(1, 2)}, torch.tensor([5, 6]), torch.tensor(5)])
def test_histories_are_a_list_of_lists(numbered, wrong):
    for call in (numbered.recommend, numbered.encode):
        with pytest.raises(InputError, match=r"histor(y 0|ies) must be"):
            call(wrong)


@pytest.mark.parametrize("name", ["k", "num_steps", "batch_size"])
@pytest.mark.parametrize("wrong", [5.5, 5.0, "5", b"5", True, torch.tensor(5.0), torch.tensor([5]), np.array([5, 6]), [5], 5j])
def test_counts_are_whole_numbers(numbered, name, wrong):
    with pytest.raises(InputError, match=f"{name} must be an integer, but got"):
        numbered.recommend([[5]], **{name: wrong})
    assert len(numbered.recommend([[5]], **{name: np.int64(2)}).ids[0]) == (2 if name == "k" else 10)


def test_ids_that_occur_twice_are_refused(model):
    for ids in ([0, 1, *range(1, N)], ["", "1", 1, *range(2, N)], [0, 1.0, *range(1, N)]):
        with pytest.raises(InputError, match=r"'?1'? occurs twice"):
            Recommender(model, ids)


def test_ids_of_an_array_come_back_as_plain_numbers(model):
    for ids in (np.arange(N + 1), torch.arange(N + 1), np.arange(N + 1.0)):
        found = Recommender(model, ids).recommend([[5]]).ids[0]
        assert set(map(type, found)) == {int}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_is_loaded_in_the_precision_asked_for(precision, tmp_path):
    train_run.train(tmp_path / "run", ("spt",), spt_epochs=1)
    recommender = serve.load(tmp_path / "run", "cpu", precision=precision)
    assert recommender.model.bf16 is (precision == "bf16")
    assert recommender.recommend([recommender.item_ids[:3]], k=5).scores.dtype == torch.float32
    with pytest.raises(InputError, match="precision must be one of fp32, bf16, but got 'fp16'"):
        serve.load(tmp_path / "run", "cpu", precision="fp16")
