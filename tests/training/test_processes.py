"""Two processes train as one: the same losses, and the same weights after a killed worker was restarted by torchrun."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.runs import PATIENCE, environment, finish, untimed_log, write_images
from training.core.distributed import World
from training.data.batches import FolderBatches, MemoryBatches
from training.data.images import Images, decode, generator_cfg
from training.data.latents import LatentBatches, SyntheticLatents

STEPS = 20
SETTINGS = ["--epochs=2", "--batch-size=16", "--mix-group=8", "--log-every=1", "--precision=fp32", "--drop-path=0.0",
            "--save-every=4"]  # fmt: skip
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1",
            "--monitor-interval=0.1", "--standalone"]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_images(root, "train", 55, seed=0)
    write_images(root, "val", 4, seed=1)
    return root


def torchrun(data, out, *extra):
    run = ["-m", "training.classify", "cifar10_vca", "--data", str(data), "--out", str(out), "--device=cpu"]
    common = ["--compile=false", "--mixup=0.8", "--cutmix=1.0", *SETTINGS]
    return subprocess.Popen(
        [*TORCHRUN, *run, *common, *extra], env=environment(), stderr=subprocess.PIPE, text=True, stdout=subprocess.PIPE
    )


@pytest.fixture(scope="module")
def two(data, tmp_path_factory):
    """An undisturbed run of two processes."""
    out = tmp_path_factory.mktemp("runs") / "two"
    process = torchrun(data, out)
    stdout, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, stderr
    assert stdout.count("top-1") == 1
    return out


def losses(run):
    return [line["loss"] for line in untimed_log(run / "log.jsonl") if "lr" in line]


def test_two_processes_learn_as_one_that_accumulates(data, two, tmp_path):
    finish(data, tmp_path / "one", *SETTINGS, "--micro-batch=8")
    one = losses(tmp_path / "one")
    assert len(one) == STEPS and one == pytest.approx(losses(two), abs=1e-5)
    assert max(one) - min(one) > 0.05
    weights = [load_file(run / "checkpoint" / "model.safetensors") for run in (tmp_path / "one", two)]
    assert all(torch.allclose(weights[0][key], weights[1][key], atol=1e-5) for key in weights[0])
    metrics = [[line for line in untimed_log(run / "log.jsonl") if "top1" in line] for run in (tmp_path / "one", two)]
    assert [line["top1"] for line in metrics[0]] == [line["top1"] for line in metrics[1]]
    assert json.loads((two / "environment.json").read_text())["processes"] == 2


def worker(agent: int, rank: int) -> int | None:
    """The process id of the worker of that rank."""
    for child in Path(f"/proc/{agent}/task/{agent}/children").read_text().split():
        try:
            if f"\0RANK={rank}\0" in Path(f"/proc/{child}/environ").read_text():
                return int(child)
        except OSError:
            continue
    return None


def test_a_killed_worker_is_restarted_and_changes_nothing(data, two, tmp_path):
    out = tmp_path / "killed"
    process = torchrun(data, out)
    deadline = time.monotonic() + PATIENCE
    while not list(out.glob("state-*.pt")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(worker(process.pid, 1), signal.SIGKILL)
    _, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, stderr
    assert "resumed" in stderr
    names = ("model.safetensors", "config.json")
    for whole, killed in ((run / "checkpoint" / name for run in (two, out)) for name in names):
        assert whole.read_bytes().replace(bytes(two), bytes(out)) == killed.read_bytes()
    assert untimed_log(two / "log.jsonl") == untimed_log(out / "log.jsonl")


def rows_of(size, batches):
    """What `size` processes read of an epoch, put together again."""
    shares = [list(batches(World(rank, size).rows(16)).epoch(1, 1)) for rank in range(size)]
    return [tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True)) for parts in zip(*shares, strict=True)]


@pytest.mark.parametrize("kind", ["memory", "folder", "latents"])
def test_the_data_do_not_depend_on_the_number_of_processes_and_workers(data, kind):
    images = Images(data, "train")
    pixels, labels = decode(images, generator_cfg(32))
    images.transform = lambda image: torch.rand(2)

    def batches(rows, workers=0):
        shared = dict(batch_size=16, seed=3, device="cpu", rows=rows)
        if kind == "memory":
            return MemoryBatches(pixels, labels, padding=4, cfg=generator_cfg(32), **shared)
        if kind == "latents":
            return LatentBatches(SyntheticLatents(images), **shared)
        return FolderBatches(images, workers=workers, repeats=3, groups=4, **shared)

    one = list(batches(slice(None)).epoch(1, 1))
    assert len(one) == len(images) // 16 - 1 and len(one[0][0]) == 16
    others = [rows_of(2, batches), rows_of(4, batches)]
    if kind == "folder":
        others.append(rows_of(2, lambda rows: batches(rows, workers=1)))
    for other in others:
        assert all(torch.equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.long
def test_a_generator_learns_in_two_processes_as_in_one(data, tmp_path):
    settings = ["--steps=20", "--batch-size=16", "--input-size=8", "--log-every=1", "--precision=fp32",
                "--sample-every=0", "--compile=false", "--workers=0", "--device=cpu", "--data", str(data)]  # fmt: skip
    for out, start in (("one", [sys.executable]), ("two", TORCHRUN)):
        run = ["-m", "training.generate", "cifar10_sit_vca", "--out", str(tmp_path / out), *settings]
        extra = ["--micro-batch=8"] if out == "one" else []
        result = subprocess.run(
            [*start, *run, *extra], env=environment(), capture_output=True, text=True, timeout=PATIENCE
        )
        assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), abs=1e-5)


@pytest.mark.long
def test_sigterm_to_torchrun_saves_the_same_step_in_all_processes(data, tmp_path):
    process = torchrun(data, tmp_path / "run", "--epochs=200", "--save-every=1000")
    deadline = time.monotonic() + PATIENCE
    while not list(tmp_path.glob("run/first_batch.png")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1)
    process.terminate()
    _, stderr = process.communicate(timeout=PATIENCE)
    assert "stopped by SIGTERM; state saved at step" in stderr
    assert len(list(tmp_path.glob("run/state-*.pt"))) == 1
