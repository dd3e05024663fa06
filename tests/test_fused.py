"""The fused operators: their switch here, their kernels in a process of their own (`tests/triton_interpreter.py`)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from tests.test_attention import SMALL, make
from vca import fused

ROOT = Path(__file__).parents[1]


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)


@pytest.mark.skipif(not fused.HAS_TRITON, reason="Triton is not installed")
def test_the_kernels_in_the_interpreter():
    done = python("-m", "pytest", "-x", "tests/triton_interpreter.py", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout


def test_the_environment_turns_them_on_and_triton_is_not_imported():
    code = (
        "import sys, torch, vca; sys.exit('triton' in sys.modules) if sys.argv[1:] else None;"
        "layer = vca.VisualContrastAttention(8, 2, grid_size=(2, 2), token_grid=(1, 1));"
        "layer(torch.ones(1, 4, 8)); print(layer.fused_attn)"
    )
    assert python("-c", code, VCA_FUSED="1").stdout == "True\n"
    assert python("-c", code, VCA_FUSED="0").stdout == "False\n"
    blocked = "import sys; sys.modules['triton'] = None;" + code
    assert python("-c", blocked, VCA_FUSED="1").stdout == "True\n"


def test_a_cpu_takes_the_plain_path():
    layer, x = make(torch.float32, **SMALL)
    want = layer(x)
    layer.fused_attn = True
    assert torch.equal(layer(x), want)


@pytest.mark.skipif(not fused.HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("dtype, used", [(torch.bfloat16, True), (torch.float16, True), (torch.float32, False)], ids=str)
def test_a_gpu_takes_them_in_half_precision(dtype, used):
    """On tensors without contents, which need no GPU."""
    layer, x = make(dtype, **SMALL)
    layer.fused_attn = True
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, FlopCounterMode(display=False) as counter:
        layer = layer.to("meta") if False else layer
        y = layer(mode.from_tensor(x))
    assert y.shape == x.shape
    assert (torch.ops.vca.contrast_stage2 in counter.get_flop_counts()["Global"]) == used
