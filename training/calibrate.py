"""Calibrates a classifier: its probabilities become frequencies, and it learns to say "probably none of my classes".

    python -m training.calibrate weights/NAME --data FOLDER --split val --unknown FOLDER

One temperature is fitted on half of FOLDER/SPLIT (Guo et al., arXiv 1706.04599) and divides the weights of the head, so
that the softmax of whoever loads the checkpoint is calibrated. The expected calibration error is measured on the other
half, before and after. --unknown holds images of none of the classes: how well the largest probability and the energy
(Liu et al., arXiv 2010.03759) tell them from the split's is given as AUROC; the better one becomes the score, with the
threshold that keeps 95 % of the split's images. What was measured goes into `config.json`, from which the card has it.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from scipy.stats import rankdata
from torch import Tensor, nn

import vca
from training.card import write_card
from training.core.attention_path import settle_attention
from training.core.cli import interruptible
from training.core.metrics import outputs
from training.core.precision import STORED, autocast
from training.core.run import RunError, open_device
from training.data.batches import FolderEvaluation, evenly
from training.data.errors import DataError
from training.data.images import eval_transform
from training.data.loading import open_loader, read_batches
from training.data.unlabeled import UnlabeledImages
from training.evaluate import open_images

BINS = 15
KEPT = 0.95


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The T for which softmax(logits / T) has the smallest cross-entropy; logits (N, classes), labels (N,)."""
    result = minimize_scalar(
        lambda log_t: F.cross_entropy(logits / torch.tensor(log_t).exp(), labels).item(),
        bounds=(-3, 3),
        method="bounded",
    )
    return float(torch.tensor(result.x).exp())


def calibration_error(logits: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """Expected calibration error of the likeliest class, in [0, 1]: bins of equal width, weighted by their images."""
    confidence, predicted = logits.softmax(1).max(1)
    right = (predicted == labels).float()
    index = (confidence * bins).ceil().clamp(1, bins).long() - 1
    gaps = torch.zeros(bins).index_add(0, index, right - confidence)
    return float(gaps.abs().sum() / len(labels))


SCORES = {
    "probability": lambda logits: logits.softmax(1).amax(1),
    "energy": lambda logits: logits.logsumexp(1),
}


def auroc(known: Tensor, unknown: Tensor) -> float:
    """The probability that a known image scores higher than an unknown one; ties count half."""
    ranks = torch.from_numpy(rankdata(torch.cat([known, unknown]).double().numpy()))
    wins = ranks[: len(known)].sum() - len(known) * (len(known) + 1) / 2
    return float(wins / (len(known) * len(unknown)))


def rejection(known: Tensor, unknown: Tensor) -> dict:
    """The score that best tells images of the classes from others, its threshold and what it reaches.

    Args:
        known, unknown: logits (N, classes) of images of the classes, and of none of them.
    """
    reached = {name: auroc(score(known), score(unknown)) for name, score in SCORES.items()}
    best = max(reached, key=reached.get)
    threshold = float(SCORES[best](known).quantile(1 - KEPT))
    caught = float((SCORES[best](unknown) < threshold).float().mean())
    return dict(
        score=best, threshold=round(threshold, 4), auroc=round(reached[best], 4),
        auroc_of_scores={name: round(value, 4) for name, value in reached.items()},
        known_kept=KEPT, unknown_caught=round(caught, 4), known_images=len(known), unknown_images=len(unknown),
    )  # fmt: skip


def fold_temperature(model: nn.Module, temperature: float) -> None:
    """Divides the head's weights, so that the model's logits are those before, divided by the temperature."""
    head = model.get_classifier()
    with torch.no_grad():
        head.weight.div_(temperature)
        head.bias.div_(temperature)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="checkpoint folder; it is changed in place")
    parser.add_argument("--data", required=True, help="data folder with a sub-folder for the split")
    parser.add_argument("--split", default="val")
    parser.add_argument("--unknown", required=True, type=Path, help="folder of images of none of the classes")
    parser.add_argument("--images", type=int, default=0, help="images of the split, spread evenly; 0 for all")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="fp32")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    try:
        print(calibrate(args))
    except (vca.CheckpointError, DataError, RunError, OSError) as error:
        sys.exit(f"error: {error}")


def calibrate(args: argparse.Namespace) -> str:
    """Calibrates the checkpoint in place and says what was measured."""
    device = open_device(args.device)
    model = vca.load(args.checkpoint, device=device)
    settle_attention(model, device=device)
    if not model.training_history:
        raise RunError(f"{args.checkpoint}: its config.json does not say what trained it.")
    cfg = model.pretrained_cfg
    images = open_images(model, args.data, args.split)
    unknown = UnlabeledImages(args.unknown, eval_transform(cfg, as_bytes=True))
    loader = open_loader(unknown, 250, num_workers=args.workers)
    strangers = ((x.permute(0, 3, 1, 2), torch.zeros(len(x))) for (x,) in read_batches(loader))
    with autocast(device, args.precision):
        known = _gather(model, FolderEvaluation(images, cfg, args.workers, share=evenly(len(images), args.images)))
        others, _ = _gather(model, strangers)
    (fit_logits, fit_labels), (logits, labels) = ([part[start::2] for part in known] for start in (0, 1))
    temperature = fit_temperature(fit_logits, fit_labels)
    measured = dict(
        temperature=round(temperature, 4), split=args.split, fitted_on=len(fit_labels), measured_on=len(labels),
        error_before=round(calibration_error(logits, labels), 4),
        error=round(calibration_error(logits / temperature, labels), 4), bins=BINS,
        rejection=rejection(logits / temperature, others / temperature) | dict(unknown=args.unknown.name),
    )  # fmt: skip
    fold_temperature(model, temperature)
    dtype = STORED[model.training_history[-1]["recipe"].get("stored_as", "fp32")]
    model.training_history[-1]["results"]["calibration"] = measured
    vca.save(model, args.checkpoint, label_names=model.label_names, training=model.training_history, dtype=dtype)
    write_card(args.checkpoint)
    found = measured["rejection"]
    return (
        f"temperature {temperature:.3f}; expected calibration error {measured['error_before']:.4f} -> "
        f"{measured['error']:.4f} on {len(labels)} images\n"
        f"none of the classes: AUROC {found['auroc']:.4f} by {found['score']}, {len(others)} images of others"
    )


def _gather(model: nn.Module, batches) -> tuple[Tensor, Tensor]:
    logits, labels = zip(*outputs(model, batches), strict=True)
    return torch.cat(logits).float().cpu(), torch.cat(labels).cpu()


if __name__ == "__main__":
    interruptible(main)
