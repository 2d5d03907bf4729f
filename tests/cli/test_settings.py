import dataclasses
import os
import time

import pytest

from lares_fast import LARESConfig
from lares_fast._errors import InputError
from lares_fast.cli import settings
from lares_fast.config import PRESETS
from lares_fast.train import RunConfig, config_file


def as_built(config):
    """Return ``config`` as a dictionary with all settings of the model."""
    model = LARESConfig(n_items=2, **config.model).to_dict()
    del model["n_items"]
    return {**config.to_dict(), "model": model}


def test_instruments_is_exactly_the_defaults():
    assert as_built(settings.build("instruments")) == as_built(RunConfig()) == as_built(settings.build())
    text = (settings._PRESETS / "instruments.yaml").read_text()
    for key in config_file.known_keys():
        assert f"{key.rpartition('.')[2]}:" in text


def test_tiny_is_the_model_preset():
    model = config_file._read(settings._PRESETS / "tiny.yaml")["model"]
    assert model == PRESETS["tiny"]


@pytest.mark.parametrize("name", settings.presets())
def test_shipped_configurations_survive_a_round_trip(name, tmp_path):
    config = settings.build(name)
    config_file.save(tmp_path / "c.yaml", config)
    assert settings.build(tmp_path / "c.yaml") == config


def test_a_file_wins_over_a_preset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").write_text("seed: 7\n")
    assert settings.build("tiny").seed == 7


def test_assignments_win_over_the_file_and_have_the_types_of_their_settings():
    config = settings.build(
        "tiny",
        ["spt.lr=1e-3", "evaluation.ks=[10, 20]", "data.user=5", "spt.max_steps=null", "model.pad_in_softmax=false", "seed=3"],
    )
    assert config.spt.lr == 0.001 and config.evaluation.ks == (10, 20) and config.data.user == "5"
    assert config.spt.max_steps is None and config.model["pad_in_softmax"] is False and config.seed == 3


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("spt.lrr=3", "unknown setting 'spt.lrr'; did you mean 'spt.lr'?"),
        ("modle.dropout=3", "did you mean 'model.dropout'?"),
        ("lr=3", "unknown setting 'lr'; did you mean 'spt.lr'?"),
        ("model.n_items=5", "unknown setting 'model.n_items'"),
        ("model.hidden_size=wide", "model.hidden_size must be an integer, but got 'wide'"),
        ("spt.max_steps=1.5", "spt.max_steps must be an integer or null, but got '1.5'"),
        ("spt.same_step=perhaps", "spt.same_step must be true or false"),
        ("evaluation.ks=[5,x]", "evaluation.ks must be a list of integers"),
        ("model.n_heads=3", "model.hidden_size must be a multiple of n_heads, which is 3, but got 64"),
        ("model.adapter=glue", "model.adapter must be one of add, concat, linear"),
        ("rpt.group_size=1", "rpt.group_size must be at least 2"),
        ("data.split=random", "data.split must be one of leave-one-out, temporal"),
        ("seed=-1", "seed must be in 0..2**64-1"),
        ("spt.lr", "must have the form section.key=value"),
    ],
)
def test_bad_assignments_are_one_sentence_that_names_the_argument(assignment, expected):
    with pytest.raises(InputError) as error:
        settings.build(None, [assignment])
    assert expected in str(error.value) and f"--set {assignment}" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("spt:\n  learning_rate: 1\n", "unknown setting 'spt.learning_rate'"),
        ("epoch: 1\n", "unknown setting 'epoch'; did you mean"),
        ("spt: fast\n", "spt must hold settings such as 'batch_size: ...', but it holds 'fast'"),
        ("spt:\n  lr: fast\n", "spt.lr must be a number, but got 'fast'"),
        ("spt:\n  lr: [1\n", "line 3: this is not valid YAML"),
        ("- a\n", "must hold 'key: value' lines"),
        ("", "must hold 'key: value' lines, but it holds nothing"),
    ],
)
def test_bad_files_are_one_sentence_that_names_the_file(text, expected, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        settings.build(path)
    assert expected in str(error.value) and str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_configuration_lists_the_shipped_ones():
    with pytest.raises(InputError, match="demo, instruments, tiny"):
        settings.build("huge")


def test_every_setting_has_a_key():
    names = {field.name for field in dataclasses.fields(RunConfig)}
    assert names == {key.split(".")[0] for key in config_file.known_keys()}


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefghij", "bcdefghijk", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [
        BOMB + "spt: *k\n",
        BOMB.replace("a: &a", "spt: &a") + "",
        "model:\n  dropout: &a [x, x]\nspt:\n  lr: [*a, *a]\n",
        "spt:\n  lr: {a: 1}\n",
        "spt: " + "[" * 50_000,
        "spt:\n  epochs: " + "9" * 5000 + "\n",
        "seed: " + "9" * 5000 + "\n",
        "seed: 2001-99-99\n",
        "spt:\n  lr: .nan\n",
        "spt:\n  lr: .inf\n",
        "rpt:\n  beta: -.inf\n",
        "checkpoint_minutes: .nan\n",
        "evaluation:\n  depth_ratios: [.inf]\n",
        "? [1, 2]\n: 3\n",
        "1: 2\n",
        "spt:\n  1: 2\n",
        "spt:\n  lr: " + "x" * 100_000 + "\n",
        "x" * 100_000 + ": 1\n",
        "seed: !!python/object/apply:os.getcwd []\n",
        "seed: \x00\n",
    ],
    ids=lambda text: text[:30],
)
def test_odd_files_are_one_short_sentence(text, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        settings.build(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < len(str(path)) + 300


ALIASES = "a0: &a0 [x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12))
MERGES = "a0: &a0 {x: 1}", *(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 12))


@pytest.mark.parametrize("text", [
    "\n".join(ALIASES), "\n".join(MERGES), f"seed: '{{{', '.join(ALIASES)}}}'", f"seed: '{{{', '.join(MERGES)}}}'",
    "[" * 99_000, "a: " + "{" * 9_000, "seed: '" + "[" * 90_000 + "'", "- " * 40_000, "#" * 99_000, "# 01234567" * 9_000,
    "device: " + "x" * 5_000_000, "seed: 0x" + "f" * 50_000, "seed: '0x" + "f" * 50_000 + "'",
    "seed: " + "1:" * 10_000 + "1", "spt: {batch_size: 0b" + "1" * 90_000 + "}",
], ids=lambda text: text[:20])  # fmt: skip
def test_settings_that_would_grow_are_refused_at_once(text, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    began = time.process_time()
    with pytest.raises(InputError) as error:
        settings.build(path)
    assert time.process_time() - began < 5
    assert "\n" not in str(error.value) and len(str(error.value)) < len(str(path)) + 300


def test_a_text_that_looks_like_an_alias_is_a_text(tmp_path):
    path = tmp_path / "mine.yaml"
    for name in ("*name", "logs/*.csv", "a & b"):
        path.write_text(f"data: {{path: '{name}'}}")
        assert settings.build(path).data.path == name
        assert settings.build(None, [f"data.path={name}"]).data.path == name


def test_a_pipe_as_configuration_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", os.devnull, "/dev/zero"):
        with pytest.raises(InputError, match="neither a file nor a preset"):
            settings.build(path)
    with pytest.raises(InputError, match="is not a file"):
        config_file._read(tmp_path / "pipe")


@pytest.mark.parametrize("value", ["nan", "inf", "1e400", "[" * 5000, "9" * 5000, "x" * 100_000, "{a: 1}"])
def test_odd_assignments_are_one_sentence(value):
    with pytest.raises(InputError, match=r"spt\.lr'? (must be|has a text that is not read)"):
        settings.build(None, [f"spt.lr={value}"])


def test_the_settings_of_a_run_are_verified(tmp_path):
    path = tmp_path / "config.yaml"
    config = settings.build("tiny")
    config_file.save(path, config)
    first, _, rest = path.read_text().partition("\n")
    assert first.startswith("# The sha256 of the lines below is ") and rest == config_file.dump(config)
    # Line ends of another system and a missing first line do not change the settings.
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert settings.build(path) == config
    path.write_text(rest)
    assert settings.build(path) == config
    cut = rest[: rest.index("rpt:")]
    for text in (
        f"{first}\n{cut}",
        f"{rest}{first}\n",
        f"{first[1:]}\n{rest}",
        f"{first[:60]}\n{rest}",
        f"{first}\n{first}\n{rest}",
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=r"config\.yaml"):
            settings.build(path)
