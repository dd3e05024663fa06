"""Looks into trained models from the command line.

    vca classify photo.jpg                                 the likeliest classes of a photo
    vca explain photo.jpg --out maps.html                  all maps of all heads, as a page that works offline
    vca generate ship --count 8 --out ships.png            pictures of a class
    vca list                                               the models that can be built, and the checkpoints here

A model is a checkpoint folder or a repository of the Hugging Face Hub, such as user/repo. `python -m vca` is the same.
Exit code 0: done; 1: it could not be done, and a line says why; 2: the command was not understood.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from vca import drawing, preprocessing
from vca.checkpoint import write_atomically
from vca.config import CheckpointError, read_config
from vca.diffusion.vae import DecoderError
from vca.explorer.packing import arrays_of, pack_all, prefix_names, run_facts
from vca.explorer.page import page
from vca.hub import load
from vca.images import read_image
from vca.maps import record
from vca.models import list_models, task_of
from vca.models.common import CLASSIFICATION, GENERATION

CLASSIFIER, GENERATOR = Path("weights/vca_vit_small_patch14_everyday"), Path("weights/vca_sit_xs_2_scenes")
COLUMNS = 8
ERRORS = (CheckpointError, DecoderError, ImportError, ValueError)


def main(arguments: list[str] | None = None) -> int:
    """Runs a command line, by default that of this process; returns its exit code."""
    given = parser().parse_args(arguments)
    try:
        given.run(given)
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}" if error.filename else f"error: {error}", file=sys.stderr)
        return 1
    except ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser("vca", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable, model: Path | None, words: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=words, description=f"{words[0].upper()}{words[1:]}.")
        added.set_defaults(run=run)
        if model:
            added.add_argument("--model", default=str(model), help="folder or user/repo; default %(default)s")
            added.add_argument("--device", default="cpu", help="such as cuda; default %(default)s")
        return added

    one = command("classify", classify, CLASSIFIER, "prints the likeliest classes of photos")
    one.add_argument("photos", nargs="+", metavar="PHOTO")
    one.add_argument("--top", type=int, default=5, metavar="COUNT", help="classes to print; default %(default)s")
    one.add_argument("--json", action="store_true", help="print one JSON object a photo")
    one = command("explain", explain, CLASSIFIER, "writes all attention maps of a photo as a page that works offline")
    one.add_argument("photo", metavar="PHOTO")
    one.add_argument("--out", type=Path, default=Path("maps.html"), help="default %(default)s")
    one = command("generate", generate, GENERATOR, "generates pictures of classes, by name or number")
    one.add_argument("labels", nargs="+", metavar="CLASS")
    one.add_argument("--count", type=int, default=8, help="pictures of each class; default %(default)s")
    one.add_argument("--out", type=Path, default=Path("generated.png"), help="one picture, or a folder for many")
    one.add_argument("--steps", type=int, help="default what suits the checkpoint best, else 50")
    one.add_argument("--guidance", type=float, help="guidance scale, 1 for none; default the best, else 2")
    one.add_argument("--seed", type=int, default=0, help="default %(default)s")
    one.add_argument("--sampler", help="ddpm or ddim for DiT; euler, heun, sde or dopri5 for SiT; default the first")
    command("list", list_all, None, "lists the models that can be built, and the checkpoints in weights/")
    return top


def classify(given: argparse.Namespace) -> None:
    model = loaded(given, CLASSIFICATION)
    if given.top < 1:
        raise ValueError("--top must be at least 1.")
    for photo in given.photos:
        x = preprocessing.preprocess(model, read_image(photo)).to(given.device)
        with torch.inference_mode():
            likeliest = model(x)[0].softmax(0).topk(min(given.top, model.num_classes))
        answers = {model.label_names[i]: p for p, i in zip(*map(Tensor.tolist, likeliest), strict=True)}
        if given.json:
            print(json.dumps(dict(photo=photo, answers=answers), ensure_ascii=False))
        else:
            print("\n".join([photo, *(f"  {p:6.1%}  {label}" for label, p in answers.items())]), flush=True)


def explain(given: argparse.Namespace) -> None:
    model = loaded(given, CLASSIFICATION)
    image = read_image(given.photo)
    with torch.inference_mode(), record(model) as maps:
        probabilities = model(preprocessing.preprocess(model, image).to(given.device))[0].softmax(0)
    if not (layers := pack_all(maps)):
        raise ValueError(f"the attention of {given.model} works on no grid of patches; there is nothing to draw.")
    best = int(probabilities.argmax())
    says = ("The model says", f"{model.label_names[best]} {probabilities[best]:.0%}")
    picture = drawing.muted(preprocessing.center_crop(model, image))
    run = run_facts(layers, picture, says, prefix_names(model)) | dict(token="saved", model=Path(given.model).name)
    content = page(run, map(arrays_of, layers), {}).encode()
    write_atomically(given.out, content)
    print(f"{given.out}: {says[1]}; {len(layers)} blocks, {len(content) / 1e6:.1f} MB. Open it in a browser.")


def generate(given: argparse.Namespace) -> None:
    model = loaded(given, GENERATION)
    if given.count < 1 or given.seed < 0:
        raise ValueError("--count must be at least 1, --seed at least 0.")
    labels = [int(label) if label.isdecimal() and label not in model.label_names else label for label in given.labels]
    asked = [label for label in labels for _ in range(given.count)]
    chosen = dict(steps=given.steps, guidance_scale=given.guidance)
    settings = dict(steps=50, guidance_scale=2.0) | model.sampling
    settings |= {name: value for name, value in chosen.items() if value is not None}
    images = model.sample(asked, seed=given.seed, sampler=given.sampler, callback=progress(), **settings)
    if given.out.suffix:
        columns = min(given.count, COLUMNS) if len(labels) == 1 else given.count
        drawing.grid(images, columns).save(given.out)
        print(f"{given.out}: {len(images)} pictures")
        return
    given.out.mkdir(parents=True, exist_ok=True)
    digits = len(str(len(asked) - 1))
    for number, picture in enumerate(drawing.to_pil(images)):
        picture.save(given.out / f"{number:0{digits}d}.png")
    print(f"{given.out}: {len(asked)} files")


def list_all(given: argparse.Namespace) -> None:
    for task in (CLASSIFICATION, GENERATION):
        names = [name for name in list_models() if task_of(name) == task]
        print(f"{len(names)} models for {task}, untrained (vca.create_model):")
        print("".join(f"  {name}\n" for name in names))
    folders = sorted(file.parent for file in Path("weights").glob("*/config.json"))
    print("Checkpoints in weights/ (vca.load):" if folders else "No checkpoints here: there is no folder weights/.")
    for folder in folders:
        config = read_config(folder)
        print(f"  {folder}: {config['architecture']}, {config['num_classes']} classes")


def loaded(given: argparse.Namespace, task: str) -> nn.Module:
    """The model that a command names.

    Raises:
        CheckpointError: as `vca.load`. ValueError: it is for another task.
    """
    if Path(given.model) in (CLASSIFIER, GENERATOR) and not Path(given.model).is_dir():
        raise ValueError(f"there is no {given.model} here: name a checkpoint with --model FOLDER or --model user/repo.")
    model = load(given.model, given.device)
    if model.task != task:
        does = "vca generate" if model.task == GENERATION else "vca classify and vca explain"
        raise ValueError(f"{given.model} is for {model.task}; {does} use it.")
    return model


def progress() -> Callable[[int, int, Tensor], None]:
    """A callback of `sample` that tells a terminal how far it is."""
    start = time.monotonic()

    def show(step: int, total: int, x: Tensor) -> None:
        if sys.stderr.isatty():
            left = (time.monotonic() - start) / step * (total - step) if step else math.nan
            words = f"step {step} of {total}" + (f", {left:.0f} s left" if step else "")
            print(f"\r{words:<40}", end="\n" if step == total else "", file=sys.stderr, flush=True)

    return show
