"""What is compared of runs that differ in their attention, by the command that trained them: table and curves."""

import json
import os
import statistics
from collections.abc import Callable
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open

import vca
from training.core import cost
from training.core.classifier_recipe import ClassifierRecipe
from training.core.recipe import BaseRecipe, defaults
from training.core.run import MAY_DIFFER, RunError
from training.core.transfer_recipe import TransferRecipe
from vca.extras import import_extra

CONTROL = "mhsa_dwc"  # all other kinds are compared with the first and with this one


class Run(NamedTuple):
    """One kind of attention, such as "mhsa" or "vca:tokens=emb", with one seed; `task` is a key of `TASKS`."""

    kind: str
    seed: int
    task: str
    recipe: BaseRecipe
    folder: Path
    teacher: str | None = None

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    @property
    def finished(self) -> bool:
        """Whether it was trained to its end.

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
        best, digits: max or min; and how many digits of it are shown.
        column: its name in the table.
        shared: run -> what the log says of all runs, which must be the same for each.
        own: run -> what the log says of one, beside kind, seed, pace and loss; the metric as [[when, value], ...].
        title: log -> what the table shows.
        columns: (log, runs of one kind, seconds a step) -> the last columns of the table by their names.
        panels: labels and scale of the axes, and (run of a log, minutes that it took) -> points of its curve.
    """

    recipe: type[BaseRecipe]
    metric: str
    best: Callable
    digits: int
    column: str
    shared: Callable[[Run], dict]
    own: Callable[[Run], dict]
    title: Callable[[dict], str]
    columns: Callable[[dict, list[dict], float], dict[str, str]]
    panels: list[tuple[str, str, str, Callable[[dict, float], list]]]


def _accuracy_shared(run: Run) -> dict:
    recipe, last = run.recipe, run.evaluations()[-1]
    names = dict(model=recipe.model, dataset=_dataset(run.trained()), epochs=recipe.epochs)
    return names | dict(steps=last["step"], images=last["images"])


def _accuracy_own(run: Run) -> dict:
    return dict(parameters=run.parameters(), top1=[[line["epoch"], line["top1"]] for line in run.evaluations()])


def _error_shared(run: Run) -> dict:
    """`images` are those held out, on which the errors are measured."""
    recipe, last, trained = run.recipe, run.evaluations()[-1], run.trained()
    names = dict(model=recipe.model, teacher=trained["teacher"], dataset=_dataset(trained))
    sizes = dict(img_sizes=sorted(set(recipe.img_sizes)), batch_size=recipe.batch_size)
    return names | sizes | dict(steps=last["step"], images=last["images"])


def _error_own(run: Run) -> dict:
    """Errors by images seen, `error` being that at the largest size; parameters are those of the attention layers."""
    lines, model, macs = run.evaluations(), vca.load(run.checkpoint), {}
    for side in sorted(set(run.recipe.img_sizes)):
        model.set_input_size(img_size=side)
        macs[str(side)], _ = cost.trace(model, run.recipe)
    keys = ["error", *(f"error_{side}" for side in macs)]
    curves = {key: [[line["step"] * run.recipe.batch_size, line[key]] for line in lines] for key in keys}
    return dict(parameters=run.parameters(".attn."), macs=macs, **curves, by_block=lines[-1]["by_block"])


def _error_columns(log: dict, runs: list[dict], seconds: float) -> dict[str, str]:
    *smaller, _ = log["img_sizes"]
    errors = {f"at {side} px": _spread([run[f"error_{side}"][-1][1] for run in runs], 4) for side in smaller}
    macs = {f"G multiply-adds at {side} px": f"{count / 1e9:.3f}" for side, count in runs[0]["macs"].items()}
    parameters = {"parameters of the attention": f"{runs[0]['parameters']:,}"}
    return errors | parameters | macs | {"s/step": f"{seconds:.3g}"}


def _dataset(trained: dict) -> str:
    """That of the recipe, if the images were those."""
    return trained["recipe"]["dataset"] or "own data"


def _by_time(curve: list, minutes: float) -> list:
    return [[minutes * when / curve[-1][0], value] for when, value in curve]


TASKS = {
    "classify": Task(
        ClassifierRecipe, "top1", max, 2, "top-1", _accuracy_shared, _accuracy_own,
        title=lambda log: f"{log['model']} on {log['dataset']}, {log['epochs']} epochs: top-1 in percent on "
        f"{log['images']:,} images",
        columns=lambda log, runs, seconds: {
            "parameters": f"{runs[0]['parameters']:,}",
            "s/epoch": f"{seconds * log['steps'] / log['epochs']:.0f}",
        },
        panels=[
            ("step", "training loss", "linear", lambda run, _: run["loss"]),
            ("epoch", "top-1 (%)", "linear", lambda run, _: run["top1"]),
            ("minutes of training", "top-1 (%)", "linear", lambda run, minutes: _by_time(run["top1"], minutes)),
        ],
    ),
    "transfer": Task(
        TransferRecipe, "error", min, 4, "error", _error_shared, _error_own,
        title=lambda log: f"{log['model']} taught by {log['teacher']} on {log['dataset']}, {log['steps']} steps of "
        f"{log['batch_size']} images: mean relative error of the attention layers on {log['images']:,} held-out images "
        f"of {log['img_sizes'][-1]} px",
        columns=_error_columns,
        panels=[
            ("images seen", "relative error", "log", lambda run, _: run["error"]),
            ("minutes of training", "relative error", "log", lambda run, minutes: _by_time(run["error"], minutes)),
            ("block", "relative error", "linear", lambda run, _: list(enumerate(run["by_block"], 1))),
        ],
    ),
}  # fmt: skip


def results(runs: list[Run]) -> dict:
    """What `table` and `draw_curves` need of finished runs, in a form small enough to be published with them.

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
    return dict(task=runs[0].task) | shared | dict(runs=[_result(run, task) for run in runs])


def _result(run: Run, task: Task) -> dict:
    train = [line for line in run.log() if "lr" in line]
    pace = [(b["seconds"] - a["seconds"]) / (b["step"] - a["step"]) for a, b in pairwise(train)]
    seconds = statistics.median(pace or [train[-1]["seconds"] / train[-1]["step"]])
    loss = [[line["step"], round(line["loss"], 4)] for line in train[:: max(1, len(train) // 50)]]
    return dict(kind=run.kind, seed=run.seed, seconds_per_step=round(seconds, 4), **task.own(run), loss=loss)


def table(log: dict) -> str:
    """A Markdown table of `results`: mean and spread over the seeds, and paired tests; the best kind comes first.

    The test is Student's t on the differences of runs with the same seed, two-sided; it needs two seeds or more. The
    time is that of the seed that was least disturbed by other work.
    """
    task, by_kind = TASKS[log["task"]], _by_kind(log)
    values = {kind: [run[task.metric][-1][1] for run in runs] for kind, runs in by_kind.items()}
    first, *others = by_kind
    references = [first, *[CONTROL] * (CONTROL in others)]
    rows = []
    for kind in sorted(by_kind, key=lambda kind: statistics.mean(values[kind]), reverse=task.best is max):
        row = {"attention": kind, task.column: _spread(values[kind], task.digits)}
        row["each seed"] = " ".join(f"{value:.{task.digits}f}" for value in values[kind])
        for other in references:
            difference = _difference(values[kind], values[other], task.digits)
            row[f"against {other} (p)"] = "" if kind == other else difference
        rows.append(row | task.columns(log, by_kind[kind], _pace(by_kind[kind])))
    seeds = ", ".join(str(run["seed"]) for run in by_kind[first])
    over = f"mean and standard deviation over the seeds {seeds}" if "," in seeds else f"seed {seeds}"
    lines = [
        f"{task.title(log)}, {over}; best first.",
        "",
        f"| {' | '.join(rows[0])} |",
        "|---" * len(rows[0]) + "|",
        *(f"| {' | '.join(row.values())} |" for row in rows),
    ]
    return "\n".join(lines)


def _by_kind(log: dict) -> dict[str, list[dict]]:
    kinds = {}
    for run in log["runs"]:
        kinds.setdefault(run["kind"], []).append(run)
    return kinds


def _pace(runs: list[dict]) -> float:
    """Seconds a step of the least disturbed run of one kind."""
    return min(run["seconds_per_step"] for run in runs)


def _spread(values: list[float], digits: int) -> str:
    """Mean and, of several, standard deviation."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def _difference(values: list[float], reference: list[float], digits: int) -> str:
    """Mean and spread of the differences of paired runs, and the p-value of the paired t-test."""
    differences = [a - b for a, b in zip(values, reference, strict=True)]
    text = f"{statistics.mean(differences):+.{digits}f}"
    if len(values) < 2 or len(set(differences)) == 1:
        return text
    p = import_extra("scipy.stats", "train").ttest_rel(values, reference).pvalue
    return f"{text} ± {statistics.stdev(differences):.{digits}f} ({'< 0.001' if p < 0.001 else f'{p:.3f}'})"


def draw_curves(log: dict, file: Path) -> None:
    """Draws the panels of a task from `results`: a line for each run, a colour for each kind."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    task, by_kind = TASKS[log["task"]], _by_kind(log)
    figure, axes = plt.subplots(1, len(task.panels), figsize=(13, 4.5), layout="constrained")
    colors = plt.get_cmap("tab20" if len(by_kind) > 10 else "tab10").colors
    for axis, (x, y, scale, points) in zip(axes, task.panels, strict=True):
        axis.set(xlabel=x, ylabel=y, yscale=scale)
        for (kind, runs), color in zip(by_kind.items(), colors, strict=False):
            minutes = _pace(runs) * log["steps"] / 60
            for run in runs:
                curve = points(run, minutes)
                marker = "." if len(curve) < 20 else ""
                axis.plot(*zip(*curve, strict=True), color=color, marker=marker, linewidth=1, label=kind)
    of_kind = dict(zip(*reversed(axes[0].get_legend_handles_labels()), strict=True))
    figure.legend(of_kind.values(), of_kind.keys(), loc="outside upper center", ncols=min(len(of_kind), 4))
    temporary = file.with_suffix(".tmp")
    figure.savefig(temporary, format="png", dpi=120)
    plt.close(figure)
    os.replace(temporary, file)
