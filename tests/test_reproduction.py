"""The reproduction's runner and report on a log of 80 users: runs are made, stopped, resumed, skipped and shown."""

import random
import re
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.reproduction import experiments, gain, report, runner, runs
from benchmarks.reproduction.experiments import Experiment
from lares_fast.cli import main, settings
from lares_fast.train.checkpoint import load_state

ROOT = Path(__file__).parent.parent
SMALL = {
    "spt.epochs": 2,
    "rpt.epochs": 1,
    "rpt.filter_top": 30,
    "rpt.k": 5,
    "evaluation.ks": [5, 10, 20],
    "evaluation.depth_ratios": [0.5, 1, 2],
    "evaluation.watch_masked": True,
}


def small(name, section, what="small", **rest):
    rest["settings"] = {**SMALL, **rest.get("settings", {})}
    return Experiment(name=name, data="small.txt", section=section, what=what, config="tiny", **rest)


NOISE = {"noise-1": ("--steps", "2", "--set", "evaluation.noise_seed=1")}
BOTH = small("beauty", "main", phase="both", evaluations=NOISE)
NDCG = small("beauty-rpt-ndcg", "rpt", phase="rpt", start_from="beauty", settings={"rpt.reward": "ndcg"})
TRIAL = small("trial", "trial", settings={"evaluation.test": False})
LATER = small("beauty-sasrec", "rival")
ENDLESS = small("endless", "ablation", settings={"spt.epochs": 100000, "spt.patience": 100000})
ALL = (BOTH, NDCG, TRIAL, LATER, ENDLESS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with ``data`` and ``runs``: both phases, phase 2 from that run, and a trial, made in one stretch."""
    root = tmp_path_factory.mktemp("reproduction")
    (root / "data").mkdir()
    draw = random.Random(0)
    lines = [" ".join(map(str, [user, *draw.sample(range(1, 41), draw.randint(4, 9))])) for user in range(1, 81)]
    (root / "data" / "small.txt").write_text("\n".join([*lines, ""]))
    # One epoch in this process, which need not import torch again; the runner takes the run over.
    begun = replace(TRIAL, settings={**TRIAL.settings, "spt.epochs": 1})
    words = ["train", "--data", root / "data" / "small.txt", "--config", begun.config, "--phase", begun.phase]
    assert main([*map(str, words), *begun.assignments(), "--out", str(root / "runs" / TRIAL.name)]) == 0
    runner.Runner(root / "data", root / "runs", minutes=5).run([NDCG, BOTH, NDCG, TRIAL], ALL)
    return root


def test_a_run_leaves_its_record(folder):
    record = runner.read_record(folder / "runs" / "beauty")
    assert [(sitting["made"], sitting["ended"]) for sitting in record["sittings"]] == [
        ("train", "finished"),
        ("noise-1", "finished"),
    ]
    assert record["command"].startswith("lares-fast train --config tiny --data small.txt --phase both --set spt.epochs=2")
    assert len(record["sha256"]) == 64 and record["sittings"][0]["threads"] == 1
    assert record["sittings"][0]["seconds"] > 0 and record["sittings"][0]["versions"].keys() >= {"python", "torch"}


def test_a_run_waits_for_the_one_it_starts_from(folder):
    """The list has the run before and after its parent, and the run was made once."""
    child = runs.Run(NDCG, folder / "runs" / NDCG.name)
    assert len(child.record["sittings"]) == 1 and child.state == "finished"
    assert child.phases() == ["rpt"]
    parent = load_state(folder / "runs" / "beauty" / "state.pt")
    start = load_state(child.folder / "state.pt")["start"]
    assert all((start[name] == weight).all() for name, weight in parent["start"].items())


def test_what_is_finished_is_skipped_unless_its_settings_change(folder, capsys):
    runner.Runner(folder / "data", folder / "runs", minutes=5).run([BOTH], ALL)
    assert "beauty: finished already" in capsys.readouterr().out
    assert not runner.is_finished(replace(BOTH, settings={**BOTH.settings, "spt.epochs": 3}), folder / "runs" / "beauty")
    assert not runner.is_finished(replace(BOTH, evaluations={"other": ()}), folder / "runs" / "beauty")


def test_a_stretch_ends_and_the_next_resumes(folder):
    work = runner.Runner(folder / "data", folder / "runs", minutes=5)
    target = folder / "runs" / ENDLESS.name

    def stop_after_an_epoch(number):
        # If the stop came before the sitting began, no sitting would begin.
        while len(runner.read_record(target).get("sittings", [])) < number or not (target / "metrics.csv").is_file():
            time.sleep(0.05)
        work.request_stop()

    for number in (1, 2):
        work._stop = False
        threading.Thread(target=stop_after_an_epoch, args=(number,), daemon=True).start()
        work.run([ENDLESS, LATER], ALL)
        assert [sitting["ended"] for sitting in runner.read_record(target)["sittings"]] == ["stopped"] * number
    assert not (folder / "runs" / LATER.name).exists(), "nothing is begun after the end of the stretch"
    log = (target / "log.txt").read_text()
    assert log.count("stopped and saved; resume with") >= 1
    assert runs.Run(ENDLESS, target).state == "not finished: stopped"


def test_a_run_in_other_hands_is_left_alone(folder, capsys):
    with runner._locked(folder / "runs" / LATER.name) as lock:
        assert lock is not None
        runner.Runner(folder / "data", folder / "runs", minutes=5).run([LATER], ALL)
    assert "beauty-sasrec: is being made by another runner" in capsys.readouterr().out
    shutil.rmtree(folder / "runs" / LATER.name)


def test_a_run_begun_without_the_runner_is_taken_over(folder):
    taken = folder / "runs" / TRIAL.name
    first, second = runner.read_record(taken)["sittings"]
    assert first["ended"] == "stopped" and first["began"] < second["began"] and second["ended"] == "finished"
    assert runs.Run(TRIAL, taken).epochs("spt")[0] == 2


def test_a_failed_run_says_so(folder):
    broken = small("broken", "trial", settings={"spt.lr": -1})
    runner.Runner(folder / "data", folder / "runs", minutes=5).run([broken], (broken,))
    run = runs.Run(broken, folder / "runs" / "broken")
    assert run.state == "not finished: failed"
    assert "spt.lr must be greater than 0" in (run.folder / "log.txt").read_text()


def module(name, *arguments, check=False):
    command = [sys.executable, "-m", f"benchmarks.reproduction.{name}", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=check)


def test_another_log_is_refused(folder, monkeypatch):
    monkeypatch.setitem(experiments.DATA, "small.txt", "0" * 64)
    with pytest.raises(SystemExit, match=r"small\.txt has sha256 .* use that file"):
        runner.Runner(folder / "data", folder / "runs", minutes=5).run([LATER], ALL)


def test_the_gain_of_a_run_is_that_of_its_users(folder):
    run, twin = folder / "runs" / "beauty", folder / "runs" / "beauty-rpt-ndcg"
    log = folder / "data" / "small.txt"
    told = module("gain", run, twin, "--data", log, check=True).stdout
    for history in ("masked", "not masked"):
        line = next(line for line in told.splitlines() if re.match(rf"test +{history} ", line))
        ours, theirs, more, low, high = map(float, re.findall(r"[-+]?\d+\.\d+", line))
        final = [runs.Run(of, folder / "runs" / of.name).final(history)["ndcg@10"] for of in (BOTH, NDCG)]
        assert (ours, theirs) == tuple(round(value, 5) for value in final)
        assert more == pytest.approx(100 * (ours / theirs - 1), abs=0.2) and low <= more <= high


def test_the_interval_of_a_gain():
    draw = np.random.default_rng(1)
    theirs = draw.random(400)
    assert gain.interval(theirs, theirs) == (0, 0, 0)
    value, low, high = gain.interval(theirs + 0.1, theirs)
    assert low < value < high and high - low < 4  # all users gain equally; only its share of their score varies
    apart = gain.interval(draw.permutation(theirs) + 0.1, theirs)
    # Without pairs, the result spreads like a ratio of two independent means.
    error = theirs.std() / np.sqrt(400)
    wide = 100 * 2 * 1.96 * np.hypot(error / theirs.mean(), error * (theirs.mean() + 0.1) / theirs.mean() ** 2)
    assert apart[2] - apart[1] == pytest.approx(wide, rel=0.2)


# The document


@pytest.fixture(scope="module")
def written(folder, tmp_path_factory):
    """Return (kept folder, text of the document, folder of the pictures)."""
    kept, pictures = (tmp_path_factory.mktemp(name) for name in ("kept", "pictures"))
    runs.collect(folder / "runs", kept, ALL)
    found = {experiment.name: runs.Run(experiment, kept / experiment.name) for experiment in ALL}
    report.draw(found, ALL, pictures)
    return kept, report.document(found, ALL, "## Findings\nMuch."), pictures


def test_neither_data_nor_models_are_copied(written, folder):
    kept, text, _ = written
    allowed = {"config.yaml", "metrics.csv", "experiment.json", "noise-1.csv"}
    assert {path.name for path in kept.rglob("*") if path.is_file()} == allowed
    for path in (path for path in kept.rglob("*") if path.is_file()):
        assert str(folder) not in path.read_text()
    assert str(folder) not in text
    assert settings.build(kept / "beauty" / "config.yaml").data.path == "small.txt"


def test_every_number_is_that_of_the_run(written, folder):
    _, text, pictures = written
    rows = runs.Run(BOTH, folder / "runs" / "beauty").rows
    tested = [row for row in rows if row["split"] == "test" and row.get("test_T") == 2]
    assert len(tested) == 4
    for row in tested:
        section = text.partition(f"### History {row['history']}\n")[2]
        line = next(line for line in section.splitlines() if f"`beauty` after {row['phase'].upper()}, T = 2" in line)
        cells = [cell.strip() for cell in line.split("|")[2:-1]]
        for metric, cell in zip(report._METRICS, cells, strict=True):
            assert cell == (report._number(row[metric]) if metric in row else "")
    for picture in re.findall(r"\(results/(.+?\.svg)\)", text):
        assert "<svg" in (pictures / picture).read_text()
    assert "curves-small.svg" in text and "depth.svg" in text


def test_noise_spread_counts_the_run_s_own_seed(written, folder):
    _, text, _ = written
    run = runs.Run(BOTH, folder / "runs" / "beauty")
    values = [run.final("masked")["ndcg@10"], run.evaluated("noise-1", "masked")[0]["ndcg@10"]]
    line = next(line for line in text.splitlines() if line.startswith("| `beauty` | masked | N@10 |"))
    lowest, highest = report._number(min(values), 5), report._number(max(values), 5)
    assert line.split(" | ")[3] == "2" and line.split(" | ")[5:7] == [lowest, highest]


def test_what_is_missing_is_listed_and_not_invented(written):
    _, text, _ = written
    states = text.partition("## The runs and their state\n")[2].partition("\n\n")[0]
    assert "| `beauty` | small | finished | SPT 2" in states
    assert "| `beauty-sasrec` | small | not begun | - | - | - | - |" in states
    assert "| `endless` | small | not finished: stopped |" in states
    ablations = text.partition("## Ablations")[2].partition("\n## ")[0]
    assert "| `endless` | small | - | - | - | - | not finished: stopped |" in ablations
    trials = text.partition("## Trials")[2].partition("\n## ")[0]
    assert "| `trial` | small | 2 (best " in trials
    assert "not measured yet" in text.partition("## Summary: NDCG@10 on the test rows\n")[2].partition("\n\n")[0]
    assert text.endswith("\n") and "## Findings\nMuch." in text


def test_of_each_section_validation_prefers_a_tested_run():
    class Tested:
        def __init__(self, section, *validation, data="Beauty.txt", over=True):
            self.experiment = replace(small("any", section), data=data)
            self.phases = lambda: ("spt", "rpt")[: len(validation)]
            self.validation = lambda phase, history: (1, validation[self.phases().index(phase)])
            self.tested = lambda phase, history: [{}] * over

    known = {
        "slow": Tested("rival", 0.05),
        "fast": Tested("rival", 0.06),
        "not over": Tested("rival", 0.07, over=False),
        "elsewhere": Tested("rival", 0.09, data="Instruments.inter.json"),
        "one phase": Tested("main", 0.08),
        "two phases": Tested("main", 0.05, 0.10),
        "trial": Tested("trial", 0.2),
    }
    assert report._preferred(known, "Beauty.txt", "rival") is known["fast"]
    assert report._preferred(known, "Beauty.txt", "main") is known["two phases"]
    assert report._preferred(known, "Instruments.inter.json", "main") is None


def test_a_document_of_no_runs(tmp_path):
    none = {experiment.name: runs.Run(experiment, tmp_path / experiment.name) for experiment in experiments.EXPERIMENTS}
    text = report.document(none, experiments.EXPERIMENTS)
    report.draw(none, experiments.EXPERIMENTS, tmp_path)
    assert text.count("| not begun |") >= len(none) and "svg" not in text and not list(tmp_path.glob("*.svg"))
    assert "No run has begun." in text


# The declared experiments


def test_the_experiments_are_settings_that_exist():
    names = [experiment.name for experiment in experiments.EXPERIMENTS]
    assert len(set(names)) == len(names)
    models = {}
    for experiment in experiments.EXPERIMENTS:
        config = settings.build(experiment.config, [word for word in experiment.assignments() if word != "--set"])
        models[experiment.name] = config.model
        assert experiment.data in experiments.DATA
        assert experiment.section in ("main", "rival", "ablation", "rpt", "trial")
        assert experiment.phase != "rpt" or experiment.start_from
        if experiment.start_from:
            assert models[experiment.start_from] == config.model
        assert config.evaluation.test == (experiment.section != "trial")
        if experiment.phase != "spt":
            assert config.rpt.epochs <= 3
        if experiment.section == "main":
            assert config.evaluation.depths(config.model["mean_depth"]) == list(range(1, 17))


def test_the_document_is_what_the_copies_give():
    kept = ROOT / "benchmarks" / "results" / "runs"
    found = {experiment.name: runs.Run(experiment, kept / experiment.name) for experiment in experiments.EXPERIMENTS}
    findings = report._FINDINGS.read_text() if report._FINDINGS.is_file() else ""
    assert (ROOT / "docs" / "results.md").read_text() == report.document(found, experiments.EXPERIMENTS, findings)


def test_the_commands_of_the_head_run(tmp_path):
    listed = module("runner", "--runs", tmp_path, "--list")
    assert listed.returncode == 0 and len(listed.stdout.splitlines()) == len(experiments.EXPERIMENTS)
    wrong = module("runner", "--only", "nothing")
    assert wrong.returncode == 2 and "there is no run nothing" in wrong.stderr
