"""The command line that all training loops have: recipe, overrides, resume, plan, smoke; errors in one line."""

import argparse
import shlex
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import torch

import vca
from training.core import recipe as recipes
from training.core.cost import GPUS, plan, smoke
from training.core.distributed import WorldError, join, leave
from training.core.run import RunError, open_device
from training.data.images import DataError
from vca.diffusion.vae import DecoderError

ERRORS = (recipes.RecipeError, DataError, RunError, WorldError, DecoderError, vca.CheckpointError, OSError)


def main(
    module: str, doc: str, kind: type, train: Callable, report: Callable[[dict], str], teacher: bool = False
) -> None:
    """Runs `train` as the command line says, prints what `report` makes of its result, and ends in a line on errors.

    Args:
        module, doc: name and help of the command.
        kind: its recipes' dataclass.
        train: a function of (recipe, data, out, device, init, command, tensorboard).
        teacher: "optional" or "required" if it also takes a `teacher`, by --teacher.
    """
    parser = argparse.ArgumentParser(module, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="the name of a file in training/recipes, or a path to a TOML file")
    parser.add_argument("--data", metavar="FOLDER", help="images or latents, as above")
    parser.add_argument("--out", help="run folder; default runs/RECIPE")
    parser.add_argument("--init", help="checkpoint to start from, or timm:NAME for timm's pretrained model")
    if teacher:
        parser.add_argument("--teacher", metavar="MODEL", help="timm:NAME, timm:NAME=FILE.safetensors or a checkpoint")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tensorboard", action="store_true", help="write the log for TensorBoard, too")
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
        elif not args.data:
            parser.error("--data is needed (or --plan, or --smoke).")
        else:
            out = args.out or f"runs/{Path(args.recipe).stem}"
            command = f"python -m {module} " + shlex.join("DATA" if a == args.data else a for a in sys.argv[1:])
            device = open_device(args.device)
            more = dict(teacher=args.teacher) if teacher else {}
            result = train(recipe, args.data, out, device, args.init, command, args.tensorboard, **more)
            if join(device).first:
                print(f"{out}/checkpoint: {report(result)}")
    except ERRORS as error:
        sys.exit(f"error: {error}")
    leave()
