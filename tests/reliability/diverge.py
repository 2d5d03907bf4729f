"""Make runs diverge in each phase, score with numbers that are not finite, and change settings and software.

Nothing that is not finite may be saved, exported, called the best, evaluated or served. A run that diverged continues with a
lower rate. Every change of a setting or of the software is announced and logged, or refused.
"""

import contextlib
import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch

from lares_fast import LARES, LARESConfig, serve
from lares_fast._errors import InputError
from lares_fast._finite import NotFiniteError, all_finite
from lares_fast._weights import load_weights_about, save_weights
from lares_fast.train import Interrupted, Trainer, model_ranks
from lares_fast.train.checkpoint import load_state, save_state
from lares_fast.train.keys import evaluation_key
from lares_fast.train.resume import settings_of
from lares_fast.train.rpt import RPT
from lares_fast.train.source import with_source
from lares_fast.train.spt import SPT
from tests.reliability import diverge_software
from tests.reliability.counts import Counts
from tests.support import train_run
from tests.support.changed_settings import EVERY, REFUSED, changed, stopped_runs
from tests.support.damage import finished_run

DIVERGED = "a phase that diverges, then resumed with a lower rate"
PLANTED = "a weight, a score or a saved number that is not finite"
CHANGED = "a changed setting in each place of a run"
PHASES = {"spt": SPT, "rpt": RPT}


def measure(counts: Counts) -> None:
    """Run all cases of the three kinds, or some of each in the quick form."""
    with tempfile.TemporaryDirectory() as name, mock.patch.dict("os.environ", {"COLUMNS": "200"}):
        folder = Path(name)
        cases = list(CASES)
        for number, case in enumerate(cases[::29] if counts.quick else cases):
            counts.tried(DIVERGED, goal=len(cases))
            try:
                if fault := diverged(folder / f"diverged-{number}", *case):
                    counts.failed(DIVERGED, f"{case}: {fault}", lost="names no remedy" not in fault)
            except Exception as error:
                counts.failed(DIVERGED, f"{case} raised {error!r:.300}")
        planted(counts, folder)
        change_settings(counts, folder)
        diverge_software.measure(counts, folder)


# Runs that diverge


def _cases():
    """Yield (phase, what happens, a number, the batch size, minutes between checkpoints)."""
    for phase in PHASES:
        for size in (64, 100_000):
            for minutes in (0.0, 10.0):
                for lr in (1e4, 1e10, 1e19, 1e30, 1e37):
                    yield phase, "lr", lr, size, minutes
                # A large batch is the whole epoch.
                for step in (1, 2, 3) if size == 64 else (1,):
                    for what in HARMS:
                        yield phase, what, step, size, minutes
                yield phase, "weight_decay", 1e36, size, minutes
    for tau in (1e-25, 1e-30):
        yield "spt", "tau", tau, 64, 10.0


HARMS = {
    "nan loss": lambda value: value * torch.nan,
    "inf loss": lambda value: value + torch.inf,
    "nan gradient": lambda value: value + (value - value.detach()).abs().sqrt() * 1e-3,
    "huge gradient": lambda value: value * 1e30 - value.detach() * 1e30 + value.detach(),
    "nan weights": lambda value: value,
    "inf weights": lambda value: value,
}
CASES = tuple(_cases())


def diverged(out, phase, what, number, size, minutes):
    """Let a phase diverge, resume it with the usual rate, and return what went wrong, or ``None``."""
    if phase == "rpt":
        trainer(out).run(("spt",))
    model = {"similarity": "cos", "tau": number} if what == "tau" else {}
    values = {"batch_size": size, **({what: number} if what in ("lr", "weight_decay") else {})}
    run = trainer(out, minutes, model, **{phase: values})
    try:
        with harming(run, PHASES[phase], what, number):
            run.run((phase,))
        # Not every rate that is far too high gives numbers that are not finite.
        outcome = "ended"
    except NotFiniteError as error:
        outcome = str(error)
        if "\n" in outcome or not any(word in outcome for word in (f"{phase}.lr", "spt.lr", "model.tau")):
            return f"the message names no remedy: {outcome!r}"
    if what not in ("lr", "weight_decay") and outcome == "ended" and run.state.progress.steps >= number:
        return "the run did not notice"
    if fault := unsound(out):
        return f"after the phase {outcome}: {fault}"
    if what != "tau" and outcome != "ended":
        run = trainer(out, **{phase: {"batch_size": size}})
        run.run((phase,))
        if not run.state.progress.is_over(getattr(run.config, phase)):
            return "the resumed run did not end"
        return unsound(out)
    return None


def trainer(out, minutes=10.0, model=None, **phases):
    config = train_run.config(spt_epochs=1, rpt_epochs=1, checkpoint_minutes=minutes, model=model)
    config = replace(config, **{name: replace(getattr(config, name), **values) for name, values in phases.items()})
    return Trainer(config, train_run.log(), train_run.split(), out)


def harming(run, kind, what, number):
    """Return a context in which step ``number`` of a phase of the class ``kind`` goes wrong as ``what`` says."""
    whole, count = kind.forward, [0]

    def forward(self, batch):
        count[0] += 1
        if count[0] != number or what not in HARMS:
            return whole(self, batch)
        if what.endswith("weights"):
            with torch.no_grad():
                run.model.input_norm.bias.fill_(torch.nan if what == "nan weights" else torch.inf)
        return HARMS[what](whole(self, batch))

    return mock.patch.object(kind, "forward", forward)


def unsound(out):
    """Return what is not finite in the files of the folder ``out``, or ``None``."""
    for name in ("state.pt", "state.previous.pt"):
        if (out / name).exists():
            state = load_state(out / name)
            moments = [value for values in (state["optimizer"] or {"state": {}})["state"].values() for value in values.values()]
            parts = {part: (state[part] or {}).values() for part in ("model", "best", "start")}
            for part, tensors in {**parts, "optimizer": moments}.items():
                if not all_finite(tensors):
                    return f"{name} holds numbers under {part!r} that are not finite"
            numbers = [value for row in state["history"] for value in row.values() if isinstance(value, float)]
            if not all_finite([torch.tensor([0.0, state["best_value"], *numbers])]):
                return f"{name} holds results that are not finite"
    if (out / "model.safetensors").exists():
        log = train_run.log()
        found = serve.load(out).recommend([log.item_ids[log.history(0)].tolist()])
        if not found.scores.isfinite().all():
            return "scores that are not finite were served"
    return None


# Numbers that are not finite, planted


def planted(counts, folder):
    """Plant numbers that are not finite in models, in exported files and in states: each is refused by name."""
    run = finished_run(folder / "finished")
    log, rows = train_run.log(), train_run.split().valid
    values = (torch.nan, torch.inf, -torch.inf)
    weights, config, about = load_weights_about(run / "model.safetensors")
    model = LARES(LARESConfig.from_dict({**train_run.MODEL, "n_items": log.n_items}))
    for name in list(weights)[:: 6 if counts.quick else 1]:
        for value in values[:1] if counts.quick else values:
            model.load_state_dict(weights)
            with torch.no_grad():
                model.get_parameter(name).view(-1)[-1] = value
            refused(counts, f"ranks with {value} in {name}", model_ranks, model, log, rows, key=evaluation_key(0))
            refused(counts, f"a Recommender with {value} in {name}", serve.Recommender, model, log.item_ids.tolist())
            bad = {key: tensor.clone() for key, tensor in model.state_dict().items()}
            other = folder / "other"
            shutil.copytree(run, other)
            refused(counts, f"a file with {value} in {name}", save_weights, other / "model.safetensors", bad, config, about)
            with mock.patch("lares_fast._weights.all_finite", lambda _: True):
                save_weights(other / "model.safetensors", bad, config, about)
            refused(counts, f"serving {value} in {name}", serve.load, other)
            for part in ("model", "best", "start"):
                state = load_state(run / "state.pt")
                state[part] = bad
                save_state(other / "state.pt", state)
                refused(counts, f"resuming with {value} in {name} of {part!r}", trainer, other)
            shutil.rmtree(other)
    recommender, whole = serve.load(run), LARES.queries
    for value in values:

        def broken(self, hidden, value=value):
            query = whole(self, hidden).clone()
            query[-1, 0] = value
            return query

        with mock.patch.object(LARES, "queries", broken):
            history = [log.item_ids[log.history(0)].tolist()]
            refused(counts, f"ranks by a query with {value}", model_ranks, recommender.model, log, rows, key=evaluation_key(0))
            refused(counts, f"recommending by a query with {value}", recommender.recommend, history)
            refused(counts, f"encoding a query with {value}", recommender.encode, history)


def refused(counts, what, call, *arguments, **options):
    """Count a loss unless ``call`` raises an error that says that something is not finite."""
    counts.tried(PLANTED)
    try:
        call(*arguments, **options)
    except InputError as error:
        if "not finite" not in str(error) or "\n" in str(error):
            counts.failed(PLANTED, f"{what} has an unclear message: {error!r:.300}")
    except Exception as error:
        counts.failed(PLANTED, f"{what} raised {error!r:.300}")
    else:
        counts.failed(PLANTED, f"{what} was not refused", lost=True)


# Changed settings


def change_settings(counts, folder):
    """Change every setting in every place of a run: the change is shown and logged once, or refused by name."""
    stopped = stopped_runs(folder / "stopped")
    tries = [(place, section, name) for place in REFUSED for section, name in EVERY]
    told = 0
    for place, section, name in tries[::31] if counts.quick else tries:
        counts.tried(CHANGED, goal=len(tries))
        copy = shutil.copytree(stopped / place, folder / "copy")
        try:
            fault = changed_setting(copy, place, section, name)
        except Exception as error:
            fault = f"raised {error!r:.300}"
        if fault:
            counts.failed(CHANGED, f"{section}.{name} at {place!r}: {fault}", lost=True)
        told += (section, name) not in REFUSED[place]
        shutil.rmtree(copy)
    counts.note(CHANGED, f"{told} shown and logged, the others refused")


def changed_setting(copy, place, section, name):
    """Continue the run in ``copy`` for a moment with another value, and return what went wrong, or ``None``."""
    key, old = f"{section}.{name}".removeprefix("."), train_run.config()
    new, seen = changed(old, section, name), []

    def listen(event):
        seen.append(event)
        if event["event"] in ("step", "progress"):
            run.request_stop()

    # The CPU would refuse bf16.
    with mock.patch("lares_fast.train.run.checked_device", lambda config: torch.device("cpu")):
        try:
            run = Trainer(new, train_run.log(), train_run.split(), copy, listen)
        except InputError as error:
            clear = str(error).startswith(f"{key} cannot change") and (section, name) in REFUSED[place]
            return None if clear else f"was refused: {error}"
        if (section, name) in REFUSED[place]:
            return "was taken"
        with contextlib.suppress(Interrupted):
            run.run(train_run.BOTH)
    # A log in memory decides about its format, and the split at hand about its kind.
    before, after = (settings_of(with_source(config, train_run.log(), train_run.split())) for config in (old, new))
    names = [each for each in after if before[each] != after[each]]
    if key not in names and key not in ("data.format", "data.split"):
        return "makes no difference"
    expected = [
        {"event": "changed", "what": "setting", "name": each, "old": before[each], "new": after[each]} for each in names
    ]
    lines = [json.loads(line) for line in (copy / "events.jsonl").read_text().splitlines()]
    parts = ("event", "what", "name", "old", "new")
    logged = [{part: line.get(part) for part in parts} for line in lines if line["event"] == "changed"]
    plain = json.loads(json.dumps(expected))
    shown = [event for event in seen if event["event"] == "changed"]
    return None if shown == expected and logged == plain else f"was shown as {shown} and logged as {logged}"
