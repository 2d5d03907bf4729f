"""``lares-fast demo``: the whole road on a made-up log in a few minutes."""

from __future__ import annotations

import time
from argparse import ArgumentParser, Namespace
from pathlib import Path

import torch

from lares_fast._errors import InputError
from lares_fast.cli import settings
from lares_fast.cli.train import train
from lares_fast.data import InteractionLog
from lares_fast.serve import load
from lares_fast.train.config import PHASES
from lares_fast.train.files import LOCK, locked

_FILES = ("config.yaml", "metrics.csv", "events.jsonl", "curves.png", "model.safetensors", "item_ids.json", "state.pt")
_SHOWN_USERS, _SHOWN_HISTORY, _SHOWN_ITEMS = 3, 6, 5


def add_arguments(parser: ArgumentParser) -> None:
    """The arguments of ``demo``."""
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("runs/demo"), help="run folder (default: runs/demo)")
    parser.add_argument("--set", metavar="A.B=C", action="append", default=[], dest="assignments", help="change one setting")


def command(arguments: Namespace) -> int:
    """Run ``demo``."""
    began = time.monotonic()
    out = arguments.out
    config = settings.build("demo", arguments.assignments)
    if config.data.path is not None:
        raise InputError("the demo makes its own log: use lares-fast train for data.path.")
    _check_replaceable(out)
    with locked(out):
        for name in _FILES:
            (out / name).unlink(missing_ok=True)
    # The demo's model is too small for a second thread to pay for its own synchronisation.
    torch.set_num_threads(1)
    log = train(config, out, PHASES)
    print(_examples(out, log))
    print(f"\nplots    {out / 'curves.png'}\ntime     {time.monotonic() - began:.0f} s")
    print(f"next     lares-fast recommend --run {out} --k 10 --user {log.user_ids[0]}")
    print("         lares-fast train --data YOUR_LOG --config instruments")
    return 0


def _check_replaceable(out: Path) -> None:
    """A folder that an earlier demo filled may be replaced, anything else not."""
    if not out.exists() or not any(path.name != LOCK for path in out.iterdir()):
        return
    if not (out / "config.yaml").is_file() or settings.build(out / "config.yaml").data.path is not None:
        raise InputError(f"{out} holds something other than an earlier demo: choose another --out.")


def _examples(out: Path, log: InteractionLog) -> str:
    recommender = load(out)
    histories = [log.item_ids[log.history(user)].tolist() for user in range(_SHOWN_USERS)]
    found = recommender.recommend(histories, _SHOWN_ITEMS)
    lines = ["\nThree recommendations (synthetic people and products, items already bought left out):"]
    for user, history in enumerate(histories):
        dots = "... " if len(history) > _SHOWN_HISTORY else ""
        lines.append(f"  {log.user_ids[user]} bought {dots}{' '.join(history[-_SHOWN_HISTORY:])}")
        pairs = zip(found.ids[user], found.scores[user].tolist(), strict=False)
        lines.append("    next " + ", ".join(f"{item} ({score:.2f})" for item, score in pairs))
    return "\n".join(lines)
