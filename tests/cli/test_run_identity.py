"""``eval`` and ``recommend`` compare a log with the log and the split that the run was trained on."""

import shutil

import pytest

from lares_fast._errors import InputError
from lares_fast.cli.settings import build
from lares_fast.train import DataConfig, RunConfig
from lares_fast.train.config_file import dump
from tests.support.command_line import refused, write_csv


@pytest.mark.parametrize(("name", "split"), [("integers", "temporal"), ("temporal", "leave-one-out")])
def test_eval_refuses_a_split_whose_rows_were_trained_on(cli, runs, name, split):
    run, _ = runs[name]
    assert refused(cli("eval", "--run", run, "--set", f"data.split={split}"), "leak", split, "data.split")
    assert cli("eval", "--run", run, "--steps", "1").code == 0


def test_eval_refuses_other_fractions(cli, runs):
    run, _ = runs["temporal"]
    assert refused(cli("eval", "--run", run, "--set", "data.test_fraction=0.3"), "leak")


@pytest.mark.parametrize("change", ["reversed", "swapped users", "one event fewer", "one event more", "order of two"])
def test_eval_refuses_another_log_of_the_same_items(cli, runs, tmp_path, change):
    run, log = runs["integers"]
    rows = [tuple(map(int, line.split(","))) for line in log.read_text().split()[1:]]
    if change == "reversed":
        rows = [(user, item, -time) for user, item, time in rows]
    elif change == "swapped users":
        rows = [({1: 2, 2: 1}.get(user, user), item, time) for user, item, time in rows]
    elif change == "one event fewer":
        rows.remove(max((row for row in rows if row[0] == 1), key=lambda row: row[2]))
    elif change == "one event more":
        rows.append((1, 1, 10**9))
    else:
        (_, a, first), (_, b, second) = sorted((row for row in rows if row[0] == 1), key=lambda row: row[2])[:2]
        rows = [row for row in rows if row not in ((1, a, first), (1, b, second))] + [(1, a, second), (1, b, first)]
    other = write_csv(tmp_path / "other.csv", rows)
    assert refused(cli("eval", "--run", run, "--data", other), "other.csv has other events")
    assert refused(cli("recommend", "--run", run, "--data", other, "--user", "1"), "other.csv has other events", "--input")


def test_eval_refuses_other_times_where_they_make_the_split(cli, runs, tmp_path):
    run, log = runs["temporal"]
    rows = [line.split(",") for line in log.read_text().split()[1:]]
    shifted = write_csv(tmp_path / "log.csv", [(user, item, int(time) + 500 * (int(user) % 2)) for user, item, time in rows])
    assert refused(cli("eval", "--run", run, "--data", shifted), "temporal")


def test_the_same_log_elsewhere_is_taken(cli, runs, tmp_path):
    """A copy of the run without state.pt, and a log with integer ids whose rows are sorted in another way."""
    run, log = runs["integers"]
    copy = shutil.copytree(run, tmp_path / "copy")
    (copy / "state.pt").unlink()
    rows = sorted(log.read_text().split()[1:])
    other = write_csv(tmp_path / "sorted.csv", [line.split(",") for line in rows])
    expected = cli("eval", "--run", run, "--steps", "1")
    found = cli("eval", "--run", copy, "--steps", "1", "--data", other)
    assert (found.code, found.err) == (0, "") and found.out.splitlines()[2:] == expected.out.splitlines()[2:]


def test_texts_whose_rows_are_sorted_otherwise(cli, runs, tmp_path):
    """String ids are then numbered in another order. ``recommend`` needs raw ids only, and ``eval`` explains the problem."""
    run, log = runs["texts"]
    other = write_csv(tmp_path / "sorted.csv", [line.split(",") for line in sorted(log.read_text().split()[1:])])
    expected = cli("recommend", "--run", run, "--user", "n7")
    assert expected.code == 0 and cli("recommend", "--run", run, "--user", "n7", "--data", other).out == expected.out
    assert refused(cli("eval", "--run", run, "--data", other), "items of the run", "another order", "sort its rows")


def test_a_run_of_an_earlier_version_is_taken_with_a_notice(cli, runs, tmp_path):
    import json

    from safetensors.torch import save_file

    from lares_fast._weights import load_weights

    run, _ = runs["integers"]
    old = shutil.copytree(run, tmp_path / "old")
    weights, config = load_weights(run / "model.safetensors")
    save_file(weights, old / "model.safetensors", {"lares_fast-1": json.dumps(config.to_dict())})
    for command in (["eval", "--steps", "1"], ["recommend", "--user", "1"]):
        result = cli(command[0], "--run", old, *command[1:])
        assert result.code == 0 and "does not name its log" in result.err


def test_a_whole_model_that_the_state_does_not_name_gives_a_notice(cli, runs, tmp_path):
    from lares_fast._weights import load_weights_about, save_weights

    run, _ = runs["integers"]
    copy = shutil.copytree(run, tmp_path / "copy")
    weights, config, about = load_weights_about(run / "model.safetensors")
    save_weights(copy / "model.safetensors", {name: value * 0.5 for name, value in weights.items()}, config, about)
    for command in (["eval", "--steps", "1"], ["recommend", "--item", "5"]):
        assert "is not the best model that state.pt names" in cli(command[0], "--run", copy, *command[1:]).err
        assert cli(command[0], "--run", run, *command[1:]).err == ""
    # A state that cannot be read names no model.
    (copy / "state.pt").write_bytes(b"")
    assert cli("recommend", "--run", copy, "--item", "5").err == ""
    assert cli("train", "--resume", copy, "--phase", "spt").code == 0
    assert (copy / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()


def test_an_edited_configuration_is_reported_by_every_command(cli, runs, tmp_path):
    run, _ = runs["integers"]
    copy = shutil.copytree(run, tmp_path / "copy")
    path = copy / "config.yaml"
    text = path.read_text()
    path.write_text(text.replace("checkpoint_minutes: 10.0", "checkpoint_minutes: 3.0"))
    assert path.read_text() != text
    for command in (["eval", "--run"], ["recommend", "--user", "1", "--run"], ["train", "--resume"]):
        assert refused(cli(*command, copy), "config.yaml was edited or is damaged: undo the edit", "remove its first line")
    assert refused(cli("train", "--config", path), "config.yaml was edited or is damaged")
    # The remedy works, and the changed setting is announced.
    path.write_text(path.read_text().partition("\n")[2])
    result = cli("train", "--resume", copy, "--phase", "spt")
    assert result.code == 0 and "changed  setting checkpoint_minutes: 10.0 -> 3.0" in result.out


def test_texts_that_look_like_something_else_are_read_again(cli, log_file, small_settings, tmp_path):
    """A checksum, a number or a part of YAML as a text."""
    folder = tmp_path / "sha256" / "#0123456789abcdef"
    folder.mkdir(parents=True)
    rows = [f"u{user},i{(user + n) % 20},{n}" for user in range(20) for n in range(6)]
    (folder / "log.csv").write_text("\n".join(["1e3,item_id,timestamp", *rows]))
    out = tmp_path / "run"
    words = ["--data", folder / "log.csv", "--set", "data.user=1e3", "--phase", "spt", "--out", out]
    assert cli("train", *small_settings, *words).code == 0
    assert cli("recommend", "--run", out, "--user", "u3").code == 0
    for name in ("*x", "a: b", "[x]", "'q'", "2020-01-01", "yes", "1_0", "0x1f", "é"):
        (tmp_path / "other.yaml").write_text(dump(RunConfig(data=DataConfig(user=name))))
        assert build(tmp_path / "other.yaml").data.user == name
    for name in ("null ", "# x", "a\udcff"):
        with pytest.raises(InputError, match=r"config\.yaml cannot hold .* as data\.user: rename"):
            dump(RunConfig(data=DataConfig(user=name)))
    train = ["train", "--data", tmp_path / "a\udcff.csv", "--out", tmp_path / "no"]
    assert refused(cli(*train), "config.yaml", "rename the file") and not (tmp_path / "no").exists()


def test_a_damaged_state_costs_one_checkpoint(cli, runs, tmp_path):
    run, log = runs["integers"]
    copy = shutil.copytree(run, tmp_path / "copy")
    (copy / "state.pt").write_bytes((run / "state.pt").read_bytes()[:-1])
    result = cli("train", "--resume", copy, "--phase", "spt")
    assert result.code == 0 and "the run continues from the checkpoint before it, state.previous.pt" in result.out
    for name in ("state.pt", "state.previous.pt"):
        (copy / name).write_bytes(b"")
    assert refused(
        cli("train", "--resume", copy), "state.pt is not a readable state", "state.previous.pt is not", "from a copy"
    )
    # A folder with the older state alone holds a run too.
    (copy / "state.pt").unlink()
    assert refused(cli("train", "--data", log, "--out", copy), "already holds a run", "--resume")
