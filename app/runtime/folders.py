"""Temporary folders of this process, and the removal of those that a killed one has left."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NAME = re.compile(r"vca-app-(\d+)-")


def new_folder(kind: str) -> Path:
    """A new temporary folder, named by the kind of what is put there and by this process."""
    return Path(tempfile.mkdtemp(prefix=f"vca-app-{os.getpid()}-{kind}-"))


@contextmanager
def temporary_folder(kind: str) -> Iterator[Path]:
    """As `new_folder`, and removed at the end."""
    folder = new_folder(kind)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_left() -> None:
    """Removes the temporary folders of processes that are no more."""
    for folder in Path(tempfile.gettempdir()).glob("vca-app-*"):
        owner = NAME.match(folder.name)
        if owner and folder.is_dir() and not folder.is_symlink() and not _is_alive(int(owner[1])):
            shutil.rmtree(folder, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
