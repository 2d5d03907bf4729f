"""Settings as arguments: ``--config``, an option for each setting, and ``--set``."""

from __future__ import annotations

import os
from argparse import Action, ArgumentParser, Namespace
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lares_fast._errors import InputError, printable
from lares_fast.cli import setting_table
from lares_fast.config import MODEL
from lares_fast.train.config import MEMORY, RunConfig
from lares_fast.train.config_file import Setting, known_keys, read, require_plain, run_config
from lares_fast.train.files import CONFIG

_METAVARS = {"an integer": "N", "a number": "X", "true or false": "BOOL", "text": "TEXT"}
_PRESETS = Path(__file__).parent / "configs"


def presets() -> list[str]:
    """Return the names of the presets, which are the configurations in this package."""
    return sorted(path.stem for path in _PRESETS.glob("*.yaml"))


def build(config: str | Path | None = None, assignments: Iterable[str | Setting] = ()) -> RunConfig:
    """Return the configuration of the YAML file or preset ``config``, changed by ``assignments``.

    An assignment is a setting, or a text such as ``spt.lr=0.001`` from ``--set``. If a file and a preset have the name
    ``config``, the file is used. Raises :class:`InputError`, which names the file or argument and the key, for an unknown
    key, a wrong type or a bad value.
    """
    settings = [] if config is None else read(_find(config))
    return run_config([*settings, *(_assignment(each) if isinstance(each, str) else each for each in assignments)])


def of_run(run: Path, assignments: Iterable[str | Setting]) -> RunConfig:
    """Return the configuration of the run folder ``run``, changed by ``assignments``.

    For a folder with a model that no run wrote, it is the default configuration, whose log must be given.
    """
    if (run / CONFIG).is_file():
        return build(run / CONFIG, assignments)
    # A pipe or a folder of this name is no sign of a model that was saved.
    if (run / MODEL).is_file() and not os.path.lexists(run / CONFIG):
        return build(None, [(str(run), "data.format", MEMORY), *assignments])
    raise InputError(f"{run / CONFIG} does not exist: give --run the folder of a run, or of a model that was saved.")


def _find(config: str | Path) -> Path:
    # Unlike Path.is_file, this raises no error for a name that is too long.
    if os.path.isfile(config):
        return Path(config)
    if str(config) in presets():
        return _PRESETS / f"{config}.yaml"
    raise InputError(
        f"--config {printable(str(config), 100)} is neither a file nor a preset (presets: {', '.join(presets())})."
    )


def _assignment(text: str) -> Setting:
    key, equals, value = text.partition("=")
    shown = printable(text, 100)
    if not equals:
        raise InputError(f"--set {shown} must have the form section.key=value, for example --set spt.lr=0.001.")
    require_plain(f"--set {shown}", key.strip(), value.strip())
    return f"--set {shown}", key.strip(), value.strip()


def given(assignments: Iterable[str | Setting]) -> dict[str, str]:
    """Return the argument that gives each setting: key -> ``--set KEY``, or the option of the setting."""
    found = {}
    for each in assignments:
        source, key, _ = _assignment(each) if isinstance(each, str) else each
        found[key] = f"--set {key}" if isinstance(each, str) else source.partition(" ")[0]
    return found


def require_used(command: str, given: Mapping[str, str], used: Collection[str], instead: Mapping[str, str]) -> None:
    """Raise :class:`InputError` for a setting of :func:`given` that ``command`` does not use.

    ``instead`` names the options that take the place of other settings. An unknown setting is left to :func:`build`.
    """
    for key, option in given.items():
        if key in known_keys() and key not in used:
            remedy = f"give {instead[key]} instead" if key in instead else "leave it out"
            raise InputError(f"{option} has no effect on {command}: {remedy}.")


def add_set_argument(parser: ArgumentParser, example: str = "spt.lr=0.001") -> None:
    """Add the argument ``--set``; its values are in ``assignments``."""
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        dest="assignments",
        help=f"change one setting, such as {example}; repeatable (lares-fast train --print-config lists all)",
    )


def add_data_argument(parser: ArgumentParser, text: str) -> None:
    """Add the argument ``--data``, which gives the setting ``data.path``, with the help ``text``."""
    parser.add_argument("--data", "--data.path", metavar="FILE", action=_Setting, const="data.path", default=[], help=text)


def add_arguments(parser: ArgumentParser, keys: Iterable[str], usual: str | None = None) -> None:
    """Add ``--set``, and an option for each setting of ``keys``. Their values are in ``assignments``, in their order.

    ``usual`` names the default in the help; without it the help shows the value. ``data.path`` gets no option here.
    """
    wanted, groups = set(keys), {}
    add_set_argument(parser, *(["data.user=NAME"] if usual else []))
    for row in setting_table.rows():
        section = row.key.rpartition(".")[0]
        if row.key in wanted and row.key != "data.path":
            if section not in groups:
                groups[section] = parser.add_argument_group(
                    f"settings in {section}" if section else "other settings", setting_table.heading(section)
                )
            # argparse reads a percent sign as the name of a value.
            meaning = setting_table.plain(row.meaning).replace("%", "%%")
            metavar = _METAVARS.get(row.kind.removesuffix(" or null"), "LIST")
            text = f"{meaning} (default: {usual or row.default})"
            groups[section].add_argument(f"--{row.key}", metavar=metavar, action=_Setting, const=row.key, default=[], help=text)


class _Setting(Action):
    """An option that gives the setting ``const``."""

    def __init__(self, option_strings: Sequence[str], dest: str, **how: Any) -> None:
        super().__init__(option_strings, "assignments", **how)

    def __call__(self, parser: ArgumentParser, namespace: Namespace, value: Any, option: str | None = None) -> None:
        source = printable(f"{self.option_strings[0]} {value}", 100)
        require_plain(source, self.const, value)
        # The default list is shared by all options.
        namespace.assignments = [*namespace.assignments, (source, self.const, value)]
