"""Times in event logs: their meaning does not depend on their place in the file, and no digit is lost."""

from decimal import Decimal

import numpy as np
import pytest

from lares_fast._errors import InputError
from lares_fast.data import read_log
from tests.support.event_tables import MOST, arrow, order, parquet, timed


@pytest.mark.parametrize("kind", ["csv", "tsv", "inter"])
@pytest.mark.parametrize(
    "times",
    [
        [1_700_000_000_000_000_030, 1_700_000_000_000_000_020, 1_700_000_000_000_000_010],
        [MOST, 0, MOST - 1, -MOST, -MOST - 1],
        [999_999_999_999_999_999, 1_000_000_000_000_000_000, 999_999_999_999_999_998],
    ],
)
def test_times_of_64_bits_keep_their_order_and_value(tmp_path, kind, times):
    log = read_log(timed(tmp_path / f"a.{kind}", times))
    assert log.times.dtype == np.int64
    assert log.times.tolist() == sorted(times)
    assert order(log) == np.argsort(times).tolist()


FLOAT_LOSES = {
    "integer beside a fraction": [2**53 + 1, 1.5, 2],
    "19 digits beside a fraction": [1_700_000_000_000_000_030, 1_700_000_000_000_000_020, 0.5],
    "negative beside a fraction": [-MOST - 1, 1.5, 2],
    "beyond 64 bits": [2**63, 1, 2],
    "below 64 bits": [-(2**63) - 1, 1, 2],
    "fractions of nanoseconds": ["1700000000.000000030", "1700000000.000000020", "1700000000.000000010"],
    "integers with a point": ["1700000000000000030.0", "1700000000000000020.0", "1.0"],
    "exponents": ["1.7e18", "1", "2"],
    "infinite": ["1e400", "1", "2"],
}


@pytest.mark.parametrize("kind", ["csv", "inter"])
@pytest.mark.parametrize("times", FLOAT_LOSES.values(), ids=FLOAT_LOSES)
@pytest.mark.parametrize("apart", [0, 1000])
@pytest.mark.usefixtures("small_blocks")
def test_times_that_a_float_would_merge_are_refused_wherever_they_stand(tmp_path, kind, times, apart):
    for turned in (times, times[::-1]):
        with pytest.raises(InputError, match=r"a\.\w+.*timestamp.*(digits|finite)"):
            read_log(timed(tmp_path / f"a.{kind}", [turned[0], *[7] * apart, *turned[1:]]))


@pytest.mark.parametrize("kind", ["csv", "inter"])
def test_fractions_are_read_wherever_the_first_stands(tmp_path, kind):
    texts = ["3", "1e1", "2.25", "-1", "1700000000.1234567", "+4", " 5"]
    for shift in range(len(texts)):
        turned = texts[shift:] + texts[:shift]
        log = read_log(timed(tmp_path / f"a.{kind}", turned))
        assert log.times.tolist() == sorted(map(float, texts))
        assert order(log) == np.argsort(list(map(float, turned))).tolist()


@pytest.mark.parametrize(
    "text", ["NA", "null", "None", "nan", "-inf", "true", "0x10", "1_000", "10:30:00", "1-1", "١٢", "1 2", "1,2"]
)
@pytest.mark.parametrize("kind", ["csv", "inter"])
@pytest.mark.parametrize("at", [0, 20, 1000])
@pytest.mark.usefixtures("small_blocks")
def test_what_is_no_time_is_refused_wherever_it_stands(tmp_path, kind, text, at):
    with pytest.raises(InputError, match=rf"a\.{kind}.*(timestamp|columns|fields)"):
        read_log(timed(tmp_path / f"a.{kind}", [*range(at), text, 5, 6]))


def seconds(text):
    return int(np.datetime64(text.rstrip("Z"), "s").astype(np.int64))


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.usefixtures("small_blocks")
def test_dates_count_in_the_finest_unit_of_the_whole_file(tmp_path, far):
    """A date, a time of day and a fraction of a second have one meaning in the first block and in later ones."""
    days = ["2020-01-03"] * (1000 if far else 2)
    path = tmp_path / "a.csv"
    assert read_log(timed(path, [*days, "2020-01-02"])).times[0] == seconds("2020-01-02") // 86_400
    for turn in (1, -1):
        log = read_log(timed(path, [*days, "2020-01-02 10:00"][::turn]))
        assert (log.times[0], log.times[-1]) == (seconds("2020-01-02T10:00"), seconds("2020-01-03"))
        log = read_log(timed(path, [*days, "2020-01-02 10:00:01", "2020-01-02 10:00:00.25"][::turn]))
        assert log.times[0] == seconds("2020-01-02T10:00") * 10**9 + 250_000_000
        assert log.times[-1] == seconds("2020-01-03") * 10**9
        log = read_log(timed(path, ["2020-01-02T10:00:00+02:00", *["2020-01-03T00:00:00Z"] * len(days)][::turn]))
        assert log.times[0] == seconds("2020-01-02T08:00")
        for other in ("5", "1.5", "2020-01-02T10:00:00Z"):
            with pytest.raises(InputError, match="mixes numbers, dates and dates with a time zone"):
                read_log(timed(path, [*days, other, other][::turn]))
    with pytest.raises(InputError, match=r"holds string '2020-02-30' in row 1"):
        read_log(timed(path, ["2020-02-30", *days]))
    with pytest.raises(InputError, match=r"(do not fit 64 bits in nanoseconds|mixes)"):
        read_log(timed(path, ["0001-01-01", *days, "2020-01-02 10:00:00.25"]))


def test_typed_times_of_parquet_are_exact_or_refused(tmp_path):
    path, ids = tmp_path / "a.parquet", {"user_id": [1, 1, 1], "item_id": [0, 1, 2]}
    large = [1_700_000_000_000_000_030, 1_700_000_000_000_000_020, 1_700_000_000_000_000_010]
    exact = (
        arrow.array(large),
        arrow.array(large, "uint64"),
        arrow.array(large, "timestamp[ns]"),
        arrow.array([Decimal(time) for time in large], arrow.decimal128(38, 0)),
    )
    for times in exact:
        log = read_log(parquet(path, **ids, timestamp=times))
        assert (log.times.tolist(), order(log)) == (large[::-1], [2, 1, 0])
    for times, sentence in (
        (arrow.array([float(time) for time in large]), r"row 1: column 'timestamp' has 1\.7.*loses its last digits"),
        (arrow.array([1.7e9, 1.0, 2.0], "float32"), r"from 2\*\*24 on"),
        (arrow.array([2**63, 1, 2], "uint64"), "Integer value 9223372036854775808 not in range"),
        (arrow.array([Decimal("1.5"), Decimal(1), Decimal(2)]), r"holds decimal128"),
        (arrow.array([1, 2, None]), "row 3: column 'timestamp' has no value"),
    ):
        with pytest.raises(InputError, match=sentence):
            read_log(parquet(path, **ids, timestamp=times))
