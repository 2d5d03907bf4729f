"""Logs of all formats as bytes, and damage to them."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator
from random import Random
from typing import Any

import pyarrow
from pyarrow import parquet

Histories = dict[Any, list[Any]]

HISTORIES: Histories = {3: [7, 5, 9, 5], 1: [5, 9, 7], 2: [12, 7, 5]}
NAMED: Histories = {f"u{user}": [f"é{item}" for item in items] for user, items in HISTORIES.items()}
# Ids at the ends of 64 bits, and text that looks like something else.
ODD: Histories = {
    "007": ["1e5", "-0", "1_0"],
    "NA": ["null", "nan", "#", "+7"],
    "🙂": ["a b", "a,b", 'a"b'],
    "x:y": ["1", "2", "3"],
}
LARGE: Histories = {2**62: [2**63 - 1, 1, 2**62], 1: [2**62, 2**62 + 1, 3]}
TIMES = (str, lambda time: f"{time}.5", lambda time: f"2020-01-01 10:00:{time - 100:02}", lambda time: str(time + 10**18))
PACKINGS = ("zstd", "gzip", "snappy", "none", "lz4", "brotli")

# Bytes that damage puts into a file.
TOKENS = (
    *(b'"', b"'", b",", b"\t", b"\n", b"\r", b"\r\n", b"\0", b"\xff", b"\xef\xbb\xbf", b" ", b"#", b":", b"", b"\n\n", b'""'),
    *(b"9223372036854775807", b"-9223372036854775808", b"9223372036854775808", b"9007199254740993", b"1" * 5000, b"1.5"),
    *(b"NA", b"null", b"nan", b"inf", b"1e400", b"0x10", b"1_0", b"+5", b"-0", b"007", b"true", b"2020-01-01T00:00:00Z"),
    *(
        b"{",
        b"[",
        b"]",
        b"}",
        b"[" * 3000,
        b"{" * 3000,
        b"\\ud800",
        b"\\u0000",
        b"\xed\xa0\x80",
        b"\xc3\xa9",
        b"\xe2\x80\xa8",
        b"\x85",
    ),
    *(
        b"\x1f\x8b",
        b"PK\x03\x04",
        b"\xff\xfe",
        b"\x1b[31m",
        b"user_id,item_id,timestamp,x\n",
        b"x" * 70_000,
        b"4611686018427387904",
    ),
)


def files(random: Random, histories: Histories | None = None) -> Iterator[tuple[str, bytes]]:
    """Yield (file name, bytes) of one log in all formats. Without ``histories`` its ids are integers or names."""
    histories = histories or random.choice([HISTORIES, NAMED])
    time_text = random.choice(TIMES)
    rows = [(user, item, 100 + 10 * at) for user, items in histories.items() for at, item in enumerate(items)]
    random.shuffle(rows)
    texts = [(user, item, time_text(time)) for user, item, time in rows]
    plain = time_text if "-" not in time_text(100) else str
    yield "log.txt", "".join(f"{user} {' '.join(map(str, items))}\n" for user, items in histories.items()).encode()
    yield "pairs.txt", "".join(f"{user} {item}\n" for user, items in histories.items() for item in items).encode()
    yield "log.json", json.dumps(histories, ensure_ascii=random.random() < 0.5).encode()
    header = "user_id:token\titem_id:token\ttimestamp:float\n"
    yield "log.inter", (header + "".join(f"{user}\t{item}\t{plain(time)}\n" for user, item, time in rows)).encode()
    header = "user_id,item_id,timestamp,x\n"
    quoted = [(_quoted(user), _quoted(item), time) for user, item, time in texts]
    yield "log.csv", (header + "".join(f'{user},{item},{time},"a ""b"",\nc"\n' for user, item, time in quoted)).encode()
    header = header.replace(",", "\t")
    yield "log.tsv", (header + "".join(f'{user}\t{item}\t{time}\t"x\n' for user, item, time in texts)).encode()
    yield "log.parquet", _parquet(random, rows)


def _quoted(value: Any) -> str:
    return '"' + value.replace('"', '""') + '"' if isinstance(value, str) and set(value) & set(',"') else str(value)


def _parquet(random: Random, rows: list[tuple[Any, Any, int]]) -> bytes:
    users, items, times = map(list, zip(*rows, strict=True))
    kinds = [pyarrow.array(times), pyarrow.array(times, "timestamp[ms]"), pyarrow.array(list(map(float, times)))]
    table = pyarrow.table({"user_id": users, "item_id": items, "timestamp": random.choice(kinds)})
    file = io.BytesIO()
    parquet.write_table(table, file, compression=random.choice(PACKINGS), use_dictionary=random.random() < 0.5)
    return file.getvalue()


def damaged(content: bytes, random: Random, tokens: tuple[bytes, ...] = TOKENS) -> bytes:
    """Return ``content`` with one to five changes: bytes put in, bits flipped, the end cut off, or a part written twice."""
    data = bytearray(content)
    for _ in range(random.choice([1, 1, 2, 5])):
        at = random.randrange(len(data) + 1)
        kind = random.randrange(5)
        if kind < 2:
            data[at : at + random.choice([0, 1, 5, 30])] = random.choice(tokens)
        elif kind == 2 and at < len(data):
            data[at] ^= 1 << random.randrange(8)
        elif kind == 3:
            data = data[: at or 1]
        else:
            begin = random.randrange(at + 1)
            data[begin:begin] = data[begin:at]
    return bytes(data)


def variants(content: bytes, random: Random) -> bytes:
    """Return ``content`` in another form that tools write: with other line ends, a byte order mark, packed, or twice."""
    changes = (
        lambda data: data.replace(b"\n", b"\r\n"),
        lambda data: data.replace(b"\n", b"\r\n", 3),
        lambda data: data.replace(b"\n", b"\r"),
        lambda data: b"\xef\xbb\xbf" + data,
        lambda data: data.rstrip(b"\n"),
        lambda data: data + b"\n\n\n",
        lambda data: data.decode("utf-8", "replace").encode("utf-16"),
        gzip.compress,
        lambda data: data * 2,
        lambda data: data.replace(b"1", b"\xc2\xb9"),
        lambda data: data.replace(b" ", b"\t"),
    )
    return bytes(random.choice(changes)(content))
