"""A damaged file of a run raises an error that names it, or is read as the intact file: never as another model."""

import errno
import json
import os
import random
import shutil
from pathlib import Path

import pyarrow.parquet
import pytest
import torch

from lares_fast import serve
from lares_fast._errors import InputError
from lares_fast._finite import NotFiniteError
from lares_fast._weights import load_weights, save_weights
from lares_fast.cli import settings
from lares_fast.train import Trainer
from lares_fast.train.checkpoint import load_state, save_state
from lares_fast.train.folder import RunFolder
from lares_fast.train.state import load_run
from tests.reliability import corrupt, corrupt_tables
from tests.reliability.counts import Counts
from tests.support import train_run
from tests.support.damage import configured, finished_run, results, served


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return the folder of a finished run of both phases with its settings."""
    return finished_run(tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run")


def test_a_flipped_bit_in_a_weight_names_the_checksum(copy):
    for name, read in (("state.pt", lambda folder: load_run(folder / "state.pt")), ("model.safetensors", served)):
        path = copy / name
        data = bytearray(path.read_bytes())
        # In both files, the middle byte belongs to the weights.
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        with pytest.raises(InputError, match=rf"{name} is damaged .*checksum"):
            read(copy)


def test_tampered_parts_of_a_state_are_refused(run, copy):
    """No entry of the state is replaced by a default value."""
    whole = load_state(run / "state.pt")
    del whole["format"]
    (copy / "state.previous.pt").unlink()
    for key in set(whole) - {"settings", "seconds", "waited", "files"}:
        save_state(copy / "state.pt", {name: value for name, value in whole.items() if name != key})
        with pytest.raises(InputError, match=rf"state\.pt .*lacks '{key}'"):
            Trainer(train_run.config(spt_epochs=1, rpt_epochs=1), train_run.log(), train_run.split(), copy)
    weights = whole["model"]
    name = next(iter(weights))
    nan = {**weights, name: torch.full_like(weights[name], torch.nan)}
    wrong = {
        "phase": ["xyz", 3, None],
        "step": [-1, 1.5, True, None],
        "best_value": [float("nan"), "high", None],
        "history": [{}, [1], [{"phase": "spt"}]],
        "sums": [{"loss": float("inf")}, []],
        "model": [{}, {"other": weights[name]}, {**weights, name: weights[name][:1]}, {**weights, name: 3}, nan],
        "start": [None, {"other": weights[name]}, nan],
        "best": [{"other": weights[name]}, nan, 5],
        "optimizer": [{}, {"state": {}, "param_groups": []}, {"state": [], "param_groups": []}, {"state": {0: {"step": "x"}}}],
        "kept": [{"users": torch.zeros(2)}, {"users": torch.zeros(2), "ends": torch.zeros(3)}],
        "identity": [{}, {**whole["identity"], "model": None}],
        "settings": [3, None],
        "files": [3, None, {}, {"model": "", "events": "", "events_bytes": "x"}, {**whole["files"], "steps": {"spt": 3}}],
    }
    for key, values in wrong.items():
        for value in values:
            save_state(copy / "state.pt", {**whole, key: value})
            with pytest.raises(InputError, match=r"state\.pt"):
                trainer = Trainer(train_run.config(spt_epochs=1), train_run.log(), train_run.split(), copy)
                trainer.run(train_run.BOTH)


def test_files_of_an_earlier_version_are_read(run, copy):
    """The metadata of such files holds only the configuration, and no checksum."""
    from safetensors.torch import save_file

    weights, config = load_weights(run / "model.safetensors")
    save_file(weights, copy / "model.safetensors", {"lares_fast-1": json.dumps(config.to_dict())})
    assert served(copy)[:3] == served(run)[:3]
    assert serve.load_about(copy)[1] == {}
    text = (run / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.partition("\n")[2])
    assert settings.build(copy / "config.yaml") == settings.build(run / "config.yaml")


def test_an_edited_configuration_says_how_to_change_settings(copy):
    path = copy / "config.yaml"
    path.write_text(path.read_text().replace("epochs: 1", "epochs: 7"))
    with pytest.raises(InputError, match=r"config\.yaml .*damaged.*: undo the edit and change settings with --set"):
        settings.build(path)
    assert settings.build(without_checksum(path)).spt.epochs == 7


def without_checksum(path):
    """Remove the first line, so that the file counts as written by the user, and return its path."""
    path.write_text(path.read_text().partition("\n")[2])
    return path


@pytest.mark.parametrize(
    "entry",
    ["[]", "3", '"x"', "{}", '{"config": 3}', '{"n_items": "x"}', "[" * 100_000, '{"n_items": 61, "hidden_size": 1e9}',
     '{"n_items": 61, "mean_depth": "x"}', '{"n_items": 61, "mean_depth": 2.5}', '{"n_items": 61, "dropout": true}'],
)  # fmt: skip
def test_odd_metadata_is_refused(run, copy, entry):
    from safetensors.torch import save_file

    weights, _ = load_weights(run / "model.safetensors")
    save_file(weights, copy / "model.safetensors", {"lares_fast-1": entry})
    with pytest.raises(InputError, match=r"model\.safetensors"):
        serve.load(copy)


def test_a_size_that_the_weights_do_not_have_takes_no_memory(run, copy):
    from safetensors.torch import save_file

    weights, config = load_weights(run / "model.safetensors")
    for changes in (
        {"hidden_size": 2**40},
        {"inner_size": 2**50},
        {"n_items": 2**45},
        {"n_pre_layers": 10**9},
        {"max_len": 10**12},
    ):
        save_file(weights, copy / "model.safetensors", {"lares_fast-1": json.dumps({**config.to_dict(), **changes})})
        with pytest.raises(InputError, match=r"model\.safetensors does not fit"):
            serve.load(copy)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "9" * 5000, '["", ' + "9" * 5000 + "]", "{}", "null", "[1, 1, 1]", '["' + "\\ud800" + '"]', "\x00"]
)
def test_odd_item_ids_are_refused(copy, text):
    weights, config = load_weights(copy / "model.safetensors")
    save_weights(copy / "model.safetensors", weights, config)
    (copy / "item_ids.json").write_text(text)
    with pytest.raises(InputError, match=r"item_ids\.json"):
        serve.load(copy)


@pytest.mark.parametrize("odd", [[True], [None], [1.5], [[1]], [{}]])
def test_ids_that_training_cannot_have_written_are_refused(copy, odd):
    weights, config = load_weights(copy / "model.safetensors")
    save_weights(copy / "model.safetensors", weights, config)
    (copy / "item_ids.json").write_text(json.dumps([*range(config.n_items - 1), *odd]))
    with pytest.raises(InputError, match=r"item_ids\.json"):
        serve.load(copy)


def test_weights_that_are_not_finite_are_neither_written_nor_served(run, copy):
    from safetensors.torch import save_file

    weights, config = load_weights(run / "model.safetensors")
    for value in (float("nan"), float("inf"), 1e30):
        bad = {**weights, "input_norm.weight": torch.full_like(weights["input_norm.weight"], value)}
        if value != 1e30:
            with pytest.raises(NotFiniteError, match="not finite"):
                save_weights(copy / "other.safetensors", bad, config)
            assert not (copy / "other.safetensors").exists()
        save_file(bad, copy / "model.safetensors", {"lares_fast-1": json.dumps(config.to_dict())})
        with pytest.raises(InputError, match=r"model\.safetensors holds weights"):
            serve.load(copy)


@pytest.mark.parametrize("harm", ["missing model", "cut model", "missing ids", "other ids", "another model"])
def test_a_finished_run_repairs_its_exported_files(run, copy, harm):
    model, ids = copy / "model.safetensors", copy / "item_ids.json"
    match harm:
        case "missing model":
            model.unlink()
        case "cut model":
            model.write_bytes(model.read_bytes()[:-5])
        case "missing ids":
            ids.unlink()
        case "other ids":
            ids.write_text(ids.read_text().replace("9", "8"))
        case "another model":
            weights, config = load_weights(model)
            save_weights(model, {name: value + 1 for name, value in weights.items()}, config)
    train_run.train(copy, spt_epochs=1, rpt_epochs=1)
    for name in ("model.safetensors", "item_ids.json"):
        assert (copy / name).read_bytes() == (run / name).read_bytes()


# The older state


def test_a_damaged_or_missing_state_costs_one_checkpoint(copy, tmp_path):
    """The run continues from the state before it, says so, keeps that state until a new one is whole, and ends the same."""
    whole = results(copy)
    harms = (Path.unlink, lambda path: path.write_bytes(b""), lambda path: path.write_bytes(path.read_bytes()[:-9]))
    for number, harm in enumerate(harms):
        folder, seen = shutil.copytree(copy, tmp_path / str(number)), []
        newest, older = folder / "state.pt", folder / "state.previous.pt"
        harm(newest)
        kept = older.read_bytes()
        trainer = Trainer(train_run.config(spt_epochs=1, rpt_epochs=1), train_run.log(), train_run.split(), folder, seen.append)
        trainer.run(train_run.BOTH)
        # The results of the newer state get a notice too.
        text = next(event["text"] for event in seen if event["event"] == "notice")
        assert str(newest) in text and "state.previous.pt" in text
        assert text in [json.loads(line).get("text") for line in (folder / "events.jsonl").read_text().splitlines()]
        assert results(folder) == whole
        assert older.read_bytes() == kept and load_run(newest)


def test_two_states_are_kept_on_every_file_system(tmp_path, monkeypatch):
    """Without hard links, the older state gets its name by a move."""

    def refuse(*_):
        raise OSError(errno.EPERM, "no links")

    for links in (True, False):
        folder = tmp_path / str(links)
        folder.mkdir()
        if not links:
            monkeypatch.setattr(os, "link", refuse)
        for number in range(4):
            save_state(folder / "state.pt", {"number": number}, folder / "state.previous.pt")
            assert load_state(folder / "state.pt")["number"] == number
            assert not number or load_state(folder / "state.previous.pt")["number"] == number - 1
        assert len(list(folder.iterdir())) == 2


def test_a_write_that_fails_leaves_both_states(tmp_path):
    for number in range(2):
        save_state(tmp_path / "state.pt", {"number": number}, tmp_path / "state.previous.pt")
    with pytest.raises(Exception, match="pickle"):
        save_state(tmp_path / "state.pt", {"number": lambda: None}, tmp_path / "state.previous.pt")
    found = [load_state(tmp_path / name)["number"] for name in ("state.pt", "state.previous.pt")]
    assert found == [1, 0] and len(list(tmp_path.iterdir())) == 2


def test_two_damaged_states_are_named_in_one_sentence(copy):
    for name in ("state.pt", "state.previous.pt"):
        (copy / name).write_bytes(b"")
    with pytest.raises(InputError, match=r"state\.pt is not .*, and .*state\.previous\.pt is not .*: continue from a copy"):
        RunFolder(copy).load()


def test_a_new_run_does_not_start_from_the_older_state_of_another(copy, tmp_path):
    (copy / "state.pt").unlink()
    trainer = Trainer(train_run.config(), train_run.log(), train_run.split(), tmp_path / "new")
    with pytest.raises(InputError, match=r"state\.pt does not exist: lares-fast train --resume .* from state\.previous\.pt"):
        trainer.start_from(copy)


@pytest.mark.parametrize("name", ["state.pt", "state.previous.pt", "metrics.csv", "events.jsonl", "model.safetensors"])
def test_a_folder_in_the_place_of_a_file_is_refused_at_once(copy, name):
    (copy / name).unlink()
    (copy / name).mkdir()
    with pytest.raises(InputError, match=rf"{name} is not a file: move it away"):
        train_run.train(copy, spt_epochs=1, rpt_epochs=1)


# The harness of random damage


def test_the_harness_counts_a_reader_without_a_checksum(run, tmp_path, monkeypatch):
    def metadata(path, text, weights):
        return json.loads(text)["config"], json.loads(text)["about"]

    stored = served(run)[3]["item_ids"]
    plants = {
        "state.pt": ("zipfile.ZipFile.testzip", lambda self: None),
        "model.safetensors": ("lares_fast._weights._verified", metadata),
        "item_ids.json": ("lares_fast._model_folder.sha256", lambda data: stored),
        "config.yaml": ("lares_fast.train.config_file._verified", lambda path, text: text.partition("\n")[2]),
        "metrics.csv": ("lares_fast.train.folder.RunFolder.mend", lambda self, saved: []),
        "events.jsonl": ("lares_fast.train.folder.RunFolder.mend", lambda self, saved: []),
    }
    measures = {
        "state.pt": lambda counts: corrupt.damage_state(counts, run, 5),
        "model.safetensors": lambda counts: corrupt.damage_file(counts, run, "model.safetensors", served, 5),
        "item_ids.json": lambda counts: corrupt.damage_file(counts, run, "item_ids.json", served, 5),
        "config.yaml": lambda counts: corrupt.damage_file(counts, run, "config.yaml", configured, 60),
        "metrics.csv": lambda counts: corrupt.damage_results(counts, run, 5),
        "events.jsonl": lambda counts: corrupt.damage_events(counts, run, 5),
    }
    for name, measure in measures.items():
        with monkeypatch.context() as patch:
            patch.setattr(*plants[name])
            counts = Counts("corrupt")
            measure(counts)
        assert counts.rows[name].lost and not counts.passed, name
    # Without the plant, the same tries pass.
    counts = Counts("corrupt")
    measures["model.safetensors"](counts)
    assert counts.passed


def test_the_harness_counts_pages_without_a_checksum(tmp_path, monkeypatch):
    path = corrupt_tables.foreign(tmp_path, True)[0]
    whole = pyarrow.parquet.ParquetFile

    def without_checksums(*arguments, page_checksum_verification, **options):
        return whole(*arguments, **options)

    for verified in (True, False):
        if not verified:
            monkeypatch.setattr(pyarrow.parquet, "ParquetFile", without_checksums)
        counts = Counts("corrupt")
        corrupt_tables.damage(counts, corrupt_tables.CHECKED, path, corrupt_tables._NAMES, 20, random.Random(0))
        assert counts.passed == verified


def test_a_parquet_file_that_lacks_rows_is_refused(tmp_path, monkeypatch):
    """No checksum covers the footer, where a flipped bit can hide rows."""
    path = corrupt_tables.foreign(tmp_path, False)[0]
    whole = pyarrow.parquet.ParquetFile.iter_batches
    monkeypatch.setattr(
        pyarrow.parquet.ParquetFile, "iter_batches", lambda self, **options: (part[:-1] for part in whole(self, **options))
    )
    with pytest.raises(InputError, match="is damaged: it counts 600 rows, but holds 599"):
        corrupt_tables.content_of(path, corrupt_tables._NAMES)
