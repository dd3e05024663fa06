"""Attention transfer: the attention of a pretrained ViT is exchanged, and taught to give what it gave.

    python -m training.transfer everyday_transfer --teacher timm:NAME --data FOLDER
    python -m training.transfer everyday_transfer --teacher timm:NAME=FILE.safetensors --data FOLDER
    python -m training.transfer RECIPE --teacher weights/NAME --data FOLDER --out runs/mine --attention agent

Images need no labels: FOLDER/train holds those to learn from, FOLDER/val those to measure on, in any sub-folders. In
every block the new layer reads what the teacher's self-attention reads, on the teacher's own stream, and learns its
output (docs/transfer.md). The result is a checkpoint, with the teacher's head if it has one, that --init of
training.classify takes. The same command resumes an interrupted run.
"""

from pathlib import Path

import torch
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision import transforms

from training.core import cli
from training.core.datasets import fit
from training.core.distributed import join
from training.core.init import build_model, fill_converted
from training.core.plots import plot_curve
from training.core.precision import round_weights, set_tf32
from training.core.run import RunFolder, progress
from training.core.teacher import attention_pairs, blocks, hidden_states, open_teacher, relative_error, resize
from training.core.trainer import Trainer
from training.core.transfer_recipe import TransferRecipe
from training.data.batches import FolderBatches, evenly
from training.data.images import Images, describe, eval_transform
from training.data.seeding import derive_seed
from training.data.unlabeled import UnlabeledImages
from vca.layers.grid import OnGrid

KEPT = ("qkv", "proj")


def layer_errors(student: nn.Module, teacher: nn.Module, images: Tensor) -> Tensor:
    """Relative errors (L,) of the student's attention layers on the teacher's stream."""
    errors, grid_size = [], teacher.patch_embed.dynamic_feat_size(images.shape[-2:])
    for block, (z, target) in zip(blocks(student), attention_pairs(teacher, images), strict=True):
        errors.append(relative_error(attend(block, z, grid_size), target))
    return torch.stack(errors)


def attend(block: nn.Module, z: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """The attention of a block on normalized tokens: (B, T, C) of a ViT on that grid, (B, H, W, C) of a Swin."""
    if hasattr(block, "_attn"):
        return block._attn(z)
    return block.attn(z, grid_size=grid_size) if isinstance(block.attn, OnGrid) else block.attn(z)


def stream_errors(student: nn.Module, teacher: nn.Module, images: Tensor) -> Tensor:
    """Relative errors (L + 1,) of the student's hidden states after every block, and of its final features."""
    with torch.no_grad():
        targets = hidden_states(teacher, images)
    pairs = zip(hidden_states(student, images), targets, strict=True)
    return torch.stack([relative_error(state, target) for state, target in pairs])


@torch.no_grad()
def held_out_errors(student: nn.Module, teacher: nn.Module, images: list[Tensor], sides: list[int]) -> dict:
    """Mean relative error at each image size, and by block at the largest; and on how many images."""
    student.eval()
    measured = {}
    for side in sorted(set(sides)):
        errors = torch.stack([layer_errors(student, teacher, resize(x, side)) for x in images]).mean(0)
        measured[f"error_{side}"] = round(errors.mean().item(), 4)
    by_block, count = [round(e, 4) for e in errors.tolist()], sum(map(len, images))
    return dict(error=measured[f"error_{side}"], **measured, by_block=by_block, images=count)


def param_groups(student: nn.Module, recipe: TransferRecipe) -> list[dict]:
    """What the teacher has trained, and what is new, each with its learning rate; the rest is frozen or slow."""
    kept, new = [], []
    for name, parameter in student.named_parameters():
        in_attention = ".attn." in name
        if recipe.stream == "teacher" and not in_attention:
            parameter.requires_grad_(False)
        elif in_attention and name.split(".")[-2] not in KEPT:
            new.append(parameter)
        else:
            kept.append(parameter)
    return [dict(params=new, lr=recipe.lr), dict(params=kept, lr=recipe.lr_kept)]


def train(
    recipe: TransferRecipe, data: str, out: str, device: torch.device, init: str | None, command: str,
    log_to: str = "", teacher: str = "",
) -> dict:  # fmt: skip
    """Runs a recipe to its end and writes `out/checkpoint`.

    Args:
        recipe: what to train, and how.
        data: folder of images without labels, as above.
        out: the run folder; a run that was interrupted there goes on.
        device: where to train; several processes each have their own.
        init: a converted model to go on from; None to convert the teacher.
        command: the command of this run, for the card.
        log_to: one of `training.core.log_to.LOGS`, where the log goes, too; "" for none.
        teacher: the model to learn from, see `training.core.teacher.open_teacher`.

    Returns:
        The relative errors of the shipped weights on the held-out images, as `held_out_errors`.

    Raises:
        RecipeError, DataError, RunError, CheckpointError: the message says what to do.
    """
    world = join(device)
    set_tf32(recipe.tf32)
    taught_by = open_teacher(teacher, **recipe.size).to(device)
    names = getattr(taught_by, "label_names", [f"class{i}" for i in range(taught_by.num_classes)])
    blocks(taught_by)  # refuses a teacher of another kind before anything is made
    cfg = taught_by.pretrained_cfg | dict(input_size=(3, max(recipe.img_sizes), max(recipe.img_sizes)))
    train_images, val_images = open_images(data, recipe, cfg)
    known = describe(train_images, val_images)
    run = RunFolder(out, recipe, world, log_to=log_to, data=known, init=init, teacher=teacher)
    recipe = fit(recipe, [], len(train_images), world)
    student, history = build_model(recipe, names, init, **recipe.size)
    if not init:
        fill_converted(student, taught_by, teacher)
        history = getattr(taught_by, "training_history", [])
    student.to(device)
    held_out = spread(val_images, recipe)
    rows = world.rows(recipe.batch_size)
    batches = FolderBatches(
        train_images, batch_size=recipe.batch_size, seed=recipe.seed, workers=recipe.workers, device=device, rows=rows
    )

    errors = layer_errors if recipe.stream == "teacher" else stream_errors
    optimizer = torch.optim.AdamW(param_groups(student, recipe), lr=recipe.lr, weight_decay=0.0)
    scheduler = CosineLRScheduler(
        optimizer, t_initial=recipe.steps, lr_min=recipe.min_lr, warmup_t=recipe.warmup_steps, t_in_epochs=False
    )

    def loss_fn(student, x):
        return errors(student, taught_by, x).mean()

    trainer = Trainer(run, student, loss_fn, optimizer, scheduler, recipe, device=device, world=world)

    per_epoch = batches.steps_per_epoch
    with progress(recipe.steps, trainer.step, world) as bar:
        while trainer.step < recipe.steps:
            epoch, first = divmod(trainer.step, per_epoch)
            for x, *_ in trainer.waiting_for(batches.epoch(epoch, first)):
                metrics = trainer.train_step((resize(x, drawn_side(recipe, trainer.step)),))
                bar.update()
                done = trainer.step == recipe.steps
                trainer.log(bar, metrics, epoch=epoch, last=done)
                if trainer.step % recipe.eval_every == 0 or done:
                    with trainer.autocast:
                        measured = held_out_errors(trainer.eval_model, taught_by, held_out, recipe.img_sizes)
                    run.log(step=trainer.step, **measured)
                    plot_curve(run, "error", "relative error, held-out images")
                trainer.checkpoint(force=done)
                if done:
                    break

    round_weights(trainer.eval_model, recipe.stored_as)
    with trainer.autocast:
        result = held_out_errors(trainer.eval_model, taught_by, held_out, recipe.img_sizes)
    if world.first:
        trainer.eval_model.model_args.pop("dynamic_img_size", None)
        run.finish(
            trainer, trainer.eval_model, result, label_names=names, history=history, command=command,
            epochs=round(recipe.steps / per_epoch, 1), train_images=len(train_images),
        )  # fmt: skip
    return result


def drawn_side(recipe: TransferRecipe, step: int) -> int:
    """The image size of a step."""
    return recipe.img_sizes[derive_seed(recipe.seed, step, 5) % len(recipe.img_sizes)]


def open_images(data: str, recipe: TransferRecipe, cfg: dict) -> tuple[Dataset, Dataset]:
    """The training images, as random crops, and the held-out ones.

    Raises:
        DataError: one of the two folders holds no images.
    """
    side, bicubic = cfg["input_size"][-1], transforms.InterpolationMode.BICUBIC
    crop = transforms.Compose(
        [
            transforms.RandomResizedCrop(side, (recipe.crop_scale, 1.0), interpolation=bicubic),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(cfg["mean"], cfg["std"]),
        ]
    )
    if data.startswith("synthetic:"):
        return Images(data, "train", crop), Images(data, "val", eval_transform(cfg))
    return UnlabeledImages(Path(data) / "train", crop), UnlabeledImages(Path(data) / "val", eval_transform(cfg))


def spread(held_out: Dataset, recipe: TransferRecipe) -> list[Tensor]:
    """Batches of held-out images, spread over all there are."""
    chosen = range(len(held_out))[evenly(len(held_out), recipe.eval_images)][: recipe.eval_images]
    images = torch.stack([held_out[index][0] for index in chosen])
    return list(images.split(recipe.batch_size))


def report(result: dict) -> str:
    return "mean relative error on held-out images " + ", ".join(
        f"{value:.4f} at {name.removeprefix('error_')} px"
        for name, value in result.items()
        if name.startswith("error_")
    )


def main() -> None:
    cli.main("training.transfer", __doc__, TransferRecipe, train, report, teacher="required")


if __name__ == "__main__":
    main()
