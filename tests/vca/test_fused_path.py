"""How the kernels for a CPU come to be used without anybody asking: built aside, cached, tried, taken up, or not."""

import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

from tests.helpers.kernels import needs_compiler
from tests.helpers.layers import calls, make, relative_error
from vca import fused
from vca.kernels import build, cpu, ops

ROOT = Path(__file__).parents[2]
PATIENCE = 600  # seconds for a compiler on a busy machine
PARTS = ("stage1", "stage1_backward", "stage2", "stage2_backward", "join", "join_backward", "attend", "attend_backward")
LAYER = dict(dim=32, heads=2, grid_size=(4, 4), token_grid=(2, 2))
RUN_A_LAYER = """
import torch, vca
from torch.utils.flop_counter import FlopCounterMode
layer = vca.VisualContrastAttention(32, 2, grid_size=(4, 4), token_grid=(2, 2)).requires_grad_(False)
x = torch.randn(1, 16, 32)
with FlopCounterMode(display=False) as counter:
    y = layer(x)
print(any("vca" in str(name) for name in counter.get_flop_counts()["Global"]))
print((y - layer.double()(x.double())).norm().item() < 1e-5 * y.norm().item())
print(vca.fused.status())
"""
# A module of nothing, which compiles in a second.
SMALL = """
#include <Python.h>
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "NAME", nullptr, -1, nullptr};
PyMODINIT_FUNC PyInit_NAME() { return PyModule_Create(&definition); }
""".replace("NAME", build.NAME)


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code]
    environment = os.environ | dict(VCA_FUSED="") | environment
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A function that gives new `CpuKernels` of a small source, or of one with an error, in a cache of their own."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cpu, "agrees", lambda module: True)

    def new(source: str = SMALL) -> cpu.CpuKernels:
        file = tmp_path / "small.cpp"
        file.write_text(source)
        return cpu.CpuKernels(file)

    return new


@pytest.fixture
def held(tmp_path, monkeypatch):
    """A compiler that does nothing until it is ended; the file into which it has written its process' number."""
    note, script = tmp_path / "pid", tmp_path / "compiler"
    script.write_text(f"#!/bin/sh\necho $$ > {note}.new && mv {note}.new {note}\nexec sleep {PATIENCE}\n")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    yield note
    script.write_text("#!/bin/sh\nexit 1\n")  # PyTorch calls it several times, whatever became of the last call
    if note.exists():
        os.kill(int(note.read_text()), signal.SIGKILL)


def until(condition) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@needs_compiler
def test_with_a_compiler_the_kernels_are_used_and_right():
    assert cpu.kernels(), "compiled once a machine"
    done = python(RUN_A_LAYER)
    assert done.stdout == f"True\nTrue\nfused C++ kernels ({cpu.capability()})\n" and not done.stderr, done.stderr


def test_without_a_compiler_everything_works_and_says_why(tmp_path):
    done = python(RUN_A_LAYER, TORCH_EXTENSIONS_DIR=str(tmp_path), PATH="/nowhere", CXX="")
    why = "plain PyTorch, without the fused kernels: there is no C++ compiler c++"
    assert done.stdout == f"False\nTrue\n{why}\n" and not done.stderr, done.stderr


def test_one_variable_turns_them_off():
    done = python(RUN_A_LAYER, VCA_FUSED="0")
    assert done.stdout == "False\nTrue\nplain PyTorch; the fused kernels are switched off by VCA_FUSED=0\n", done.stderr


def test_neither_an_import_nor_a_question_starts_a_compiler(tmp_path):
    done = python("import vca; print(vca.fused.status())", TORCH_EXTENSIONS_DIR=str(tmp_path))
    assert done.returncode == 0 and not list(tmp_path.iterdir())


@needs_compiler
def test_a_process_ends_while_the_compiler_goes_on(held, tmp_path):
    done = python(RUN_A_LAYER, TORCH_EXTENSIONS_DIR=str(tmp_path / "cache"))
    why = "plain PyTorch, until the fused kernels are compiled in the background"
    assert done.stdout == f"False\nTrue\n{why}\n" and not done.stderr, done.stderr
    until(held.exists)
    os.kill(int(held.read_text()), 0)  # it is still there


@needs_compiler
def test_a_build_is_taken_up_when_it_is_done(small):
    kernels = small()
    assert kernels.poll() is None and kernels.building and not kernels.problem
    until(kernels.poll)
    assert not kernels.building and small().poll(), "another process finds it at once"
    assert {file.name for file in kernels.library.parent.iterdir()} == {"lock", kernels.library.name}


@needs_compiler
def test_processes_that_build_at_once_make_one_library(small):
    both = [small(), small()]
    for kernels in both:
        kernels.poll()
    assert all(kernels.wait() for kernels in both)
    assert {file.name for file in both[0].library.parent.iterdir()} == {"lock", both[0].library.name}


@needs_compiler
def test_what_a_killed_build_leaves_is_never_taken_up(small, held, monkeypatch):
    kernels = small()
    kernels.poll()
    until(held.exists)
    kernels._process.kill()
    with pytest.warns(UserWarning, match="the compiler was ended"):
        until(lambda: kernels.poll() or kernels.problem)
    assert not kernels.library.exists() and list(kernels.library.parent.glob(f"{build.SCRATCH}*"))
    monkeypatch.delenv("CXX")
    assert small().wait()
    assert {file.name for file in kernels.library.parent.iterdir()} == {"lock", kernels.library.name}


@needs_compiler
def test_a_build_that_fails_is_one_warning_and_remembered(small):
    kernels = small("#error there is a mistake\n" + SMALL)
    with pytest.warns(UserWarning, match="could not be compiled: .*there is a mistake") as warned:
        until(lambda: kernels.poll() or kernels.problem)
        kernels.poll()
    assert len(warned) == 1
    later = small(kernels.source.read_text())
    assert later.poll() is None and "there is a mistake" in later.problem and not later.building


@needs_compiler
def test_kernels_that_compute_otherwise_are_not_used(small, monkeypatch):
    assert cpu.agrees(cpu.kernels())
    assert small().wait()
    monkeypatch.setattr(cpu, "agrees", lambda module: False)
    with pytest.warns(UserWarning, match="does not compute what the plain path does"):
        assert small().wait() is None


@needs_compiler
@pytest.mark.parametrize("name", PARTS)
def test_a_wrong_result_is_seen(name):
    true = cpu.kernels()

    def wrong(*arguments):
        found = getattr(true, name)(*arguments)
        return 1.01 * found if torch.is_tensor(found) else (1.01 * found[0], *found[1:])

    parts = {part: getattr(true, part) for part in PARTS}
    assert cpu.agrees(types.SimpleNamespace(**parts))
    assert not cpu.agrees(types.SimpleNamespace(**parts | {name: wrong}))


# --- the choice ------------------------------------------------------------------------------------------------------


@pytest.fixture
def unasked(monkeypatch):
    """A function that gives a layer which decides by itself, and an input, in a process that has its kernels."""
    if not cpu.kernels():
        pytest.skip("there is no C++ compiler")
    monkeypatch.setattr(ops, "ENABLED", None)
    monkeypatch.setattr(fused, "_settled", None)
    fused._there_at_the_first_gradient.cache_clear()
    yield lambda dtype=torch.float32, **options: make(dtype, **LAYER | options)
    fused._there_at_the_first_gradient.cache_clear()


def uses_kernels(run) -> bool:
    return any("vca" in str(name) for name in calls(run))


@needs_compiler
def test_they_are_taken_forward_and_backward(unasked):
    layer, x = unasked()
    assert uses_kernels(lambda: layer(x).sum().backward())
    with torch.no_grad():
        assert uses_kernels(lambda: layer(x))
        assert relative_error(layer(x), layer.double()(x.double())) < 1e-5


@needs_compiler
def test_what_gains_nothing_or_leaves_takes_the_plain_path(unasked):
    layer, x = unasked()
    assert not uses_kernels(lambda: layer.double()(x.double()))
    assert not uses_kernels(lambda: layer.half()(x.half()))
    assert not uses_kernels(lambda: unasked(dim=24)[0](x[..., :24]))
    layer.float()
    torch.func.grad(lambda x: layer(x).sum())(x)  # for which they have no rule
    layer.requires_grad_(False)
    graphs = [torch.export.export(layer, (x,)).graph, torch.jit.trace(layer, x, check_trace=False).graph]
    assert not any("contrast_attend" in str(graph) for graph in graphs)
    products = cpu.has_bfloat16_products()
    for dtype, taken in ((torch.float32, True), (torch.bfloat16, products), (torch.float16, False)):
        seen = []

        def backend(graph, _, seen=seen):
            seen.append(str(graph.graph))
            return graph.forward

        torch.compiler.reset()
        torch.compile(layer.to(dtype), backend=backend, fullgraph=True)(x.to(dtype))
        assert ("contrast_attend" in seen[0]) == taken


@needs_compiler
@pytest.mark.parametrize("multiplies", [True, False])
def test_bfloat16_takes_them_on_a_processor_that_multiplies_it(unasked, monkeypatch, multiplies):
    layer, x = unasked(torch.bfloat16)
    monkeypatch.setattr(cpu, "has_bfloat16_products", lambda: multiplies)
    assert uses_kernels(lambda: layer(x).sum().backward()) == multiplies
    with torch.no_grad():
        assert uses_kernels(lambda: layer(x)) == multiplies


@needs_compiler
def test_a_settled_process_keeps_its_path(unasked):
    layer, x = unasked()
    assert fused.settle(False) is False and not uses_kernels(lambda: layer(x))
    assert fused.status() == "plain PyTorch, as decided at the start"
    assert fused.settle() is True and uses_kernels(lambda: layer(x))


@needs_compiler
def test_gradients_stay_on_the_path_of_the_first(unasked, monkeypatch):
    layer, x = unasked()
    there = cpu.KERNELS
    monkeypatch.setattr(cpu, "KERNELS", types.SimpleNamespace(poll=lambda: None))
    assert not uses_kernels(lambda: layer(x).sum().backward())
    monkeypatch.setattr(cpu, "KERNELS", there)
    assert not uses_kernels(lambda: layer(x).sum().backward())
    with torch.no_grad():
        assert uses_kernels(lambda: layer(x))
