"""Training in two phases from Python: ``Trainer(RunConfig(), log, split, out).run(("spt", "rpt"))``.

For a training loop of your own, :class:`SPT` and :class:`RPT` prepare batches and compute the losses.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lares_fast.train.config import DataConfig, EvalConfig, RPTConfig, RunConfig, SPTConfig
    from lares_fast.train.evaluate import model_ranks
    from lares_fast.train.events import Interrupted
    from lares_fast.train.ranking import metrics
    from lares_fast.train.rpt import RPT
    from lares_fast.train.spt import SPT
    from lares_fast.train.trainer import Trainer

# Module -> its public names. A module is loaded on first use, because the command line reads settings before it imports torch.
# No module has the name of something public, because it would replace it here.
_MODULES = {
    "config": ("DataConfig", "EvalConfig", "RPTConfig", "RunConfig", "SPTConfig"),
    "evaluate": ("model_ranks",),
    "events": ("Interrupted",),
    "ranking": ("metrics",),
    "rpt": ("RPT",),
    "spt": ("SPT",),
    "trainer": ("Trainer",),
}

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


def __getattr__(name: str) -> Any:
    module = next((module for module, names in _MODULES.items() if name in names), None)
    if module is None:
        raise AttributeError(f"module 'lares_fast.train' has no attribute {name!r}")
    return getattr(importlib.import_module(f"lares_fast.train.{module}"), name)


def __dir__() -> list[str]:
    return __all__
