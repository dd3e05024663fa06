"""Model cards, written from a checkpoint's `config.json` and weights, and never by hand.

    python -m training.card weights

writes `README.md` of every checkpoint folder in the folder, and of the folder itself a table of them.
"""

import argparse
import json
import math
import re
import sys
import tomllib
from pathlib import Path
from textwrap import indent

from huggingface_hub import EvalResult, ModelCardData
from safetensors import safe_open

from training.core import measured
from training.core.classifier_recipe import ClassifierRecipe
from training.core.cli import interruptible
from training.core.datasets import DATASETS
from training.core.generator_card import average, best_row, generator
from training.core.generator_recipe import GeneratorRecipe
from training.core.recipe import defaults, shipped
from vca.checkpoint import load_folder, place, sha256, write_atomically
from vca.config import CheckpointError, read_config
from vca.models import CLASSIFIERS, autoencoder_of, task_of

SHOWN_KEYS = (
    "lr", "batch_size", "weight_decay", "warmup_epochs", "warmup_steps", "min_lr", "label_smoothing", "drop_path",
    "mixup", "cutmix", "padding", "smallest_crop", "color_jitter", "erasing", "class_dropout", "time_sampling",
    "clip_grad", "ema_decay", "precision",
)  # fmt: skip
STATED = "`model.safetensors`: {size:,} bytes, sha256 `{sha256}`."
OWN_DATA = "own data"
PICTURES = ("maps.png", "quality.png", "samples.png")  # the first that a checkpoint has is what links to it show
ROOT = Path(__file__).parents[1]
PREPROCESSING = "shorter side resized to {size} px ({interpolation}), centre crop, normalised"


def write_card(checkpoint: str | Path) -> None:
    """Writes `README.md` of a checkpoint folder: data, recipe, command, seed, results with protocol, use, metadata.

    A classifier's card gets a picture, `maps.png`; a generator's shows what `training` left there.
    """
    folder = Path(checkpoint)
    if task_of(json.loads((folder / "config.json").read_text())["architecture"]) == "classification":
        (folder / "maps.png").unlink(missing_ok=True)
        if picture := _picture(folder):
            write_atomically(folder / "maps.png", picture)
    write_atomically(folder / "README.md", card_text(folder).encode())


def card_text(folder: Path) -> str:
    """The card of a checkpoint folder, as its config, its weights and its pictures have it."""
    config = json.loads((folder / "config.json").read_text())
    weights = folder / "model.safetensors"
    recipe = config["training"][-1]["recipe"]
    dataset = recipe["dataset"] or OWN_DATA
    describe = dict(classification=_classifier, generation=generator)[task_of(config["architecture"])]
    task, metrics, about, use = describe(config, folder)
    runs = _describe_runs(config["training"])
    log = "\n`log.jsonl`: every evaluation of the last run, and the mean training loss before it.\n"
    twins = _twins(folder, config)
    return f"""---
{_metadata(folder, config, dataset, task, metrics).to_yaml()}
---

# {config["architecture"]} on {dataset}

{about}
{twins}
## Use

{_install(config)}

{use}

## Training

{runs}
{log if (folder / "log.jsonl").exists() else ""}{_larger(config["training"])}
Data: {dataset}{". " + recipe["license"] if recipe["license"] else ""}

## File

{STATED.format(size=weights.stat().st_size, sha256=sha256(weights))}

## Citation

Visual-Contrast Attention: [arXiv 2511.00833](https://arxiv.org/abs/2511.00833). This is an independent implementation.

{citation()}
"""


def citation() -> str:
    """The paper as BibTeX, as the README has it."""
    return re.search(r"```bibtex\n.*?```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[0]


def _install(config: dict) -> str:
    """Where the code is, as far as pyproject.toml says, and how to install what this model takes."""
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
    code = urls.get("Repository")
    where = f"The code is at [{code}]({code})" if code else "The code is the Python package `vca`"
    install = '".[latents]"' if autoencoder_of(config) else '".[plot]"  # and for the last example: transformers'
    return f"""{where}. In a clone of its repository:

    pip install {install}"""


def _metadata(folder: Path, config: dict, dataset: str, task: str, metrics: list[dict]) -> ModelCardData:
    """The front matter of a card: what the Hub shows of the model, and finds it by."""
    known = DATASETS.get(dataset)
    name = (known and known.hub) or _slug(dataset)
    results = [
        EvalResult(
            task_type=task,
            dataset_type=name,
            dataset_name=dataset,
            dataset_split=known and known.val_split,
            metric_type=metric["type"],
            metric_name=metric["name"],
            metric_value=metric["value"],
        )
        for metric in metrics
    ]
    picture = next((name for name in PICTURES if (folder / name).exists()), None)
    return ModelCardData(
        library_name="vca",
        thumbnail=picture and f"https://huggingface.co/{place(folder)}/resolve/main/{picture}",
        pipeline_tag=task,
        license="apache-2.0" if known else None,  # of what own data made, its owner decides
        datasets=[known.hub] if known and known.hub else None,
        tags=[task, "visual-contrast-attention"] + (["timm"] if task == "image-classification" else []),
        metrics=[metric["type"] for metric in metrics[:1]],
        model_name=config["architecture"],
        eval_results=results,
    )


def _slug(name: str) -> str:
    """A name as metadata has it: small letters, digits and hyphens."""
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-") or "data"


def _classifier(config: dict, folder: Path) -> tuple[str, list[dict], str, str]:
    """Task, metrics, the paragraphs about the model and its numbers, and how to use it."""
    results = config["training"][-1]["results"]
    evaluated = measured.read_results(folder)
    results = results | evaluated.get("results", {}).get("val", {})
    precision = "bfloat16" if evaluated.get("precision") == "bf16" else "float32"
    size = config["pretrained_cfg"]["input_size"][-1]
    protocol = PREPROCESSING.format(size=size, interpolation=config["pretrained_cfg"]["interpolation"])
    counted = ("1", "5") if config["num_classes"] > 5 else ("1",)
    metrics = [dict(type="accuracy", name=f"top-{k}", value=results[f"top{k}"]) for k in counted]
    reached = ", top-".join(f"{k} {results[f'top{k}']:.2f} %" for k in counted)
    about = f"""An image classifier with {config["num_classes"]} classes: {", ".join(config["label_names"])}.

**Top-{reached}** on {results["images"]:,} images that were not trained on
(mean cross-entropy {results["loss"]:.4f}). Protocol: {protocol}; {precision}; one view; {
        _which_weights(config["training"][-1])
    }. This command prints the number:

    python -m training.evaluate {place(folder)} --data DATA"""
    about += measured.by_source(evaluated) + measured.by_size(evaluated) + measured.calibration(results)
    if (folder / "maps.png").exists():
        about += """

![Where every head looks](maps.png)

What the model sees of a photo, and what each head (row) of each block (column) draws in (orange) and pushes away
(blue): the effective map of the class token, or of the average patch; each map on a scale of its own."""
    use = f"""```python
import torch, vca
from PIL import Image

model, image = vca.load("{place(folder)}"), Image.open("photo.jpg")
with torch.no_grad(), vca.record(model) as maps:
    print(model.label_names[model(vca.preprocess(model, image)).argmax()])
maps.overview(image).savefig("maps.png")  # where every head looks
```"""
    if config["architecture"] in CLASSIFIERS:  # timm does not know of an exchanged attention
        use += f"""

The same model through timm:

```python
import timm, vca

model = timm.create_model("local-dir:{place(folder)}", pretrained=True).eval()
```

And through transformers:

```python
import vca
from transformers import pipeline

print(pipeline("image-classification", model="{place(folder)}")("photo.jpg"))
```"""
    return "image-classification", metrics, about, use


def _picture(folder: Path) -> bytes | None:
    try:
        from training.core.maps_figure import maps_png
    except ImportError:  # a machine that only trains has no scikit-image
        return None
    return maps_png(load_folder(folder))


TWINS = """Twins are models trained with the same data, recipe, seed and budget, once each. VCA also has a depthwise
convolution of the values, which self-attention lacks, so a difference may come from either."""


def _twins(folder: Path, config: dict) -> str:
    """A table of this checkpoint and of those beside it that the same recipe, seed and budget made; or nothing."""
    rows = []
    for file in sorted(folder.resolve().parent.glob("*/config.json")):
        other = json.loads(file.read_text())
        if _protocol(other) == _protocol(config):
            cells = (file.parent.name, other["architecture"], f"{_parameters(file.parent):,}")
            rows.append(f"| {' | '.join(cells)} | {_reached(other['training'][-1]['results'])} |")
    if len(rows) < 2:
        return ""
    head = ["| checkpoint | architecture | parameters | result |", "|---|---|---|---|"]
    return "\n".join(["", TWINS, "", *head, *rows, ""])


def _protocol(config: dict) -> list[dict]:
    """What decides a comparison: every run's recipe but for the model and its file, and how much of it was trained."""
    kind = dict(classification=ClassifierRecipe, generation=GeneratorRecipe)[task_of(config["architecture"])]
    return [
        {k: v for k, v in (defaults(kind) | run["recipe"]).items() if k not in ("model", "attention", "stored_as")}
        | {key: run.get(key) for key in ("init", "steps", "train_images", "averaged")}
        for run in config["training"]
    ]


def _parameters(folder: Path) -> int:
    with safe_open(folder / "model.safetensors", framework="pt") as stored:
        return sum(math.prod(stored.get_slice(key).get_shape()) for key in stored.keys())  # noqa: SIM118


def _which_weights(run: dict) -> str:
    if "averaged" in run:
        return f"the mean of the weights of {len(_distinct(run['averaged']))} checkpoints"
    return f"the weights of the last step{average(run['recipe'])}, chosen before the accuracy was known"


def _describe_runs(runs: list[dict], above: str = "") -> str:
    """A list of runs; `above` is what the first one starts from, if not from what it names itself."""
    lines = []
    for run in runs:
        lines.append(_describe_average(run) if "averaged" in run else _describe_run(run, above))
        above = "the result of the run above"
    return "\n".join(lines)


def _distinct(branches: list[list[dict]]) -> list[list[dict]]:
    return [branch for index, branch in enumerate(branches) if branch not in branches[:index]]


def _describe_average(run: dict) -> str:
    branches = []
    for branch in _distinct(run["averaged"]):
        runs = _describe_runs(branch, "the result of the last run that they share") if branch else "- that result"
        count = run["averaged"].count(branch)
        branches.append(f"{runs}\n\n  This one counts {count} times." if count > 1 else runs)
    text = f"- the mean of the weights of {len(branches)} checkpoints that began there: {_reached(run['results'])}."
    return "\n".join([f"{text}\n\n      {run['command']}\n", *(indent(branch, "  ") for branch in branches)])


def _describe_run(run: dict, above: str) -> str:
    recipe, teacher = run["recipe"], run.get("teacher")
    start = f"from `{run['init']}`" if run["init"] else "from random weights"
    if "error" in run["results"]:
        start = f"attention transfer from `{teacher}`"
    elif above:
        start = f"from {above} (`--init {run['init']}`)"
    if teacher and recipe.get("align_weight"):
        start += f", its block {recipe['align_block']} aligned with `{teacher}`"
    elif teacher and "error" not in run["results"]:
        start += f", with the teacher `{teacher}`"
    values = ", ".join(f"{key} {recipe[key]}" for key in SHOWN_KEYS if key in recipe)
    return (
        f"- {run['epochs']} epochs ({run['steps']:,} steps, {run['train_images']:,} images) {start}, "
        f"seed {recipe['seed']}, on {run['device']} with torch {run['torch']}: {_reached(run['results'])}. "
        f"{values}.{' ' + recipe['origin'] if recipe.get('origin') else ''}\n\n      {run['command']}"
    )


def _larger(runs: list[dict]) -> str:
    """The recipe for a GPU named as the first run's, if a CPU made the weights and there is one; or nothing."""
    found = re.match(r"python -m (\S+) (\w+) ", runs[0]["command"])
    if runs[-1]["device"] != "cpu" or not found or not shipped(f"{found[2]}_gpu").exists():
        return ""
    return f"""
This is a small model, trained on a CPU for a short time. The recipe of the same kind for one GPU has a larger model and
more epochs:

    python -m {found[1]} {found[2]}_gpu --data DATA
"""


def _reached(results: dict) -> str:
    if "top1" in results:
        return f"top-1 {results['top1']:.2f} %"
    if "error" in results:
        sizes = ((key.removeprefix("error_"), value) for key, value in results.items() if key.startswith("error_"))
        return "mean relative error " + ", ".join(f"{value:.3f} at {side} px" for side, value in sizes)
    reached = f"validation loss {results['val_loss']:.4f}"
    if quality := results.get("quality"):
        best = best_row(quality)
        reached += f", {best['recognised']:.1f} % of images recognised at guidance {best['guidance']:g}"
    return reached


def write_table(weights: str | Path) -> None:
    """Writes `README.md` of a folder of checkpoints: a table of them."""
    lines = ["# Checkpoints", "", "| name | task | data | result | size | sha256 |", "|---|---|---|---|---|---|"]
    for file in sorted(Path(weights).glob("*/config.json")):
        config, tensors = json.loads(file.read_text()), file.with_name("model.safetensors")
        last = config["training"][-1]
        task = task_of(config["architecture"])
        size, digest = tensors.stat().st_size / 1e6, sha256(tensors)[:16]
        name = f"[{file.parent.name}]({file.parent.name}/README.md)"
        row = (
            name,
            task,
            last["recipe"]["dataset"] or OWN_DATA,
            _reached(last["results"]),
            f"{size:.1f} MB",
            f"`{digest}`",
        )
        lines.append(f"| {' | '.join(row)} |")
    write_atomically(Path(weights) / "README.md", ("\n".join(lines) + "\n").encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, metavar="FOLDER", help="folder of checkpoint folders")
    folder = parser.parse_args().weights
    try:
        files = sorted(folder.glob("*/config.json"))
        if not files:
            raise CheckpointError(f"{folder} holds no checkpoint folders.")
        for file in files:
            read_config(file.parent)
            write_card(file.parent)
        write_table(folder)
    except (CheckpointError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    interruptible(main)
