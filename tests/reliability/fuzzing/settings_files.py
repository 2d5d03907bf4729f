"""Mutated settings, lists of item ids and logs in memory."""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import yaml

from lares_fast import LARES, LARESConfig
from lares_fast._errors import LaresFastError
from lares_fast._model_folder import read_item_ids
from lares_fast.cli import settings
from lares_fast.data import log_from_sequences
from lares_fast.serve import Recommender
from lares_fast.train import config_file
from lares_fast.train.config import RunConfig
from tests.reliability.fuzzing import log_files, log_parsers
from tests.reliability.fuzzing.outcomes import sentence_fault
from tests.reliability.fuzzing.values import ODD_NUMBERS, made, odd_value, text_of

KINDS = {"config.yaml", "--set", "item_ids.json", "logs in memory"}
# The most seconds of processor time that one input may take.
MOST_SECONDS = 10

_YAML = (
    *(
        b"*a",
        b"&a ",
        b"<<: *a",
        b"!!python/object:os.system x",
        b"? ",
        b"- ",
        b"[[",
        b"{",
        b"|\n",
        b">\n",
        b"0x10",
        b"1e3",
        b".inf",
    ),
    *(
        b".nan",
        b"~",
        b"yes",
        b"2020-01-01",
        b"2020-99-99",
        b"1" * 5000,
        b"\t",
        b"---\n",
        b"...\n",
        b"%YAML 9.9\n",
        b"!!binary x",
    ),
    *(b"!!set {a}", b"spt:\n", b"model: 3\n", b"'", b'"', b"\0", b"\xff", b"\xef\xbb\xbf", b"#", b": ", b"\n  ", b"[" * 2000),
)
_TEXTS = (
    "1",
    "0",
    "-1",
    "1.5",
    "1e3",
    "1e400",
    "nan",
    ".inf",
    "-.inf",
    "true",
    "no",
    "null",
    "~",
    "",
    "[10, 20]",
    "[]",
    "[[1]]",
)
_TEXTS += (
    "{a: 1}",
    "abc",
    "a: b",
    "*a",
    "&a b",
    "!!python/name:os.system",
    "1" * 5000,
    "\ud800",
    "\0",
    "ndcg",
    "cos",
    "temporal",
)
_TEXTS += ("9223372036854775808", "0x10", "1_000", "'", '"', "[" * 3000, "2020-01-01", "cuda:999999999999", " 5 ", "5 # five")


@dataclass(frozen=True)
class Input:
    """One input, and the function that reads it and returns what is wrong with the outcome, or ``None``."""

    what: str
    value: Any
    check: Callable[[Any], str | None]

    def __str__(self) -> str:
        return f"{self.what} {text_of(self.value)[:1200]}"

    def fault(self) -> str | None:
        """Return what is wrong with the outcome, or ``None``."""
        began = time.process_time()
        try:
            found = self.check(self.value)
        except LaresFastError as error:
            found = sentence_fault(str(error))
        except Exception as error:
            found = f"raised {type(error).__name__}: {str(error)[:200]!r}"
        seconds = time.process_time() - began
        return found or (f"took {seconds:.0f} s of processor time" if seconds > MOST_SECONDS else None)


def example(what: str, random: Random) -> Input:
    """Return a random input."""
    if what == "config.yaml":
        return Input(what, _config(random), check_config)
    if what == "--set":
        texts = tuple(_assignment(random) for _ in range(random.choice((1, 1, 2))))
        return Input(what, texts, check_assignments)
    if what == "item_ids.json":
        ids: list[Any] = random.choice(([0, 5, 6, 7, 8], ["", "a", "b", "c", "d"], [None, 2**62, 1, 2, 2**70]))
        content = json.dumps(ids).encode()
        return Input(what, log_files.damaged(content, random) if random.random() < 0.9 else content, check_item_ids)
    return Input(what, _mapping(random), check_mapping)


def _config(random: Random) -> bytes:
    kind = random.randrange(8)
    if kind == 0:
        return _bomb(random)
    if kind == 1:
        # Settings as users write them.
        return "".join(_line(random) for _ in range(random.randrange(1, 6))).encode("utf-8", "surrogatepass")
    text = config_file.dump(RunConfig()) if kind < 6 else (Path(settings.__file__).parent / "configs" / "tiny.yaml").read_text()
    if kind == 2:
        config_file.save(Path("saved.yaml"), RunConfig())
        text = Path("saved.yaml").read_text()
    return log_files.damaged(text.encode(), random, _YAML)


def _bomb(random: Random) -> bytes:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, random.choice((5, 9, 30)))]
    last = lines[-1].split(":")[0]
    section = random.choice(("spt", "model", "data.path", "evaluation", "seed", "zzz"))
    name, _, inner = section.partition(".")
    use = f"{name}: *{last}" if not inner else f"{name}:\n  {inner}: *{last}"
    merged = f"{name}:\n  <<: *{last}"
    return "\n".join([*lines, random.choice((use, merged, f"*{last} : 3"))]).encode()


def _line(random: Random) -> str:
    section, _, name = random.choice(config_file.known_keys()).rpartition(".")
    value = random.choice(_TEXTS)
    return f"{section}:\n  {name}: {value}\n" if section else f"{name}: {value}\n"


def _assignment(random: Random) -> str:
    key = random.choice(config_file.known_keys())
    if random.random() < 0.1:
        key = random.choice((key + "x", key.upper(), "", ".", "spt", "x" * 5000, "spt.lr.x", "model.n_items", "\n", key + " "))
    return f"{key}={random.choice(_TEXTS)}" if random.random() < 0.97 else key


def check_config(content: bytes) -> str | None:
    """Build the settings of the file, and compare them with those that PyYAML finds."""
    path = Path("config.yaml")
    path.write_bytes(content)
    config = settings.build(path)
    try:
        values = yaml.safe_load(content)
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    for section, value in values.items():
        for name, inner in value.items() if isinstance(value, dict) else [(None, value)]:
            if inner is None or (name is None and not hasattr(config, str(section))):
                continue
            if (found := _wrong(config, section, name, inner)) is not None:
                return found
    return None


def check_assignments(texts: tuple[str, ...]) -> str | None:
    """Build the settings of the arguments, and compare them with what they say."""
    config = settings.build(None, texts)
    last = {key.strip(): value.strip() for key, _, value in (text.partition("=") for text in texts)}
    for key, value in last.items():
        section, _, name = key.rpartition(".")
        place = (section, name) if section else (name, None)
        try:
            parsed = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError, RecursionError):
            parsed = value
        if (found := _wrong(config, *place, parsed)) is not None and _wrong(config, *place, value) is not None:
            return found
    return None


def _wrong(config: RunConfig, section: str, name: str | None, expected: Any) -> str | None:
    owner: Any = getattr(config, section)
    value = owner if name is None else owner[name] if isinstance(owner, dict) else getattr(owner, name)
    if _equal(value, expected):
        return None
    return f"{section}.{name} is {value!r:.60} instead of {expected!r:.60}"


def _equal(value: Any, expected: Any) -> bool:
    if isinstance(value, tuple) and isinstance(expected, list):
        return len(value) == len(expected) and all(map(_equal, value, expected))
    if isinstance(value, bool) or isinstance(expected, bool):
        return value is expected
    if isinstance(value, int | float) and isinstance(expected, int | float | str):
        try:
            # PyYAML reads 1e-3 as a text.
            return math.isclose(float(value), float(expected), rel_tol=1e-15)
        except (ValueError, OverflowError):
            return False
    return bool(value == expected or str(value) == str(expected))


@functools.cache
def _model() -> LARES:
    torch.manual_seed(0)
    return LARES(LARESConfig.preset("tiny", n_items=5))


def check_item_ids(content: bytes) -> str | None:
    """Read the list, build a recommender of it, and compare its ids with those that ``json`` finds."""
    path = Path("item_ids.json")
    path.write_bytes(content)
    recommender = Recommender(_model(), read_item_ids(path.parent, {}, 5))
    expected = json.loads(content)[1:]
    same = [str(int(x) if isinstance(x, float) else x) for x in expected] == [str(x) for x in recommender.item_ids]
    return None if same else f"ids {recommender.item_ids} instead of {expected}"


def _mapping(random: Random) -> Any:
    if random.random() < 0.05:
        return made(odd_value(random)[0])
    users = [
        random.choice((1, 2, "a", "é", 10**5000, 2**63, -1, 0, True, None, 1.0, np.int64(4), "", "\ud800", (1,)))
        for _ in range(3)
    ]
    kinds: tuple[Callable[[], Any], ...] = (
        lambda: [random.randrange(1, 9) for _ in range(4)],
        lambda: np.array([3, 4, 5]),
        lambda: tuple("abc"),
        lambda: ["a", "b", random.choice(("\ud800", "", "c", 5))],
        lambda: [1, 2, random.choice((*ODD_NUMBERS, 10**5000, None, "x"))],
        lambda: made(odd_value(random)[0]),
        lambda: range(1, 5),
        lambda: torch.tensor([1, 2, 3]),
    )
    plain = random.random() < 0.4
    return {user if not plain else at + 1: (kinds[0] if plain else random.choice(kinds))() for at, user in enumerate(users)}


def check_mapping(mapping: Any) -> str | None:
    """Build the log, and compare it with the mapping."""
    log = log_from_sequences(mapping)
    if (found := log_parsers.breach(log, 3)) is not None:
        return found
    events = [(str(user), str(item), None) for user, items in mapping.items() for item in np.asarray(items).tolist()]
    return log_parsers.difference(log, events, 3)
