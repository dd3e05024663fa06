"""Trains a generator: images or latents in, checkpoint out.

    python -m training.generate cifar10_sit_vca --data FOLDER
    python -m training.generate cifar10_sit_vca --data FOLDER --out runs/mine --steps 2000 --lr 1e-4
    python -m training.generate cifar10_sit_vca --data FOLDER --init weights/NAME

FOLDER holds train/CLASS/IMAGE and val/CLASS/IMAGE, or what `python -m training.latents` makes of such a folder if the
model works on latents. The same command resumes an interrupted run.
"""

import argparse
import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from timm.scheduler import StepLRScheduler
from torch import Tensor

import vca
from training import recipe as recipes
from training.card import write_card
from training.data import DataError, Images, MemoryBatches, decode, derive_seed, generator_cfg, normalize
from training.engine import RunError, RunFolder, Trainer, open_device, plot_curve, progress
from training.latents import LatentBatches, Latents
from training.recipe import key
from training.sample import grid_png
from vca import diffusion, flow
from vca.hub import write_atomically
from vca.models import GENERATORS
from vca.models.dit import DiffusionTransformer
from vca.vae import DecoderError

TIME_SAMPLING = ("uniform", "logit_normal")
VAL_SAMPLES = 1000
GRID_ROWS, GRID_COLUMNS = 8, 10


@dataclass(frozen=True)
class Recipe:
    """Every key that a generation recipe may set."""

    model: str
    steps: int
    batch_size: int
    lr: float
    dataset: str = key("", "name of the data set, for the card")
    license: str = key("", "licence of the data set, for the card")
    attention: str = key("", "attention kind, if not the model's own")
    input_size: int = key(32, "side of the images or latents")
    warmup_steps: int = key(0, "steps of linear warm-up to the constant learning rate")
    clip_grad: float = key(0.0, "largest gradient norm; 0 for none")
    micro_batch: int = key(0, "samples in one forward pass, accumulated to batch_size; 0 for all")
    class_dropout: float = key(0.1, "share of labels replaced by the null class")
    time_sampling: str = key("uniform", "SiT: uniform, or logit_normal for more times in the middle")
    ema_decay: float = key(0.9999, "decay of the EMA of the weights; 0 for none")
    ema_warmup: bool = key(False, "let the decay rise with the steps")
    precision: str = key("bf16", "bf16 or fp32")
    compile: bool = key(False, "torch.compile the model")
    workers: int = key(2, "processes that decode the images")
    seed: int = key(0, "seed of everything random")
    val_every: int = key(2000, "steps between validation losses")
    sample_every: int = key(2000, "steps between sample grids; 0 for none, where a latent model has no VAE")
    sample_steps: int = key(50, "steps of the default sampler in a sample grid")
    sample_guidance: float = key(1.0, "guidance scale of a sample grid")
    save_every: int = key(200, "steps between saved states")

    def __post_init__(self):
        recipes.check_ranges(
            self,
            positive=("steps", "batch_size", "lr", "input_size", "val_every", "sample_steps", "save_every"),
            not_negative=("warmup_steps", "clip_grad", "micro_batch", "workers", "seed", "sample_every"),
            shares=("class_dropout", "ema_decay"),
        )
        if self.model not in GENERATORS:
            raise ValueError(f"model = {self.model!r} is no generator; vca.list_models() names them.")
        if self.precision not in ("bf16", "fp32"):
            raise ValueError(f"precision = {self.precision!r} must be bf16 or fp32.")
        if self.time_sampling not in TIME_SAMPLING:
            raise ValueError(f"time_sampling = {self.time_sampling!r} must be one of {', '.join(TIME_SAMPLING)}.")
        if self.time_sampling != "uniform" and GENERATORS[self.model]["family"] == "dit":
            raise ValueError(f"time_sampling = {self.time_sampling!r} is for SiT; DiT draws its times uniformly.")


def build_model(recipe: Recipe, class_names: list[str], init: str | None) -> DiffusionTransformer:
    """The model of a recipe, drawn from its seed or loaded from the checkpoint `init`."""
    torch.manual_seed(recipe.seed)
    args = dict(attention=recipe.attention) if recipe.attention else {}
    model = vca.create_model(recipe.model, num_classes=len(class_names), input_size=recipe.input_size, **args)
    if init:
        if vca.load(init).label_names != list(class_names):
            raise vca.CheckpointError(f"{init}: its classes are not those of the data.")
        vca.hub.load_weights(model, Path(init) / "model.safetensors")
    return model


class Data(NamedTuple):
    """Training batches, the clean samples of the validation loss, and what is known about them."""

    batches: MemoryBatches | LatentBatches
    val_samples: Tensor
    val_labels: Tensor
    class_names: list[str]
    train_images: int


def open_data(recipe: Recipe, folder: str, device: torch.device) -> Data:
    """Images held in memory, or latents read from disk, flipped half of the time."""
    latent = GENERATORS[recipe.model]["vae"] is not None
    train, val = ((Latents if latent else Images)(folder, split) for split in ("train", "val"))
    if val.class_folders != train.class_folders:
        raise DataError(f"{folder}: train and val do not hold the same class folders.")
    if len(train) < recipe.batch_size:
        raise DataError(f"{len(train)} training images are fewer than one batch of {recipe.batch_size}.")
    chosen = torch.linspace(0, len(val) - 1, min(VAL_SAMPLES, len(val))).long()
    shared = dict(batch_size=recipe.batch_size, seed=recipe.seed, device=device)
    if latent:
        if (side := train.shape[-1]) != recipe.input_size:
            raise DataError(f"{folder} holds latents of side {side}; the recipe has input_size = {recipe.input_size}.")
        batches, samples, labels = LatentBatches(train, **shared), val.means(chosen), val.labels
    else:
        cfg = generator_cfg(recipe.input_size)
        batches = MemoryBatches(*decode(train, cfg, recipe.workers), padding=0, cfg=cfg, **shared)
        pixels, labels = decode(val, cfg, recipe.workers)
        samples = normalize(pixels[chosen], cfg)
    return Data(batches, samples, labels[chosen], train.class_names, len(train))


def draw_times(family: str, time_sampling: str, count: int, device, generator=None) -> Tensor:
    """The times of a batch: integers for DiT, in [0, 1] for SiT."""
    if family == "dit":
        return torch.randint(diffusion.NUM_TIMESTEPS, (count,), device=device, generator=generator)
    if time_sampling == "uniform":
        return torch.rand(count, device=device, generator=generator)
    return flow.logit_normal(torch.randn(count, device=device, generator=generator))


@torch.inference_mode()
def validation_loss(model: DiffusionTransformer, samples: Tensor, labels: Tensor, batch_size: int = 250) -> float:
    """Mean loss in float32 at uniform times; noise and times are the same at each call, for models of any attention."""
    device = model.pos_embed.device
    generator = torch.Generator().manual_seed(derive_seed(0, len(samples)))
    noise = torch.randn(samples.shape, generator=generator)
    t = draw_times(model.family, "uniform", len(samples), "cpu", generator)
    parts = zip(*(tensor.split(batch_size) for tensor in (samples, labels, noise, t)), strict=True)
    return sum(model.loss(*(part.to(device) for part in four)).sum().item() for four in parts) / len(samples)


def sample_grid(model: DiffusionTransformer, recipe: Recipe) -> bytes:
    """A PNG with a column for each of the first classes, always from the same noise."""
    columns = min(GRID_COLUMNS, model.num_classes)
    labels = list(range(columns)) * GRID_ROWS
    images = model.sample(labels, steps=recipe.sample_steps, guidance_scale=recipe.sample_guidance)
    return grid_png(images, columns)


def train(recipe: Recipe, data: str, out: str, device: torch.device, init: str | None, command: str) -> dict:
    """Runs a recipe to its end and writes `out/checkpoint`; returns the validation loss of the shipped weights."""
    run = RunFolder(out, recipe, init=init)
    batches, val_samples, val_labels, class_names, train_images = open_data(recipe, data, device)
    model = build_model(recipe, class_names, init).to(device)
    if recipe.sample_every and model.latent_decoder:
        model.latent_decoder.load(device)

    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=recipe.lr, weight_decay=0.0)
    scheduler = StepLRScheduler(
        optimizer, decay_t=recipe.steps + 1, decay_rate=1.0, warmup_t=recipe.warmup_steps, t_in_epochs=False
    )
    trainer = Trainer(
        run, model, optimizer, scheduler, seed=recipe.seed, device=device, precision=recipe.precision,
        ema_decay=recipe.ema_decay, ema_warmup=recipe.ema_warmup, clip_grad=recipe.clip_grad,
        micro_batch=recipe.micro_batch, compile=recipe.compile, save_every=recipe.save_every,
    )  # fmt: skip

    def loss_fn(model, x, y, noise, t):
        return model.loss(x, y, noise, t).mean()

    per_epoch, total = batches.steps_per_epoch, recipe.steps
    grid_file = run.path / "samples" / f"step-{total:08d}.png"
    grid_file.parent.mkdir(exist_ok=True)
    with progress(total, trainer.step) as bar:
        while trainer.step < total:
            epoch, first = divmod(trainer.step, per_epoch)
            for x, y in batches.epoch(epoch, first):
                trainer.seed_step()
                noise = torch.randn_like(x)
                t = draw_times(model.family, recipe.time_sampling, len(x), device)
                y = torch.where(torch.rand(len(y), device=device) < recipe.class_dropout, model.num_classes, y)
                metrics = trainer.train_step((x, y, noise, t), loss_fn)
                bar.update()
                last = trainer.step == total
                if trainer.step % 20 == 0 or last:
                    rate = trainer.step * recipe.batch_size / trainer.seconds
                    bar.set_postfix_str(f"loss {metrics['loss']:.3f} lr {metrics['lr']:.1e} {rate:.0f} img/s", False)
                    run.log(step=trainer.step, epoch=epoch, seconds=round(trainer.seconds, 1), **metrics)
                if trainer.step % recipe.val_every == 0 or last:
                    val_loss = validation_loss(trainer.eval_model, val_samples, val_labels)
                    run.log(step=trainer.step, val_loss=round(val_loss, 5))
                    plot_curve(run, "val_loss", "validation loss")
                if recipe.sample_every and (trainer.step % recipe.sample_every == 0 or last):
                    file = grid_file.with_name(f"step-{trainer.step:08d}.png")
                    write_atomically(file, sample_grid(trainer.eval_model, recipe))
                trainer.checkpoint(force=last)
                if last:
                    break

    result = dict(
        val_loss=round(validation_loss(trainer.eval_model, val_samples, val_labels), 5), images=len(val_labels)
    )
    this_run = dict(
        recipe=asdict(recipe), command=command, init=init, steps=total, epochs=round(total / per_epoch, 1),
        train_images=train_images, skipped_steps=trainer.skipped, torch=torch.__version__, device=device.type,
        results=result,
    )  # fmt: skip
    history = (vca.load(init).training_history if init else []) + [this_run]
    checkpoint = run.path / "checkpoint"
    vca.save(trainer.eval_model, checkpoint, label_names=class_names, training=history)
    if recipe.sample_every:
        write_atomically(checkpoint / "samples.png", grid_file.read_bytes())
    write_card(checkpoint)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a file of training/recipes, or a path to a TOML file")
    parser.add_argument("--data", required=True, metavar="FOLDER", help="images or latents, as above")
    parser.add_argument("--out", help="run folder; default runs/RECIPE")
    parser.add_argument("--init", help="checkpoint folder to start from instead of random weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    recipes.add_arguments(parser, Recipe)
    args = parser.parse_args()
    try:
        recipe = recipes.read(args.recipe, Recipe, vars(args))
        out = args.out or f"runs/{Path(args.recipe).stem}"
        command = "python -m training.generate " + shlex.join("DATA" if a == args.data else a for a in sys.argv[1:])
        result = train(recipe, args.data, out, open_device(args.device), args.init, command)
    except (recipes.RecipeError, DataError, RunError, DecoderError, vca.CheckpointError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{out}/checkpoint: validation loss {result['val_loss']:.4f} on {result['images']} samples")


if __name__ == "__main__":
    main()
