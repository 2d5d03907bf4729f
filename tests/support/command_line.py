"""What the tests of the command line share."""

import csv
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import lares_fast


def is_one_sentence(err):
    """Return whether ``err`` is one line without a traceback."""
    lines = err.strip().splitlines()
    return len(lines) == 1 and lines[0].startswith("lares-fast: error: ") and "Traceback" not in err


def refused(result, *words):
    """Assert that ``result`` is an error of one sentence that holds ``words``."""
    lines = result.err.strip().splitlines()
    assert result.code == 2 and len(lines) == 1 and lines[0].startswith("lares-fast: error: "), result
    assert all(word in lines[0] for word in words), lines[0]
    return True


def write_csv(path, rows, names=("user_id", "item_id", "timestamp")):
    path.write_text("\n".join([",".join(names), *(",".join(map(str, row)) for row in rows), ""]))
    return path


def events(ids, seed=0):
    """Return rows (user, item, time) of 60 users with 6 to 9 of 40 items each, in random order."""
    draw = random.Random(seed)
    rows = [
        (ids(user), ids(item), 100 * draw.randrange(1000) + place)
        for user in range(1, 61)
        for place, item in enumerate(draw.sample(range(1, 41), draw.randint(6, 9)))
    ]
    draw.shuffle(rows)
    return rows


def python(*arguments, prepare=lambda: None):
    """Start Python in a process of its own, on one thread. The process runs ``prepare()`` first."""
    root = Path(lares_fast.__file__).parents[1]

    def begin():
        # A shell lets a command in the background ignore SIGINT, and its children inherit this.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        prepare()

    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
        preexec_fn=begin,
    )


def results_of(text, heading):
    """Return {row name: {column: text}} of the table under ``heading``."""
    lines = text[text.index(f"\n{heading}") + 1 :].splitlines()
    columns = lines[0][len(heading) :].split()
    rows = {}
    for line in lines[2:]:
        if not line.strip():
            break
        cells = line.split()
        rows[" ".join(cells[: -len(columns)])] = dict(zip(columns, cells[-len(columns) :], strict=True))
    return rows


def metrics_csv(run):
    """Return the rows of metrics.csv of ``run``."""
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))
