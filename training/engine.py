"""What every training loop shares: the run folder, resume, precision, EMA, the optimizer step and the log.

A run is a function of its recipe: `Trainer` seeds all randomness by (seed, step, row), so k steps, a kill and k more
steps give the bytes of 2k steps on one machine with a fixed number of threads.
"""

import fcntl
import json
import os
import platform
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import timm
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from training.data import seed_everything
from training.recipe import defaults
from training.world import ALONE, World, local_device
from vca.checkpoint import write_atomically

KEEP_STATES = 2
MAX_SKIPPED = 10
KEEP_SKIPPED = 3


class RunError(RuntimeError):
    """A run that cannot start or go on; the message says what to do."""


def open_device(name: str) -> torch.device:
    """The device of that name; under torchrun, "cuda" is the GPU of this process.

    Raises:
        RunError: there is no such device on this machine.
    """
    try:
        return torch.empty(1, device=local_device(name)).device
    except (RuntimeError, AssertionError) as error:
        raise RunError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from None


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context that computes in "bf16" or "fp32"; warns if a CPU is much slower in the former."""
    bf16, mkldnn = precision == "bf16", device.type == "cpu" and torch.backends.mkldnn.is_available()
    if bf16 and mkldnn and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        text = "this CPU has no instructions for bf16; --precision fp32 is several times faster."
        warnings.warn(text, stacklevel=2)
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


@torch.no_grad()
def round_weights(model: nn.Module, stored_as: str) -> torch.dtype:
    """Rounds the weights to what a checkpoint in "fp32" or "fp16" will hold; returns its type."""
    dtype = dict(fp32=torch.float32, fp16=torch.float16)[stored_as]
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.to(dtype))
    return dtype


def prepare_compiler() -> None:
    """Before `torch.compile` on a CPU: keeps GCC from using 512-bit vectors of its own.

    With those, GCC 12 and `-march=native` on an Intel Xeon with AMX, kernels that transpose bf16 compute NaN. What
    PyTorch itself writes in 512 bits stays. An architecture of the user's, TORCHINDUCTOR_CPP_MARCH, is left alone.
    """
    from torch._inductor import config  # takes a second, and not every run compiles

    if platform.machine() == "x86_64" and getattr(config.cpp, "march", "") is None:
        config.cpp.march = "native -mprefer-vector-width=256"


class RunFolder:
    """The folder of one run: `recipe.json`, `environment.json`, `log.jsonl`, `curve.png`, `state-*.pt`, `checkpoint/`.

    Only the first of several processes writes in it.

    Args:
        recipe: a dataclass; a folder from a time when the recipe had fewer keys is one with their defaults.
        tensorboard: write the numbers of the log for TensorBoard, too, into `tensorboard/`.
        **identity: what else must be the same to go on with a run.

    Raises:
        RunError: another process trains in this folder, or it holds a run of another recipe.
    """

    def __init__(self, path: str | Path, recipe, world: World = ALONE, *, tensorboard: bool = False, **identity):
        self.path = Path(path)
        self.writes = world.first
        self.log_file = self.path / "log.jsonl"
        self._board = None
        if not self.writes:
            return
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
                old = defaults(type(recipe)) | dict(json.loads(recipe_file.read_text()))
            except (ValueError, TypeError):
                raise RunError(f"{recipe_file} is damaged; choose another --out, or delete the folder.") from None
            changed = sorted(k for k in resolved.keys() | old.keys() if resolved.get(k) != old.get(k))
            if changed:
                raise RunError(
                    f"{self.path} holds a run with another {', '.join(changed)}; "
                    "give the same recipe to resume it, or another --out to start anew."
                )
        write_atomically(recipe_file, json.dumps(resolved, indent=2).encode())
        write_atomically(self.path / "environment.json", json.dumps(_environment(world), indent=2).encode())
        if tensorboard:
            self._board = _open_board(self.path / "tensorboard")

    def states(self) -> list[Path]:
        """Saved states, newest first."""
        return sorted(self.path.glob("state-*.pt"), reverse=True)

    def log(self, **line) -> None:
        if not self.writes:
            return
        with open(self.log_file, "a") as stream:
            stream.write(json.dumps(line) + "\n")
        if self._board:
            for key, value in line.items():
                if key != "step" and isinstance(value, int | float):
                    self._board.add_scalar(key, value, line["step"])

    def read_log(self) -> list[dict]:
        if not self.log_file.exists():
            return []
        lines = self.log_file.read_text().splitlines()
        complete = [line for line in lines if line.endswith("}")]
        return [json.loads(line) for line in complete]

    def compact_log(self) -> bytes:
        """For a checkpoint: every evaluation, with the mean training loss since the one before, as JSON lines."""
        kept, losses = [], []
        for line in self.read_log():
            if "lr" in line:
                losses.append(line["loss"])
            else:
                mean = dict(train_loss=round(sum(losses) / len(losses), 4)) if losses else {}
                kept.append(line | mean)
                losses = []
        return _as_lines(kept)

    def rewind_log(self, step: int) -> None:
        """Drops what was logged after `step`, so that a resumed run logs each step once."""
        kept = [line for line in self.read_log() if line["step"] <= step]
        write_atomically(self.log_file, _as_lines(kept))


def _as_lines(values: list[dict]) -> bytes:
    return "".join(json.dumps(value) + "\n" for value in values).encode()


def _environment(world: World) -> dict:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return dict(
        python=platform.python_version(), platform=platform.platform(), torch=torch.__version__, timm=timm.__version__,
        processes=world.size, threads=torch.get_num_threads(), cores=os.cpu_count(), gpu=gpu, cuda=torch.version.cuda,
    )  # fmt: skip


def _open_board(folder: Path):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise RunError("--tensorboard needs the package: pip install tensorboard.") from None
    return SummaryWriter(folder)


class Trainer:
    """Model, EMA, optimizer and schedule at one step of a run.

    Args:
        model: moved to `device` and, if asked, compiled in place.
        loss_fn: `loss_fn(model, *batch)` gives the mean loss of the rows of a batch.
        optimizer, scheduler: timm's; the scheduler counts optimizer steps.
        precision: "bf16" (autocast) or "fp32".
        ema_decay: decay of the EMA of the weights; 0 for none.
        ema_warmup: at step k the decay is at most 1 - k^(-2/3), so that the EMA of a short run forgets its start.
        clip_grad: largest gradient norm; 0 for no clipping.
        micro_batch: rows in one forward pass, gradients accumulate to the batch; 0 for all rows at once.
        world: the processes that share every batch; their gradients are averaged by DDP.
    """

    def __init__(
        self, run: RunFolder, model: nn.Module, loss_fn: Callable, optimizer, scheduler, *, seed: int,
        device: torch.device, precision: str, ema_decay: float, clip_grad: float, micro_batch: int, compile: bool,
        save_every: int, ema_warmup: bool = True, world: World = ALONE,
    ):  # fmt: skip
        self.run, self.model, self.optimizer, self.scheduler = run, model, optimizer, scheduler
        self.seed, self.device, self.world = seed, device, world
        self.clip_grad, self.micro_batch, self.save_every = clip_grad, micro_batch, save_every
        self.ema = ModelEmaV3(model, decay=ema_decay, use_warmup=ema_warmup) if ema_decay else None
        self.step = 0
        self.seconds = self.waited = 0.0
        self.skipped = 0
        self._skipped_in_a_row = 0
        self._signalled = self._stop = False
        self._resume()
        if compile:
            prepare_compiler()
            model.compile()
        self._loss = _Loss(model, loss_fn)
        self._autocast = autocast(device, precision)
        if world.size > 1:
            self._loss = DistributedDataParallel(self._loss)
        signal.signal(signal.SIGTERM, self._on_sigterm)

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
        return dict(seconds=round(self.seconds, 1), seconds_waiting=round(self.waited, 1))

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
        rows = len(batch[0])
        size = self.micro_batch or rows
        total = torch.zeros((), device=self.device)
        for first in range(0, rows, size):
            part = [tensor[first : first + size] for tensor in batch]
            seed_everything(self.seed, self.step, 4, self.world.rank * rows + first)
            last = first + size >= rows
            with nullcontext() if last or self.world.size == 1 else self._loss.no_sync():
                with self._autocast:
                    loss = self._loss(*part) * (len(part[0]) / rows)
                loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_grad or float("inf")).item()
        loss = self._agree(total.item())
        lr = self.optimizer.param_groups[0]["lr"]
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

    def _agree(self, loss: float) -> float:
        """The mean loss of all processes; if one of them was told to stop, all will after this step."""
        if self.world.size == 1:
            return loss
        loss, signalled = self.world.sum([loss, float(self._signalled)], self.device)
        self._stop = signalled > 0
        return loss / self.world.size

    def _skip(self, batch: tuple[Tensor, ...], loss: float, norm: float) -> None:
        folder = self.run.path / "nonfinite"
        file = folder / f"step-{self.step:08d}-rank-{self.world.rank}.pt"
        try:
            folder.mkdir(exist_ok=True, parents=True)
            _save_atomically(file, dict(step=self.step, loss=loss, grad_norm=norm, batch=[t.cpu() for t in batch]))
        except (OSError, RuntimeError) as error:
            print(f"cannot save the batch of a step that is not finite, {file}: {error}", file=sys.stderr)
        for old in sorted(folder.glob(f"*-rank-{self.world.rank}.pt"))[:-KEEP_SKIPPED]:
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
        seed_everything(self.seed, self.step, 2)

    def checkpoint(self, force: bool = False) -> None:
        """Saves the state when it is due, and ends the process with exit code 0 after SIGTERM."""
        saves = force or self._told_to_stop or self.step % self.save_every == 0
        if saves and self.world.first:
            self._save()
        if saves and self._told_to_stop:
            if self.world.first:
                note = f"stopped by SIGTERM; state saved at step {self.step}. The same command goes on."
                print(note, file=sys.stderr)
            sys.exit(0)

    @property
    def _told_to_stop(self) -> bool:
        """After SIGTERM; several processes have to agree on the step first."""
        return self._signalled if self.world.size == 1 else self._stop

    def _on_sigterm(self, *_) -> None:
        self._signalled = True

    def _save(self) -> None:
        state = dict(
            step=self.step,
            seconds=self.seconds,
            waited=self.waited,
            skipped=self.skipped,
            model=self.model.state_dict(),
            ema=self.ema.module.state_dict() if self.ema else {},
            optimizer=self.optimizer.state_dict(),
        )
        target = self.run.path / f"state-{self.step:08d}.pt"
        try:
            _save_atomically(target, state)
        except (OSError, RuntimeError) as error:  # torch wraps what the disk says
            raise RunError(f"cannot save {target}: {error}. The previous state is kept.") from error
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
        self.waited = state.get("waited", 0.0)

    def _read_state(self) -> dict | None:
        for leftover in self.run.path.rglob("*.tmp"):
            leftover.unlink()
        states = self.run.states()
        if not states:
            self.run.rewind_log(0)
            return None
        try:
            state = torch.load(states[0], map_location="cpu", weights_only=True)
            fits = state["model"].keys() == self.model.state_dict().keys()
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


def set_tf32(enabled: bool) -> None:
    """Whether float32 products on NVIDIA GPUs may round their inputs to 10 bits of mantissa, for speed."""
    torch.backends.cuda.matmul.allow_tf32 = enabled
    torch.backends.cudnn.allow_tf32 = enabled


def progress(total: int, done: int, world: World = ALONE) -> tqdm:
    """The progress bar of a run; on a file rather than a terminal it prints a line every 30 seconds."""
    interactive = sys.stderr.isatty()
    return tqdm(
        total=total, initial=done, unit="step", dynamic_ncols=interactive, mininterval=0.5 if interactive else 30,
        disable=not world.first,
    )  # fmt: skip


def plot_curve(run: RunFolder, key: str, label: str) -> None:
    """Draws training loss and validation metric `key`, learning rate and gradient norm from the log: `curve.png`."""
    if not run.writes:
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = run.read_log()
    figure, (loss_axis, lr_axis) = plt.subplots(
        2, sharex=True, figsize=(7, 5.5), height_ratios=(2, 1), layout="constrained"
    )
    train = [line for line in lines if "lr" in line]
    steps = [line["step"] for line in train]
    loss_axis.plot(steps, [line["loss"] for line in train], color="0.55", linewidth=1)
    loss_axis.set_ylabel("training loss")
    metric_axis = loss_axis.twinx()
    val = [line for line in lines if key in line]
    metric_axis.plot([line["step"] for line in val], [line[key] for line in val], color="#4338ca", marker=".")
    metric_axis.set_ylabel(label, color="#4338ca")
    lr_axis.plot(steps, [line["lr"] for line in train], color="#0f766e")
    lr_axis.set(xlabel="step", ylim=(0, None))
    lr_axis.set_ylabel("learning rate", color="#0f766e")
    norm_axis = lr_axis.twinx()
    norm_axis.plot(steps, [line["grad_norm"] for line in train], color="0.55", linewidth=1)
    norm_axis.set_ylabel("gradient norm")
    temporary = run.path / "curve.tmp"
    figure.savefig(temporary, format="png", dpi=120)
    plt.close(figure)
    os.replace(temporary, run.path / "curve.png")
