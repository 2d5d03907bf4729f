import csv
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet
import pytest

import lares_fast
from lares_fast import ops
from lares_fast.cli import settings
from lares_fast.train.checkpoint import load_state


def is_one_sentence(err):
    lines = err.strip().splitlines()
    return len(lines) == 1 and lines[0].startswith("lares-fast: error: ") and "Traceback" not in err


def results_of(text, heading):
    """{row name: {column: text}} of the table under ``heading``."""
    lines = text[text.index(heading) :].splitlines()
    columns = lines[0][len(heading) :].split()
    rows = {}
    for line in lines[2:]:
        if not line.strip():
            break
        cells = line.split()
        rows[" ".join(cells[: -len(columns)])] = dict(zip(columns, cells[-len(columns) :], strict=True))
    return rows


def metrics_csv(run):
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def python(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(lares_fast.__file__).parents[1])},
        **options,
    )


# What a run leaves and says


def test_a_run_leaves_its_files(trained):
    names = {path.name for path in trained.iterdir()}
    assert names == {
        *("config.yaml", "metrics.csv", "events.jsonl", "curves.png", "model.safetensors", "item_ids.json", "state.pt")
    }
    assert (trained / "curves.png").read_bytes().startswith(b"\x89PNG")
    phases = {(row["phase"], row["split"]) for row in metrics_csv(trained)}
    assert phases >= {("popularity", "test"), ("markov", "test"), ("spt", "valid"), ("spt", "test"), ("rpt", "test")}
    for line in (trained / "events.jsonl").read_text().splitlines():
        assert json.loads(line)["event"] in ("valid", "test", "filtered")


def test_train_without_data_says_that_it_makes_some(cli, small_settings):
    made = ["--set", "data.synthetic_users=60", "--set", "data.synthetic_items=40"]
    result = cli("train", *small_settings, *made, "--phase", "spt")
    assert result.code == 0 and result.err == ""
    assert "no log is named with --data: a synthetic one is made" in result.out and "is synthetic" in result.out
    assert "best possible" in results_of(result.out, "history not masked")
    assert "saved    runs/synthetic-tiny-seed2025" in result.out and "next     lares-fast recommend" in result.out
    assert "SPT epoch 1  loss" in result.out and "valid R@10" in result.out  # plain lines, no bars
    again = cli("train", *small_settings, *made)
    assert again.code == 2 and is_one_sentence(again.err) and "--resume runs/synthetic-tiny-seed2025" in again.err


def test_train_names_and_counts_the_users_it_drops(cli, small_settings, log_file):
    result = cli("train", *small_settings, "--data", log_file, "--phase", "spt", "--set", "spt.max_steps=1")
    assert result.code == 0 and "1 users with fewer than 3 events" in result.out
    assert result.written == ["runs"]


def test_print_config_writes_nothing(cli):
    result = cli("train", "--config", "tiny", "--set", "spt.lr=0.5", "--print-config")
    assert result.code == 0 and "lr: 0.5" in result.out and "hidden_size: 16" in result.out
    assert result.written == []


def test_eval_gives_the_numbers_of_metrics_csv(cli, trained):
    result = cli("eval", "--run", trained)
    assert result.code == 0 and result.err == ""
    rows = [row for row in metrics_csv(trained) if row["split"] == "test" and row["phase"] != "spt"]
    assert rows
    for row in rows:
        name = {"markov": "Markov chain", "rpt": f"LARES test T={row['test_T']}"}.get(row["phase"], row["phase"])
        printed = results_of(result.out, f"history {row['history']}")[name]
        for short, metric in (("R", "recall"), ("N", "ndcg"), ("MRR", "mrr")):
            for k in (5, 10, 20):
                assert printed[f"{short}@{k}"] == f"{float(row[f'{metric}@{k}']):.4f}"


def test_eval_of_one_depth_on_validation_rows(cli, trained):
    result = cli("eval", "--run", trained, "--split", "valid", "--steps", "3")
    assert result.code == 0 and "Valid rows of the leave-one-out split" in result.out
    assert [name for name in results_of(result.out, "history masked") if "LARES" in name] == ["LARES valid T=3"]


@pytest.mark.parametrize("asked", [False, True])
def test_eval_encodes_in_bf16_where_asked(cli, trained, monkeypatch, asked):
    op, seen = ops.recurrence, []
    monkeypatch.setattr(ops, "recurrence", lambda *inputs, **options: seen.append(options["bf16"]) or op(*inputs, **options))
    cli("eval", "--run", trained, "--steps", "2", *(["--bf16"] if asked else []))
    assert set(seen) == {asked}


def test_eval_writes_csv(cli, trained, tmp_path):
    file = tmp_path / "noise.csv"
    result = cli("eval", "--run", trained, "--steps", "2", "--set", "evaluation.noise_seed=3", "--csv", file)
    assert result.code == 0
    rows = [row for row in csv.DictReader(file.open()) if row["test_T"]]
    assert {(row["split"], row["noise_seed"], row["test_T"]) for row in rows} == {("test", "3", "2")}
    for row in rows:
        printed = results_of(result.out, f"history {row['history']}")["LARES test T=2"]
        assert printed["N@10"] == f"{float(row['ndcg@10']):.4f}"


def test_either_phase_starts_from_another_run(cli, trained, small_settings, log_file):
    start = ["train", *small_settings, "--data", log_file, "--start-from", trained]
    wrong = cli("train", "--resume", trained, "--start-from", trained)
    assert wrong.code == 2 and is_one_sentence(wrong.err) and "give one of them" in wrong.err and wrong.written == []
    result = cli(*start, "--out", "second", "--phase", "rpt", "--set", "rpt.reward=ndcg")
    assert result.code == 0 and "LARES rpt T=2" in result.out and "LARES spt" not in result.out
    result = cli(*start, "--out", "third", "--phase", "spt")
    assert result.code == 0 and "LARES spt T=2" in result.out and "LARES rpt" not in result.out


def test_recommend_to_a_user_leaves_out_what_they_had(cli, trained, log_file):
    history = log_file.read_text().splitlines()[0].split()[1:]
    result = cli("recommend", "--run", trained, "--user", "u1", "--k", "7")
    rows = list(csv.DictReader(result.out.splitlines()))
    assert result.code == 0 and [row["rank"] for row in rows] == list("1234567")
    assert not {row["item"] for row in rows} & set(history)
    kept = cli("recommend", "--run", trained, "--user", "u1", "--k", "40", "--keep-seen")
    assert set(history) <= {row["item"] for row in csv.DictReader(kept.out.splitlines())}


def test_recommend_drops_and_counts_unknown_items(cli, trained):
    Path("people.csv").write_text("user_id,item_id,timestamp\nhistory,i1,1\nhistory,nothing,2\nhistory,i2,3\n")
    result = cli("recommend", "--run", trained, "--input", "people.csv", "--k", "3")
    assert result.code == 0 and "1 events with items that the run does not know were left out" in result.err
    assert cli("recommend", "--run", trained, "--history", "i1,i2", "--k", "3").out == result.out


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_recommend_to_a_file(cli, trained, tmp_path, ending):
    (tmp_path / "people.csv").write_text("user_id,item_id,timestamp\n7,i1,1\n7,i2,2\n8,zzz,1\n9,i3,1\n")
    output = tmp_path / f"answers.{ending}"
    result = cli("recommend", "--run", trained, "--input", tmp_path / "people.csv", "--k", "4", "--output", output)
    assert result.code == 0 and "2 users" in result.out
    assert "1 events with items" in result.err and "1 users have no known item" in result.err
    rows = list(csv.DictReader(output.open())) if ending == "csv" else pyarrow.parquet.read_table(output).to_pylist()
    assert [(str(row["user"]), int(row["rank"])) for row in rows] == [(user, n) for user in "79" for n in range(1, 5)]
    one = cli("recommend", "--run", trained, "--history", "i1,i2", "--k", "4")
    assert [row["item"] for row in csv.DictReader(one.out.splitlines())] == [row["item"] for row in rows[:4]]


def test_demo_shows_a_table_plots_and_three_recommendations(cli):
    quick = ["data.synthetic_users=60", "data.synthetic_items=60", "spt.epochs=1", "rpt.epochs=1", "rpt.filter_top=60"]
    arguments = [word for setting in quick for word in ("--set", setting)]
    settings.save(Path("runs/demo/config.yaml"), settings.build("demo"))
    Path("runs/demo/state.pt").write_text("of an earlier demo, to be replaced")
    result = cli("demo", *arguments)
    assert result.code == 0 and result.err == ""
    for name in ("popularity", "Markov chain", "best possible", "LARES rpt T=1"):
        assert name in results_of(result.out, "history not masked")
    assert result.out.count("    next ") == 3 and "curves.png" in result.out and "synthetic" in result.out


def test_demo_replaces_nothing_but_a_demo(cli, trained, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "novel.txt").write_text("chapter 1")
    for folder in (trained, tmp_path / "mine"):
        before = sorted(folder.iterdir())
        result = cli("demo", "--out", folder)
        assert result.code == 2 and is_one_sentence(result.err) and str(folder) in result.err
        assert sorted(folder.iterdir()) == before


def test_doctor(cli):
    text, report = cli("doctor"), cli("doctor", "--json")
    assert text.code == report.code == 0
    assert "[train]" in text.out and "would run" in text.out
    for op in ("topk", "target_rank", "linear_cross_entropy"):
        assert f"\n{op}, fp32 on cpu\n" in text.out
    assert json.loads(report.out)["extras"]["train"]["rich"] is True


def test_no_command_shows_the_commands(cli):
    result = cli()
    assert result.code == 0 and "doctor" in result.out and result.err == ""


def test_help_and_version(cli):
    assert cli("--help").code == 0 and cli("train", "--help").code == 0 and cli("--version").code == 0


# Bad input: one sentence, exit code 2, nothing written

BAD_LOGS = {
    "empty": ("", "is empty"),
    "malformed": ("1 5 6 7\n2 5 x 7\n", "line 2"),
    "zero": ("1 5 6 7\n2 5 0 7\n", "line 2: item id '0' is not greater than 0"),
    "negative": ("1 5 6 7\n2 5 -3 7\n", "line 2: item id '-3' is not greater than 0"),
    "short": ("1 5 6\n2 5 6\n", "no user has 3 events"),
}


@pytest.mark.parametrize("kind", BAD_LOGS)
def test_bad_logs(cli, tmp_path, kind):
    text, expected = BAD_LOGS[kind]
    path = tmp_path / "log.txt"
    path.write_text(text)
    result = cli("train", "--config", "tiny", "--data", path)
    assert result.code == 2 and is_one_sentence(result.err) and result.written == []
    assert expected in result.err and "log.txt" in result.err


def test_unknown_columns(cli, tmp_path):
    (tmp_path / "log.csv").write_text("who,what,when\n1,2,3\n")
    result = cli("train", "--config", "tiny", "--data", tmp_path / "log.csv")
    assert result.code == 2 and is_one_sentence(result.err) and result.written == []
    assert "log.csv has no column 'user_id'" in result.err and "--set data.user=NAME" in result.err


def test_columns_by_name_and_without_time(cli, tmp_path, small_settings):
    lines = [f"{user},{item}" for user in range(1, 31) for item in range(user, user + 6)]
    (tmp_path / "log.csv").write_text("\n".join(["who,what", *lines]))
    names = ["--set", "data.user=who", "--set", "data.item=what", "--set", "data.time=none"]
    result = cli("train", *small_settings, *names, "--data", tmp_path / "log.csv", "--phase", "spt")
    assert result.code == 0 and "30 users" in result.out


BAD_ARGUMENTS = {
    "missing log": (["train", "--data", "nowhere.txt"], "nowhere.txt"),
    "missing config": (["train", "--config", "nowhere.yaml"], "--config nowhere.yaml"),
    "unknown key": (["train", "--set", "spt.learning_rate=1"], "no setting 'spt.learning_rate'; the nearest name is 'spt."),
    "heads": (["train", "--set", "model.n_heads=5"], "model.hidden_size must be a multiple of n_heads"),
    "rpt.k beyond the items": (["train", "--set", "data.synthetic_items=40", "--set", "rpt.k=41"], "rpt.k"),
    "phase": (["train", "--phase", "three"], "--phase"),
    "rpt of nothing": (["train", "--phase", "rpt"], "--phase rpt"),
    "resume of nothing": (["train", "--resume", "nowhere"], "nowhere"),
    "unknown argument": (["train", "--epochs", "3"], "--epochs"),
    "unknown command": (["fit"], "fit"),
    "run of nothing": (["eval", "--run", "nowhere"], "nowhere"),
    "recommend from nothing": (["recommend", "--run", "nowhere", "--history", "i1"], "nowhere"),
}


@pytest.mark.parametrize("kind", BAD_ARGUMENTS)
def test_bad_arguments(cli, kind):
    arguments, expected = BAD_ARGUMENTS[kind]
    result = cli(*arguments)
    assert result.code == 2 and is_one_sentence(result.err) and expected in result.err and result.written == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--history", "i1", "--k", "41"], "--k must be in 1..40"),
        (["--history", "i1", "--k", "0"], "--k must be in 1..40"),
        (["--history", "i1", "--steps", "0"], "--steps"),
        (["--history", "other,things"], "holds no item"),
        (["--user", "nobody"], "--user nobody is not in shop.txt"),
        (["--input", "nowhere.csv"], "nowhere.csv"),
        (["--history", "i1", "--output", "answers.xlsx"], "answers.xlsx must end in .csv or .parquet"),
        (["--history", "i1", "--user", "u1"], "not allowed with"),
    ],
)
def test_bad_requests_for_recommendations(cli, trained, arguments, expected):
    result = cli("recommend", "--run", trained, *arguments)
    assert result.code == 2 and is_one_sentence(result.err) and expected in result.err
    assert result.written == [] and result.out == ""


@pytest.fixture
def damaged(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "damaged")


@pytest.mark.parametrize("how", ["truncated", "foreign"])
@pytest.mark.parametrize("name", ["model.safetensors", "state.pt", "item_ids.json"])
def test_damaged_files_of_a_run(cli, damaged, name, how):
    path = damaged / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if how == "truncated" else b'{"some": "thing else"}')
    before = {path.name: path.read_bytes() for path in damaged.iterdir()}
    arguments = ["train", "--resume", damaged] if name == "state.pt" else ["recommend", "--run", damaged, "--history", "i1"]
    result = cli(*arguments)
    assert result.code == 2 and is_one_sentence(result.err) and name in result.err
    assert {path.name: path.read_bytes() for path in damaged.iterdir()} == before


def test_eval_on_another_log(cli, trained, tmp_path):
    (tmp_path / "other.txt").write_text("a x y z\nb x y w\n")
    result = cli("eval", "--run", trained, "--data", tmp_path / "other.txt")
    assert result.code == 2 and is_one_sentence(result.err) and "other.txt has other items" in result.err


def test_resume_with_another_model(cli, trained):
    result = cli("train", "--resume", trained, "--set", "model.hidden_size=32")
    assert result.code == 2 and is_one_sentence(result.err) and "another model" in result.err
    assert "hidden_size: 16" in (trained / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("module", "arguments", "hint"),
    [
        ("jsonargparse", ["train"], 'pip install "lares_fast[train]"'),
        ("tensorboard", ["train", "--tensorboard"], 'pip install "lares_fast[tb]"'),
        ("yaml", ["demo"], 'pip install "lares_fast[train]"'),
    ],
)
def test_a_missing_extra_is_a_hint_in_one_line(cli, monkeypatch, module, arguments, hint):
    monkeypatch.setitem(sys.modules, module, None)
    settings._parser.cache_clear()
    result = cli(*arguments)
    assert result.code == 2 and is_one_sentence(result.err) and hint in result.err and result.written == []


def test_the_command_line_starts_light():
    code = (
        "import sys, lares_fast.cli; lares_fast.cli.main(['--help'])\n"
        "print({'torch', 'rich', 'pyarrow', 'triton', 'matplotlib', 'jsonargparse', 'yaml'} & set(sys.modules))"
    )
    out, err = python("-c", code).communicate(timeout=60)
    assert out.endswith("set()\n"), err


# Interruptions and a full disk


def test_sigterm_saves_and_says_how_to_resume(cli, small_settings, log_file, tmp_path):
    out = tmp_path / "cut"
    endless = ["--set", "spt.epochs=100000", "--set", "spt.patience=100000"]
    running = python("-m", "lares_fast", "train", *small_settings, *endless, "--data", log_file, "--out", out)
    for line in running.stdout:
        if line.startswith("SPT epoch 2 "):
            running.send_signal(signal.SIGTERM)
            break
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130, err
    assert f"stopped and saved: resume with lares-fast train --resume {out}" in err and "Traceback" not in err
    assert load_state(out / "state.pt")["epoch"] >= 1
    resumed = cli("train", "--resume", out, "--set", "spt.epochs=2")
    assert resumed.code == 0 and "LARES rpt T=2" in results_of(resumed.out, "history masked")
    epochs = [row["epoch"] for row in metrics_csv(out) if (row["phase"], row["split"]) == ("spt", "valid")]
    assert len(epochs) == len(set(epochs)) * 2  # masked and not; no epoch was done twice


def test_a_full_disk_leaves_the_last_checkpoint(damaged):
    state = damaged / "state.pt"
    before, room = state.read_bytes(), state.stat().st_size // 2

    def little_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

    running = python("-m", "lares_fast", "train", "--resume", damaged, "--set", "rpt.epochs=2", preexec_fn=little_room)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 2 and is_one_sentence(err), err
    assert "state.pt could not be written" in err
    assert state.read_bytes() == before and load_state(state)["phase"] == "rpt"
    assert not list(damaged.glob(".*"))
