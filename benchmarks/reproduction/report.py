"""Write docs/results.md and its plots from run folders.

``python -m benchmarks.reproduction.report --runs RUNS`` first copies the settings, metrics and record of the runs to
benchmarks/results/runs, without data and models. Without ``--runs`` the document is made from these copies alone. The
findings are copied from findings.md, which is written by hand.
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.reproduction.experiments import DATA, EXPERIMENTS, Experiment
from benchmarks.reproduction.pictures import draw, picture
from benchmarks.reproduction.published import PUBLISHED
from benchmarks.reproduction.runs import USUAL, Run, collect
from lares_fast._files import write_text
from lares_fast.cli.console import counted
from lares_fast.train.evaluate import MASKED, NOT_MASKED

_ROOT = Path(__file__).parents[2]
_COPIES = _ROOT / "benchmarks" / "results" / "runs"
_FINDINGS = Path(__file__).parent / "findings.md"

_HISTORIES = (NOT_MASKED, MASKED)
_SHORT = {"recall": "R", "ndcg": "N", "mrr": "MRR"}
_METRICS = [f"{metric}@{k}" for metric in _SHORT for k in (5, 10, 20, 50)]
_TITLES = {
    "Instruments.inter.json": "Musical Instruments (Amazon Reviews 2023, 5-core)",
    "Beauty.txt": "Beauty (Amazon 2014, 5-core)",
}
Cells = Sequence[str]


def document(runs: dict[str, Run], experiments: Sequence[Experiment], findings: str = "") -> str:
    """Return the text of docs/results.md."""
    shown = [runs[experiment.name] for experiment in experiments]
    parts = [_HEAD, _summary(runs), _states(shown)]
    for data in dict.fromkeys(run.experiment.data for run in shown):
        parts.append(_quality(data, [run for run in shown if run.experiment.data == data]))
    parts += [
        _depths(shown),
        _noise(shown),
        _ablations(shown),
        _rewards(runs),
        _trials(runs, shown),
        _bf16(shown),
        findings.strip(),
        _made(shown),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


_HEAD = """# Results on real logs

This page shows how well LARES ranks on two public logs, next to a SASRec-style model, simple baselines and published
numbers. All models were trained on CPUs with two cores. The last section names the machine, versions and command of every
run.

`python -m benchmarks.reproduction.runner` makes the runs that `benchmarks/reproduction/experiments.py` declares.
`python -m benchmarks.reproduction.report` writes this page from `benchmarks/results/runs`, which has the settings, every
metric of every epoch and the record of each run.

**Protocol.**

- Leave-one-out split: the last item of a user is the test target, the item before it is the validation target.
- The target is ranked among all items. PAD is never ranked, and no negatives are sampled.
- "Masked" leaves the user's own history out of the ranking. "Not masked" keeps it in, as the LARES papers do.
- There is one target for each user, so recall (R) is the hit rate. N is NDCG.
- The model with the best validation NDCG@10 is tested. For Instruments the ranking is not masked, for Beauty it is masked.
- The popularity and Markov-chain baselines use the training events `s[:-2]` only.
- A run that is not finished is listed with its state. It has no test numbers for an unfinished phase.
- The data files have their own licences and are not part of this repository."""


# Parts of the document


def _summary(runs: dict[str, Run]) -> str:
    """Return the main numbers: LARES, the best SASRec-style run, and the gain, for each log."""
    rows = []
    for data, title in _TITLES.items():
        history = USUAL[data]
        main, rival = (_preferred(runs, data, section) for section in ("main", "rival"))
        ours, base = _final(main, history), _final(rival, history)
        gain = "-" if ours is None or base is None else f"{100 * (ours / base - 1):+.1f} %"
        published = [
            f"{model} ({source}) {_number(values['ndcg@10'])}"
            for model, of, source, values in PUBLISHED.get(data, [])
            if of == history
        ]
        rows.append((title, history, _named(main, history), _named(rival, history), gain, "; ".join(published) or "-"))
    head = ("log", "history", "LARES", "best SASRec-style run", "gain", "published")
    run, time = runs.get("instruments"), ""
    if run is not None and run.tested("spt", NOT_MASKED):
        hours = run.training_seconds("spt") / 3600
        time = f"\n\nThe training steps of phase 1 of `instruments`, to early stopping, took {hours:.1f} hours."
    return "## Summary: NDCG@10 on the test rows\n" + _table(head, rows) + time


def _named(run: Run | None, history: str) -> str:
    """Return NDCG@10 of a run's last tested phase, with the names of run and phase."""
    row = None if run is None else run.final(history)
    if run is None or row is None:
        return "not measured yet"
    return f"{_number(row['ndcg@10'])} (`{run.experiment.name}` after {row['phase'].upper()})"


def _preferred(runs: dict[str, Run], data: str, section: str) -> Run | None:
    """Return the tested run of ``section`` on a log with the best validation, or ``None``."""
    history = USUAL[data]
    found = [run for run in runs.values() if (run.experiment.data, run.experiment.section) == (data, section)]
    tested = [run for run in found if run.tested("spt", history)]
    return max(tested, key=lambda run: max(run.validation(phase, history)[1] for phase in run.phases()), default=None)


def _final(run: Run | None, history: str) -> float | None:
    """Return NDCG@10 of a run's last tested phase at its own T, or ``None``."""
    row = None if run is None else run.final(history)
    return None if row is None else row["ndcg@10"]


def _states(shown: Sequence[Run]) -> str:
    rows = []
    for run in shown:
        phases = run.phases()
        epochs = [f"{phase.upper()} {count} (best {best})" for phase in phases for count, best in [run.epochs(phase)]]
        hours = sum(run.training_seconds(phase) for phase in phases) / 3600
        best = [_number(run.validation(phases[-1], history)[1]) if phases else "-" for history in _HISTORIES]
        cells = (", ".join(epochs) or "-", f"{hours:.2f}" if epochs else "-", *best)
        rows.append((f"`{run.experiment.name}`", run.experiment.what, run.state, *cells))
    validation = [f"validation N@10, {history}" for history in _HISTORIES]
    head = ("run", "settings", "state", "epochs", "hours of training steps", *validation)
    return "## The runs and their state\n" + _table(head, rows)


def _quality(data: str, runs: Sequence[Run]) -> str:
    """Return the tables of one log: baselines, LARES after each phase, the SASRec-style runs and published numbers."""
    main = [run for run in runs if run.experiment.section in ("main", "rival") and run.rows]
    parts = [
        f"## {_TITLES.get(data, data)}",
        f"sha256 of the file: `{DATA[data][:12]}...`." if data in DATA else "",
        _plot(data, main),
    ]
    for history in _HISTORIES:
        rows = []
        for baseline, title in (("popularity", "popularity"), ("markov", "first-order Markov")):
            found = [row for run in main[:1] for row in run.tested(baseline, history)]
            rows += [(title, *_cells(row)) for row in found]
        for run in main:
            for phase in run.phases():
                if row := run.at_own_depth(phase, history):
                    rows.append((f"`{run.experiment.name}` after {phase.upper()}, T = {row['test_T']:.0f}", *_cells(row)))
        rows += [
            (f"published: {model} ({source})", *_cells(values))
            for model, of, source, values in PUBLISHED.get(data, [])
            if of == history
        ]
        if rows:
            parts.append(f"### History {history}\n" + _table(("", *map(_heading, _METRICS)), rows))
    return "\n\n".join(part for part in parts if part)


def _plot(data: str, runs: Sequence[Run]) -> str:
    drawn = any(run.phases() for run in runs)
    return f"![Validation NDCG@10 by epoch]({picture('curves', data)})" if drawn else "No run on this log has an epoch yet."


def _depths(shown: Sequence[Run]) -> str:
    parts, pictures = [], []
    for run in shown:
        if run.experiment.section != "main":
            continue
        history = USUAL[run.experiment.data]
        curves = {phase: run.tested(phase, history) for phase in run.phases()}
        steps = sorted({int(row["test_T"]) for rows in curves.values() for row in rows})
        if not steps:
            continue
        rows = []
        for phase, found in curves.items():
            values = {int(row["test_T"]): _number(row["ndcg@10"]) for row in found}
            if values:
                rows.append((f"`{run.experiment.name}` after {phase.upper()}", *(values.get(step, "-") for step in steps)))
        parts.append(_table((f"NDCG@10, {history}; T =", *map(str, steps)), rows))
        pictures = [f"![Test NDCG@10 against T]({picture('depth')})"]
    return "## Quality against the number of steps T at test time\n" + ("\n\n".join([*pictures, *parts]) or "Not measured yet.")


def _noise(shown: Sequence[Run]) -> str:
    rows = []
    for run in shown:
        for history in _HISTORIES:
            own = run.final(history)
            others = [row for name in run.evaluations if name.startswith("noise-") for row in run.evaluated(name, history)]
            if own is None or not others:
                continue
            for metric in ("recall@10", "ndcg@10"):
                values = [row[metric] for row in (own, *others)]
                spread = (statistics.mean(values), min(values), max(values), statistics.stdev(values))
                cells = (_number(value, 5) for value in spread)
                rows.append((f"`{run.experiment.name}`", history, _heading(metric), str(len(values)), *cells))
    table = _table(("run", "history", "metric", "seeds", "mean", "lowest", "highest", "standard deviation"), rows)
    return (
        "## Spread over evaluation noise\nThe start state h0 is random at evaluation, too. This table ranks with the same model"
        " and several seeds of h0.\n\n" + (table if rows else "Not measured yet.")
    )


def _ablations(shown: Sequence[Run]) -> str:
    runs = [run for run in shown if run.experiment.section == "ablation"]
    rows = []
    for run in runs:
        tested = [run.final(history) for history in _HISTORIES]
        cells = [_number(row[metric]) if row else "-" for row in tested for metric in ("recall@10", "ndcg@10")]
        rows.append((f"`{run.experiment.name}`", run.experiment.what, *cells, "" if all(tested) else run.state))
    drawn = any(run.phases() for run in runs)
    curves = f"![Validation NDCG@10 of the ablations]({picture('ablations')})\n\n" if drawn else ""
    head = ("run", "settings", *(f"{metric}@10, {history}" for history in _HISTORIES for metric in ("R", "N")), "state")
    return "## Ablations: Beauty, ten epochs of phase 1\n" + curves + _table(head, rows)


def _rewards(runs: dict[str, Run]) -> str:
    """Return the table of phase-2 settings, all from one phase-1 model."""
    rows = []
    others = [(run.experiment.what, name, "rpt") for name, run in runs.items() if run.experiment.section == "rpt"]
    for title, name, phase in (
        ("no phase 2", "beauty", "spt"),
        ("reward recall, by dot as published", "beauty", "rpt"),
        *others,
    ):
        run = runs.get(name)
        tested = [run.at_own_depth(phase, history) if run else None for history in _HISTORIES]
        cells = [_number(row[metric]) if row else "-" for row in tested for metric in ("recall@10", "ndcg@10")]
        epoch = f"{run.epochs(phase)[1]}" if run and all(tested) else (run.state if run else "not begun")
        rows.append((title, f"`{name}`", *cells, epoch))
    metrics = (f"{metric}@10, {history}" for history in _HISTORIES for metric in ("R", "N"))
    head = ("settings", "run", *metrics, "best epoch or state")
    return (
        "## Phase 2 from one phase-1 model: Beauty\nThe phase counts its start model as epoch 0. A best epoch of 0 means that"
        " no epoch was better on the validation rows.\n\n" + _table(head, rows)
    )


def _trials(runs: dict[str, Run], shown: Sequence[Run]) -> str:
    """Return the table of trials of settings, which rank the validation rows only."""
    rows = []
    for run in (
        *(runs[name] for name in ("beauty-10", "ablation-none") if name in runs),
        *(run for run in shown if run.experiment.section == "trial"),
    ):
        phase = next(iter(run.phases()), None)
        best = [_number(run.validation(phase, history)[1]) if phase else "-" for history in _HISTORIES]
        epochs = "{} (best {})".format(*run.epochs(phase)) if phase else "-"
        rows.append((f"`{run.experiment.name}`", run.experiment.what, epochs, *best, run.state))
    head = ("run", "settings", "epochs", *(f"validation N@10, {history}" for history in _HISTORIES), "state")
    return "## Trials of settings, validation rows only\n" + _table(head, rows)


def _bf16(shown: Sequence[Run]) -> str:
    rows = []
    for run in shown:
        for history in _HISTORIES:
            for row in run.evaluated("bf16", history):
                own = run.final(history)
                if own is not None:
                    change = 100 * (row["ndcg@10"] / own["ndcg@10"] - 1)
                    rows.append(
                        (
                            f"`{run.experiment.name}`",
                            history,
                            _number(own["ndcg@10"], 5),
                            _number(row["ndcg@10"], 5),
                            f"{change:+.2f} %",
                        )
                    )
    header = ("run", "history", "N@10, fp32", "N@10, bf16", "change")
    return "## Encoding in bf16\n" + (_table(header, rows) if rows else "Not measured yet.")


def _made(shown: Sequence[Run]) -> str:
    """Return command, seeds, data, wall time and machine of every run that has begun."""
    entries = []
    for run in shown:
        if not run.rows:
            continue
        record, sittings = run.record, run.record.get("sittings", [])
        wall = sum(sitting["seconds"] for sitting in sittings) / 3600
        facts = [
            f"seed {run.setting('seed')}, evaluation noise seed {run.setting('noise_seed')}",
            f"made in {counted(len(sittings), 'part')}, {wall:.2f} h of wall time"
            if sittings
            else "not recorded by the runner yet",
            f"data `{run.experiment.data}`, sha256 `{record.get('sha256', DATA.get(run.experiment.data, ''))[:12]}...`",
            *_surroundings(sittings),
        ]
        command = record.get("command", run.experiment.command())
        listed = "\n".join(f"- {fact}" for fact in facts)
        entries.append(f"**`{run.experiment.name}`**\n\n{listed}\n\n```\n{command}\n```")
    return "## How each run was made\nPaths are relative to a folder that has the logs. A resumed run adds `--resume`.\n\n" + (
        "\n\n".join(entries) or "No run has begun."
    )


def _surroundings(sittings: Sequence[dict[str, Any]]) -> list[str]:
    """Return the commits, machines and versions of the sittings, each once."""
    known = [sitting for sitting in sittings if "commit" in sitting]
    if not known:
        return []
    commits = dict.fromkeys(sitting["commit"] for sitting in known)
    machines = dict.fromkeys(f"{sitting['cpu']}, {counted(sitting['threads'], 'thread')}" for sitting in known)
    versions = dict.fromkeys(", ".join(f"{name} {number}" for name, number in sitting["versions"].items()) for sitting in known)
    return [f"commit {', '.join(commits)}", " and ".join(machines), " and ".join(versions)]


# Cells


def _number(value: float, digits: int = 4) -> str:
    return re.sub(r"^(-?)0\.", r"\1.", f"{value:.{digits}f}")


def _cells(row: dict[str, float]) -> Iterable[str]:
    return (_number(row[metric]) if metric in row else "" for metric in _METRICS)


def _heading(metric: str) -> str:
    name, k = metric.split("@")
    return f"{_SHORT[name]}@{k}"


def _table(head: Cells, rows: Iterable[Cells]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, help="copy the run folders in this folder first")
    arguments = parser.parse_args()
    if arguments.runs is not None:
        collect(arguments.runs, _COPIES, EXPERIMENTS)
    runs = {experiment.name: Run(experiment, _COPIES / experiment.name) for experiment in EXPERIMENTS}
    findings = _FINDINGS.read_text() if _FINDINGS.is_file() else ""
    write_text(_ROOT / "docs" / "results.md", document(runs, EXPERIMENTS, findings))
    draw(runs, EXPERIMENTS, _ROOT / "docs" / "results")


if __name__ == "__main__":
    main()
