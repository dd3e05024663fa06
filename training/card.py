"""Model cards, written from a checkpoint's `config.json` and never by hand.

python -m training.card weights/NAME
"""

import hashlib
import json
import sys
from pathlib import Path

import yaml

from vca.hub import write_atomically

SHOWN_KEYS = (
    "lr", "batch_size", "weight_decay", "warmup_epochs", "min_lr", "label_smoothing", "drop_path", "mixup", "cutmix",
    "padding", "ema_decay", "precision",
)  # fmt: skip
PREPROCESSING = "shorter side resized to {size} px ({interpolation}), centre crop, normalised"


def write_card(checkpoint: str | Path) -> None:
    """Writes `README.md` of a checkpoint folder: data, recipe, command, seed, results with protocol, use, metadata."""
    folder = Path(checkpoint)
    config = json.loads((folder / "config.json").read_text())
    weights = folder / "model.safetensors"
    last = config["training"][-1]
    recipe, results = last["recipe"], last["results"]
    dataset = recipe["dataset"] or "own data"
    size = config["pretrained_cfg"]["input_size"][-1]
    protocol = PREPROCESSING.format(size=size, interpolation=config["pretrained_cfg"]["interpolation"])
    metadata = dict(
        library_name="vca",
        pipeline_tag="image-classification",
        license="apache-2.0",
        tags=["image-classification", "visual-contrast-attention", "timm"],
        datasets=[dataset],
        metrics=["accuracy"],
    )
    metadata["model-index"] = [
        dict(
            name=config["architecture"],
            results=[
                dict(
                    task=dict(type="image-classification"),
                    dataset=dict(name=dataset, type=dataset.lower(), split="test"),
                    metrics=[
                        dict(type="accuracy", name="top-1", value=results["top1"]),
                        dict(type="accuracy", name="top-5", value=results["top5"]),
                    ],
                )
            ],
        )
    ]
    runs = "\n".join(_describe_run(run) for run in config["training"])
    names = ", ".join(config["label_names"])
    text = f"""---
{yaml.safe_dump(metadata, sort_keys=False).strip()}
---

# {config["architecture"]} on {dataset}

An image classifier with {config["num_classes"]} classes: {names}.

**Top-1 {results["top1"]:.2f} %, top-5 {results["top5"]:.2f} %** on {
        results["images"]:,} images that were not trained on
(mean cross-entropy {results["loss"]:.4f}). Protocol: {protocol}; float32; one view; the weights of the last step{
        " (exponential moving average)" if recipe["ema_decay"] else ""
    }, chosen before the accuracy was looked at. The number is what this prints:

    python -m training.evaluate {folder.name if folder.name != "checkpoint" else "FOLDER"} --data DATA

## Use

    import timm, vca
    from PIL import Image
    model = vca.load("PATH OF THIS FOLDER")
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    print(model.label_names[model(transform(Image.open("photo.jpg").convert("RGB"))[None]).argmax()])

## Training

{runs}

Data: {dataset}{". " + recipe["license"] if recipe["license"] else ""}

## File

`model.safetensors`: {weights.stat().st_size:,} bytes, sha256 `{hashlib.sha256(weights.read_bytes()).hexdigest()}`.

Architecture: Visual-Contrast Attention, *Linear Differential Vision Transformer: Learning Visual Contrasts via Pairwise
Differentials*, NeurIPS 2025, arXiv 2511.00833.
"""
    write_atomically(folder / "README.md", text.encode())


def _describe_run(run: dict) -> str:
    recipe, results = run["recipe"], run["results"]
    start = f"from `{run['init']}`" if run["init"] else "from random weights"
    values = ", ".join(f"{key} {recipe[key]}" for key in SHOWN_KEYS)
    return (
        f"- {run['epochs']} epochs ({run['steps']:,} steps, {run['train_images']:,} images) {start}, "
        f"seed {recipe['seed']}, on {run['device']} with torch {run['torch']}: top-1 {results['top1']:.2f} %. "
        f"{values}.\n\n      {run['command']}"
    )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    write_card(sys.argv[1])
