"""Another value for every setting, and runs that were stopped in every place where a setting could change."""

from dataclasses import replace

import pytest

from lares_fast.train import Interrupted, Trainer
from lares_fast.train.checkpoint import load_state, save_state
from tests.support import train_run

# Another value for every setting.
OTHER = {
    "data": {
        "path": "moved.csv", "format": "csv", "separator": "tab", "user": "who", "item": "what", "time": "when",
        "rating": "stars", "min_rating": 4.0, "duplicates": "last", "min_events": 4, "min_item_events": 5, "split": "temporal",
        "valid_fraction": 0.2, "test_fraction": 0.2, "synthetic_users": 7, "synthetic_items": 8, "synthetic_seed": 9,
    },
    "spt": {
        "batch_size": 64, "lr": 0.01, "weight_decay": 0.1, "epochs": 3, "patience": 1, "max_steps": 99, "alpha": 0.3,
        "optimizer": "adamw", "schedule": "linear", "warmup_steps": 5, "clip_norm": 1.5, "accumulate": 2,
        "gamma": 0.3, "same_step": False,
    },
    "rpt": {
        "batch_size": 64, "lr": 0.01, "weight_decay": 0.1, "epochs": 3, "patience": 1, "max_steps": 99, "group_size": 3, "k": 5,
        "optimizer": "adamw", "schedule": "linear", "warmup_steps": 5, "clip_norm": 1.5, "accumulate": 2,
        "beta": 2.0, "reward": "ndcg", "scores": "model", "dropout": 0.2, "data_filter": False, "filter_top": 30,
        "filter_passes": 1,
    },
    "evaluation": {
        "batch_size": 16, "ks": (10, 20), "depth_ratios": (1.0,), "noise_seed": 1, "watch_masked": True, "test": False,
    },
}  # fmt: skip
TOP = {"checkpoint_minutes": 3.0, "device": "cpu", "precision": "bf16"}
EVERY = [(section, name) for section, values in OTHER.items() for name in values] + [("", name) for name in TOP]
ROWS_OF_STEP = {phase: {(phase, "batch_size"), (phase, "accumulate")} for phase in ("spt", "rpt")}
BEST = {("evaluation", "noise_seed"), ("evaluation", "watch_masked")}
FILTER = {("rpt", "data_filter"), ("rpt", "filter_top"), ("rpt", "filter_passes")}

# Place where a run was stopped -> settings that cannot change there.
REFUSED = {
    "spt, before its first step": set(),
    "spt, in an epoch": ROWS_OF_STEP["spt"],
    "spt, in the second epoch": ROWS_OF_STEP["spt"] | BEST,
    "spt, over": BEST,
    "rpt, in the filter": set(),
    "rpt, in an epoch": ROWS_OF_STEP["rpt"] | BEST | FILTER,
    "rpt, over": BEST | FILTER,
}


def changed(config, section, name):
    if not section:
        return replace(config, **{name: TOP[name]})
    return replace(config, **{section: replace(getattr(config, section), **{name: OTHER[section][name]})})


def stopped_runs(out):
    """Stop runs in the places of the table, and return the folder ``out`` of their folders."""
    stops = {
        "spt, in an epoch": train_run.Stop("step", 1),
        "spt, in the second epoch": train_run.Stop("step", 4),
        "rpt, in the filter": lambda event: event.get("what") == "filter" and trainer.request_stop(),
        "rpt, in an epoch": lambda event: (event["event"], event.get("phase")) == ("step", "rpt") and trainer.request_stop(),
    }
    for place, stop in stops.items():
        trainer = Trainer(train_run.config(), train_run.log(), train_run.split(), out / place, stop)
        if isinstance(stop, train_run.Stop):
            stop.trainer = trainer
        with pytest.raises(Interrupted):
            trainer.run(train_run.BOTH)
    train_run.train(out / "spt, over", ("spt",))
    train_run.train(out / "rpt, over")
    first = load_state(out / "spt, in an epoch" / "state.pt")
    save_state(out / "spt, before its first step" / "state.pt", {**first, "step": 0, "steps": 0, "sums": {}, "optimizer": None})
    return out
