"""How good a generator's images are: in the eyes of a classifier, and beside real images that nobody trained on.

    python -m training.quality weights/GENERATOR --judge weights/CLASSIFIER --data FOLDER
    python -m training.quality weights/GENERATOR --judge weights/CLASSIFIER --data FOLDER --guidance 1 2 --steps 50
    python -m training.quality weights/GENERATOR weights/TWIN --judge weights/CLASSIFIER --data FOLDER

FOLDER holds train/CLASS/IMAGE, which the generator was trained on, and val/CLASS/IMAGE, which it was not. For each
guidance scale: the share of images that the judge takes for the class they were asked for; how much they differ within
a class; how near they lie to training images, since guidance raises the first number at the cost of variety and copying
raises it at no cost; the Fréchet distance to the training images on the judge's features, which is not FID, and
precision and recall on them. The same numbers of as many held-out images are the reference.

The numbers go into the checkpoint's `config.json` and its card, two pictures beside them, and as `sampling` the
settings that are best: the smallest Fréchet distance of those at which images are recognised as often as held-out
ones. Several generators of the same classes share what is measured of real images. The images stay in --out; the same
command goes on where it was interrupted. 1,000 images of a 4 M model at 25 steps and five scales take about 10 minutes
of one core, 50,000 training images looked at by a classifier of 1 M and compared with them about 4.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import vca
from training.card import write_card
from training.core.attention_path import settle_attention
from training.core.cli import interruptible
from training.core.plots import grid_png
from training.core.run import RunError, open_device
from training.core.sampling import SampleError, add_schedule_arguments, sample_files, schedule_of
from training.data.images import DataError, Images, eval_transform, generator_cfg, normalize
from vca.checkpoint import place, write_atomically, write_config
from vca.diffusion.vae import DecoderError
from vca.extras import import_extra
from vca.models.common import resized
from vca.models.dit import DiffusionTransformer

MAX_TRAIN = 50_000
NEIGHBORS = 50
COPY = 0.5
GRID_ROWS, GRID_COLUMNS = 8, 10
SHOWN_SIDE = 64
ERRORS = (vca.CheckpointError, DataError, DecoderError, RunError, SampleError, ImportError, ValueError, OSError)


@torch.inference_mode()
def judged(judge: nn.Module, pixels: Tensor, batch_size: int = 250) -> tuple[Tensor, Tensor]:
    """What a classifier sees in images (N, 3, H, W), uint8: features (N, D) before its head, and logits (N, K)."""
    transform = eval_transform(judge.pretrained_cfg, as_bytes=True)
    device = next(judge.parameters()).device
    features, logits = [], []
    for part in pixels.split(batch_size):
        images = [Image.fromarray(image) for image in part.permute(0, 2, 3, 1).numpy()]
        x = torch.stack([transform(image) for image in images]).permute(0, 3, 1, 2)
        tokens = judge.forward_features(normalize(x.to(device), judge.pretrained_cfg))
        features.append(judge.forward_head(tokens, pre_logits=True).cpu())
        logits.append(judge.forward_head(tokens).cpu())
    return torch.cat(features), torch.cat(logits)


def nearest(queries: Tensor, references: Tensor, count: int, chunk: int = 5000) -> tuple[Tensor, Tensor]:
    """Euclidean distances (N, count) from each query (N, D) to its nearest references (M, D), rising; their indices."""
    best = torch.full((len(queries), 0), 0.0), torch.full((len(queries), 0), 0)
    for start in range(0, len(references), chunk):
        far = torch.cdist(queries, references[start : start + chunk].float())
        indices = torch.arange(start, start + far.shape[1]).expand_as(far)
        far, indices = torch.cat([best[0], far], dim=1), torch.cat([best[1], indices], dim=1)
        values, order = far.topk(min(count, far.shape[1]), largest=False)
        best = values, indices.gather(1, order)
    return best


def nearest_pixels(pixels: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    """`nearest` of uint8 images (N, 3, H, W), or of their mirror images, in root mean square grey levels."""
    flat = references.flatten(1)
    both = [nearest(view.flatten(1).float(), flat, NEIGHBORS) for view in (pixels, pixels.flip(-1))]
    distances, indices = (torch.cat(pair, dim=1) for pair in zip(*both, strict=True))
    values, order = distances.topk(min(NEIGHBORS, len(flat)), largest=False)
    return values / flat.shape[1] ** 0.5, indices.gather(1, order)


def spread(features: Tensor, labels: Tensor, num_classes: int) -> list[float]:
    """Mean distance of two different images of each class, on features (N, D)."""
    return [nn.functional.pdist(features[labels == label]).mean().item() for label in range(num_classes)]


def statistics(features: Tensor) -> dict[str, np.ndarray]:
    """Mean and covariance of features (N, D), float64."""
    return import_extra("torch_fidelity.metric_fid", "train").fid_features_to_statistics(features.double())


def frechet_distance(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    """Between the normal distributions of two `statistics`."""
    metric = import_extra("torch_fidelity.metric_fid", "train")
    return metric.fid_statistics_to_metric(ours, theirs, verbose=False)[metric.KEY_METRIC_FID]


def precision_recall(ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    """Of features (N, D) against real ones (M, D): precision and recall in percent, with 3 neighbors.

    Source: arXiv 1904.06991.
    """
    metric = import_extra("torch_fidelity.metric_prc", "train")
    found = metric.prc_features_to_metric(ours, theirs, prc_neighborhood=3, verbose=False)
    return 100 * found[metric.KEY_METRIC_PRECISION], 100 * found[metric.KEY_METRIC_RECALL]


def evenly_spaced(total: int, count: int) -> Tensor:
    """Indices of `count` of `total` images, spread evenly; of all, if there are fewer."""
    return torch.linspace(0, total - 1, min(count, total)).long()


class QualityReference:
    """The judge, the training images and as many held-out images as are generated.

    Args:
        images, held_out: uint8 (N, 3, H, W) at the generator's size.
        labels: of held_out.
        judge: classifier whose class k is the generator's class k.
    """

    def __init__(self, judge: nn.Module, images: Tensor, held_out: Tensor, labels: Tensor):
        self.judge, self.images = judge, images
        self.features = judged(judge, images)[0]
        self.statistics = statistics(self.features)
        self.spread = spread(judged(judge, held_out)[0], labels, judge.num_classes)
        self.held_out = self.measure(held_out, labels)[0] | dict(images=len(held_out))

    def measure(self, pixels: Tensor, labels: Tensor) -> tuple[dict, tuple[Tensor, Tensor]]:
        """The numbers of images (N, 3, H, W), uint8, asked for as `labels`; and `nearest_pixels` of them.

        recognised, recognised_by_class: percent. diversity, diversity_by_class: distance within a class in percent of
        that of held-out images, and its mean. nearest_pixels (grey levels), nearest_features: median distance to the
        nearest training image. copies: percent whose nearest training image is less than half as far as their 50
        nearest on average. frechet_distance: on the judge's features; precision, recall: on them, percent, against as
        many training images.
        """
        features, logits = judged(self.judge, pixels)
        hits = (logits.argmax(1) == labels).double()
        classes = range(self.judge.num_classes)
        shares = [100 * hits[labels == label].mean().item() for label in classes]
        ours = spread(features, labels, self.judge.num_classes)
        diversity = [100 * mine / real for mine, real in zip(ours, self.spread, strict=True)]
        near = nearest_pixels(pixels, self.images)
        precision, recall = precision_recall(features, self.features[evenly_spaced(len(self.features), len(features))])
        result = dict(
            recognised=100 * hits.mean().item(),
            recognised_by_class=[round(share, 1) for share in shares],
            diversity=sum(diversity) / len(diversity),
            diversity_by_class=[round(share, 1) for share in diversity],
            nearest_pixels=near[0][:, 0].median().item(),
            nearest_features=nearest(features, self.features, 1)[0].median().item(),
            copies=100 * (near[0][:, 0] < COPY * near[0].mean(1)).double().mean().item(),
            frechet_distance=frechet_distance(statistics(features), self.statistics),
            precision=precision,
            recall=recall,
        )
        return {key: round(value, 2) if isinstance(value, float) else value for key, value in result.items()}, near


def over_seeds(measured: list[dict]) -> dict:
    """The mean of what `QualityReference.measure` says of images of several seeds, and its main numbers by seed."""
    means = {key: np.round(np.mean([one[key] for one in measured], axis=0), 2).tolist() for key in measured[0]}
    names = ("recognised", "frechet_distance", "precision", "recall")
    return means | dict(by_seed={name: [one[name] for one in measured] for name in names})


def best_of(rows: list[dict], real: float) -> float:
    """The guidance scale of smallest Fréchet distance of those at which images are recognised as often as real ones,
    in percent; if they never are, the one of the most recognised."""
    good = [row for row in rows if row["recognised"] >= real]
    best = min(good, key=lambda row: row["frechet_distance"]) if good else max(rows, key=lambda row: row["recognised"])
    return best["guidance"]


def read_images(files: list[Path]) -> Tensor:
    """PNG files of one size as uint8 (N, 3, H, W)."""
    pixels = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def class_grid(pixels: Tensor, labels: Tensor) -> bytes:
    """A PNG with a column for each of the first classes: its first images."""
    columns = min(GRID_COLUMNS, int(labels.max()) + 1)
    chosen = [pixels[labels == label][:GRID_ROWS] for label in range(columns)]
    rows = min(map(len, chosen))
    return grid_png(enlarged(torch.stack([images[:rows] for images in chosen], dim=1).flatten(0, 1)), columns)


def nearest_grid(pixels: Tensor, near: tuple[Tensor, Tensor], images: Tensor) -> bytes:
    """A PNG: above, the images most like a copy, measured as `copies` is; below each, its nearest training image."""
    distances, indices = near
    order = (distances[:, 0] / distances.mean(1)).argsort()[:GRID_COLUMNS]
    return grid_png(enlarged(torch.cat([pixels[order], images[indices[order, 0]]])), len(order))


def enlarged(pixels: Tensor) -> Tensor:
    """uint8 (N, 3, H, W) -> [0, 1], small images drawn in squares of pixels, so that a page shows more than a stamp."""
    times = max(1, SHOWN_SIDE // pixels.shape[-1])
    return pixels.repeat_interleave(times, 2).repeat_interleave(times, 3) / 255


def open_split(folder: str, split: str, label_names: list[str]) -> Images:
    """The images of a split.

    Raises:
        DataError: there are none, or their classes are not those of the generator.
    """
    images = Images(folder, split)
    if images.class_names != label_names:
        raise DataError(f"the classes of {folder}/{split} are not those of the generator, in its order.")
    return images


def read_split(images: Images, side: int, count: int) -> tuple[Tensor, Tensor]:
    """`count` images, evenly spread over a split, as the generator sees them: uint8 (N, 3, H, W) and labels (N,)."""
    images.transform = eval_transform(generator_cfg(side), as_bytes=True)
    chosen = evenly_spaced(len(images), count).tolist()
    pixels, labels = zip(*(images[index] for index in chosen), strict=True)
    return torch.stack(pixels).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)


class QualityReferences:
    """The `QualityReference` of images of each size, made once.

    Args:
        judge: as there.
        folder: images, as above.
        label_names: the generators' classes.
        count: of held-out images.

    Raises:
        DataError: a split is missing, or has other classes.
    """

    def __init__(self, judge: nn.Module, folder: str, label_names: list[str], count: int):
        self.judge, self.folder, self.count = judge, folder, count
        self.train, self.val = (open_split(folder, split, label_names) for split in ("train", "val"))
        self._made: dict[int, QualityReference] = {}

    def at(self, side: int) -> QualityReference:
        """That of images of `side` pixels. Raises a DataError: a class has no two held-out images."""
        if side not in self._made:
            held_out, labels = read_split(self.val, side, self.count)
            if labels.bincount(minlength=self.judge.num_classes).min() < 2:
                raise DataError(f"{self.folder}/val must hold at least two images of each class.")
            images = read_split(self.train, side, MAX_TRAIN)[0]
            print(f"the judge looks at {len(images)} training images", file=sys.stderr)
            self._made[side] = QualityReference(self.judge, images, held_out, labels)
        return self._made[side]


def measure_generator(
    checkpoint: Path, generator: DiffusionTransformer, references: QualityReferences, args: argparse.Namespace
) -> None:
    """Makes the images of a generator, and writes numbers, pictures and the best settings into its checkpoint."""
    schedule = schedule_of(args)
    settings = dict(steps=args.steps, sampler=args.sampler, precision=args.precision) | schedule
    made = {
        (guidance, seed): sample_files(
            generator, args.out / place(checkpoint) / f"guidance-{guidance:g}" / f"seed-{seed}", args.count,
            args.batch_size, flat=True, balanced=True,
            settings=settings | dict(seed=seed, guidance_scale=guidance, guided_channels=None),
        )
        for guidance in args.guidance
        for seed in args.seeds
    }  # fmt: skip
    reference = references.at(Image.open(made[args.guidance[0], args.seeds[0]][0]).height)
    labels = torch.arange(args.count) % generator.num_classes
    rows, pictures = [], {}
    for guidance in args.guidance:
        by_seed = []
        for seed in args.seeds:
            pixels = read_images(made[guidance, seed])
            numbers, near = reference.measure(pixels, labels)
            by_seed.append(numbers)
            if guidance not in pictures:
                pictures[guidance] = class_grid(pixels, labels), nearest_grid(pixels, near, reference.images)
        rows.append(dict(guidance=guidance, **over_seeds(by_seed)))
        print(json.dumps(rows[-1]))
    print(json.dumps(dict(held_out=reference.held_out)))
    best = best_of(rows, reference.held_out["recognised"])
    for name, picture in zip(("quality.png", "nearest.png"), pictures[best], strict=True):
        write_atomically(checkpoint / name, picture)
    config = json.loads((checkpoint / "config.json").read_text())
    config["training"][-1]["results"]["quality"] = dict(
        judge=Path(args.judge).name, judge_size=references.judge.pretrained_cfg["input_size"][-1], count=args.count,
        sampler=args.sampler or next(iter(generator.objective.SAMPLERS)),
        steps=args.steps, seeds=args.seeds, precision=args.precision, train_images=len(reference.images),
        best_guidance=best, guidance=rows, held_out=reference.held_out, features=reference.features.shape[1],
        torch=torch.__version__, device=args.device, options=options_of(args), **schedule,
    )  # fmt: skip
    config["sampling"] = dict(steps=args.steps, guidance_scale=best, **schedule)
    write_config(checkpoint, config)
    write_card(checkpoint)


def options_of(args: argparse.Namespace) -> str:
    """What follows the checkpoint in a command that gives these numbers anywhere."""
    judge = place(Path(args.judge)) if Path(args.judge).is_dir() else args.judge
    words = ["--judge", judge, "--data", "DATA", "--count", args.count, "--guidance"]
    words += [*(f"{guidance:g}" for guidance in args.guidance), "--steps", args.steps, "--precision", args.precision]
    words += ["--seeds", *args.seeds] + (["--sampler", args.sampler] if args.sampler else [])
    words += ["--judge-size", args.judge_size] if args.judge_size else []
    for name, value in schedule_of(args).items():
        words += [f"--{name.replace('_', '-')}", *(value if isinstance(value, list) else [value])]
    return shlex.join(map(str, words))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "checkpoints", type=Path, nargs="+", metavar="checkpoint",
        help="checkpoint folder of a generator; the result is written into it",
    )  # fmt: skip
    parser.add_argument("--judge", required=True, help="checkpoint of a classifier of the same classes")
    parser.add_argument("--judge-size", type=int, metavar="PIXELS", help="side at which it sees them; default its own")
    parser.add_argument("--data", required=True, metavar="FOLDER", help="images, as above")
    parser.add_argument("--count", type=int, default=1000, help="images at each guidance scale")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 1.5, 2.0, 3.0, 4.0])
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--sampler", help="ddpm or ddim for DiT; euler, heun or sde for SiT; default the first")
    add_schedule_arguments(parser)
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), default="bf16", help="of the sampling; bf16 by autocast"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of --count images each")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("runs/quality"), help="the images go to OUT/CHECKPOINT")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    try:
        for folder in args.checkpoints:
            if not folder.is_dir():
                raise vca.CheckpointError(f"{folder}: no such checkpoint folder.")
        device = open_device(args.device)
        generators = {folder: vca.load(folder, device=device) for folder in args.checkpoints}
        judge = vca.load(args.judge, device=device)
        settle_attention(*generators.values(), judge, device=device)
        for folder, generator in generators.items():
            check(folder, generator, judge, args)
        judge = resized(judge, args.judge_size) if args.judge_size else judge
        references = QualityReferences(judge, args.data, judge.label_names, args.count)
        for folder, generator in generators.items():
            measure_generator(folder, generator, references, args)
    except ERRORS as error:
        sys.exit(f"error: {error}")


def check(checkpoint: Path, generator: nn.Module, judge: nn.Module, args: argparse.Namespace) -> None:
    """Refuses what cannot be measured, before anything is generated.

    Raises:
        SampleError: the message says why.
    """
    if generator.task != "generation":
        raise SampleError(f"{checkpoint} is a classifier; only a generator makes images.")
    if judge.task != "classification":
        raise SampleError(f"--judge {args.judge} is a generator; a classifier is needed.")
    if args.judge_size and not hasattr(judge, "set_input_size"):
        raise SampleError(f"--judge-size is for a ViT; {args.judge} takes images of its own size alone.")
    if judge.label_names != generator.label_names:
        raise SampleError(f"the classes of {args.judge} are not those of {checkpoint}, in its order.")
    if not generator.training_history:
        raise SampleError(f"{checkpoint} tells nothing of its training, to which the result could be added.")
    if args.count < 2 * generator.num_classes:
        raise SampleError(f"--count {args.count} is too few: diversity takes two images of each class.")


if __name__ == "__main__":
    interruptible(main)
