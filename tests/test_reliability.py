"""The reliability tests themselves: they count a planted fault, and docs/reliability.md shows the results."""

from tests.reliability import soak, table
from tests.reliability.counts import RESULTS, Counts
from tests.reliability.parts import PARTS


def test_the_page_shows_the_results():
    assert table.PAGE.read_text() == table.page()


def test_every_part_has_a_module_and_only_parts_have_results():
    assert {path.stem for path in RESULTS.glob("*.json")} <= set(PARTS)
    for name in PARTS:
        assert (RESULTS.parent / f"{name}.py").exists()


def test_a_growing_process_is_counted():
    flat, growing = [500.0] * 40, [500.0 + cycle for cycle in range(40)]
    for values, failed in ((flat, 0), (growing, 1)):
        counts = Counts("soak")
        soak.judge(counts, {"memory": values}, soak.ALLOWED)
        assert counts.rows["growth of memory"].failed == failed
        assert counts.passed == (not failed)
