"""How faithful every attribution of a classifier is, beside a random order, a centre prior and an edge map.

    python -m benchmarks.faithfulness weights/NAME --data FOLDER --count 200

Takes images evenly from FOLDER/val and explains the predicted class of each. Writes a table with its protocol to
docs/faithfulness.md; one CPU thread, about 5 minutes for 200 images of 32 px. `vca/attribution.py` and
`vca/faithfulness.py` define the methods and the measures.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from scipy.stats import wilcoxon
from torch import Tensor, nn

import vca
from training.core.cli import interruptible
from training.data.images import DataError, Images, eval_transform
from vca.attribution import METHODS, cell_size
from vca.faithfulness import BASELINES, curves, infidelity, random_map, sensitivity

RANDOM = "random order"
ORDERS = 3
LEVEL = 0.01
INFIDELITY_DRAWS, SENSITIVITY_DRAWS = 16, 3


@dataclass(frozen=True)
class Row:
    """One attribution: areas for each image (B,), and the other measures for the first few images.

    Only methods have a sensitivity, and only the random order a spread: the standard deviation, over the orders, of
    both mean areas.
    """

    name: str
    deletion: Tensor
    insertion: Tensor
    infidelity: Tensor
    sensitivity: Tensor | None = None
    spread: tuple[float, float] | None = None


def load_images(folder: str, model: nn.Module, count: int) -> Tensor:
    """`count` normalised images (B, 3, H, W), evenly from all of FOLDER/val, so that all classes are among them."""
    images = Images(folder, "val", eval_transform(model.pretrained_cfg))
    if count > len(images):
        raise DataError(f"{folder}/val has {len(images)} images, {count} are asked for.")
    return torch.stack([images[index * len(images) // count][0] for index in range(count)])


def measure(model: nn.Module, images: Tensor, steps: int, measured: int, note: Callable[[str], None]) -> list[Row]:
    """All attributions that are defined for the model, then the baselines; areas of random orders are their mean."""
    with torch.inference_mode():
        classes = torch.cat([model(batch).argmax(1) for batch in images.split(100)])
    classes, few = classes.clone(), slice(measured)

    def row(name: str, maps: list[Tensor], stability: Tensor | None = None) -> Row:
        found = curves(model, images, classes, {str(i): values for i, values in enumerate(maps)}, steps).values()
        unfaithful = [
            infidelity(model, images[few], classes[few], values[few], INFIDELITY_DRAWS).double() for values in maps
        ]
        deletion, insertion = (
            torch.stack([getattr(c, f"{kind}_area") for c in found]).double() for kind in ("deletion", "insertion")
        )
        note(f"{name}: deletion {deletion.mean():.4f}, insertion {insertion.mean():.4f}")
        spread = (deletion.mean(1).std().item(), insertion.mean(1).std().item()) if len(maps) > 1 else None
        means = deletion.mean(0), insertion.mean(0), torch.stack(unfaithful).mean(0)
        return Row(name, *means, stability, spread)

    rows = [row(RANDOM, [random_map(images, seed) for seed in range(ORDERS)])]
    for name, method in METHODS.items():
        try:
            stability = sensitivity(model, images[few], classes[few], method, SENSITIVITY_DRAWS)
            values = torch.cat([method(model, *b) for b in zip(images.split(50), classes.split(50), strict=True)])
        except ValueError as error:
            note(f"{name}: not defined, {error}")
            continue
        rows.append(row(name, [values], stability))
    return rows + [row(name, [baseline(images)]) for name, baseline in BASELINES.items()]


def table(rows: list[Row]) -> str:
    """Markdown; every area with the corrected p of its difference from the random order."""
    reference, tests = rows[0], 2 * (len(rows) - 1)

    def area(values: Tensor, random: Tensor, better: int, spread: float) -> str:
        if values is random:
            return f"{values.mean():.3f} ± {spread:.3f}"
        p = min(1.0, wilcoxon(values.numpy(), random.numpy()).pvalue * tests)
        difference = float((values - random).mean())
        verdict = "not significant" if p >= LEVEL else "better" if difference * better > 0 else "worse"
        return f"{values.mean():.3f} ({difference:+.3f}, p {'< 1e-9' if p < 1e-9 else f'= {p:.1g}'}: {verdict})"

    lines = ["| attribution | deletion area | insertion area | infidelity | sensitivity |", "|---|---|---|---|---|"]
    for r in rows:
        stability = "-" if r.sensitivity is None else f"{r.sensitivity.mean():.3f}"
        areas = (
            area(values, random, better, spread)
            for values, random, better, spread in zip(
                (r.deletion, r.insertion),
                (reference.deletion, reference.insertion),
                (-1, 1),
                reference.spread,
                strict=True,
            )
        )
        lines.append(f"| {r.name} | {' | '.join(areas)} | {r.infidelity.mean():.2f} | {stability} |")
    return "\n".join(lines)


def page(args: argparse.Namespace, rows: list[Row], cell: tuple[int, int], cells: int) -> str:
    """The table with its protocol."""
    name = Path(args.checkpoint).name
    return f"""# Faithfulness of attributions: {name}

    python -m benchmarks.faithfulness weights/{name} --data FOLDER --count {args.count} --measured {args.measured}

{table(rows)}

In brackets: the difference from the random order, and whether it is significant.

- **Images**: {args.count} of FOLDER/val, taken evenly; the class explained is the predicted one.
- **Deletion**: the cells of the image are replaced by its mean color, those with the largest attribution first. The
  number is the area under the probability of the class. Smaller is more faithful.
- **Insertion**: the cells are put into the blurred image (Gaussian of 1/8 of the side) in the same order. Larger is
  more faithful.
- **Cells** are {cell[0]}x{cell[1]} pixels, {cells} in all; their value is the mean of the signed attribution.
  {min(args.steps, cells)} steps of equally many cells, area by trapezoids.
- **Random order**: the mean over {ORDERS} orders for every image, ± the standard deviation of the means of the orders.
- **Significance**: two-sided Wilcoxon signed-rank test, paired by image. A p below {LEVEL} is significant, after
  multiplication by the number of tests (Bonferroni).
- **Infidelity** (Captum): half of the cells, drawn {INFIDELITY_DRAWS} times, are replaced by the mean color. The number
  is the mean squared error with which the attribution, scaled to fit best, predicts the fall of the logit. Mean of
  {args.measured} images. Smaller is better; the measure rewards additive explanations.
- **Sensitivity** (Captum): the largest relative change of the attribution under {SENSITIVITY_DRAWS} draws of uniform
  noise of +-0.02 in every normalised pixel. Mean of the same {args.measured} images. Smaller is more stable.

The two maps are `vca.attribution.gradient_weighted` and `vca.attribution.rollout`. Their form was chosen among variants
on 40 CIFAR-10 training images.

Relevance is AttnLRP (arXiv 2402.05602), `vca.attribution.attn_lrp`: gradient x input, where products hand each factor
half of the gradient, norms divide by a constant, and activations are the input times a constant; then the mean over
each cell. Two things differ from the paper: linear layers have its epsilon rule with an epsilon of 0, not the gamma
rule that its authors use for vision transformers, and gates by a sigmoid are constants. A map, what the biases take and
what the softmaxes keep add up to the logit exactly; the map alone does not, for VCA as for self-attention.

The centre prior and the edge map never look at the model. Photos have their subject in the centre, so a method that
beats the random order should be compared with these two as well.

`vca.faithfulness` has two more measures, which this table leaves out. `pixel_flipping` (arXiv 1509.06321) turns cells
into uniform noise, the most important first, and averages the fall of the logit. `road` (arXiv 2202.00449) imputes
removed cells from their neighbours, so that the shape of what was removed tells little. It takes the probability when
the least important cells go, minus that when the most important ones go.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="checkpoint folder or Hub id")
    parser.add_argument("--data", required=True, help="data folder with a sub-folder val")
    parser.add_argument("--count", type=int, default=200, help="images")
    parser.add_argument("--steps", type=int, default=8, help="steps of each curve")
    parser.add_argument("--measured", type=int, default=20, help="images for infidelity and sensitivity")
    parser.add_argument("--out", type=Path, default=Path("docs/faithfulness.md"))
    args = parser.parse_args()
    if min(args.count, args.steps, args.measured) < 1:
        parser.error("--count, --steps and --measured must be positive")
    torch.set_num_threads(1)
    start = time.monotonic()
    try:
        model = vca.load(args.checkpoint)
        images = load_images(args.data, model, args.count)
    except (vca.CheckpointError, DataError) as error:
        sys.exit(f"error: {error}")

    def note(text: str) -> None:
        print(f"[{time.monotonic() - start:6.0f} s] {text}", flush=True)

    rows = measure(model, images, args.steps, args.measured, note)
    cell = cell_size(model, images)
    rows_of_cells, cols = (-(-side // c) for side, c in zip(images.shape[-2:], cell, strict=True))
    text = page(args, rows, cell, rows_of_cells * cols)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text, encoding="utf-8")
    print(f"\n{text}\nwritten to {args.out}")


if __name__ == "__main__":
    interruptible(main)
