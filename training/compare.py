"""One recipe over kinds of attention and seeds: trains what is not trained yet, then draws the table and the curves.

    python -m training.compare cifar10_compare --data FOLDER --kinds mhsa,mhsa_dwc,agent,vca --seeds 0,1,2
    python -m training.compare cifar10_compare --out runs/compare --kinds mhsa,vca --seeds 0,1 --report

The same command goes on where it was interrupted. Runs are `OUT/KIND-seedN`, what they print is `OUT/KIND-seedN.txt`;
--jobs trains several at a time, on as many GPUs as there are. Recipe, seeds, data order and budget are the same for all
kinds. `table.md` (also printed) and `curves.png` are made from the runs' logs alone, with --report without training.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import torch
from safetensors import safe_open

from training import recipe as recipes
from training.classify import Recipe
from training.engine import RunError
from vca.checkpoint import write_atomically
from vca.controls import KINDS


class Run(NamedTuple):
    """One kind of attention with one seed."""

    kind: str
    seed: int
    recipe: Recipe
    folder: Path

    @property
    def finished(self) -> bool:
        """Whether it was trained to its end.

        Raises:
            RunError: the folder holds a run of another recipe.
        """
        file = self.folder / "recipe.json"
        if not file.exists():
            return False
        old = recipes.defaults(Recipe) | json.loads(file.read_text())
        if changed := [key for key, value in asdict(self.recipe).items() if old.get(key) != value]:
            raise RunError(f"{self.folder} holds a run with another {', '.join(changed)}; choose another --out.")
        return (self.folder / "checkpoint" / "config.json").exists()

    def log(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "log.jsonl").read_text().splitlines()]


def train_all(runs: list[Run], arguments: list[str], jobs: int) -> None:
    """Trains the unfinished runs, `jobs` at a time, each in a process of its own.

    Raises:
        RunError: some failed; the message names them.
    """
    gpus = SimpleQueue()
    for job in range(jobs):
        gpus.put(job % max(1, torch.cuda.device_count()))
    processes, failed = [], []

    def train(run: Run) -> None:
        gpu = gpus.get()
        given = ["--out", str(run.folder), "--attention", run.kind, "--seed", str(run.seed)]
        visible = os.environ | ({"CUDA_VISIBLE_DEVICES": str(gpu)} if torch.cuda.device_count() > 1 else {})
        with open(run.folder.with_suffix(".txt"), "a") as output:
            command = [sys.executable, "-m", "training.classify", *arguments, *given]
            process = subprocess.Popen(command, env=visible, stdout=output, stderr=subprocess.STDOUT)
            processes.append(process)
            print(f"{run.folder}: {'done' if process.wait() == 0 else 'FAILED'}", flush=True)
        if process.returncode:
            failed.append(run.folder.with_suffix(".txt"))
        gpus.put(gpu)

    def stop(*_) -> None:
        for process in processes:
            process.terminate()  # which saves its state
        os._exit(0)

    at_sigterm = signal.signal(signal.SIGTERM, stop)
    try:
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(train, runs))
    except KeyboardInterrupt:
        stop()
    finally:
        signal.signal(signal.SIGTERM, at_sigterm)
    if failed:
        raise RunError(f"{len(failed)} of {len(runs)} runs failed; see {', '.join(map(str, failed))}.")


def table(runs: list[Run]) -> str:
    """A Markdown table of finished runs: mean and spread over the seeds, and a paired test against the first kind.

    The test is Student's t on the differences of runs with the same seed, two-sided; it needs two seeds or more.
    """
    kinds = list(dict.fromkeys(run.kind for run in runs))
    top1 = {kind: [_result(run)["top1"] for run in runs if run.kind == kind] for kind in kinds}
    seeds, recipe = len(top1[kinds[0]]), runs[0].recipe
    lines = [
        f"{recipe.model} on {recipe.dataset}, {recipe.epochs} epochs, seeds "
        f"{', '.join(str(run.seed) for run in runs if run.kind == kinds[0])}: top-1 in percent on "
        f"{_result(runs[0])['images']:,} images, mean and standard deviation over the seeds.",
        "",
        f"| attention | parameters | top-1 | each seed | against {kinds[0]}, same seed | p (paired t) | s/epoch |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind in kinds:
        first = next(run for run in runs if run.kind == kind)
        spread = f" ± {statistics.stdev(top1[kind]):.2f}" if seeds > 1 else ""
        cells = [
            kind, f"{_parameters(first):,}", f"{statistics.mean(top1[kind]):.2f}{spread}",
            " ".join(f"{value:.2f}" for value in top1[kind]), *_against(top1[kind], top1[kinds[0]]),
            f"{statistics.mean(_seconds(run) for run in runs if run.kind == kind) / recipe.epochs:.0f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _against(values: list[float], reference: list[float]) -> tuple[str, str]:
    """Mean difference of paired runs, and the p-value of the paired t-test; empty for the reference itself."""
    if values is reference:
        return "", ""
    differences = [a - b for a, b in zip(values, reference, strict=True)]
    text = f"{statistics.mean(differences):+.2f}"
    if len(values) < 2 or len(set(differences)) == 1:
        return text, ""
    from scipy.stats import ttest_rel

    return f"{text} ± {statistics.stdev(differences):.2f}", f"{ttest_rel(values, reference).pvalue:.3f}"


def _result(run: Run) -> dict:
    return [line for line in run.log() if "top1" in line][-1]


def _seconds(run: Run) -> float:
    return [line for line in run.log() if "seconds" in line][-1]["seconds"]


def _parameters(run: Run) -> int:
    with safe_open(run.folder / "checkpoint" / "model.safetensors", framework="pt") as stored:
        return sum(torch.Size(stored.get_slice(key).get_shape()).numel() for key in stored.keys())  # noqa: SIM118


def draw_curves(runs: list[Run], file: Path) -> None:
    """Draws top-1 and training loss by epoch: a line for each run, a colour for each kind."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (loss_axis, top1_axis) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    kinds = list(dict.fromkeys(run.kind for run in runs))
    colours = dict(zip(kinds, plt.get_cmap("tab10").colors, strict=False))
    for run in runs:
        label = run.kind if run is next(other for other in runs if other.kind == run.kind) else None
        style = dict(color=colours[run.kind], label=label, linewidth=1)
        train = [line for line in run.log() if "lr" in line]
        loss_axis.plot([line["step"] for line in train], [line["loss"] for line in train], alpha=0.6, **style)
        val = [line for line in run.log() if "top1" in line]
        top1_axis.plot([line["epoch"] for line in val], [line["top1"] for line in val], marker=".", **style)
    loss_axis.set(xlabel="step", ylabel="training loss")
    top1_axis.set(xlabel="epoch", ylabel="top-1 (%)")
    top1_axis.legend()
    temporary = file.with_suffix(".tmp")
    figure.savefig(temporary, format="png", dpi=120)
    plt.close(figure)
    os.replace(temporary, file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a classification recipe")
    parser.add_argument("--data", metavar="FOLDER")
    parser.add_argument("--out", type=Path, help="default runs/compare-RECIPE")
    parser.add_argument("--kinds", default="mhsa,mhsa_dwc,agent,vca", help=f"some of {', '.join(KINDS)}")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--device", help="device of the runs")
    parser.add_argument("--report", action="store_true", help="train nothing, draw what is finished")
    recipes.add_arguments(parser, Recipe)
    args = parser.parse_args()
    out = args.out or Path("runs") / f"compare-{Path(args.recipe).stem}"
    given = {field.name: getattr(args, field.name) for field in fields(Recipe)}
    try:
        arguments = [args.recipe, *_flags(given | dict(data=args.data, device=args.device))]
        runs = []
        for seed in _numbers(args.seeds):
            for kind in args.kinds.split(","):
                if kind not in KINDS:
                    raise RunError(f"--kinds: {kind!r} is none of {', '.join(KINDS)}.")
                recipe = recipes.read(args.recipe, Recipe, given | dict(attention=kind, seed=str(seed)))
                runs.append(Run(kind, seed, recipe, out / f"{kind}-seed{seed}"))
        if not args.report:
            if not args.data:
                parser.error("--data is needed (or --report).")
            out.mkdir(parents=True, exist_ok=True)
            train_all([run for run in runs if not run.finished], arguments, max(1, args.jobs))
        if not (finished := _whole_seeds(runs)):
            raise RunError(f"{out}: no seed has been trained with all kinds yet.")
        text = table(finished)
        write_atomically(out / "table.md", f"{text}\n".encode())
        draw_curves(finished, out / "curves.png")
    except (recipes.RecipeError, RunError, OSError) as error:
        sys.exit(f"error: {error}")
    print(text)


def _flags(values: dict[str, str | None]) -> list[str]:
    return [f"--{key.replace('_', '-')}={value}" for key, value in values.items() if value is not None]


def _numbers(text: str) -> list[int]:
    if not all(part.isdecimal() for part in text.split(",")):
        raise RunError(f"--seeds {text}: must be numbers such as 0,1,2.")
    return [int(part) for part in text.split(",")]


def _whole_seeds(runs: list[Run]) -> list[Run]:
    """The runs of those seeds that all kinds have finished, since only they can be compared."""
    unfinished = {run.seed for run in runs if not run.finished}
    return [run for run in runs if run.seed not in unfinished]


if __name__ == "__main__":
    main()
