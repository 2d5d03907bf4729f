"""The two-phase training driver, from Python: ``Trainer(RunConfig(), log, split, out).run(("spt", "rpt"))``."""

from lares_fast.train.config import DataConfig, EvalConfig, RPTConfig, RunConfig, SPTConfig
from lares_fast.train.evaluate import model_ranks
from lares_fast.train.trainer import Interrupted, Trainer
from lares_fast.train.metrics import metrics

__all__ = [
    "DataConfig",
    "EvalConfig",
    "Interrupted",
    "RPTConfig",
    "RunConfig",
    "SPTConfig",
    "Trainer",
    "metrics",
    "model_ranks",
]
