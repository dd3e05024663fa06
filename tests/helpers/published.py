"""Checkpoints that tell of a training, to publish."""

import sys
from dataclasses import asdict
from pathlib import Path

import vca
from tests.helpers.checkpoints import (
    LABELS,
    assert_same_outputs,  # noqa: F401
    fresh_process,  # noqa: F401
    read,  # noqa: F401
)
from training import publish
from training.card import write_card

RUN = dict(command="python -m training.x", init=None, steps=10, epochs=2, train_images=9, torch="2", device="cpu")


def checkpoint(folder: Path, model, recipe, results: dict) -> Path:
    """A checkpoint as training leaves it, with its card."""
    run = RUN | dict(recipe=asdict(recipe), results=results)
    vca.save(model, folder, label_names=LABELS, training=[run])
    write_card(folder)
    return folder


def run(*arguments, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["publish", *map(str, arguments)])
    publish.main()


def lines_of(requirements: bytes) -> list[str]:
    """The lines of a requirements file without its comments."""
    return [line for line in requirements.decode().splitlines() if not line.startswith("#")]
