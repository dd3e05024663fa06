"""Where a run's numbers go besides `log.jsonl`: TensorBoard, Weights & Biases or trackio."""

import importlib
from pathlib import Path
from typing import Protocol

LOGS = ("tensorboard", "wandb", "trackio")
PROJECT = "vca"


class LogError(RuntimeError):
    """The numbers cannot go there; the message says what to do."""


class Log(Protocol):
    """Takes the numbers of a step."""

    def __call__(self, step: int, numbers: dict[str, float]) -> None: ...


def open_log(name: str, folder: Path, recipe: dict) -> Log:
    """A function of (step, numbers) that notes them in the log of this name.

    Args:
        name: one of `LOGS`. "tensorboard" writes into `tensorboard/` of the run folder. The others know the run by the
            name of its folder, in the project "vca"; their own environment variables choose server and account.
        folder: of the run.
        recipe: what the log shows of the run.

    Raises:
        LogError: the package is not installed.
    """
    if name == "tensorboard":
        board = _import("torch.utils.tensorboard", name).SummaryWriter(folder / "tensorboard")

        def note(step: int, numbers: dict[str, float]) -> None:
            for key, value in numbers.items():
                board.add_scalar(key, value, step)

        return note
    module = _import(name, name)
    module.init(project=PROJECT, name=folder.resolve().name, config=recipe)
    return lambda step, numbers: module.log(numbers, step=step)


def _import(module: str, package: str):
    try:
        return importlib.import_module(module)
    except ImportError:
        raise LogError(f"--log-to {package} needs the package: pip install {package}.") from None
