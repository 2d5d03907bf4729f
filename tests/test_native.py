"""The loader of the native module: its report, its reasons for a missing module, and how it takes arguments."""

import importlib
from types import SimpleNamespace

import pytest
import torch

from lares_fast import _native
from lares_fast._errors import InputError, NotBuiltError
from lares_fast._native_call import call_native
from lares_fast.ops._catalog_calls import IndexTables
from tests.support.catalog_cases import needs_native

BUILT = _native.available()[0]


def test_build_info_never_raises_and_names_its_reason():
    info = _native.build_info()
    assert info["native"] is BUILT
    assert bool(info["reason"]) is not BUILT
    assert info["cuda_reason"]


@needs_native
def test_build_info_of_a_native_build():
    info = _native.build_info()
    assert info["cuda_built"] is bool(info["cuda_archs"])
    assert {"version", "compiler", "flags", "build_type", "cpu_arch", "nvcc_version", "file"} <= set(info)


@pytest.fixture
def module_raises(monkeypatch):
    """Make the import of ``_C`` raise the error that a test gives."""

    def install(error):
        real = importlib.import_module

        def import_module(name, package=None):
            if name == "lares_fast._C":
                raise error
            return real(name, package)

        monkeypatch.setattr(_native.importlib, "import_module", import_module)
        _native._attempt.cache_clear()

    yield install
    monkeypatch.undo()
    _native._attempt.cache_clear()


def test_a_file_that_does_not_load_is_said_in_the_systems_words(module_raises, monkeypatch, tmp_path):
    (tmp_path / "_C.so").touch()
    monkeypatch.setattr(_native, "__file__", str(tmp_path / "_native.py"))
    module_raises(ImportError("libgone.so.1: cannot open shared object file"))
    with pytest.raises(NotBuiltError, match=r"does not load \(libgone.so.1: cannot open.*pip install"):
        _native.load()


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "the package was not installed: run pip install"),
        ({"_build.json": "not json"}, "the package was not installed"),
        (
            {"_build.json": '{"native": false, "reason": "LARES_FAST_BUILD=none when it was installed"}'},
            "without LARES_FAST_BUILD",
        ),
        ({"_build.json": '{"native": true, "reason": ""}'}, "no longer in"),
        ({"_C.cpython-39-x86_64-linux-gnu.so": ""}, "for another Python"),
    ],
)
def test_a_missing_module_is_explained(module_raises, monkeypatch, tmp_path, files, said):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(_native, "__file__", str(tmp_path / "_native.py"))
    module_raises(ModuleNotFoundError("No module named 'lares_fast._C'"))
    built, reason = _native.available()
    assert not built and said in reason
    info = _native.build_info()
    assert info["native"] is False and info["reason"] == reason and info["cuda_built"] is False
    with pytest.raises(NotBuiltError):
        call_native("topk")


def test_a_module_of_other_sources_is_refused(monkeypatch):
    _native._attempt.cache_clear()
    monkeypatch.setattr(_native, "ABI", -1)
    try:
        built, reason = _native.available()
        assert not built
        assert "other sources" in reason or not BUILT
    finally:
        monkeypatch.undo()
        _native._attempt.cache_clear()


@needs_native
@pytest.mark.parametrize(
    "arguments", [{}, {"N": 1}, {"N": 1, "D": 1, "k": 1}, {"N": 1, "D": 2**64}, {"N": 1, "D": 0.5}], ids=str
)
def test_the_module_takes_exactly_its_arguments(arguments):
    with pytest.raises(InputError, match="index_shape"):
        call_native("index_shape", **arguments)


@needs_native
@pytest.mark.parametrize(("change", "message"), [
    ({"key": None}, "key has a wrong type"),
    ({"D": 2**63}, "D has a wrong type or is out of range"),
    ({"D": "3"}, "D has a wrong type"),
    ({"seed": 3}, "an unknown argument was given"),
])  # fmt: skip
def test_a_wrong_argument_is_named(change, message):
    arguments = {"key": (1, 2), "rows": None, "positions": None, "P": 0, "D": 3, "uniforms": None, **change}
    with pytest.raises(InputError, match=f"state_uniforms: {message}"):
        call_native("state_uniforms", **arguments)


@needs_native
def test_a_missing_argument_is_named_and_positions_are_not_taken():
    with pytest.raises(InputError, match="state_uniforms: key is missing"):
        call_native("state_uniforms", P=0)
    with pytest.raises(TypeError):
        _native.load().topk(1, 2, 3)


@needs_native
@pytest.mark.parametrize("function", ["topk", "index_shape", "use_level", "philox", "level", "build_info"])
def test_a_keyword_that_cannot_be_encoded_is_an_error(function):
    """In the message of pybind11 about wrong arguments, such a keyword would end the process."""
    with pytest.raises(TypeError):
        getattr(_native.load(), function)("\ud800", **{"\ud800": 3})


@needs_native
def test_topk_of_an_empty_catalog_finds_nothing():
    query, scores, ids = torch.ones(2, 8), torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64)
    rest = {"items": None, "bias": None, "exclude_offsets": None, "exclude_ids": None, "threads": 2}
    call_native("topk", query=query, B=2, N=0, D=8, k=3, scores=scores, ids=ids, **rest)
    assert (ids == -1).all() and (scores == -torch.inf).all()


@needs_native
def test_codes_of_an_index_need_the_other_tables():
    query, items, scores, ids = torch.ones(1, 8), torch.ones(9, 8), torch.zeros(1, 3), torch.zeros(1, 3, dtype=torch.int64)
    call = {"query": query, "items": items, "B": 1, "N": 9, "D": 8, "k": 3, "scores": scores, "ids": ids, "threads": 1}
    rest = dict.fromkeys(["bias", "exclude_offsets", "exclude_ids"])
    index = {f"index_{name}": items for name in IndexTables._fields}
    with pytest.raises(InputError, match="an index of this size and SIMD level has no codes"):
        call_native("topk", **call, **rest, **index)
    with pytest.raises(InputError, match="the tables of the index must not be null"):
        call_native("topk", **call, **rest, **{**index, "index_bounds": None})


@needs_native
@pytest.mark.parametrize(("weights", "message"), [
    ([0] * 16, "weights must not be null pointers"), ([1] * 15, "the number of weights is wrong"), ([0] * 2**20, "layers"),
])  # fmt: skip
def test_weights_of_the_recurrence_are_checked(weights, message):
    layers = 2**60 if len(weights) > 16 else 1
    none = dict.fromkeys(["h", "pre", "offsets", "depth", "rows", "tape", "out"])
    sizes = {"batch": 0, "width": 16, "n_heads": 1, "inner_size": 16, "n_layers": layers, "threads": 1}
    rest = {"hidden_threshold": 0, "attention_threshold": 0, "first_step": 0, "eps": 0.0, "key": (0, 0), "bf16": False}
    with pytest.raises(InputError, match=message):
        call_native("recurrence_forward", adapter="none", output="last", weights=weights, **none, **sizes, **rest)


def test_too_little_memory_is_an_input_error(monkeypatch):
    def refuse(**_):
        raise MemoryError

    monkeypatch.setattr(_native, "load", lambda: SimpleNamespace(topk=refuse))
    with pytest.raises(InputError, match="topk: there is not enough memory"):
        call_native("topk")
