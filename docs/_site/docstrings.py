"""A griffe extension: turn the markup of the docstrings into Markdown."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|attr|mod|data):`~?([^`]+)`")
_TERM = re.compile(r"(?m)^(``[^`\n]+``)\n((?:    \S.*\n?)+)")
_DOCTEST = re.compile(r"(?m)^>>> .*(?:\n(?!\s*$).+)*")


def to_markdown(text: str) -> str:
    """Return ``text`` with roles as code, terms as a definition list, and doctests as code blocks."""
    text = _ROLE.sub(r"`\1`", text)
    text = _TERM.sub(lambda found: f"\n{found[1]}\n:   {found[2].strip()}\n", text)
    return _DOCTEST.sub(lambda found: f"```pycon\n{found[0].replace('  # doctest: +SKIP', '')}\n```", text)


class Markdown(griffe.Extension):
    """Apply :func:`to_markdown` to every docstring."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring of ``obj``; griffe calls this."""
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)
