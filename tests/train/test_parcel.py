"""A batch in one buffer: what comes out equals what went in, in the same places for batches of equal sizes."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lares_fast.train.parcel import Parcel


class Pair(NamedTuple):
    one: Tensor
    other: Tensor | None


@dataclass(frozen=True)
class Content:
    name: str
    pair: Pair
    several: tuple[Tensor, int]
    flag: Tensor


def content(seed=0, name="x", size=5):
    torch.manual_seed(seed)
    return Content(
        name,
        Pair(torch.randint(-(2**62), 2**62, (size,)), None),
        (torch.randn(3, 7, dtype=torch.float64), 9),
        torch.tensor(bool(seed)),
    )


def same(one, other):
    assert (one.name, one.pair.other, one.several[1]) == (other.name, other.pair.other, other.several[1])
    pairs = [(one.pair.one, other.pair.one), (one.several[0], other.several[0]), (one.flag, other.flag)]
    return all(x.dtype == y.dtype and x.shape == y.shape and torch.equal(x, y) for x, y in pairs)


def test_what_comes_out_went_in():
    for given in (content(), content(1), content(size=1), content(size=0)):
        parcel = Parcel(given, pinned=False)
        assert parcel.host.dtype == torch.int64
        assert same(parcel.opened(parcel.host.clone()), given)


def test_everything_is_a_view_at_an_address_that_16_divides():
    parcel = Parcel((torch.ones(3), torch.ones(()), torch.ones(5, dtype=torch.int32), torch.ones(2, 2)), pinned=False)
    buffer = parcel.host.clone()
    for tensor in parcel.opened(buffer):
        assert (tensor.data_ptr() - buffer.data_ptr()) % 16 == 0
        assert tensor.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr() and tensor.is_contiguous()


def test_a_buffer_that_is_filled_again_shows_the_new_values():
    first, second = Parcel(content(), pinned=False), Parcel(content(1), pinned=False)
    assert first.key == second.key
    buffer = first.host.clone()
    opened = first.opened(buffer)
    buffer.copy_(second.host)
    assert same(opened, content(1)) and not same(opened, content())


def test_the_key_has_sizes_dtypes_and_plain_values():
    keys = {
        Parcel(given, pinned=False).key
        for given in (content(), content(name="y"), content(size=6), (torch.ones(2),), (torch.ones(2).double(),))
    }
    assert len(keys) == 5
    assert Parcel(content(), pinned=False).key == Parcel(content(2), pinned=False).key
