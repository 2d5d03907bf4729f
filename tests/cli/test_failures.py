"""Errors outside the input: interruptions, a folder in use, missing memory, diverging runs, pipes, bugs."""

import os
import shutil
import signal
import threading
from pathlib import Path

import pytest

import lares_fast
from lares_fast import _files as files
from lares_fast.train.checkpoint import load_state
from tests.support.command_line import metrics_csv, python, refused, results_of


def test_a_folder_in_use_is_one_sentence(cli, runs, tmp_path, small_settings):
    run, log = runs["integers"]
    copy = shutil.copytree(run, tmp_path / "copy")
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    with files.locked(copy):
        assert refused(cli("train", "--resume", copy, "--set", "spt.lr=0.5"), "copy is in use")
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    # This holds for a new run too: the second run writes no settings into the folder of the first.
    with files.locked(tmp_path / "new"):
        train = ["train", *small_settings, "--data", log, "--phase", "spt", "--out", tmp_path / "new"]
        assert refused(cli(*train), "new is in use")
        assert [path.name for path in (tmp_path / "new").iterdir()] == [".lock"]
    with files.locked(Path("runs/demo")):
        assert refused(cli("demo"), "in use")


def test_a_diverging_run_is_one_sentence(cli, runs, tmp_path, small_settings):
    _, log = runs["integers"]
    train = ["train", *small_settings, "--data", log, "--phase", "spt", "--out", "run", "--set", "spt.batch_size=100000"]
    result = cli(*train, "--set", "spt.lr=1e30")
    assert refused(result, "spt.lr") and "* best" not in result.out
    assert not Path("run/model.safetensors").exists()
    assert cli("train", "--resume", "run", "--phase", "spt", "--set", "spt.lr=0.001").code == 0
    assert cli("recommend", "--run", "run", "--item", "5").code == 0


@pytest.mark.parametrize("setting", ["model.hidden_size=20000000000", "model.inner_size=1000000000000000"])
def test_memory_that_there_is_not_is_one_sentence(cli, runs, setting, small_settings):
    _, log = runs["integers"]
    assert refused(
        cli("train", *small_settings, "--data", log, "--out", "run", "--set", setting),
        "of memory, and",
        "are free: lower",
        setting.partition("=")[0],
    )


def test_other_errors_of_the_program_are_not_hidden(cli, runs, monkeypatch):
    def bug(*_, **__):
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr(lares_fast.Recommender, "recommend", bug)
    with pytest.raises(RuntimeError, match="a bug of ours"):
        cli("recommend", "--run", runs["integers"][0], "--item", "5")


def test_a_fifo_is_no_file_of_a_run(cli, runs, tmp_path):
    """A command must not wait for a process that would write into the pipe."""
    copy = shutil.copytree(runs["integers"][0], tmp_path / "copy")
    for name, command in (
        ("item_ids.json", ["recommend", "--item", "5", "--run"]),
        ("model.safetensors", ["recommend", "--item", "5", "--run"]),
        ("config.yaml", ["eval", "--run"]),
        ("state.pt", ["train", "--resume"]),
    ):
        kept = (copy / name).read_bytes()
        (copy / name).unlink()
        os.mkfifo(copy / name)
        result = list[object]()
        thread = threading.Thread(target=lambda r=result, words=(*command, copy): r.append(cli(*words)), daemon=True)
        thread.start()
        thread.join(20)
        assert result and refused(result[0], str(copy))
        (copy / name).unlink()
        (copy / name).write_bytes(kept)
    os.mkfifo(tmp_path / "fifo.yaml")
    assert refused(cli("train", "--config", tmp_path / "fifo.yaml"), "fifo.yaml")


def test_advice_names_the_command(cli):
    assert refused(cli("train", "--epochs", "3"), "--epochs", "lares-fast train --help")
    assert refused(cli("eval", "--epochs", "3"), "lares-fast eval --help")


@pytest.mark.parametrize("how", ["SIGTERM", "SIGHUP", "closed output"])
def test_a_run_is_saved_and_says_how_to_resume(cli, small_settings, log_file, tmp_path, how):
    out = tmp_path / "cut"
    endless = ["--set", "spt.epochs=100000", "--set", "spt.patience=100000"]
    # Below nohup, the signal would be ignored.
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    running = python("-m", "lares_fast", "train", *small_settings, *endless, "--data", log_file, "--out", out)
    signal.signal(signal.SIGHUP, before)
    for line in running.stdout:
        if line.startswith("SPT epoch 2 "):
            if how == "closed output":
                running.stdout.close()
                running.stdout = None
            else:
                running.send_signal(getattr(signal, how))
            break
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130, err
    assert f"stopped and saved; resume with: lares-fast train --resume {out}" in err and "Traceback" not in err
    assert load_state(out / "state.pt")["epoch"] >= 1
    resumed = cli("train", "--resume", out, "--set", "spt.epochs=2")
    assert resumed.code == 0 and "LARES rpt T=2" in results_of(resumed.out, "history masked")
    epochs = [row["epoch"] for row in metrics_csv(out) if (row["phase"], row["split"]) == ("spt", "valid")]
    # Each epoch has two rows, for the history masked and not masked. No epoch was trained twice.
    assert len(epochs) == len(set(epochs)) * 2


def test_a_picture_that_cannot_be_drawn_does_not_end_the_run(small_settings, log_file, tmp_path, monkeypatch):
    """The user's settings of matplotlib may be wrong, or may need LaTeX."""
    monkeypatch.setenv("MPLBACKEND", "unknown")
    words = ["train", *small_settings, "--phase", "spt", "--data", log_file, "--out", tmp_path / "run"]
    running = python("-m", "lares_fast", *words)
    out, err = running.communicate(timeout=60)
    assert (running.returncode, "next     lares-fast recommend" in out) == (0, True), err
    assert err.startswith("lares-fast: results.svg is not drawn, because matplotlib raised")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_the_first_state(cli, small_settings, log_file, monkeypatch, number):
    monkeypatch.setattr("lares_fast.cli.training.split_log", lambda *_: os.kill(os.getpid(), number))
    result = cli("train", *small_settings, "--data", log_file, "--out", "run")
    assert (result.code, result.written) == (130, [])
    assert result.err == "lares-fast: aborted before a state was saved; begin the run again.\n"


def test_an_aborted_run_says_how_to_resume(cli, damaged, monkeypatch):
    """The second Ctrl-C aborts."""

    def press_twice(trainer, _):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("lares_fast.train.Trainer.run", press_twice)
    result = cli("train", "--resume", damaged)
    assert result.code == 130
    last = f"lares-fast: aborted; resume from the last saved state with: lares-fast train --resume {damaged}"
    assert result.err.splitlines()[-1] == last


def test_sigterm_removes_a_partly_written_output(cli, runs, monkeypatch):
    monkeypatch.setattr(lares_fast.Recommender, "recommend", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    result = cli("recommend", "--run", runs["integers"][0], "--item", "5", "--output", "out.csv")
    assert (result.code, result.written) == (130, [])
