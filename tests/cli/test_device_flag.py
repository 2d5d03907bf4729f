"""``--device`` of ``eval`` and ``recommend``, and the device that ``doctor`` shows."""

import json

import pytest
import torch

from lares_fast import LARES, _device
from lares_fast.cli import doctor, evaluation, recommending
from lares_fast.cli.console import device_text
from tests.support.command_line import refused

CPU = torch.device("cpu")


@pytest.mark.parametrize("command", [("eval",), ("recommend", "--history", "i1,i2")], ids=lambda words: words[0])
def test_a_device_is_chosen_before_the_work(cli, trained, command, monkeypatch):
    monkeypatch.setattr(_device, "_no_gpu", lambda: "no GPU is visible to PyTorch: check nvidia-smi and CUDA_VISIBLE_DEVICES")
    call = (command[0], "--run", trained, *command[1:])
    chosen, left = cli(*call, "--device", "cpu"), cli(*call)
    assert chosen.code == left.code == 0
    assert chosen.out == left.out and "device   " not in chosen.out + chosen.err
    assert refused(cli(*call, "--device", "cuda"), "the device 'cuda' cannot be used, because no GPU is visible to PyTorch")
    assert refused(cli(*call, "--device", "gpu:1"), "did you mean 'cuda:1'?")


@pytest.mark.parametrize(("command", "module"), [("eval", evaluation), ("recommend", recommending)])
def test_a_gpu_that_cannot_be_used_is_shown(cli, trained, command, module, monkeypatch):
    monkeypatch.setattr(module, "choose", lambda name: _device.Choice(CPU, "cuda:0 cannot be used, because it is old", True))
    result = cli(command, "--run", trained, *(("--history", "i1") if command == "recommend" else ()))
    assert result.code == 0
    assert "device   cpu, because cuda:0 cannot be used, because it is old" in result.out + result.err


def test_only_a_machine_with_a_gpu_gets_a_line_about_it():
    assert device_text(_device.Choice(CPU, "no GPU is visible")) is None
    gpu = _device.Choice(torch.device("cuda", 1), "the kernels passed their self-test on GPU 1")
    assert device_text(gpu) == "device   cuda:1, because the kernels passed their self-test on GPU 1"


def test_doctor_shows_the_device_of_auto(cli, monkeypatch):
    monkeypatch.setattr(doctor, "choose", lambda name: _device.Choice(CPU, f"{name} found nothing"))
    line = "auto takes cpu, because auto found nothing"
    assert f"device       {line}" in cli("doctor").out.splitlines()
    assert json.loads(cli("doctor", "--json").out)["device"] == line


def test_doctor_works_on_a_gpu_that_another_process_holds(cli, monkeypatch):
    def busy(*_, device="cpu", **__):
        if torch.device(device or "cpu").type == "cuda":
            raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "GPU 0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch, "empty", lambda *shape, empty=torch.empty, **how: busy(**how) or empty(*shape, **how))
    result = cli("doctor")
    assert result.code == 0, result.err
    assert "auto takes cpu, because cuda:0 cannot be used, because another process holds the GPU for itself" in result.out
    assert "topk, fp32 on cpu" in result.out and "topk, fp32 on cuda" not in result.out


def test_too_little_memory_names_the_flag_of_the_command(cli, trained, monkeypatch):
    def full(*_, **__):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(LARES, "encode", full)
    result = cli("recommend", "--run", trained, "--history", "i1", "--evaluation.batch_size", "64")
    assert refused(result, "not enough for batch_size 64: try batch_size 32 (--set evaluation.batch_size=32).")
    result = cli("eval", "--run", trained, "--set", "evaluation.batch_size=50")
    assert refused(result, "not enough for batch_size 50: try batch_size 25 (--set evaluation.batch_size=25).")
