"""Random numbers of the native module have the bits of ``_random``, and arguments out of range raise errors."""

import pytest
import torch

from lares_fast import _native, _native_random, _random
from lares_fast._errors import InputError
from tests.support.catalog_cases import needs_native, same

pytestmark = needs_native

KEY = _random.root_key(7)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, words):
    assert tuple(_native.load().philox(counter=counter, key=key)) == words


@pytest.mark.parametrize("rows", [[], [0], [5, 2**32 - 1, 5, 17]])
@pytest.mark.parametrize(("length", "width"), [(1, 1), (3, 64), (50, 65), (7, 200)])
@pytest.mark.parametrize("threshold", [0, 6554, 65535])
def test_hidden_masks_are_the_reference_bits(rows, length, width, threshold):
    rows = torch.tensor(rows, dtype=torch.int64)
    arguments = {"site": 4, "step": 9, "layer": 3, "width": width}
    token_rows, positions = rows.repeat_interleave(length), torch.arange(length).repeat(len(rows))
    ours = _native_random.keep_hidden(KEY, threshold, **arguments, rows=token_rows, positions=positions)
    expected = _random.keep_hidden(KEY, threshold, **arguments, rows=rows, length=length)
    same([ours.view_as(expected)], [expected])
    seed = _random.seed_of(KEY, rows.device)
    same([_native_random.keep_hidden(seed, threshold, **arguments, rows=token_rows, positions=positions)], [ours])


@pytest.mark.parametrize("rows", [[], [0], [5, 2**32 - 1, 5, 17]])
@pytest.mark.parametrize("width", [1, 64, 65, 200])
def test_uniforms_of_h0_are_the_reference_bits(rows, width):
    rows = torch.tensor(rows, dtype=torch.int64)
    arguments = (KEY, rows, rows.flip(0), width)
    same([_native_random.state_uniforms(*arguments)], [_random.state_uniforms(*arguments)])
    with pytest.raises(InputError):
        _native_random.state_uniforms(KEY, rows, rows[1:] if len(rows) else rows - 1, -1)


@pytest.mark.parametrize("rows", [[], [0], [5, 2**32 - 1, 17]])
@pytest.mark.parametrize(("heads", "length"), [(1, 1), (2, 16), (3, 50), (1, 19)])
def test_attention_masks_are_the_reference_bits(rows, heads, length):
    arguments = {"step": 65535, "layer": 1, "rows": torch.tensor(rows, dtype=torch.int64), "heads": heads, "length": length}
    same([_native_random.keep_attention(KEY, 20000, **arguments)], [_random.keep_attention(KEY, 20000, **arguments)])


@pytest.mark.parametrize(
    "change",
    [
        {"threshold": -1},
        {"threshold": 65537},
        {"step": 65536},
        {"layer": -1},
        {"site": 65536},
        {"rows": torch.tensor([-1])},
        {"rows": torch.tensor([2**32])},
        {"rows": torch.tensor([0.5])},
        {"positions": torch.tensor([-1])},
        {"positions": torch.tensor([2**32])},
        {"positions": torch.tensor([1, 2])},
        {"width": -1},
        {"width": 64 * 8192 + 1},
        {"key": (-1, 0)},
        {"key": (2**32, 0)},
    ],
    ids=str,
)
def test_hidden_mask_refuses(change):
    arguments = {
        "key": KEY,
        "threshold": 5,
        "site": 0,
        "step": 0,
        "layer": 0,
        "rows": torch.tensor([1]),
        "positions": torch.tensor([2]),
        "width": 3,
        **change,
    }
    with pytest.raises(InputError):
        _native_random.keep_hidden(**arguments)
