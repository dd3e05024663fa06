"""What `training.evaluate` and `training.calibrate` measured of a classifier, as paragraphs of its card."""

import json
from pathlib import Path

SOURCES = dict(
    val="validation images of the sources it is trained on",
    val_photos="the photos' validation images",
    val_tinyimagenet="Tiny-ImageNet-100's validation images",
    other_sources="other sources: pictures from a source that does not label their class, like those seen unlabeled",
    new_sources="new sources: pictures from a source that gave none of their class",
)


def read_results(folder: Path) -> dict:
    """The `results.json` of a checkpoint folder; empty if it has none."""
    file = folder / "results.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def by_source(measured: dict) -> str:
    """A table of the accuracy by split, if more than one was measured."""
    results = measured.get("results", {})
    if len(results) < 2:
        return ""
    lines = ["| images | number | top-1 (95 % interval) | top-5 |", "|---|---|---|---|"]
    for name, result in results.items():
        low, high = result["top1_interval"]
        top5 = f"{result['top5']:.2f} %" if "top5" in result else ""
        cells = SOURCES.get(name, name), f"{result['images']:,}", f"{result['top1']:.2f} % ({low:.2f}-{high:.2f})", top5
        lines.append(f"| {' | '.join(cells)} |")
    return "\n\n" + "\n".join(lines)


def by_size(measured: dict) -> str:
    """A table of the accuracy by image size, if it was measured."""
    sizes = measured.get("by_size", {})
    if not sizes:
        return ""
    images = next(iter(sizes.values()))["images"]
    accuracies = [f"{result['top1']:.1f} %" for result in sizes.values()]
    tokens = ", with as many contrast tokens," if measured["architecture"].startswith("vca_") else ""
    return f"""

The same weights at other image sizes{tokens} on {images:,} of the validation images ({measured["precision"]}):

| {" | ".join(f"{side} px" for side in sizes)} |
{"|---" * len(sizes)}|
| {" | ".join(accuracies)} |"""


def calibration(results: dict) -> str:
    """What calibration reached, if it was done."""
    if not (found := results.get("calibration")):
        return ""
    rejection = found["rejection"]
    return f"""

**Calibration.** The temperature {found["temperature"]:.3f}, fitted on {
        found["fitted_on"]:,} validation images, is part of
the head. The expected calibration error on {found["measured_on"]:,} others is {found["error"]:.3f} ({
        found["error_before"]:.3f} before; {found["bins"]} bins).

**None of these classes.** By its {rejection["score"]} the model tells validation images from {
        rejection["unknown_images"]:,} images of other classes ({rejection["unknown"]}) with an AUROC of {
        rejection["auroc"]:.3f}. Below {rejection["threshold"]:.3f}, where {
        100 * (1 - rejection["known_kept"]):.0f} % of the
validation images lie, it is probably none of them; that catches {
        100 * rejection["unknown_caught"]:.0f} % of the others."""
