"""The log of today continues the model of yesterday, from the command line."""

from tests.support.command_line import events, refused, write_csv


def test_start_from_a_run_on_the_log_of_yesterday(cli, runs, tmp_path, small_settings):
    run, log = runs["texts"]
    names = {"n1": "new, 1", "n2": "new 2", "n3": "new 3"}
    rows = [(user, names.get(item, item), time) for user, item, time in events(lambda number: f"n{number}")]
    today = write_csv(tmp_path / "today.csv", [(user, f'"{item}"', time) for user, item, time in reversed(rows)])
    start = ["train", *small_settings, "--data", today, "--start-from", run, "--phase", "spt"]
    result = cli(*start, "--out", "today")
    assert result.code == 0
    numbers = "37 items keep their rows, 3 new items begin like those of a new model, and 3 items are not in this log"
    assert numbers in result.out
    assert cli("recommend", "--run", "today", "--item", "new, 1", "--item", "n7").code == 0
    other = cli(*start, "--out", "other", "--set", "model.mean_depth=5")
    assert refused(other, "another model", "mean_depth is", "and 5 here") and "other" not in other.written
    same = cli("train", *small_settings, "--data", log, "--start-from", run, "--phase", "spt", "--out", "same")
    assert same.code == 0 and "another log" not in same.out
