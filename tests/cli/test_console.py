import io

from lares_fast.cli.console import Console


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def step(number, of=100):
    means = {"loss": 7.25, "ce": 6.5, "T": 4.2}
    numbers = {"means": means, "data_wait": 0.012, "users_per_s": 1234.5}
    return {"event": "step", "phase": "spt", "epoch": 2, "epochs": 9, "step": number, "steps": of, **numbers}


VALID = {
    "event": "valid",
    "phase": "spt",
    "epoch": 2,
    "metrics": {"recall@10": 0.25, "ndcg@10": 0.125, "mrr@10": 0.1},
    "means": {"loss": 7.25, "T": 4.2, "seconds": 30.0, "data_wait": 0.012},
    "best": True,
}


def test_piped_output_is_a_line_every_ten_seconds_and_one_an_epoch():
    clock, out = Clock(), io.StringIO()
    with Console(out, clock) as console:
        for number in range(1, 31):
            clock.now = float(number)
            console(step(number))
        console(VALID)
    lines = out.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[0] == ("SPT epoch 2/9  11/100  loss 7.25 ce 6.5 mean T 4.2 data-wait 1.2 % 1,234 users/s  ETA 1:29")
    assert lines[2] == (
        "SPT epoch 2  loss 7.25 mean T 4.2 data-wait 1.2 % 1,234 users/s  valid R@10 0.2500 N@10 0.1250 MRR@10 0.1000  * best"
    )


def test_short_work_gets_no_bar():
    clock, out = Clock(), io.StringIO()
    console = Console(out, clock)
    for done in range(11):
        clock.now = done / 10
        console.progress("reading", done, 10)
    assert out.getvalue() == ""
    for done in range(50):
        clock.now = 10.0 + done
        console.progress("test T=4", done, 3600)
    assert out.getvalue().splitlines()[0] == "test T=4  10/3,600  ETA 59:50"
    assert len(out.getvalue().splitlines()) == 4


def test_a_terminal_gets_a_bar_and_keeps_the_epoch_line():
    clock, out = Clock(), Terminal()
    with Console(out, clock) as console:
        for number in range(1, 31):
            clock.now = float(number)
            console(step(number))
        console(VALID)
    text = out.getvalue()
    assert "30/100" in text and "mean T 4.2" in text and "ETA" in text and "\x1b[" in text
    assert "R@10 0.2500" in text.splitlines()[-1]


def test_the_model_a_phase_starts_from_has_a_line_too():
    out = io.StringIO()
    Console(out)({**VALID, "phase": "rpt", "epoch": 0, "means": {}, "best": False})
    assert out.getvalue() == "RPT start  valid R@10 0.2500 N@10 0.1250 MRR@10 0.1000\n"
