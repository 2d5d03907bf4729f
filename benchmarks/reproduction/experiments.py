"""The runs that reproduce the paper, in the order in which they are made.

Every run is ``lares-fast train --config instruments`` (the published settings for Musical Instruments) with the changes of its
entry. Settings are tuned on the validation rows only: trials never rank the test rows.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

# The sha256 of each log. The results are results on exactly these files.
DATA = {
    "Instruments.inter.json": "9c4cda137811b76d3e1fe63dd9b1766ad8dbe6ea9221685c7d6f1c466b8697d4",
    "Beauty.txt": "226cce9c3105299ca0db9615d7d3fb32b3175e90da43100ae352599f0f0107b8",
}


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One run and its folder.

    ``section`` is the part of docs/results.md that shows the run: main, rival, ablation, rpt or trial. ``start_from`` names the
    experiment whose phase-1 model is the start. ``evaluations`` maps the name of a CSV file in the folder to the arguments of
    ``lares-fast eval`` that write it after the run has finished.
    """

    name: str
    data: str
    section: str
    what: str
    config: str = "instruments"
    phase: str = "spt"
    settings: Mapping[str, object] = field(default_factory=dict)
    start_from: str | None = None
    evaluations: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def assignments(self) -> list[str]:
        """Return the ``--set`` arguments."""
        return [word for key, value in self.settings.items() for word in ("--set", f"{key}={_text(value)}")]

    def command(self) -> str:
        """Return the command that makes this run in a folder ``runs`` beside the data."""
        start = ["--start-from", f"runs/{self.start_from}"] if self.start_from else []
        words = ["lares-fast", "train", "--config", self.config, "--data", self.data, "--phase", self.phase, *start]
        return shlex.join([*words, *self.assignments(), "--out", f"runs/{self.name}"])


def _text(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "[" + ",".join(map(_text, value)) + "]" if isinstance(value, Sequence) and not isinstance(value, str) else str(value)


def _instruments(name: str, section: str, what: str, **rest: object) -> Experiment:
    return Experiment(name=name, data="Instruments.inter.json", section=section, what=what, **rest)  # type: ignore[arg-type]


def _beauty(name: str, section: str, what: str, settings: Mapping[str, object], **rest: object) -> Experiment:
    settings = {"evaluation.watch_masked": True, **settings}
    return Experiment(name=name, data="Beauty.txt", section=section, what=what, settings=settings, **rest)  # type: ignore[arg-type]


# Test T = 1 to 16, which are 1/4 to 4 times the mean depth 4; or only the mean depth. T = 1 is always tested.
_EVERY_T = {"evaluation.depth_ratios": [step / 4 for step in range(1, 17)]}
_OWN_T = {"evaluation.depth_ratios": [1.0]}

_NOISE = {f"noise-{seed}": ("--steps", "4", "--set", f"evaluation.noise_seed={seed}") for seed in (1, 2, 3, 4)}
_FINAL = {**_NOISE, "bf16": ("--steps", "4", "--precision", "bf16")}

# The model is a causal transformer of 2 + 2 layers, without noise.
_SASREC = {
    "model.mean_depth": 1,
    "model.depth_sampling": "non-recurrent",
    "model.state_init": "zero",
    "spt.alpha": 0.0,
    "spt.gamma": 0.0,
    **_OWN_T,
}
# Both were chosen on the validation rows of Beauty, because they learn faster: compare trial-batch-256 with beauty-10, and
# beauty with beauty-dot. The similarity is the default of the official code.
_BATCH = {"spt.batch_size": 256}
_SIMILARITY = {"model.similarity": "cos", "model.tau": 0.07}
_COSINE = {**_BATCH, **_SIMILARITY}
# A fifth of the published learning rate, for a few epochs.
_SLOW = {"spt.lr": 0.0002, "spt.epochs": 15}
_ONE_LAYER = {"model.n_pre_layers": 1, "model.n_core_layers": 1}
_TEN = {"spt.epochs": 10, **_OWN_T}
_ABLATION = {**_TEN, **_COSINE}
_RPT = {**_COSINE, "rpt.epochs": 3, "rpt.scores": "model"}
_TRIAL = {"spt.epochs": 10, "evaluation.test": False}
_SASREC_TRIAL = {**_SASREC, **_COSINE, "spt.epochs": 18, "evaluation.test": False}


EXPERIMENTS = (
    _beauty("beauty-sasrec", "rival", "SASRec-style: T = 1, h0 = 0, no alignments, no RPT", _SASREC),
    _beauty("beauty-sasrec-cosine", "rival", "`beauty-sasrec` with batch 256, by cosine", {**_SASREC, **_COSINE}),
    _beauty(
        "beauty-sasrec-cosine-slow",
        "rival",
        "continues from `beauty-sasrec-cosine` with a learning rate of .0002",
        {**_SASREC, **_COSINE, **_SLOW},
        start_from="beauty-sasrec-cosine",
    ),
    _beauty(
        "beauty",
        "main",
        "both phases, L 20, batch 256, cosine",
        {**_COSINE, "rpt.epochs": 3, **_EVERY_T},
        phase="both",
        evaluations=_FINAL,
    ),
    _beauty(
        "beauty-slow",
        "main",
        "phase 1, continues from `beauty` with a learning rate of .0002",
        {**_COSINE, **_SLOW, **_EVERY_T},
        start_from="beauty",
        evaluations=_FINAL,
    ),
    _instruments(
        "instruments",
        "main",
        "both phases, L 20",
        phase="both",
        settings={"rpt.epochs": 3, **_EVERY_T},
        evaluations=_FINAL,
    ),
    _instruments("instruments-sasrec", "rival", "SASRec-style: T = 1, h0 = 0, no alignments, no RPT", settings=_SASREC),
    _instruments(
        "instruments-sasrec-cosine",
        "trial",
        "`instruments-sasrec` by cosine",
        settings={**_SASREC, **_SIMILARITY, "evaluation.test": False},
    ),
    _beauty("beauty-10", "ablation", "as published, batch 1024", _TEN),
    _beauty("ablation-none", "ablation", "batch 256, cosine, both alignments, adapter add, mean T 4", _ABLATION),
    _beauty("ablation-trajectory", "ablation", "without trajectory-level alignment", {**_ABLATION, "spt.alpha": 0.0}),
    _beauty("ablation-step", "ablation", "without step-level alignment", {**_ABLATION, "spt.gamma": 0.0}),
    _beauty("ablation-concat", "ablation", "adapter concat", {**_ABLATION, "model.adapter": "concat"}),
    _beauty("ablation-linear", "ablation", "adapter linear", {**_ABLATION, "model.adapter": "linear"}),
    _beauty("ablation-mean-2", "ablation", "mean T 2", {**_ABLATION, "model.mean_depth": 2}),
    _beauty("ablation-mean-8", "ablation", "mean T 8", {**_ABLATION, "model.mean_depth": 8}),
    _beauty(
        "beauty-rpt-recall",
        "rpt",
        "reward recall, by the model's scores",
        {**_RPT, **_OWN_T},
        phase="rpt",
        start_from="beauty",
    ),
    _beauty(
        "beauty-rpt-ndcg",
        "rpt",
        "reward ndcg, by the model's scores",
        {**_RPT, "rpt.reward": "ndcg", **_OWN_T},
        phase="rpt",
        start_from="beauty",
    ),
    _beauty(
        "beauty-50",
        "main",
        "phase 1, L 50, batch 256, cosine",
        {**_COSINE, "model.max_len": 50, **_EVERY_T},
        evaluations=_FINAL,
    ),
    _beauty(
        "beauty-mean-8",
        "trial",
        "batch 256, cosine, mean T 8, continues from a copy of `ablation-mean-8`",
        {**_TRIAL, **_COSINE, "model.mean_depth": 8, "spt.epochs": 300},
    ),
    _beauty("beauty-sasrec-256", "trial", "`beauty-sasrec` with batch 256", {**_SASREC, **_BATCH, "evaluation.test": False}),
    _beauty("beauty-dot", "trial", "batch 256, by dot as published", {**_BATCH, "evaluation.test": False}),
    _beauty("trial-batch-256", "trial", "batch 256", {**_TRIAL, **_BATCH}),
    _beauty("trial-gamma-1", "trial", "batch 256, cosine, gamma 1", {**_TRIAL, **_COSINE, "spt.gamma": 1.0}),
    _beauty(
        "trial-alpha-0.3",
        "trial",
        "batch 256, cosine, alpha .3",
        {**_TRIAL, **_COSINE, "spt.alpha": 0.3, "spt.epochs": 300},
    ),
    _beauty("trial-layers-1", "trial", "batch 256, cosine, 1 + 1 layers", {**_TRIAL, **_COSINE, **_ONE_LAYER}),
    _beauty(
        "trial-rpt-dropout-0.5",
        "trial",
        "phase 2 from `beauty` by the model's scores, dropout .5 and learning rate .0001",
        {**_RPT, "rpt.dropout": 0.5, "rpt.lr": 0.0001, "evaluation.test": False},
        phase="rpt",
        start_from="beauty",
    ),
    _beauty("trial-dropout-0.3", "trial", "batch 256, cosine, dropout .3", {**_TRIAL, **_COSINE, "model.dropout": 0.3}),
    _beauty("trial-sasrec-tau-0.1", "trial", "`beauty-sasrec-cosine` with tau .1", {**_SASREC_TRIAL, "model.tau": 0.1}),
    _beauty("trial-sasrec-tau-0.05", "trial", "`beauty-sasrec-cosine` with tau .05", {**_SASREC_TRIAL, "model.tau": 0.05}),
    _beauty(
        "trial-sasrec-dropout-0.6", "trial", "`beauty-sasrec-cosine` with dropout .6", {**_SASREC_TRIAL, "model.dropout": 0.6}
    ),
)
