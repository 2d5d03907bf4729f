"""``eval`` and ``recommend`` compare a log with the log and the split that the run was trained on."""

import shutil

import pytest

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

    from lares_fast.train.checkpoint import load_weights

    run, _ = runs["integers"]
    old = shutil.copytree(run, tmp_path / "old")
    weights, config = load_weights(run / "model.safetensors")
    save_file(weights, old / "model.safetensors", {"lares_fast-1": json.dumps(config.to_dict())})
    for command in (["eval", "--steps", "1"], ["recommend", "--user", "1"]):
        result = cli(command[0], "--run", old, *command[1:])
        assert result.code == 0 and "is of an earlier version" in result.err
