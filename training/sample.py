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
import hashlib
import io
import json
import os
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import vca
from training.engine import RunError, autocast, open_device
from training.world import local_device
from vca.checkpoint import write_atomically
from vca.models.dit import DiffusionTransformer
from vca.sampling import to_bytes
from vca.vae import DecoderError


class SampleError(ValueError):
    """Images that cannot be generated as asked; the message says why."""


def png(pixels: Tensor) -> bytes:
    """A PNG file of one image, uint8 (3, H, W)."""
    stream = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy()).save(stream, format="PNG")
    return stream.getvalue()


def grid_png(images: Tensor, columns: int) -> bytes:
    """A PNG file of images (N, 3, H, W) in [0, 1], row by row; the last row may be filled up with black."""
    missing = -len(images) % columns
    rows = to_bytes(torch.cat([images, images.new_zeros(missing, *images.shape[1:])])).unflatten(0, (-1, columns))
    return png(rows.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2))


def label_of(index: int, num_classes: int, seed: int, balanced: bool) -> int:
    """The label of image `index`: each class in turn, or drawn uniformly."""
    return index % num_classes if balanced else int(np.random.default_rng((seed, index, 1)).integers(num_classes))


def weights_digest(model: DiffusionTransformer) -> str:
    """16 hexadecimal digits that tell one set of weights from another."""
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.float().contiguous().cpu().numpy())
    return digest.hexdigest()[:16]


def process() -> tuple[int, int]:
    """The number of this process and how many there are, as torchrun says it."""
    rank, count = (os.environ.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if not (rank.isdecimal() and count.isdecimal() and int(rank) < int(count)):
        raise SampleError(f"RANK={rank} of WORLD_SIZE={count} is no process number.")
    return int(rank), int(count)


def sample_files(
    model: DiffusionTransformer, out: Path, count: int, batch_size: int, *, flat: bool, balanced: bool, settings: dict,
    part: tuple[int, int] = (0, 1),
) -> list[Path]:  # fmt: skip
    """Writes the images that are not there yet, and `samples.json` with the settings; returns all paths in order.

    Args:
        flat: all images in one folder instead of one folder per class.
        settings: arguments of `DiffusionTransformer.sample`, `seed` among them, and `precision`, "fp32" or "bf16".
        part: number of this process and how many there are; it makes every so many-th batch.

    Raises:
        SampleError: `out` holds images made with other settings or weights.
    """
    described = settings | dict(flat=flat, balanced=balanced, weights=weights_digest(model))
    out.mkdir(parents=True, exist_ok=True)
    note = out / "samples.json"
    if note.exists() and (old := json.loads(note.read_text())) != described:
        changed = sorted(k for k in old.keys() | described.keys() if old.get(k) != described.get(k))
        raise SampleError(f"{out} holds images made with another {', '.join(changed)}; choose another --out.")

    labels = [label_of(index, model.num_classes, settings["seed"], balanced) for index in range(count)]
    names = [name.replace("/", "_") for name in model.label_names]
    folders = [out if flat else out / f"{label:04d}_{names[label]}" for label in range(model.num_classes)]
    files = [folders[label] / f"{index:06d}.png" for index, label in enumerate(labels)]
    arguments = {key: value for key, value in settings.items() if key != "precision"}
    context = autocast(model.pos_embed.device, settings["precision"])
    number, processes = part
    batches = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    with tqdm(total=sum(map(len, batches[number::processes])), unit="image") as bar:
        for indices in batches[number::processes]:
            missing = [index for index in indices if not files[index].exists()]
            if missing:  # the whole batch is made again: in another batch an image may differ by rounding
                with context:
                    images = model.sample([labels[i] for i in indices], indices=indices, **arguments)
                pixels = to_bytes(images)
                write_atomically(note, json.dumps(described, indent=2).encode())
                for index in missing:
                    files[index].parent.mkdir(exist_ok=True)
                    write_atomically(files[index], png(pixels[index - indices.start]))
            bar.update(len(indices))
    return files


def write_npz(file: Path, files: list[Path]) -> None:
    """Packs images into the array that the ADM evaluation suite reads: `arr_0`, uint8 (N, H, W, 3)."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    with zipfile.ZipFile(temporary, "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as stream:
        for number, path in enumerate(files):
            pixels = np.asarray(Image.open(path))
            if not number:
                shape = (len(files), *pixels.shape)
                np.lib.format.write_array_header_1_0(stream, dict(descr="|u1", fortran_order=False, shape=shape))
            stream.write(pixels.tobytes())
    os.replace(temporary, file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="checkpoint folder of a generator")
    parser.add_argument("--count", type=int, required=True, help="number of images")
    parser.add_argument("--out", type=Path, required=True, help="folder, or file ending in .npz")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--sampler", help="ddpm or ddim for DiT; euler, heun or sde for SiT; default the first")
    parser.add_argument("--guidance", type=float, default=1.0, help="guidance scale; 1 for none")
    parser.add_argument("--guided-channels", type=int, help="guide these first channels only; default all")
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
        model = vca.load(args.checkpoint, device=open_device(local_device(args.device)))
        if not isinstance(model, DiffusionTransformer):
            raise SampleError(f"{args.checkpoint} is a classifier; only a generator makes images.")
        files = sample_files(
            model, args.out.with_suffix("") if packed else args.out, args.count, args.batch_size,
            flat=args.flat or packed, balanced=not args.random_labels, part=part,
            settings=dict(steps=args.steps, sampler=args.sampler, seed=args.seed, guidance_scale=args.guidance,
                          guided_channels=args.guided_channels, precision=args.precision),
        )  # fmt: skip
        present = sum(file.exists() for file in files)
        if packed and present == len(files):
            write_npz(args.out, files)
    except (vca.CheckpointError, DecoderError, RunError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{args.out}: {len(files)} images" + (f", {present} of them so far" if present < len(files) else ""))


if __name__ == "__main__":
    main()
