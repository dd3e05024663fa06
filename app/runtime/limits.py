"""One limit for all heavy work, so that many visitors together take no more memory than a few."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

AT_A_TIME = 2
_free = threading.BoundedSemaphore(AT_A_TIME)
_here = threading.local()


@contextmanager
def heavy_work() -> Iterator[None]:
    """Waits until fewer than `AT_A_TIME` threads are at heavy work, in the order that the threads happen to wake.

    A thread that is at it already goes on. Do not wait for the network or for another visitor within it: a model must
    have been loaded before.
    """
    if getattr(_here, "working", False):
        yield
        return
    with _free:
        _here.working = True
        try:
            yield
        finally:
            _here.working = False
