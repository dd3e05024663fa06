"""Kills, full disks and second processes: nothing saved is lost, and a run ends with the bytes it would have had."""

import json
import random
import signal
import subprocess
import time

import pytest
import torch

from tests.helpers.disk import full_at
from tests.helpers.processes import Command
from tests.helpers.runs import PATIENCE, command, environment, finish, run, trainer, untimed_log, write_images
from training.core.run import RunError

MEMORY = ("--epochs", "2")
KILLS = 34  # of each of six kinds of run: 204


def assert_same_run(whole, other) -> None:
    """The same checkpoint, byte for byte but for the name of the folder in the command, and the same log."""
    for name in ("model.safetensors", "config.json"):
        expected, found = ((run / "checkpoint" / name).read_bytes() for run in (whole, other))
        assert expected.replace(str(whole).encode(), str(other).encode()) == found, name
    assert untimed_log(whole / "log.jsonl") == untimed_log(other / "log.jsonl")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_images(root, "train", 50, seed=0)
    write_images(root, "val", 10, seed=1)
    return root


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """An undisturbed run."""
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    finish(data, out, *MEMORY)
    return out


def run_patched(patch: str, arguments: list[str]) -> subprocess.CompletedProcess:
    """Runs `python -m training.classify ...` with a few lines of Python in front."""
    python, _, _, *rest = arguments
    return run([python, "-c", f"{patch}\nfrom training.classify import main\nmain()", *rest])


# The run signals itself inside the write of a file: the bytes are there, the file has not got its name yet.
SIGNALLED = """
import os
sync = os.fsync
def fsync(descriptor):
    if "{file}" in os.readlink(f"/proc/self/fd/{{descriptor}}"):
        os.kill(os.getpid(), {number})
    sync(descriptor)
os.fsync = fsync
"""

# The kernel fails every write beyond 100 kB of a file, as a full disk does, from the final checkpoint on.
FULL = """
import vca
from tests.helpers.disk import full_at
save = vca.save
def limited(*args, **kwargs):
    with full_at(100_000):
        save(*args, **kwargs)
vca.save = limited
"""


# Ctrl-C reaches the compiler as well, a process of the same group, and what it compiles fails.
INTERRUPTED = """
import os, signal
import torch.nn.functional as F
entropy, calls = F.cross_entropy, []
def interrupted(*args, **kwargs):
    calls.append(args)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGINT)
        raise RuntimeError("C++ compile error")
    return entropy(*args, **kwargs)
F.cross_entropy = interrupted
"""


@pytest.mark.parametrize(
    "file, number",
    [
        ("state-00000006", signal.SIGTERM),
        ("model.safetensors", signal.SIGTERM),
        ("state-00000018", signal.SIGKILL),
        ("config.json", signal.SIGKILL),
    ],
)
def test_a_signal_inside_the_write_of_a_checkpoint(data, whole, tmp_path, file, number):
    out = tmp_path / "disturbed"
    result = run_patched(SIGNALLED.format(file=file, number=int(number)), command(data, out, *MEMORY))
    assert result.returncode == (0 if number == signal.SIGTERM else -number), result.stderr
    complete = number == signal.SIGTERM
    assert (
        (out / f"{file}.pt").exists() if file.startswith("state") else (out / "checkpoint" / file).exists()
    ) == complete
    finish(data, out, *MEMORY)
    assert_same_run(whole, out)
    assert not list(out.rglob("*.tmp"))


def test_ctrl_c_while_a_step_is_compiled(data, whole, tmp_path):
    out = tmp_path / "disturbed"
    result = run_patched(INTERRUPTED, command(data, out, *MEMORY))
    assert result.returncode == 130 and "Traceback" not in result.stderr
    assert "stopped by Ctrl-C; state saved at step 3" in result.stderr
    finish(data, out, *MEMORY)
    assert_same_run(whole, out)


def test_a_full_disk_keeps_the_previous_state_and_says_so(tmp_path):
    t = trainer(tmp_path)
    t.checkpoint(force=True)
    saved = {path: path.read_bytes() for path in t.run.states()}
    t.step += 1
    expected = pytest.raises(RunError, match=r"cannot save .*state-00000001\.pt.*previous state is kept")
    with expected as caught, full_at(100_000):
        t.checkpoint(force=True)
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in t.run.states()} == saved
    assert not list(tmp_path.glob("*.tmp"))
    t.checkpoint(force=True)
    assert torch.load(t.run.states()[0], weights_only=True)["step"] == 1


def test_a_disk_that_is_full_at_the_final_checkpoint(data, whole, tmp_path):
    """Where the weights alone do not fit, the run ends in a line, and the same command finishes it later."""
    out = tmp_path / "disturbed"
    result = run_patched(FULL, command(data, out, *MEMORY))
    assert result.returncode == 1 and "error: " in result.stderr and "Traceback" not in result.stderr, result.stderr
    assert not list((out / "checkpoint").iterdir())
    finish(data, out, *MEMORY)
    assert_same_run(whole, out)


def start(data, out, *extra, process_of=Command):
    """A run in a process of its own, once it has saved a new state."""
    before = states(out)
    process = process_of(command(data, out, *extra))
    deadline = time.monotonic() + PATIENCE
    while states(out) <= before and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    return process


def new_python(arguments: list[str]) -> subprocess.Popen:
    return subprocess.Popen(arguments, env=environment(), stderr=subprocess.PIPE, text=True)


def states(out) -> set[str]:
    return {path.name for path in out.glob("state-*.pt")}


def test_a_second_process_in_the_folder_is_refused_and_the_first_goes_on(data, tmp_path):
    out, long = tmp_path / "run", ("--epochs", "200", "--log-every", "1")
    first = start(data, out, *long)
    second = run_patched("", command(data, out, *long))
    assert second.returncode == 1 and "in use by another run" in second.stderr and "Traceback" not in second.stderr
    assert first.poll() is None
    first.terminate()
    _, stderr = first.communicate(timeout=PATIENCE)
    assert first.returncode == 0 and "state saved at step" in stderr
    steps = [line["step"] for line in untimed_log(out / "log.jsonl") if "lr" in line]
    assert steps and steps == sorted(set(steps))


@pytest.mark.parametrize("torn", ['{"step": 9, "lo', '{"step": 9, "loss": 1.2', "\0" * 40, "{"], ids=repr)
def test_a_log_line_torn_by_a_kill_is_dropped(tmp_path, torn):
    t = trainer(tmp_path)
    t.run.log(step=0, loss=1.5)
    t.run._lock.close()
    with open(tmp_path / "log.jsonl", "a") as stream:
        stream.write(torn)
    resumed = trainer(tmp_path).run
    resumed.log(step=1, loss=1.25)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [dict(step=0, loss=1.5), dict(step=1, loss=1.25)]


@pytest.mark.long
@pytest.mark.parametrize("workers, save_every", [(0, 1), (1, 2), (3, 3)])
@pytest.mark.parametrize("memory", ["true", "false"])
def test_two_hundred_kills_change_nothing(data, tmp_path, memory, workers, save_every):
    """At random moments: as it starts, as workers are forked, in a step, and as a state is written."""
    extra = ("--memory", memory, "--workers", str(workers), "--epochs", "30", "--save-every", str(save_every))
    extra += ("--crop-scale", "0.5") if memory == "false" else ()
    killed = tmp_path / "killed"
    for kill in range(KILLS):
        if kill % 3:
            process = start(data, killed, *extra, process_of=new_python)
            time.sleep(random.uniform(0, 0.35))
        else:
            process = new_python(command(data, killed, *extra))
            time.sleep(random.uniform(0, 15))
        process.kill()
        _, stderr = process.communicate(timeout=PATIENCE)  # a worker that lived on would hold the pipe open
        assert process.returncode == -signal.SIGKILL, f"the run ended before its last kill: {stderr}"
    finish(data, killed, *extra)
    finish(data, tmp_path / "undisturbed", *extra)
    assert_same_run(tmp_path / "undisturbed", killed)
