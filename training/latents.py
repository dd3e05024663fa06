"""Encodes images once into the latents that a latent generator trains on.

    python -m training.latents --data IMAGES --out LATENTS --image-size 256
    python -m training.latents --data IMAGES --out LATENTS --image-size 64 --vae runs/scenes_autoencoder_4/checkpoint

IMAGES holds train/CLASS/IMAGE and val/CLASS/IMAGE. What is stored are the *moments* of the autoencoder, mean and
log-variance, of each image plain and flipped, from which every epoch draws new latents: training on them is training
on the images, which training.generate takes as well and then encodes again and again. LATENTS/SPLIT has `moments.npy`,
float32 (N, 2, 2C, H, W), 64 KiB an image of 256 px, and `index.json` with labels, class names, autoencoder and
checksums; `images.json` names the images with size and checksum, so that latents of images that were replaced or
renamed are refused. The same command goes on where it was interrupted.
"""

import argparse
import os
import sys
from pathlib import Path

import torch

from training.core.cli import interruptible
from training.core.run import RunError, open_device
from training.data.errors import DataError
from training.data.images import open_splits
from training.data.latents import encode
from vca.diffusion.vae import SD_VAE, DecoderError, LatentDecoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="IMAGES")
    parser.add_argument("--out", required=True, metavar="LATENTS", type=Path)
    parser.add_argument("--image-size", type=int, default=256, help="side after resizing and centre crop")
    parser.add_argument(
        "--vae", default=SD_VAE, help="Hub id or folder of the autoencoder, such as one of training.autoencoder"
    )
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    vae = LatentDecoder(args.vae)
    try:
        if min(args.image_size, args.batch_size) < 1 or args.workers < 0:
            raise DataError("--image-size and --batch-size must be at least 1, --workers at least 0.")
        device = open_device(args.device)
        for split, images in zip(("train", "val"), open_splits(args.data), strict=True):
            encode(images, args.out / split, vae, args.image_size, args.batch_size, args.workers, device)
    except (DataError, DecoderError, RunError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    interruptible(main)
