"""Trains a classifier: images in, checkpoint out.

    python -m training.classify cifar10_vca --data FOLDER
    python -m training.classify cifar10_vca --data FOLDER --out runs/mine --epochs 5 --lr 5e-4
    python -m training.classify cifar10_vca --data FOLDER --init weights/NAME
    python -m training.classify everyday_vca --data FOLDER --init CONVERTED --teacher timm:NAME
    torchrun --nproc-per-node 8 -m training.classify imagenet_vca_deit_tiny --data FOLDER

FOLDER holds train/CLASS/IMAGE and val/CLASS/IMAGE; for shards and Hugging Face data sets see training/data. The same
command resumes an interrupted run. --plan says what a run costs, --smoke tries it for a few steps on noise.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from timm.data import Mixup, create_transform
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torchvision.transforms import Compose

from training.card import write_card
from training.core import cli
from training.core import recipe as recipes
from training.core.classifier_recipe import ClassifierRecipe
from training.core.datasets import fit
from training.core.distill import (
    Student,
    mapped_cross_entropy,
    partial_cross_entropy,
    read_teacher_classes,
    teacher_probabilities,
)
from training.core.distributed import ALONE, World, join
from training.core.init import build_model
from training.core.metrics import accuracy
from training.core.plots import grid_png, plot_curve
from training.core.precision import round_weights, set_tf32
from training.core.run import RunFolder, progress
from training.core.teacher import open_teacher, resize
from training.core.trainer import Trainer
from training.data.augment import RandomDownscale
from training.data.batches import FolderBatches, FolderEvaluation, MemoryBatches, MemoryEvaluation
from training.data.images import Images, decode, denormalize, describe, open_splits
from training.data.seeding import seed_everything
from training.data.sources import read_sources
from vca.checkpoint import write_atomically


def open_batches(recipe: ClassifierRecipe, images: Images, cfg: dict, device: torch.device, world: World = ALONE):
    """This process's rows of the training batches, from memory or from files."""
    rows = world.rows(recipe.batch_size)
    shared = dict(batch_size=recipe.batch_size, seed=recipe.seed, device=device, rows=rows)
    if recipe.memory:
        augment = {
            key: getattr(recipe, key) for key in ("padding", "smallest_crop", "rotation", "color_jitter", "erasing")
        }
        return MemoryBatches(*decode(images, cfg, recipe.workers), cfg=cfg, **augment, **shared)
    try:
        transform = create_transform(
            cfg["input_size"], is_training=True, scale=(recipe.crop_scale, 1.0),
            color_jitter=recipe.color_jitter or None, auto_augment=recipe.auto_augment or None,
            interpolation=cfg["interpolation"], mean=cfg["mean"], std=cfg["std"], re_prob=recipe.erasing,
            re_mode="pixel",
        )  # fmt: skip
    except (AssertionError, ValueError) as error:  # what timm says to a text that it does not know
        raise recipes.RecipeError(f"auto_augment = {recipe.auto_augment!r} is not known to timm: {error}.") from None
    images.transform = Compose([RandomDownscale(recipe.downscale), transform]) if recipe.downscale else transform
    groups = recipe.batch_size // recipe.mix_group if recipe.mix_group else 1
    return FolderBatches(images, workers=recipe.workers, repeats=recipe.repeats, groups=groups, **shared)


def open_evaluation(recipe: ClassifierRecipe, images: Images, cfg: dict, world: World = ALONE):
    """This process's share of the validation images, from memory or from files."""
    share = slice(world.rank, None, world.size)
    if recipe.memory:
        return MemoryEvaluation(*decode(images, cfg, recipe.workers), share=share)
    return FolderEvaluation(images, cfg, recipe.workers, share=share)


def create_scheduler(recipe: ClassifierRecipe, optimizer: torch.optim.Optimizer, per_epoch: int) -> CosineLRScheduler:
    """Linear warm-up, cosine, and a cool-down at the end, counted in steps."""
    cosine = per_epoch * (recipe.epochs - recipe.cooldown_epochs)
    return CosineLRScheduler(
        optimizer, t_initial=cosine, lr_min=recipe.min_lr * recipe.lr_scale,
        warmup_t=min(round(recipe.warmup_epochs * per_epoch), cosine - 1),
        warmup_lr_init=recipe.warmup_lr * recipe.lr_scale, warmup_prefix=False, t_in_epochs=False,
    )  # fmt: skip


def groups_with_embeds_decayed(recipe: ClassifierRecipe, model: nn.Module) -> list[dict]:
    """The parameter groups of timm's optimizers, but that contrast embeddings are decayed, too."""
    embeds = ("positive_embed", "negative_embed")
    spared = {name for name in model.no_weight_decay() if not name.endswith(embeds)}
    options = dict(weight_decay=recipe.weight_decay, no_weight_decay_list=spared)
    if not recipe.layer_decay:
        return param_groups_weight_decay(model, **options)
    no_opt_scale = recipe.layer_decay_no_opt_scale or None
    return param_groups_layer_decay(model, layer_decay=recipe.layer_decay, no_opt_scale=no_opt_scale, **options)


def create_optimizer(recipe: ClassifierRecipe, model: nn.Module, trained: nn.Module) -> torch.optim.Optimizer:
    """The recipe's optimizer over `model`, with layer decay if it has that, and over what `trained` has beside it."""
    options = dict(lr=recipe.lr * recipe.lr_scale, weight_decay=recipe.weight_decay)
    optimizer = create_optimizer_v2(
        model, recipe.optimizer, layer_decay=recipe.layer_decay or None,
        layer_decay_no_opt_scale=recipe.layer_decay_no_opt_scale or None,
        param_group_fn=partial(groups_with_embeds_decayed, recipe) if recipe.embed_decay else None, **options,
    )  # fmt: skip
    if trained is not model:
        own = {id(parameter) for parameter in model.parameters()}
        more = [parameter for parameter in trained.parameters() if id(parameter) not in own]
        optimizer.add_param_group(dict(params=more, lr_scale=1.0, **options))
    return optimizer


def create_mix(recipe: ClassifierRecipe, num_classes: int, world: World = ALONE) -> Callable | None:
    """A function of (step, images, labels) that mixes this process's rows of a batch, by timm's `Mixup`; or None.

    Every group of rows has random numbers of its own, whichever process holds it.

    Raises:
        RecipeError: the processes' parts of a batch do not consist of whole groups.
    """
    if not (recipe.mixup or recipe.cutmix):
        return None
    mixup = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.label_smoothing, num_classes=num_classes)
    group, part = recipe.mix_group or recipe.batch_size, recipe.batch_size // world.size
    if part % group:
        raise recipes.RecipeError(
            f"mixup and CutMix among {group} rows cannot be shared by {world.size} processes with {part} rows each; "
            f"set --mix-group {part} or a divisor of it, in a run with one process alike."
        )

    def mix(step: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        mixed = []
        for number, (images, labels) in enumerate(zip(x.split(group), y.split(group), strict=True)):
            seed_everything(recipe.seed, step, 2, world.rank * (part // group) + number)
            mixed.append(mixup(images, labels))
        return tuple(torch.cat(tensors) for tensors in zip(*mixed, strict=True))

    return mix


def train(
    recipe: ClassifierRecipe,
    data: str,
    out: str,
    device: torch.device,
    init: str | None,
    command: str,
    log_to: str = "",
    teacher: str | None = None,
    fit_batch: bool = False,
) -> dict:
    """Runs a recipe to its end and writes `out/checkpoint`.

    Args:
        recipe: what to train, and how.
        data: folder of images, as above.
        out: the run folder; a run that was interrupted there goes on.
        device: where to train; several processes each have their own.
        init: a checkpoint to start from, or `timm:NAME`; None for random weights.
        command: the command of this run, for the card.
        log_to: one of `training.core.log_to.LOGS`, where the log goes, too; "" for none.
        teacher: a model whose answers are learned besides, see `training.core.teacher.open_teacher`.

    Returns:
        The accuracy of the shipped weights on the validation images, as `training.core.metrics.accuracy`.

    Raises:
        RecipeError, DataError, RunError, CheckpointError: see the modules of `training.core` and `training.data`; the
            message says what to do.
    """
    world = join(device)
    train_images, val_images = open_splits(data, world, device)
    known = describe(train_images, val_images)
    if sources := read_sources(data, train_images):
        if recipe.mixup or recipe.cutmix:
            raise recipes.RecipeError("mixup and cutmix must be 0 with sources.json: a mixed image has two sources.")
        if recipe.memory:
            raise recipes.RecipeError("memory must be false with sources.json.")
        train_images.sources = sources.of_images
        known["sources"] = sources.fingerprint()
    run = RunFolder(out, recipe, world, log_to=log_to, data=known, init=init, teacher=teacher)
    recipe = fit(recipe, train_images.class_folders, len(train_images), world, fit_batch)
    set_tf32(recipe.tf32)
    grows = dict(dynamic_img_size=True) if recipe.img_sizes else {}
    model, history = build_model(recipe, train_images.class_names, init, drop_path_rate=recipe.drop_path, **grows)
    cfg = model.pretrained_cfg
    cfg.update(mean=tuple(recipe.mean), std=tuple(recipe.std), crop_pct=recipe.crop_pct or cfg["crop_pct"])
    model.to(device).set_grad_checkpointing(recipe.checkpointing)
    mix = create_mix(recipe, model.num_classes, world)
    batches = open_batches(recipe, train_images, cfg, device, world)
    val = open_evaluation(recipe, val_images, cfg, world)

    per_epoch, total = batches.steps_per_epoch, batches.steps_per_epoch * recipe.epochs
    smoothing = 0.0 if mix else recipe.label_smoothing
    taught_by = open_teacher(teacher).to(device, memory_format=torch.channels_last) if teacher else None
    trained = Student(model, taught_by.num_classes).to(device) if teacher else model
    same = read_teacher_classes(data, train_images.class_folders, taught_by) if teacher else None
    same = None if same is None else same.to(device)
    labeled = sources.labeled.to(device) if sources else None
    optimizer = create_optimizer(recipe, model, trained)

    def label_loss(logits, y, source=None):
        if source is None:
            return F.cross_entropy(logits.float(), y, label_smoothing=smoothing)
        return partial_cross_entropy(logits, y, labeled[source], recipe.unlabeled_weight, smoothing)

    def loss_fn(trained, x, y, *source):
        images = resize(x, recipe.img_size_at(trainer.step / total)) if recipe.img_sizes else x
        if not taught_by:
            return label_loss(trained(images), y, *source)
        logits, as_teacher = trained(images)
        probabilities = teacher_probabilities(taught_by, x, cfg, recipe.teacher_size)
        taught = F.cross_entropy(as_teacher.float(), probabilities)
        if same is not None:
            taught = taught + mapped_cross_entropy(logits, probabilities, same)
        return label_loss(logits, y, *source) + recipe.teacher_weight * taught

    scheduler = create_scheduler(recipe, optimizer, per_epoch)
    trainer = Trainer(run, trained, loss_fn, optimizer, scheduler, recipe, device=device, world=world)
    shipped = trainer.eval_model.model if teacher else trainer.eval_model

    with progress(total, trainer.step, world) as bar:
        while trainer.step < total:
            epoch, first = divmod(trainer.step, per_epoch)
            for x, y, *source in trainer.waiting_for(batches.epoch(epoch, first)):
                if mix:
                    x, y = mix(trainer.step, x, y)
                if not trainer.step and world.first:
                    write_atomically(run.path / "first_batch.png", grid_png(denormalize(x[:64], cfg), columns=8))
                metrics = trainer.train_step((x, y, *source))
                bar.update()
                last = trainer.step == total
                trainer.log(bar, metrics, epoch=epoch, last=last)
                if trainer.step % per_epoch == 0 and ((epoch + 1) % recipe.eval_every == 0 or last):
                    run.log(step=trainer.step, epoch=epoch + 1, **accuracy(shipped, val, world))
                    plot_curve(run, "top1", "validation top-1 (%)")
                trainer.checkpoint(force=last)

    round_weights(shipped, recipe.stored_as)
    result = accuracy(shipped, val, world)
    if world.first:
        for argument in grows:  # of training; the checkpoint has one size, which set_input_size changes
            shipped.model_args.pop(argument)
        checkpoint = run.finish(
            trainer, shipped, result, label_names=train_images.class_names, history=history, command=command,
            epochs=recipe.epochs, train_images=len(train_images),
        )  # fmt: skip
        write_card(checkpoint)
    return result


def report(result: dict) -> str:
    top5 = f", top-5 {result['top5']:.2f} %" if "top5" in result else ""
    return f"top-1 {result['top1']:.2f} %{top5} on {result['images']} images"


def main() -> None:
    cli.main("training.classify", __doc__, ClassifierRecipe, train, report, teacher="optional")


if __name__ == "__main__":
    main()
