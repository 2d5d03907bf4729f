"""Each setting as an option of its own, suggestions for wrong names, and commands that start without torch."""

import dataclasses
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from lares_fast.cli import _parsers, get_parser, setting_table, settings
from lares_fast.train.config import SECTIONS, RunConfig
from lares_fast.train.config_file import known_keys
from lares_fast.train.suggestions import nearest
from tests.support.command_line import python, refused


def options_of(command):
    parser = _parsers([command])[1][command]
    return {option for option in parser._option_string_actions if option.startswith("--")}


def test_every_setting_is_an_option_of_train():
    assert {f"--{key}" for key in known_keys()} <= options_of("train")


def test_eval_and_recommend_take_the_settings_that_they_use():
    given = {command: {option for option in options_of(command) if "." in option} for command in ("eval", "recommend")}
    evaluation = {f"--evaluation.{name}" for name in ("batch_size", "ks", "depth_ratios", "noise_seed")}
    data = {f"--data.{field.name}" for field in dataclasses.fields(SECTIONS["data"])}
    assert given["eval"] == data | evaluation
    assert {"--data.path", "--data.user", "--data.format"} <= given["recommend"] < given["eval"]
    assert "--data.split" not in given["recommend"]


def test_options_files_and_assignments_give_the_same_settings(cli, tmp_path):
    (tmp_path / "mine.yaml").write_text("spt: {epochs: 3, lr: 0.5}\ndata: {user: '7'}\nevaluation: {ks: [10, 30]}\nseed: 4\n")
    by_file = cli("train", "--config", tmp_path / "mine.yaml", "--print-config")
    words = ("spt.epochs=3", "spt.lr=0.5", "data.user=7", "evaluation.ks=[10, 30]", "seed=4")
    by_set = cli("train", *(part for word in words for part in ("--set", word)), "--print-config")
    by_option = cli("train", *(part for word in words for part in f"--{word}".split("=")), "--print-config")
    assert by_file.code == 0 and by_file.out == by_set.out == by_option.out
    assert cli("train", *(f"--{word}" for word in words), "--print-config").out == by_file.out


def test_the_last_argument_about_a_setting_counts(cli):
    for words in (["--spt.epochs", "3", "--set", "spt.epochs=4"], ["--set", "spt.epochs=3", "--spt.epochs", "4"]):
        assert "epochs: 4\n" in cli("train", *words, "--print-config").out


def test_data_is_a_file_and_the_name_of_a_section(cli, tmp_path):
    printed = cli("train", "--data", tmp_path / "a.csv", "--data.user", "who", "--print-config").out
    assert f"path: {tmp_path / 'a.csv'}\n" in printed and "user: who\n" in printed
    assert cli("train", "--data.path", tmp_path / "a.csv", "--set", "data.user=who", "--print-config").out == printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("train --epochs 3", ["--epochs (did you mean --spt.epochs?)", "see lares-fast train --help"]),
        ("train --user u", ["did you mean --data.user?"]),
        ("train --learning-rate 0.1", ["did you mean --spt.lr?"]),
        ("train --out_dir x", ["did you mean --out?"]),
        ("train --spt.epoch 3", ["did you mean --spt.epochs?"]),
        ("train --set spt.learning_rate=1", ["unknown setting 'spt.learning_rate'; did you mean 'spt.lr'?"]),
        ("train --spt.lr fast", ["--spt.lr fast: spt.lr must be a number, but got 'fast'"]),
        ("train --spt.lr", ["expected one argument", "see lares-fast train --help"]),
        ("train --data.split random", ["data.split must be one of leave-one-out, temporal"]),
        ("eval --run x --batch-size 3", ["did you mean --evaluation.batch_size?", "see lares-fast eval --help"]),
        ("recommend --run x --user u --data.usr 3", ["did you mean --data.user?", "see lares-fast recommend --help"]),
        ("--verbose train", ["unrecognized argument --verbose; see lares-fast --help"]),
    ],
)
def test_usage_errors_name_the_right_help_and_the_right_spelling(cli, arguments, words):
    result = cli(*arguments.split())
    assert refused(result, *words) and result.written == []


@pytest.mark.parametrize("word", ["--verbose", "--workers", "--xyz", "--spt.momentum", "-q"])
def test_a_name_that_is_far_from_all_gets_no_suggestion(cli, word):
    result = cli("train", word, "3")
    assert refused(result, "unrecognized argument", word) and "did you mean" not in result.err


@pytest.mark.parametrize("word", ["--spt.epoc", "--tensor", "--seeds", "--dat"])
def test_no_option_is_abbreviated(cli, word):
    assert refused(cli("train", word, "3"), f"unrecognized argument {word}")


SYNONYMS = {
    "learning_rate": "spt.lr", "num_epochs": "spt.epochs", "bs": "spt.batch_size", "hidden_dim": "model.hidden_size",
    "embedding_size": "model.hidden_size", "n_layers": "model.n_core_layers", "max_seq_length": "model.max_len",
    "heads": "model.n_heads", "temperature": "model.tau", "rpt.learning_rate": "rpt.lr", "phase2.lr": "rpt.lr",
    "eval.topk": "evaluation.ks", "spt.hidden_size": "model.hidden_size", "SPT.LR": "spt.lr", "random-seed": "seed",
    "evalution.batch_size": "evaluation.batch_size", "spt.momentum": None, "sep": "data.separator", "k_core": "data.min_events",
    "max_grad_norm": "spt.clip_norm", "rpt.warmup": "rpt.warmup_steps", "x": None, "": None,
}  # fmt: skip


@pytest.mark.parametrize("word", SYNONYMS)
def test_names_of_other_programs(word):
    assert nearest(word, known_keys()) == SYNONYMS[word]


def test_every_synonym_stands_for_a_name_that_exists():
    from lares_fast.train import suggestions

    names = {key.rpartition(".")[2] for key in known_keys()} | {"out", "output"}
    assert set(suggestions._SYNONYMS) <= names and set(suggestions._SECTIONS) == set(SECTIONS)
    assert not names.intersection(suggestions._NAME_OF) - {"out", "output"}


def test_the_help_explains_every_setting(cli):
    # Lines may also break at hyphens.
    text = "".join(cli("train", "--help").out.split())
    for row in setting_table.rows():
        assert f"--{row.key}" in text
        # --data has a help of its own.
        assert row.key == "data.path" or "".join(f"{setting_table.plain(row.meaning)} (default: {row.default})".split()) in text
    assert "``" not in text and ":class:" not in text
    assert "(default: the setting of the run)" in " ".join(cli("eval", "--help").out.split())


def test_every_setting_has_one_meaning_of_its_own():
    meanings = [row.meaning for row in setting_table.rows()]
    assert [row.key for row in setting_table.rows()] == known_keys()
    assert all(text.endswith((".", ".)")) and "  " not in text and "\n" not in text for text in meanings)
    assert settings.build() == settings.build(None, [(f"--{row.key}", row.key, row.default) for row in setting_table.rows()])
    assert all(setting_table.heading(section).endswith(".") for section in [*SECTIONS, ""])
    assert setting_table.heading("") == RunConfig.__doc__.partition("\n")[0]


LIGHT = [
    ["train", "--help"], ["eval", "--help"], ["recommend", "--help"], ["demo", "--help"], ["train", "--epochs", "3"],
    ["train", "--set", "spt.learning_rate=1"], ["train", "--set", "model.n_heads=3"], ["train", "--spt.lr", "x"],
    ["train", "--config", "nowhere"], ["train", "--resume", "nowhere"], ["train", "--phase", "rpt"],
    ["train", "--print-config"],
    ["eval", "--run", "nowhere"], ["recommend", "--run", "nowhere", "--user", "1"], ["fit"], [], ["eval"],
]  # fmt: skip


@pytest.mark.parametrize("arguments", LIGHT, ids=lambda words: " ".join(words) or "no argument")
def test_help_and_usage_errors_do_not_import_torch(arguments, tmp_path):
    code = (
        "import sys\nfrom lares_fast.cli import main\n"
        f"code = main({arguments!r})\n"
        "print(code, sorted({'torch', 'rich', 'pyarrow', 'matplotlib'} & set(sys.modules)), file=sys.stderr)"
    )
    _, err = python("-c", code).communicate(timeout=60)
    expected = 0 if not arguments or arguments[-1] in ("--help", "--print-config") else 2
    assert err.splitlines()[-1] == f"{expected} []", err


def test_the_page_of_settings_is_what_the_docstrings_say():
    path = Path(__file__).parents[2] / "docs" / "_site" / "settings.py"
    script = runpy.run_path(str(path))
    text = script["PAGE"].read_text()
    assert script["page"](text) == text, "run python docs/_site/settings.py"
    tables = text.partition(script["MARK"])[2]
    assert all(tables.count(f"| `{key}` |") == 1 for key in known_keys())


def test_a_shell_can_complete_settings():
    """The line of docs/cli.md writes a script that knows every command and every setting."""
    pytest.importorskip("shtab")
    line = [sys.executable, "-m", "shtab", "--shell=bash", "--prog=lares-fast", "lares_fast.cli.get_parser"]
    script = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    for word in ("recommend", "--spt.epochs", "--data.user", "--print-config"):
        assert word in script
    assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).stderr == ""


def test_the_parser_has_the_arguments_of_every_command():
    commands = next(action for action in get_parser()._actions if action.dest == "==SUPPRESS==" or action.choices)
    assert all(len(parser._actions) > 1 for parser in commands.choices.values())
