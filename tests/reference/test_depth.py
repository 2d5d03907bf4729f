"""The six distributions of T compared with numbers of the published code, from 2 million draws."""

import pytest
import torch

from lares_fast import LARESConfig
from lares_fast.config import DEPTH_SAMPLINGS
from lares_fast.reference import sample_depth


def draws(law, m, size=200_000):
    return sample_depth(LARESConfig(n_items=2, depth_sampling=law, mean_depth=m), size, torch.Generator().manual_seed(1))


@pytest.mark.parametrize("law", DEPTH_SAMPLINGS)
@pytest.mark.parametrize("m", [1, 4])
def test_at_least_one_step(law, m):
    depth = draws(law, m)
    assert depth.dtype == torch.int64
    assert depth.min() >= 1


@pytest.mark.parametrize(("m", "mean", "largest"), [(3, 3.93, 9), (4, 4.93, 12), (8, 8.93, 24)])
def test_poisson_lognormal(m, mean, largest):
    depth = draws("poisson-lognormal", m)
    assert depth.double().mean().item() == pytest.approx(mean, abs=0.03)
    assert depth.max() == largest
    if m == 4:
        assert (depth == 12).double().mean().item() == pytest.approx(0.033, abs=0.003)
        percentiles = depth.double().quantile(torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95, 0.99], dtype=torch.float64))
        assert percentiles.tolist() == [1, 3, 4, 6, 10, 12]


def test_the_others():
    assert draws("constant", 4).unique().tolist() == [4]
    assert draws("non-recurrent", 4).unique().tolist() == [1]
    assert draws("uniform", 4).unique().tolist() == list(range(1, 9))
    assert draws("poisson-bounded", 4).max() == 8
    assert draws("poisson-unbounded", 4).max() > 12
    # T = 0 becomes 1. It is 1.8 % of the official draws at m = 4.
    assert (draws("poisson-unbounded", 4) == 1).double().mean().item() == pytest.approx(0.0183 + 0.0733, abs=0.003)
