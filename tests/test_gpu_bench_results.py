"""``lares-fast gpu-bench``: the file of results, whether it belongs to this machine, and the table."""

import pytest

from lares_fast._errors import InputError
from lares_fast.gpu_bench import table
from lares_fast.gpu_bench.machine import describe
from lares_fast.gpu_bench.results import Results

MACHINE = {"card": "a card", "driver": "1", "torch": "2", "triton": "3", "python": "4", "lares_fast": "5"}
PASSED = {"status": "passed"}


def test_results_are_whole_after_every_row(tmp_path):
    results = Results(tmp_path)
    results.claim(MACHINE)
    results.put("evaluation", {"status": "failed", "faults": ["wrong"]})
    results.put("ceilings", PASSED)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "table.txt"]
    again = Results(tmp_path)
    # Rows have the order of the list.
    assert list(again.rows) == ["ceilings", "evaluation"] and again.machine == MACHINE
    assert "fault: wrong" in (tmp_path / "table.txt").read_text()
    assert again.missing(["ceilings", "evaluation", "run:synthetic"]) == ["evaluation", "run:synthetic"]


@pytest.mark.parametrize("status", ["begun", "failed", "hung", "not reached"])
def test_a_row_that_was_not_finished_is_measured_again(status, tmp_path):
    results = Results(tmp_path)
    results.put("ceilings", {"status": status})
    assert Results(tmp_path).missing(["ceilings"]) == ["ceilings"]


def test_another_log_is_measured_again(tmp_path):
    results = Results(tmp_path)
    results.put("run:log", {**PASSED, "facts": {"log": "a.csv"}})
    assert results.missing(["run:log"], tmp_path / "a.csv") == []
    assert results.missing(["run:log"], tmp_path / "b.csv") == ["run:log"]


@pytest.mark.parametrize("name", MACHINE)
def test_results_of_another_machine_are_an_error(name, tmp_path):
    Results(tmp_path).claim(MACHINE)
    Results(tmp_path).claim(MACHINE)
    before = (tmp_path / "results.json").read_bytes()
    with pytest.raises(InputError, match=f"another {name} .*, now other.*: choose another --out, or move it away"):
        Results(tmp_path).claim({**MACHINE, name: "other"})
    assert (tmp_path / "results.json").read_bytes() == before


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "\0", "[" * 100_000, '{"format": "lares_fast gpu-bench 0"}'])
def test_what_is_no_file_of_results_is_an_error_and_stays_as_it_is(text, tmp_path):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"results.json (is damaged|was not written by this version).*choose another --out"):
        Results(tmp_path)
    assert path.read_text() == text


@pytest.mark.parametrize(
    ("old", "new"), [("2.5", "2.6"), ("a card", "b card"), ("passed", "failed"), (": [", ": "), ("\n}", "")]
)
def test_a_damaged_file_is_an_error(old, new, tmp_path):
    results = Results(tmp_path)
    results.claim(MACHINE)
    results.put("ceilings", {**PASSED, "turns_ms": {"lares_fast": [2.5, float("nan")]}})
    assert Results(tmp_path).rows.keys() == {"ceilings"}
    text = results.path.read_text()
    assert old in text
    results.path.write_text(text.replace(old, new))
    with pytest.raises(InputError, match=r"results.json is damaged .*: move it away, or choose another --out"):
        Results(tmp_path)


def test_the_description_of_the_machine_names_all_that_results_depend_on():
    found = describe(rehearse=True)
    assert set(found) == set(MACHINE)
    assert found["lares_fast"].startswith("0.") and len(found["lares_fast"].partition("sources ")[2]) == 10


FAKE_ROWS = {
    "ceilings": {**PASSED, "rates": {"bytes": 1e12, "bf16": 1e14}, "facts": {"copy TB/s": 1.0}},
    "a": {
        **PASSED,
        "title": "A row",
        "seconds": 2.5,
        "turns_ms": {
            "slow": [8.0, 9.0, 10.0],
            "fast": [4.0, 4.4, 6.0],
            "rounded (not exact)": [1.0, 1.0, 1.0],
            "lares_fast": [2.0, 2.0, 2.4],
            "lares_fast, CUDA graph": [1.0, 2.0, 1.5],
        },
        "work": {"bytes": 1e9, "bf16": 5e10},
        "rows": 300,
        "left_out": {"other": "no memory"},
    },
}


def test_the_numbers_of_the_table_follow_from_the_times():
    lines = table.text_of({"card": "a card"}, FAKE_ROWS).splitlines()
    assert lines[0] == "card: a card"
    start = lines.index("A row  [a: passed, 2.5 s]")
    cells = {line.split("  ")[1]: line.split() for line in lines[start + 2 : start + 7]}
    # The best rival is "fast". Ratios are those of the same turn: 4 / 2, 4.4 / 2 and 6 / 2.4.
    assert cells["lares_fast"][1:] == ["2", "2..2.4", "2.20", "(2.00..2.50)", "1", "50.0%"]
    assert cells["lares_fast, CUDA graph"][3:] == ["1.5", "1..2", "4.00", "(2.20..4.00)", "1", "66.7%"]
    assert cells["slow"][1:] == ["9", "8..10", "0.50", "(0.49..0.60)", "1", "11.1%"]
    assert cells["fast"][1:] == ["4.4", "4..6", "1.00", "(1.00..1.00)", "1", "22.7%"]
    assert cells["rounded (not exact)"][3:] == ["1", "1..1", "1", "100.0%"]
    assert lines[start + 7] == ("  lares_fast, CUDA graph, times as fast as: slow 6.67 (4.50..8.00), fast 4.00 (2.20..4.00)")
    assert lines[start + 8].startswith("  rows a second: slow 33,333, fast 68,182,")
    assert lines[start + 9] == "  left out: other: no memory"


def test_without_ceilings_no_floor_is_shown():
    assert table.floor_ms({"bytes": 1e9}, {}) is None
    assert table.floor_ms({"bytes": 1e9, "fp32": 1.0}, {"bytes": 1e12}) is None
    assert table.floor_ms({}, {"bytes": 1e12}) is None
    text = table.text_of({}, {"a": FAKE_ROWS["a"]})
    assert "%" not in text.split("A row")[1]


def test_a_row_without_rivals_or_without_ours_has_no_ratio():
    text = table.text_of({}, {"a": {**PASSED, "turns_ms": {"lares_fast": [1.0]}}})
    assert "times as fast as: no rival" in text
    text = table.text_of({}, {"a": {"status": "failed", "turns_ms": {"rival": [1.0]}, "faults": ["lares_fast: wrong"]}})
    assert "lares_fast, times" not in text and "fault: lares_fast: wrong" in text
