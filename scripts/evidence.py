"""Writes the tables and their curves into docs/evidence.md from the published logs.

    python -m scripts.evidence
    python -m scripts.evidence --publish scenes-generators weights/NAME weights/TWIN  # what was measured of generators

`docs/evidence/NAME.json` is the `log.json` of a `training.compare`, or what `training.quality` measured of generators.
The page holds its table, and the curves of a comparison or of generators at several steps, `docs/evidence/NAME.png`,
between the lines `<!-- NAME -->` and `<!-- end -->`; without such a log it says so there.
"""

import argparse
import json
import re
from pathlib import Path

from training.core.comparison_report import draw_curves, table
from training.core.generator_card import deviation
from training.core.plots import save_figure
from vca.checkpoint import write_atomically
from vca.config import read_config

FOLDER = Path(__file__).parents[1] / "docs" / "evidence"
PAGE = FOLDER.with_suffix(".md")
NOT_RUN = "*This has not been run to its end yet.*"


def read_logs() -> dict[str, dict]:
    return {file.stem: json.loads(file.read_text()) for file in sorted(FOLDER.glob("*.json"))}


def section(name: str, log: dict) -> str:
    """What the page shows of a log."""
    if "generators" not in log:
        return f"{table(log)}\n\n![The curves of every run](evidence/{name}.png)"
    curve = f"\n\n![Quality against steps](evidence/{name}.png)" if curves_of(log) else ""
    return generators(log) + curve


def publish(name: str, checkpoints: list[Path]) -> None:
    """Writes what was measured of generators into `docs/evidence/NAME.json`."""
    kept = {}
    for folder in checkpoints:
        config = read_config(folder)
        run = {key: config["training"][-1][key] for key in ("command", "steps", "results")}
        kept[folder.name] = dict(architecture=config["architecture"], **run)
    write_atomically(FOLDER / f"{name}.json", json.dumps(dict(generators=kept), indent=1).encode())


def curves_of(log: dict) -> dict[str, list[tuple[int, dict]]]:
    """What was measured of each architecture of a log at each guidance scale, with its steps, in their order; without
    those that were measured at one number of steps alone."""
    curves: dict[str, list[tuple[int, dict]]] = {}
    for run in sorted(log["generators"].values(), key=lambda run: run["steps"]):
        for row in run["results"]["quality"]["guidance"]:
            name = f"{run.get('architecture')}, guidance {row['guidance']:g}"
            curves.setdefault(name, []).append((run["steps"], row))
    return {name: points for name, points in curves.items() if len({steps for steps, _ in points}) > 1}


def draw_steps(curves: dict[str, list[tuple[int, dict]]], file: Path) -> None:
    """Draws the distance and the recognition of `curves_of` against the steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    numbers = dict(frechet_distance="Fréchet distance on the judge's features", recognised="recognized (%)")
    for axis, (key, title) in zip(axes, numbers.items(), strict=True):
        axis.set(xlabel="step", ylabel=title)
        for name, points in curves.items():
            axis.plot([steps for steps, _ in points], [row[key] for _, row in points], marker=".", label=name)
    axes[0].legend()
    save_figure(figure, file)


def generators(log: dict) -> str:
    """A table of generators at every guidance scale."""
    runs = log["generators"]
    numbers = dict(
        recognised="recognized (%)", frechet_distance="Fréchet distance", precision="precision (%)", recall="recall (%)"
    )
    measured = [row for run in runs.values() for row in run["results"]["quality"]["guidance"]]
    numbers = {key: title for key, title in numbers.items() if all(key in row for row in measured)}
    lines = [f"| generator | steps | validation loss | guidance | {' | '.join(numbers.values())} |"]
    lines.append("|---" * (4 + len(numbers)) + "|")
    for name, run in runs.items():
        for row in run["results"]["quality"]["guidance"]:
            cells = [f"{row[key]:.1f}{deviation(row, key)}" for key in numbers]
            loss = f"{run['results']['val_loss']:.4f}"
            lines.append(f"| `{name}` | {run['steps']:,} | {loss} | {row['guidance']:g} | {' | '.join(cells)} |")
    real = next(iter(runs.values()))["results"]["quality"]["held_out"]
    lines.append(f"| {real['images']:,} real images | | | | {' | '.join(f'{real[key]:.1f}' for key in numbers)} |")
    return "\n".join(lines)


def sections(logs: dict[str, dict]) -> dict[str, str]:
    """What stands between the marks of the page."""
    return {name: section(name, log) for name, log in logs.items()}


def fill(page: str, sections: dict[str, str]) -> str:
    """The text of a page with sections between their marks, and `NOT_RUN` where there is none.

    Raises:
        ValueError: a mark has no end.
    """

    def replaced(match: re.Match) -> str:
        name = match[1]
        return f"<!-- {name} -->\n{sections.get(name, NOT_RUN)}\n<!-- end -->"

    begun = len(re.findall(r"^<!-- (?!end -->)[\w-]+ -->$", page, re.M))
    filled, count = re.subn(r"^<!-- (?!end -->)([\w-]+) -->\n.*?^<!-- end -->$", replaced, page, flags=re.M | re.S)
    if count != begun:
        raise ValueError("a mark has no <!-- end -->.")
    return filled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--publish", metavar="NAME", help="of the log that the checkpoints make")
    parser.add_argument("checkpoints", nargs="*", type=Path, help="folders of generators")
    args = parser.parse_args()
    if args.publish:
        publish(args.publish, args.checkpoints)
    logs = read_logs()
    write_atomically(PAGE, fill(PAGE.read_text(encoding="utf-8"), sections(logs)).encode())
    for name, log in logs.items():
        if "generators" not in log:
            draw_curves(log, FOLDER / f"{name}.png")
        elif curves := curves_of(log):
            draw_steps(curves, FOLDER / f"{name}.png")


if __name__ == "__main__":
    main()
