"""The first snippet of the README runs as printed, on a log that fits it; only the number of epochs is reduced."""

import csv
import random
import re
from pathlib import Path

from lares_fast.cli import main

README = Path(__file__).parent.parent / "README.md"


def test_the_first_snippet_runs(tmp_path, monkeypatch, capsys):
    code = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL).group(1)
    assert len([line for line in code.splitlines() if line]) <= 10
    movies = ["Alien", "Blade Runner", *(f"Movie {n}" for n in range(60))]
    draw = random.Random(0)
    with (tmp_path / "ratings.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["user", "movie", "when"])
        for user in range(20):
            writer.writerows([f"u{user}", movie, day] for day, movie in enumerate(draw.sample(movies, 7)))
        writer.writerow(["last", "Alien", 1])
        writer.writerows(["last", movie, 2 + n] for n, movie in enumerate(movies))
    monkeypatch.chdir(tmp_path)
    exec(code.replace("epochs=20", "epochs=1"), {})
    assert capsys.readouterr().out.startswith("['")
    # The command line takes the folder that Python has written.
    for command in (["eval", "--steps", "1"], ["recommend", "--user", "last"]):
        assert main([*command, "--run", "runs/movies"]) == 0
