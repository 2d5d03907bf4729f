"""The work of ``lares-fast train``: train into a folder, and show progress, results and plots."""

from __future__ import annotations

import platform
import signal
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import FrameType

import torch

from lares_fast import __version__, _native, _settings
from lares_fast._device import choose
from lares_fast._errors import with_path
from lares_fast.cli import signals, tensorboard
from lares_fast.cli.console import Console, Event, counted, device_text, indented, notice
from lares_fast.cli.inputs import open_log, split_log
from lares_fast.cli.pictures import Pictures
from lares_fast.cli.tables import bound_rows, protocol_text, results_text
from lares_fast.data import InteractionLog, Split
from lares_fast.train import Interrupted, RunConfig, Trainer
from lares_fast.train.config import PHASES
from lares_fast.train.config_file import dump
from lares_fast.train.files import holds_run
from lares_fast.train.memory import require_memory
from lares_fast.train.results import Row


def train(
    config: RunConfig,
    out: Path,
    phases: tuple[str, ...],
    *,
    start_from: Path | None = None,
    use_tensorboard: bool = False,
) -> InteractionLog:
    """Train into the folder ``out``, show progress, results and plots, and return the log.

    SIGINT, SIGTERM and SIGHUP, and a closed output, save the run before it ends. If the input is bad, no file is written.
    """
    stop = _Stop()
    again = f"lares-fast train {with_path('--resume', out)}" + ("" if len(phases) > 1 else f" --phase {phases[0]}")
    try:
        with signals.handling(stop):
            return _train(config, out, phases, stop, start_from, use_tensorboard)
    except Interrupted:
        raise Interrupted(f"stopped and saved; resume with: {again}") from None
    except KeyboardInterrupt:
        if holds_run(out):
            raise Interrupted(f"aborted; resume from the last saved state with: {again}") from None
        raise Interrupted("aborted before a state was saved; begin the run again.") from None


def _train(
    config: RunConfig,
    out: Path,
    phases: tuple[str, ...],
    stop: _Stop,
    start_from: Path | None,
    use_tensorboard: bool,
) -> InteractionLog:
    start_tensorboard = tensorboard.listener(out / "tensorboard") if use_tensorboard else None
    with Console() as console:
        console.say(header(config.seed))
        choice = choose(config.device)
        if (text := device_text(choice)) is not None:
            console.say(f"{text}; precision {config.precision}")
        log = open_log(config.data, progress=partial(console.progress, "reading"))
        split = split_log(config.data, log)
        if config.data.path is None:
            console.say("no --data was given, so a synthetic log is made")
        console.say(f"data     {indented(log.summary())}")
        console.say(f"split    {split.summary()}")
        listeners: list[Callable[[Event], None]] = [stop.if_unheard(console)]

        def emit(event: Event) -> None:
            for listen in listeners:
                listen(event)

        if not holds_run(out):
            # A model that is too large is not even made. A run that continues knows what is left to do, and asks later.
            require_memory(config, log, split, phases, choice.device)
        trainer = Trainer(config, log, split, out, emit=emit)
        if start_from is not None:
            trainer.start_from(start_from)
        parameters = sum(value.numel() for value in trainer.model.parameters())
        console.say(f"model    {parameters:,} parameters, T = {trainer.model.config.steps} at evaluation")

        def begin(event: Event) -> None:
            if event["event"] == "begin" and start_tensorboard is not None:
                listeners.append(start_tensorboard())

        listeners.append(begin)
        pictures = Pictures(
            trainer,
            f"{log.name}, seed {config.seed}",
            lambda rows: table_rows(rows, log, split, config),
            ks=config.evaluation.ks,
            protocol=protocol_text(log, split, "test", config.evaluation),
            settings=dump(config),
        )
        listeners.append(pictures)
        stop.trainer = trainer
        try:
            rows = trainer.run(phases)
        except Interrupted:
            pictures.draw()
            raise
        finally:
            stop.trainer = None
        pictures.draw()
        console.say("\n" + run_table(rows, log, split, config))
        names = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
        console.say(f"\nsaved    {out}: {', '.join(names)}")
    return log


def header(seed: int) -> str:
    """Return two lines about the software, the threads, the seed and the backend of a run."""
    info = _native.build_info()
    requested = _settings.backend()
    native = f"native CPU code ({info['simd']})" if info["native"] else f"plain PyTorch ({info['reason']})"
    if requested != "auto":
        name = "plain PyTorch" if requested == "reference" else requested
        native = f"{name} (LARES_FAST_BACKEND={requested})"
    cuda = "built" if info["cuda_built"] else f"not built ({info['cuda_reason']})"
    return (
        f"lares_fast {__version__}  torch {torch.__version__}  Python {platform.python_version()}  "
        f"{counted(torch.get_num_threads(), 'thread')}  seed {seed}\nbackend  {native}; CUDA code {cuda}"
    )


def run_table(rows: list[Row], log: InteractionLog, split: Split, config: RunConfig) -> str:
    """Return the results table and a few sentences about it."""
    table = results_text(table_rows(rows, log, split, config), config.evaluation.ks)
    return f"{table}\n\n{protocol_text(log, split, 'test', config.evaluation)}"


def table_rows(rows: list[Row], log: InteractionLog, split: Split, config: RunConfig) -> list[Row]:
    """Return the test rows: baselines, for a synthetic log the best possible ranking, and both phases at every T."""
    tested = [row for row in rows if row["split"] == "test"]
    baselines = [row for row in tested if row["phase"] not in PHASES]
    models = [row for row in tested if row["phase"] in PHASES]
    return [*baselines, *bound_rows(log, split.test, config.evaluation), *models]


class _Stop:
    """What signals do, and output that nobody reads. ``trainer`` is the trainer that is running, if any."""

    trainer: Trainer | None = None
    requested = False

    def __call__(self, number: int, _: FrameType | None) -> None:
        """Have the trainer save the run after the current step. A second SIGINT, or no trainer, aborts at once."""
        if self.trainer is None or (self.requested and number == signal.SIGINT):
            raise KeyboardInterrupt
        self._save(
            self.trainer, f"{signal.Signals(number).name}: saving after this step; press Ctrl-C again to abort without saving"
        )

    def _save(self, trainer: Trainer, text: str) -> None:
        self.requested = True
        trainer.request_stop()
        # This fails if a signal interrupts another line on stderr, or if the terminal is closed.
        with suppress(RuntimeError, OSError):
            notice(text)

    def if_unheard(self, console: Console) -> Callable[[Event], None]:
        """Return a listener that shows events, and has the trainer save the run when the output cannot be written any more."""

        def show(event: Event) -> None:
            try:
                console(event)
            except OSError as error:
                if self.trainer is None:
                    raise
                if not self.requested:
                    self._save(
                        self.trainer, f"the output cannot be written any more ({error.strerror}): saving after this step"
                    )

        return show
