"""Compiles the kernels of cpu.cpp, once a machine, with the C++ compiler and ninja that are found there."""

import functools
import os
import sys
import warnings
from pathlib import Path
from types import ModuleType

import torch

SOURCE = Path(__file__).with_suffix(".cpp")
VECTORS = {"AVX2": ["-mavx2", "-mfma"], "AVX512": ["-mavx512f", "-mavx512vl", "-mfma"]}


@functools.cache
def kernels() -> ModuleType | None:
    """The module with `stage1`, `stage1_backward`, `stage2` and `stage2_backward` of `vca.kernels.ops`, or None.

    The first call on a machine compiles it, which takes about 20 seconds; later processes load the result from
    PyTorch's cache of extensions. Where that fails, one warning says why.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    openmp = ["-fopenmp"] if sys.platform == "linux" else []
    flags = ["-O3", *VECTORS.get(capability, []), *openmp]
    path = os.environ.get("PATH", "")
    try:
        from torch.utils.cpp_extension import load

        # The ninja of a virtual environment is found there though the environment may not be activated.
        os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), path])
        name = f"vca_cpu_kernels_{capability.lower().replace(' ', '_')}"
        return load(name, [str(SOURCE)], extra_cflags=flags, extra_ldflags=openmp)
    except (ImportError, OSError, RuntimeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = next((line for line in lines if "error:" in line), lines[0])
        warnings.warn(
            f"The fused attention kernels for this CPU could not be compiled ({reason}); the plain path is taken. "
            "They need a C++ compiler and ninja (pip install ninja; it is of the extra [fused] of vca).",
            stacklevel=2,
        )
        return None
    finally:
        os.environ["PATH"] = path
