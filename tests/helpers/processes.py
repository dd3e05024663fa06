"""Commands of the project as processes that start in a moment: forks of one that has imported what they need."""

import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import weakref

import torch

COMMANDS = ("autoencoder", "classify", "evaluate", "generate", "transfer")
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([f"training.{name}" for name in COMMANDS])


class Command:
    """A running `python -m MODULE ARGUMENTS...`, or `python -c PROGRAM ARGUMENTS...`, used as a `subprocess.Popen`."""

    def __init__(self, command: list[str]):
        self._said = [tempfile.NamedTemporaryFile("r") for _ in range(2)]  # noqa: SIM115
        said = [file.name for file in self._said]
        self._process = FORKS.Process(target=_main, args=(command[1:], said))
        self._process.start()
        weakref.finalize(self, self._process.kill)  # a test that fails leaves none behind

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self._process.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def communicate(self, timeout: float) -> tuple[str, str]:
        """What it has said on stdout and stderr, once it has ended."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("a command of this project", timeout)
        return tuple(file.read() for file in self._said)


def _main(command: list[str], said: list[str]) -> None:
    for descriptor, name in enumerate(said, start=1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND), descriptor)
    torch.set_num_threads(1)
    option, what, *rest = command
    sys.argv = [what, *rest]
    if option == "-c":
        exec(what, {"__name__": "__main__"})
    else:
        importlib.import_module(what).main()
