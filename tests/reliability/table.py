"""Write the counts of the last long runs into docs/reliability.md."""

from __future__ import annotations

import json

from tests.reliability.counts import RESULTS, ROOT
from tests.reliability.parts import PARTS

# Characters of a note in the table. Longer ones are lists below it.
_LONGEST = 200
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- counts: begin -->\n", "<!-- counts: end -->\n"


def table() -> str:
    """Return the table of all parts that have a result, as Markdown."""
    lines, long = ["| part | what was tried | tried | failed | lost | note |", "|---|---|---:|---:|---:|---|"], list[str]()
    for name in PARTS:
        path = RESULTS / f"{name}.json"
        if path.exists():
            result = json.loads(path.read_text())
            for row in result["rows"]:
                numbers = " | ".join(f"{row[key]:,}" for key in ("tried", "failed", "lost"))
                note = row["note"]
                if len(note) > _LONGEST:
                    long += ["", f"{name}, {row['what']}:", "", *(f"- {part}" for part in note.split("; "))]
                    note = "below the table"
                lines.append(f"| {name} | {row['what']} | {numbers} | {note} |")
    return "\n".join([*lines, *long]) + "\n"


def commands() -> str:
    """Return the command, time and commit of each part, as Markdown."""
    lines = ["| part | what it does | command | minutes | commit |", "|---|---|---|---:|---|"]
    for name, what in PARTS.items():
        path = RESULTS / f"{name}.json"
        if path.exists():
            result = json.loads(path.read_text())
            lines.append(f"| {name} | {what} | `{result['command']}` | {result['seconds'] / 60:.1f} | `{result['commit']}` |")
    return "\n".join(lines) + "\n"


def page() -> str:
    """Return docs/reliability.md with the tables of the results in place."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{commands()}\n{table()}\n{END}{after}"
