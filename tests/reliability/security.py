"""Attack outputs, the cache, settings and input paths, and check the protection of the built module."""

from __future__ import annotations

from pathlib import Path

from lares_fast import _native
from tests.reliability import security_cache, security_inputs, security_outputs
from tests.reliability.accounts import folder_for_all
from tests.reliability.counts import Counts
from tests.support import elf

MODULE, PLANTED = "protection of the built module", "planted faults that the attacks must find"


def measure(counts: Counts) -> None:
    """Run all attacks. Then run each attack against code that is wrong on purpose, which must be counted as a failure."""
    with folder_for_all() as folder:
        for attack in (security_outputs, security_cache, security_inputs):
            place = folder / attack.__name__.rpartition(".")[2]
            place.mkdir()
            attack.measure(counts, place)
        _module(counts)
        for attack in (security_outputs, security_cache, security_inputs):
            for name, run in attack.planted().items():
                place = folder / f"planted {name}"
                place.mkdir()
                trial = _Silent(name, quick=True)
                run(trial, place)
                counts.tried(PLANTED)
                if trial.passed:
                    counts.failed(PLANTED, f"{name} was not found", lost=True)


class _Silent(Counts):
    """Counts of an attack on wrong code, which are not printed."""

    def tried(self, what: str, number: int = 1, *, goal: int = 0) -> None:
        self._row(what).tried += number

    def failed(self, what: str, text: str, *, lost: bool = False) -> None:
        row = self._row(what)
        row.failed += 1
        row.lost += lost


def _module(counts: Counts) -> None:
    info = _native.build_info()
    if not info["native"] or not elf.has_tools():
        counts.note(MODULE, "not tried: no native module, or no readelf")
        return
    counts.tried(MODULE, len(elf.CHECKS))
    for fault in elf.faults(Path(info["file"])):
        counts.failed(MODULE, f"the module lacks: {fault}")
    counts.note(MODULE, ", ".join(elf.CHECKS))
