"""Damage the files of runs and parquet logs at random, and swap, cut and replace whole files.

Each damage must end in one sentence that names the file, in the checkpoint before it with a notice, or in the whole content.
Anything else is a failure. A wrong result without an error or a notice is a loss.
"""

import random
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

from lares_fast._errors import InputError
from lares_fast.train import Interrupted, Trainer
from lares_fast.train.folder import RunFolder
from tests.reliability import corrupt_places, corrupt_tables
from tests.reliability.counts import Counts
from tests.support import train_run
from tests.support.damage import configured, harmed, results, saved, served

STATES = ("state.pt", "state.previous.pt")
BOTH_STATES = "state.pt and state.previous.pt"
RESUMED = "one file of a stopped run, resumed to its end"
# The share of the tries of the long form that the quick form makes.
QUICK = 0.04


def measure(counts: Counts) -> None:
    """Damage files of every kind, and count what becomes of each."""
    share = QUICK if counts.quick else 1.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        places = corrupt_places.Places(folder)
        run = places.run
        damage_state(counts, run, round(700 * share))
        damage_both_states(counts, run, round(300 * share))
        damage_file(counts, run, "state.previous.pt", saved, round(100 * share))
        for file, read, number in (
            ("model.safetensors", served, 700),
            ("item_ids.json", served, 500),
            ("config.yaml", configured, 700),
        ):
            damage_file(counts, run, file, read, round(number * share))
        damage_results(counts, run, round(400 * share))
        damage_events(counts, run, round(400 * share))
        damage_and_resume(counts, folder, round(75 * share))
        corrupt_tables.measure(counts, places, folder, share)
        corrupt_places.measure(counts, places)


def damage_file(counts, run, name, read, number):
    """Damage ``name`` in the folder ``run``: ``read(run)`` gives the whole content, or one sentence that names the file."""
    whole, draw, refused = read(run), random.Random(name), 0
    for index in range(number):
        counts.tried(name, goal=number)
        with damaged(run / name, draw), judged(counts, name, index):
            try:
                found = read(run)
            except InputError as error:
                refused += 1
                require_sentence(error, name)
            else:
                require_same(found, whole)
    counts.note(name, f"{refused:,} refused, {number - refused:,} read as the whole file")


def damage_state(counts, run, number):
    """Damage ``state.pt``: the run continues from it if it is whole, else from the checkpoint before it with a notice."""
    name, draw, fallbacks = "state.pt", random.Random(1), 0
    newest, older = (saved_alone(run, state) for state in STATES)
    for index in range(number):
        counts.tried(name, goal=number)
        with damaged(run / name, draw), judged(counts, name, index):
            state, notice = saved(run)
            fallbacks += notice is not None
            require_same(state, newest if notice is None else older)
            if notice is not None:
                require_sentence(notice, *STATES)
    counts.note(name, f"{fallbacks:,} continued from the checkpoint before it")


def damage_both_states(counts, run, number):
    """Damage both states: one sentence names both, or one of them is whole."""
    draw, refused = random.Random(2), 0
    newest, older = (saved_alone(run, state) for state in STATES)
    for index in range(number):
        counts.tried(BOTH_STATES, goal=number)
        with damaged(run / STATES[0], draw), damaged(run / STATES[1], draw), judged(counts, BOTH_STATES, index):
            try:
                state, notice = saved(run)
            except InputError as error:
                refused += 1
                require_sentence(error, *STATES)
            else:
                require_same(state, newest if notice is None else older)
    counts.note(BOTH_STATES, f"{refused:,} refused by a sentence with both names")


def damage_results(counts, run, number):
    """Damage ``metrics.csv``: a resumed run writes it again from its state, and says so."""
    name, draw = "metrics.csv", random.Random(3)
    folder = RunFolder(run)
    state, _ = folder.load()
    content = (run / name).read_bytes()
    for index in range(number):
        counts.tried(name, goal=number)
        with damaged(run / name, draw) as data, judged(counts, name, index):
            texts = folder.mend(state)
            require_same((run / name).read_bytes(), content)
            require_told(texts, name, data != content)


def damage_events(counts, run, number):
    """Damage ``events.jsonl``, which may have grown: a resumed run says so and leaves the file as it is."""
    name, draw = "events.jsonl", random.Random(4)
    folder = RunFolder(run)
    state, _ = folder.load()
    size = state.files["events_bytes"]
    content = (run / name).read_bytes()[:size]
    for index in range(number):
        counts.tried(name, goal=number)
        grown = b'{"event": "later"}\n' * draw.randrange(4)
        with damaged(run / name, draw, content + grown) as data, judged(counts, name, index):
            texts = folder.mend(state)
            require_same((run / name).read_bytes(), data)
            require_told(texts, name, data[:size] != content)


def damage_and_resume(counts, folder, number):
    """Damage one file of a stopped run: it continues, says what was damaged, and ends as a run without the damage."""
    draw = random.Random(5)
    sizes = {"spt_epochs": 2, "rpt_epochs": 1}
    train_run.train(folder / "uninterrupted", **sizes)
    whole = results(folder / "uninterrupted")
    with pytest.raises(Interrupted):
        train_run.train(folder / "stopped", stop=train_run.Stop("step", 4), **sizes)
    names = (*STATES, "model.safetensors", "item_ids.json", "metrics.csv", "events.jsonl")
    for index in range(number):
        name, told = names[index % len(names)], []
        counts.tried(RESUMED, goal=number)
        copy = shutil.copytree(folder / "stopped", folder / "copy")
        before = (copy / name).read_bytes()
        with damaged(copy / name, draw) as data, judged(counts, RESUMED, index):
            trainer = Trainer(train_run.config(**sizes), train_run.log(), train_run.split(), copy, told.append)
            trainer.run(train_run.BOTH)
            require_same(results(copy), whole)
            texts = [event["text"] for event in told if event["event"] == "notice"]
            if name in names[3:]:
                require_told(texts, name, data != before)
        shutil.rmtree(copy)


def saved_alone(run, name):
    """Return the state that a run has if ``name`` is its only state."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(run / name, Path(folder) / "state.pt")
        return saved(Path(folder))[0]


class Wrong(AssertionError):
    """A wrong result without an error or a notice."""


class Unclear(AssertionError):
    """A right result whose message is not as promised."""


def require_same(found, expected):
    """Raise :class:`Wrong` unless ``found`` is ``expected``."""
    if found != expected:
        raise Wrong("was read as other content, or gave another result")


def require_sentence(message, *names):
    """Raise :class:`Unclear` unless ``message`` is one short line that holds ``names``."""
    text = str(message)
    if "\n" in text or len(text) > 600 or not all(name in text for name in names):
        raise Unclear(f"has an unclear message: {text!r}")


def require_told(texts, name, differs):
    """Raise :class:`Wrong` unless a sentence names ``name`` exactly if the file differs."""
    told = [text for text in texts if name in text]
    if differs and not told:
        raise Wrong(f"was not announced; the notices are {texts}")
    if not differs and told:
        raise Unclear(f"was announced though the file is whole: {told}")
    for text in told:
        require_sentence(text, name)


@contextmanager
def damaged(path, draw, content=None):
    """Replace ``path`` with a damaged form of ``content``, by default of its own, and yield it; the file is restored then."""
    before = path.read_bytes()
    data = harmed(before if content is None else content, draw)
    path.write_bytes(data)
    try:
        yield data
    finally:
        path.write_bytes(before)


@contextmanager
def judged(counts, what, index):
    """Count a failure of try ``index`` if the block raises."""
    try:
        yield
    except Wrong as error:
        counts.failed(what, f"try {index} {error}", lost=True)
    except Unclear as error:
        counts.failed(what, f"try {index} {error}")
    except Exception as error:
        counts.failed(what, f"try {index} raised {error!r:.300}")
