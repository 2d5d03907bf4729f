"""The steps of ``lares-fast gpu-day --quick`` as tests. They need a GPU."""

import pytest
import torch

from lares_fast.verify.gpu_plan import plan
from lares_fast.verify.process import run_check

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")]
STEPS = plan(rehearse=False, quick=True)


@pytest.mark.parametrize("name", STEPS)
def test_step(name):
    step = STEPS[name]
    if step.skip:
        pytest.skip(step.skip)
    environ = {"TRITON_INTERPRET": "0", **step.environ}
    result = run_check(step.check, seconds=600, environ=environ, under=step.under, **step.arguments)
    assert result["status"] in ("passed", "skipped"), result
