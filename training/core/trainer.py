"""What every training loop shares: the run folder, resume, precision, EMA, the optimizer step and the log.

A run is a function of its recipe: `Trainer` seeds all randomness by (seed, step, row), so k steps, a kill and k more
steps give the bytes of 2k steps on one machine with a fixed number of threads.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from training.core.attention_path import settle_attention
from training.core.distributed import ALONE, World
from training.core.precision import autocast, prepare_compiler
from training.core.recipe import BaseRecipe
from training.core.run import RunError, RunFolder, disk_words
from training.data.seeding import seed_everything
from vca import fused

KEEP_STATES = 2
MAX_SKIPPED = 10
KEEP_SKIPPED = 3
STOPPING = b"\nstopping after this step; Ctrl-C again ends at once.\n"


class Trainer:
    """Model, EMA, optimizer and schedule at one step of a run.

    Args:
        run: the folder of the run, from which it resumes.
        model: on `device`; compiled in place, if the recipe asks.
        loss_fn: `loss_fn(model, *batch)` gives the mean loss of the rows of a batch, a scalar.
        optimizer, scheduler: timm's; the scheduler counts optimizer steps.
        recipe: its `seed`, `precision`, `ema_decay`, `ema_warmup`, `clip_grad`, `micro_batch`, `compile`, `log_every`
            and `save_every` are used. With `ema_warmup` the decay at step k is at most 1 - k^(-2/3), so that the EMA of
            a short run forgets its start.
        device: of the model and the batches.
        world: the processes that share every batch; their gradients are averaged by DDP.

    Attributes:
        step: optimizer steps so far, skipped ones included.
        skipped: steps that were skipped because they were not finite.
        seconds, waited: time in steps, and in waiting for data, in seconds.
        autocast: the context that computes in the recipe's precision.
        fused: whether attention takes the fused kernels for a CPU, which stays so when the run is resumed.
        ema: the average of the weights; None without one.
    """

    def __init__(
        self, run: RunFolder, model: nn.Module, loss_fn: Callable, optimizer, scheduler, recipe: BaseRecipe, *,
        device: torch.device, world: World = ALONE,
    ):  # fmt: skip
        self.run, self.model, self.optimizer, self.scheduler, self.recipe = run, model, optimizer, scheduler, recipe
        self.device, self.world = device, world
        average = dict(decay=recipe.ema_decay, use_warmup=recipe.ema_warmup)
        self.ema = ModelEmaV3(model, **average) if recipe.ema_decay else None
        self.step = 0
        self.seconds = self.waited = 0.0
        self.skipped = 0
        self._skipped_in_a_row = 0
        self._signalled = 0
        self._stop = False
        self.fused: bool | None = None
        self._resume()
        wins = fused.wins(torch.bfloat16 if recipe.precision == "bf16" else torch.float32)
        self.fused = settle_attention(model, device=device, wins=wins, before=self.fused, world=world)
        if recipe.compile:
            prepare_compiler()
            model.compile()
            if world.first:
                print("the first step compiles the model: that takes a minute or more.", file=sys.stderr)
        self._loss = _Loss(model, loss_fn)
        self.autocast = autocast(device, recipe.precision)
        if world.size > 1:
            self._loss = DistributedDataParallel(self._loss)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    @property
    def eval_model(self) -> nn.Module:
        """The weights that are evaluated and shipped: the EMA where there is one."""
        return self.ema.module if self.ema else self.model

    def waiting_for(self, batches: Iterable) -> Iterator:
        """The batches; how long they were waited for is counted."""
        batches = iter(batches)
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def clock(self) -> dict:
        """Seconds since the start of the run in steps, and in waiting for data; for the log."""
        return dict(seconds=round(self.seconds, 3), seconds_waiting=round(self.waited, 3))

    def log(self, bar: tqdm, metrics: dict, *, epoch: int, last: bool) -> None:
        """Logs a step when it is due, and shows loss, learning rate and speed in the progress bar.

        Args:
            bar: of the run, which has just advanced by this step.
            metrics: what `train_step` returned.
            epoch: that of the step, from 0.
            last: whether this is the run's last step, which is always logged.
        """
        if self.step % self.recipe.log_every and not last:
            return
        rate = self.step * self.recipe.batch_size / self.seconds
        bar.set_postfix_str(f"loss {metrics['loss']:.3f} lr {metrics['lr']:.1e} {rate:.0f} img/s", False)
        self.run.log(step=self.step, epoch=epoch, **self.clock(), **metrics)

    def train_step(self, batch: tuple[Tensor, ...]) -> dict:
        """One optimizer step on this process's rows of a batch; returns loss, gradient norm and lr.

        A loss or gradient that is not finite changes nothing but the count of skipped steps, and the batch is saved.

        Raises:
            RunError: `MAX_SKIPPED` steps in a row were skipped.
        """
        start = time.perf_counter()
        self.model.train()
        self.scheduler.step_update(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        try:
            total = self._backward(batch)
        except Exception:
            if self._told_to_stop:  # Ctrl-C reaches a compiler at work as well, which then fails; no weight has changed
                self.checkpoint()
            raise
        limit = self.recipe.clip_grad or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit).item()
        loss = self._agree(total.item())
        lr = max(group["lr"] for group in self.optimizer.param_groups)
        self.step += 1
        if loss + norm < float("inf"):
            self.optimizer.step()
            if self.ema:
                self.ema.update(self.model, self.step)
            self._skipped_in_a_row = 0
        else:
            self._skip(batch, loss, norm)
        self.seconds += time.perf_counter() - start
        return dict(loss=loss, grad_norm=norm, lr=lr)

    def _backward(self, batch: tuple[Tensor, ...]) -> Tensor:
        """Adds up the gradients of this process's rows of a batch, in parts of `micro_batch`; returns their loss."""
        rows = len(batch[0])
        size = self.recipe.micro_batch or rows
        total = torch.zeros((), device=self.device)
        for first in range(0, rows, size):
            part = [tensor[first : first + size] for tensor in batch]
            seed_everything(self.recipe.seed, self.step, 4, self.world.rank * rows + first)
            last = first + size >= rows
            with nullcontext() if last or self.world.size == 1 else self._loss.no_sync():
                with self.autocast:
                    loss = self._loss(*part) * (len(part[0]) / rows)
                loss.backward()
            total += loss.detach()
        return total

    def _agree(self, loss: float) -> float:
        """The mean loss of all processes; if one of them was told to stop, all will after this step."""
        if self.world.size == 1:
            return loss
        loss, signalled = self.world.sum([loss, float(self._signalled > 0)], self.device)
        self._stop = signalled > 0
        return loss / self.world.size

    def _skip(self, batch: tuple[Tensor, ...], loss: float, norm: float) -> None:
        folder = self.run.path / "nonfinite"
        file = folder / f"step-{self.step:08d}-rank-{self.world.rank}.pt"
        try:
            folder.mkdir(exist_ok=True, parents=True)
            _save_atomically(file, dict(step=self.step, loss=loss, grad_norm=norm, batch=[t.cpu() for t in batch]))
        except (OSError, RuntimeError) as error:
            print(f"cannot save the batch of a step that is not finite, {file}: {disk_words(error)}.", file=sys.stderr)
        for old in sorted(folder.glob(f"step-*-rank-{self.world.rank}.pt"))[:-KEEP_SKIPPED]:
            old.unlink()
        self.skipped += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row >= MAX_SKIPPED:
            raise RunError(
                f"loss or gradient was not finite in {MAX_SKIPPED} steps in a row (now step {self.step}); lower the "
                f"learning rate or use --precision fp32. The last batches are in {folder}, the last good state is kept."
            )

    def seed_step(self) -> None:
        """Makes the random draws for the coming batch (mixup, noise) a function of (seed, step)."""
        seed_everything(self.recipe.seed, self.step, 2)

    def checkpoint(self, force: bool = False) -> None:
        """Saves the state when it is due, and ends the process after SIGTERM (exit code 0) and Ctrl-C (130)."""
        saves = force or self._told_to_stop or self.step % self.recipe.save_every == 0
        if saves and self.world.first:
            self._save()
        if saves and self._told_to_stop:
            if self.world.first:
                by = "Ctrl-C" if self._signalled == signal.SIGINT else "SIGTERM"
                note = f"stopped by {by}; state saved at step {self.step}. The same command goes on."
                print(note, file=sys.stderr)
            sys.exit(130 if self._signalled == signal.SIGINT and self.world.size == 1 else 0)

    @property
    def _told_to_stop(self) -> bool:
        """After SIGTERM or Ctrl-C; several processes have to agree on the step first."""
        return bool(self._signalled) if self.world.size == 1 else self._stop

    def _on_signal(self, number: int, _) -> None:
        if number == signal.SIGINT and self.world.size == 1:  # torchrun repeats it, a user means the second one
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.write(2, STOPPING)
        self._signalled = number

    def _save(self) -> None:
        state = dict(
            step=self.step,
            seconds=self.seconds,
            waited=self.waited,
            skipped=self.skipped,
            fused=self.fused,
            model=self.model.state_dict(),
            ema=self.ema.module.state_dict() if self.ema else {},
            optimizer=self.optimizer.state_dict(),
        )
        target = self.run.path / f"state-{self.step:08d}.pt"
        try:
            _save_atomically(target, state)
        except (OSError, RuntimeError) as error:  # torch wraps what the disk says
            raise RunError(f"cannot save {target}: {disk_words(error)}. The previous state is kept.") from error
        for old in self.run.states()[KEEP_STATES:]:
            old.unlink()

    def _resume(self) -> None:
        state = self.world.share(self._read_state() if self.world.first else None)
        if not state:
            return
        self.model.load_state_dict(state["model"])
        if self.ema:
            self.ema.module.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.skipped = state["step"], state["seconds"], state["skipped"]
        self.waited, self.fused = state.get("waited", 0.0), state.get("fused", False)

    def _read_state(self) -> dict | None:
        self.run.remove_leftovers()
        states = self.run.states()
        if not states:
            self.run.rewind_log(0)
            return None
        try:
            state = torch.load(states[0], map_location="cpu", weights_only=True)
            shapes = {key: value.shape for key, value in self.model.state_dict().items()}
            fits = {key: value.shape for key, value in state["model"].items()} == shapes
        except Exception as error:  # torch.load has no error of its own for a damaged file
            raise RunError(f"{states[0]} is damaged; delete it to go on from the state before.") from error
        if not fits:
            raise RunError(f"{states[0]} holds another model; choose another --out.")
        self.run.rewind_log(state["step"])
        print(f"resumed {states[0]} at step {state['step']}", file=sys.stderr)
        return state


class _Loss(nn.Module):
    """The loss as a module: what DDP averages are the gradients of a module's forward pass."""

    def __init__(self, model: nn.Module, loss_fn: Callable):
        super().__init__()
        self.model, self.loss_fn = model, loss_fn

    def forward(self, *batch: Tensor) -> Tensor:
        return self.loss_fn(self.model, *batch)


def _save_atomically(file: Path, content: dict) -> None:
    """`torch.save` that leaves the old file, the new one or none, never a part."""
    temporary = file.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as stream:
            torch.save(content, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
