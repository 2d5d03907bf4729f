"""``pytest benchmarks/ --benchmark-only [--rows FILE.csv]`` runs the benchmarks and prints the ratios at the end.

``-m large`` selects the benchmarks that take minutes or gigabytes. ``-m "not large"`` selects the others.
"""

from pathlib import Path

import pytest

from benchmarks import harness

_ROWS = pytest.StashKey[list[harness.Row]]()
_FACTS = pytest.StashKey[list[harness.Fact]]()


def pytest_addoption(parser):
    parser.addoption("--rows", type=Path, help="append the ratios to this CSV file, and other numbers to FILE-facts.csv")


def pytest_configure(config):
    config.stash[_ROWS] = []
    config.stash[_FACTS] = []


@pytest.fixture
def compare(benchmark, request):
    """``compare(group, shape, candidates, check, rounds)`` times candidates in turns and stores their ratios.

    pytest-benchmark then times the last candidate alone. ``check`` says which results the caller has checked.
    """

    def run(group, shape, candidates, check, rounds=7, **options):
        rows = harness.interleave(group, shape, candidates, check, rounds, **options)
        request.config.stash[_ROWS] += rows
        benchmark.group = group
        benchmark.extra_info.update(shape=shape, ratio=rows[-1].ratio_median)
        with harness.one_core():
            benchmark.pedantic(list(candidates.values())[-1], rounds=3, iterations=1)

    return run


@pytest.fixture
def record(benchmark, request):
    """``record(rows, facts)`` stores rows and facts that a benchmark has measured itself."""

    def run(rows, facts):
        request.config.stash[_ROWS] += rows
        request.config.stash[_FACTS] += facts
        benchmark.pedantic(lambda: None)

    return run


@pytest.fixture
def note(benchmark, request):
    """``note(facts)`` stores numbers that are not ratios of times."""

    def run(facts):
        request.config.stash[_FACTS] += facts
        benchmark.pedantic(lambda: None)

    return run


def pytest_terminal_summary(terminalreporter, config):
    rows, facts = config.stash[_ROWS], config.stash[_FACTS]
    path = config.getoption("--rows")
    for fact in facts:
        terminalreporter.write_line(f"{fact.group:<14} {fact.shape:<34} {fact.name:<28} {fact.value:10.4g}")
    if facts and path:
        harness.append(path.with_name(f"{path.stem}-facts.csv"), facts)
    if not rows:
        return
    terminalreporter.write_sep("=", "CPU time against the first candidate of each group (above 1 is faster)")
    for row in rows:
        terminalreporter.write_line(
            f"{row.group:<14} {row.shape:<34} {row.candidate:<28} {row.cpu_s_median * 1e3:10.2f} ms   "
            f"x{row.ratio_median:.2f} ({row.ratio_min:.2f}..{row.ratio_max:.2f})"
        )
    if path:
        harness.append(path, rows)
        terminalreporter.write_line(f"rows added to {path}")
