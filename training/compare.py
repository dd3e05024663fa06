"""One recipe over kinds of attention and seeds: trains what is not trained yet, then draws the table and the curves.

    python -m training.compare cifar10_compare --data FOLDER --kinds mhsa,mhsa_dwc,agent,vca --seeds 0,1,2
    python -m training.compare cifar10_compare --data FOLDER --kinds vca,vca:tokens=emb,vca:dwc=false:pooling=learned
    python -m training.compare cifar10_compare --out runs/compare --kinds mhsa,vca --seeds 0,1 --report
    python -m training.compare transfer_compare --data FOLDER --teacher timm:NAME --kinds vca,agent,vca:num_tokens=36

A classification recipe compares the accuracy of models, a transfer recipe the error with which each kind reproduces the
attention layers of a pretrained teacher (docs/evidence.md). Recipe, seeds, data order and budget are the same for all
kinds. The same command goes on where it was interrupted. Runs are `OUT/KIND-seedN`, what they print is
`OUT/KIND-seedN.txt`; --jobs trains several at a time, on as many GPUs as there are. `log.json` keeps of the runs what
`table.md` (also printed) and `curves.png` are made from; --report makes them without training.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from queue import SimpleQueue

import torch

import vca
from training.core import recipe as recipes
from training.core.cli import interruptible
from training.core.comparison import TASKS, Run, draw_curves, results, table
from training.core.recipe import RecipeError
from training.core.run import RunError
from vca.checkpoint import write_atomically
from vca.layers.factory import KINDS, AttentionConfig

# what a kind may be given after colons
OPTIONS = [field.name for field in fields(AttentionConfig) if field.name not in ("attention", "token_grid")]


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
        try:
            start(run, str(gpu))
        finally:
            gpus.put(gpu)

    def start(run: Run, gpu: str) -> None:
        given = ["--out", str(run.folder), *_flags(overrides(run.kind)), "--seed", str(run.seed)]
        visible = os.environ | ({"CUDA_VISIBLE_DEVICES": gpu} if torch.cuda.device_count() > 1 else {})
        with open(run.folder.with_suffix(".txt"), "a") as output:
            command = [sys.executable, "-m", f"training.{run.task}", *arguments, *given]
            process = subprocess.Popen(command, env=visible, stdout=output, stderr=subprocess.STDOUT)
            processes.append(process)
            print(f"{run.folder}: {'done' if process.wait() == 0 else 'FAILED'}", flush=True)
        if process.returncode:
            failed.append(run.folder.with_suffix(".txt"))

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a classification or a transfer recipe")
    parser.add_argument("--data", metavar="FOLDER")
    parser.add_argument("--teacher", metavar="MODEL", help="timm:NAME, timm:NAME=FILE.safetensors or a checkpoint")
    parser.add_argument("--out", type=Path, help="default runs/compare-RECIPE")
    parser.add_argument(
        "--kinds", default="mhsa,mhsa_dwc,agent,vca", help=f"some of {', '.join(KINDS)}; options follow colons"
    )
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--device", help="device of the runs")
    parser.add_argument("--report", action="store_true", help="train nothing, draw what is finished")
    recipes.add_arguments(parser, *(task.recipe for task in TASKS.values()))
    args = parser.parse_args()
    out = args.out or Path("runs") / f"compare-{Path(args.recipe).stem}"
    try:
        runs, given = _plan(args, out)
        if not args.report:
            needed = ("data", "teacher") if runs[0].task == "transfer" else ("data",)
            if missing := [f"--{name}" for name in needed if not getattr(args, name)]:
                parser.error(f"{' and '.join(missing)} must be given (or --report).")
            out.mkdir(parents=True, exist_ok=True)
            arguments = [args.recipe, *_flags(given | dict(data=args.data, teacher=args.teacher, device=args.device))]
            train_all([run for run in runs if not run.finished], arguments, max(1, args.jobs))
        if not (finished := _whole_seeds(runs)):
            raise RunError(f"{out}: no seed has been trained with all kinds yet.")
        log = results(finished)
        text = table(log)
        write_atomically(out / "log.json", json.dumps(log).encode())
        write_atomically(out / "table.md", f"{text}\n".encode())
        draw_curves(log, out / "curves.png")
    except (RecipeError, RunError, vca.CheckpointError, ImportError, OSError) as error:
        sys.exit(f"error: {error}")
    print(text)


def _plan(args: argparse.Namespace, out: Path) -> tuple[list[Run], dict[str, str]]:
    """All runs, and the recipe keys that the command line sets for each of them."""
    name = recipes.task(args.recipe)
    if name not in TASKS:
        raise RecipeError(f"{args.recipe} trains a generator; a classification or a transfer recipe is needed.")
    keys = {task: [field.name for field in fields(TASKS[task].recipe)] for task in TASKS}
    given = {key: text for key, text in vars(args).items() if text is not None and any(key in k for k in keys.values())}
    if unknown := [key for key in given if key not in keys[name]]:
        raise RecipeError(f"--{unknown[0].replace('_', '-')} is of another sort of recipe than {args.recipe}.")
    runs = []
    for seed in _numbers(args.seeds):
        for kind in args.kinds.split(","):
            changed = given | overrides(kind) | dict(seed=str(seed))
            recipe = recipes.read(args.recipe, TASKS[name].recipe, changed)
            folder = out / f"{kind.replace(':', '-')}-seed{seed}"
            runs.append(Run(kind, seed, name, recipe, folder, args.teacher))
    return runs, given


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
    interruptible(main)
