"""LARES_FAST_STRICT: what it sets, and what it says if something is missing. tests/reliability/hosts.py compares results."""

import os
import re
from pathlib import Path

import pytest
import torch

from lares_fast import _native, _settings
from lares_fast._errors import InputError
from lares_fast.train import SPTConfig
from lares_fast.train.optimizer import adam


@pytest.fixture
def strict(monkeypatch):
    """Set everything that the strict mode needs. Return the monkeypatch."""
    for name, value in {"LARES_FAST_STRICT": "1", "OMP_NUM_THREADS": "1", **_settings.STRICT}.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_nothing_is_missing(strict):
    assert _settings.strict() and _settings.simd() == "generic"
    _settings.check_strict("DEFAULT")


@pytest.mark.parametrize("name", [*_settings.STRICT, "OMP_NUM_THREADS"])
def test_a_missing_variable_is_named(name, strict):
    strict.delenv(name)
    with pytest.raises(InputError, match=f"LARES_FAST_STRICT=1 needs {name}.* in the environment before Python starts"):
        _settings.check_strict("DEFAULT")


def test_a_variable_that_torch_did_not_read_is_named(strict):
    with pytest.raises(InputError, match="needs ATEN_CPU_CAPABILITY=default in the environment before Python starts"):
        _settings.check_strict("AVX2")


def test_loading_the_native_module_checks_the_variables(strict):
    strict.delenv("MKL_CBWR")
    with pytest.raises(InputError, match="MKL_CBWR=COMPATIBLE"):
        _native._attempt.__wrapped__()


def test_the_command_line_sets_variables_that_are_not_set(monkeypatch):
    for name in _settings.STRICT:
        monkeypatch.setenv(name, "before")
        monkeypatch.delenv(name)
    _settings.set_strict()
    assert not _settings.STRICT.keys() & os.environ.keys()
    monkeypatch.setenv("LARES_FAST_STRICT", "1")
    monkeypatch.setenv("MKL_CBWR", "AVX2")
    _settings.set_strict()
    assert {name: os.environ[name] for name in _settings.STRICT} == {**_settings.STRICT, "MKL_CBWR": "AVX2"}


def test_other_values_are_errors(monkeypatch):
    monkeypatch.setenv("LARES_FAST_STRICT", "yes")
    with pytest.raises(InputError, match=re.escape("LARES_FAST_STRICT must be 0 or 1, but got 'yes'.")):
        _settings.strict()


def test_adam_is_the_fused_one_whose_square_roots_are_exact(strict):
    model = torch.nn.Linear(2, 1)
    assert adam(model, SPTConfig(), None, Path()).param_groups[0]["fused"] is True
    strict.setenv("LARES_FAST_STRICT", "0")
    assert adam(model, SPTConfig(), None, Path()).param_groups[0]["fused"] is None
