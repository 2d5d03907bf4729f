"""What ``lares-fast recommend`` reads and writes, and what it leaves behind when it fails."""

import csv
import random
import shutil
from pathlib import Path

import pyarrow.parquet
import pytest

import lares_fast
from tests.support.command_line import events, refused, write_csv

# What recommend reads


def test_recommend_names_the_settings_of_a_log(cli, runs, tmp_path):
    run, _ = runs["integers"]
    rows = [(7, 1, 1), (7, 2, 2), (8, 3, 1)]
    expected = cli("recommend", "--run", run, "--input", write_csv(tmp_path / "a.csv", rows)).out
    without = write_csv(tmp_path / "b.csv", [row[:2] for row in rows], ("user_id", "item_id"))
    assert refused(cli("recommend", "--run", run, "--input", without), "--set data.time=none")
    assert cli("recommend", "--run", run, "--input", without, "--data.time", "none").out == expected
    named = write_csv(tmp_path / "c.csv", rows, ("who", "what, exactly".replace(",", ";"), "when"))
    result = cli("recommend", "--run", run, "--input", named)
    assert refused(result, "--set data.user=NAME")
    names = ["--data.user", "who", "--set", "data.item=what; exactly", "--data.time=when"]
    assert cli("recommend", "--run", run, "--input", named, *names).out == expected
    shutil.copy(tmp_path / "a.csv", tmp_path / "a.dat")
    assert cli("recommend", "--run", run, "--input", tmp_path / "a.dat", "--data.format", "csv").out == expected
    wrong = cli("recommend", "--run", run, "--input", named, "--columns", "user=who")
    assert refused(wrong, "unrecognized argument --columns", "lares-fast recommend --help")


def test_a_run_with_names_of_its_own_reads_logs_without_columns(cli, tmp_path, small_settings):
    log = write_csv(tmp_path / "shop.csv", events(int), ("who", "what", "when"))
    names = [word for name in ("user=who", "item=what", "time=when") for word in ("--set", f"data.{name}")]
    assert cli("train", *small_settings, *names, "--data", log, "--phase", "spt", "--out", "run").code == 0
    (tmp_path / "new.json").write_text('{"7": [1, 2]}')
    (tmp_path / "new.txt").write_text("7 1 2 3\n")
    assert cli("recommend", "--run", "run", "--input", tmp_path / "new.json").code == 0
    assert cli("recommend", "--run", "run", "--input", tmp_path / "new.txt").code == 0
    assert cli("recommend", "--run", "run", "--user", "1").code == 0
    assert (
        cli("recommend", "--run", "run", "--input", write_csv(tmp_path / "new.csv", [(7, 1, 1)], ("who", "what", "when"))).code
        == 0
    )


def test_settings_say_how_any_file_is_read(cli, runs, tmp_path):
    run, _ = runs["integers"]
    rows = [(7, 1, 1), (7, 2, 2), (8, 3, 1)]
    expected = cli("recommend", "--run", run, "--input", write_csv(tmp_path / "a.csv", rows)).out
    named = write_csv(tmp_path / "b.csv", rows, ("who", "what", "when"))
    names = [word for name in ("user=who", "item=what", "time=when") for word in ("--set", f"data.{name}")]
    assert cli("recommend", "--run", run, "--input", named, *names).out == expected
    named.write_text(named.read_text().replace(",", ";"))
    assert cli("recommend", "--run", run, "--input", named, *names).out == expected
    comma = ("--set", "data.separator=comma")
    assert refused(cli("recommend", "--run", run, "--input", named, *names, *comma), "--set data.separator=auto")
    (tmp_path / "c.dat").write_text("".join(f"{user}::{item}::5::{time}\n" for user, item, time in rows))
    assert cli("recommend", "--run", run, "--input", tmp_path / "c.dat").out == expected
    pyarrow.parquet.write_table(
        pyarrow.table({name: [row[at] for row in rows] for at, name in enumerate(("who", "what", "when"))}),
        tmp_path / "d.parquet",
    )
    assert cli("recommend", "--run", run, "--input", tmp_path / "d.parquet", *names).out == expected
    repeated = write_csv(tmp_path / "e.csv", [*rows, rows[0]])
    assert cli("recommend", "--run", run, "--input", repeated, "--set", "data.duplicates=same-time").out == expected
    for key, others in (
        ("spt.lr=1", ["--input", named]),
        ("data.min_events=2", ["--input", named]),
        ("data.user=who", ["--item", "5"]),
        ("data.path=x", ["--input", named]),
    ):
        assert refused(cli("recommend", "--run", run, *others, "--set", key), f"--set {key.partition('=')[0]} has no effect")


def test_a_run_with_filters_reads_any_histories(cli, tmp_path, small_settings):
    rated = [(user, item, time, item % 5 + 1) for user, item, time in events(int)]
    log = write_csv(tmp_path / "shop.csv", rated, ("user_id", "item_id", "timestamp", "stars"))
    filters = ["data.rating=stars", "data.min_rating=2", "data.duplicates=same-time", "data.min_item_events=2"]
    filters = [word for text in filters for word in ("--set", text)]
    trained = cli(
        "train", *small_settings, "--set", "evaluation.ks=[5,10]", *filters, "--data", log, "--phase", "spt", "--out", "r"
    )
    assert trained.code == 0 and "left out: events with a rating under 2 (" in trained.out
    assert cli("eval", "--run", "r").code == 0
    assert refused(cli("eval", "--run", "r", "--set", "data.min_rating=3"), "other")
    resumed = cli("train", "--resume", "r", "--set", "data.min_rating=3")
    assert refused(resumed, "another", "data.min_rating is 2.0 there and 3.0 here")
    assert cli("recommend", "--run", "r", "--user", "1").code == 0
    (tmp_path / "new.json").write_text('{"7": [1, 2]}')
    assert cli("recommend", "--run", "r", "--input", tmp_path / "new.json").code == 0
    (tmp_path / "new.dat").write_text("7::1::5::1\n7::2::5::2\n")
    assert cli("recommend", "--run", "r", "--input", tmp_path / "new.dat").code == 0
    unrated = write_csv(tmp_path / "new.csv", [(7, 1, 1), (7, 2, 2)])
    result = cli("recommend", "--run", "r", "--input", unrated)
    assert refused(result, "stars", "--set data.rating=NAME", "leave min_rating out")
    plain = ["--set", "data.min_rating=null", "--set", "data.rating=null"]
    assert cli("recommend", "--run", "r", "--input", unrated, *plain).code == 0
    assert refused(cli("train", "--set", "data.min_item_events=5", "--config", "tiny"), "data.min_item_events", "synthetic log")


def test_items_with_commas(cli, tmp_path, small_settings):
    import json

    titles = ["Fargo, 1996", 'Toy Story "Deluxe", The', "帰ってきたジェダイ", *(f"film {n}" for n in range(37))]
    draw = random.Random(0)
    (tmp_path / "films.json").write_text(json.dumps({f"u{n}": draw.sample(titles, 6) for n in range(60)}))
    train = ["train", *small_settings, "--data", tmp_path / "films.json", "--phase", "spt", "--out", "run"]
    assert cli(*train).code == 0
    exact = cli("recommend", "--run", "run", "--item", titles[0], "--item", titles[1], "--item", titles[2])
    by_json = lares_fast.load("run").recommend([titles[:3]]).ids[0]
    assert exact.code == 0 and [row["item"] for row in csv.DictReader(exact.out.splitlines())] == by_json
    wrong = cli("recommend", "--run", "run", "--history", "Fargo, 1996,帰ってきたジェダイ")
    assert refused(wrong, "may mean the item 'Fargo, 1996'", "JSON list", "--item") and wrong.out == ""
    assert cli("recommend", "--run", "run", "--history", json.dumps(titles[:3])).out == exact.out
    assert cli("recommend", "--run", "run", "--history", "film 1, film 2").out == (
        cli("recommend", "--run", "run", "--history", '["film 1", "film 2"]').out
    )
    assert refused(cli("recommend", "--run", "run", "--history", '["film 1", ["film 2"]]'), "list of item ids", "film 2")
    assert refused(cli("recommend", "--run", "run", "--history", "[]"), "holds no item")
    assert refused(cli("recommend", "--run", "run", "--history", '["film 1", "film 99"]'), "'film 99'", "JSON list")
    assert refused(cli("recommend", "--run", "run", "--item", "film 1", "--item", "film 99"), "'film 99'")
    assert refused(cli("recommend", "--run", "run", "--history", "film 1,film 99"), "'film 99'")
    assert refused(cli("recommend", "--run", "run", "--history", ", ,"), "holds no item")
    assert refused(cli("recommend", "--run", "run", "--history", "film 1", "--item", "film 2"), "not allowed with")


# What recommend writes


def schema(path):
    return {field.name: str(field.type) for field in pyarrow.parquet.read_schema(path)}


@pytest.mark.parametrize(("name", "kind"), [("integers", "int64"), ("texts", "string")])
def test_types_are_those_of_the_run_and_the_log(cli, runs, tmp_path, name, kind, monkeypatch):
    """The types must not come from the first chunk, which may be empty or hold only ids that look like integers."""
    monkeypatch.setattr("lares_fast.cli.recommending._CHUNK", 2)
    run, _ = runs[name]
    known = 5 if name == "integers" else "n5"
    shapes = set()
    for users in (
        [("a", "gone")] * 5 + [("k", known)],
        [("a", "gone")],
        [("k", known)],
        [(1, "gone"), (2, "gone"), ("x", known)],
    ):
        rows = [(user, item, place) for place, (user, item) in enumerate(users)]
        rows = [(f"{user}{place}" if user == "a" else user, item, place) for user, item, place in rows]
        path, out = write_csv(tmp_path / "new.csv", rows), tmp_path / "recs.parquet"
        result = cli("recommend", "--run", run, "--input", path, "--k", "3", "--output", out)
        assert result.code == 0
        shapes.add(tuple(schema(out).items()))
        assert len(pyarrow.parquet.read_table(out)) == (0 if len(users) == 1 and users[0][1] == "gone" else 3)
    assert shapes == {(("user", "string"), ("rank", "int32"), ("item", kind), ("score", "float"))}
    path = write_csv(tmp_path / "new.csv", [(9, known, 1), (3, "gone", 1)])
    assert cli("recommend", "--run", run, "--input", path, "--output", out).code == 0 and schema(out)["user"] == "int64"
    user = "1" if name == "integers" else "n1"
    assert cli("recommend", "--run", run, "--user", user, "--output", out).code == 0 and schema(out)["user"] == kind
    assert cli("recommend", "--run", run, "--item", known, "--output", out).code == 0 and schema(out)["user"] == "string"


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_failure_leaves_the_old_output_and_no_temporary(cli, runs, tmp_path, ending, monkeypatch):
    run, _ = runs["integers"]
    monkeypatch.setattr("lares_fast.cli.recommending._CHUNK", 1)
    path, out = write_csv(tmp_path / "new.csv", [(1, 5, 1), (2, 5, 1)]), Path(f"out.{ending}")
    out.write_text("old")
    whole, calls = lares_fast.Recommender.recommend, []

    def second_fails(error):
        def recommend(self, *arguments, **options):
            calls.append(0)
            if len(calls) % 2 == 0:
                raise error
            return whole(self, *arguments, **options)

        return recommend

    for error, code in ((KeyboardInterrupt(), 130), (MemoryError(), 2), (OSError(28, "No space left on device"), 2)):
        monkeypatch.setattr(lares_fast.Recommender, "recommend", second_fails(error))
        result = cli("recommend", "--run", run, "--input", path, "--output", out)
        assert result.code == code and len(result.err.splitlines()) == 1 and "Traceback" not in result.err
        assert out.read_text() == "old" and result.written == [out.name]


def test_an_output_that_is_a_link_is_not_followed(cli, runs, tmp_path):
    run, _ = runs["integers"]
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for name in ("out.csv", ".out.csv.part"):
        Path(name).symlink_to(victim)
    assert cli("recommend", "--run", run, "--item", "5", "--output", "out.csv").code == 0
    assert victim.read_text() == "mine" and not Path("out.csv").is_symlink()
