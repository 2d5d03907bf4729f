"""Files are written whole or not at all, and reading a file never runs code."""

import errno
import gc
import json
import pickle
import subprocess
import sys

import pytest
import safetensors.torch
import torch

from lares_fast import LARESConfig, _weights
from lares_fast._errors import InputError
from lares_fast._tensors import read_metadata, read_tensors
from lares_fast.train import checkpoint

WEIGHTS = {"a": torch.arange(6.0).view(2, 3)}
CONFIG = LARESConfig.preset("tiny", n_items=5)


def test_round_trip(tmp_path):
    checkpoint.save_state(tmp_path / "state.pt", {"step": 3, "model": WEIGHTS})
    state = checkpoint.load_state(tmp_path / "state.pt")
    assert state["step"] == 3
    assert torch.equal(state["model"]["a"], WEIGHTS["a"])
    _weights.save_weights(tmp_path / "model.safetensors", WEIGHTS, CONFIG)
    weights, config = _weights.load_weights(tmp_path / "model.safetensors")
    assert torch.equal(weights["a"], WEIGHTS["a"])
    assert config == CONFIG
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors", "state.pt"], "no temporary file is left"


def test_weights_that_are_read_again_and_again_leave_no_objects(tmp_path):
    path = tmp_path / "model.safetensors"
    _weights.save_weights(path, {f"w{i}": torch.zeros(300 + i, 64) for i in range(20)}, CONFIG)

    def blocks():
        gc.collect()
        return sys.getallocatedblocks()

    _weights.load_weights(path)
    before = blocks()
    for _ in range(100):
        _weights.load_weights(path)
    # safe_open of safetensors 0.8 would leave about 4,000.
    assert blocks() - before < 1000


def test_files_of_safetensors_are_read(tmp_path):
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
    tensors = {f"w{i}": torch.randn(3, i).to(dtype) for i, dtype in enumerate(dtypes)}
    safetensors.torch.save_file(tensors, tmp_path / "file", {"a": "b"})
    found, metadata = read_tensors(tmp_path / "file")
    assert metadata == read_metadata(tmp_path / "file") == {"a": "b"}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in tensors.items())


_ENTRY = {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "header",
    [
        [],
        {"a": []},
        {"a": {}},
        {"a": {**_ENTRY, "dtype": "U8"}},
        {"a": {**_ENTRY, "dtype": []}},
        {"a": {**_ENTRY, "shape": 2}},
        {"a": {**_ENTRY, "shape": [True, 2]}},
        {"a": {**_ENTRY, "shape": [-1, -2]}},
        {"a": {**_ENTRY, "shape": [10**30, 0]}},
        {"a": {**_ENTRY, "shape": [2.0, 1]}},
        {"a": {**_ENTRY, "data_offsets": [0, 8, 8]}},
        {"a": {**_ENTRY, "data_offsets": [8, 0]}},
        {"a": {**_ENTRY, "data_offsets": [0, 4]}},
        {"a": _ENTRY, "b": _ENTRY},
        {"a": {**_ENTRY, "shape": [1, 1], "data_offsets": [0, 4]}},
        {"a": {**_ENTRY, "shape": [2, 2], "data_offsets": [0, 16]}},
        {"a": _ENTRY, "__metadata__": {"lares_fast-1": 1}},
        {"a": _ENTRY, "__metadata__": None},
    ],
)
def test_a_header_that_does_not_fit_the_file_is_refused(header, tmp_path):
    text = json.dumps(header).encode()
    (tmp_path / "file").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(InputError, match="is not a readable safetensors file"):
        _weights.load_weights(tmp_path / "file")


@pytest.mark.parametrize("call", ["_open_zipfile_writer_buffer.__exit__", "_open_zipfile_writer_buffer.__init__", "_save"])
def test_an_interruption_while_a_state_is_written_does_not_end_the_process(call, tmp_path):
    """PyTorch's writer writes once more when it is deleted. An error there ends the process."""
    code = f"""
import sys, torch
from pathlib import Path
from lares_fast.train.checkpoint import save_state

def trace(frame, event, argument):
    if event == "call" and frame.f_code.co_qualname == {call!r}:
        sys.settrace(None)
        raise KeyboardInterrupt

sys.settrace(trace)
try:
    save_state(Path({str(tmp_path / "state.pt")!r}), {{"x": torch.zeros(100)}})
except KeyboardInterrupt:
    print("interrupted")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, list(tmp_path.iterdir())) == (0, "interrupted\n", []), done.stderr


@pytest.mark.parametrize("load", [checkpoint.load_state, _weights.load_weights])
@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04" + bytes(64), bytes(200)])
def test_foreign_files(load, content, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(InputError, match="is truncated"):
        load(path)
    with pytest.raises(InputError, match="does not exist"):
        load(tmp_path / "missing")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_truncated_files(share, tmp_path):
    checkpoint.save_state(tmp_path / "state", {"model": {"a": torch.zeros(1000)}})
    _weights.save_weights(tmp_path / "weights", {"a": torch.zeros(1000)}, CONFIG)
    for name, load in (("state", checkpoint.load_state), ("weights", _weights.load_weights)):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: int(len(content) * share)])
        with pytest.raises(InputError, match="is truncated"):
            load(tmp_path / name)


def test_files_of_other_programs(tmp_path):
    torch.save({"state_dict": WEIGHTS}, tmp_path / "state.pt")
    with pytest.raises(InputError, match="is not a state of this version"):
        checkpoint.load_state(tmp_path / "state.pt")
    from safetensors.torch import save_file

    save_file(WEIGHTS, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="was not written by lares_fast"):
        _weights.load_weights(tmp_path / "model.safetensors")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_no_code_is_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    for write in (lambda path: torch.save({"format": Evil()}, path), lambda path: path.write_bytes(pickle.dumps(Evil()))):
        write(tmp_path / "state.pt")
        with pytest.raises(InputError):
            checkpoint.load_state(tmp_path / "state.pt")
        assert not (tmp_path / "owned").exists()


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "state.pt"
    checkpoint.save_state(path, {"step": 1})

    class FullDisk:
        def __init__(self, file):
            self.file, self.left = file, 100

        def write(self, data):
            self.left -= len(data)
            if self.left < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(data)

        def flush(self):
            self.file.flush()

    with pytest.raises(InputError, match=r"state\.pt could not be written .*the previous file is intact"):
        checkpoint.atomic_write(path, lambda file: torch.save({"step": 2, "x": torch.zeros(999)}, FullDisk(file)))
    assert checkpoint.load_state(path)["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"]
