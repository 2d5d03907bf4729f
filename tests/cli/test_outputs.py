"""Outputs replace no file of the user: no input, no file of a run, and no file that has the name of one."""

import os
import shutil
from pathlib import Path

import pytest

from lares_fast.cli import outputs
from lares_fast.train.folder import FILES, NEWEST, OLDER
from tests.support.command_line import is_one_sentence


def is_refused(result, *words):
    assert result.code == 2 and is_one_sentence(result.err), result.err
    return all(word in result.err for word in words)


def spellings(path):
    """Return other names of the file ``path``: two spellings, a link, a hard link, and a name in a linked folder."""
    Path("link.csv").symlink_to(path)
    os.link(path, "hard.csv")
    Path("folder").symlink_to(path.parent)
    return [
        os.path.relpath(path),
        f"{path.parent}/../{path.parent.name}/./{path.name}",
        "link.csv",
        "hard.csv",
        f"folder/{path.name}",
    ]


@pytest.fixture
def log(runs, tmp_path):
    """Return a run and a copy of its log, in a folder of its own."""
    run, log = runs["integers"]
    (tmp_path / "logs").mkdir()
    return run, Path(shutil.copy(log, tmp_path / "logs" / "log.csv"))


def test_no_output_is_an_input_or_a_file_of_the_run(cli, log, tmp_path):
    run, log = log
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    before = {path: path.read_bytes() for path in (log, *folder.iterdir())}
    for name in spellings(log):
        assert is_refused(cli("recommend", "--run", folder, "--input", log, "--output", name), "--output", "--input", str(log))
        assert is_refused(
            cli("recommend", "--run", folder, "--user", "1", "--data", log, "--output", name), "--output", "--data"
        )
        assert is_refused(cli("eval", "--run", folder, "--data", log, "--csv", name), "--csv", "--data")
    for name in (*FILES, ".lock"):
        assert is_refused(cli("eval", "--run", folder, "--csv", folder / ".." / "run" / name), "--csv", "--run", name)
    assert is_refused(cli("recommend", "--run", folder, "--item", "5", "--output", folder / "metrics.csv"), "--output", "--run")
    assert {path: path.read_bytes() for path in before} == before


def test_no_output_is_the_log_that_the_run_names(cli, trained, log_file, tmp_path):
    Path("log.csv").symlink_to(log_file)
    assert is_refused(cli("eval", "--run", trained, "--csv", "log.csv"), "--csv", "--run", str(log_file))
    assert is_refused(cli("recommend", "--run", trained, "--user", "u1", "--output", "log.csv"), "--output", "--run")


def test_outputs_beside_the_files_of_a_run(cli, runs, tmp_path):
    folder = Path(shutil.copytree(runs["integers"][0], tmp_path / "run"))
    answers = folder / "answers.csv"
    for _ in range(2):
        assert cli("recommend", "--run", folder, "--item", "5", "--output", answers).code == 0 and answers.is_file()


def test_a_new_run_replaces_no_file_of_the_user(cli, log_file, small_settings, tmp_path):
    train = ["train", *small_settings, "--data", log_file]
    Path("mine.yaml").write_text("spt: {epochs: 1}\n")
    for name in (name for name in FILES if name not in (NEWEST, OLDER)):
        out = tmp_path / name.replace(".", "-")
        out.mkdir()
        (out / name).write_text("mine")
        assert is_refused(cli(*train, "--out", out), "--out", str(out), name)
        assert is_refused(cli("demo", "--out", out), "--out", str(out))
        assert [path.name for path in out.iterdir()] == [name] and (out / name).read_text() == "mine"
    shutil.copy("mine.yaml", "config.yaml")
    assert is_refused(
        cli("train", "--config", "config.yaml", "--data", log_file, "--out", "."), "--out", "--config", "config.yaml"
    )
    for name in (*FILES, ".lock"):
        (tmp_path / "logs").mkdir(exist_ok=True)
        (tmp_path / "logs" / name).symlink_to(log_file)
        assert is_refused(cli(*train, "--out", tmp_path / "logs"), "--out")
        (tmp_path / "logs" / name).unlink()
    assert Path("config.yaml").read_text() == "spt: {epochs: 1}\n"


def test_a_run_that_continues_does_not_replace_its_log(cli, runs, tmp_path):
    folder = Path(shutil.copytree(runs["integers"][0], tmp_path / "run"))
    before = (folder / "metrics.csv").read_bytes()
    assert is_refused(cli("train", "--resume", folder, "--data", folder / "metrics.csv"), "--resume", "--data", "metrics.csv")
    assert (folder / "metrics.csv").read_bytes() == before


def test_a_run_that_was_killed_before_its_first_state_begins_again(cli, log_file, small_settings, tmp_path, monkeypatch):
    """The folder may hold other files, and the configuration may come from another run."""
    Path("run").mkdir()
    Path("run/notes.txt").write_text("mine")

    def killed(*_):
        raise KeyboardInterrupt

    train = ["train", *small_settings, "--data", log_file, "--out", "run"]
    with monkeypatch.context() as patch:
        patch.setattr("lares_fast.train.trainer.rank_baselines", killed)
        assert cli(*train).code == 130 and {path.name for path in Path("run").iterdir()} == {"config.yaml", "notes.txt"}
    shutil.copytree("run", "other")
    monkeypatch.setattr("lares_fast.cli.training.train", lambda *_, **__: None)
    assert cli(*train).code == 0 and cli("train", "--config", "other/config.yaml", "--out", "run").code == 0
    assert is_refused(cli("train", "--config", "run/config.yaml", "--out", "run"), "--out", "--config")


def test_the_results_of_gpu_bench_replace_nothing(cli, tmp_path):
    Path("table.txt").write_text("mine")
    assert is_refused(cli("gpu-bench", "--rehearse", "--out", "."), "--out", "table.txt")
    assert is_refused(cli("gpu-bench", "--rehearse", "--out", ".", "--log", "table.txt"), "--out", "--log")


def test_a_file_that_does_not_exist_yet():
    """A file that is not there yet is compared by its real path."""
    with pytest.raises(ValueError, match="--out would replace"):
        outputs.require_apart("--out", [Path("a/../b")], {"--in": [Path("b")]})
    outputs.require_apart("--out", [Path("a")], {"--in": [Path("b"), None]})
