"""Bad logs, arguments, files and missing extras: each gives one sentence and exit code 2, and writes nothing."""

import sys

import pytest

from tests.support.command_line import is_one_sentence, refused, write_csv

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
    "unknown key": (["train", "--set", "spt.learning_rate=1"], "unknown setting 'spt.learning_rate'; did you mean 'spt.lr'?"),
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


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("eval --run RUN --set model.state_std=0", ["--set model.state_std has no effect on eval", "leave it out"]),
        ("eval --run RUN --set spt.lr=3", ["--set spt.lr"]),
        ("eval --run RUN --set seed=4", ["--set seed"]),
        ("eval --run RUN --set evaluation.test=false", ["--set evaluation.test"]),
        ("eval --run RUN --set device=cuda", ["--set device", "--device"]),
        ("eval --run RUN --set model.eval_depth=3", ["--set model.eval_depth", "--steps"]),
        ("eval --run RUN --steps 2 --set evaluation.depth_ratios=[1]", ["--set evaluation.depth_ratios", "--steps"]),
        ("eval --run RUN --set model.hiden_size=4", ["did you mean 'model.hidden_size'"]),
        ("eval --run RUN --steps 65535", ["--steps", "65,534"]),
        ("recommend --run RUN --user u1 --steps 99999999999999999999", ["--steps", "65,534"]),
        ("recommend --run RUN --history i1 --data nowhere", ["--data", "--history"]),
        ("recommend --run RUN --history i1 --data.format json", ["--data.format", "--history"]),
        ("recommend --run RUN --item i1 --set data.user=a", ["--set data.user", "--item"]),
        ("recommend --run RUN --input nowhere --data nowhere", ["--data", "--input"]),
        ("doctor --data nowhere", ["--data", "--plan"]),
        ("doctor --set spt.lr=3", ["--set", "--plan"]),
    ],
)
def test_what_has_no_effect_is_refused(cli, trained, arguments, words):
    assert refused(cli(*arguments.replace("RUN", str(trained)).split()), *words)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("evaluation.depth_ratios=[1e30]", ["evaluation.depth_ratios must be at most 32767", "65,534"]),
        ("evaluation.depth_ratios=[1,-3]", ["evaluation.depth_ratios must be greater than 0"]),
        ("evaluation.depth_ratios=[0]", ["evaluation.depth_ratios must be greater than 0"]),
        ("model.eval_depth=1000000", ["model.eval_depth must be at least 1 and at most 65,534"]),
        ("model.mean_depth=1000000000", ["model.mean_depth must be at most 21,844"]),
    ],
)
def test_more_steps_than_a_model_can_make(cli, small_settings, setting, words):
    result = cli("train", *small_settings, "--set", "evaluation.depth_ratios=[1]", "--set", setting, "--print-config")
    assert refused(result, *words)


@pytest.mark.parametrize("how", ["truncated", "foreign"])
@pytest.mark.parametrize("name", ["model.safetensors", "state.pt", "item_ids.json"])
def test_damaged_files_of_a_run(cli, damaged, name, how):
    path = damaged / name
    (damaged / "state.previous.pt").unlink()
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


def test_a_missing_extra_is_a_hint_in_one_line(cli, monkeypatch, tmp_path):
    log = write_csv(tmp_path / "log.csv", [(1, 2, 3)])
    for module, arguments, extra in (("tensorboard", ["--tensorboard"], "tb"), ("pyarrow", ["--data", log], "train")):
        monkeypatch.setitem(sys.modules, module, None)
        result = cli("train", *arguments)
        assert refused(result, f'pip install "lares_fast[{extra}]"') and result.written == []


def test_each_command_names_its_own_flag_for_a_setting(cli, runs, tmp_path, small_settings):
    without = write_csv(tmp_path / "b.csv", [(1, 2)], ("user_id", "item_id"))
    assert refused(cli("train", *small_settings, "--data", without), "--set data.time=none")
    (tmp_path / "twice.txt").write_text("1 2 3 4\n1 2 3 4\n")
    twice = tmp_path / "twice.txt"
    run, _ = runs["integers"]
    assert refused(cli("train", *small_settings, "--data", twice), "line 2: user 1", "(--set data.format=pairs)")
    assert refused(cli("eval", "--run", run, "--data", twice), "line 2: user 1", "(--set data.format=pairs)")
    assert refused(cli("recommend", "--run", run, "--input", twice), "line 2: user 1", "(--set data.format=pairs)")
    columns = ["--set", "data.user=who", "--data", twice]
    assert refused(cli("train", *small_settings, *columns), "columns name the columns", "(--set data.format=VALUE)")
