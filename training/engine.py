"""What every training loop shares: the run folder, resume, precision, EMA, the optimizer step and the log.

A run is a function of its recipe: `Trainer` seeds all randomness by (seed, step), so k steps, a kill and k more steps
give the bytes of 2k steps on one machine with a fixed number of threads.
"""

import fcntl
import json
import os
import platform
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from tqdm import tqdm

from training.data import seed_everything
from vca.hub import write_atomically

KEEP_STATES = 2
MAX_SKIPPED = 10


class RunError(RuntimeError):
    """A run that cannot start or go on; the message says what to do."""


def open_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        RunError: there is no such device on this machine.
    """
    try:
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise RunError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from None


class RunFolder:
    """The folder of one run: `recipe.json`, `environment.json`, `log.jsonl`, `curve.png`, `state-*.pt`, `checkpoint/`.

    Raises:
        RunError: another process trains in this folder, or it holds a run of another recipe.
    """

    def __init__(self, path: str | Path, recipe, **identity):
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.path / ".lock", "w")  # noqa: SIM115 (held as long as the run)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(f"{self.path} is in use by another run; choose another --out or wait for it.") from None
        resolved = asdict(recipe) | identity
        recipe_file = self.path / "recipe.json"
        if recipe_file.exists():
            try:
                old = dict(json.loads(recipe_file.read_text()))
            except (ValueError, TypeError):
                raise RunError(f"{recipe_file} is damaged; choose another --out, or delete the folder.") from None
            changed = sorted(k for k in resolved.keys() | old.keys() if resolved.get(k) != old.get(k))
            if changed:
                raise RunError(
                    f"{self.path} holds a run with another {', '.join(changed)}; "
                    "give the same recipe to resume it, or another --out to start anew."
                )
        write_atomically(recipe_file, json.dumps(resolved, indent=2).encode())
        environment = dict(python=platform.python_version(), torch=torch.__version__, threads=torch.get_num_threads())
        write_atomically(self.path / "environment.json", json.dumps(environment, indent=2).encode())
        self.log_file = self.path / "log.jsonl"

    def states(self) -> list[Path]:
        """Saved states, newest first."""
        return sorted(self.path.glob("state-*.pt"), reverse=True)

    def log(self, **line) -> None:
        with open(self.log_file, "a") as stream:
            stream.write(json.dumps(line) + "\n")

    def read_log(self) -> list[dict]:
        if not self.log_file.exists():
            return []
        lines = self.log_file.read_text().splitlines()
        complete = [line for line in lines if line.endswith("}")]
        return [json.loads(line) for line in complete]

    def rewind_log(self, step: int) -> None:
        """Drops what was logged after `step`, so that a resumed run logs each step once."""
        kept = [json.dumps(line) + "\n" for line in self.read_log() if line["step"] <= step]
        write_atomically(self.log_file, "".join(kept).encode())


class Trainer:
    """Model, EMA, optimizer and schedule at one step of a run.

    Args:
        model: moved to `device` and, if asked, compiled in place.
        optimizer, scheduler: timm's; the scheduler counts optimizer steps.
        precision: "bf16" (autocast) or "fp32".
        ema_decay: decay of the EMA of the weights; 0 for none.
        ema_warmup: at step k the decay is at most 1 - k^(-2/3), so that the EMA of a short run forgets its start.
        clip_grad: largest gradient norm; 0 for no clipping.
        micro_batch: images in one forward pass, gradients accumulate to the batch; 0 for the whole batch at once.
    """

    def __init__(
        self, run: RunFolder, model: nn.Module, optimizer, scheduler, *, seed: int, device: torch.device,
        precision: str, ema_decay: float, clip_grad: float, micro_batch: int, compile: bool, save_every: int,
        ema_warmup: bool = True,
    ):  # fmt: skip
        self.run, self.model, self.optimizer, self.scheduler = run, model, optimizer, scheduler
        self.seed, self.device, self.precision = seed, device, precision
        self.clip_grad, self.micro_batch, self.save_every = clip_grad, micro_batch, save_every
        self.ema = ModelEmaV3(model, decay=ema_decay, use_warmup=ema_warmup) if ema_decay else None
        self.step = 0
        self.seconds = 0.0
        self.skipped = 0
        self._skipped_in_a_row = 0
        self._stop = False
        self._resume()
        if compile:
            model.compile()
        signal.signal(signal.SIGTERM, self._on_sigterm)

    @property
    def eval_model(self) -> nn.Module:
        """The weights that are evaluated and shipped: the EMA where there is one."""
        return self.ema.module if self.ema else self.model

    def train_step(self, batch: tuple[Tensor, ...], loss_fn) -> dict:
        """One optimizer step on a batch of tensors with equally many rows; returns loss, gradient norm and lr.

        `loss_fn(model, *batch)` gives the mean loss of these rows or of a part of them.

        Raises:
            RunError: `MAX_SKIPPED` steps in a row had a loss or gradient that is not finite.
        """
        start = time.perf_counter()
        self.model.train()
        self.scheduler.step_update(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        rows = len(batch[0])
        total = 0.0
        for part in zip(*(tensor.split(self.micro_batch or rows) for tensor in batch), strict=True):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                loss = loss_fn(self.model, *part) * (len(part[0]) / rows)
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_grad or float("inf")).item()
        lr = self.optimizer.param_groups[0]["lr"]
        self.step += 1
        if total + norm < float("inf"):
            self.optimizer.step()
            if self.ema:
                self.ema.update(self.model, self.step)
            self._skipped_in_a_row = 0
        else:
            self.skipped += 1
            self._skipped_in_a_row += 1
            if self._skipped_in_a_row >= MAX_SKIPPED:
                raise RunError(
                    f"loss or gradient was not finite in {MAX_SKIPPED} steps in a row (now step {self.step}); "
                    "lower the learning rate or use --precision fp32. The last good state is kept."
                )
        self.seconds += time.perf_counter() - start
        return dict(loss=total, grad_norm=norm, lr=lr)

    def seed_step(self) -> None:
        """Makes the random draws of the coming step (mixup, dropout, noise) a function of (seed, step)."""
        seed_everything(self.seed, self.step, 2)

    def checkpoint(self, force: bool = False) -> None:
        """Saves the state when it is due, and ends the process with exit code 0 after SIGTERM."""
        if force or self._stop or self.step % self.save_every == 0:
            self._save()
        if self._stop:
            print(f"stopped by SIGTERM; state saved at step {self.step}. The same command goes on.", file=sys.stderr)
            sys.exit(0)

    def _on_sigterm(self, *_) -> None:
        self._stop = True

    def _save(self) -> None:
        state = dict(
            step=self.step,
            seconds=self.seconds,
            skipped=self.skipped,
            model=self.model.state_dict(),
            ema=self.ema.module.state_dict() if self.ema else {},
            optimizer=self.optimizer.state_dict(),
        )
        target = self.run.path / f"state-{self.step:08d}.pt"
        temporary = target.with_suffix(".tmp")
        try:
            with open(temporary, "wb") as stream:
                torch.save(state, stream)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, target)
        except (OSError, RuntimeError) as error:  # torch wraps what the disk says
            temporary.unlink(missing_ok=True)
            raise RunError(f"cannot save {target}: {error}. The previous state is kept.") from error
        for old in self.run.states()[KEEP_STATES:]:
            old.unlink()

    def _resume(self) -> None:
        for leftover in self.run.path.rglob("*.tmp"):
            leftover.unlink()
        states = self.run.states()
        if not states:
            self.run.rewind_log(0)
            return
        try:
            state = torch.load(states[0], map_location=self.device, weights_only=True)
            self.model.load_state_dict(state["model"])
            if self.ema:
                self.ema.module.load_state_dict(state["ema"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.seconds, self.skipped = state["step"], state["seconds"], state["skipped"]
        except Exception as error:  # torch.load has no error of its own for a damaged file
            raise RunError(f"{states[0]} is damaged; delete it to go on from the state before.") from error
        self.run.rewind_log(self.step)
        print(f"resumed {states[0]} at step {self.step}", file=sys.stderr)


def progress(total: int, done: int) -> tqdm:
    """The progress bar of a run; on a file rather than a terminal it prints a line every 30 seconds."""
    interactive = sys.stderr.isatty()
    return tqdm(
        total=total, initial=done, unit="step", dynamic_ncols=interactive, mininterval=0.5 if interactive else 30
    )


def plot_curve(run: RunFolder, key: str, label: str) -> None:
    """Draws the training loss and the validation metric `key` from the log into `curve.png`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = run.read_log()
    figure, loss_axis = plt.subplots(figsize=(7, 4), layout="constrained")
    train = [line for line in lines if "lr" in line]
    loss_axis.plot([line["step"] for line in train], [line["loss"] for line in train], color="0.55", linewidth=1)
    loss_axis.set(xlabel="step", ylabel="training loss")
    metric_axis = loss_axis.twinx()
    val = [line for line in lines if key in line]
    metric_axis.plot([line["step"] for line in val], [line[key] for line in val], color="#4338ca", marker=".")
    metric_axis.set_ylabel(label, color="#4338ca")
    temporary = run.path / "curve.tmp"
    figure.savefig(temporary, format="png", dpi=120)
    plt.close(figure)
    os.replace(temporary, run.path / "curve.png")
