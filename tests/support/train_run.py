"""A small log, its split, and training runs that take about a second."""

from functools import cache

from lares_fast.data import leave_one_out, synthetic_log
from lares_fast.train import EvalConfig, RPTConfig, RunConfig, SPTConfig, Trainer

MODEL = {"hidden_size": 16, "inner_size": 32, "n_pre_layers": 1, "n_core_layers": 1, "max_len": 8, "mean_depth": 2}
BOTH = ("spt", "rpt")


@cache
def log():
    return synthetic_log(n_users=60, n_items=60, n_brands=6, mean_length=9, seed=1)


@cache
def split():
    return leave_one_out(log())


def config(*, spt_epochs=2, rpt_epochs=2, model=None, **changes):
    return RunConfig(
        model={**MODEL, **(model or {})},
        spt=SPTConfig(batch_size=128, epochs=spt_epochs),
        rpt=RPTConfig(batch_size=128, epochs=rpt_epochs, group_size=2, filter_top=40, filter_passes=2),
        evaluation=EvalConfig(depth_ratios=(1.0, 2.0)),
        seed=7,
        **changes,
    )


class Stop:
    """A listener that requests a stop of ``trainer`` at event number ``count`` of the kind ``event``."""

    def __init__(self, event, count):
        self.event, self.left, self.trainer = event, count, None

    def __call__(self, record):
        if record["event"] == self.event:
            self.left -= 1
            if self.left == 0:
                self.trainer.request_stop()


def train(out, phases=BOTH, stop=None, **changes):
    trainer = Trainer(config(**changes), log(), split(), out, stop or (lambda _: None))
    if stop is not None:
        stop.trainer = trainer
    trainer.run(phases)
    return trainer
