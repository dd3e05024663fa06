"""Runs of the classification command."""

import contextlib
import gc
import io
import json
import os
import signal
import subprocess
import sys
import time
from unittest import mock

import numpy as np
import torch
from PIL import Image

import vca
from tests.helpers.processes import Command
from training import classify
from training.core.classifier_recipe import ClassifierRecipe
from training.core.run import RunFolder
from training.core.trainer import Trainer

CLASSES = ("bird", "cat", "dog")


PATIENCE = 600  # seconds until a process counts as hung; a machine that does other work is slow


SHORT = ["--epochs", "3", "--batch-size", "16", "--save-every", "3", "--compile", "false", "--precision", "fp32",
         "--drop-path", "0.1", "--mixup", "0.8", "--cutmix", "1.0", "--device", "cpu"]  # fmt: skip


def write_images(root, split, per_class, seed, size=32):
    rng = np.random.default_rng(seed)
    for shade, name in enumerate(CLASSES):
        folder = root / split / name
        folder.mkdir(parents=True)
        for i in range(per_class):
            pixels = rng.integers(0, 120, (size, size, 3)) + np.array([60 * shade, 0, 120 - 60 * shade])
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i:03d}.png")


def command(data, out, *extra, module="training.classify", recipe="cifar10_vca"):
    return [sys.executable, "-m", module, recipe, "--data", str(data), "--out", str(out), *SHORT, *extra]


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1"}


def run(arguments) -> subprocess.CompletedProcess:
    process = Command(arguments)
    said = process.communicate(PATIENCE)
    return subprocess.CompletedProcess(arguments, process.returncode, *said)


def finish(data, out, *extra):
    result = run(command(data, out, *extra))
    assert result.returncode == 0, result.stderr
    return result


def run_here(data, out, *extra, ends_with=0) -> str:
    """As `finish`, inside this process, which is faster; returns what it says on stderr."""
    return run_main(command(data, out, *extra)[2:], ends_with)


def run_main(arguments: list[str], ends_with=0) -> str:
    """The classification command of these arguments, in this process; returns what it says on stderr."""
    said, handlers = io.StringIO(), {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with mock.patch.object(sys, "argv", arguments), contextlib.redirect_stderr(said):
        try:
            classify.main()
            code = 0
        except SystemExit as end:
            code = end.code
            if isinstance(code, str):
                print(code, file=said)
                code = 1
    for number, handler in handlers.items():  # the run, and with it the lock, hangs on them
        signal.signal(number, handler)
    gc.collect()
    assert code == ends_with, said.getvalue()
    return said.getvalue()


def start_and_signal(data, out, extra, signum, delay):
    """As `start_and_signal_command`, for the classification command."""
    return start_and_signal_command(command(data, out, *extra), out, signum, delay)


def start_and_signal_command(args, out, signum, delay):
    """Starts a run, waits for its first saved state and `delay` seconds, then sends the signal."""
    process = Command(args)
    deadline = time.monotonic() + PATIENCE
    while not list(out.glob("state-*.pt")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(delay)
    process.send_signal(signum)
    _, said = process.communicate(PATIENCE)
    return process.returncode, said


def untimed_log(path):
    """The log without its timings."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("seconds")} for line in lines]


def trainer(tmp_path, **options):
    model = vca.create_model("vca_vit_pico_patch4_32", num_classes=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recipe = ClassifierRecipe(
        "vca_vit_pico_patch4_32", 1, 8, 0.1, **(dict(precision="fp32", ema_decay=0.0, save_every=100) | options)
    )
    folder = RunFolder(tmp_path, recipe)

    class Constant:
        def step_update(self, step):
            pass

    return Trainer(folder, model, cross_entropy, optimizer, Constant(), recipe, device=torch.device("cpu"))


def cross_entropy(model, x, y):
    return torch.nn.functional.cross_entropy(model(x), y)
