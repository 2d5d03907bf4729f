"""Every example runs as a program, with small sizes, and prints its table."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SIZES = {
    "score_catalog": ["--items", "3000", "--queries", "4", "--k", "5", "--repeats", "1"],
    "train_on_csv": ["--users", "40", "--items", "30", "--epochs", "1"],
    "training_loop": ["--users", "40", "--items", "30", "--epochs", "1"],
}


def run(name, *arguments):
    command = [sys.executable, EXAMPLES / f"{name}.py", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_there_are_sizes_for_every_example():
    assert sorted(SIZES) == sorted(path.stem for path in EXAMPLES.glob("*.py"))
    listed = re.findall(r"\((\w+)\.py\)", (EXAMPLES / "README.md").read_text())
    assert sorted(listed) == sorted(SIZES)


@pytest.mark.parametrize("name", SIZES)
def test_its_first_sentence_is_its_help(name):
    first = (EXAMPLES / f"{name}.py").read_text().removeprefix('"""').split("\n")[0]
    assert first in " ".join(run(name, "--help").split())


def test_scores_agree_with_and_without_an_index():
    text = run("score_catalog", *SIZES["score_catalog"])
    assert "all ways agree" in text
    assert re.findall(r"(?m)^(torch, all scores|topk) +[\d.]+$", text) == ["torch, all scores", "topk"]


def test_a_csv_becomes_recommendations(tmp_path):
    text = run("train_on_csv", *SIZES["train_on_csv"], "--out", tmp_path / "run")
    assert re.findall(r"(?m)^(popularity|markov|spt|rpt) +[01]\.\d{4} +[01]\.\d{4}$", text) == [
        "popularity",
        "markov",
        "spt",
        "rpt",
    ]
    assert len(re.findall(r"(?m)^user-\d+: (?:brand\d\d-type\d\d, ){4}brand\d\d-type\d\d$", text)) == 3
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_a_csv_of_your_own_is_read(tmp_path):
    events = "".join(f"{user},film {(user + step) % 12},{step}\n" for user in range(30) for step in range(6))
    (tmp_path / "mine.csv").write_text("who,what,on\n" + events)
    arguments = ["--csv", tmp_path / "mine.csv", "--columns", "who", "what", "on", "--epochs", "1", "--out", tmp_path / "run"]
    text = run("train_on_csv", *arguments)
    assert text.startswith("30 users, 12 items, 180 events\n") and ": film " in text


def test_a_loop_of_your_own_trains_both_phases():
    text = run("training_loop", *SIZES["training_loop"])
    assert re.findall(r"(?m)^(spt|rpt) +1 +-?\d+\.\d{4} +[01]\.\d{4} +[\d.]+$", text) == ["spt", "rpt"]
