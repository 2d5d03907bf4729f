"""What a shared library says about its protection, read by readelf and nm."""

import shutil
import subprocess
from pathlib import Path

TOOLS = ("readelf", "nm")
# What a protected module has.
CHECKS = ("full RELRO", "no executable stack", "stack protector", "checked copies", "one exported name", "no search path")


def has_tools() -> bool:
    return all(map(shutil.which, TOOLS))


def faults(module: Path) -> list[str]:
    """Return the entries of ``CHECKS`` that ``module`` lacks."""

    def read(*command: str) -> str:
        return subprocess.run([*command, str(module)], capture_output=True, text=True, check=True).stdout

    dynamic, segments, names = read("readelf", "-dW"), read("readelf", "-lW"), read("nm", "-D")
    # The names are without their versions.
    imported = {line.split()[1].partition("@")[0] for line in names.splitlines() if line.split()[0] == "U"}
    exported = [line.split()[2] for line in names.splitlines() if line.split()[1] in "TDBRVWiu" and len(line.split()) == 3]
    (stack,) = [line.split() for line in segments.splitlines() if "GNU_STACK" in line]
    right = {
        "full RELRO": "GNU_RELRO" in segments and ("BIND_NOW" in dynamic or "Flags: NOW" in dynamic),
        "no executable stack": "E" not in stack[6],
        "stack protector": "__stack_chk_fail" in imported,
        "checked copies": bool(imported & {"__memcpy_chk", "__memset_chk", "__memmove_chk"}),
        "one exported name": exported == ["PyInit__C"],
        "no search path": "RPATH" not in dynamic and "RUNPATH" not in dynamic,
    }
    return [check for check in CHECKS if not right[check]]
