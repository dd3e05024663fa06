"""The command line that all training loops have: recipe, overrides, resume, plan, smoke; errors in one line."""

import argparse
import shlex
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import torch
from huggingface_hub import get_token

import vca
from training.core import recipe as recipes
from training.core.cost import GPUS, plan, smoke
from training.core.distributed import WorldError, join, leave
from training.core.init import place_of
from training.core.log_to import LOGS
from training.core.run import RunError, disk_words, open_device
from training.data.errors import DataError
from vca.diffusion.vae import DecoderError
from vca.hub import NO_TOKEN, REPO_ID

ERRORS = (
    recipes.RecipeError, DataError, RunError, WorldError, DecoderError, vca.CheckpointError, vca.PushError,
)  # fmt: skip


def main(
    module: str, doc: str, kind: type, train: Callable, report: Callable[[dict], str], teacher: str = "",
    loads: bool = True,
) -> None:  # fmt: skip
    """Runs `train` as the command line says, prints what `report` makes of its result, and ends in a line on errors.

    Args:
        module, doc: name and help of the command.
        kind: its recipes' dataclass.
        train: a function of (recipe, data, out, device, init, command, log_to, fit_batch=).
        teacher: "optional" or "required" if it also takes a `teacher`, by --teacher.
        loads: whether `vca.load` loads its result, which --init may then give and --push publish.
    """
    parser = argparse.ArgumentParser(module, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="the name of a file in training/recipes, or a path to a TOML file")
    parser.add_argument("--data", metavar="FOLDER", help="images or latents, as above")
    parser.add_argument("--out", help="run folder; default runs/RECIPE")
    if loads:
        parser.add_argument("--init", help="checkpoint to start from, or timm:NAME for timm's pretrained model")
        parser.add_argument("--push", metavar="USER/REPO", help="publish the checkpoint there, at the end")
    else:
        parser.set_defaults(init=None, push=None)
    if teacher:
        parser.add_argument("--teacher", metavar="MODEL", help="timm:NAME, timm:NAME=FILE.safetensors or a checkpoint")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--log-to", default="", choices=LOGS, help="where the numbers of the log go, too")
    parser.add_argument("--plan", action="store_true", help="print what the run will cost, and stop")
    parser.add_argument("--gpu", default="h100", choices=GPUS, help="the GPU of --plan")
    parser.add_argument("--smoke", type=int, nargs="?", const=20, metavar="STEPS", help="try a few steps on noise")
    recipes.add_arguments(parser, kind)
    args = parser.parse_args()
    try:
        recipe = recipes.read(args.recipe, kind, {field.name: getattr(args, field.name) for field in fields(kind)})
        if args.plan:
            print(plan(recipe, args.data, args.gpu))
        elif args.smoke:
            device = open_device(args.device)
            text = smoke(recipe, train, device, args.smoke)
            if join(device).first:
                print(text)
        elif teacher == "required" and not args.teacher:
            parser.error("--teacher is needed.")
        elif args.push and not (REPO_ID.fullmatch(args.push) and get_token()):
            what = NO_TOKEN if REPO_ID.fullmatch(args.push) else f"{args.push!r} is no name such as user/repo."
            parser.error(f"--push: {what}")
        elif not args.data:
            parser.error("--data is needed (or --plan, or --smoke).")
        else:
            out = args.out or f"runs/{Path(args.recipe).stem}"
            command = f"python -m {module} " + shlex.join(without_paths(sys.argv[1:], args))
            device = open_device(args.device)
            chosen = args.batch_size is not None or args.recipe.endswith(".toml")  # by the user, who means it
            more = dict(teacher=args.teacher) if teacher else {}
            if teacher != "required":
                more |= dict(fit_batch=not chosen)
            result = train(recipe, args.data, out, device, args.init, command, args.log_to, **more)
            if join(device).first:
                print(f"{out}/checkpoint: {report(result)}")
                if args.push:
                    print(f"{args.push}: {vca.push(f'{out}/checkpoint', args.push)}")
    except OSError as error:
        sys.exit(f"error: {error.filename}: {error.strerror}" if error.filename else f"error: {disk_words(error)}")
    except ERRORS as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("stopped by Ctrl-C before the first step; nothing was saved.", file=sys.stderr)
        sys.exit(130)
    leave()


def interruptible(main: Callable[[], None]) -> None:
    """Runs the `main` of a command that keeps what it has finished; Ctrl-C ends it in a line."""
    try:
        main()
    except KeyboardInterrupt:
        print("stopped by Ctrl-C.", file=sys.stderr)
        sys.exit(130)


def without_paths(arguments: list[str], args: argparse.Namespace) -> list[str]:
    """The arguments of a command as a card shows them: what was asked for, and not where it lies on this machine."""
    shown = {args.data: "DATA", args.out: "OUT", args.recipe: Path(args.recipe).name}
    for source in (args.init, getattr(args, "teacher", None)):
        shown[source] = place_of(source)
    words = []
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if option.startswith("--") and equals:
            words.append(f"{option}={shown.get(value, value)}")
        else:
            words.append(shown.get(argument, argument))
    return words
