"""The loop both phases share: optimise, validate, stop early, checkpoint, and resume bit for bit.

Everything random is a function of (seed, phase, epoch, step), so a checkpoint holds no generator state, and a run cut
after any step continues as if it had not been cut, with the same bits for the same versions, thread count and instruction
set.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lares_fast._errors import InputError, LaresFastError
from lares_fast._random import Key, fold, root_key
from lares_fast.config import LARESConfig
from lares_fast.data import InteractionLog, Rows, Split, epoch_order
from lares_fast.model import LARES
from lares_fast.train.baselines import markov_ranks, popularity_ranks
from lares_fast.train.config import PHASES, PhaseConfig, RunConfig, checked_phases
from lares_fast.train.evaluate import MASKED, NOT_MASKED, keep_rankable, model_ranks
from lares_fast.train.finite import NotFiniteError, all_finite
from lares_fast.train.folder import RunFolder
from lares_fast.train.identity import ABOUT, identity_of, require_same
from lares_fast.train.metrics import metrics
from lares_fast.train.resume import environment, news, settings_of
from lares_fast.train.rpt import RPT
from lares_fast.train.spt import SPT
from lares_fast.train.state import State, adam, fresh_phase, load_into, load_run, moments, remedy_of_divergence, weights_of

Event = dict[str, Any]

WATCHED = "ndcg@10"
_INIT, _SPT, _RPT, _FILTER, _EVALUATION, _RESTARTED = range(6)
_ORDER, _STEP = range(2)


class Interrupted(LaresFastError):
    """The run was asked to stop; its state is saved."""


class Trainer:
    """A run of one or both phases in the folder ``out``; ``emit`` receives what happens, for progress bars and logs."""

    def __init__(
        self,
        config: RunConfig,
        log: InteractionLog,
        split: Split,
        out: str | Path,
        emit: Callable[[Event], None] = lambda _: None,
    ) -> None:
        """``out`` may hold the state of an earlier, interrupted or shorter run of the same model, data and seed: the
        run then goes on from there, and :meth:`run` emits a ``changed`` event for every setting that is not as it was.
        Raises :class:`InputError` if the state is damaged or of another run, or if a setting has changed that it depends on.
        """
        self.config, self.log, self.split, self.out = config, log, split, Path(out)
        self._listener = emit
        self._stop = False
        self._key = root_key(config.seed)
        model_config = LARESConfig.from_dict({**config.model, "n_items": log.n_items})
        if max(config.rpt.k, *config.evaluation.ks) > log.n_items - 1:
            raise InputError(f"rpt.k and evaluation.ks must be at most {log.n_items - 1}, the number of items.")
        self.state: State = {
            "identity": identity_of(config, model_config, log, split),
            "phase": "spt",
            "restarts": 0,
            "history": [],
            **fresh_phase(),
        }
        with torch.random.fork_rng():
            torch.manual_seed(fold(self._key, _INIT)[0])
            self.model = LARES(model_config)
        self._start: LARES | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._news: list[Event] = []
        self._folder = RunFolder(self.out)
        if self._folder.has_state():
            self._restore(self._folder.load())

    def request_stop(self) -> None:
        """Have the run save its state after the current step and raise :class:`Interrupted`."""
        self._stop = True

    def start_from(self, run: str | Path) -> None:
        """Let a new run begin from the best ``spt`` model of the run in the folder ``run``, which stays as it is.

        Phase ``rpt`` follows it; phase ``spt`` goes on from it, with a fresh optimizer, other random numbers and the
        settings of this run.
        Raises :class:`InputError` if that run is of another model or other data, or has no such model, or if this run
        has begun already.
        """
        if self._folder.has_state() or self.state["steps"]:
            raise InputError(f"{self.out} holds a run already: a run that starts from another's model needs a new folder.")
        path = Path(run) / "state.pt"
        state = load_run(path)
        require_same({**state["identity"], "seed": self.config.seed}, self.state["identity"], Path(run), "start from")
        weights = state["best"] if state["phase"] == "spt" else state["start"]
        if not weights:
            raise InputError(f"{run} holds no model of phase spt: run --phase spt there first.")
        load_into(self.model, weights, path, "best")
        self.state |= {"best": weights, "restarts": state.get("restarts", 0) + 1}

    def run(self, phases: Sequence[str]) -> list[dict[str, Any]]:
        """Train ``phases`` (of ``spt``, ``rpt``), each with a test of its best model; return the rows of metrics.csv.

        ``rpt`` alone needs a folder whose ``spt`` is over, or :meth:`start_from`. No other run writes into the folder
        meanwhile. Raises :class:`InputError` for another phase, for a folder that is in use, and for a model that
        diverges, whose state is not saved.
        """
        wanted = checked_phases(phases)
        if wanted == {"rpt"} and self.state["phase"] == "spt" and not self._best():
            raise InputError(f"{self.out} holds no model of phase spt: run --phase spt or both first.")
        with self._folder.holding(tell=lambda text: self._news.append({"event": "notice", "text": text})):
            # Nothing is written by anybody before this.
            self._listener({"event": "begin"})
            try:
                self._run(wanted)
            except Interrupted:
                self._save()
                raise
        return self.state["history"]

    def _run(self, phases: set[str]) -> None:
        while self._news:
            self._emit(**self._news.pop(0))
        self._baselines()
        for phase in PHASES:
            if phase not in phases:
                continue
            if PHASES.index(self.state["phase"]) > PHASES.index(phase):
                if len(phases) == 1:
                    self._emit("notice", text=f"phase {phase} is over in {self.out}: there is nothing to train.")
                continue
            if phase != self.state["phase"]:
                self._enter(phase)
            self._train(self._phase(phase), self.config.spt if phase == "spt" else self.config.rpt)
            if self.config.evaluation.test:
                self._test(phase)
        if self._best():
            self._export()

    # One phase

    def _phase(self, name: str) -> SPT | RPT:
        if name == "spt":
            return SPT(self.model, self.log, self.split.train, self.config.spt)
        assert self._start is not None
        return RPT(self.model, self._start, self.log, self._rpt_rows(), self.config.rpt)

    def _enter(self, phase: str) -> None:
        """Begin ``phase`` from the best model of the one before."""
        self.model.load_state_dict(self._best())
        self._start = copy.deepcopy(self.model)
        self._optimizer = None
        self.state |= {"phase": phase, **fresh_phase()}

    def _rpt_rows(self) -> Rows:
        settings, rows = self.config.rpt, self.split.train
        if not settings.data_filter:
            return rows
        if self.state["kept"] is None:
            assert self._start is not None
            kept = keep_rankable(
                self._start,
                self.log,
                rows,
                key_of_pass=lambda number: fold(self._key, _FILTER, number),
                passes=settings.filter_passes,
                top=settings.filter_top,
                batch_size=self.config.evaluation.batch_size,
                progress=self._progress("filter"),
            )
            if not len(kept):
                raise InputError(f"rpt.filter_top {settings.filter_top} leaves no training row: raise it or train spt longer.")
            self.state["kept"] = {"users": torch.from_numpy(kept.users), "ends": torch.from_numpy(kept.ends)}
            self._emit("filtered", kept=len(kept), rows=len(rows))
            self._save()
        return Rows(self.state["kept"]["users"].numpy(), self.state["kept"]["ends"].numpy())

    def _train(self, phase: SPT | RPT, settings: PhaseConfig) -> None:
        state = self.state
        key = fold(self._key, _SPT if phase.name == "spt" else _RPT)
        if phase.name == "spt" and state["restarts"]:
            # A model that goes on must not meet the orders and masks of its first epochs again: it has learned them.
            key = fold(self._key, _RESTARTED, state["restarts"])
        optimizer = adam(self.model, settings, state["optimizer"], self._folder.state_file)
        state["optimizer"] = None
        self._optimizer = optimizer
        if state["best_value"] < 0 and (phase.name == "rpt" or self._best()):
            # The model that the phase starts from is the one to beat.
            self._validate(phase.name, {}, epoch=0)
        if not self._folder.has_state():
            # What a run that diverges in its first epoch goes back to.
            self._save()
        # An epoch that was cut ends with its validation even if it has made the phase's last step.
        while state["step"] or not self._over(settings):
            self._train_epoch(phase, settings, optimizer, fold(key, state["epoch"]))

    def _over(self, settings: PhaseConfig) -> bool:
        state = self.state
        out_of_steps = settings.max_steps is not None and state["steps"] >= settings.max_steps
        return state["bad_epochs"] > settings.patience or state["epoch"] >= settings.epochs or out_of_steps

    def _train_epoch(self, phase: SPT | RPT, settings: PhaseConfig, optimizer: torch.optim.Optimizer, key: Key) -> None:
        state = self.state
        batches = epoch_order(len(phase.rows), fold(key, _ORDER)).split(settings.batch_size)
        last = (
            len(batches)
            if settings.max_steps is None
            else min(len(batches), state["step"] + settings.max_steps - state["steps"])
        )
        parameters = list(self.model.parameters())
        saved_at = began = time.monotonic()
        earlier, first = state["seconds"], state["step"]
        self.model.train()
        while state["step"] < last:
            step_key = fold(key, _STEP, state["step"])
            fetched_at = time.monotonic()
            batch: Any = phase.batch(batches[state["step"]], step_key)
            state["waited"] += time.monotonic() - fetched_at
            loss, parts = phase.loss(batch, step_key)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            # One wait for both, and before the step: what is not finite must not reach the weights.
            value, size = torch.stack([loss.detach().to(norm), norm]).tolist()
            if not math.isfinite(value) or not math.isfinite(size):
                raise self._diverged(f"the loss is {value} and the norm of its gradient {size}")
            # Here the saved weights have shown that their next loss is finite: a run can go on from them.
            if time.monotonic() - saved_at > 60 * self.config.checkpoint_minutes:
                self._save()
                saved_at = time.monotonic()
            optimizer.step()
            parts = {"loss": value, **parts}
            state["sums"] = {name: state["sums"].get(name, 0.0) + value for name, value in parts.items()}
            state["step"] += 1
            state["steps"] += 1
            elapsed = time.monotonic() - began
            state["seconds"] = earlier + elapsed
            self._emit(
                "step",
                phase=phase.name,
                epoch=state["epoch"] + 1,
                epochs=settings.epochs,
                step=state["step"],
                steps=last,
                means=self._means(),
                data_wait=state["waited"] / (state["seconds"] or 1.0),
                # A coarse clock may stand still.
                users_per_s=(state["step"] - first) * settings.batch_size / max(elapsed, 1e-9),
            )
            self._heed_stop()
        cost = {"seconds": state["seconds"], "data_wait": state["waited"] / (state["seconds"] or 1.0)}
        # A stop during validation leaves the state at the epoch's last step, from where a resumed run validates again.
        self._validate(phase.name, {**self._means(), **cost}, state["epoch"] + 1)
        state |= {"epoch": state["epoch"] + 1, "step": 0, "sums": {}, "seconds": 0.0, "waited": 0.0}
        self._save()

    def _means(self) -> dict[str, float]:
        return {name: value / self.state["step"] for name, value in self.state["sums"].items()}

    def _heed_stop(self) -> None:
        if self._stop:
            raise Interrupted(f"stopped and saved: resume with lares-fast train --resume {self.out}")

    def _diverged(self, seen: str) -> NotFiniteError:
        return NotFiniteError(f"{seen} {remedy_of_divergence(self.state, self.config, self._folder.state_file)}")

    # Evaluation

    def _validate(self, phase: str, means: dict[str, float], epoch: int) -> None:
        state = self.state
        try:
            results = self._evaluate(self.split.valid, "valid", phase, epoch, self.model.config.steps, means)
        except NotFiniteError:
            raise self._diverged("the scores in validation are not finite") from None
        watched = results[MASKED if self.config.evaluation.watch_masked else NOT_MASKED]
        value = watched[WATCHED]
        # As in RecBole, a tie counts as an improvement.
        if better := value >= state["best_value"]:
            state |= {"best_value": value, "best_epoch": epoch, "bad_epochs": 0, "best": weights_of(self.model)}
            self._drop_tests(phase)
            self._export()
        else:
            state["bad_epochs"] += 1
        self._emit("valid", phase=phase, epoch=epoch, metrics=watched, means=means, best=better)

    def _test(self, phase: str) -> None:
        """The best model of ``phase`` at every test depth."""
        state = self.state
        self._drop_tests(phase)
        last = weights_of(self.model)
        self.model.load_state_dict(self._best())
        try:
            for depth in self.config.evaluation.depths(self.model.config.mean_depth):
                self._evaluate(self.split.test, "test", phase, state["best_epoch"], depth, {})
        finally:
            self.model.load_state_dict(last)
        self._emit("test", phase=phase, rows=[row for row in state["history"] if row["split"] == "test"])
        self._save()

    def _drop_tests(self, phase: str) -> None:
        """A run that goes on past its test must not show it beside a newer model."""
        self.state["history"] = [row for row in self.state["history"] if (row["phase"], row["split"]) != (phase, "test")]

    def _evaluate(
        self, rows: Rows, split: str, phase: str, epoch: int, depth: int, means: dict[str, float]
    ) -> dict[str, dict[str, float]]:
        settings = self.config.evaluation
        ranks = model_ranks(
            self.model,
            self.log,
            rows,
            key=evaluation_key(settings.noise_seed),
            num_steps=depth,
            batch_size=settings.batch_size,
            progress=self._progress(f"{split} T={depth}"),
        )
        return self._record(ranks, phase=phase, split=split, epoch=epoch, test_T=depth, **means)

    def _baselines(self) -> None:
        for name, ranks in (("popularity", popularity_ranks), ("markov", markov_ranks)):
            # A stop may have come between the two.
            if all(row["phase"] != name for row in self.state["history"]):
                found = ranks(self.log, self.split, self.split.test, self._progress(name))
                self._record(found, phase=name, split="test")

    def _record(self, ranks: dict[str, Tensor], **row: Any) -> dict[str, dict[str, float]]:
        results = {history: metrics(rank, self.config.evaluation.ks) for history, rank in ranks.items()}
        self.state["history"] += [{**row, "history": history, **values} for history, values in results.items()]
        return results

    # Files

    def _best(self) -> dict[str, Tensor]:
        return self.state["best"] or {}

    def _export(self) -> None:
        about = {name: self.state["identity"][name] for name in ABOUT}
        self._folder.export(self._best(), self.model.config, self.log.item_ids.tolist(), about)

    def _save(self) -> None:
        start = None if self._start is None else weights_of(self._start)
        snapshot: State = {
            "model": weights_of(self.model),
            "start": start,
            "optimizer": self.state["optimizer"] if self._optimizer is None else self._optimizer.state_dict(),
            "settings": settings_of(self.config),
            "environment": environment(),
        }
        if not all_finite([*snapshot["model"].values(), *moments(snapshot["optimizer"])]):
            raise self._diverged("the weights or Adam's moments are not finite")
        self._folder.save({**self.state, **snapshot})

    def _restore(self, state: State) -> None:
        path = self._folder.state_file
        require_same(state["identity"], self.state["identity"], self.out, "resume with")
        self._news = news(state, self.config, self.out)
        load_into(self.model, state.pop("model"), path, "model")
        for part in ("start", "best"):
            if state[part]:
                load_into(other := copy.deepcopy(self.model), state[part], path, part)
                self._start = other if part == "start" else self._start
        if not all_finite(moments(state["optimizer"])):
            raise InputError(f"{path} holds numbers of the optimizer that are not finite: begin a new run.")
        self.state |= {name: value for name, value in state.items() if name in self.state and name != "identity"}

    # Events

    def _emit(self, event: str, **values: Any) -> None:
        record = {"event": event, **values}
        self._listener(record)
        if event != "step":
            self._folder.add_event(record)

    def _progress(self, what: str) -> Callable[[int, int], None]:
        def report(done: int, total: int) -> None:
            self._listener({"event": "progress", "what": what, "done": done, "total": total})
            self._heed_stop()

        return report


def evaluation_key(noise_seed: int) -> Key:
    """Addresses h0 in every validation and test."""
    return fold(root_key(noise_seed), _EVALUATION)
