"""What each command prints and writes."""

import csv
import json
import shutil
from pathlib import Path

import pyarrow.parquet
import pytest

from lares_fast import ops
from lares_fast.cli import settings
from lares_fast.train import config_file
from tests.support.command_line import is_one_sentence, metrics_csv, python, refused, results_of


def test_a_run_leaves_its_files(trained):
    names = {path.name for path in trained.iterdir()}
    assert names == {
        *("config.yaml", "metrics.csv", "events.jsonl", "model.safetensors", "item_ids.json", "state.pt"),
        *("state.previous.pt", "steps-spt.csv", "steps-rpt.csv", "results.svg", "report.html"),
    }
    phases = {(row["phase"], row["split"]) for row in metrics_csv(trained)}
    assert phases >= {("popularity", "test"), ("markov", "test"), ("spt", "valid"), ("spt", "test"), ("rpt", "test")}
    for line in (trained / "events.jsonl").read_text().splitlines():
        assert json.loads(line)["event"] in ("valid", "test", "filtered", "notice")


def test_train_without_data_says_that_it_makes_some(cli, small_settings):
    made = ["--set", "data.synthetic_users=60", "--set", "data.synthetic_items=40"]
    result = cli("train", *small_settings, *made, "--phase", "spt")
    assert result.code == 0 and result.err == ""
    assert "no --data was given, so a synthetic log is made" in result.out and "is synthetic" in result.out
    assert "best possible" in results_of(result.out, "history not masked")
    assert "saved    runs/synthetic-tiny-seed2025" in result.out and "next     lares-fast recommend" in result.out
    # Plain lines, because the output is no terminal.
    assert "SPT epoch 1  loss" in result.out and "valid R@10" in result.out
    again = cli("train", *small_settings, *made)
    assert again.code == 2 and is_one_sentence(again.err) and "--resume runs/synthetic-tiny-seed2025" in again.err


def test_train_names_and_counts_the_users_it_drops(cli, small_settings, log_file):
    result = cli("train", *small_settings, "--data", log_file, "--phase", "spt", "--set", "spt.max_steps=1")
    assert result.code == 0 and "users with fewer than 3 events (1)" in result.out
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
    cli("eval", "--run", trained, "--steps", "2", *(["--precision", "bf16"] if asked else []))
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
    assert result.code == 0 and "left out 1 event with items that are not in the training log" in result.err
    assert cli("recommend", "--run", trained, "--history", "i1,i2", "--k", "3").out == result.out


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_recommend_to_a_file(cli, trained, tmp_path, ending):
    (tmp_path / "people.csv").write_text("user_id,item_id,timestamp\n7,i1,1\n7,i2,2\n8,zzz,1\n9,i3,1\n")
    output = tmp_path / f"answers.{ending}"
    result = cli("recommend", "--run", trained, "--input", tmp_path / "people.csv", "--k", "4", "--output", output)
    assert result.code == 0 and "2 users" in result.out
    assert "left out 1 event with items" in result.err and "recommended nothing to 1 user without known items" in result.err
    rows = list(csv.DictReader(output.open())) if ending == "csv" else pyarrow.parquet.read_table(output).to_pylist()
    assert [(str(row["user"]), int(row["rank"])) for row in rows] == [(user, n) for user in "79" for n in range(1, 5)]
    one = cli("recommend", "--run", trained, "--history", "i1,i2", "--k", "4")
    assert [row["item"] for row in csv.DictReader(one.out.splitlines())] == [row["item"] for row in rows[:4]]


def test_demo_shows_a_table_plots_and_three_recommendations(cli):
    quick = ["data.synthetic_users=60", "data.synthetic_items=60", "spt.epochs=1", "rpt.epochs=1", "rpt.filter_top=60"]
    arguments = [word for setting in quick for word in ("--set", setting)]
    config_file.save(Path("runs/demo/config.yaml"), settings.build("demo"))
    Path("runs/demo/state.pt").write_text("of an earlier demo, to be replaced")
    result = cli("demo", *arguments)
    assert result.code == 0 and result.err == ""
    for name in ("popularity", "Markov chain", "best possible", "LARES rpt T=1"):
        assert name in results_of(result.out, "history not masked")
    assert result.out.count("    recommended ") == 3 and "report.html" in result.out and "synthetic" in result.out


def test_demo_replaces_nothing_but_a_demo(cli, trained, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "novel.txt").write_text("chapter 1")
    config_file.save(tmp_path / "synthetic" / "config.yaml", settings.build("tiny"))
    for folder in (trained, tmp_path / "mine", tmp_path / "synthetic"):
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


def test_doctor_in_a_process_of_its_own():
    """In a new process no other test has imported the ops."""
    out, err = python("-m", "lares_fast", "doctor").communicate(timeout=60)
    assert "\ntopk, fp32 on cpu\n" in out, err


def test_no_command_shows_the_commands(cli):
    result = cli()
    assert result.code == 0 and "doctor" in result.out and result.err == ""


def test_help_and_version(cli):
    assert cli("--help").code == 0 and cli("train", "--help").code == 0 and cli("--version").code == 0


def test_changed_settings_are_shown(cli, runs, tmp_path):
    copy = shutil.copytree(runs["integers"][0], tmp_path / "copy")
    result = cli("train", "--resume", copy, "--phase", "spt", "--set", "spt.lr=0.5", "--set", "evaluation.depth_ratios=[1]")
    assert result.code == 0
    assert "changed  setting spt.lr: 0.001 -> 0.5" in result.out
    assert "changed  setting evaluation.depth_ratios: [1.0, 2.0] -> [1.0]" in result.out
    again = cli("train", "--resume", copy, "--phase", "spt")
    assert "changed  " not in again.out
    assert refused(cli("train", "--resume", copy, "--set", "evaluation.noise_seed=9"), "evaluation.noise_seed", "resume with")


@pytest.mark.parametrize(("asked", "shown"), [("reference", "plain PyTorch (LARES_FAST_BACKEND=reference)"), ("auto", "")])
def test_the_header_tells_what_computes(monkeypatch, asked, shown):
    from lares_fast.cli.training import header

    monkeypatch.setenv("LARES_FAST_BACKEND", asked)
    backend = header(1).splitlines()[1]
    assert shown in backend and ("native CPU code" in backend) <= (asked == "auto")


def test_the_command_line_starts_light():
    code = (
        "import sys, lares_fast.cli; lares_fast.cli.main(['--help'])\n"
        "print({'torch', 'rich', 'pyarrow', 'triton', 'matplotlib', 'jsonargparse', 'yaml'} & set(sys.modules))"
    )
    out, err = python("-c", code).communicate(timeout=60)
    assert out.endswith("set()\n"), err
