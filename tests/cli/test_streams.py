"""Standard streams that are closed, or that cannot show a character; and commands in messages, which a shell reads."""

import io
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lares_fast
from lares_fast._errors import InputError, LaresFastError, with_path
from lares_fast.cli import main
from lares_fast.cli.streams import unknown_characters
from lares_fast.train.folder import foreign_model

# Prints a notice, opens a file, and has a child print to both streams.
CLOSED = """
import os, subprocess, sys
from lares_fast.cli.streams import open_missing
open_missing()
first = open("first", "wb", buffering=0)
print("notice", file=sys.stderr)
print("result")
sys.stdout.flush()
subprocess.run(["sh", "-c", "echo child; echo child >&2; cat"])
assert first.fileno() > 2
"""


@pytest.mark.parametrize("closed", ["", "<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_the_null_device(tmp_path, closed):
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(CLOSED)} {closed}"
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (b"" if ">&-" in closed.split() else b"result\nchild\n")
    assert done.stderr == (b"" if "2>&-" in closed else b"notice\nchild\n")
    assert (tmp_path / "first").read_bytes() == b""


def test_a_notice_without_stderr_is_not_among_the_results(cli, monkeypatch, runs):
    monkeypatch.setattr(sys, "stderr", None)
    Path("in.csv").write_text("user_id,item_id,timestamp\n1,5,1\n1,unknown,2\n")
    result = cli("recommend", "--run", runs["texts"][0], "--input", "in.csv", "--k", "1")
    assert result.code == 0 and "lares-fast:" not in result.out and result.out.startswith("user,rank,item,score\n")


def latin(monkeypatch, errors="strict"):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="latin-1", errors=errors)
    monkeypatch.setattr(sys, "stdout", stream)
    return stream


def test_a_name_that_the_output_cannot_show_is_escaped(monkeypatch, runs, tmp_path):
    """A run that has succeeded must not end with an error because of the name of its folder."""
    run, out = runs["integers"][0], tmp_path / "n日.csv"
    stream = latin(monkeypatch)
    assert main(["recommend", "--run", str(run), "--item", "5", "--output", str(out)]) == 0 and out.is_file()
    stream.flush()
    assert b"n\\u65e5.csv: 1 user" in stream.buffer.getvalue() and stream.errors == "strict"


def test_an_id_that_the_output_cannot_show_is_an_error(monkeypatch, capsys, runs, tmp_path):
    monkeypatch.chdir(tmp_path)
    stream = latin(monkeypatch)
    Path("in.csv").write_text("user_id,item_id,timestamp\nn日,n5,1\n", encoding="utf-8")
    assert main(["recommend", "--run", str(runs["texts"][0]), "--input", "in.csv"]) == 2
    assert "PYTHONIOENCODING" in capsys.readouterr().err and stream.errors == "strict"


def test_the_handler_that_the_user_chose_stays(monkeypatch):
    stream = latin(monkeypatch, errors="replace")
    with unknown_characters("backslashreplace"):
        assert stream.errors == "replace"
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with unknown_characters("backslashreplace"):
        pass


@pytest.mark.parametrize("path", ["run", "my  run", "-x", "it's", "$HOME", "-- a;b"])
def test_a_shell_reads_the_path_of_a_message(path):
    words = shlex.split(f"lares-fast train {with_path('--resume', path)}")
    assert words[2:] == (["--resume", path] if not path.startswith("-") else [f"--resume={path}"])


def test_messages_keep_the_spaces_of_a_path(cli, monkeypatch, runs, tmp_path):
    def stopped(*_, **__):
        raise LaresFastError(f"resume with: {with_path('--resume', 'my  run')}\n  now")

    monkeypatch.setattr("lares_fast.cli.training.train", stopped)
    assert cli("train", "--config", "tiny").err == "lares-fast: error: resume with: --resume 'my  run' now\n"


def test_advice_quotes_the_folder(cli, runs, tmp_path):
    folder = Path(shutil.copytree(runs["integers"][0], tmp_path / "my  run"))
    shutil.copy(runs["texts"][0] / "model.safetensors", folder)
    assert f"lares-fast train --resume '{folder}' writes it again" in (foreign_model(folder) or "")
    with pytest.raises(InputError, match=f"--resume '{folder}' writes it again"):
        lares_fast.load(folder)
    assert f"continue it with --resume '{folder}'" in cli("train", "--config", "tiny", "--out", folder).err
