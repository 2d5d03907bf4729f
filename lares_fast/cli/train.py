"""``lares-fast train``: train a model, show progress and results, and write the files of the run.

This module declares the arguments. It imports :mod:`lares_fast.cli.training`, which needs torch, when they are right.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import replace
from pathlib import Path

from lares_fast._errors import InputError, with_path
from lares_fast.cli import outputs, settings
from lares_fast.train.config import PHASES, RunConfig
from lares_fast.train.config_file import dump, known_keys
from lares_fast.train.files import CONFIG, FILES, holds_run


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of ``train``."""
    presets = ", ".join(settings.presets())
    parser.usage = "lares-fast train [--data FILE] [--config FILE] [--SECTION.NAME VALUE ...] [OPTION ...]"
    settings.add_data_argument(parser, "interaction log; without it, a synthetic log is made")
    parser.add_argument("--config", metavar="FILE", help=f"YAML file or preset: {presets} (default: instruments)")
    parser.add_argument("--phase", choices=(*PHASES, "both"), default="both", help="phases to run (default: both)")
    parser.add_argument("--out", metavar="DIR", type=Path, help="run folder (default: runs/<data>-<config>-seed<seed>)")
    parser.add_argument("--resume", metavar="DIR", type=Path, help="continue the interrupted run in this folder")
    parser.add_argument(
        "--start-from",
        metavar="DIR",
        type=Path,
        help="start a new run from the phase 1 model of this run, which may have another log",
    )
    parser.add_argument("--tensorboard", action="store_true", help="also write events for TensorBoard into the run folder")
    parser.add_argument("--print-config", action="store_true", help="print all settings as YAML and stop")
    settings.add_arguments(parser, known_keys())


def command(arguments: Namespace) -> int:
    """Run ``train``."""
    config, out = _config_and_folder(arguments)
    # Settings that config.yaml cannot hold are refused before anything else is done.
    text = dump(config)
    if arguments.print_config:
        print(text, end="")
        return 0
    if arguments.phase == "rpt" and not (arguments.resume or arguments.start_from):
        raise InputError(
            "--phase rpt needs a trained model: add --resume DIR or --start-from DIR with a run that has finished SPT training."
        )
    if arguments.start_from and arguments.resume:
        raise InputError("--start-from starts a new run and --resume continues an old one: give one of them.")
    if not arguments.resume and holds_run(out):
        raise InputError(f"{out} already holds a run: continue it with {with_path('--resume', out)}, or choose another --out.")
    written = outputs.files_in(out)
    if arguments.resume:
        outputs.require_apart("--resume", written, {"--data": [config.data.path]})
    else:
        outputs.require_apart("--out", written, {"--config": [arguments.config], "--data": [config.data.path]})
        outputs.require_own_files("--out", out, FILES, begun=outputs.is_of_run(out))
    phases = PHASES if arguments.phase == "both" else (arguments.phase,)
    # Imported here, because torch takes seconds.
    from lares_fast.cli.training import train

    train(config, out, phases, start_from=arguments.start_from, use_tensorboard=arguments.tensorboard)
    user = "user-0001" if config.data.path is None else "USER"
    print(f"next     lares-fast recommend {with_path('--run', out)} --k 10 --user {user}")
    return 0


def _config_and_folder(arguments: Namespace) -> tuple[RunConfig, Path]:
    if arguments.resume:
        for name in ("config", "out"):
            if getattr(arguments, name) is not None:
                raise InputError(f"--{name} cannot be combined with --resume {arguments.resume}: leave --{name} out.")
        if not holds_run(arguments.resume):
            raise InputError(f"{arguments.resume} has no state.pt: give --resume the folder of a run.")
    source = arguments.resume / CONFIG if arguments.resume else arguments.config
    if arguments.resume and not source.is_file():
        raise InputError(f"{source} does not exist: give --resume the folder of a run.")
    config = settings.build(source, arguments.assignments)
    if config.data.path is not None:
        config = replace(config, data=replace(config.data, path=str(Path(config.data.path).absolute())))
    name = Path(arguments.config).stem if arguments.config else "instruments"
    return config, arguments.resume or arguments.out or Path("runs") / f"{_label(config)}-{name}-seed{config.seed}"


def _label(config: RunConfig) -> str:
    """Return a short name of the log, for folders."""
    return Path(config.data.path).name.split(".")[0] or "data" if config.data.path else "synthetic"
