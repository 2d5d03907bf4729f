"""Files are written whole or not at all, and one process at a time writes into a run folder."""

import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import lares_fast
from lares_fast import _files as files
from lares_fast._errors import InputError
from lares_fast.train import Trainer
from lares_fast.train.checkpoint import load_state
from tests.support import train_run


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def start(code, *arguments):
    """Start another process, which prints a line when it is ready."""
    root = Path(lares_fast.__file__).parents[1]
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{root}:{root / 'tests'}", "OMP_NUM_THREADS": "1"},
    )


def test_a_link_is_replaced_and_not_followed(tmp_path):
    victim, output = tmp_path / "victim", tmp_path / "out.csv"
    victim.write_text("mine")
    output.symlink_to(victim)
    # An earlier version wrote to this name.
    (tmp_path / ".out.csv.part").symlink_to(victim)
    files.write_text(output, "answers")
    assert victim.read_text() == "mine" and output.read_text() == "answers" and not output.is_symlink()


@pytest.mark.parametrize(("umask", "mode"), [(0o077, 0o600), (0o022, 0o644), (0o002, 0o664)])
def test_the_umask_is_obeyed(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        train_run.train(tmp_path / "run", ("spt",), spt_epochs=1)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "run").iterdir()}
    assert len(modes) == 8 and set(modes.values()) == {mode}, modes


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, InputError, SystemExit])
def test_a_write_that_raises_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(error), files.replacing(path) as file:
        file.write(b"half")
        raise error("stop")
    assert path.read_text() == "old" and names(tmp_path) == ["file"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("there", [False, True])
def test_an_error_of_the_disk_is_reported_in_its_own_words(tmp_path, code, there):
    path = tmp_path / "state.pt"
    if there:
        path.write_text("old")

    class Refusing:
        def write(self, data):
            raise OSError(code, os.strerror(code))

        def flush(self):
            pass

    with pytest.raises(InputError) as error:
        files.atomic_write(path, lambda _: torch.save({"x": torch.zeros(99)}, Refusing()))
    text = str(error.value)
    assert os.strerror(code) in text and "unexpected pos" not in text
    assert ("the previous file is intact" in text) == there
    assert ("free the disk" in text) == (code != errno.EIO)
    assert names(tmp_path) == (["state.pt"] if there else [])


def test_an_error_of_the_program_is_not_called_a_full_disk(tmp_path):
    with pytest.raises(RuntimeError, match="a bug"):
        files.atomic_write(tmp_path / "x", lambda _: (_ for _ in ()).throw(RuntimeError("a bug")))


@pytest.mark.parametrize("where", ["file/below", "folder", "long" * 100])
def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path, where):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="could not be written"):
        files.write_text(tmp_path / where, "x")
    assert names(tmp_path) == ["file", "folder"]


def test_writers_at_the_same_time_never_mix(tmp_path):
    path = tmp_path / "out"

    def write(letter):
        for _ in range(20):
            files.write_text(path, letter * 100_000)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in "abcd"]
    for thread in threads:
        thread.start()
    for _ in range(50):
        if path.exists():
            text = path.read_text()
            assert len(text) == 100_000 and len(set(text)) == 1
    for thread in threads:
        thread.join()
    assert names(tmp_path) == ["out"]


def test_the_lock_is_exclusive_and_leaves_nothing(tmp_path):
    with files.locked(tmp_path / "run"):
        with pytest.raises(InputError, match="run is in use"), files.locked(tmp_path / "run"):
            pass
        with files.locked(tmp_path / "other"):
            pass
    with files.locked(tmp_path / "run"):
        pass
    assert names(tmp_path / "run") == names(tmp_path / "other") == []


def test_a_locked_folder_that_is_replaced_gets_no_file(tmp_path):
    """Another folder takes its place before a write, in the middle of one, and before a line is appended."""
    run, moved = tmp_path / "run", tmp_path / "moved"

    def replace_it():
        run.rename(moved)
        run.mkdir()
        (run / "events.jsonl").write_text("of another run\n")
        (run / "state.previous.pt").write_text("of another run")

    def in_the_middle(file):
        file.write(b"1")
        replace_it()

    def after_another_line():
        replace_it()
        files.append_line(run / "events.jsonl", "2")

    def with_an_older_file(file):
        replace_it()
        files.keep_as(run / "events.jsonl", run / "state.previous.pt")

    for write in (
        lambda: files.atomic_write(run / "state.pt", in_the_middle),
        lambda: (replace_it(), files.write_text(run / "config.yaml", "1")),
        lambda: (replace_it(), files.append_line(run / "new.jsonl", "1")),
        lambda: files.atomic_write(run / "state.pt", with_an_older_file),
        after_another_line,
    ):
        with pytest.raises(InputError, match=r"was moved or removed|could not be written"), files.locked(run):
            files.append_line(run / "events.jsonl", "1")
            write()
        assert names(run) == ["events.jsonl", "state.previous.pt"]
        assert {path.read_text().strip() for path in run.iterdir()} == {"of another run"}
        assert (moved / "events.jsonl").read_text() == "1\n"
        shutil.rmtree(run)
        shutil.rmtree(moved)


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    other = start(
        """
        import sys; from pathlib import Path; from lares_fast import _files as files
        with files.locked(Path(sys.argv[1])):
            print("held", flush=True); sys.stdin.read()
        """,
        tmp_path,
    )
    assert other.stdout.readline() == "held\n"
    with pytest.raises(InputError, match="is in use"), files.locked(tmp_path):
        pass
    other.send_signal(signal.SIGKILL)
    other.communicate()
    assert names(tmp_path) == [".lock"]
    with files.locked(tmp_path):
        pass
    assert names(tmp_path) == []


def test_a_forked_process_leaves_the_lock_to_its_parent(tmp_path):
    """It must not write, does not remove the lock when it ends, and does not hold it when only its parent was killed."""
    run = tmp_path / "run"
    other = start(
        """
        import os, sys; from pathlib import Path; from lares_fast import _files as files
        run = Path(sys.argv[1])
        with files.locked(run):
            if not os.fork():
                try:
                    files.write_text(run / "state.pt", "1")
                except files.InputError as error:
                    print(error, flush=True)
                sys.exit()
            os.wait()
            files.write_text(run / "state.pt", "2")
            if not os.fork():
                print(os.getpid(), flush=True)
            sys.stdin.read()
        """,
        run,
    )
    assert other.stdout.readline().startswith(f"a forked process must not write into {run}")
    child = int(other.stdout.readline())
    assert (run / "state.pt").read_text() == "2"
    with pytest.raises(InputError, match="is in use"), files.locked(run):
        pass
    other.kill()
    other.wait()
    with files.locked(run):
        pass
    os.kill(child, signal.SIGKILL)
    other.communicate()


def test_the_working_directory_may_change_while_a_folder_is_locked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with files.locked(Path("run")):
        monkeypatch.chdir("/")
    assert names(tmp_path / "run") == []


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_gives_a_notice_and_the_run_continues(tmp_path, monkeypatch, code):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    seen = []
    trainer = Trainer(train_run.config(spt_epochs=1), train_run.log(), train_run.split(), tmp_path, seen.append)
    trainer.run(("spt",))
    assert any("has no locks" in event.get("text", "") for event in seen)
    assert ".lock" not in names(tmp_path)


def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "victim")
    with pytest.raises(InputError, match=r"\.lock could not be written"), files.locked(tmp_path / "run"):
        pass
    assert not (tmp_path / "victim").exists()


def test_two_trainers_of_one_folder(tmp_path):
    """While the first one runs, the second raises an error and changes nothing."""
    refused = []

    def trainer(lr, emit=lambda _: None):
        config = train_run.config(spt_epochs=1)
        return Trainer(replace(config, spt=replace(config.spt, lr=lr)), train_run.log(), train_run.split(), tmp_path, emit)

    second = trainer(0.01)

    def meanwhile(event):
        if event["event"] == "step" and not refused:
            for other in (second, trainer(0.01), first):
                with pytest.raises(InputError, match="in use") as error:
                    other.run(("spt",))
                refused.append(error)

    first = trainer(0.001, meanwhile)
    first.run(("spt",))
    assert len(refused) == 3
    assert load_state(tmp_path / "state.pt")["settings"]["spt.lr"] == 0.001
    # It was made before the first trainer wrote its state, so its own state is out of date.
    with pytest.raises(InputError, match="another run has changed"):
        second.run(("spt",))
    # The first trainer wrote that state itself and can continue.
    first.run(train_run.BOTH)


def test_leftovers_of_killed_processes_are_removed_and_nothing_else(tmp_path):
    train_run.train(tmp_path, ("spt",), spt_epochs=1)
    before = names(tmp_path)
    left = [".state.pt.0123456789abcdef", ".model.safetensors.abcd_123", ".config.yaml.0123456789abcdef"]
    mine = [".state.pt.swp", ".notes.0123456789abcdef", "state.pt.0123456789abcdef", ".state.pt.0123456789ABCDEF"]
    for name in left + mine:
        (tmp_path / name).write_text("x")
    train_run.train(tmp_path, ("spt",), spt_epochs=1)
    assert names(tmp_path) == sorted(before + mine)


def test_a_cut_line_of_events_swallows_no_other(tmp_path):
    path = tmp_path / "events.jsonl"
    files.append_line(path, "one")
    path.write_bytes(path.read_bytes() + b'{"cut')
    files.append_line(path, "two")
    files.append_line(path, "three")
    assert path.read_text().splitlines() == ["one", '{"cut', "two", "three"]


@pytest.mark.parametrize(
    "make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to(os.devnull)], ids=["pipe", "folder", "link"]
)
def test_only_a_file_is_replaced_or_appended_to(tmp_path, make):
    """A pipe, a folder or a device is refused before anything is computed."""
    make(tmp_path / "out")
    reached = []
    with pytest.raises(InputError, match="it is a folder, a pipe or a device"), files.replacing(tmp_path / "out"):
        reached.append("the block")
    with pytest.raises((InputError, OSError)):
        files.open_log(tmp_path / "out")
    assert reached == [] and names(tmp_path) == ["out"]


def test_reading_neither_waits_nor_fills_the_memory(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path(os.devnull)):
        with pytest.raises(InputError, match="not a file"):
            files.read_small(path, 10)
    (tmp_path / "long").write_bytes(b"x" * 11)
    with pytest.raises(InputError, match="longer than 10 bytes"):
        files.read_small(tmp_path / "long", 10)
    assert files.read_small(tmp_path / "long", 11) == b"x" * 11


def test_an_error_of_the_cleaning_up_hides_no_other(tmp_path, monkeypatch):
    """On a file system that has become read-only, the temporary file and the lock cannot be removed."""

    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with pytest.raises(InputError, match=r"state\.pt could not be written \(No space left"), files.locked(tmp_path):
        monkeypatch.setattr(files.os, "unlink", refuse)
        with files.replacing(tmp_path / "state.pt"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_an_interruption_inside_a_save_stays_one(tmp_path):
    """torch raises another error in its place."""

    class Interrupting:
        def write(self, data):
            raise KeyboardInterrupt

        def flush(self):
            pass

    with pytest.raises(KeyboardInterrupt):
        files.atomic_write(tmp_path / "state.pt", lambda _: torch.save({"x": torch.zeros(99)}, Interrupting()))
    assert names(tmp_path) == []


def test_an_error_of_the_disk_when_the_folder_is_synced(tmp_path, monkeypatch):
    sync = os.fsync

    def refuse(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        sync(descriptor)

    monkeypatch.setattr(files.os, "fsync", refuse)
    # Some file systems cannot sync a folder.
    code = errno.EINVAL
    files.write_text(tmp_path / "file", "one")
    code = errno.EIO
    with pytest.raises(InputError, match="could not be synced"):
        files.write_text(tmp_path / "file", "two")


@pytest.mark.parametrize("how", ["moved", "removed", "replaced"])
def test_a_run_does_not_write_where_its_folder_was(tmp_path, how):
    """The folder that is there now may belong to another run."""
    out, seen = tmp_path / "run", []

    def take_away(event):
        if event["event"] == "step" and not seen:
            seen.append(out.rename(tmp_path / "moved"))
            if how == "removed":
                shutil.rmtree(tmp_path / "moved")
            if how == "replaced":
                out.mkdir()

    trainer = Trainer(train_run.config(spt_epochs=1), train_run.log(), train_run.split(), out, take_away)
    with pytest.raises(InputError, match="run was moved or removed"):
        trainer.run(("spt",))
    assert not out.exists() or names(out) == []
