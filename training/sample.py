"""Generates images with a trained generator: a folder of PNG files, or one `.npz` for the ADM evaluation suite.

    python -m training.sample weights/NAME --count 50000 --out samples --steps 250 --sampler sde
    python -m training.sample weights/NAME --count 50000 --out samples.npz
    torchrun --nproc-per-node 8 -m training.sample weights/NAME --count 50000 --out samples

Image i has label i mod the number of classes (or a random one) and depends on seed, label and i alone, so that an
interrupted command goes on where it stopped, and a larger --count adds to the images of a smaller one. Batches are
shared out whole: with any number of processes the files hold the same bytes, as far as the machine computes a batch
alike. Processes share nothing but the folder: without torchrun, RANK and WORLD_SIZE say which part each one makes.
"""

import argparse
import sys
from pathlib import Path

import torch

import vca
from training.core.attention_path import settle_attention
from training.core.cli import interruptible
from training.core.distributed import local_device
from training.core.run import RunError, open_device
from training.core.sampling import (
    SampleError,
    add_schedule_arguments,
    process,
    sample_files,
    schedule_of,
    write_npz,
)
from vca.diffusion.sampling import check_guidance
from vca.diffusion.vae import DecoderError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="checkpoint folder of a generator")
    parser.add_argument("--count", type=int, required=True, help="number of images")
    parser.add_argument("--out", type=Path, required=True, help="folder, or file ending in .npz")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--sampler", help="ddpm or ddim for DiT; euler, heun or sde for SiT; default the first")
    parser.add_argument("--guidance", type=float, default=1.0, help="guidance scale; 1 for none")
    parser.add_argument("--guided-channels", type=int, help="guide these first channels only; default all")
    add_schedule_arguments(parser)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--random-labels", action="store_true", help="draw the labels instead of taking turns")
    parser.add_argument("--flat", action="store_true", help="one folder for all classes")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16 by autocast")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    packed = args.out.suffix == ".npz"
    try:
        if args.count < 1 or args.batch_size < 1 or args.seed < 0:
            raise SampleError("--count and --batch-size must be at least 1, --seed at least 0.")
        part = process()
        device = open_device(local_device(args.device))
        model = vca.load(args.checkpoint, device=device)
        settle_attention(model, device=device)
        if model.task != "generation":
            raise SampleError(f"{args.checkpoint} is a classifier; only a generator makes images.")
        check_guidance(args.guidance, args.guidance_interval)
        model.times(1, args.sampler, args.time_shift)  # refuses what it cannot do before anything is made
        files = sample_files(
            model, args.out.with_suffix("") if packed else args.out, args.count, args.batch_size,
            flat=args.flat or packed, balanced=not args.random_labels, part=part,
            settings=dict(steps=args.steps, sampler=args.sampler, seed=args.seed, guidance_scale=args.guidance,
                          guided_channels=args.guided_channels, precision=args.precision, **schedule_of(args)),
        )  # fmt: skip
        present = sum(file.exists() for file in files)
        if packed and present == len(files):
            write_npz(args.out, files)
    except (vca.CheckpointError, DecoderError, RunError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{args.out}: {len(files)} images" + (f", {present} of them so far" if present < len(files) else ""))


if __name__ == "__main__":
    interruptible(main)
