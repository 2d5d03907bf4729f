"""Write the tables of docs/settings.md again, from the docstrings of the settings: ``python docs/_site/settings.py``."""

from __future__ import annotations

import re
from itertools import groupby
from pathlib import Path

from lares_fast._files import write_text
from lares_fast.cli import setting_table

PAGE = Path(__file__).parent.parent / "settings.md"
# What stands above this line is written by hand.
MARK = "<!-- docs/_site/settings.py writes everything below this line. -->\n"

_ROLE = re.compile(r":\w+:`~?([^`]+)`")


def page(text: str) -> str:
    """Return the page ``text`` with new tables."""
    head, mark, _ = text.partition(MARK)
    assert mark, f"{PAGE} lacks the line {MARK}"
    return head + mark + "".join(tables())


def tables() -> list[str]:
    """Return a heading and a table for each section of the settings."""
    found = []
    for section, rows in groupby(setting_table.rows(), lambda row: row.key.rpartition(".")[0]):
        title = f"`{section}`" if section else "Other settings"
        lines = [
            f"\n## {title}\n\n{setting_table.heading(section)}\n\n| setting | type | default | meaning |\n|---|---|---|---|\n"
        ]
        lines += [f"| `{row.key}` | {row.kind} | `{row.default}` | {_markdown(row.meaning)} |\n" for row in rows]
        found.append("".join(lines))
    return found


def _markdown(text: str) -> str:
    return _ROLE.sub(r"`\1`", text).replace("``None``", "`null`").replace("``", "`").replace("|", "\\|")


if __name__ == "__main__":
    write_text(PAGE, page(PAGE.read_text()))
