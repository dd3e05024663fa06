"""FID, Inception score, precision and recall of generated images against real ones.

    python -m training.fid SAMPLES REFERENCE
    python -m training.fid samples VIRTUAL_imagenet256_labeled.npz --weights INCEPTION.pth --card weights/NAME

Each side is a folder of images, sub-folders included, or an `.npz` as the ADM evaluation suite reads it:
images `arr_0`, uint8 (N, H, W, 3). A REFERENCE with `mu` and `sigma` gives FID from these; its images, if any, serve
for precision and recall. All are torch-fidelity's: its Inception network and its formulas, precision and recall with
3 neighbours on the same 2048 Inception features as FID (its own command would take VGG's). There is no sFID.

torch-fidelity downloads Inception's weights (91 MB) on first use; without a network, --weights names the file. With
--card the result and the protocol of SAMPLES are written into a checkpoint's `config.json` and onto its card.
"""

import argparse
import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch_fidelity
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_featuresdict_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric
from torch_fidelity.utils import create_feature_extractor, get_featuresdict_from_dataset

import vca
from training.card import write_card
from training.core.cli import interruptible
from training.core.run import RunError, open_device
from training.core.sampling import weights_digest
from training.data.folders import find_images
from vca.checkpoint import sha256, write_config
from vca.images import upright_rgb

FEATURES, LOGITS = "2048", "logits_unbiased"
FEWEST = 10
ENOUGH = 2048


class FidError(ValueError):
    """Images or weights that cannot be used; the message says which and why."""


class Files(Dataset):
    """Image files of one size: item i is uint8 (3, H, W).

    Attributes:
        size: height and width.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.files = [folder / file for file in find_images(folder)[0]]
        if not self.files:
            raise FidError(f"{folder} holds no images.")
        self.size = tuple(self[0].shape[1:])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        file = self.files[index]
        try:
            with Image.open(file) as opened:
                pixels = np.array(upright_rgb(opened))
        except Exception as error:  # Pillow's readers have no error in common
            raise FidError(f"{file} is not a readable image ({error}).") from None
        if index and pixels.shape[:2] != self.size:
            raise FidError(f"{file} is {shown(pixels.shape[:2])}, others in {self.folder} are {shown(self.size)}.")
        return torch.from_numpy(pixels).permute(2, 0, 1)


class Packed(Dataset):
    """The images `arr_0` of an `.npz`, left on disk if they are not compressed; as `Files`."""

    def __init__(self, file: Path):
        self.pixels = mapped(file)
        if self.pixels.ndim != 4 or self.pixels.shape[-1] != 3 or self.pixels.dtype != np.uint8:
            raise FidError(f"{file}: arr_0 must be uint8 (N, H, W, 3), not {self.pixels.dtype} {self.pixels.shape}.")
        self.size = self.pixels.shape[1:3]

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(np.array(self.pixels[index])).permute(2, 0, 1)


def mapped(file: Path) -> np.ndarray:
    """`arr_0` of an `.npz`: a map of the file where it is stored as it is, else read into memory."""
    with zipfile.ZipFile(file) as archive:
        member = archive.getinfo("arr_0.npy")
        if member.compress_type != zipfile.ZIP_STORED:
            return np.load(file)["arr_0"]
        with archive.open(member) as stream:
            version = np.lib.format.read_magic(stream)
            read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
            shape, fortran, dtype = read(stream)
            header = stream.tell()
    with open(file, "rb") as stream:  # a zip member's name and extra field lie between its header and its data
        stream.seek(member.header_offset + 26)
        names = sum(np.frombuffer(stream.read(4), "<u2").tolist())
    start = member.header_offset + 30 + names + header
    return np.memmap(file, dtype, "r", start, shape, order="F" if fortran else "C")


def shown(size: tuple[int, int]) -> str:
    return f"{size[1]}x{size[0]}"


def open_source(path: Path) -> tuple[Files | Packed | None, dict | None]:
    """Images of a folder or `.npz`, and its statistics `mu` (D) and `sigma` (D, D), float64; None for what it lacks.

    Raises:
        FidError: there is neither, or the statistics are none.
    """
    if path.is_dir():
        return Files(path), None
    try:
        with np.load(path) as stored:
            names = set(stored.files)
            given = {"mu", "sigma"} <= names
            statistics = {name: stored[name].astype(np.float64) for name in ("mu", "sigma")} if given else None
        images = Packed(path) if "arr_0" in names else None
    except FidError:
        raise
    except Exception as error:  # numpy's and zipfile's readers have no error in common, and .npy is no context
        raise FidError(f"{path} is neither a folder of images nor an .npz file that can be read ({error}).") from None
    if statistics:
        _check_statistics(path, **statistics)
    elif images is None:
        raise FidError(f"{path} has neither images arr_0 nor statistics mu and sigma; it has {', '.join(names)}.")
    return images, statistics


def _check_statistics(path: Path, mu: np.ndarray, sigma: np.ndarray) -> None:
    if mu.shape != (int(FEATURES),):
        raise FidError(f"{path}: mu is {mu.shape} instead of ({FEATURES},).")
    if sigma.shape != (len(mu), len(mu)):
        raise FidError(f"{path}: sigma is {sigma.shape} instead of ({FEATURES}, {FEATURES}).")
    for name, array in (("mu", mu), ("sigma", sigma)):
        if not np.isfinite(array).all():
            raise FidError(f"{path}: {name} holds NaN or infinite values.")


def open_inception(weights: Path | None, cuda: bool) -> FeatureExtractorInceptionV3:
    """torch-fidelity's Inception network.

    Raises:
        FidError: its weights are not to be had, or the file does not hold them.
    """
    if weights is not None:
        try:
            torch.load(
                weights, map_location="cpu", weights_only=True
            )  # torch-fidelity itself would run a pickle's code
        except FileNotFoundError:
            raise FidError(f"--weights {weights}: file not found.") from None
        except Exception as error:
            raise FidError(f"--weights {weights}: not a file of tensors that can be read safely ({error}).") from None
    path = str(weights) if weights else None
    try:
        return create_feature_extractor(
            "inception-v3-compat", [FEATURES, LOGITS], cuda=cuda, feature_extractor_weights_path=path, verbose=False
        )
    except OSError as error:
        raise FidError(
            f"Inception's weights cannot be downloaded ({error}); fetch {URL_INCEPTION_V3} where there is a network "
            "and give the file as --weights."
        ) from None
    except (RuntimeError, TypeError, AttributeError) as error:
        raise FidError(
            f"--weights {weights}: not the weights of this network ({str(error).splitlines()[0]})."
        ) from None


def features_of(images: Files | Packed, inception, batch_size: int, cuda: bool) -> dict[str, Tensor]:
    """torch-fidelity's dictionary of features (N, D) of each image."""
    return get_featuresdict_from_dataset(images, inception, batch_size, cuda, save_cpu_ram=True, verbose=True)


def statistics_of(features: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Mean and covariance for FID, float64."""
    return {name: array.astype(np.float64) for name, array in fid_features_to_statistics(features[FEATURES]).items()}


def measure(samples: Path, reference: Path, weights: Path | None, batch_size: int = 50, cuda: bool = False) -> dict:
    """FID, Inception score with its spread over 10 parts, precision, recall where there are reference images, counts.

    Raises:
        FidError: images or weights cannot be used, or images are too few or of unequal sizes.
    """
    ours, _ = open_source(samples)
    theirs, statistics = open_source(reference)
    if ours is None:
        raise FidError(f"{samples} holds statistics alone; the images are needed.")
    for path, images in ((samples, ours), (reference, theirs)):
        if images is not None and len(images) < FEWEST:
            raise FidError(f"{path} holds {len(images)} images; at least {FEWEST} are needed (papers take 50,000).")
    if theirs is not None and ours.size != theirs.size:
        raise FidError(f"{samples} are {shown(ours.size)}, {reference} {shown(theirs.size)}: not comparable.")
    if len(ours) < ENOUGH:
        print(f"warning: {len(ours)} images for {ENOUGH} features give a FID that is far too high.", file=sys.stderr)
    inception = open_inception(weights, cuda)
    mine = features_of(ours, inception, batch_size, cuda)
    real = features_of(theirs, inception, batch_size, cuda) if theirs is not None else None
    fid = fid_statistics_to_metric(statistics_of(mine), statistics or statistics_of(real), verbose=False)
    score = isc_featuresdict_to_metric(mine, LOGITS, verbose=False)
    result = dict(
        fid=fid[KEY_METRIC_FID], inception_score=score[KEY_METRIC_ISC_MEAN], inception_std=score[KEY_METRIC_ISC_STD]
    )
    if real:
        manifold = prc_features_to_metric(mine[FEATURES], real[FEATURES], save_cpu_ram=True, verbose=False)
        result |= dict(precision=manifold[KEY_METRIC_PRECISION], recall=manifold[KEY_METRIC_RECALL])
    source = "mu and sigma of the file" if statistics else "its images"
    return result | dict(
        images=len(ours), reference=reference.name, reference_images=len(theirs) if real else 0, statistics=source
    )


def sampling_of(samples: Path, checkpoint: Path) -> dict:
    """What `samples.json` says of images that `training.sample` made with a checkpoint.

    Raises:
        FidError: it did not make them.
    """
    note = (samples if samples.is_dir() else samples.with_suffix("")) / "samples.json"
    try:
        settings = json.loads(note.read_text())
    except (OSError, ValueError):
        raise FidError(f"{note} is missing; --card takes images that training.sample made.") from None
    model = vca.load(checkpoint)
    if settings.get("weights") != weights_digest(model):
        raise FidError(f"{samples} were not made with the weights of {checkpoint}.")
    settings["sampler"] = settings["sampler"] or next(iter(model.objective.SAMPLERS))
    return settings | dict(decoder=model.latent_decoder.source if model.latent_decoder else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples", type=Path, help="folder of images, or .npz")
    parser.add_argument("reference", type=Path, help="folder of images, or .npz with images, mu and sigma, or both")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="Inception's weights as torch-fidelity has them")
    parser.add_argument("--card", type=Path, metavar="CHECKPOINT", help="write the result onto this generator's card")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    try:
        cuda = open_device(args.device).type == "cuda"
        sampling = sampling_of(args.samples, args.card) if args.card else {}
        result = measure(args.samples, args.reference, args.weights, args.batch_size, cuda)
    except (FidError, RunError, vca.CheckpointError) as error:
        sys.exit(f"error: {error}")
    weights = f"sha256 {sha256(args.weights)[:16]}" if args.weights else URL_INCEPTION_V3.rpartition("/")[2]
    result |= dict(evaluator=f"torch-fidelity {torch_fidelity.__version__}, Inception weights {weights}")
    for name, value in result.items():
        print(f"{name:17} {value:.4f}" if isinstance(value, float) else f"{name:17} {value}")
    if args.card:
        add_to_card(args.card, result | dict(sampling=sampling))


def add_to_card(checkpoint: Path, result: dict) -> None:
    """Adds a result to `config.json`, in the place of one of the same sampling, reference and evaluator."""
    config = json.loads((checkpoint / "config.json").read_text())
    results = config["training"][-1]["results"]
    same = ("sampling", "images", "reference", "evaluator")
    others = [old for old in results.get("fid", []) if any(old[key] != result[key] for key in same)]
    results["fid"] = [*others, result]
    write_config(checkpoint, config)
    write_card(checkpoint)


if __name__ == "__main__":
    interruptible(main)
