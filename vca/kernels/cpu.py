"""The kernels of cpu.cpp: compiled once a machine, by a process of their own, and taken up when they are there."""

import hashlib
import importlib.machinery
import importlib.util
import math
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from types import ModuleType

import torch

from vca import functional as VF
from vca.kernels import build

SOURCE = Path(__file__).with_suffix(".cpp")
VECTORS = {"AVX2": ["-mavx2", "-mfma"], "AVX512": ["-mavx512f", "-mavx512vl", "-mfma"]}
PATIENCE = 24 * 3600  # seconds before what could not be compiled is tried again
TOLERANCE = 1e-4
HALF_TOLERANCE = 5e-2  # of the norm, in bfloat16


def capability() -> str:
    """The vector instructions that PyTorch uses on this processor, such as AVX512."""
    return torch.backends.cpu.get_cpu_capability()


@torch.compiler.assume_constant_result
def has_bfloat16_products() -> bool:
    """Whether this processor multiplies numbers in bfloat16, and the kernels use that."""
    return capability() == "AVX512" and torch.cpu._is_avx512_bf16_supported()


def cache_folder() -> Path:
    """Where compiled kernels are kept: in TORCH_EXTENSIONS_DIR, XDG_CACHE_HOME or ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or home).expanduser() / "vca"


class CpuKernels:
    """The kernels of a C++ source, from their compilation to their use. Threads may share it.

    Attributes:
        module: with the functions at the end of cpu.cpp, which `vca.kernels.ops` describes; None so far.
        problem: why this process does without; "" as long as nothing speaks against them.
    """

    def __init__(self, source: Path = SOURCE):
        self.source = source
        self.module: ModuleType | None = None
        self.problem = ""
        self._process: subprocess.Popen | None = None
        self._waited = False
        self._lock = threading.Lock()

    @cached_property
    def flags(self) -> list[str]:
        multiplies_bfloat16 = ["-mavx512bf16"] if has_bfloat16_products() else []
        threads = ["-fopenmp"] if sys.platform == "linux" else []
        return ["-O3", *VECTORS.get(capability(), []), *multiplies_bfloat16, *threads]

    @cached_property
    def library(self) -> Path:
        """The compiled file, by what it depends on: source, flags, processor, PyTorch and Python."""
        made_of = hashlib.sha256(self.source.read_bytes() + " ".join(self.flags).encode()).hexdigest()[:12]
        processor = capability().lower().replace(" ", "_")
        name = f"{processor}-torch{torch.__version__}-{made_of}{sysconfig.get_config_var('EXT_SUFFIX')}"
        return cache_folder() / name

    @property
    def building(self) -> bool:
        undecided = self.module is None and not self.problem
        return undecided and self._process is not None and self._process.returncode is None

    def poll(self) -> ModuleType | None:
        """The module if it is there. Never waits: the first call starts the compiler, a later one takes up the result.

        A build outlives this process. One that fails is a warning, and its reason is remembered for a day.
        """
        if self.module or self.problem or not self._lock.acquire(blocking=False):
            return self.module
        try:
            if self.library.exists():
                self._take_up()
            elif self._process is None:
                self.problem = self.hindrance() or self._start()
            elif self._process.poll() is not None:
                self._give_up(self._failure())
        finally:
            self._lock.release()
        return self.module

    def wait(self) -> ModuleType | None:
        """The module, compiled first if need be; or None, after a warning that says why."""
        with self._lock:
            if self.module or self._waited:
                return self.module
            self._waited = True
            if not self.library.exists() and self._process is None and (problem := self._obstacle() or self._start()):
                self._give_up(problem)
                return None
            if self._process:
                self._process.wait()
            if self.library.exists():
                self._take_up()
            else:
                self._give_up(self._failure())
        return self.module

    def forget_process(self) -> None:
        """In a forked process, which has neither the parent's children nor its threads."""
        self._process, self._lock = None, threading.Lock()

    def hindrance(self) -> str:
        """Why they are not compiled; "" if they can be."""
        return self._obstacle() or self._remembered()

    def _obstacle(self) -> str:
        """What is missing to compile them; "" if nothing is."""
        compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]
        if sys.platform == "win32":
            return "there are none for Windows"
        if getattr(sys, "frozen", False) or not sys.executable:
            return "this program holds a Python that compiles nothing"
        if not shutil.which(compiler[0]):
            return f"there is no C++ compiler {compiler[0]}"
        if not shutil.which("ninja", path=_search_path()):
            return "there is no ninja (pip install ninja)"
        return ""

    def _remembered(self) -> str:
        """Why they could not be compiled lately; "" if that was long ago."""
        note = build.note_of(self.library)
        try:
            if time.time() - note.stat().st_mtime < PATIENCE:
                return f"they could not be compiled: {_reason(note)} (tried again after a day, or without {note})"
        except OSError:
            pass
        return ""

    def _start(self) -> str:
        """Starts the compiler; returns what went wrong, or ""."""
        command = [sys.executable, "-P", build.__file__, str(self.source), str(self.library), *self.flags]
        null = subprocess.DEVNULL
        try:
            self.library.parent.mkdir(parents=True, exist_ok=True)
            build.note_of(self.library).unlink(missing_ok=True)
            environment = os.environ | dict(PATH=_search_path())
            self._process = subprocess.Popen(
                command, env=environment, start_new_session=True, stdin=null, stdout=null, stderr=null
            )
        except OSError as error:
            return f"they cannot be compiled: {error}"
        return ""

    def _failure(self) -> str:
        return f"they could not be compiled: {_reason(build.note_of(self.library))}"

    def _give_up(self, problem: str) -> None:
        if problem != self.problem:
            text = f"The fused attention kernels for this CPU are not used: {problem}. The plain path is taken."
            warnings.warn(text, stacklevel=2)
        self.problem = problem

    def _take_up(self) -> None:
        """Loads the library and tries it; in a thread of its own, which knows none of the caller's modes."""
        try:
            loader = importlib.machinery.ExtensionFileLoader(build.NAME, str(self.library))
            spec = importlib.machinery.ModuleSpec(build.NAME, loader, origin=str(self.library))
            module = importlib.util.module_from_spec(spec)
            loader.exec_module(module)
            with ThreadPoolExecutor(1) as alone:
                agree = alone.submit(agrees, module).result()
        except (ImportError, OSError, RuntimeError) as error:
            self._give_up(f"{self.library} cannot be loaded ({build.reason_of(error)}); delete it to compile it anew")
            return
        if not agree:
            self._give_up(f"{self.library} does not compute what the plain path does")
            return
        self.module, self.problem = module, ""


def _search_path() -> str:
    """PATH, and the ninja of a virtual environment that may not be activated."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def _reason(note: Path) -> str:
    try:
        return note.read_text(encoding="utf-8")
    except OSError:
        return "the compiler was ended"


def agrees(module: ModuleType) -> bool:
    """Whether everything in it, gradients too, is that of `vca.functional` in float64, on one example."""
    batch, heads, grid, token_grid, prefix, d, init = 1, 2, (9, 9), (2, 3), 2, 32, 0.3
    n, length, dim, gain = math.prod(token_grid), prefix + math.prod(grid), heads * d, 1 - init
    random = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float32)

    tokens, lam = d**-0.5 * randn(heads, 2 * n, d), torch.tensor(0.6, dtype=torch.float32)
    qkv = randn(batch, length, 3 * dim)
    q, k, v = qkv.view(batch, length, 3, heads, d).transpose(1, 3).unbind(2)
    values, gathered, gains = randn(heads, n, d), randn(batch, heads, length, d), [randn(d), randn(d)]
    weight, bias = randn(dim, 1, 3, 3), randn(dim)
    parameters = randn(n, dim), randn(n, dim), *0.1 * randn(8, d), *gains, weight, bias

    def is_that(function: Callable, inputs: tuple[torch.Tensor, ...], forward: Callable, backward: Callable) -> bool:
        exact = [tensor.double().requires_grad_() for tensor in inputs]
        wanted = function(*exact)
        grad = randn(*wanted.shape)
        found = [forward(*inputs), *backward(grad, *inputs)]
        wanted = [wanted, *torch.autograd.grad(wanted, exact, grad.double())]
        return all(map(_is_near if inputs[0].dtype == torch.bfloat16 else _is_close, found, wanted))

    def in_stage(axes: tuple[int, ...]) -> Callable:
        def function(*tensors: torch.Tensor) -> torch.Tensor:
            flat = (tensor.flatten(0, 1) if tensor.ndim == 4 else tensor for tensor in tensors)
            out = VF.contrast(*flat, gain, axes)
            return out if axes == VF.STAGE1 else out.unflatten(0, (batch, heads))

        return function

    def stage1_backward(grad: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return module.stage1_backward(grad, *inputs, gain, *module.stage1(*inputs, gain)[1:])

    geometry = grid, token_grid, prefix, init

    def attend_backward(grad: torch.Tensor, qkv: torch.Tensor, *parameters: torch.Tensor) -> list[torch.Tensor]:
        return module.attend_backward(
            grad, qkv, parameters, *geometry, *module.attend(qkv, parameters, *geometry, True)[1:]
        )

    return (
        is_that(in_stage(VF.STAGE1), (tokens, k, v, lam), lambda *x: module.stage1(*x, gain)[0], stage1_backward)
        and is_that(
            in_stage(VF.STAGE2), (tokens, q, values, lam),
            lambda *x: module.stage2(*x, gain), lambda *x: module.stage2_backward(*x, gain),
        )
        and is_that(
            lambda a, b, c, w, e: VF.join(a, b, c, w, e, grid, prefix), (gathered, v, gains[1], weight, bias),
            lambda *x: module.join(*x, grid[0], grid[1], prefix),
            lambda *x: module.join_backward(*x, grid[0], grid[1], prefix),
        )
        and all(
            is_that(
                lambda x, *y: VF.attend(x, y, *geometry), (whole, *parameters),
                lambda x, *y, saves=saves: module.attend(x, y, *geometry, saves)[0], attend_backward,
            )
            for whole in (qkv, qkv.bfloat16()) for saves in (False, True)
        )
    )  # fmt: skip


def _is_close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return torch.allclose(found.double(), wanted, rtol=TOLERANCE, atol=TOLERANCE)


def _is_near(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return bool((found.double() - wanted).norm() <= HALF_TOLERANCE * wanted.norm())


KERNELS = CpuKernels()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: KERNELS.forget_process())


def kernels() -> ModuleType | None:
    """The module of `CpuKernels.wait`: compiled if need be, which takes a minute; or None, and a warning says why."""
    return KERNELS.module or KERNELS.wait()
