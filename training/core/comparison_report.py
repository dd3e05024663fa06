"""Table and curves of a comparison, from its log alone (`training.core.comparison.results`)."""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from training.core.plots import save_figure
from vca.extras import import_extra

CONTROL = "mhsa_dwc"  # all other kinds are compared with the first and with this one


class Measure(NamedTuple):
    """A number that runs are compared by: key of a run in a log, max or min, digits shown, and name in the table."""

    key: str
    best: Callable
    digits: int
    column: str


class Report(NamedTuple):
    """How a log of one training command is shown.

    Attributes:
        measures: the first ranks the kinds; of the others a log may lack some.
        title: log -> what the table shows.
        columns: (log, runs of one kind, seconds a step) -> the last columns of the table by their names.
        more: (log, kinds, best first) -> what follows the table.
        panels: labels and scale of the axes, and (run, runs of its kind, minutes that it took) -> points of its curve.
    """

    measures: list[Measure]
    title: Callable[[dict], str]
    columns: Callable[[dict, list[dict], float], dict[str, str]]
    more: Callable[[dict, list[str]], list[str]]
    panels: list[tuple[str, str, str, Callable[[dict, list[dict], float], list]]]


def _accuracy_title(log: dict) -> str:
    images = f"top-1 in percent on {log['images']:,} images"
    return f"{log['model']} on {log['dataset']}, {log['epochs']} epochs: {images}"


def _accuracy_columns(log: dict, runs: list[dict], seconds: float) -> dict[str, str]:
    per_epoch = seconds * log["steps"] / log["epochs"]
    return {"parameters": f"{runs[0]['parameters']:,}", "s/epoch": f"{per_epoch:.0f}"}


def _error_title(log: dict) -> str:
    largest = sorted({list(run["macs"])[-1] for run in log["runs"]}, key=int)
    size = f"{largest[0]} px" if len(largest) == 1 else "the largest size of each row"
    text = (
        f"{log['model']} taught by {log['teacher']} on {log['dataset']}, {log['steps']} steps of {log['batch_size']} "
    )
    text += f"images: mean relative error of the attention layers on {log['images']:,} held-out images of {size}"
    if after := log.get("finetuned"):
        epochs = f"{after['epochs']} epoch{'s' * (after['epochs'] > 1)}"
        text += f"; top-1 in percent on {after['images']:,} images after {epochs} of fine-tuning on {after['dataset']}"
    return text


def _error_columns(log: dict, runs: list[dict], seconds: float) -> dict[str, str]:
    sides = [list(run["macs"]) for run in log["runs"]]
    columns = {}
    for side in sorted({side for *smaller, _ in sides for side in smaller}, key=int):
        errors = [run[f"error_{side}"][-1][1] for run in runs if side in run["macs"]]
        columns[f"at {side} px"] = _spread(errors, 4) if errors else ""
    columns["parameters of the attention"] = f"{runs[0]['parameters']:,}"
    for side in sorted({side for own in sides for side in own}, key=int):
        there = side in runs[0]["macs"]
        columns[f"G multiply-adds at {side} px"] = f"{runs[0]['macs'][side] / 1e9:.3f}" if there else ""
        columns[f"ms/image at {side} px"] = f"{_ms(runs, side):.2f}" if there else ""
    return columns | {"s/step": f"{seconds:.3g}"}


def _by_block(log: dict, kinds: list[str]) -> list[str]:
    """A table of the error in every block, counted from 0 as by `blocks=`; mean over the seeds."""
    rows, by_kind = [], _by_kind(log)
    for kind in kinds:
        errors = map(statistics.mean, zip(*(run["by_block"] for run in by_kind[kind]), strict=True))
        rows.append({"block": kind} | {str(index): f"{error:.3f}" for index, error in enumerate(errors)})
    return ["", "The error by block:", "", *_markdown(rows)]


def _by_time(curve: list, minutes: float) -> list:
    return [[minutes * when / curve[-1][0], value] for when, value in curve]


def _by_pass(run: dict, runs: list[dict]) -> list:
    *_, side = run["ms"]
    return [[_ms(runs, side), run["error"][-1][1]]]


def _ms(runs: list[dict], side: str) -> float:
    """Milliseconds of a pass of a kind, by the seed that was least disturbed by other work."""
    return min(run["ms"][side] for run in runs)


REPORTS = {
    "classify": Report(
        [Measure("top1", max, 2, "top-1")],
        _accuracy_title,
        _accuracy_columns,
        more=lambda log, kinds: [],
        panels=[
            ("step", "training loss", "linear", lambda run, *_: run["loss"]),
            ("epoch", "top-1 (%)", "linear", lambda run, *_: run["top1"]),
            ("minutes of training", "top-1 (%)", "linear", lambda run, _, minutes: _by_time(run["top1"], minutes)),
        ],
    ),
    "transfer": Report(
        [Measure("error", min, 4, "error"), Measure("top1", max, 2, "top-1 after fine-tuning")],
        _error_title,
        _error_columns,
        more=_by_block,
        panels=[
            ("images seen", "relative error", "log", lambda run, *_: run["error"]),
            ("minutes of training", "relative error", "log", lambda run, _, minutes: _by_time(run["error"], minutes)),
            ("ms of a pass, an image", "relative error", "linear", lambda run, runs, _: _by_pass(run, runs)),
            ("block, from 0", "relative error", "linear", lambda run, *_: list(enumerate(run["by_block"]))),
        ],
    ),
}


def table(log: dict) -> str:
    """A Markdown table of a log: mean and spread over the seeds, and paired differences; the best kind comes first.

    The interval of a difference is that of Student's t on runs with the same seed; it needs two seeds or more. The time
    is that of the seed that was least disturbed by other work.
    """
    report, by_kind = REPORTS[log["task"]], _by_kind(log)
    ranking, *others = [measure for measure in report.measures if measure.key in log["runs"][0]]
    first = next(iter(by_kind))
    final = {kind: statistics.mean(_final(runs, ranking)) for kind, runs in by_kind.items()}
    kinds = sorted(by_kind, key=final.get, reverse=ranking.best is max)
    rows = []
    for kind in kinds:
        values = _final(by_kind[kind], ranking)
        row = {"attention": kind, ranking.column: _spread(values, ranking.digits)}
        row["each seed"] = " ".join(f"{value:.{ranking.digits}f}" for value in values)
        for other in dict.fromkeys([first, *(other for other in by_kind if other == CONTROL)]):
            row[f"against {other} (95 %)"] = _difference(by_kind, kind, other, ranking)
        for measure in others:
            row[measure.column] = _spread(_final(by_kind[kind], measure), measure.digits)
            row[f"{measure.column} against {first} (95 %)"] = _difference(by_kind, kind, first, measure)
        rows.append(row | report.columns(log, by_kind[kind], _pace(by_kind[kind])))
    seeds = ", ".join(str(run["seed"]) for run in by_kind[first])
    over = f"mean and standard deviation over the seeds {seeds}" if "," in seeds else f"seed {seeds}"
    return "\n".join([f"{report.title(log)}, {over}; best first.", "", *_markdown(rows), *report.more(log, kinds)])


def _markdown(rows: list[dict[str, str]]) -> list[str]:
    cells = [rows[0].keys(), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return [f"| {' | '.join(row)} |" if row != cells[1] else f"|{'|'.join(row)}|" for row in cells]


def _by_kind(log: dict) -> dict[str, list[dict]]:
    kinds = {}
    for run in log["runs"]:
        kinds.setdefault(run["kind"], []).append(run)
    return kinds


def _final(runs: list[dict], measure: Measure) -> list[float]:
    return [run[measure.key][-1][1] for run in runs]


def _pace(runs: list[dict]) -> float:
    """Seconds a step of the least disturbed run of one kind."""
    return min(run["seconds_per_step"] for run in runs)


def _spread(values: list[float], digits: int) -> str:
    """Mean and, of several, standard deviation."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def _difference(by_kind: dict[str, list[dict]], kind: str, other: str, measure: Measure) -> str:
    """Mean of the differences of paired runs and its 95 % interval; nothing of a kind to itself."""
    if kind == other:
        return ""
    values, reference = _final(by_kind[kind], measure), _final(by_kind[other], measure)
    differences = [a - b for a, b in zip(values, reference, strict=True)]
    text = f"{statistics.mean(differences):+.{measure.digits}f}"
    if len(set(differences)) == 1:
        return text
    low, high = import_extra("scipy.stats", "train").ttest_rel(values, reference).confidence_interval(0.95)
    return f"{text} ({low:+.{measure.digits}f} to {high:+.{measure.digits}f})"


def draw_curves(log: dict, file: Path) -> None:
    """Draws the panels of a log: a line for each run, a colour for each kind."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    report, by_kind = REPORTS[log["task"]], _by_kind(log)
    count = len(report.panels)
    figure, axes = plt.subplots(1, count, figsize=(13 / 3 * count, 4.5), layout="constrained")
    colors = plt.get_cmap("tab20" if len(by_kind) > 10 else "tab10").colors
    for axis, (x, y, scale, points) in zip(axes, report.panels, strict=True):
        axis.set(xlabel=x, ylabel=y, yscale=scale)
        if scale == "log":
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter(NullFormatter())
        for (kind, runs), color in zip(by_kind.items(), colors, strict=False):
            minutes = _pace(runs) * log["steps"] / 60
            for run in runs:
                curve = points(run, runs, minutes)
                marker = "." if len(curve) < 20 else ""
                axis.plot(*zip(*curve, strict=True), color=color, marker=marker, linewidth=1, label=kind)
    of_kind = dict(zip(*reversed(axes[0].get_legend_handles_labels()), strict=True))
    figure.legend(of_kind.values(), of_kind.keys(), loc="outside upper center", ncols=min(len(of_kind), 4))
    save_figure(figure, file)
