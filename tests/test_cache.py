"""Entries of LARES_FAST_CACHE that another account could have written are ignored, and the user is told once."""

import json
import os
import stat
import warnings
from types import SimpleNamespace

import pytest

from lares_fast import _files
from lares_fast._errors import InputError
from lares_fast.verify import cache

KEY = {"op": "attention", "drop": True}


@pytest.fixture
def entry(tmp_path, monkeypatch):
    """Store an entry and return its file."""
    monkeypatch.setenv("LARES_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_told", set())
    cache.write("kind", KEY, {"fault": None})
    (file,) = (tmp_path / "cache" / "kind").iterdir()
    return file


def refused(path, why):
    with pytest.warns(UserWarning, match=why) as said:
        assert cache.read("kind", KEY) is None
    assert str(path) in str(said[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.read("kind", KEY) is None


@pytest.mark.parametrize(("umask", "mode"), [(0o077, 0o600), (0o022, 0o644), (0o002, 0o644), (0, 0o644)])
def test_nobody_else_can_write_what_is_written(entry, umask, mode):
    before = os.umask(umask)
    try:
        cache.write("other", KEY, {"fault": None})
    finally:
        os.umask(before)
    folder = entry.parent.with_name("other")
    (file,) = folder.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == mode and not folder.stat().st_mode & 0o022
    assert cache.read("other", KEY) == {**KEY, "fault": None}


@pytest.mark.parametrize("mode", [0o666, 0o620, 0o602])
@pytest.mark.parametrize("up", [0, 1, 2])
def test_what_others_can_write_to_is_refused(entry, up, mode):
    place = [entry, *entry.parents][up]
    place.chmod(mode | 0o100 if up else mode)
    refused(place, "other accounts can write to it")
    if up:
        with pytest.raises(InputError, match="other accounts can write to it"):
            cache.write("kind", KEY, {})


@pytest.mark.parametrize("up", [0, 1, 2])
@pytest.mark.parametrize(("owner", "ours"), [(0, True), (4242, True), (12345, False)])
def test_files_of_other_accounts_are_refused(entry, monkeypatch, up, owner, ours):
    """Files of root are used, so that an administrator can fill a cache."""
    place = [entry, *entry.parents][up]
    number = place.stat().st_ino

    def owned(found):
        return os.stat_result([*found[:4], owner if found.st_ino == number else 4242, *found[5:10]])

    replaced = {
        "geteuid": lambda: 4242,
        "stat": lambda path: owned(os.stat(path)),
        "fstat": lambda file: owned(os.fstat(file)),
    }
    monkeypatch.setattr(cache, "os", SimpleNamespace(**{**vars(os), **replaced}))
    if ours:
        assert cache.read("kind", KEY) is not None
    else:
        refused(place, "belongs to another account")


def test_links_pipes_folders_and_long_files_are_refused(entry):
    text = entry.read_text()
    entry.with_name("elsewhere").write_text(text)
    for make, why in (
        (lambda: entry.symlink_to(entry.with_name("elsewhere")), "it is a link"),
        (lambda: os.mkfifo(entry), "it is no file"),
        (lambda: entry.mkdir(), "it is no file"),
        (lambda: entry.write_text(text + " " * cache._MOST_BYTES), "it is longer than"),
    ):
        cache._told.clear()
        entry.unlink(missing_ok=True)
        make()
        refused(entry, why)
        if entry.is_dir():
            entry.rmdir()


@pytest.mark.parametrize("text", [
    "", "{", "[]", "3", "null", '"x"', "[" * 99_999, '{"op": ' * 9_999, '{"op": "attention", "drop": 1, "fault": null}',
    '{"op": "attention", "drop": true, "fault": NaN}', '{"op": "attention", "fault": null}', "1" * 9_999, "\udcff",
], ids=lambda text: text[:20])  # fmt: skip
def test_other_contents_are_ignored(entry, text):
    entry.write_bytes(text.encode(errors="surrogateescape"))
    assert cache.read("kind", KEY) is None


def test_an_entry_is_written_whole(entry, monkeypatch):
    monkeypatch.setattr(_files.os, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cache.write("kind", KEY, {"fault": "another"})
    assert json.loads(entry.read_text())["fault"] is None and len(list(entry.parent.iterdir())) == 1
