"""The folder of a run: its recipe, log and saved states; the device and the progress bar."""

import fcntl
import json
import os
import platform
import sys
from dataclasses import asdict
from pathlib import Path

import timm
import torch
from torch import nn
from tqdm import tqdm

import vca
from training.core.distributed import ALONE, World, local_device
from training.core.precision import STORED
from training.core.recipe import defaults
from vca.checkpoint import write_atomically


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
        self.identity = identity
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

    def finish(
        self, trainer, model: nn.Module, results: dict, *, label_names: list[str], history: list[dict], command: str,
        epochs: float, train_images: int,
    ) -> Path:  # fmt: skip
        """Writes the checkpoint of a finished run: weights, config and compact log. Its card is not part of it.

        Args:
            trainer: at the last step.
            model: the evaluated weights, which are stored as the recipe says.
            results: what was measured of these weights.
            label_names: one name for each class.
            history: what trained the weights that this run started from, oldest run first.
            command: the command that trains such a run.
            epochs: how often the training images were seen.
            train_images: their number.

        Returns:
            The folder of the checkpoint, `checkpoint/` in that of the run.
        """
        this_run = dict(
            recipe=asdict(trainer.recipe), command=command, **self.identity, steps=trainer.step, epochs=epochs,
            train_images=train_images, skipped_steps=trainer.skipped, torch=torch.__version__,
            device=trainer.device.type, results=results,
        )  # fmt: skip
        folder = self.path / "checkpoint"
        dtype = STORED[trainer.recipe.stored_as]
        vca.save(model, folder, label_names=label_names, training=[*history, this_run], dtype=dtype)
        write_atomically(folder / "log.jsonl", self.compact_log())
        return folder

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


def progress(total: int, done: int, world: World = ALONE) -> tqdm:
    """The progress bar of a run; on a file rather than a terminal it prints a line every 30 seconds."""
    interactive = sys.stderr.isatty()
    return tqdm(
        total=total, initial=done, unit="step", dynamic_ncols=interactive, mininterval=0.5 if interactive else 30,
        disable=not world.first,
    )  # fmt: skip
