"""Messages of errors: one printable line, whatever a path or a name in it contains."""

import pytest

import lares_fast
from lares_fast._errors import InputError


@pytest.mark.parametrize("strange", ["\n", "\r", "\x1b[2J", "\u2028", "\x00", "\udcff"])
def test_a_message_is_one_printable_line(strange):
    message = str(InputError(f"the file a{strange}b is damaged."))
    assert message.isprintable() and message.startswith("the file a") and message.endswith("b is damaged.")


def test_a_long_message_keeps_its_beginning_and_its_remedy():
    message = str(InputError(f"the file {'x' * 5000} is damaged: use a copy."))
    assert len(message) == 1000 and message.startswith("the file xxx") and message.endswith("is damaged: use a copy.")


def test_a_strange_path_keeps_its_message_on_one_line(tmp_path):
    with pytest.raises(InputError, match="does not exist") as raised:
        lares_fast.load(tmp_path / "two\nlines")
    assert str(raised.value).isprintable()
