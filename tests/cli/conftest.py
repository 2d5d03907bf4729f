"""Fixtures: a small log file, runs trained on small logs, and a call of the command line in this process."""

import random
import shutil
from types import SimpleNamespace

import pytest
import torch

from lares_fast.cli import main
from tests.support.command_line import events, write_csv

SMALL = [
    *("--config", "tiny"),
    *("--set", "spt.epochs=1", "--set", "rpt.epochs=1", "--set", "rpt.filter_top=30", "--set", "rpt.k=5"),
    *("--set", "evaluation.ks=[5,10,20]", "--set", "evaluation.depth_ratios=[1,2]"),
]


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Use one thread. On a busy machine, threads that wait for each other make these tests many times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def small_settings():
    return SMALL


@pytest.fixture(scope="session")
def log_file(tmp_path_factory):
    """Return a log of 80 users u1.. with 4 to 20 of 40 items i1.. each, and of one user with too few items to keep."""
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("log") / "shop.txt"
    items = [f"i{n}" for n in range(1, 41)]
    lines = [" ".join([f"u{n}", *draw.sample(items, draw.randint(4, 9))]) for n in range(1, 80)]
    path.write_text("\n".join([*lines, " ".join(["u80", *items[:20]]), "u81 i1 i2", ""]))
    return path


@pytest.fixture(scope="session")
def trained(tmp_path_factory, log_file):
    """Return the folder of a finished run of both phases."""
    out = tmp_path_factory.mktemp("runs") / "small"
    assert main(["train", *SMALL, "--data", str(log_file), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="session")
def runs(tmp_path_factory, small_settings):
    """Return name -> (run folder, log file): a run on integer ids, one on string ids, and one with a temporal split."""
    folder = tmp_path_factory.mktemp("identity")
    found = {}
    for name, ids, more in (
        ("integers", int, []),
        ("texts", lambda number: f"n{number}", []),
        ("temporal", int, ["--set", "data.split=temporal"]),
    ):
        log = write_csv(folder / f"{name}.csv", events(ids))
        arguments = ["train", *small_settings, "--data", str(log), "--phase", "spt", "--out", str(folder / name), *more]
        assert main(arguments) == 0
        found[name] = (folder / name, log)
    return found


@pytest.fixture
def damaged(trained, tmp_path):
    """Return a copy of a finished run, for a test to damage."""
    return shutil.copytree(trained, tmp_path / "damaged")


@pytest.fixture
def cli(capsys, monkeypatch, tmp_path):
    """Call the command line in an empty folder. The result has ``code``, ``out``, ``err`` and the names ``written``."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments):
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err, written=sorted(path.name for path in folder.iterdir()))

    return call
