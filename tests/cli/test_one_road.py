"""A run from Python and a run from the command line leave the same folder, and every command takes both."""

import shutil

import pytest

import lares_fast
from lares_fast._errors import InputError
from lares_fast.data import InteractionLog, leave_one_out, log_from_sequences, read_log, synthetic_log, temporal_split
from lares_fast.train import DataConfig, EvalConfig, RPTConfig, RunConfig, SPTConfig, Trainer, config_file
from lares_fast.train.files import FILES
from tests.support.command_line import events, refused, write_csv

MODEL = {"hidden_size": 16, "inner_size": 32, "n_pre_layers": 1, "n_core_layers": 1, "max_len": 8, "mean_depth": 2}
NAMES = {"user": "who", "item": "what", "time": "when"}


def config(**changes):
    return RunConfig(
        model=MODEL,
        spt=SPTConfig(batch_size=128, epochs=1),
        rpt=RPTConfig(batch_size=128, epochs=1, filter_top=30, k=5),
        evaluation=EvalConfig(ks=(5, 10), depth_ratios=(1.0,)),
        **changes,
    )


def run(log, split, out, phases=("spt",), **changes):
    Trainer(config(**changes), log, split, out).run(phases)
    return out


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return write_csv(tmp_path_factory.mktemp("shop") / "ratings.csv", events(lambda n: f"n{n}"), tuple(NAMES.values()))


@pytest.fixture(scope="module")
def made(shop, tmp_path_factory):
    """Return the folder of a run in Python, on a log from ``read_log``."""
    log = read_log(shop, columns=NAMES)
    return run(log, leave_one_out(log), tmp_path_factory.mktemp("runs") / "movies")


def test_the_run_in_python_is_taken_by_every_command(cli, made, shop, tmp_path):
    evaluated = cli("eval", "--run", made)
    assert evaluated.code == 0 and evaluated.err == "" and "LARES test T=2" in evaluated.out
    assert cli("recommend", "--run", made, "--user", "n7", "--k", "3").code == 0
    assert cli("recommend", "--run", made, "--input", shop, "--k", "3").code == 0
    copy = shutil.copytree(made, tmp_path / "copy")
    resumed = cli("train", "--resume", copy)
    assert resumed.code == 0 and resumed.err == "" and "changed  " not in resumed.out and "LARES rpt" in resumed.out
    started = cli("train", "--config", made / "config.yaml", "--start-from", made, "--phase", "rpt", "--out", "other")
    assert started.code == 0, started.err


def test_python_and_the_command_line_write_the_same_configuration(cli, made, shop, tmp_path):
    assert {path.name for path in made.iterdir()} <= set(FILES)
    (tmp_path / "mine.yaml").write_text(config_file.dump(config()))
    names = [word for role, name in NAMES.items() for word in (f"--data.{role}", name)]
    assert cli("train", "--config", tmp_path / "mine.yaml", "--data", shop, *names, "--phase", "spt", "--out", "run").code == 0
    assert (tmp_path / "here" / "run" / "config.yaml").read_bytes() == (made / "config.yaml").read_bytes()
    assert config_file.load(made / "config.yaml").data.path == str(shop)


def test_a_log_without_times_is_read_again(cli, tmp_path):
    path = write_csv(tmp_path / "log.csv", [row[:2] for row in events(int)], ("user_id", "item_id"))
    log = read_log(path, columns={"time": None})
    assert config_file.load(run(log, leave_one_out(log), tmp_path / "run") / "config.yaml").data.time == "none"
    assert cli("eval", "--run", tmp_path / "run").code == 0


def test_a_synthetic_log_is_drawn_again(cli, tmp_path):
    log = synthetic_log(n_users=60, n_items=60, seed=3)
    run(log, leave_one_out(log), tmp_path / "run")
    assert cli("eval", "--run", tmp_path / "run").code == 0
    assert cli("recommend", "--run", tmp_path / "run", "--user", "user-0001").code == 0


@pytest.mark.parametrize("kind", ["sequences", "arrays", "another shop"])
def test_a_log_from_memory_needs_its_file(cli, tmp_path, kind):
    log = synthetic_log(n_users=60, n_items=60, n_brands=6)
    if kind != "another shop":
        log = log_from_sequences({str(user): log.item_ids[log.history(n)].tolist() for n, user in enumerate(log.user_ids)})
    if kind == "arrays":
        log = InteractionLog(items=log.items, offsets=log.offsets, user_ids=log.user_ids, item_ids=log.item_ids)
    folder = run(log, leave_one_out(log), tmp_path / "run")
    lines = [" ".join([user, *log.item_ids[log.history(n)]]) for n, user in enumerate(log.user_ids)]
    (tmp_path / "log.txt").write_text("\n".join(lines))
    for command in (["eval", "--run"], ["recommend", "--user", "user-0001", "--run"], ["train", "--resume"]):
        assert refused(cli(*command, folder), "was made in memory", "--data FILE")
        # The items of the shop are not numbered as they occur, so a file cannot give their order.
        assert kind == "another shop" or cli(*command, folder, "--data", tmp_path / "log.txt").code == 0
    # A history needs no log.
    folder = run(log, leave_one_out(log), tmp_path / "second")
    assert cli("recommend", "--run", folder, "--item", log.item_ids[1]).code == 0


def test_the_log_and_the_split_decide_about_their_settings(tmp_path, shop):
    log = read_log(shop, columns=NAMES)
    times = sorted(log.times)
    split = temporal_split(log, times[len(times) // 2], times[3 * len(times) // 4])
    data = DataConfig(path="elsewhere.csv", user="other", test_fraction=0.2)
    trainer = Trainer(config(data=data), log, split, tmp_path / "run")
    expected = DataConfig(path=str(shop), **NAMES, split="temporal", test_fraction=0.2)
    assert trainer.config.data == expected
    # A log in memory has no file but the one that the settings name.
    memory = log_from_sequences({n: [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11] for n in range(1, 9)})
    trainer = Trainer(config(data=DataConfig(path="mine.txt")), memory, leave_one_out(memory), tmp_path / "other")
    assert trainer.config.data == DataConfig(path="mine.txt")


def test_a_run_replaces_no_configuration_of_the_user(tmp_path):
    log = synthetic_log(n_users=60, n_items=60)
    (tmp_path / "config.yaml").write_text("mine: true\n")
    with pytest.raises(InputError, match=r"config\.yaml is not from a run: choose another folder"):
        run(log, leave_one_out(log), tmp_path)
    assert (tmp_path / "config.yaml").read_text() == "mine: true\n" and not (tmp_path / "state.pt").exists()


def test_settings_that_config_yaml_cannot_hold_end_a_run_before_it_begins(tmp_path):
    log = synthetic_log(n_users=60, n_items=60)
    with pytest.raises(InputError, match=r"config\.yaml cannot hold .* as data\.user: rename"):
        run(log, leave_one_out(log), tmp_path / "run", data=DataConfig(user="null "))
    assert not (tmp_path / "run").exists()


def test_a_run_that_continues_writes_its_new_settings(tmp_path):
    log = synthetic_log(n_users=60, n_items=60)
    folder = run(log, leave_one_out(log), tmp_path / "run")
    # A folder of an earlier version has no such line, and a run that continues may write it.
    path = folder / "config.yaml"
    path.write_text(path.read_text().partition("\n")[2])
    run(log, leave_one_out(log), folder, checkpoint_minutes=3.0)
    assert config_file.is_written(path) and config_file.load(path).checkpoint_minutes == 3.0
    assert lares_fast.load(folder).item_ids == log.item_ids[1:].tolist()
