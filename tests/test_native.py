"""The loader of the native module: its report, its reasons for a missing module, and how it takes arguments."""

import importlib

import pytest

from lares_fast import _native
from lares_fast._errors import InputError, NotBuiltError
from lares_fast._native_call import call_native
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
