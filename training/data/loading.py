"""Worker processes that read images, and end with the process that started them."""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import weakref
from collections.abc import Iterator
from functools import partial

from torch.utils.data import DataLoader, Dataset

from training.data.errors import DataError

PR_SET_PDEATHSIG = 1


class _Loader(DataLoader):
    """PyTorch's loader, whose workers are killed at exit: multiprocessing would terminate them, which they ignore."""

    def __iter__(self):
        batches = super().__iter__()
        weakref.finalize(batches, _kill, getattr(batches, "_workers", ()))
        return batches


def _kill(workers: list) -> None:
    left = set(workers).intersection(multiprocessing.active_children())
    if left and threading.current_thread() is threading.main_thread():
        handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's raises an error for each that is killed
        for worker in left:
            worker.kill()
        for worker in left:
            worker.join()
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)


def open_loader(dataset: Dataset, *args, num_workers: int = 0, **options) -> DataLoader:
    """PyTorch's loader, with workers that are forked and die with this process, even if that is killed.

    PyTorch's own watch compares the parent's id with the one that a worker reads when it starts, which is too late in
    a worker that is forked just before its parent is killed.
    """
    if num_workers:
        options |= dict(worker_init_fn=partial(_bind, os.getpid()))
        if sys.platform == "linux":  # from Python 3.14 on not the default
            options |= dict(multiprocessing_context="fork")
    return _Loader(dataset, *args, num_workers=num_workers, **options)


def _bind(parent: int, _: int) -> None:
    """In a worker: the kernel kills it when its parent ends; if that has happened already, it ends here."""
    for number in (signal.SIGINT, signal.SIGTERM):  # may reach the whole group, but the parent decides when to stop
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def read_batches(loader: DataLoader) -> Iterator[tuple]:
    """The batches of a loader. A worker process wraps its error in a traceback; here it is what it was.

    Raises:
        DataError: an image cannot be read, or a worker was killed.
    """
    try:
        yield from loader
    except DataError as error:
        raise DataError(str(error).rpartition("DataError: ")[2].strip()) from None
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise DataError(
            "a worker process that reads images was killed, as a machine does when its memory or /dev/shm is full; "
            f"give fewer --workers ({str(error).splitlines()[0]})"
        ) from None
