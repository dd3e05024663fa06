"""Computes once what a pretrained model sees in training images, for generators that are aligned with it.

    python -m training.features --data IMAGES --out FEATURES --teacher timm:NAME --image-size 64 --grid 8
    python -m training.features --data IMAGES --out FEATURES --teacher timm:NAME=FILE.safetensors --image-size 256

IMAGES holds train/CLASS/IMAGE and val/CLASS/IMAGE, of which only those of train are needed. What is stored are the last
patch features of each image plain and flipped, FEATURES/train/features.npy, float16 (N, 2, T, C): 2 T C x 2 bytes an
image, 98 KB for 8 x 8 patches of a ViT-S. `--teacher FEATURES` of training.generate then takes them, with the images or
with cached latents of them. The same command goes on where it was interrupted.
"""

import argparse
import os
import sys
from pathlib import Path

import torch

import vca
from training.core.cli import interruptible
from training.core.features import on_grid
from training.core.init import place_of
from training.core.recipe import RecipeError
from training.core.run import RunError, open_device
from training.data.errors import DataError
from training.data.features import compute
from training.data.images import Images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="IMAGES")
    parser.add_argument("--out", required=True, metavar="FEATURES", type=Path)
    parser.add_argument("--teacher", required=True, metavar="MODEL", help="timm:NAME, timm:NAME=FILE or a checkpoint")
    parser.add_argument("--image-size", type=int, default=256, help="side of the generator's images, center crop")
    parser.add_argument("--grid", type=int, default=16, help="patches of the generator in a row")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16", help="bf16 by autocast")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    try:
        if min(args.image_size, args.batch_size, args.grid) < 1 or args.workers < 0:
            raise DataError("--image-size, --grid and --batch-size must be at least 1, --workers at least 0.")
        device = open_device(args.device)
        teacher = on_grid(args.teacher, args.grid, device)
        compute(
            Images(args.data, "train"), args.out / "train", str(place_of(args.teacher)), teacher, args.image_size,
            args.batch_size, args.workers, args.precision, device,
        )  # fmt: skip
    except (DataError, RecipeError, RunError, vca.CheckpointError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    interruptible(main)
