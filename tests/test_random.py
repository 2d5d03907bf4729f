"""The counter-based generator: known answers, addresses, distributions. docs/numerics.md states the test vectors."""

import importlib.util
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lares_fast import _random
from lares_fast._errors import InputError
from lares_fast._random import Draw, DrawFrom

# Known answers of Philox4x32-10 from the Random123 distribution: counter, key, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_known_answers(counter, key, expected):
    assert _random.philox(counter, key) == expected
    assert tuple(map(int, _random.philox(tuple(map(torch.tensor, counter)), key))) == expected


@pytest.mark.parametrize("key", [(0, 0), (7, 9), (2**32 - 1, 2**32 - 1), (5, 2**31), (2**31, 1)])
def test_a_seed_holds_a_key(key):
    seed = _random.seed_of(key, torch.device("cpu"))
    assert (seed.dtype, seed.shape) == (torch.int64, (1,))
    assert _random.key_of(seed) == key
    rounds = _random.RoundKeys.of_seed(seed).pairs
    assert tuple((int(k0), int(k1)) for k0, k1 in rounds) == _random.RoundKeys.of_key(key).pairs
    counter = (1, 2, 3, 4)
    assert tuple(map(int, _random.philox(counter, _random.RoundKeys.of_seed(seed)))) == _random.philox(counter, key)


def test_a_draw_takes_its_key_in_a_tensor():
    """The numbers are those of the integers, and the same tensor is the seed of the ops."""
    key, rows = (7, 2**32 - 9), torch.tensor([3, 70_000])
    seed = _random.seed_of(key, torch.device("cpu"))
    plain, tensor = Draw(key, rows), Draw(seed, rows)
    assert tensor.seed(rows.device) is seed
    assert torch.equal(plain.seed(rows.device), seed)
    x, weights = torch.randn(2, 5, 70), torch.randn(2, 3, 19, 19)
    for call in (
        lambda draw: draw.hidden(x, 0.3, site=2, step=3, layer=1),
        lambda draw: draw.attention(weights, 0.3, step=3, layer=1),
        lambda draw: draw.initial_state(draw.rows[:, None], torch.arange(5), 30),
        lambda draw: _random.keep_hidden_at(draw.key, 9, site=0, step=0, layer=0, rows=rows, positions=rows, width=64),
    ):
        assert torch.equal(call(tensor), call(plain))


def test_a_key_in_a_tensor_is_not_a_generator():
    draw = Draw(_random.seed_of((1, 2), torch.device("cpu")), torch.arange(1))
    with pytest.raises(InputError, match="a draw whose key is a tensor has no generator: give num_steps"):
        draw.generator()
    for wrong in (torch.zeros(2, dtype=torch.int64), torch.zeros((), dtype=torch.int64), torch.zeros(1)):
        with pytest.raises(InputError, match=r"draw\.key must be two integers or int64"):
            Draw(wrong, torch.arange(1)).seed(torch.device("cpu"))


def word(key, c0, c1, c2, c3, which):
    return _random.philox((c0, c1, c2, c3), key)[which]


def test_hidden_address():
    """Compute one element by hand from the address layout of docs/numerics.md."""
    key, site, step, layer, row, position, column = (7, 9), 2, 3, 1, 11, 5, 90
    threshold = 30000
    keep = _random.keep_hidden(
        key, threshold, site=site, step=step, layer=layer, rows=torch.tensor([4, row]), length=6, width=96
    )
    sub, group, which, half = (column % 16) // 2, column // 64, column % 64 // 16, column % 2
    w = word(key, sub + 8 * group + 65536 * site, position, row, 65536 * step + layer, which)
    assert bool(keep[1, position, column]) == ((w >> 16 * half) % 65536 >= threshold)


def test_attention_address():
    key, step, layer, row, head, query, k = (7, 9), 3, 1, 11, 1, 22, 17
    threshold = 30000
    keep = _random.keep_attention(key, threshold, step=step, layer=layer, rows=torch.tensor([row]), heads=2, length=23)
    c0 = (k % 16) // 2 + 8 * head + 65536 * _random.SITE_ATTENTION
    w = word(key, c0, query // 4 + 65536 * (k // 16), row, 65536 * step + layer, query % 4)
    assert bool(keep[0, head, query, k]) == ((w >> 16 * (k % 2)) % 65536 >= threshold)


def test_vectors_of_the_documentation():
    """These vectors never change: a change would break every stored result."""
    rows = torch.tensor([0, 5])
    hidden = _random.keep_hidden((1, 2), 32768, site=1, step=2, layer=1, rows=rows, length=3, width=64)
    attention = _random.keep_attention((1, 2), 6554, step=1, layer=0, rows=rows, heads=2, length=20)
    normal = _random.truncated_normal((1, 2), rows[:, None], torch.arange(2), 4)
    assert pack(hidden[1, 2]) == HIDDEN
    assert pack(attention[1, 1, 19]) == ATTENTION
    assert torch.allclose(normal[1, 1], torch.tensor(NORMAL), rtol=1e-6, atol=0)
    assert _random.root_key(2025) == ROOT_2025
    assert _random.fold(_random.root_key(2025), 1, 2) == FOLDED


def test_the_documentation_states_these_vectors():
    text = (Path(__file__).parent.parent / "docs/numerics.md").read_text()
    for key in (ROOT_2025, FOLDED):
        assert "({:08X}, {:08X})".format(*key) in text
    assert HIDDEN in text
    assert ATTENTION in text
    assert re.search(", ".join(f"{x:.9f}" for x in NORMAL), text)


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed")
def test_triton_computes_the_same_masks():
    """The interpreter runs the kernels' source on the CPU, in a separate process."""
    script = Path(__file__).parent / "support" / "triton_masks.py"
    result = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "equal\n"


def pack(bits):
    return "".join("1" if bit else "0" for bit in bits)


def test_a_mask_does_not_depend_on_the_batch_or_the_padding():
    rows = torch.arange(300)
    arguments = {"site": 1, "step": 2, "layer": 0}
    whole = _random.keep_hidden((3, 4), 1000, **arguments, rows=rows, length=20, width=64)
    part = _random.keep_hidden((3, 4), 1000, **arguments, rows=rows[17:19], length=9, width=48)
    assert torch.equal(whole[17:19, :9, :48], part)
    whole = _random.keep_attention((3, 4), 1000, step=1, layer=0, rows=rows, heads=4, length=20)
    part = _random.keep_attention((3, 4), 1000, step=1, layer=0, rows=rows[250:], heads=2, length=7)
    assert torch.equal(whole[250:, :2, :7, :7], part)
    whole = _random.truncated_normal((3, 4), rows[:, None], torch.arange(20), 64)
    assert torch.equal(whole[5:7, :3, :10], _random.truncated_normal((3, 4), rows[5:7, None], torch.arange(3), 10))


@pytest.mark.parametrize("threshold", [1, 6554, 32768, 65535])
def test_the_realised_rate_and_independence(threshold):
    keep = _random.keep_hidden((5, 6), threshold, site=1, step=1, layer=0, rows=torch.arange(512), length=16, width=64)
    p = threshold / 65536
    sigma = math.sqrt(p * (1 - p))
    assert abs((~keep).double().mean() - p) < 5 * sigma / math.sqrt(keep.numel())
    other = _random.keep_hidden((5, 6), threshold, site=2, step=1, layer=0, rows=torch.arange(512), length=16, width=64)
    agree = ((~keep) & (~other)).double().mean()
    assert abs(agree - p * p) < 6 * max(p * p, 1e-6) ** 0.5 / math.sqrt(keep.numel())


def test_truncated_normal_law():
    x = _random.truncated_normal((8, 9), torch.arange(500)[:, None], torch.arange(20), 64).double()
    assert x.abs().max() <= 3
    assert abs(x.mean()) < 5 / math.sqrt(x.numel())
    # Variance of a standard normal cut at 3: 1 - 2 * 3 * phi(3) / (2 * Phi(3) - 1).
    phi = math.exp(-4.5) / math.sqrt(2 * math.pi)
    assert x.std().item() == pytest.approx(math.sqrt(1 - 6 * phi / math.erf(3 / math.sqrt(2))), rel=5e-3)


def test_dropout_scales_by_the_realised_rate():
    draw = Draw((1, 2), torch.arange(64))
    x = torch.ones(64, 20, 64)
    y = draw.hidden(x, 0.1, site=1, step=1, layer=0)
    threshold = round(0.1 * 65536)
    assert set(y.unique().tolist()) == {0.0, float(torch.tensor(1 / (1 - threshold / 65536)))}
    assert torch.equal(y, draw.hidden(x, 0.1, site=1, step=1, layer=0))
    assert draw.hidden(x, 0.0, site=1, step=1, layer=0) is x
    assert not torch.equal(y, draw.hidden(x, 0.1, site=1, step=2, layer=0))


HIDDEN = "1101110101001101001111010011000000011010000011010011010000011011"
ATTENTION = "01111111111111111110"
NORMAL = [-0.115151450, -1.712559223, 0.883048296, -0.240693673]
ROOT_2025 = (0x3DD1DDA0, 0x81DB76EC)
FOLDED = (0x89EEB741, 0xEE66D9F0)


DRAWS = {
    "linear": lambda: torch.nn.Linear(5, 7).weight,
    "bias": lambda: torch.nn.Linear(5, 7).bias,
    "embedding": lambda: torch.nn.Embedding(9, 16).weight,
    "attention": lambda: torch.nn.MultiheadAttention(8, 2).in_proj_weight,
    "gru": lambda: torch.nn.GRU(4, 4).weight_hh_l0,
    "convolution": lambda: torch.nn.Conv1d(3, 3, 2).weight,
    "xavier_uniform": lambda: torch.nn.init.xavier_uniform_(torch.empty(4, 4)),
    "kaiming_normal": lambda: torch.nn.init.kaiming_normal_(torch.empty(4, 4)),
    "trunc_normal": lambda: torch.nn.init.trunc_normal_(torch.empty(4, 4)),
    "orthogonal": lambda: torch.nn.init.orthogonal_(torch.empty(4, 4)),
    "sparse": lambda: torch.nn.init.sparse_(torch.empty(4, 4), 0.5),
    "rand": lambda: torch.rand(5),
    "randn": lambda: torch.randn(5, 6),
    "rand_like": lambda: torch.rand_like(torch.ones(4)),
    "randn_like": lambda: torch.randn_like(torch.ones(4)),
    "randint": lambda: torch.randint(1, 50, (4,)),
    "randperm": lambda: torch.randperm(6),
    "normal": lambda: torch.normal(torch.zeros(4), 1.0),
    "bernoulli": lambda: torch.bernoulli(torch.full((9,), 0.5)),
    "exponential": lambda: torch.empty(4).exponential_(),
}


@pytest.mark.parametrize("draw", DRAWS)
def test_draws_from_a_generator_have_the_stream_of_a_seed(draw):
    """And the generator that all threads share is not read."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        expected = DRAWS[draw]()
        torch.manual_seed(6)
        with DrawFrom(torch.Generator().manual_seed(5)):
            found = DRAWS[draw]()
        assert torch.equal(found, expected)
        after = torch.rand(2)
        torch.manual_seed(6)
        assert torch.equal(after, torch.rand(2))


def test_a_draw_with_a_generator_of_its_own_keeps_it():
    with DrawFrom(torch.Generator().manual_seed(5)):
        found = torch.rand(3, generator=torch.Generator().manual_seed(6))
    assert torch.equal(found, torch.rand(3, generator=torch.Generator().manual_seed(6)))
