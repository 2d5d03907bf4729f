"""Commands compare a log with the run, type their files by both, and leave nothing behind when they fail."""

import csv
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow.parquet
import pytest

import lares_fast
from lares_fast.cli import main, settings
from lares_fast.train import files
from lares_fast.train.checkpoint import load_state


def refused(result, *words):
    lines = result.err.strip().splitlines()
    assert result.code == 2 and len(lines) == 1 and lines[0].startswith("lares-fast: error: "), result
    assert all(word in lines[0] for word in words), lines[0]
    return True


def write_csv(path, rows, names=("user_id", "item_id", "timestamp")):
    path.write_text("\n".join([",".join(names), *(",".join(map(str, row)) for row in rows), ""]))
    return path


def events(ids, seed=0):
    """(user, item, time) of 60 users with 6 to 9 of 40 items, in any order of rows."""
    draw = random.Random(seed)
    rows = [
        (ids(user), ids(item), 100 * draw.randrange(1000) + place)
        for user in range(1, 61)
        for place, item in enumerate(draw.sample(range(1, 41), draw.randint(6, 9)))
    ]
    draw.shuffle(rows)
    return rows


@pytest.fixture(scope="module")
def runs(tmp_path_factory, small_settings):
    """A run on integer ids, one on texts and one with a temporal split, with the files of their logs."""
    folder = tmp_path_factory.mktemp("identity")
    found = {}
    for name, ids, more in (
        ("integers", int, []),
        ("texts", lambda number: f"n{number}", []),
        ("temporal", int, ["--set", "data.split=temporal"]),
    ):
        log = write_csv(folder / f"{name}.csv", events(ids))
        arguments = ["train", *small_settings, "--data", str(log), "--phase", "spt", "--out", str(folder / name), *more]
        assert main(arguments) == 0
        found[name] = (folder / name, log)
    return found


# eval and recommend --user


@pytest.mark.parametrize(("name", "split"), [("integers", "temporal"), ("temporal", "leave-one-out")])
def test_eval_refuses_a_split_whose_rows_were_trained_on(cli, runs, name, split):
    run, _ = runs[name]
    assert refused(cli("eval", "--run", run, "--set", f"data.split={split}"), "leak", split, "data.split")
    assert cli("eval", "--run", run, "--steps", "1").code == 0


def test_eval_refuses_other_fractions(cli, runs):
    run, _ = runs["temporal"]
    assert refused(cli("eval", "--run", run, "--set", "data.test_fraction=0.3"), "leak")


@pytest.mark.parametrize("change", ["reversed", "swapped users", "one event fewer", "one event more", "order of two"])
def test_eval_refuses_another_log_of_the_same_items(cli, runs, tmp_path, change):
    run, log = runs["integers"]
    rows = [tuple(map(int, line.split(","))) for line in log.read_text().split()[1:]]
    if change == "reversed":
        rows = [(user, item, -time) for user, item, time in rows]
    elif change == "swapped users":
        rows = [({1: 2, 2: 1}.get(user, user), item, time) for user, item, time in rows]
    elif change == "one event fewer":
        rows.remove(max((row for row in rows if row[0] == 1), key=lambda row: row[2]))
    elif change == "one event more":
        rows.append((1, 1, 10**9))
    else:
        (_, a, first), (_, b, second) = sorted((row for row in rows if row[0] == 1), key=lambda row: row[2])[:2]
        rows = [row for row in rows if row not in ((1, a, first), (1, b, second))] + [(1, a, second), (1, b, first)]
    other = write_csv(tmp_path / "other.csv", rows)
    assert refused(cli("eval", "--run", run, "--data", other), "other.csv has other events")
    assert refused(cli("recommend", "--run", run, "--data", other, "--user", "1"), "other.csv has other events", "--input")


def test_eval_refuses_other_times_where_they_make_the_split(cli, runs, tmp_path):
    run, log = runs["temporal"]
    rows = [line.split(",") for line in log.read_text().split()[1:]]
    shifted = write_csv(tmp_path / "log.csv", [(user, item, int(time) + 500 * (int(user) % 2)) for user, item, time in rows])
    assert refused(cli("eval", "--run", run, "--data", shifted), "temporal")


def test_the_same_log_elsewhere_is_taken(cli, runs, tmp_path):
    """A copy without state.pt, and integer ids whose rows are sorted otherwise."""
    run, log = runs["integers"]
    copy = shutil.copytree(run, tmp_path / "copy")
    (copy / "state.pt").unlink()
    rows = sorted(log.read_text().split()[1:])
    other = write_csv(tmp_path / "sorted.csv", [line.split(",") for line in rows])
    expected = cli("eval", "--run", run, "--steps", "1")
    found = cli("eval", "--run", copy, "--steps", "1", "--data", other)
    assert (found.code, found.err) == (0, "") and found.out.splitlines()[2:] == expected.out.splitlines()[2:]


def test_texts_whose_rows_are_sorted_otherwise(cli, runs, tmp_path):
    """They are numbered otherwise: raw ids do for recommendations, and eval says what is the matter."""
    run, log = runs["texts"]
    other = write_csv(tmp_path / "sorted.csv", [line.split(",") for line in sorted(log.read_text().split()[1:])])
    expected = cli("recommend", "--run", run, "--user", "n7")
    assert expected.code == 0 and cli("recommend", "--run", run, "--user", "n7", "--data", other).out == expected.out
    assert refused(cli("eval", "--run", run, "--data", other), "items of the run", "another order", "sort its rows")


def test_a_run_of_an_earlier_version_is_taken_with_a_notice(cli, runs, tmp_path):
    import json

    from safetensors.torch import save_file

    from lares_fast.train.checkpoint import load_weights

    run, _ = runs["integers"]
    old = shutil.copytree(run, tmp_path / "old")
    weights, config = load_weights(run / "model.safetensors")
    save_file(weights, old / "model.safetensors", {"lares_fast-1": json.dumps(config.to_dict())})
    for command in (["eval", "--steps", "1"], ["recommend", "--user", "1"]):
        result = cli(command[0], "--run", old, *command[1:])
        assert result.code == 0 and "is of an earlier version" in result.err


# What recommend reads


def test_recommend_names_its_own_flags(cli, runs, tmp_path):
    run, _ = runs["integers"]
    rows = [(7, 1, 1), (7, 2, 2), (8, 3, 1)]
    expected = cli("recommend", "--run", run, "--input", write_csv(tmp_path / "a.csv", rows)).out
    without = write_csv(tmp_path / "b.csv", [row[:2] for row in rows], ("user_id", "item_id"))
    assert refused(cli("recommend", "--run", run, "--input", without), "--columns time=none")
    assert cli("recommend", "--run", run, "--input", without, "--columns", "time=none").out == expected
    named = write_csv(tmp_path / "c.csv", rows, ("who", "what, exactly".replace(",", ";"), "when"))
    result = cli("recommend", "--run", run, "--input", named)
    assert refused(result, "--columns user=NAME") and "--set" not in result.err
    assert (
        cli("recommend", "--run", run, "--input", named, "--columns", "user=who,item=what; exactly,time=when").out == expected
    )
    shutil.copy(tmp_path / "a.csv", tmp_path / "a.dat")
    assert cli("recommend", "--run", run, "--input", tmp_path / "a.dat", "--format", "csv").out == expected
    for columns in ("who", "user=", "name=x", "", "user"):
        assert refused(cli("recommend", "--run", run, "--input", named, "--columns", columns), "--columns")


def test_eval_and_train_name_settings(cli, runs, tmp_path, small_settings):
    without = write_csv(tmp_path / "b.csv", [(1, 2)], ("user_id", "item_id"))
    assert refused(cli("train", *small_settings, "--data", without), "--set data.time=none")
    (tmp_path / "twice.txt").write_text("1 2 3 4\n1 2 3 4\n")
    assert refused(cli("train", *small_settings, "--data", tmp_path / "twice.txt"), "--set data.format=pairs")


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
    assert refused(wrong, "'Fargo'", "--item") and wrong.out == ""
    assert refused(cli("recommend", "--run", "run", "--item", "film 1", "--item", "film 99"), "'film 99'")
    assert refused(cli("recommend", "--run", "run", "--history", "film 1,film 99"), "'film 99'")
    assert refused(cli("recommend", "--run", "run", "--history", ", ,"), "holds no item")
    assert refused(cli("recommend", "--run", "run", "--history", "film 1", "--item", "film 2"), "not allowed with")


# What recommend writes


def schema(path):
    return {field.name: str(field.type) for field in pyarrow.parquet.read_schema(path)}


@pytest.mark.parametrize(("name", "kind"), [("integers", "int64"), ("texts", "string")])
def test_types_are_those_of_the_run_and_the_log(cli, runs, tmp_path, name, kind, monkeypatch):
    """Not those of the first chunk, which may hold nobody or only ids that look like integers."""
    monkeypatch.setattr("lares_fast.cli.recommend._CHUNK", 2)
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
    monkeypatch.setattr("lares_fast.cli.recommend._CHUNK", 1)
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


def python(*arguments):
    root = Path(lares_fast.__file__).parents[1]
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
    )


@pytest.mark.parametrize("ending", ["parquet"])
def test_ctrl_c_leaves_no_temporary_and_no_traceback(runs, tmp_path, ending):
    run, _ = runs["integers"]
    path = write_csv(tmp_path / "new.csv", [(user, user % 40 + 1, 1) for user in range(1, 20_001)])
    folder = tmp_path / "out"
    folder.mkdir()
    running = python(
        "-m", "lares_fast", "recommend", "--run", run, "--input", path, "--output", folder / f"o.{ending}", "--batch-size", 1
    )
    for _ in range(600):
        if list(folder.iterdir()):
            break
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 130 and out == "" and err == "lares-fast: aborted; what was saved before stands.\n"
    assert not list(folder.iterdir())


# Two processes, memory, and a terminal


def test_a_folder_in_use_is_one_sentence(cli, runs, tmp_path, small_settings):
    run, log = runs["integers"]
    copy = shutil.copytree(run, tmp_path / "copy")
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    with files.locked(copy):
        assert refused(cli("train", "--resume", copy, "--set", "spt.lr=0.5"), "copy is in use")
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    # A fresh run, too: the second one writes no settings into the folder of the first.
    with files.locked(tmp_path / "new"):
        train = ["train", *small_settings, "--data", log, "--phase", "spt", "--out", tmp_path / "new"]
        assert refused(cli(*train), "new is in use")
        assert [path.name for path in (tmp_path / "new").iterdir()] == [".lock"]
    with files.locked(Path("runs/demo")):
        assert refused(cli("demo"), "in use")


def test_two_runs_at_once_make_one(runs, tmp_path, small_settings):
    _, log = runs["integers"]
    out = tmp_path / "both"
    common = ["-m", "lares_fast", "train", *small_settings, "--data", log, "--phase", "spt", "--out", out]
    processes = [python(*common, "--set", f"spt.lr={lr}") for lr in ("0.001", "0.01")]
    results = [process.communicate(timeout=120) for process in processes]
    codes = [process.returncode for process in processes]
    # If one ended before the other began, that one finds a finished run.
    assert sorted(codes) == [0, 2], results
    (lr,) = {state for state in (load_state(out / "state.pt")["settings"]["spt.lr"],)}
    assert lr == (0.001, 0.01)[codes.index(0)] == settings.build(out / "config.yaml").spt.lr
    assert "Traceback" not in results[0][1] + results[1][1]


def test_changed_settings_are_shown(cli, runs, tmp_path):
    copy = shutil.copytree(runs["integers"][0], tmp_path / "copy")
    result = cli("train", "--resume", copy, "--phase", "spt", "--set", "spt.lr=0.5", "--set", "evaluation.depth_ratios=[1]")
    assert result.code == 0
    assert "changed  setting spt.lr: 0.001 -> 0.5" in result.out
    assert "changed  setting evaluation.depth_ratios: [1.0, 2.0] -> [1.0]" in result.out
    again = cli("train", "--resume", copy, "--phase", "spt")
    assert "changed  " not in again.out
    assert refused(cli("train", "--resume", copy, "--set", "evaluation.noise_seed=9"), "evaluation.noise_seed", "resume with")


def test_a_diverging_run_is_one_sentence(cli, runs, tmp_path, small_settings):
    _, log = runs["integers"]
    train = ["train", *small_settings, "--data", log, "--phase", "spt", "--out", "run", "--set", "spt.batch_size=100000"]
    result = cli(*train, "--set", "spt.lr=1e30")
    assert refused(result, "spt.lr") and "* best" not in result.out
    assert not Path("run/model.safetensors").exists()
    assert cli("train", "--resume", "run", "--phase", "spt", "--set", "spt.lr=0.001").code == 0
    assert cli("recommend", "--run", "run", "--item", "5").code == 0


@pytest.mark.parametrize("setting", ["model.hidden_size=20000000000", "model.inner_size=1000000000000000"])
def test_memory_that_there_is_not_is_one_sentence(cli, runs, setting, small_settings):
    _, log = runs["integers"]
    assert refused(cli("train", *small_settings, "--data", log, "--out", "run", "--set", setting), "not enough memory")


def test_other_errors_of_the_program_are_not_hidden(cli, runs, monkeypatch):
    def bug(*_, **__):
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr(lares_fast.Recommender, "recommend", bug)
    with pytest.raises(RuntimeError, match="a bug of ours"):
        cli("recommend", "--run", runs["integers"][0], "--item", "5")


@pytest.mark.parametrize(
    ("asked", "shown"), [("reference", "plain PyTorch (LARES_FAST_BACKEND=reference asks for it)"), ("auto", "")]
)
def test_the_header_tells_what_computes(monkeypatch, asked, shown):
    from lares_fast.cli.train import header

    monkeypatch.setenv("LARES_FAST_BACKEND", asked)
    backend = header(1).splitlines()[1]
    assert shown in backend and ("native CPU code" in backend) <= (asked == "auto")


def test_a_fifo_is_no_file_of_a_run(cli, runs, tmp_path):
    """Nothing waits for a writer that never comes."""
    copy = shutil.copytree(runs["integers"][0], tmp_path / "copy")
    for name, command in (
        ("item_ids.json", ["recommend", "--item", "5", "--run"]),
        ("model.safetensors", ["recommend", "--item", "5", "--run"]),
        ("config.yaml", ["eval", "--run"]),
        ("state.pt", ["train", "--resume"]),
    ):
        kept = (copy / name).read_bytes()
        (copy / name).unlink()
        os.mkfifo(copy / name)
        result = list[object]()
        thread = threading.Thread(target=lambda r=result, words=(*command, copy): r.append(cli(*words)), daemon=True)
        thread.start()
        thread.join(20)
        assert result and refused(result[0], str(copy))
        (copy / name).unlink()
        (copy / name).write_bytes(kept)
    os.mkfifo(tmp_path / "fifo.yaml")
    assert refused(cli("train", "--config", tmp_path / "fifo.yaml"), "fifo.yaml")


def test_advice_names_the_command(cli):
    assert refused(cli("train", "--epochs", "3"), "--epochs", "lares-fast train --help")
    assert refused(cli("eval", "--epochs", "3"), "lares-fast eval --help")
