"""Logs of all formats with random damage: reading raises an InputError of one sentence, or returns a valid log."""

import io
import json
import random

import numpy as np
import pytest

from lares_fast._errors import InputError
from lares_fast.data import read_log

arrow = pytest.importorskip("pyarrow")
arrow_parquet = pytest.importorskip("pyarrow.parquet")

HISTORIES = {3: [7, 5, 9, 5], 1: [5, 9, 7], 2: [12, 7, 5]}
NAMED = {f"u{user}": [f"é{item}" for item in items] for user, items in HISTORIES.items()}
TIMES = (str, lambda time: f"{time}.5", lambda time: f"2020-01-01 10:00:{time - 100:02}", lambda time: str(time + 10**18))
TOKENS = [
    *(b'"', b"'", b",", b"\t", b"\n", b"\r", b"\r\n", b"\0", b"\xff", b"\xef\xbb\xbf", b" ", b"#", b":", b"", b"\n\n"),
    *(b"9223372036854775807", b"-9223372036854775808", b"9223372036854775808", b"9007199254740993", b"1" * 5000, b"1.5"),
    *(b"NA", b"null", b"nan", b"inf", b"1e400", b"0x10", b"1_0", b"+5", b"-0", b"007", b"true", b"2020-01-01T00:00:00Z"),
    *(
        b"{",
        b"[",
        b"]",
        b"}",
        b"[" * 3000,
        b"\\ud800",
        b"\xed\xa0\x80",
        b"\x1f\x8b",
        b"\x1b[31m",
        b"user_id,item_id,timestamp,x\n",
    ),
]


def files(draw):
    """Yield (file name, bytes, whether the format keeps times) of one log in all formats."""
    histories = draw.choice([HISTORIES, NAMED])
    time_text = draw.choice(TIMES)
    rows = [(user, item, 100 + 10 * at) for user, items in histories.items() for at, item in enumerate(items)]
    draw.shuffle(rows)
    texts = [(user, item, time_text(time)) for user, item, time in rows]
    plain = time_text if "-" not in time_text(100) else str
    yield "log.txt", "".join(f"{user} {' '.join(map(str, items))}\n" for user, items in histories.items()).encode()
    yield "pairs.txt", "".join(f"{user} {item}\n" for user, items in histories.items() for item in items).encode()
    yield "log.json", json.dumps(histories).encode()
    header = "user_id:token\titem_id:token\ttimestamp:float\n"
    yield "log.inter", (header + "".join(f"{user}\t{item}\t{plain(time)}\n" for user, item, time in rows)).encode()
    header = "user_id,item_id,timestamp,x\n"
    yield "log.csv", (header + "".join(f'{user},{item},{time},"a ""b"",\nc"\n' for user, item, time in texts)).encode()
    header = header.replace(",", "\t")
    yield "log.tsv", (header + "".join(f'{user}\t{item}\t{time}\t"x\n' for user, item, time in texts)).encode()
    users, items, times = map(list, zip(*rows, strict=True))
    kinds = [arrow.array(times), arrow.array(times, "timestamp[ms]"), arrow.array(list(map(float, times)))]
    table = arrow.table({"user_id": users, "item_id": items, "timestamp": draw.choice(kinds)})
    file = io.BytesIO()
    packing = draw.choice(["zstd", "gzip", "snappy", "none", "lz4", "brotli"])
    arrow_parquet.write_table(table, file, compression=packing, use_dictionary=draw.random() < 0.5)
    yield "log.parquet", file.getvalue()


def damaged(content, draw):
    content = bytearray(content)
    for _ in range(draw.choice([1, 1, 2, 5])):
        at = draw.randrange(len(content) + 1)
        kind = draw.randrange(5)
        if kind < 2:
            content[at : at + draw.choice([0, 1, 5, 30])] = draw.choice(TOKENS)
        elif kind == 2 and at < len(content):
            content[at] ^= 1 << draw.randrange(8)
        elif kind == 3:
            content = content[: at or 1]
        else:
            begin = draw.randrange(at + 1)
            content[begin:begin] = content[begin:at]
    return bytes(content)


def assert_sound(log):
    assert (log.offsets[0], log.offsets[-1]) == (0, log.n_events)
    assert (log.lengths >= 3).all()
    assert (log.items.min(), log.items.max()) == (1, log.n_items - 1)
    for ids in (log.user_ids, log.item_ids[1:]):
        assert len(set(ids.tolist())) == len(ids)
        assert ids.dtype == np.int64 or all(type(raw) is str and raw and raw.encode() for raw in ids)
    if log.times is not None:
        assert log.times.dtype in (np.int64, np.float64)
        assert np.isfinite(log.times).all()
        for begin, end in zip(log.offsets[:-1], log.offsets[1:], strict=True):
            assert (log.times[begin : end - 1] <= log.times[begin + 1 : end]).all()


def test_damaged_logs_are_refused_in_one_sentence_or_sound(tmp_path):
    draw, refused, read = random.Random(18), 0, 0
    for _ in range(130):
        for name, content in files(draw):
            path = tmp_path / name
            path.write_bytes(content)
            log = read_log(path)
            found = {log.user_ids[user]: log.item_ids[log.history(user)].tolist() for user in range(log.n_users)}
            assert found in (HISTORIES, NAMED), name
            path.write_bytes(damaged(content, draw))
            try:
                assert_sound(read_log(path))
                read += 1
            except InputError as error:
                refused += 1
                sentence = str(error).replace(str(tmp_path), "")
                assert sentence.endswith("."), sentence
                assert sentence.isprintable(), sentence
                assert len(sentence) < 500, sentence
    assert read > 100
    assert refused > 300
