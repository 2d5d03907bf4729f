"""Take away, empty, replace and swap whole files of runs, and call the command line."""

import contextlib
import io
import os
import shutil
from functools import cache

from lares_fast.cli import main
from tests.reliability.counts import Counts
from tests.support.command_line import events, write_csv
from tests.support.damage import results

REPLACED = "a file taken away, emptied, or replaced by a folder or a dangling link"
SWAPPED = "a file swapped with the file of another run, or older than the others"
FILES = (
    *("state.pt", "state.previous.pt", "model.safetensors", "item_ids.json", "config.yaml", "metrics.csv", "events.jsonl"),
    "steps-spt.csv",
    "results.svg",
)
SETTINGS = [
    *("--config", "tiny", "--set", "spt.epochs=2", "--set", "rpt.epochs=1", "--set", "rpt.filter_top=30", "--set", "rpt.k=5"),
    *("--set", "evaluation.ks=[5,10,20]", "--set", "evaluation.depth_ratios=[1]"),
]


def measure(counts: Counts, places: "Places") -> None:
    """Put every file of a run through every kind of harm, and call each command that reads the run."""
    cases = [(name, how) for name in FILES for how in ("missing", "empty", "folder", "link")]
    swaps = [(name, other) for name in FILES[:-1] for other in ("other rate", "other seed", "other log", "earlier")]
    if counts.quick:
        cases, swaps = cases[:10:9], [("model.safetensors", "earlier")]
    for what, pairs in ((REPLACED, cases), (SWAPPED, swaps)):
        for name, how in pairs:
            for command in ("train", "eval", "recommend"):
                counts.tried(what, goal=len(pairs) * 3)
                if fault := places.fault(command, name, how):
                    text, lost = fault
                    counts.failed(what, f"{command} with {name} ({how}): {text}", lost=lost)
        counts.note(what, f"{places.said} ended with an error or a notice")
        places.said = 0


class Places:
    """A finished run, other runs beside it, and what the commands say about the whole run."""

    def __init__(self, folder) -> None:
        self.folder, self.said = folder, 0
        self.log = write_csv(folder / "log.csv", events(int))
        self.run = self.trained("whole")
        self.whole = results(self.run)
        self.answers = {command: self.call(command, self.run) for command in ("eval", "recommend")}

    @cache  # noqa: B019 - one object lives as long as the part runs
    def trained(self, kind):
        """Train a run, or return the folder of a run that was trained before."""
        out, log, more = self.folder / kind.replace(" ", "-"), self.log, []
        match kind:
            case "other rate":
                more = ["--set", "spt.lr=0.01"]
            case "other seed":
                more = ["--set", "seed=5"]
            case "other log":
                log = write_csv(self.folder / "other.csv", [(user + 7, item + 7, time) for user, item, time in events(int, 1)])
            case "earlier":
                more = ["--set", "spt.epochs=1", "--phase", "spt"]
        code, text = called("train", *SETTINGS, "--data", log, "--out", out, *more)
        assert code == 0, text
        return out

    def call(self, command, run):
        """Return the exit code and the text of ``command`` on the folder ``run``."""
        arguments = {
            "train": ["--resume", run],
            "eval": ["--steps", "2", "--run", run],
            "recommend": ["--user", "7", "--run", run],
        }
        return called(command, *arguments[command])

    def fault(self, command, name, how):
        """Harm the file ``name`` of a copy of the run, call ``command``, and return (text, whether lost) if it failed."""
        copy = shutil.copytree(self.run, self.folder / "copy")
        try:
            before = (copy / name).read_bytes()
            self.harm(copy / name, how)
            differs = not (copy / name).is_file() or (copy / name).read_bytes() != before
            code, text = self.call(command, copy)
            self.said += code != 0 or bool(notices(text))
            return self.refused(copy, name, text) if code else self.served(command, copy, name, text, differs)
        except Exception as error:
            return f"raised {error!r:.300}", False
        finally:
            shutil.rmtree(copy)

    def harm(self, path, how):
        """Do what ``how`` says to the file ``path``."""
        if how in ("missing", "folder", "link"):
            path.unlink()
        match how:
            case "missing":
                pass
            case "empty":
                path.write_bytes(b"")
            case "folder":
                path.mkdir()
            case "link":
                path.symlink_to(path.parent / "nowhere")
            case _:
                shutil.copy(self.trained(how) / path.name, path)

    def refused(self, copy, name, text):
        """Return (text, whether lost) unless the error in ``text`` is clear."""
        line = text.strip().splitlines()[-1]
        named = name in line or str(copy) in line or ".csv" in line
        clear = line.startswith("lares-fast: error: ") and named and "Traceback" not in text
        return None if clear else (f"has an unclear error: {text[-300:]!r}", False)

    def served(self, command, copy, name, text, differs):
        """Return (text, whether lost) unless a command that ended well did as promised."""
        told = notices(text)
        if command == "train":
            if results(copy) != self.whole and not any(line.startswith("changed ") for line in told):
                return f"gave other results; the notices are {told}", True
            # The older state and the picture are not read while state.pt is whole.
            needed = differs and name not in ("state.previous.pt", "results.svg", "config.yaml")
            swapped = any(line.startswith("changed ") for line in told)
            return (
                (f"was not announced; the notices are {told}", True)
                if needed and not swapped and name not in str(told)
                else None
            )
        same = without_paths(text, copy) == without_paths(self.answers[command][1], self.run)
        return None if same or told else ("gave another answer without a word", True)


def called(*arguments):
    """Call the command line in this process, and return its exit code and everything that it printed."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        code = main(list(map(str, arguments)))
    return code, text.getvalue()


def notices(text):
    """Return the lines that say that something is not as it was."""
    return [line for line in text.splitlines() if line.startswith(("note ", "changed ", "lares-fast: "))]


def without_paths(text, run):
    """Return the answer of a command without the name of the folder."""
    return text.replace(str(run), "RUN").replace(os.sep, "/")
