"""The fused operators: their switch, and what runs `test_fused_kernels.py` in processes of their own."""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers.kernels import needs_compiler
from tests.helpers.layers import SMALL, make
from vca import functional as VF
from vca.kernels import cpu, ops

ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(not ops.HAS_TRITON, reason="Triton is not installed")


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)


@needs_triton
def test_the_kernels_in_the_interpreter():
    done = python("-m", "pytest", "-x", "tests/vca/test_fused_kernels.py", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout


@pytest.mark.long
@needs_compiler
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_the_kernels_of_older_processors(capability):
    files = ("tests/vca/test_fused_kernels.py", "tests/vca/test_fused_join.py")
    done = python("-m", "pytest", "-x", *files, ATEN_CPU_CAPABILITY=capability)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout


def test_the_environment_turns_them_on_and_nothing_else_needs_triton():
    code = (
        "import sys; sys.modules['triton'] = None; import torch, vca;"
        "layer = vca.VisualContrastAttention(8, 2, grid_size=(2, 2), token_grid=(1, 1));"
        "layer(torch.ones(1, 4, 8)); print(layer.fused_attn)"
    )
    assert python("-c", code, VCA_FUSED="1").stdout == "True\n"
    assert python("-c", code, VCA_FUSED="0").stdout == "False\n"
    assert python("-c", code, VCA_FUSED="").stdout == "None\n"


def test_without_a_compiler_a_cpu_takes_the_plain_path_and_says_why(monkeypatch, tmp_path):
    layer, x = make(torch.float32, **SMALL | dict(dim=32, heads=2))
    want = layer(x)
    layer.fused_attn = True
    monkeypatch.setenv("CXX", "/no/such/compiler")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(cpu, "KERNELS", cpu.CpuKernels())
    with pytest.warns(UserWarning, match="there is no C.. compiler .* The plain path is taken") as warned:
        assert torch.equal(layer(x), want) and torch.equal(layer(x), want)
    assert len(warned) == 1


AMPERE, ADA, TURING = ((8, 163 * 1024), (8, 99 * 1024), (7, 64 * 1024))


@needs_triton
@pytest.mark.parametrize("gpu, max_head_dim", [(AMPERE, 128), (ADA, 64), (TURING, 0)])
def test_a_gpu_takes_up_to_64_contrast_tokens_in_half_precision(monkeypatch, gpu, max_head_dim):
    properties = types.SimpleNamespace(major=gpu[0], shared_memory_per_block_optin=gpu[1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    with FakeTensorMode(), torch.device("cuda"):  # tensors without contents, which need no GPU
        for dtype in (torch.bfloat16, torch.float16):
            for d in (32, 64, 128, 129):
                assert ops.supported(torch.empty(2, 3, 10, d, dtype=dtype), 64) == (d <= max_head_dim)
            assert not ops.supported(torch.empty(2, 3, 10, 64, dtype=dtype), 65)
        assert not ops.supported(torch.empty(2, 3, 10, 64), 64)


@needs_triton
@pytest.mark.parametrize("d, shared_memory", ops.SHARED_MEMORY.items())
@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.long), 90])
def test_the_kernels_compile_for_gpus_that_are_not_here(capability, d, shared_memory):
    """What the interpreter does not see: Triton's compiler takes them, and they fit in the shared memory."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from vca.kernels import triton_kernels

    half = {"tokens", "k", "v", "q", "values", "grad", "out", "grad_k", "grad_v", "grad_q"}
    full = {"lam", "products", "norms", "part_products", "part_norms", "grad_tokens", "grad_values", "grad_lam"}
    pointers = dict.fromkeys(half, "*bf16") | dict.fromkeys(full, "*fp32") | dict(gain="fp32")
    options = triton_kernels.options(torch.empty(1, 1, 1, d))
    launch = {name: options.pop(name) for name in ("num_warps", "num_stages")}
    stages = [f"stage{stage}{part}_kernel" for stage in (1, 2) for part in ("", "_backward")]
    for name in (*stages, "stage1_merge_kernel"):
        kernel = getattr(triton_kernels, name)
        sizes = options | dict(ROWS=128 if name == "stage1_kernel" else ops.MAX_TOKENS)
        constants = {argument: sizes[argument] for argument in kernel.arg_names if argument in sizes}
        given = pointers | dict.fromkeys(constants, "constexpr")
        signature = {argument: given.get(argument, "i32") for argument in kernel.arg_names}
        made = compile(ASTSource(kernel, signature, constants), GPUTarget("cuda", capability, 32), launch)
        assert made.metadata.shared <= shared_memory, (name, made.metadata.shared)
        assert made.asm["cubin"]


def test_shapes_and_flops_without_a_kernel():
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        tokens, lam = torch.empty(6, 8, 16, dtype=torch.bfloat16, requires_grad=True), torch.empty(())
        q = torch.empty(2, 3, 10, 16, dtype=torch.bfloat16, requires_grad=True)
        v_hat = ops.contrast(tokens, q, q, lam, 0.7, VF.STAGE1)
        out = ops.contrast(tokens, q, v_hat, lam, 0.7, VF.STAGE2)
        out.sum().backward()
    assert v_hat.shape == (6, 4, 16) and out.shape == q.grad.shape == q.shape and tokens.grad.shape == tokens.shape
    assert out.transpose(1, 2).is_contiguous() and v_hat.dtype == out.dtype == torch.bfloat16
    assert counter.get_total_flops() == 2 * 3 * (2 * 6 * 12 * 10 * 16)  # two stages, forward and twice that backward
