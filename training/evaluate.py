"""Accuracy and speed of a classifier, also on ImageNet's harder and cleaner variants; validation loss of a generator.

    python -m training.evaluate weights/NAME --data FOLDER
    python -m training.evaluate weights/NAME --data IMAGENET --real --v2 FOLDER --a FOLDER --r FOLDER
    python -m training.evaluate weights/NAME --data FOLDER --splits other_sources --sizes 112 224 518 --images 1000
    python -m training.evaluate --table weights/*/results.json

The first two print the numbers and write them, with protocol and 95 % intervals, to `results.json` beside the weights
(of a Hub id, to the current folder; or to --out); of a generator the first prints the loss. The third prints the table
of such files for the README. --real counts against ImageNet-Real's labels; --v2, --a and --r are the folders of
ImageNet-V2, -A and -R, whose class folders are ImageNet's (or, in V2, their numbers); of A and R only the classes that
they have compete. --splits names more folders of --data, whose classes are some of the model's; all of the model's
compete. --sizes measures the split at other image sizes, too, in pixels. --images measures these on a part.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import timm
import torch
from timm.data import RealLabelsImagenet
from torch import Tensor, nn

import vca
from training.card import OWN_DATA
from training.core.attention_path import settle_attention
from training.core.cli import interruptible
from training.core.metrics import accuracy, interval, outputs, validation_data, validation_loss
from training.core.precision import autocast
from training.core.run import RunError, open_device
from training.data.batches import FolderEvaluation, evenly
from training.data.images import DataError, Images
from training.data.latents import Latents
from vca.checkpoint import write_atomically
from vca.models.common import resized

NAMES = dict(val="", real="ImageNet-Real", v2="ImageNet-V2", a="ImageNet-A", r="ImageNet-R")


def real_accuracy(model: nn.Module, images: Images, batches: Iterable[tuple[Tensor, Tensor]], labels: str) -> dict:
    """Accuracy against ImageNet-Real's labels (an image may have several or none), by timm.

    Args:
        images: ImageNet's validation images, by their original names.
        labels: the published `real.json`; empty for timm's copy.
    """
    files = [images.reader.filename(index, basename=True) for index in range(len(images))]
    try:
        real = RealLabelsImagenet(files, real_json=labels or None)
        for logits, _ in outputs(model, batches):
            real.add_result(logits)
    except (AssertionError, KeyError):
        raise DataError("--real needs ImageNet's 50,000 validation images by their original file names.") from None
    return dict(
        top1=round(real.get_accuracy(1), 2), top5=round(real.get_accuracy(5), 2), images=len(real.is_correct[1])
    )


def variant_accuracy(
    model: nn.Module, folder: str, class_folders: list[str], workers: int, all_compete: bool = False, count: int = 0
) -> dict:
    """Accuracy on a folder CLASS/IMAGE whose classes are some of the model's.

    Args:
        class_folders: what the model's data calls its classes, in order.
        all_compete: whether the model may also answer with a class that the folder does not have.
        count: images to measure, spread evenly; 0 for all.
    """
    path = Path(folder).resolve()
    images = Images(path.parent, path.name)
    numbered = all(name.isdecimal() for name in images.class_folders)
    if unknown := [n for n in images.class_folders if not numbered and n not in class_folders]:
        raise DataError(f"{folder}: class {unknown[0]} is none of the model's.")
    lookup = [int(name) if numbered else class_folders.index(name) for name in images.class_folders]
    if max(lookup) >= len(class_folders):
        raise DataError(f"{folder}: class {max(lookup)} is none of the model's {len(class_folders)}.")
    table = torch.tensor(lookup)
    share = evenly(len(images), count)
    batches = ((x, table[y]) for x, y in FolderEvaluation(images, model.pretrained_cfg, workers, share=share))
    theirs = None if all_compete or len(lookup) == len(class_folders) else lookup
    return accuracy(model, batches, classes=theirs)


def accuracy_at(model: nn.Module, images: Images, side: int, workers: int, count: int) -> dict:
    """Accuracy on `count` of the images, spread evenly, each resized and cropped to `side` pixels."""
    at_side = resized(model, side)
    share = evenly(len(images), count)
    return accuracy(at_side, FolderEvaluation(images, at_side.pretrained_cfg, workers, share=share))


@torch.inference_mode()
def throughput(model: nn.Module, precision: str = "fp32", batch_size: int = 64, repeats: int = 5) -> dict:
    """Images a second of the forward pass alone: the median of a few batches."""
    device = next(model.parameters()).device
    x = torch.zeros(batch_size, *model.pretrained_cfg["input_size"], device=device)
    seconds = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        model(x)[0, 0].item()
        seconds.append(time.perf_counter() - start)
    count = torch.get_num_threads()
    on_cpu = f"CPU, {count} thread{'s' * (count > 1)}"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else on_cpu
    rate = batch_size / sorted(seconds[2:])[repeats // 2]
    return dict(images_per_second=round(rate, 1), batch_size=batch_size, device=name, precision=precision)


def open_images(model: nn.Module, data: str, split: str) -> Images | Latents:
    """A split of the data that a model was trained for.

    Raises:
        DataError: its classes are not those of the model.
    """
    latent = getattr(model, "latent_decoder", None) is not None
    images = (Latents if latent else Images)(data, split)
    if len(images.class_names) != model.num_classes:
        raise DataError(f"{data} has {len(images.class_names)} classes, the model {model.num_classes}.")
    if images.class_names != model.label_names:
        raise DataError(f"the classes of {data} are not those of the model, in its order.")
    return images


def evaluate(model: nn.Module, images: Images, args: argparse.Namespace) -> dict:
    """All that is asked for about a classifier, as it stands in `results.json`."""
    workers = os.cpu_count()
    batches = FolderEvaluation(images, model.pretrained_cfg, workers)
    results = dict(val=accuracy(model, batches))
    if args.real is not None:
        results["real"] = real_accuracy(model, images, batches, args.real)
    for name in ("v2", "a", "r"):
        if folder := getattr(args, name):
            results[name] = variant_accuracy(model, folder, images.class_folders, workers)
    for split in args.splits:
        folder = f"{args.data}/{split}"
        results[split] = variant_accuracy(model, folder, images.class_folders, workers, True, args.images)
    by_size = {str(side): accuracy_at(model, images, side, workers, args.images) for side in args.sizes}
    for result in [*results.values(), *by_size.values()]:
        for key in [key for key in ("top1", "top5") if key in result]:
            result[f"{key}_interval"] = interval(result[key], result["images"])
    trained = model.training_history[-1]["recipe"] if model.training_history else {}
    return dict(
        name=Path(args.checkpoint).name, architecture=model.pretrained_cfg["architecture"],
        parameters=sum(p.numel() for p in model.parameters()), dataset=trained.get("dataset", ""), results=results,
        by_size=by_size, precision=args.precision,
        throughput=throughput(model, args.precision),
        preprocessing={k: model.pretrained_cfg[k] for k in ("input_size", "crop_pct")},
        torch=torch.__version__, timm=timm.__version__,
    )  # fmt: skip


def describe(measured: dict) -> str:
    """Lines about what was measured."""
    lines = []
    for name, result in measured["results"].items():
        loss = f"  loss {result['loss']:.4f}" if "loss" in result else ""
        shown = [key for key in ("top1", "top5") if key in result]
        reached = "  ".join(f"top-{key[3]} {result[key]:.2f} %" for key in shown)
        text = f"{reached}{loss}  ({result['images']} images)"
        lines.append(f"{NAMES.get(name, name)} {text}".strip())
        bounds = ", ".join(f"{key[:3]}-{key[3]} {low:.2f} to {high:.2f} %" for key in shown
                           for low, high in [result[f"{key}_interval"]])  # fmt: skip
        lines.append(f"  at 95 % confidence: {bounds}")
    for side, result in measured["by_size"].items():
        lines.append(f"at {side} px top-1 {result['top1']:.2f} %  ({result['images']} images)")
    speed = measured["throughput"]
    lines.append(f"{speed['images_per_second']:.0f} images/s on {speed['device']}, {speed['precision']}, forward alone")
    return "\n".join(lines)


def table(files: list[str]) -> str:
    """A Markdown table of results files."""
    lines = [
        "| checkpoint | parameters | data | top-1 (95 % interval) | top-5 | images/s |", "|---|---|---|---|---|---|"
    ]  # fmt: skip
    for file in sorted(files):
        try:
            measured = json.loads(Path(file).read_text())
            speed = measured["throughput"]
            for name, result in measured["results"].items():
                low, high = result["top1_interval"]
                top5 = f"{result['top5']:.2f}" if "top5" in result else ""
                dataset = NAMES.get(name, name) or measured["dataset"] or OWN_DATA
                cells = (
                    measured["name"], f"{measured['parameters'] / 1e6:.2f} M", dataset,
                    f"{result['top1']:.2f} ({low:.2f}-{high:.2f})", top5,
                    f"{speed['images_per_second']:.0f} ({speed['device']})",
                )  # fmt: skip
                lines.append(f"| {' | '.join(cells)} |")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{file} is no results file ({error!r}).") from None
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", help="checkpoint folder, or Hub id")
    parser.add_argument("--data", help="data folder with a sub-folder for the split")
    parser.add_argument("--split", default="val")
    parser.add_argument("--real", nargs="?", const="", metavar="FILE", help="ImageNet-Real; labels by timm, or a file")
    for name in ("v2", "a", "r"):
        parser.add_argument(f"--{name}", metavar="FOLDER", help=NAMES[name])
    parser.add_argument("--splits", nargs="*", default=[], metavar="NAME", help="more folders of --data")
    parser.add_argument("--sizes", nargs="*", type=int, default=[], metavar="PIXELS", help="other image sizes")
    parser.add_argument(
        "--images", type=int, default=0, help="images of each of --splits and --sizes, spread evenly; 0: all"
    )
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="fp32")
    parser.add_argument("--out", metavar="FILE", help="default results.json, as above")
    parser.add_argument("--table", nargs="+", metavar="FILE", help="print the table of results files instead")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    try:
        if args.table:
            print(table(args.table))
        elif not args.checkpoint or not args.data:
            parser.error("a checkpoint and --data are needed (or --table).")
        else:
            model = vca.load(args.checkpoint, device=open_device(args.device))
            settle_attention(model, device=open_device(args.device))
            images = open_images(model, args.data, args.split)
            if model.task == "generation":
                samples, labels = validation_data(images, model.sample_shape[-1], os.cpu_count())
                print(
                    f"validation loss {round(validation_loss(model, samples, labels), 5):.4f}  ({len(labels)} images)"
                )
                return
            with autocast(open_device(args.device), args.precision):
                measured = evaluate(model, images, args)
            here = Path(args.checkpoint) if Path(args.checkpoint).is_dir() else Path()  # a Hub id has no folder
            out = Path(args.out or here / "results.json")
            write_atomically(out, (json.dumps(measured, indent=2) + "\n").encode())
            print(f"{describe(measured)}\n{out}")
    except (vca.CheckpointError, DataError, RunError, ImportError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    interruptible(main)
