"""Compiles C++ kernels for `vca.kernels.cpu`, which starts this file in a process of its own:

    python -P build.py SOURCE LIBRARY FLAG...

LIBRARY appears when it is whole, or not at all, and its folder is worked in by one process at a time; the lock of one
that was killed is free, and what it left is removed by the next. Why a source cannot be compiled is written beside it.
"""

import os
import shutil
import signal
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

NAME = "vca_cpu_kernels"  # the module's; a library must be loaded by the name that it was compiled with
SCRATCH = ".build-"
LIMIT = 1800  # seconds after which a compiler that hangs is ended


def note_of(library: Path) -> Path:
    """The file that says why a library could not be compiled."""
    return library.with_suffix(".failed")


def build(source: Path, library: Path, flags: list[str]) -> None:
    """Compiles `source` into `library`, unless another process has.

    Raises:
        ImportError, OSError, RuntimeError: it cannot be compiled or loaded.
    """
    from filelock import FileLock

    with FileLock(library.parent / "lock"):
        if library.exists():
            return
        for left in library.parent.glob(f"{SCRATCH}*"):
            shutil.rmtree(left, ignore_errors=True)
        from torch.utils.cpp_extension import load

        with TemporaryDirectory(prefix=SCRATCH, dir=library.parent) as scratch:
            linked = [flag for flag in flags if flag == "-fopenmp"]
            module = load(NAME, [str(source)], extra_cflags=flags, extra_ldflags=linked, build_directory=scratch)
            os.replace(module.__file__, library)
        note_of(library).unlink(missing_ok=True)


def reason_of(error: Exception) -> str:
    """The line of a compiler's output that says what is wrong."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return next((line for line in lines if "error:" in line), lines[0]).strip()


def main(source: str, library: str, *flags: str) -> None:
    os.nice(10)
    signal.signal(signal.SIGALRM, lambda *_: os.killpg(0, signal.SIGKILL))  # the compiler, too
    signal.alarm(LIMIT)
    try:
        build(Path(source), Path(library), list(flags))
    except (ImportError, OSError, RuntimeError) as error:
        unfinished = Path(library).with_suffix(f".{os.getpid()}.tmp")
        unfinished.write_text(reason_of(error), encoding="utf-8")
        os.replace(unfinished, note_of(Path(library)))
        sys.exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
