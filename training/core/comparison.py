"""What is compared of runs that differ in their attention, by the command that trained them, as one log."""

import json
import statistics
from collections.abc import Callable
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import nn
from torch.utils.benchmark import Timer

import vca
from training.core import cost
from training.core.classifier_recipe import ClassifierRecipe
from training.core.precision import autocast
from training.core.recipe import BaseRecipe, defaults
from training.core.run import MAY_DIFFER, RunError
from training.core.transfer_recipe import TransferRecipe
from vca.models.common import input_size

PASS_IMAGES = 8  # in a pass that is timed


class Run(NamedTuple):
    """One kind of attention, such as "mhsa" or "vca:tokens=emb", with one seed.

    Attributes:
        task: a key of `TASKS`, and the name of the command that trains it.
        arguments: of that command, without --out.
        teacher: that of a transfer.
        finetuned: the run that goes on with its checkpoint on labeled images, if one shall.
    """

    kind: str
    seed: int
    task: str
    recipe: BaseRecipe
    folder: Path
    arguments: list[str]
    teacher: str | None = None
    finetuned: "Run | None" = None

    @property
    def parts(self) -> list["Run"]:
        """Itself, and the run after it."""
        return [self, self.finetuned] if self.finetuned else [self]

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    @property
    def finished(self) -> bool:
        """Whether all its parts were trained to their end; errors as `trained_alone`."""
        return all(part.trained_alone for part in self.parts)

    @property
    def trained_alone(self) -> bool:
        """Whether it was trained to its end, whatever comes after it.

        Raises:
            RunError: the folder holds a run of another recipe or teacher.
        """
        file = self.folder / "recipe.json"
        if not file.exists():
            return False
        old = defaults(type(self.recipe)) | json.loads(file.read_text())
        asked = asdict(self.recipe) | (dict(teacher=self.teacher) if self.teacher else {})
        if changed := [key for key, value in asked.items() if key not in MAY_DIFFER and old.get(key) != value]:
            raise RunError(f"{self.folder} holds a run with another {', '.join(changed)}; choose another --out.")
        return (self.checkpoint / "config.json").exists()

    def log(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "log.jsonl").read_text().splitlines()]

    def evaluations(self) -> list[dict]:
        return [line for line in self.log() if TASKS[self.task].metric in line]

    def trained(self) -> dict:
        """What its checkpoint says of how it was trained."""
        return json.loads((self.checkpoint / "config.json").read_text())["training"][-1]

    def parameters(self, part: str = "") -> int:
        """The number of parameters whose names contain `part`."""
        with safe_open(self.checkpoint / "model.safetensors", framework="pt") as stored:
            names = [name for name in stored.keys() if part in name]  # noqa: SIM118
            return sum(torch.Size(stored.get_slice(name).get_shape()).numel() for name in names)


class Task(NamedTuple):
    """What the runs of one training command have to show; a log is what `results` makes of them.

    Attributes:
        recipe: the keys of its recipes.
        metric: key of the number compared, in the log of a run and in a run of a log.
        shared: run -> what the log says of all runs, which must be the same for each.
        own: (run, device) -> what the log says of one, beside kind, seed, pace and loss; the metric as
            [[when, value], ...].
    """

    recipe: type[BaseRecipe]
    metric: str
    shared: Callable[[Run], dict]
    own: Callable[[Run, torch.device], dict]


def _accuracy_shared(run: Run) -> dict:
    recipe, last = run.recipe, run.evaluations()[-1]
    names = dict(model=recipe.model, dataset=_dataset(run.trained()), epochs=recipe.epochs)
    return names | dict(steps=last["step"], images=last["images"])


def _accuracy_own(run: Run, _: torch.device) -> dict:
    return dict(parameters=run.parameters(), top1=_accuracies(run))


def _accuracies(run: Run) -> list:
    return [[line["epoch"], line["top1"]] for line in run.evaluations()]


def _error_shared(run: Run) -> dict:
    """`images` are those held out, on which the errors are measured; `finetuned` is shared by what comes after."""
    recipe, last, trained = run.recipe, run.evaluations()[-1], run.trained()
    names = dict(model=recipe.model, teacher=trained["teacher"], dataset=_dataset(trained))
    counts = dict(batch_size=recipe.batch_size, steps=last["step"], images=last["images"])
    return names | counts | (dict(finetuned=_accuracy_shared(run.finetuned)) if run.finetuned else {})


def _error_own(run: Run, device: torch.device) -> dict:
    """Errors by images seen, `error` being that at the largest size; parameters are those of the attention layers.

    `macs` are the multiply-adds of a forward pass, and `ms` its milliseconds, for an image of each size in pixels.
    """
    lines, model, macs, ms = run.evaluations(), vca.load(run.checkpoint), {}, {}
    for side in sorted(set(run.recipe.img_sizes)):
        model.set_input_size(img_size=side)
        macs[str(side)], _ = cost.trace(model, run.recipe)
        ms[str(side)] = round(1000 * seconds_of_a_pass(model, device, run.recipe.precision) / PASS_IMAGES, 3)
        model.cpu()
    keys = ["error", *(f"error_{side}" for side in macs)]
    curves = {key: [[line["step"] * run.recipe.batch_size, line[key]] for line in lines] for key in keys}
    after = dict(top1=_accuracies(run.finetuned)) if run.finetuned else {}
    sizes = dict(parameters=run.parameters(".attn."), macs=macs, ms=ms)
    return sizes | curves | dict(by_block=lines[-1]["by_block"]) | after


@torch.no_grad()
def seconds_of_a_pass(model: nn.Module, device: torch.device, precision: str) -> float:
    """Seconds of a forward pass of `PASS_IMAGES` images of noise: the fastest of half a second of them, or of one."""
    model.eval().to(device)
    images = torch.randn(PASS_IMAGES, *input_size(model), device=device)
    timer = Timer("model(images)", globals=dict(model=model, images=images), num_threads=torch.get_num_threads())
    with autocast(device, precision):
        return min(timer.blocked_autorange(min_run_time=0.5).times)


def _dataset(trained: dict) -> str:
    """That of the recipe, if the images were those."""
    return trained["recipe"]["dataset"] or "own data"


TASKS = {
    "classify": Task(ClassifierRecipe, "top1", _accuracy_shared, _accuracy_own),
    "transfer": Task(TransferRecipe, "error", _error_shared, _error_own),
}


def results(runs: list[Run], device: torch.device) -> dict:
    """What `training.core.comparison_report` needs of finished runs, small enough to be published with its table.

    Args:
        device: where passes are timed.

    Returns:
        `task`, what its `shared` says, and `runs`, for each one its `kind`, `seed`, `seconds_per_step` (the median over
        its log), `loss` [[step, loss], ...], thinned to at most 50 points, and what its `own` says.

    Raises:
        RunError: they were not all trained alike.
    """
    task = TASKS[runs[0].task]
    shared = task.shared(runs[0])
    for run in runs[1:]:
        if changed := [key for key, value in task.shared(run).items() if value != shared[key]]:
            raise RunError(f"{run.folder} and {runs[0].folder} differ in {', '.join(changed)}; choose another --out.")
    return dict(task=runs[0].task) | shared | dict(runs=[_result(run, task, device) for run in runs])


def _result(run: Run, task: Task, device: torch.device) -> dict:
    train = [line for line in run.log() if "lr" in line]
    pace = [(b["seconds"] - a["seconds"]) / (b["step"] - a["step"]) for a, b in pairwise(train)]
    seconds = statistics.median(pace or [train[-1]["seconds"] / train[-1]["step"]])
    loss = [[line["step"], round(line["loss"], 4)] for line in train[:: max(1, len(train) // 50)]]
    about = dict(kind=run.kind, seed=run.seed, seconds_per_step=round(seconds, 4))
    return about | task.own(run, device) | dict(loss=loss)
