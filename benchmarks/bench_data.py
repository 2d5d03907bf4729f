"""Time reading a log, building a batch and sampling partners, against the usual ways in Python."""

import numpy as np
import pytest
import torch

from lares_fast.data import SameTargetIndex, leave_one_out, make_batch, read_log, synthetic_log

B, L = 1024, 20


@pytest.fixture(scope="module")
def log():
    return synthetic_log(n_users=20_000, n_items=5_000)


def test_reading_sequences(compare, log, tmp_path):
    path = tmp_path / "log.txt"
    lines = (" ".join(map(str, [user + 1, *log.history(user)])) for user in range(log.n_users))
    path.write_text("\n".join(lines) + "\n")

    def line_by_line():
        with path.open() as file:
            return [list(map(int, line.split())) for line in file]

    ours = read_log(path)
    assert ours.n_events == log.n_events
    assert line_by_line()[7][1:] == ours.item_ids[ours.history(7)].tolist()
    candidates = {"Python lists": line_by_line, "read_log": lambda: read_log(path)}
    compare("data", f"read {log.n_events} events", candidates, "same events", rounds=5)


@pytest.mark.parametrize("quoted", [False, True], ids=["plain ids", "titles"])
def test_reading_csv(compare, tmp_path, quoted):
    """String ids without quotes, and titles, of which a third have commas and some have quotes. The times are not sorted."""
    csv = pytest.importorskip("pyarrow.csv")
    draw, n = np.random.default_rng(0), 400_000
    users, items = draw.integers(20_000, size=n), draw.zipf(1.2, n) % 5_000
    times = draw.integers(1_500_000_000, 1_700_000_000, n)
    titles = [f"item-{item:05}" for item in range(5_000)]
    if quoted:
        titles = [f"The film {item}" + ", Part II" * (item % 3 == 0) + ' "Uncut"' * (item % 50 == 0) for item in range(5_000)]
        titles = ['"' + title.replace('"', '""') + '"' if "," in title or '"' in title else title for title in titles]
    path = tmp_path / "log.csv"
    lines = (f"user-{u:05},{titles[i]},{t}\n" for u, i, t in zip(users, items, times, strict=True))
    path.write_text("user_id,item_id,timestamp\n" + "".join(lines))

    def by_arrow():
        table = csv.read_csv(path)
        return [table[name].dictionary_encode().unify_dictionaries() for name in ("user_id", "item_id")]

    ours = read_log(path, min_events=1)
    for ids, column in zip((ours.user_ids, ours.item_ids[1:]), by_arrow(), strict=True):
        assert ids.tolist() == column.chunk(0).dictionary.to_pylist()
    candidates = {"read_csv + dictionary_encode": by_arrow, "read_log": lambda: read_log(path, min_events=1)}
    compare("data", f"read {n} events of CSV, {'titles' if quoted else 'plain ids'}", candidates, "same ids", rounds=15)


def test_batch(compare, log):
    rows = leave_one_out(log).train
    index = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:B]

    def row_by_row():
        seqs = []
        for r in index.tolist():
            start = max(log.offsets[rows.users[r]], rows.ends[r] - L)
            seqs.append(torch.tensor(log.items[start : rows.ends[r]].astype(np.int64)))
        return torch.cat(seqs)

    assert torch.equal(row_by_row(), make_batch(log, rows, index, L).items)
    candidates = {"row by row": row_by_row, "make_batch": lambda: make_batch(log, rows, index, L)}
    compare("data", f"batch B{B} L{L}", candidates, "same items")


def test_partners(compare, log):
    rows = leave_one_out(log).train
    index = torch.arange(B) * 7
    partners = SameTargetIndex(log, rows)
    targets = rows.targets(log)
    by_target = {}
    for row, target in enumerate(targets.tolist()):
        by_target.setdefault(target, []).append(row)
    generator = torch.Generator().manual_seed(0)
    chosen = partners.sample(index, generator)
    assert (targets[chosen.numpy()] == targets[index.numpy()]).all()

    def lists():
        random = np.random.default_rng(0)
        return [random.choice([r for r in by_target[targets[i]] if r != i] or [i]) for i in index.tolist()]

    candidates = {"lists by target": lists, "SameTargetIndex": lambda: partners.sample(index, generator)}
    compare("data", f"partners B{B}", candidates, "partners share the target", rounds=3)
