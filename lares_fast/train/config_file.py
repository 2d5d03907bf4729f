"""Read and write config.yaml, the settings of a run. All settings are checked before anything is written."""

from __future__ import annotations

import functools
import hashlib
import importlib
import io
import re
import reprlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from lares_fast._errors import InputError, printable
from lares_fast._files import open_regular, read_small, write_text
from lares_fast.config import LARESConfig
from lares_fast.train.config import SECTIONS, RunConfig
from lares_fast.train.suggestions import nearest

# (source, dotted key, value). The source is the name of a file or an argument. Errors show it.
Setting = tuple[str, str, Any]

TOP = ("seed", "checkpoint_minutes", "device", "precision")
# A file with all settings has two kilobytes, two levels and a few lists.
_MOST_BYTES = 100_000
_DEEPEST = 8
_MOST_BRACKETS = 1000

# A run writes this line first. Files that users write, and files of earlier versions, have no such line.
_MARK = "# The sha256 of the lines below is "
_MARKED = re.compile(re.escape(_MARK) + r"([0-9a-f]{64}); change settings with --set\n")
_DIGITS = re.compile(r"[0-9a-f]{16}")


def read(path: Path) -> list[Setting]:
    """Return the settings in the YAML file ``path``.

    Raises :class:`InputError`, which names the file, for a file that is not a configuration, and for a file that a run has
    written and somebody has edited.
    """
    return list(_flatten(printable(str(path)), _read(path)))


def load(path: Path) -> RunConfig:
    """Return the configuration in the YAML file ``path``. Raises the errors of :func:`read` and :func:`run_config`."""
    return run_config(read(path))


def run_config(settings: Iterable[Setting]) -> RunConfig:
    """Return the configuration with ``settings``; of equal keys the last one counts.

    Raises :class:`InputError`, which names the source and the key, for an unknown key, a wrong type or a bad value.
    """
    known = known_keys()
    wanted: dict[str, Setting] = {}
    for setting in settings:
        source, key, _ = setting
        if key not in known:
            meant = nearest(key[:100], known)
            hint = f"did you mean {meant!r}?" if meant else "lares-fast train --print-config lists all."
            raise InputError(f"{source}: unknown setting {_short(key)}; {hint}")
        wanted[key] = setting
    values = _typed(list(wanted.values()))
    origin = {key.split(".")[0]: source for key, (source, _, _) in wanted.items()}
    if not 0 <= values.get("seed", 0) < 2**64:
        raise InputError(f"{origin['seed']}: seed must be in 0..2**64-1, but got {values['seed']}.")
    built = {name: _construct(name, values.pop(name, {}), origin.get(name)) for name in SECTIONS}
    try:
        return RunConfig(**{**built, **values})
    except InputError as error:
        raise InputError(f"{origin.get(str(error.setting), '')}: {error}".removeprefix(": ")) from None


def dump(config: RunConfig) -> str:
    """Return ``config`` as YAML with every setting, which :func:`build` can read.

    Raises :class:`InputError` for a text that YAML cannot hold.
    """
    values = config.to_dict()
    values["model"] = {**_model_values(LARESConfig.preview()), **values["model"]}
    yaml, load = _yaml(), _loader()

    class Dumper(yaml.SafeDumper):  # type: ignore[name-defined,misc]
        """Quotes texts that would be read as something else, such as 1e3."""

        def represent_str(self, data: str) -> Any:
            try:
                plain = load(data) == data
            except (yaml.YAMLError, ValueError):
                plain = False
            return self.represent_scalar("tag:yaml.org,2002:str", data, style=None if plain else "'")

    Dumper.add_representer(str, Dumper.represent_str)
    text = str(yaml.dump(values, Dumper=Dumper, sort_keys=False))
    _require_same(values, text)
    return text


def _require_same(values: dict[str, Any], text: str) -> None:
    """Raise :class:`InputError` unless the settings in ``text`` are read as ``values``."""
    yaml, found = _yaml(), None
    with suppress(yaml.YAMLError, ValueError):
        found = run_config(list(_flatten("", _loader()(text)))).to_dict()
    if found == values:
        return
    for section, inner in values.items():
        for key, value in inner.items() if isinstance(inner, dict) else ():
            if isinstance(value, str) and (found[section][key] != value if found else not value.isprintable()):
                raise InputError(f"config.yaml cannot hold {value!r} as {section}.{key}: rename the file or the column.")
    raise InputError("config.yaml cannot hold the settings: please report this.")


def _yaml() -> Any:
    # Imported on first use, because importing the package must be quick.
    return importlib.import_module("yaml")


def _loader() -> Callable[[str], Any]:
    """Return the function that reads YAML: numbers are those of jsonargparse."""
    load: Callable[[str], Any] = importlib.import_module("jsonargparse").get_loader("yaml")
    return load


def marked(text: str) -> str:
    """Return the settings ``text`` below a line with its checksum. Files of runs have this form."""
    return f"{_MARK}{_checksum(text)}; change settings with --set\n{text}"


def save(path: Path, config: RunConfig) -> None:
    """Atomically write ``config`` as YAML below a line with its checksum."""
    write_text(path, marked(dump(config)))


def is_written(path: Path) -> bool:
    """Return whether :func:`save` wrote the file ``path``, which may have been edited since then."""
    try:
        with open_regular(path) as file:
            return file.read(len(_MARK)) == _MARK.encode()
    except (OSError, InputError):
        return False


def known_keys() -> list[str]:
    """Return all dotted keys."""
    sections = [f"{name}.{field.name}" for name, kind in SECTIONS.items() for field in fields(kind)]
    return [*(key for key in sections if key != "model.n_items"), *TOP]


def _read(path: Path) -> dict[str, Any]:
    yaml = _yaml()
    loader = _loader()
    try:
        text = io.StringIO(read_small(path, _MOST_BYTES).decode(), newline=None).read()
        text = _verified(path, text)
        _require_small(text)
        values = loader(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "unreadable"
        raise InputError(f"{path}{place}: this is not valid YAML ({problem}).") from None
    except InputError:
        raise
    except (OSError, ValueError, OverflowError) as error:
        # The file has undecodable bytes, an impossible date, or a number with thousands of digits.
        raise InputError(f"{path} cannot be read as a configuration: {str(error)[:200]}.") from None
    except RecursionError:
        raise InputError(f"{path} cannot be read as a configuration: it is nested too deeply.") from None
    if not isinstance(values, dict):
        found = "nothing" if values is None else _short(values)
        raise InputError(f"{path} must hold 'key: value' lines, but it holds {found}.")
    return values


def _require_small(text: str) -> None:
    """Raise the errors of PyYAML if a YAML text has aliases or is nested deeply: a few lines of them can take gigabytes.

    An alias that no anchor defines is left to the loader, because ``*name`` may be a name.
    """
    yaml = _yaml()
    if text.count("[") + text.count("{") > _MOST_BRACKETS:
        raise yaml.composer.ComposerError(problem="it has too many brackets")
    depth, anchors, problem = 0, False, None
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if anchors and isinstance(event, yaml.AliasEvent):
            problem = f"aliases such as *{event.anchor:.20} are refused: write the value itself"
        anchors |= getattr(event, "anchor", None) is not None
        if depth > _DEEPEST:
            problem = "it is nested too deeply"
        if problem:
            raise yaml.composer.ComposerError(problem=problem, problem_mark=event.start_mark)


def _verified(path: Path, text: str) -> str:
    """Return ``text`` without the line of its checksum. Raise :class:`InputError` if the checksum is wrong."""
    match = _MARKED.match(text)
    rest = text[match.end() :] if match else text
    if match and match[1] == _checksum(rest):
        return rest
    if match or _has_rest_of_mark(text):
        raise InputError(
            f"{path} was edited or is damaged: undo the edit and change settings with --set, or remove its first line to use "
            "it as it is."
        )
    return text


def _has_rest_of_mark(text: str) -> bool:
    """Return whether a comment in ``text`` has a part of the line of the checksum, as in a damaged file."""
    comments = [line.partition("#")[2] for line in text.split("\n")]
    return any("sha256" in comment or _DIGITS.search(comment) for comment in comments)


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _short(value: Any) -> str:
    """Return a short text for ``value``, because the aliases of YAML can make a value endless."""
    return _SHORT.repr(value)


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60
_SHORT.maxlevel = 2


def _flatten(source: str, values: dict[str, Any]) -> Iterable[Setting]:
    for name, value in values.items():
        if name not in SECTIONS:
            yield source, str(name), _flat(source, str(name), value)
        elif isinstance(value, dict):
            for key, inner in value.items():
                yield source, f"{name}.{key}", _flat(source, f"{name}.{key}", inner)
        elif value is not None:
            raise InputError(
                f"{source}: {name} must hold settings such as '{_example(name)}: ...', but it holds {_short(value)}."
            )


def _flat(source: str, key: str, value: Any) -> Any:
    """Return ``value``. Raise :class:`InputError` if it is nested, because no setting is nested."""
    inner = value if isinstance(value, list) else [value]
    if any(isinstance(item, dict | list | set | tuple) for item in inner):
        raise InputError(f"{source}: {_short(key)} must be a value or a list of values, but got {_short(value)}.")
    for item in inner:
        require_plain(source, key, item)
    return value


def require_plain(source: str, key: str, value: Any) -> None:
    """Raise :class:`InputError` for a number beyond every setting, and for a text that would be a large YAML structure."""
    # Python cannot print some of these numbers. jsonargparse reads a text as YAML.
    if isinstance(value, int) and value.bit_length() > 64:
        raise InputError(f"{source}: {_short(key)} is a number that is too large for any setting.")
    if isinstance(value, str):
        yaml = _yaml()
        try:
            _require_small(value)
        except yaml.composer.ComposerError as error:
            raise InputError(f"{source}: {_short(key)} has a text that is not read ({error.problem}).") from None
        except yaml.YAMLError:
            # This is an ordinary text.
            pass


def _example(section: str) -> str:
    return next(field.name for field in fields(SECTIONS[section]) if field.name != "n_items")


def _typed(settings: list[Setting]) -> dict[str, Any]:
    """Return the values by section and name. jsonargparse converts them to the types of their settings."""
    nested: dict[str, Any] = {}
    for _, key, value in settings:
        section, _, name = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[name] = value
    try:
        parsed = _parser().parse_object(nested)
    except Exception:
        if len(settings) == 1:
            source, key, value = settings[0]
            raise InputError(f"{source}: {key} must be {in_words(kind_of(key))}, but got {_short(value)}.") from None
        # Find the setting that is wrong.
        for setting in settings:
            _typed([setting])
        raise
    for source, key, _ in settings:
        require_plain(source, key, parsed[key])
        section, _, name = key.rpartition(".")
        (nested[section] if section else nested)[name] = parsed[key]
    return nested


def kind_of(key: str) -> str:
    """Return the type annotation of a setting as text."""
    section, _, name = key.rpartition(".")
    return next(str(field.type) for field in fields(SECTIONS.get(section, RunConfig)) if field.name == name)


def in_words(kind: str) -> str:
    """Return a type annotation of a setting in words."""
    words = {
        "int": "an integer",
        "float": "a number",
        "bool": "true or false",
        "str": "text",
        "None": "null",
        "tuple[int, ...]": "a list of integers",
        "tuple[float, ...]": "a list of numbers",
    }
    return " or ".join(words.get(part, part) for part in kind.split(" | "))


def _construct(section: str, values: dict[str, Any], source: str | None) -> Any:
    """Return the dataclass of the section, or for ``model`` its checked values as a dictionary."""
    try:
        if section == "model":
            return _model_values(LARESConfig.preview(**values))
        return SECTIONS[section](**values)
    except InputError as error:
        name = f"model.{error}" if section == "model" else str(error)
        raise InputError(f"{source}: {name}" if source else name) from None


def _model_values(config: LARESConfig) -> dict[str, Any]:
    values = config.to_dict()
    del values["n_items"]
    return values


@functools.cache
def _parser() -> Any:
    parser = importlib.import_module("jsonargparse").ArgumentParser(exit_on_error=False)
    for name, kind in SECTIONS.items():
        parser.add_class_arguments(kind, name, skip={"n_items"} if name == "model" else None)
    parser.add_argument("--seed", type=int, default=RunConfig.seed)
    parser.add_argument("--checkpoint_minutes", type=float, default=RunConfig.checkpoint_minutes)
    parser.add_argument("--device", type=str, default=RunConfig.device)
    parser.add_argument("--precision", type=str, default=RunConfig.precision)
    return parser
