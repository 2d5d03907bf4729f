"""The choice of lanes in .ci/lanes.toml, how .ci/run runs them, and what a plain pytest says about slow tests."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("choose", ROOT / ".ci" / "choose.py")
choose = importlib.util.module_from_spec(spec)
spec.loader.exec_module(choose)

TRACKED = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True).stdout.split("\0")[:-1]
needs_git = pytest.mark.skipif(not TRACKED, reason="not a git checkout")


@needs_git
def test_every_tracked_path_has_lanes():
    without = [path for path in TRACKED if choose.pattern_of(path) is None]
    assert not without, "add these paths to .ci/lanes.toml"
    assert all(choose.lanes_of(path) for path in TRACKED)


@needs_git
def test_every_pattern_is_used():
    used = {choose.pattern_of(path) for path in TRACKED}
    assert [pattern for pattern in choose.TABLE["paths"] if pattern not in used] == []


def test_an_unknown_path_runs_everything():
    assert choose.lanes_of("new/folder/file.xyz") == set(choose.LANES)
    assert list(choose.choose(["docs/gpu.md", "new/folder/file.xyz"])) == list(choose.LANES)


@pytest.mark.parametrize("paths", [[], ["docs/gpu.md"], ["csrc/topk/topk.h", "kernels/attention.py"]])
def test_a_quick_run_always_has_the_architecture_tests_and_the_rehearsal(paths):
    chosen = choose.choose(paths)
    assert {"architecture", "rehearsal"} <= chosen.keys()
    assert (paths != []) == (len(chosen) > 2)


def test_a_kernel_brings_its_lanes():
    assert {"native", "emulator", "cuda"}.isdisjoint(choose.choose(["kernels/attention.py"]))
    assert {"triton_interpreted", "triton_newest", "triton_older", "triton_hopper"} <= choose.lanes_of("kernels/attention.py")
    assert {"native", "emulator", "cuda", "packaging", "tests"} <= choose.lanes_of("csrc/topk/topk.h")
    assert choose.lanes_of(".ci/run") == set(choose.LANES)


def test_the_table_names_lanes_that_are_functions():
    scripts = "\n".join(file.read_text() for file in (ROOT / ".ci" / "lanes").glob("*.sh"))
    assert set(re.findall(r"(?m)^lane_(\w+)\(", scripts)) == set(choose.LANES)
    table = choose.TABLE
    for names in (table["always"]["lanes"], *table["sets"].values(), *table["paths"].values()):
        assert set(names) <= {*choose.LANES, *table["sets"], "all"}
    assert not choose.TABLE["sets"].keys() & choose.LANES.keys()


LANES = """
prepare() { step "environment" true; }
lane_demo() { false; }
lane_good() { echo "the good lane ran"; }
lane_bad() { false; echo "not reached"; }
lane_last() { sleep 1; echo "TMPDIR is $TMPDIR"; }
"""
TABLE = """
[lanes]
demo = "is a step of prepare"
bad = "fails"
good = "passes"
last = "passes too"
[always]
lanes = ["good"]
[sets]
[paths]
"bad/*" = ["bad"]
"last/*" = ["last"]
"""


@pytest.fixture
def checkout(tmp_path):
    """Return a git repository whose lanes take no time."""
    folder = tmp_path / "checkout"
    (folder / ".ci" / "lanes").mkdir(parents=True)
    for name in ("run", "choose.py"):
        shutil.copy(ROOT / ".ci" / name, folder / ".ci" / name)
    (folder / ".ci" / "lanes" / "lanes.sh").write_text(LANES)
    (folder / ".ci" / "lanes.toml").write_text(TABLE)
    for name in ("bad", "last"):
        (folder / name).mkdir()
        (folder / name / "file.txt").write_text(f"{name}\n" * 20)
    git(folder, "init", "-q", "-b", "main")
    commit(folder)
    return folder


def git(folder, *arguments):
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


def commit(folder):
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "change")


def run(folder, *arguments):
    done = subprocess.run([".ci/run", *arguments], cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_a_lane_that_fails_stops_no_other_lane(checkout):
    code, output, _ = run(checkout)
    assert code == 1
    assert "the good lane ran" in output and "not reached" not in output
    (folder,) = re.findall("TMPDIR is (.*)", output)
    assert not Path(folder).parents[1].exists(), "the scratch folder is deleted"
    table = output.partition("step                    minutes  result\n")[2]
    rows = {name: result for name, minutes, result in (line.split() for line in table.splitlines()) if float(minutes) < 1}
    assert rows == {"environment": "passed", "bad": "FAILED", "good": "passed", "last": "passed", "total": "FAILED"}


def test_lanes_can_run_alone(checkout):
    code, output, _ = run(checkout, "only", "last", "good")
    assert code == 0 and "the good lane ran" in output and "TMPDIR is" in output and "bad" not in output
    code, _, error = run(checkout, "only", "none")
    assert code != 0 and "unknown lane none; the lanes are demo, bad, good, last." in error


def test_a_step_that_fails_ends_the_run(checkout):
    (checkout / ".ci/lanes/lanes.sh").write_text(LANES.replace("true;", "false;"))
    code, output, _ = run(checkout)
    assert code == 1 and "the good lane ran" not in output
    assert re.search(r"(?m)^environment +0\.\d  FAILED$", output)


def test_a_quick_run_tells_what_it_leaves_out(checkout):
    code, output, error = run(checkout, "quick", "HEAD")
    assert code == 0 and "the good lane ran" in output
    assert "0 changed paths" in error and re.search(r"Lanes left out.*\n.*demo .*\n.*bad .*\n.*last +passes too", error)
    # A rename changes the lanes of both names.
    git(checkout, "mv", "last/file.txt", "bad/new.txt")
    commit(checkout)
    code, output, error = run(checkout, "quick", "HEAD~1")
    assert code == 1 and "bad: FAILED" in output and "last: passed" in output
    assert "changed: bad/new.txt" in error and "changed: last/file.txt" in error
    (checkout / "unknown.txt").touch()
    commit(checkout)
    assert "Every lane runs, because .ci/lanes.toml has no pattern for unknown.txt." in run(checkout, "quick", "HEAD~1")[2]
    code, _, error = run(checkout, "quick", "nowhere")
    assert code != 0 and "git cannot compare nowhere with HEAD" in error


SLOW = """
import pytest
@pytest.mark.interpreted
def test_slow(): pass
@pytest.mark.gpu
def test_slower(): pass
def test_quick(): pass
"""


@pytest.mark.parametrize(("options", "lines"), [
    ([], ["2 slow tests not run: see CONTRIBUTING.md"]),
    (["-m", "interpreted"], []),
    (["-n", "2"], ["2 slow tests not run: see CONTRIBUTING.md"]),
])  # fmt: skip
def test_pytest_counts_the_slow_tests_that_it_did_not_run(tmp_path, options, lines):
    if "-n" in options:
        pytest.importorskip("xdist")
        options = ["-p", "xdist", *options]
    # A stand-in for torch and no other plug-ins, because their imports would take most of the time.
    (tmp_path / "torch.py").write_text("def set_num_threads(n): pass\ndef manual_seed(n): pass\n")
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path / "conftest.py")
    (tmp_path / "test_it.py").write_text(SLOW)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n  interpreted:\n  gpu:\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"(?m)^\d+ slow .*", done.stdout) == lines
