"""The folder of a run: its recipe, log and saved states; the device and the progress bar."""

import errno
import fcntl
import json
import os
import platform
import re
import sys
import time
import weakref
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

import timm
import torch
from torch import nn
from tqdm import tqdm

import vca
from training.core.distributed import ALONE, World, local_device
from training.core.init import place_of
from training.core.log_to import Log, LogError, open_log
from training.core.precision import STORED
from training.core.recipe import defaults
from vca.checkpoint import write_atomically

MAY_DIFFER = {"workers", "log_every", "save_every", "dataset", "license"}  # they change nothing that is learned
STATE = re.compile(r"state-(\d{8,})\.pt")
WRITTEN = r"recipe\.json|environment\.json|log\.jsonl|curve\.png|first_batch\.png"
LEFTOVERS = {  # what a kill inside a write leaves, by folder
    "": re.compile(rf"\.({WRITTEN})\.\d+\.\d+\.tmp|state-\d{{8,}}\.tmp"),
    "nonfinite": re.compile(r"step-\d{8,}-rank-\d+\.tmp"),
    "samples": re.compile(r"\.step-\d{8,}\.png\.\d+\.\d+\.tmp"),
    "checkpoint": re.compile(r"\..+\.\d+\.\d+\.tmp"),
}
_locks: weakref.WeakSet = weakref.WeakSet()
os.register_at_fork(after_in_child=lambda: [lock.close() for lock in _locks])  # a worker must not hold the run's lock


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


def disk_words(error: Exception) -> str:
    """What the system said when a file could not be written, whatever wrapped it."""
    cause: BaseException | None = error
    while cause and not (isinstance(cause, OSError) and cause.errno):
        cause = cause.__cause__ or cause.__context__
    if not cause:
        return str(error).splitlines()[0]
    return "the disk is full" if cause.errno in (errno.ENOSPC, errno.EDQUOT) else cause.strerror


class RunFolder:
    """The folder of one run: `recipe.json`, `environment.json`, `log.jsonl`, `curve.png`, `state-*.pt`, `checkpoint/`.

    Only the first of several processes writes in it. A folder without a state or a checkpoint has nothing to protect:
    there any recipe may start.

    Args:
        recipe: a dataclass; a folder from a time when the recipe had fewer keys is one with their defaults.
        log_to: one of `training.core.log_to.LOGS`, where the numbers of the log go, too; default none.
        data: what `training.data.images.describe` says about the data.
        **identity: what else must be the same to go on with a run.

    Raises:
        RunError: another process trains in this folder, or it holds a run of another recipe, on other data, or no run.
    """

    def __init__(
        self, path: str | Path, recipe, world: World = ALONE, *, log_to: str = "", data: dict | None = None,
        **identity,
    ):  # fmt: skip
        self.path = Path(path)
        self.identity = identity
        self.writes = world.first
        self.log_file = self.path / "log.jsonl"
        self._log: Log | None = None
        if not self.writes:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.path / ".lock", "a")  # noqa: SIM115 (held as long as the run)
        _locks.add(self._lock)
        if not _lock(self._lock):
            self._lock.close()
            raise RunError(f"{self.path} is in use by another run; choose another --out or wait for it.")
        resolved = asdict(recipe) | identity
        recipe_file = self.path / "recipe.json"
        if old := self._read_recipe(type(recipe), recipe_file):
            self._check(type(recipe), resolved, data, old)
        write_atomically(recipe_file, json.dumps(resolved | dict(data=data), indent=2).encode())
        write_atomically(self.path / "environment.json", json.dumps(_environment(world), indent=2).encode())
        if log_to:
            try:
                self._log = open_log(log_to, self.path, resolved)
            except LogError as error:
                raise RunError(str(error)) from None

    def _read_recipe(self, kind: type, file: Path) -> dict | None:
        """The recipe of the run that is here; None if there is none."""
        if not file.exists():
            strange = [name for name in ("environment.json", "log.jsonl", "checkpoint") if (self.path / name).exists()]
            if strange:
                raise RunError(f"{self.path / strange[0]} is there, but no run's recipe.json; choose another --out.")
            return None
        try:
            old = dict(json.loads(file.read_text()))
        except (ValueError, TypeError):
            old = {}
        if not {"model", "batch_size", "lr"} <= old.keys():
            raise RunError(f"{file} is damaged, or no run's; choose another --out, or delete it.")
        return defaults(kind) | old

    def _check(self, kind: type, resolved: dict, data: dict | None, old: dict) -> None:
        """Refuses to go on with a run that was started otherwise."""
        if not self.states() and not (self.path / "checkpoint" / "model.safetensors").exists():
            return
        before = old.pop("data", None)
        if data and before and (changes := _data_changes(before, data)):
            raise RunError(
                f"{self.path} holds a run on other data: {', '.join(changes)}; "
                "give the same data to resume it, or another --out to start anew."
            )
        keys = (resolved.keys() | old.keys()) - MAY_DIFFER - kind.may_grow
        if changed := sorted(key for key in keys if resolved.get(key) != old.get(key)):
            raise RunError(
                f"{self.path} holds a run with another {', '.join(changed)}; "
                "give the same recipe to resume it, or another --out to start anew."
            )
        if shorter := sorted(key for key in kind.may_grow if resolved[key] < old[key]):
            raise RunError(
                f"{self.path} holds a run with {shorter[0]} = {old[shorter[0]]}; give that to resume it, more to train "
                "it longer, or another --out to start anew."
            )

    def states(self) -> list[Path]:
        """Saved states, newest first."""
        found = [file for file in self.path.glob("state-*.pt") if STATE.fullmatch(file.name)]
        return sorted(found, key=lambda file: int(STATE.fullmatch(file.name)[1]), reverse=True)

    def remove_leftovers(self) -> None:
        """Deletes what a kill inside a write has left: files of this run's own names, and no others."""
        for folder, pattern in LEFTOVERS.items():
            for file in (self.path / folder).glob("*.tmp"):
                if pattern.fullmatch(file.name):
                    file.unlink()

    def log(self, **line) -> None:
        if not self.writes:
            return
        with open(self.log_file, "a") as stream:
            stream.write(json.dumps(line) + "\n")
        if self._log:
            numbers = {key: value for key, value in line.items() if key != "step" and isinstance(value, int | float)}
            self._log(line["step"], numbers)

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
        came_from = {role: place_of(source) for role, source in self.identity.items()}
        this_run = dict(
            recipe=asdict(trainer.recipe), command=command, **came_from, steps=trainer.step, epochs=epochs,
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
        if self.log_file.exists():
            kept = [line for line in self.read_log() if line["step"] <= step]
            write_atomically(self.log_file, _as_lines(kept))


def _lock(file: TextIO) -> bool:
    """Takes the lock, unless another process keeps it; one that was just killed lets go of it within a second."""
    for _ in range(10):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            time.sleep(0.1)
    return False


def _data_changes(old: dict, new: dict) -> list[str]:
    """What differs between the data of two runs, in words."""
    changes = []
    gone, come = ([c for c in a["classes"] if c not in b["classes"]] for a, b in ((old, new), (new, old)))
    for names, text in ((gone, "is gone"), (come, "is new")):
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        changes += [f"class {', '.join(names[:3])}{more} {text}"] if names else []
    if not changes and old["classes"] != new["classes"]:
        changes.append("the classes have another order")
    for split, text in (("train", "training"), ("val", "validation")):
        if (then := old[f"{split}_images"]) != (now := new[f"{split}_images"]):
            changes.append(f"{now} {text} images instead of {then}")
        elif not changes and old[f"{split}_names"] != new[f"{split}_names"]:
            changes.append(f"some {text} images have another name or class")
    if old.get("sources") != new.get("sources"):
        changes.append("sources.json says something else")
    return changes


def _as_lines(values: list[dict]) -> bytes:
    return "".join(json.dumps(value) + "\n" for value in values).encode()


def _environment(world: World) -> dict:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return dict(
        python=platform.python_version(), platform=platform.platform(), torch=torch.__version__, timm=timm.__version__,
        processes=world.size, threads=torch.get_num_threads(), cores=os.cpu_count(), gpu=gpu, cuda=torch.version.cuda,
    )  # fmt: skip


def progress(total: int, done: int, world: World = ALONE) -> tqdm:
    """The progress bar of a run; on a file rather than a terminal it prints a line every 30 seconds."""
    interactive = sys.stderr.isatty()
    return tqdm(
        total=total, initial=done, unit="step", dynamic_ncols=interactive, mininterval=0.5 if interactive else 30,
        disable=not world.first,
    )  # fmt: skip
