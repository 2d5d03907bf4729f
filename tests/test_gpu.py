"""What a GPU alone can tell: the steps of ``lares-fast gpu-day``, small."""

import pytest
import torch

from lares_fast.cli.gpu_steps import STEPS
from lares_fast.cli.steps import run_step

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")]


@pytest.mark.parametrize("name", STEPS)
def test_step(name):
    result = run_step(name, seconds=600, environ={"TRITON_INTERPRET": "0"}, rehearse=False, quick=True)
    assert result["status"] in ("passed", "skipped"), result
