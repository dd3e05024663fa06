"""The fused operators: their switch, and what runs `tests/test_fused_kernels.py` in processes of their own."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from tests.test_attention import SMALL, make
from tests.test_fused_kernels import needs_compiler
from vca import cpu_kernels, fused
from vca import functional as VF

ROOT = Path(__file__).parents[1]


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)


@pytest.mark.skipif(not fused.HAS_TRITON, reason="Triton is not installed")
def test_the_kernels_in_the_interpreter():
    done = python("-m", "pytest", "-x", "tests/test_fused_kernels.py", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout


@pytest.mark.long
@needs_compiler
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_the_kernels_of_older_processors(capability):
    done = python("-m", "pytest", "-x", "tests/test_fused_kernels.py", ATEN_CPU_CAPABILITY=capability)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout


def test_the_environment_turns_them_on_and_nothing_else_needs_triton():
    code = (
        "import sys; sys.modules['triton'] = None; import torch, vca;"
        "layer = vca.VisualContrastAttention(8, 2, grid_size=(2, 2), token_grid=(1, 1));"
        "layer(torch.ones(1, 4, 8)); print(layer.fused_attn)"
    )
    assert python("-c", code, VCA_FUSED="1").stdout == "True\n"
    assert python("-c", code, VCA_FUSED="0").stdout == "False\n"


def test_without_a_compiler_a_cpu_takes_the_plain_path_and_says_why(monkeypatch, tmp_path):
    layer, x = make(torch.float32, **SMALL | dict(dim=32, heads=2))
    want = layer(x)
    layer.fused_attn = True
    monkeypatch.setenv("CXX", "/no/such/compiler")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(cpu_kernels, "kernels", functools.cache(cpu_kernels.kernels.__wrapped__))
    with pytest.warns(UserWarning, match="could not be compiled .* the plain path is taken") as warned:
        assert torch.equal(layer(x), want) and torch.equal(layer(x), want)
    assert len(warned) == 1


@pytest.mark.skipif(not fused.HAS_TRITON, reason="Triton is not installed")
def test_a_gpu_takes_up_to_64_contrast_tokens_of_128_channels_in_half_precision():
    with FakeTensorMode(), torch.device("cuda"):  # tensors without contents, which need no GPU
        for dtype in (torch.bfloat16, torch.float16):
            assert fused.supported(torch.empty(2, 3, 10, 128, dtype=dtype), 64)
            assert not fused.supported(torch.empty(2, 3, 10, 128, dtype=dtype), 65)
            assert not fused.supported(torch.empty(2, 3, 10, 129, dtype=dtype), 64)
        assert not fused.supported(torch.empty(2, 3, 10, 128), 64)


def test_shapes_and_flops_without_a_kernel():
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        tokens, lam = torch.empty(6, 8, 16, dtype=torch.bfloat16, requires_grad=True), torch.empty(())
        q = torch.empty(2, 3, 10, 16, dtype=torch.bfloat16, requires_grad=True)
        v_hat = fused.contrast(tokens, q, q, lam, 0.7, VF.STAGE1)
        out = fused.contrast(tokens, q, v_hat, lam, 0.7, VF.STAGE2)
        out.sum().backward()
    assert v_hat.shape == (6, 4, 16) and out.shape == q.grad.shape == q.shape and tokens.grad.shape == tokens.shape
    assert out.transpose(1, 2).is_contiguous() and v_hat.dtype == out.dtype == torch.bfloat16
    assert counter.get_total_flops() == 2 * 3 * (2 * 6 * 12 * 10 * 16)  # two stages, forward and twice that backward
