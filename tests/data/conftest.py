import pytest

from lares_fast.data import _tables, _text


@pytest.fixture
def small_blocks(monkeypatch):
    """Read blocks of a few hundred rows, so that a short file has several of them."""
    monkeypatch.setattr(_text, "BLOCK_BYTES", 1 << 11)
    monkeypatch.setattr(_tables, "CSV_BLOCK_BYTES", 1 << 11)
