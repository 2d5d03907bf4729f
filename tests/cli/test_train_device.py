"""``--device`` and ``--precision`` of ``train``."""

import pytest

from lares_fast import _device
from lares_fast.train import config_file
from tests.support.command_line import refused


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--device", "gpu:1"), ("device must be auto, cpu, cuda or cuda:N", "did you mean 'cuda:1'?")),
        (("--set", "device=tpu"), ("device must be auto, cpu, cuda or cuda:N, but got 'tpu'",)),
        (("--device", "cuda"), ("the device 'cuda' cannot be used, because no GPU is visible",)),
        (("--device", "cpu", "--precision", "bf16"), ("precision bf16 needs a GPU", "--set precision=fp32")),
        (("--set", "precision=fp16"), ("--set precision=fp16: precision must be one of fp32, bf16, but got 'fp16'",)),
    ],
)
def test_a_device_that_cannot_be_used_is_one_sentence_and_no_file(cli, tmp_path, monkeypatch, words, expected):
    monkeypatch.setattr(_device, "_no_gpu", lambda: "no GPU is visible to PyTorch: check nvidia-smi and CUDA_VISIBLE_DEVICES")
    out = tmp_path / "run"
    assert refused(cli("train", "--config", "tiny", "--out", out, *words), *expected)
    assert not out.exists()


def test_flags_win_over_the_file(cli, tmp_path):
    (tmp_path / "mine.yaml").write_text("device: cuda\nprecision: bf16\n")
    call = ("train", "--config", tmp_path / "mine.yaml", "--print-config")
    for flags, device, precision in (
        ((), "cuda", "bf16"), (("--device", "cpu"), "cpu", "bf16"), (("--precision", "fp32"), "cuda", "fp32"),
        (("--set", "device=cuda:1"), "cuda:1", "bf16"),
    ):  # fmt: skip
        printed = cli(*call, *flags).out
        assert f"device: {device}\n" in printed and f"precision: {precision}\n" in printed
    assert {"device", "precision"} <= set(config_file.known_keys())
