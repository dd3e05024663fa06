"""Generating images into files, by one process or several."""

import argparse
import hashlib
import json
import os
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from training.core.plots import png
from training.core.precision import autocast
from vca.checkpoint import write_atomically
from vca.diffusion.sampling import to_bytes
from vca.models.dit import DiffusionTransformer


class SampleError(ValueError):
    """Images that cannot be generated as asked; the message says why."""


def add_schedule_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say when guidance applies and where the steps lie."""
    parser.add_argument("--guidance-interval", type=float, nargs=2, default=(0.0, 1.0), metavar=("FROM", "TO"),
                        help="guide on this part of the way from noise (0) to data (1); default all")  # fmt: skip
    parser.add_argument("--time-shift", type=float, default=1.0,
                        help="of SiT: above 1 more of the steps are near the noise, below near the data")  # fmt: skip


def schedule_of(args: argparse.Namespace) -> dict:
    """Those of these options that are not at their defaults, as arguments of `DiffusionTransformer.sample`."""
    chosen = dict(guidance_interval=list(args.guidance_interval), time_shift=args.time_shift)
    return {name: value for name, value in chosen.items() if value not in ([0.0, 1.0], 1.0)}


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
