"""Trains a classifier: images in, checkpoint out.

    python -m training.classify cifar10_vca --data FOLDER
    python -m training.classify cifar10_vca --data FOLDER --out runs/mine --epochs 5 --lr 5e-4
    python -m training.classify cifar10_vca --data FOLDER --init weights/NAME

FOLDER holds train/CLASS/IMAGE and val/CLASS/IMAGE. The same command resumes an interrupted run.
"""

import argparse
import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.data import Mixup, create_transform
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler

import vca
from training import recipe as recipes
from training.card import write_card
from training.data import DataError, FolderBatches, Images, MemoryBatches, decode
from training.engine import RunError, RunFolder, Trainer, open_device, plot_curve, progress
from training.evaluate import accuracy
from training.recipe import key
from vca.models import CLASSIFIERS


@dataclass(frozen=True)
class Recipe:
    """Every key that a classification recipe may set."""

    model: str
    epochs: int
    batch_size: int
    lr: float
    dataset: str = key("", "name of the data set, for the card")
    license: str = key("", "licence of the data set, for the card")
    attention: str = key("", "attention kind, if not the model's own")
    weight_decay: float = key(0.05, "not applied to norms, biases, positions, lambdas and contrast embeddings")
    warmup_epochs: int = key(5, "epochs of linear warm-up")
    warmup_lr: float = key(1e-6, "learning rate at the first step")
    min_lr: float = key(1e-5, "learning rate at the end of the cosine")
    clip_grad: float = key(0.0, "largest gradient norm; 0 for none")
    micro_batch: int = key(0, "images in one forward pass, accumulated to batch_size; 0 for all")
    drop_path: float = key(0.0, "stochastic depth rate of the last block")
    label_smoothing: float = key(0.1, "label smoothing")
    mixup: float = key(0.0, "mixup alpha; 0 for none")
    cutmix: float = key(0.0, "CutMix alpha; 0 for none")
    memory: bool = key(True, "decode all images once and augment in batches on the training device")
    padding: int = key(4, "in memory: largest shift of the random crop in pixels")
    auto_augment: str = key("", "from files: timm's AutoAugment string, such as rand-m9-mstd0.5-inc1")
    color_jitter: float = key(0.0, "from files: colour jitter")
    erasing: float = key(0.0, "from files: probability of random erasing")
    crop_scale: float = key(0.08, "from files: smallest area of the random resized crop")
    workers: int = key(2, "from files: processes that read images")
    mean: list = key([0.5, 0.5, 0.5], "channel means, images in [0, 1]")
    std: list = key([0.5, 0.5, 0.5], "channel standard deviations")
    ema_decay: float = key(0.999, "decay of the EMA of the weights; 0 for none")
    precision: str = key("bf16", "bf16 or fp32")
    compile: bool = key(False, "torch.compile the model")
    seed: int = key(0, "seed of everything random")
    eval_every: int = key(1, "epochs between evaluations")
    save_every: int = key(200, "steps between saved states")

    def __post_init__(self):
        recipes.check_ranges(
            self,
            positive=("epochs", "batch_size", "lr", "eval_every", "save_every", "crop_scale"),
            not_negative=(
                "weight_decay", "warmup_epochs", "warmup_lr", "min_lr", "clip_grad", "micro_batch", "mixup", "cutmix",
                "padding", "color_jitter", "workers", "seed",
            ),
            shares=("drop_path", "label_smoothing", "erasing", "ema_decay"),
        )  # fmt: skip
        if self.model not in CLASSIFIERS:
            raise ValueError(f"model = {self.model!r} is no classifier; vca.list_models() names them.")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if len(values) != 3 or not all(type(value) in (int, float) and abs(value) < 1e3 for value in values):
                raise ValueError(f"{name} = {values} must be three numbers, one for each channel.")
        if min(self.std) <= 0:
            raise ValueError(f"std = {self.std} must be positive.")
        if self.precision not in ("bf16", "fp32"):
            raise ValueError(f"precision = {self.precision!r} must be bf16 or fp32.")
        if self.memory and (self.auto_augment or self.color_jitter or self.erasing):
            raise ValueError("auto_augment, color_jitter and erasing need memory = false.")


def build_model(recipe: Recipe, class_names: list[str], init: str | None) -> torch.nn.Module:
    """The model of a recipe, drawn from its seed or loaded from the checkpoint `init`."""
    torch.manual_seed(recipe.seed)
    args = dict(attention=recipe.attention) if recipe.attention else {}
    try:
        model = vca.create_model(recipe.model, num_classes=len(class_names), drop_path_rate=recipe.drop_path, **args)
    except (TypeError, ValueError) as error:
        raise recipes.RecipeError(f"cannot build {recipe.model}: {error}") from error
    if init:
        source = vca.load(init)
        if source.label_names != list(class_names):
            raise vca.CheckpointError(f"{init}: its classes are not those of the data.")
        vca.hub.load_weights(model, Path(init) / "model.safetensors")
    model.pretrained_cfg.update(mean=tuple(recipe.mean), std=tuple(recipe.std))
    return model


def open_batches(recipe: Recipe, images: Images, cfg: dict, device: torch.device):
    """Training batches, from memory or from files."""
    if len(images) < recipe.batch_size:
        raise DataError(f"{len(images)} training images are fewer than one batch of {recipe.batch_size}.")
    shared = dict(batch_size=recipe.batch_size, seed=recipe.seed, device=device)
    if recipe.memory:
        return MemoryBatches(*decode(images, cfg, recipe.workers), padding=recipe.padding, cfg=cfg, **shared)
    try:
        images.transform = create_transform(
            cfg["input_size"], is_training=True, scale=(recipe.crop_scale, 1.0),
            color_jitter=recipe.color_jitter or None, auto_augment=recipe.auto_augment or None,
            interpolation=cfg["interpolation"], mean=cfg["mean"], std=cfg["std"], re_prob=recipe.erasing,
            re_mode="pixel",
        )  # fmt: skip
    except (AssertionError, ValueError) as error:  # what timm says to a text that it does not know
        raise recipes.RecipeError(f"auto_augment = {recipe.auto_augment!r} is not known to timm: {error}.") from None
    return FolderBatches(images, workers=recipe.workers, **shared)


def train(recipe: Recipe, data: str, out: str, device: torch.device, init: str | None, command: str) -> dict:
    """Runs a recipe to its end and writes `out/checkpoint`; returns the accuracy of the shipped weights."""
    run = RunFolder(out, recipe, init=init)
    train_images, val_images = Images(data, "train"), Images(data, "val")
    if val_images.class_folders != train_images.class_folders:
        raise DataError(f"{data}: train and val do not hold the same class folders.")
    model = build_model(recipe, train_images.class_names, init).to(device)
    cfg = model.pretrained_cfg
    batches = open_batches(recipe, train_images, cfg, device)
    val = decode(val_images, cfg, recipe.workers)

    per_epoch, total = batches.steps_per_epoch, batches.steps_per_epoch * recipe.epochs
    optimizer = create_optimizer_v2(model, "adamw", lr=recipe.lr, weight_decay=recipe.weight_decay)
    scheduler = CosineLRScheduler(
        optimizer, t_initial=total, lr_min=recipe.min_lr, warmup_t=min(recipe.warmup_epochs * per_epoch, total - 1),
        warmup_lr_init=recipe.warmup_lr, warmup_prefix=False, t_in_epochs=False,
    )  # fmt: skip
    trainer = Trainer(
        run, model, optimizer, scheduler, seed=recipe.seed, device=device, precision=recipe.precision,
        ema_decay=recipe.ema_decay, clip_grad=recipe.clip_grad, micro_batch=recipe.micro_batch, compile=recipe.compile,
        save_every=recipe.save_every,
    )  # fmt: skip
    smoothing = recipe.label_smoothing
    mixup = None
    if recipe.mixup or recipe.cutmix:
        mixup = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=smoothing, num_classes=model.num_classes)
        smoothing = 0.0

    def loss_fn(model, x, y):
        return F.cross_entropy(model(x).float(), y, label_smoothing=smoothing)

    with progress(total, trainer.step) as bar:
        while trainer.step < total:
            epoch, first = divmod(trainer.step, per_epoch)
            for x, y in batches.epoch(epoch, first):
                trainer.seed_step()
                if mixup:
                    x, y = mixup(x, y)
                metrics = trainer.train_step((x, y), loss_fn)
                bar.update()
                if trainer.step % 20 == 0 or trainer.step == total:
                    rate = trainer.step * recipe.batch_size / trainer.seconds
                    bar.set_postfix_str(f"loss {metrics['loss']:.3f} lr {metrics['lr']:.1e} {rate:.0f} img/s", False)
                    run.log(step=trainer.step, epoch=epoch, seconds=round(trainer.seconds, 1), **metrics)
                if trainer.step % per_epoch == 0 and ((epoch + 1) % recipe.eval_every == 0 or trainer.step == total):
                    run.log(step=trainer.step, epoch=epoch + 1, **accuracy(trainer.eval_model, *val))
                    plot_curve(run, "top1", "validation top-1 (%)")
                trainer.checkpoint(force=trainer.step == total)

    result = accuracy(trainer.eval_model, *val)
    this_run = dict(
        recipe=asdict(recipe), command=command, init=init, steps=total, epochs=recipe.epochs,
        train_images=len(train_images), skipped_steps=trainer.skipped, torch=torch.__version__, device=device.type,
        results=result,
    )  # fmt: skip
    history = (vca.load(init).training_history if init else []) + [this_run]
    checkpoint = run.path / "checkpoint"
    vca.save(trainer.eval_model, checkpoint, label_names=train_images.class_names, training=history)
    write_card(checkpoint)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a file of training/recipes, or a path to a TOML file")
    parser.add_argument("--data", required=True, metavar="FOLDER", help="images, as above")
    parser.add_argument("--out", help="run folder; default runs/RECIPE")
    parser.add_argument("--init", help="checkpoint folder to start from instead of random weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    recipes.add_arguments(parser, Recipe)
    args = parser.parse_args()
    try:
        recipe = recipes.read(args.recipe, Recipe, vars(args))
        out = args.out or f"runs/{Path(args.recipe).stem}"
        command = "python -m training.classify " + shlex.join("DATA" if a == args.data else a for a in sys.argv[1:])
        result = train(recipe, args.data, out, open_device(args.device), args.init, command)
    except (recipes.RecipeError, DataError, RunError, vca.CheckpointError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{out}/checkpoint: top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} % on {result['images']} images")


if __name__ == "__main__":
    main()
