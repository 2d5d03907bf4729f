"""Random damage to files, and what a file of a run is read as."""

import json
from dataclasses import asdict

import torch

from lares_fast import serve
from lares_fast.train import config_file
from lares_fast.train.checkpoint import load_state
from lares_fast.train.folder import RunFolder
from tests.support import train_run

# The results of a run that depend on the clock.
CLOCK = ("seconds", "waited", "data_wait", "ms_per_user")


def harmed(content, draw):
    """Return ``content`` with one random kind of damage at a random place."""
    data, size = bytearray(content), len(content)
    at, length = draw.randrange(size), draw.choice((1, 16, 64, 512, 4096))
    match draw.choice(("bit", "bit", "zeros", "noise", "cut", "gap", "swap")):
        case "bit":
            data[at] ^= 1 << draw.randrange(8)
        case "zeros":
            data[at : at + length] = bytes(len(data[at : at + length]))
        case "noise":
            data[at : at + length] = draw.randbytes(len(data[at : at + length]))
        case "cut":
            del data[at:]
        case "gap":
            del data[at : at + length]
        case "swap":
            length = min(length, size // 2)
            a, b = sorted((draw.randrange(size // length) * length, draw.randrange(size // length) * length))
            if a < b:
                data[a : a + length], data[b : b + length] = data[b : b + length], data[a : a + length]
    return bytes(data)


def plain(value):
    """Return ``value`` with every tensor replaced by its dtype, shape and bytes, so that ``==`` compares it."""
    if isinstance(value, torch.Tensor):
        return (
            str(value.dtype),
            tuple(value.shape),
            value.contiguous().view(torch.uint8).numpy().tobytes() if value.dim() else value.item(),
        )
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def saved(folder):
    """Return the state that a resumed run would continue from, and the sentence about it."""
    state, notice = RunFolder(folder).load()
    return plain(asdict(state)), notice


def served(folder):
    """Return the model, its configuration, the item ids and the metadata that ``folder`` is served with."""
    recommender, about = serve.load_about(folder)
    return plain(recommender.model.state_dict()), recommender.model.config, recommender.item_ids, about


def configured(folder):
    """Return the settings in config.yaml."""
    return config_file.load(folder / "config.yaml").to_dict()


def results(folder):
    """Return everything in the newest state and model of ``folder`` that must not depend on an interruption."""
    state = load_state(folder / "state.pt")
    for name in ("settings", "environment", "files", *CLOCK):
        state.pop(name, None)
    history = [{name: value for name, value in row.items() if name not in CLOCK} for row in state.pop("history")]
    rows = sorted(json.dumps(row, sort_keys=True) for row in history)
    return plain(state), rows, served(folder)


def finished_run(folder, **changes):
    """Train both phases for one epoch each, and return the folder."""
    train_run.train(folder, spt_epochs=1, rpt_epochs=1, **changes)
    return folder
