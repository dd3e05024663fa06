"""One recipe over kinds of attention and seeds: trains what is not trained yet, then draws the table and the curves.

    python -m training.compare cifar10_compare --data FOLDER --kinds mhsa,mhsa_dwc,agent,vca --seeds 0,1,2
    python -m training.compare cifar10_compare --data FOLDER --kinds vca,vca:tokens=emb,vca:dwc=false:pooling=learned
    python -m training.compare cifar10_compare --out runs/compare --kinds mhsa,vca --seeds 0,1 --report
    python -m training.compare transfer_compare --data FOLDER --teacher timm:NAME --kinds "vca,vca:blocks=[0,1,2]"
    python -m training.compare transfer_compare --data FOLDER --teacher timm:NAME --kinds vca,agent,mhsa_dwc \
        --finetune transfer_finetune --labeled FOLDER

A classification recipe compares the accuracy of models, a transfer recipe the error with which each kind reproduces the
attention layers of a pretrained teacher and, with --finetune, the accuracy after the same fine-tuning of each
(docs/evidence.md). Recipe, seeds, data order and budget are the same for all kinds, but for what their options change.
The same command goes on where it was interrupted. Runs are `OUT/KIND-seedN`, what they print is `OUT/KIND-seedN.txt`;
--jobs trains several at a time, on as many GPUs as there are. `log.json` keeps of the runs what `table.md` (also
printed) and `curves.png` are made from; --report makes them without training, and times a pass of each kind anew.
"""

import argparse
import itertools
import json
import os
import re
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
from training.core.comparison import TASKS, Run, results
from training.core.comparison_report import draw_curves, table
from training.core.init import build_model
from training.core.recipe import RecipeError
from training.core.run import RunError, open_device
from training.core.trainer import STOPPING
from vca.checkpoint import write_atomically
from vca.layers.factory import KINDS

OPTIONS = (*recipes.OPTIONS, "img_sizes")  # what a kind may be given after colons


def train_all(runs: list[Run], jobs: int) -> None:
    """Trains the unfinished runs, `jobs` at a time, each in a process of its own.

    Ctrl-C, SIGTERM and a closed terminal end them after the step that they are in, with their states saved, and then
    this process; a second Ctrl-C ends all at once.

    Raises:
        RunError: some failed; the message names them.
    """
    gpus = SimpleQueue()
    for job in range(jobs):
        gpus.put(job % max(1, torch.cuda.device_count()))
    processes, failed, stopped_by = [], [], []

    def train(run: Run) -> None:
        gpu = gpus.get()
        try:
            for part in run.parts:
                if not part.trained_alone and (stopped_by or start(part, str(gpu))):
                    break
        finally:
            gpus.put(gpu)

    def start(run: Run, gpu: str) -> int:
        visible = os.environ | ({"CUDA_VISIBLE_DEVICES": gpu} if torch.cuda.device_count() > 1 else {})
        with open(run.folder.with_suffix(".txt"), "a") as output:
            command = [sys.executable, "-m", f"training.{run.task}", *run.arguments, "--out", str(run.folder)]
            process = subprocess.Popen(  # a terminal's Ctrl-C would reach the run twice, without a session of its own
                command, env=visible, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
            processes.append(process)
            if stopped_by:
                process.terminate()
            process.wait()
        if not stopped_by:
            print(f"{run.folder}: {'FAILED' if process.returncode else 'done'}", flush=True)
            if process.returncode:
                failed.append(run.folder.with_suffix(".txt"))
        return process.returncode

    def stop(number: int, _) -> None:
        for process in processes:
            process.kill() if stopped_by else process.terminate()
        stopped_by.append(number)
        if number == signal.SIGINT:  # a terminal that is closed takes no line
            os.write(2, STOPPING)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(train, runs))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if stopped_by:
        print("stopped. The same command goes on.", file=sys.stderr)
        sys.exit(130 if stopped_by[0] == signal.SIGINT else 0)
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
        name, equals, _ = option.partition("=")
        if name not in OPTIONS or not equals:
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
    parser.add_argument("--finetune", metavar="RECIPE", help="after a transfer: of a classifier, for what it gave")
    parser.add_argument("--labeled", metavar="FOLDER", help="the data of --finetune")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--device", help="device of the runs")
    parser.add_argument("--report", action="store_true", help="train nothing, draw what is finished")
    recipes.add_arguments(parser, *(task.recipe for task in TASKS.values()))
    args = parser.parse_args()
    if args.labeled and not args.finetune:
        parser.error("--labeled is the data of --finetune, which must be given, too.")
    out = args.out or Path("runs") / f"compare-{Path(args.recipe).stem}"
    try:
        device = open_device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        runs = _plan(args, out)
        if not args.report:
            needed = ["data", *["teacher"] * (runs[0].task == "transfer"), *["labeled"] * bool(args.finetune)]
            if missing := [f"--{name}" for name in needed if not getattr(args, name)]:
                parser.error(f"{' and '.join(missing)} must be given (or --report).")
            out.mkdir(parents=True, exist_ok=True)
            train_all([run for run in runs if not run.finished], max(1, args.jobs))
        if not (finished := _whole_seeds(runs)):
            raise RunError(f"{out}: no seed has been trained with all kinds yet.")
        log = results(finished, device)
        text = table(log)
        write_atomically(out / "log.json", json.dumps(log).encode())
        write_atomically(out / "table.md", f"{text}\n".encode())
        draw_curves(log, out / "curves.png")
    except (RecipeError, RunError, vca.CheckpointError, ImportError, OSError) as error:
        sys.exit(f"error: {error}")
    print(text)


def _plan(args: argparse.Namespace, out: Path) -> list[Run]:
    """All runs, of every kind with every seed.

    Raises:
        RecipeError, RunError: there is no such recipe, kind or seed, or no model can have such attention.
    """
    name = recipes.task(args.recipe)
    if name not in TASKS:
        raise RecipeError(f"{args.recipe} trains a generator; a classification or a transfer recipe is needed.")
    keys = {task: [field.name for field in fields(TASKS[task].recipe)] for task in TASKS}
    given = {key: text for key, text in vars(args).items() if text is not None and any(key in k for k in keys.values())}
    if unknown := [key for key in given if key not in keys[name]]:
        raise RecipeError(f"--{unknown[0].replace('_', '-')} is of another sort of recipe than {args.recipe}.")
    if args.finetune and (name != "transfer" or recipes.task(args.finetune) != "classify"):
        raise RecipeError("--finetune names a classification recipe for what a transfer recipe gave.")
    runs, places = [], dict(data=args.data, teacher=args.teacher, device=args.device)
    seeds, kinds = _list("--seeds", args.seeds), _list("--kinds", args.kinds)
    if not all(seed.isdecimal() for seed in seeds):
        raise RunError(f"--seeds {args.seeds}: must be numbers such as 0,1,2.")
    for seed, kind in itertools.product(seeds, kinds):
        changed = given | overrides(kind) | dict(seed=seed)
        recipe = recipes.read(args.recipe, TASKS[name].recipe, changed)
        if seed == seeds[0]:
            with torch.device("meta"):  # refuses what cannot be built before anything is trained
                build_model(recipe, ["class"], None, **(recipe.size if name == "transfer" else {}))
        folder = out / f"{re.sub(r'[][ ]', '', kind).replace(':', '-')}-seed{seed}"
        run = Run(kind, int(seed), name, recipe, folder, [args.recipe, *_flags(changed | places)], args.teacher)
        runs.append(run._replace(finetuned=_finetuned(run, args)) if args.finetune else run)
    return runs


def _finetuned(run: Run, args: argparse.Namespace) -> Run:
    """The run that goes on with the checkpoint of a transfer: its model and seed in the recipe of --finetune."""
    options = {
        key: value if isinstance(value, str) else json.dumps(value) for key, value in run.recipe.model_args().items()
    }
    changed = options | dict(model=run.recipe.model, seed=str(run.seed))
    recipe = recipes.read(args.finetune, TASKS["classify"].recipe, changed)
    places = dict(data=args.labeled, device=args.device, init=str(run.checkpoint))
    arguments = [args.finetune, *_flags(changed | places)]
    return Run(run.kind, run.seed, "classify", recipe, run.folder / "finetuned", arguments)


def _flags(values: dict[str, str | None]) -> list[str]:
    return [f"--{key.replace('_', '-')}={value}" for key, value in values.items() if value is not None]


def _list(option: str, text: str) -> list[str]:
    """What commas separate outside of brackets.

    Raises:
        RunError: something is there twice.
    """
    parts = re.split(r",(?![^\[]*\])", text)
    if twice := [part for part in parts if parts.count(part) > 1]:
        raise RunError(f"{option}: {twice[0]!r} is given twice.")
    return parts


def _whole_seeds(runs: list[Run]) -> list[Run]:
    """The runs of those seeds that all kinds have finished, since only they can be compared."""
    unfinished = {run.seed for run in runs if not run.finished}
    return [run for run in runs if run.seed not in unfinished]


if __name__ == "__main__":
    interruptible(main)
