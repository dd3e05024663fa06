"""What the card of a generator says, from its config: its numbers, each with the whole protocol."""

import json
from pathlib import Path
from statistics import stdev

from vca.checkpoint import AUTOENCODER_FOLDER, place
from vca.models import GENERATORS, autoencoder_of
from vca.models.dit import OBJECTIVES

AUTOENCODER_RESULTS = f"{AUTOENCODER_FOLDER}/results.json"  # of an autoencoder that was trained here


def generator(config: dict, folder: Path) -> tuple[str, list[dict], str, str]:
    """Task, metrics, the paragraphs about the model and its numbers, and how to use it."""
    recipe, results = config["training"][-1]["recipe"], config["training"][-1]["results"]
    spec = GENERATORS[config["architecture"]]
    objective = "predicts the velocity of a flow (SiT)" if spec["family"] == "sit" else "predicts noise (DiT)"
    vae = autoencoder_of(config)
    own = vae == AUTOENCODER_FOLDER
    if own:
        of = f"latents of its own autoencoder, which is in `{vae}/`"
    else:
        of = f"latents of the autoencoder {vae}" if vae else "pixels in [-1, 1]"
    side = recipe["input_size"]
    sampler = next(iter(OBJECTIVES[spec["family"]].SAMPLERS))
    about = f"""A class-conditional generator of {side}x{side} {of}. It {objective} and has {
        config["num_classes"]
    } classes: {", ".join(config["label_names"])}.

Validation loss {results["val_loss"]:.4f} on {results["images"]:,} images that were not trained on: uniform times, fixed
noise, float32, the weights of the last step{average(recipe)}. This command prints the number:

    python -m training.evaluate {place(folder)} --data DATA"""
    about += _autoencoder(folder / AUTOENCODER_RESULTS) if own else ""
    about += _fid(results["fid"]) if "fid" in results else "\n\nNo FID is claimed here."
    if "quality" in results:
        about += _quality(results["quality"], config["label_names"], folder)
    elif (folder / "samples.png").exists():
        about += f"""

![Samples](samples.png)

One column for each of the first classes, from the noise of seed 0, indices 0, 1, ...; nothing was selected. Protocol:
{sampler}, {recipe["sample_steps"]} steps, guidance {recipe["sample_guidance"]:g} on all channels, float32."""
    measured = dict(steps=recipe["sample_steps"], guidance_scale=recipe["sample_guidance"])
    settings = "**model.sampling" if config.get("sampling") else ", ".join(f"{k}={v:g}" for k, v in measured.items())
    best = ", ".join(f"{key}={value}" for key, value in config.get("sampling", {}).items())
    said = f"`model.sampling` is what suits it best: {best}. " if best else ""
    use = f"""```python
import vca

model = vca.load("{place(folder)}")
images = model.sample(["{config["label_names"][0]}", 1], {settings}, seed=0)
vca.to_pil(images)[0].save("picture.png")
```

`images` is (2, 3, height, width) in [0, 1]. {said}`sampler=` takes a scheduler of diffusers, too.
This writes many pictures:

    python -m training.sample {place(folder)} --count 1000 --out samples"""
    metrics = [dict(type="loss", name="validation loss", value=results["val_loss"])]
    return "unconditional-image-generation", metrics, about, use


def _autoencoder(file: Path) -> str:
    """What `training.autoencoder` measured of the autoencoder that a checkpoint brings, if it was trained here."""
    if not file.exists():
        return ""
    made = json.loads(file.read_text(encoding="utf-8"))
    found, recipe = made["results"], made["recipe"]
    return f"""

Its autoencoder gives images that were not trained on back with a PSNR of {found["psnr"]:.2f} dB. The cosine distance
between the features that `{made["teacher"]}` has of both is {found["features"]:.3f} ({found["images"]:,} images). It
was trained for {made["steps"]:,} steps of {recipe["batch_size"]} images:

    {made["command"]}"""


def _fid(measured: list[dict]) -> str:
    """What `training.fid` measured, each with its whole protocol."""
    lines = []
    for result in measured:
        sampling = result["sampling"]
        manifold = f", precision {result['precision']:.3f}, recall {result['recall']:.3f}" if "recall" in result else ""
        channels = "all" if sampling["guided_channels"] is None else f"the first {sampling['guided_channels']}"
        reference = f"{result['reference']} ({result['statistics']}"
        reference += f"; {result['reference_images']:,} images)" if result["reference_images"] else ")"
        lines.append(
            f"- **FID {result['fid']:.2f}**, Inception score {result['inception_score']:.2f} ± "
            f"{result['inception_std']:.2f}{manifold}. {result['images']:,} images; {sampling['sampler']}, "
            f"{sampling['steps']} steps{_shifted(sampling)}, guidance {sampling['guidance_scale']:g} on {channels} "
            f"channels{_interval(sampling)}, labels "
            f"{'in turn' if sampling['balanced'] else 'drawn uniformly'}, seed {sampling['seed']}, "
            f"{sampling['precision']}, decoder {sampling['decoder'] or 'none'}; reference {reference}; "
            f"{result['evaluator']}."
        )
    return "\n\n" + "\n".join(lines)


def _shifted(sampling: dict) -> str:
    """How the steps are shifted, if they are."""
    return f" with their times shifted by {sampling['time_shift']:g}" if "time_shift" in sampling else ""


def _interval(sampling: dict) -> str:
    """Where guidance applies, if not everywhere."""
    if "guidance_interval" not in sampling:
        return ""
    begin, end = sampling["guidance_interval"]
    return f" from {begin:g} to {end:g} of the way from noise to data"


def _quality(quality: dict, label_names: list[str], folder: Path) -> str:
    """What `training.quality` measured."""
    names = ("recognised", "diversity", "least", "copies")
    rows = [dict(row, images=f"guidance {row['guidance']:g}") for row in quality["guidance"]]
    best = best_row(quality)
    shares = zip(label_names, best["recognised_by_class"], best["diversity_by_class"], strict=True)
    by_class = ", ".join(f"{name} {share:.0f} ({spread:.0f}) %" for name, share, spread in shares)
    real = quality["held_out"]
    rows.append(real | dict(images=f"{real['images']:,} held-out images"))
    for row in rows:
        row["least"] = min(row["diversity_by_class"])
    lines = [
        f"| {row['images']} | {' | '.join(f'{row[name]:.1f}{deviation(row, name)} %' for name in names)} "
        f"| {row['nearest_pixels']:.1f} | {row['nearest_features']:.2f} "
        f"| {row['frechet_distance']:.2f}{deviation(row, 'frechet_distance')} "
        + (f"| {row['precision']:.1f} % | {row['recall']:.1f} % |" if "recall" in row else "| - | - |")
        for row in rows
    ]
    side = f" at {quality['judge_size']} px" if "judge_size" in quality else ""
    seeds = quality.get("seeds") or [quality["seed"]]
    of_seeds = " and seed; mean ± standard deviation over the seeds" if len(seeds) > 1 else ""
    columns = ["images", *names, "nearest (pixels)", "nearest (features)", "Fréchet", "precision", "recall"]
    return f"""

![Samples](quality.png)

One column for each of the first classes at guidance {quality["best_guidance"]:g}: its first images, none selected.

{quality["count"]:,} images at each guidance scale{of_seeds}, judged by the classifier `{quality["judge"]}`{side}:

| {" | ".join(columns)} |
|{"---|" * len(columns)}
{chr(10).join(lines)}

- *recognised*: the classifier's first answer is the class that was asked for;
- *diversity*: mean distance of two images of a class on the {quality["features"]} features before the classifier's
  head, in percent of that of held-out images; mean over the classes, and *least* of all classes. Guidance
  trades it for recognition;
- *nearest*: median distance to the nearest of {quality["train_images"]:,} training images and their mirror images,
  as root mean square in grey levels of 0 to 255 (blurred images lie nearer to all others), and on the features;
- *copies*: the nearest training image is less than half as far, in pixels, as the 50 nearest are on average;
- *Fréchet*: distance between normal distributions fitted to these and to the training images' features of this
  classifier. It is not FID and compares with no other judge or number of images;
- *precision, recall*: share of these images among the training images, and the reverse, on these features with 3
  neighbors and as many training images.

Recognised (diversity) by class at guidance {best["guidance"]:g}: {by_class}.

The images most like a copy, and the nearest training image below each:

![Nearest training images](nearest.png)

Protocol: {quality["sampler"]}, {quality["steps"]} steps{_shifted(quality)}, guidance on all channels{
        _interval(quality)
    }, classes in turn, seed {", ".join(map(str, seeds))}, {quality["precision"]},
8-bit images in the classifier's own preprocessing; {quality["device"]}, torch {quality["torch"]}:

    python -m training.quality {place(folder)} {quality["options"]}"""


def average(recipe: dict) -> str:
    """Which weights were measured, if not the last ones."""
    return " (exponential moving average)" if recipe["ema_decay"] else ""


def best_row(quality: dict) -> dict:
    """What `training.quality` measured at the best guidance scale."""
    return next(row for row in quality["guidance"] if row["guidance"] == quality["best_guidance"])


def deviation(row: dict, name: str) -> str:
    """The standard deviation of a number over the seeds, if there are several."""
    values = row.get("by_seed", {}).get(name, [])
    return f" ± {stdev(values):.1f}" if len(values) > 1 else ""
