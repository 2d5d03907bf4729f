"""Choose the lanes of .ci/run from the paths that changed.

``python3 .ci/choose.py``               every lane
``python3 .ci/choose.py quick BASE``    the lanes that the changes since the commit BASE need
``python3 .ci/choose.py only LANE...``  these lanes

Print the lanes on standard output, and the reasons on standard error. The table is .ci/lanes.toml.
"""

import subprocess
import sys
import tomllib
from fnmatch import fnmatchcase
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = tomllib.loads((Path(__file__).parent / "lanes.toml").read_text())
LANES: dict[str, str] = TABLE["lanes"]


def expand(names: list[str]) -> set[str]:
    """Return the lanes that ``names`` mean: names of lanes, names of sets, or ``all``."""
    if "all" in names:
        return set(LANES)
    return {lane for name in names for lane in TABLE["sets"].get(name, [name])}


def pattern_of(path: str) -> str | None:
    """Return the first pattern of the table that matches ``path``, or None."""
    return next((pattern for pattern in TABLE["paths"] if fnmatchcase(path, pattern)), None)


def lanes_of(path: str) -> set[str]:
    """Return the lanes that a change of ``path`` needs. If no pattern matches, return every lane."""
    pattern = pattern_of(path)
    return set(LANES) if pattern is None else expand(TABLE["paths"][pattern])


def choose(paths: list[str]) -> dict[str, list[str]]:
    """Return the lanes of a quick run, in order, each with the changed paths that need it."""
    reasons = {lane: [path for path in paths if lane in lanes_of(path)] for lane in LANES}
    return {lane: why for lane, why in reasons.items() if why or lane in TABLE["always"]["lanes"]}


def changed(base: str) -> list[str]:
    """Return the paths that changed since ``base``. A renamed file counts under both names."""
    command = ["git", "diff", "--name-only", "--no-renames", "-z", f"{base}...HEAD"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"git cannot compare {base} with HEAD: {done.stderr.strip()}")
    return [path for path in done.stdout.split("\0") if path]


def explain(chosen: dict[str, list[str]], paths: list[str]) -> str:
    """Return a table of the lanes that run and the lanes that are left out, with the reasons."""
    lines = [f"{len(paths)} changed paths. Lanes that run:"]
    for lane, why in chosen.items():
        others = f" and {len(why) - 1} more" if len(why) > 1 else ""
        lines.append(f"  {lane:20} {f'changed: {why[0]}{others}' if why else 'always runs'}")
    if unknown := [path for path in paths if pattern_of(path) is None]:
        lines.append(f"Every lane runs, because .ci/lanes.toml has no pattern for {', '.join(unknown)}.")
    if left_out := [lane for lane in LANES if lane not in chosen]:
        lines.append("Lanes left out, because no changed path needs them:")
        lines += [f"  {lane:20} {LANES[lane]}" for lane in left_out]
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    """Print the lanes for the arguments of .ci/run."""
    match arguments:
        case []:
            lanes = list(LANES)
        case ["quick", base]:
            paths = changed(base)
            lanes = list(choose(paths))
            print(explain(choose(paths), paths), file=sys.stderr)
        case ["only", *names] if names:
            if unknown := [name for name in names if name not in LANES]:
                sys.exit(f"unknown lane {unknown[0]}; the lanes are {', '.join(LANES)}.")
            lanes = [lane for lane in LANES if lane in names]
        case _:
            sys.exit("usage: .ci/run, .ci/run quick BASE, or .ci/run only LANE...")
    print(*lanes)


if __name__ == "__main__":
    main(sys.argv[1:])
