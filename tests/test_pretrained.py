"""A model that was trained anywhere is saved in a folder that everything accepts."""

import json
import shutil

import pytest
import torch

import lares_fast
from lares_fast import LARES, LARESConfig
from lares_fast._errors import InputError
from lares_fast.train import Trainer
from tests.support import train_run

IDS = ["", *(f"item, {row}" for row in range(1, 61))]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LARES(LARESConfig(n_items=61, **train_run.MODEL)).eval()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("saved") / "model"
    lares_fast.save(model, IDS, out)
    return out


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def assert_equal(one, other):
    assert one.config == other.config
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_a_model_comes_back(model, folder, tmp_path):
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "item_ids.json", "model.safetensors"]
    found = LARES.from_pretrained(folder)
    assert_equal(found, model)
    assert not found.training
    assert LARES.from_pretrained(str(folder), backend="reference", bf16=True).backend == "reference"
    # Raw ids are needed for recommendations only.
    found.train().save_pretrained(tmp_path / "bare")
    assert not (tmp_path / "bare" / "item_ids.json").exists() and found.training
    assert_equal(LARES.from_pretrained(tmp_path / "bare"), model)
    with pytest.raises(InputError, match=r"item_ids\.json"):
        lares_fast.load(tmp_path / "bare")


def test_load_and_recommender_take_it(model, folder):
    histories = [["item, 3", "item, 9"]]
    expected = lares_fast.Recommender(model, IDS).recommend(histories, 5)
    found = lares_fast.load(folder, "cpu").recommend(histories, 5)
    assert found.ids == expected.ids and torch.equal(found.scores, expected.scores)


def test_the_command_line_takes_it(folder, tmp_path, capsys):
    from lares_fast.cli import main

    assert main(["recommend", "--run", str(folder), "--item", "item, 3", "--k", "2"]) == 0
    assert capsys.readouterr().out.count("history,") == 2
    assert main(["eval", "--run", str(folder)]) == 2
    assert "--data FILE" in capsys.readouterr().err
    log = train_run.log()
    rows = [f'{user},"item, {item}",{place}' for user in range(log.n_users) for place, item in enumerate(log.history(user))]
    path = tmp_path / "log.csv"
    path.write_text("\n".join(["user_id,item_id,timestamp", *rows]))
    read = lares_fast.data.read_log(path)
    lares_fast.save(LARES.from_pretrained(folder), read.item_ids.tolist(), tmp_path / "model")
    assert main(["eval", "--run", str(tmp_path / "model"), "--data", str(path), "--steps", "1"]) == 0
    assert "LARES test T=1" in capsys.readouterr().out


def test_a_run_folder_is_such_a_folder(tmp_path):
    trainer = train_run.train(tmp_path, ("spt",), spt_epochs=1)
    best = trainer.state.progress.best
    found = LARES.from_pretrained(tmp_path)
    assert all(torch.equal(value, best[name]) for name, value in found.state_dict().items())


def test_training_starts_from_it(model, tmp_path):
    log = train_run.log()
    ids = log.item_ids.tolist()
    # The model knows one item that the log lacks, and the log has one that the model lacks.
    lares_fast.save(model, [*ids[:-1], 10**6], tmp_path / "model")
    events = []
    trainer = Trainer(train_run.config(spt_epochs=1), log, train_run.split(), tmp_path / "run", events.append)
    trainer.start_from(tmp_path / "model")
    table, theirs = trainer.model.item_embedding.weight, model.item_embedding.weight
    assert torch.equal(table[:-1], theirs[:-1]) and not torch.equal(table[-1], theirs[-1])
    assert torch.equal(trainer.model.position_embedding.weight, model.position_embedding.weight)
    trainer.run(("spt",))
    (event,) = [event for event in events if event["event"] == "warm_start"]
    assert (event["kept"], event["new"], event["missing"]) == (len(ids) - 2, 1, 1)
    other = Trainer(train_run.config(model={"dropout": 0.3}), log, train_run.split(), tmp_path / "other")
    with pytest.raises(InputError, match=r"dropout is 0\.5 there and 0\.3 here"):
        other.start_from(tmp_path / "model")


def test_a_file_of_another_program_is_read_with_its_configuration(model, tmp_path):
    """PyTorchModelHubMixin writes plain weights, and the arguments of the class as config.json."""
    from safetensors.torch import save_file

    save_file(model.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="was not written by lares_fast"):
        LARES.from_pretrained(tmp_path)
    for values in (
        model.config.to_dict(),
        {"config": model.config.to_dict()},
        {"model_type": "lares", **model.config.to_dict()},
    ):
        (tmp_path / "config.json").write_text(json.dumps(values))
        assert_equal(LARES.from_pretrained(tmp_path), model)
    (tmp_path / "config.json").write_text(json.dumps(model.config.replace(hidden_size=32).to_dict()))
    with pytest.raises(InputError, match="does not fit the configuration beside it"):
        LARES.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "harm", "text"),
    [
        ("config.json", lambda data: data.replace(b'"tau": 1.0', b'"tau": 2.0'), "has other settings than"),
        ("config.json", lambda data: data[:-9], "is not the configuration of a model"),
        ("config.json", lambda data: b"[" * 5000, "is not the configuration of a model"),
        ("config.json", lambda data: b"3", "is not the configuration of a model"),
        ("model.safetensors", lambda data: data[:-1], "model.safetensors"),
        ("model.safetensors", lambda data: data[:-8] + bytes(8), "checksum is wrong"),
        ("item_ids.json", lambda data: data.replace(b"item, 9", b"item, 8"), "has another checksum for it"),
        ("item_ids.json", lambda data: b"", "has another checksum for it"),
    ],
)
def test_damage_is_found(copy, name, harm, text):
    path = copy / name
    before = path.read_bytes()
    path.write_bytes(harm(before))
    assert path.read_bytes() != before
    with pytest.raises(InputError, match=text):
        lares_fast.load(copy, "cpu")


def test_what_cannot_be_saved(model, tmp_path):
    with pytest.raises(InputError, match="occurs twice"):
        lares_fast.save(model, ["", *["a"] * 60], tmp_path / "x")
    with pytest.raises(InputError, match="must have 61 entries"):
        lares_fast.save(model, ["", "a"], tmp_path / "x")
    with pytest.raises(InputError, match="does not exist"):
        LARES.from_pretrained(tmp_path / "nowhere")
    assert not (tmp_path / "x").exists()
