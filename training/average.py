"""Averages the weights of classifiers that were trained on from the same checkpoint: a "model soup".

    python -m training.average runs/A/checkpoint runs/B/checkpoint --data FOLDER --out FOLDER

Such weights lie in one valley of the loss, and their mean often generalizes better than each (Wortsman et al., arXiv
2203.05482). The checkpoint that they left may be one of them. Its result is an ordinary checkpoint, whose config.json
and card say what it is the mean of; its accuracy on FOLDER/val is measured. The temperature of a calibrated member is
taken out of it first; `training.calibrate` fits one for the mean.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

import vca
from training.calibrate import fold_temperature
from training.card import write_card
from training.core.attention_path import settle_attention
from training.core.cli import interruptible
from training.core.init import place_of
from training.core.metrics import accuracy
from training.core.precision import STORED, autocast, round_weights
from training.core.run import RunError, open_device
from training.data.batches import FolderEvaluation
from training.data.errors import DataError
from training.evaluate import open_images


def shared_history(histories: Sequence[list[dict]]) -> list[dict]:
    """The runs with which all histories begin."""
    shared = []
    for runs in zip(*histories, strict=False):
        if any(run != runs[0] for run in runs):
            break
        shared.append(runs[0])
    return shared


def average(checkpoints: Sequence[str]) -> tuple[nn.Module, list[dict]]:
    """The mean of the weights of some checkpoints, with equal parts, and what made it.

    Args:
        checkpoints: folders or Hub ids; one that is given twice counts twice.

    Returns:
        The model, in evaluation mode, and its training history. The last entry has `averaged`: for each checkpoint, the
        runs since the one that all were trained on from. It has no results yet.

    Raises:
        vca.CheckpointError: a checkpoint cannot be read.
        RunError: they are not classifiers of one architecture, preprocessing and vocabulary, or no training is common
            to all, so that their mean is no model.
    """
    members = [vca.load(checkpoint) for checkpoint in checkpoints]
    mean, first = members[0], checkpoints[0]
    for member, checkpoint in zip(members, checkpoints, strict=True):
        if member.task != "classification":
            raise RunError(f"{checkpoint} is no classifier.")
        for what in ("pretrained_cfg", "model_args", "label_names"):
            if getattr(member, what) != getattr(mean, what):
                raise RunError(f"{first} and {checkpoint} differ in their {what}; only equal models are averaged.")
    histories = [member.training_history for member in members]
    begun = shared_history(histories)
    if not begun:
        raise RunError(
            f"{', '.join(map(str, checkpoints))}: no training is common to these, so their mean would be no model."
        )
    for member in members:
        calibrated = member.training_history[-1]["results"].get("calibration")
        if calibrated:
            fold_temperature(member, 1 / calibrated["temperature"])
    tensors = [member.state_dict() for member in members]
    mean.load_state_dict({key: _mean([part[key] for part in tensors]) for key in tensors[0]})
    this = dict(
        recipe=histories[0][-1]["recipe"], init=None, steps=0, epochs=0, train_images=0, skipped_steps=0,
        averaged=[history[len(begun):] for history in histories], torch=torch.__version__, device="cpu", results={},
    )  # fmt: skip
    return mean, [*begun, this]


def _mean(values: list[torch.Tensor]) -> torch.Tensor:
    if not values[0].is_floating_point():
        return values[0]
    return torch.stack([value.double() for value in values]).mean(0).to(values[0].dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", help="folders or Hub ids; one that is given twice counts twice")
    parser.add_argument("--data", required=True, help="data folder with a sub-folder val")
    parser.add_argument("--out", required=True, type=Path, help="folder of the new checkpoint")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    try:
        print(write_average(args))
    except (vca.CheckpointError, DataError, RunError, OSError) as error:
        sys.exit(f"error: {error}")


def write_average(args: argparse.Namespace) -> str:
    """Writes the checkpoint of the mean and its card, and says what it reaches."""
    if (args.out / "config.json").exists():
        raise RunError(f"{args.out} already holds a checkpoint; name another folder.")
    device = open_device(args.device)
    model, history = average(args.checkpoints)
    this = history[-1]
    model.to(device)
    settle_attention(model, device=device)
    round_weights(model, this["recipe"]["stored_as"])
    images = open_images(model, args.data, "val")
    with autocast(device, args.precision):
        reached = accuracy(model, FolderEvaluation(images, model.pretrained_cfg, os.cpu_count()))
    shown = [place_of(checkpoint) for checkpoint in args.checkpoints]
    command = f"python -m training.average {shlex.join(shown)} --data DATA --out OUT"
    this.update(results=reached, command=command, device=device.type)
    dtype = STORED[this["recipe"]["stored_as"]]
    vca.save(model, args.out, label_names=model.label_names, training=history, dtype=dtype)
    write_card(args.out)
    return f"the mean of {len(shown)} checkpoints: top-1 {reached['top1']:.2f} % on {reached['images']} images"


if __name__ == "__main__":
    interruptible(main)
