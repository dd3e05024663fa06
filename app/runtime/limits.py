"""One limit for all heavy work, so that many visitors together take no more memory than a few."""

import ctypes
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

AT_A_TIME = 2
KEPT_BYTES = 256 * 2**20
_free = threading.BoundedSemaphore(AT_A_TIME)
_here = threading.local()
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


class _Heap(ctypes.Structure):
    """glibc's `struct mallinfo2`; `fordblks` are the bytes that are free."""

    _fields_ = [(f"field{index}", ctypes.c_size_t) for index in range(8)]
    _fields_ += [("fordblks", ctypes.c_size_t), ("keepcost", ctypes.c_size_t)]


if hasattr(_libc, "mallinfo2"):
    _libc.mallinfo2.restype = _Heap


def hand_back() -> None:
    """Gives freed memory back to the system, once the C library keeps more than `KEPT_BYTES` of it.

    glibc keeps what a thread has freed for what this thread may need next. Over many threads and visitors it adds up to
    gigabytes, in pieces that nobody asks for again.
    """
    if hasattr(_libc, "mallinfo2") and _libc.mallinfo2().fordblks > KEPT_BYTES:
        _libc.malloc_trim(0)


@contextmanager
def heavy_work() -> Iterator[None]:
    """Waits until fewer than `AT_A_TIME` threads are at heavy work, in the order that the threads happen to wake.

    A thread that is at it already goes on. Do not wait for the network or for another visitor within it: a model must
    have been loaded before.
    """
    if getattr(_here, "working", False):
        yield
        return
    try:
        with _free:
            _here.working = True
            yield
    finally:
        _here.working = False
        hand_back()
