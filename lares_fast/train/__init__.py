"""Training in two phases from Python: ``Trainer(RunConfig(), log, split, out).run(("spt", "rpt"))``.

For a training loop of your own, :class:`SPT` and :class:`RPT` prepare batches and compute the losses.
"""

from lares_fast.train.config import DataConfig, EvalConfig, RPTConfig, RunConfig, SPTConfig
from lares_fast.train.evaluate import model_ranks
from lares_fast.train.events import Interrupted
from lares_fast.train.metrics import metrics
from lares_fast.train.rpt import RPT
from lares_fast.train.spt import SPT
from lares_fast.train.trainer import Trainer

__all__ = [
    "RPT",
    "SPT",
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
