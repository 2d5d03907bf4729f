"""The built module is protected against attacks, as SECURITY.md says."""

import shutil
import subprocess
from pathlib import Path

import pytest

from lares_fast import _native
from tests.support import elf

pytestmark = pytest.mark.skipif(not elf.has_tools(), reason="no readelf")


def test_the_module_is_protected():
    info = _native.build_info()
    if not info["native"]:
        pytest.skip(f"no native module: {info['reason']}")
    assert elf.faults(Path(info["file"])) == []
    assert "-D_FORTIFY_SOURCE=" in info["flags"]


def test_a_library_without_protection_is_found(tmp_path):
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    source = tmp_path / "plain.c"
    source.write_text("int one(void) { return 1; } int two(void) { return 2; }")
    flags = ["-shared", "-fPIC", "-fno-stack-protector", "-Wl,-z,lazy,-z,norelro,-z,execstack", "-Wl,-rpath,/x"]
    subprocess.run(["cc", *flags, "-o", tmp_path / "plain.so", source], check=True, capture_output=True)
    assert elf.faults(tmp_path / "plain.so") == list(elf.CHECKS)
