"""Worker processes: they end with the run that started them, and hold nothing of it; errors in them are a line."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.helpers.runs import PATIENCE, environment
from training.core.classifier_recipe import ClassifierRecipe
from training.core.run import RunFolder
from training.data.errors import DataError
from training.data.loading import open_loader, read_batches

RECIPE = ClassifierRecipe("vca_vit_pico_patch4_32", 1, 8, 0.1)
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux's")


class Slow:
    def __len__(self):
        return 1000

    def __getitem__(self, index):
        time.sleep(0.02)
        return index


class Fails(Slow):
    def __init__(self, error):
        self.error = error

    def __getitem__(self, index):
        if callable(self.error):
            self.error()
        raise self.error


PROGRAM = """
import sys, time
from tests.training.test_workers import RECIPE, Slow
from training.core.run import RunFolder
from training.data.loading import open_loader
run = RunFolder(sys.argv[1], RECIPE)
batches = iter(open_loader(Slow(), 2, num_workers=3))
next(batches)
print(*(worker.pid for worker in batches._workers), flush=True)
time.sleep(600)
"""


def is_alive(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat") as stream:
            return stream.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@LINUX
def test_workers_die_with_a_run_that_is_killed(tmp_path):
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path)], env=environment(), **pipes)
    workers = [int(word) for word in process.stdout.readline().split()]
    assert len(workers) == 3 and all(map(is_alive, workers))
    process.kill()
    process.communicate(timeout=PATIENCE)  # which waits for all that hold the pipes
    deadline = time.monotonic() + PATIENCE
    while any(map(is_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(is_alive, workers))
    RunFolder(tmp_path, RECIPE)._lock.close()


@LINUX
def test_a_worker_forked_just_before_its_parent_was_killed_ends_too():
    """It is bound to the parent whose id it was given, not to the one it finds."""
    program = """
import os, time
from training.data.loading import _bind
parent = os.getpid()
if os.fork():
    os._exit(0)
while os.getppid() == parent:
    time.sleep(0.001)
_bind(parent, 0)
print("lives on", flush=True)
"""
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, timeout=PATIENCE
    )
    assert result.stdout == "" and result.returncode == 0, result.stderr


def test_a_process_that_was_forked_does_not_hold_the_lock_of_the_run(tmp_path):
    run = RunFolder(tmp_path, RECIPE)
    (started, starts), (reader, writer) = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        os.close(writer)
        os.write(starts, b".")
        os.read(reader, 1)  # until the parent closes its end
        os._exit(0)
    try:
        os.read(started, 1)
        run._lock.close()
        RunFolder(tmp_path, RECIPE)._lock.close()
    finally:
        os.close(writer)
        os.waitpid(child, 0)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_a_worker_is_what_it_was(workers):
    loader = open_loader(Fails(DataError("x.png is not a readable image (why)")), 2, num_workers=workers)
    with pytest.raises(DataError) as caught:
        list(read_batches(loader))
    assert str(caught.value) == "x.png is not a readable image (why)"


def test_a_worker_that_was_killed_is_a_line():
    loader = open_loader(Fails(lambda: os.kill(os.getpid(), signal.SIGKILL)), 2, num_workers=1)
    with pytest.raises(DataError, match=r"a worker process that reads images was killed.*fewer --workers") as caught:
        list(read_batches(loader))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_to_the_whole_group_leaves_the_workers_to_the_run(number):
    batches = iter(open_loader(range(40), 2, num_workers=2))
    first, workers = [next(batches), next(batches)], batches._workers  # one of each: both are at work
    for worker in workers:
        os.kill(worker.pid, number)
    assert [batch.tolist() for batch in (*first, *batches)] == [[i, i + 1] for i in range(0, 40, 2)]
    for worker in workers:
        worker.join(PATIENCE)
        assert worker.exitcode == 0


def test_a_program_ends_that_still_holds_its_batches():
    program = """
from tests.training.test_workers import Slow
from training.data.loading import open_loader
batches = iter(open_loader(Slow(), 2, num_workers=2))
next(batches), next(batches)
"""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], env=environment(), capture_output=True, text=True,
        timeout=PATIENCE,
    )  # fmt: skip
    assert result.returncode == 0 and result.stderr == ""
