"""One recipe over kinds of attention and seeds: trains what is not trained yet, then draws the table and the curves.

    python -m training.compare cifar10_compare --data FOLDER --kinds mhsa,mhsa_dwc,agent,vca --seeds 0,1,2
    python -m training.compare cifar10_compare --data FOLDER --kinds vca,vca:tokens=emb,vca:dwc=false:pooling=learned
    python -m training.compare cifar10_compare --out runs/compare --kinds mhsa,vca --seeds 0,1 --report

The same command goes on where it was interrupted. Runs are `OUT/KIND-seedN`, what they print is `OUT/KIND-seedN.txt`;
--jobs trains several at a time, on as many GPUs as there are. Recipe, seeds, data order and budget are the same for all
kinds. `log.json` keeps of the runs what `table.md` (also printed) and `curves.png` are made from; --report makes them
without training.
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
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import torch
from safetensors import safe_open

from training.core import recipe as recipes
from training.core.classifier_recipe import ClassifierRecipe
from training.core.run import MAY_DIFFER, RunError
from vca.checkpoint import write_atomically
from vca.extras import import_extra
from vca.layers.factory import KINDS, AttentionConfig

# what a kind may be given after colons
OPTIONS = [field.name for field in fields(AttentionConfig) if field.name not in ("attention", "token_grid")]
CONTROL = "mhsa_dwc"  # all other kinds are compared with the first and with this one


class Run(NamedTuple):
    """One kind of attention, such as "mhsa" or "vca:tokens=emb", with one seed."""

    kind: str
    seed: int
    recipe: ClassifierRecipe
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
        old = recipes.defaults(ClassifierRecipe) | json.loads(file.read_text())
        fixed = {key: value for key, value in asdict(self.recipe).items() if key not in MAY_DIFFER}
        if changed := [key for key, value in fixed.items() if old.get(key) != value]:
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
        given = ["--out", str(run.folder), *_flags(overrides(run.kind)), "--seed", str(run.seed)]
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


def overrides(kind: str) -> dict[str, str]:
    """The recipe keys that "vca:tokens=emb:dwc=false" sets.

    Raises:
        RunError: there is no such kind or option.
    """
    attention, *options = kind.split(":")
    if attention not in KINDS:
        raise RunError(f"--kinds: {attention!r} is none of {', '.join(KINDS)}.")
    for option in options:
        if option.partition("=")[0] not in OPTIONS:
            raise RunError(f"--kinds: {option!r} in {kind!r} is not {'=..., '.join(OPTIONS)}=...")
    return dict(attention=attention) | dict(option.split("=", 1) for option in options)


def results(runs: list[Run]) -> dict:
    """What `table` and `draw_curves` need of finished runs, in a form small enough to be published with them.

    Returns:
        `model`, `dataset`, `epochs`, `steps` (in all) and `images` (evaluated); and `runs`, for each one its `kind`,
        `seed`, `parameters`, `seconds_per_step` (the median over its log), `top1` [[epoch, percent], ...] and `loss`
        [[step, loss], ...], thinned to at most 50 points.
    """
    recipe, (*_, last) = runs[0].recipe, (line for line in runs[0].log() if "top1" in line)
    trained = json.loads((runs[0].folder / "checkpoint" / "config.json").read_text())["training"][-1]
    dataset = trained["recipe"]["dataset"] or "own data"  # the recipe's, if the images were that
    shared = dict(model=recipe.model, dataset=dataset, epochs=recipe.epochs)
    return shared | dict(steps=last["step"], images=last["images"], runs=[_result(run) for run in runs])


def _result(run: Run) -> dict:
    log = run.log()
    train = [line for line in log if "lr" in line]
    pace = [(b["seconds"] - a["seconds"]) / (b["step"] - a["step"]) for a, b in pairwise(train)]
    return dict(
        kind=run.kind,
        seed=run.seed,
        parameters=_parameters(run),
        seconds_per_step=round(statistics.median(pace or [train[-1]["seconds"] / train[-1]["step"]]), 4),
        top1=[[line["epoch"], line["top1"]] for line in log if "top1" in line],
        loss=[[line["step"], round(line["loss"], 4)] for line in train[:: max(1, len(train) // 50)]],
    )


def _parameters(run: Run) -> int:
    with safe_open(run.folder / "checkpoint" / "model.safetensors", framework="pt") as stored:
        return sum(torch.Size(stored.get_slice(key).get_shape()).numel() for key in stored.keys())  # noqa: SIM118


def table(log: dict) -> str:
    """A Markdown table of `results`: mean and spread over the seeds, and paired tests.

    The test is Student's t on the differences of runs with the same seed, two-sided; it needs two seeds or more. The
    time is that of the seed that was least disturbed by other work.
    """
    by_kind = _by_kind(log)
    top1 = {kind: [run["top1"][-1][1] for run in runs] for kind, runs in by_kind.items()}
    first, *others = by_kind
    references = [first, *[CONTROL] * (CONTROL in others)]
    seeds = ", ".join(str(run["seed"]) for run in by_kind[first])
    columns = ["attention", "parameters", "top-1", "each seed", *(f"against {r} (p)" for r in references), "s/epoch"]
    lines = [
        f"{log['model']} on {log['dataset']}, {log['epochs']} epochs, seeds {seeds}: top-1 in percent on "
        f"{log['images']:,} images, mean and standard deviation over the seeds.",
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
    ]
    for kind, runs in by_kind.items():
        spread = f" ± {statistics.stdev(top1[kind]):.2f}" if len(runs) > 1 else ""
        cells = [
            kind, f"{runs[0]['parameters']:,}", f"{statistics.mean(top1[kind]):.2f}{spread}",
            " ".join(f"{value:.2f}" for value in top1[kind]),
            *("" if kind == reference else _difference(top1[kind], top1[reference]) for reference in references),
            f"{_seconds(log, runs) / log['epochs']:.0f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _by_kind(log: dict) -> dict[str, list[dict]]:
    kinds = {}
    for run in log["runs"]:
        kinds.setdefault(run["kind"], []).append(run)
    return kinds


def _seconds(log: dict, runs: list[dict]) -> float:
    """Time of a whole run of one kind, at the pace of the least disturbed one."""
    return min(run["seconds_per_step"] for run in runs) * log["steps"]


def _difference(values: list[float], reference: list[float]) -> str:
    """Mean and spread of the differences of paired runs, and the p-value of the paired t-test."""
    differences = [a - b for a, b in zip(values, reference, strict=True)]
    text = f"{statistics.mean(differences):+.2f}"
    if len(values) < 2 or len(set(differences)) == 1:
        return text
    p = import_extra("scipy.stats", "train").ttest_rel(values, reference).pvalue
    return f"{text} ± {statistics.stdev(differences):.2f} ({'< 0.001' if p < 0.001 else f'{p:.3f}'})"


def draw_curves(log: dict, file: Path) -> None:
    """Draws loss by step and top-1 by epoch and by time, of `results`: a line for each run, a colour for each kind."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (by_step, by_epoch, by_time) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    by_kind = _by_kind(log)
    colors = plt.get_cmap("tab20" if len(by_kind) > 10 else "tab10").colors
    for (kind, runs), color in zip(by_kind.items(), colors, strict=False):
        minutes = _seconds(log, runs) / 60
        for run in runs:
            style = dict(color=color, linewidth=1)
            epochs, top1 = zip(*run["top1"], strict=True)
            by_step.plot(*zip(*run["loss"], strict=True), alpha=0.6, **style)
            by_epoch.plot(epochs, top1, marker=".", label=kind if run is runs[0] else None, **style)
            by_time.plot([minutes * epoch / log["epochs"] for epoch in epochs], top1, marker=".", **style)
    by_step.set(xlabel="step", ylabel="training loss")
    by_epoch.set(xlabel="epoch", ylabel="top-1 (%)")
    by_time.set(xlabel="minutes of training", ylabel="top-1 (%)")
    by_epoch.legend()
    temporary = file.with_suffix(".tmp")
    figure.savefig(temporary, format="png", dpi=120)
    plt.close(figure)
    os.replace(temporary, file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a classification recipe")
    parser.add_argument("--data", metavar="FOLDER")
    parser.add_argument("--out", type=Path, help="default runs/compare-RECIPE")
    parser.add_argument(
        "--kinds", default="mhsa,mhsa_dwc,agent,vca", help=f"some of {', '.join(KINDS)}; options follow colons"
    )
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--device", help="device of the runs")
    parser.add_argument("--report", action="store_true", help="train nothing, draw what is finished")
    recipes.add_arguments(parser, ClassifierRecipe)
    args = parser.parse_args()
    out = args.out or Path("runs") / f"compare-{Path(args.recipe).stem}"
    given = {field.name: getattr(args, field.name) for field in fields(ClassifierRecipe)}
    try:
        arguments = [args.recipe, *_flags(given | dict(data=args.data, device=args.device))]
        runs = []
        for seed in _numbers(args.seeds):
            for kind in args.kinds.split(","):
                recipe = recipes.read(args.recipe, ClassifierRecipe, given | overrides(kind) | dict(seed=str(seed)))
                runs.append(Run(kind, seed, recipe, out / f"{kind.replace(':', '-')}-seed{seed}"))
        if not args.report:
            if not args.data:
                parser.error("--data is needed (or --report).")
            out.mkdir(parents=True, exist_ok=True)
            train_all([run for run in runs if not run.finished], arguments, max(1, args.jobs))
        if not (finished := _whole_seeds(runs)):
            raise RunError(f"{out}: no seed has been trained with all kinds yet.")
        log = results(finished)
        text = table(log)
        write_atomically(out / "log.json", json.dumps(log).encode())
        write_atomically(out / "table.md", f"{text}\n".encode())
        draw_curves(log, out / "curves.png")
    except (recipes.RecipeError, RunError, ImportError, OSError) as error:
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
