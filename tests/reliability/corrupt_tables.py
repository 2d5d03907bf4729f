"""Damage parquet files: those that ``lares-fast recommend`` wrote, and those of other programs with and without checksums."""

import random

import numpy as np
import pyarrow as arrow
import pyarrow.parquet

from lares_fast._errors import InputError
from lares_fast.data import read_log
from tests.reliability.corrupt_places import Places, called
from tests.reliability.counts import Counts
from tests.support.damage import harmed

OWN = "a parquet file of lares-fast recommend"
CHECKED = "a parquet file of another program, with checksums"
UNCHECKED = "a parquet file of another program, without checksums"
_NAMES = {"user": "user_id", "item": "item_id", "time": "timestamp"}
_OWN_NAMES = {"user": "user", "item": "item", "time": "rank"}


def measure(counts: Counts, places: Places, folder, share: float) -> None:
    """Damage files of each kind and read them as logs."""
    own = folder / "recommended.parquet"
    code, text = called("recommend", "--run", places.run, "--input", places.log, "--output", own)
    assert code == 0, text
    damage(counts, OWN, own, _OWN_NAMES, round(1000 * share), random.Random(1))
    for what, checked in ((CHECKED, True), (UNCHECKED, False)):
        files = foreign(folder, checked)
        each = max(1, round(1000 * share) // len(files))
        other = sum(damage(counts, what, path, _NAMES, each, random.Random(number)) for number, path in enumerate(files))
        if not checked:
            counts.note(what, f"{other:,} read as other data, because nothing in the file shows the damage")


def foreign(folder, checked):
    """Return parquet files as other programs write them: several codecs and encodings, texts and numbers, row groups."""
    draw = np.random.default_rng(0)
    users, items, times = np.repeat(np.arange(60), 10), draw.integers(0, 50, 600), np.arange(600)
    texts = {"user_id": [f"u{user}" for user in users], "item_id": [f"i{item}" for item in items], "timestamp": times / 2}
    dated = {"user_id": users, "item_id": items.astype("i4"), "timestamp": times.astype("M8[s]")}
    paths = []
    for number, (columns, options) in enumerate(
        (
            ({"user_id": users, "item_id": items, "timestamp": times}, {"compression": "snappy"}),
            (texts, {"compression": "none", "row_group_size": 100}),
            (texts, {"compression": "zstd", "use_dictionary": False}),
            (dated, {"compression": "gzip", "data_page_version": "2.0"}),
            (dated, {"compression": "lz4", "use_dictionary": False, "column_encoding": "DELTA_BINARY_PACKED"}),
        )
    ):
        paths.append(folder / f"foreign-{checked}-{number}.parquet")
        # One small page after the other, so that there are many headers.
        arrow.parquet.write_table(arrow.table(columns), paths[-1], write_page_checksum=checked, data_page_size=400, **options)
    return paths


def damage(counts, what, path, names, number, draw):
    """Damage a file: it is refused by one sentence or read as the whole file; without checksums any sound log will do.

    Return how often other content was read.
    """
    whole, content, other = content_of(path, names), path.read_bytes(), 0
    for index in range(number):
        counts.tried(what)
        path.write_bytes(harmed(content, draw))
        try:
            found = content_of(path, names)
            other += found != whole
            if found != whole and what != UNCHECKED:
                counts.failed(what, f"try {index} of {path.name} was read as another log", lost=True)
        except InputError as error:
            if path.name not in str(error) or "\n" in str(error):
                counts.failed(what, f"try {index} of {path.name} has an unclear message: {error!r:.300}")
        except Exception as error:
            counts.failed(what, f"try {index} of {path.name} raised {error!r:.300}")
    path.write_bytes(content)
    return other


def content_of(path, names):
    """Return the log in ``path`` as lists, and check what every log promises."""
    log = read_log(path, columns=names)
    users, items, offsets = log.user_ids, log.item_ids, log.offsets
    assert len(set(users.tolist())) == len(users) and len(set(map(str, items[1:].tolist()))) == len(items) - 1
    assert offsets[0] == 0 and offsets[-1] == len(log.items) and (np.diff(offsets) > 0).all() and len(offsets) == len(users) + 1
    assert not len(log.items) or (log.items.min() >= 1 and log.items.max() < log.n_items)
    if log.times is not None:
        inside = np.ones(len(log.items), bool)
        inside[offsets[:-1]] = False
        assert (np.diff(log.times, prepend=log.times[:1])[inside] >= 0).all()
    return users.tolist(), items.tolist(), log.items.tolist(), offsets.tolist(), log.times.tolist()
