"""Trains a generator: images or latents in, checkpoint out.

    python -m training.generate cifar10_sit_vca --data FOLDER
    python -m training.generate cifar10_sit_vca --data FOLDER --out runs/mine --steps 2000 --lr 1e-4
    python -m training.generate cifar10_sit_vca --data FOLDER --init weights/NAME

    torchrun --nproc-per-node 8 -m training.generate imagenet_vca_dit_s_2 --data LATENTS

FOLDER holds train/CLASS/IMAGE and val/CLASS/IMAGE (for shards and Hugging Face data sets see training/data), or what
`python -m training.latents` makes of such images if the model works on latents. The same command resumes an interrupted
run. --plan says what a run costs, --smoke tries it for a few steps on noise.
"""

from typing import NamedTuple

import torch
from timm.scheduler import StepLRScheduler
from torch import Tensor

from training.card import write_card
from training.core import cli
from training.core.datasets import fit
from training.core.distributed import ALONE, World, join
from training.core.generator_recipe import GeneratorRecipe
from training.core.init import build_model
from training.core.metrics import draw_times, validation_data, validation_loss
from training.core.plots import grid_png, plot_curve
from training.core.precision import round_weights, set_tf32
from training.core.run import RunFolder, progress
from training.core.trainer import Trainer
from training.data.batches import MemoryBatches
from training.data.images import DataError, Images, decode, describe, generator_cfg, open_splits
from training.data.latents import LatentBatches, Latents, open_latents
from vca.checkpoint import write_atomically
from vca.models.dit import DiffusionTransformer

GRID_ROWS, GRID_COLUMNS = 8, 10


class Data(NamedTuple):
    """Training batches, the clean samples of the validation loss, and what is known about them."""

    batches: MemoryBatches | LatentBatches
    val_samples: Tensor
    val_labels: Tensor
    class_names: list[str]
    train_images: int


def open_data(
    recipe: GeneratorRecipe, train: Images | Latents, val: Images | Latents, device: torch.device, world: World = ALONE
) -> Data:
    """Images held in memory, or latents on disk, flipped half of the time; of each batch this process's rows."""
    shared = dict(batch_size=recipe.batch_size, seed=recipe.seed, device=device, rows=world.rows(recipe.batch_size))
    if recipe.latent:
        if (side := train.shape[-1]) != recipe.input_size:
            raise DataError(f"the latents have side {side}; the recipe has input_size = {recipe.input_size}.")
        batches = LatentBatches(train, **shared)
    else:
        cfg = generator_cfg(recipe.input_size)
        batches = MemoryBatches(*decode(train, cfg, recipe.workers), padding=0, cfg=cfg, **shared)
    return Data(batches, *validation_data(val, recipe.input_size, recipe.workers), train.class_names, len(train))


def sample_grid(model: DiffusionTransformer, recipe: GeneratorRecipe) -> bytes:
    """A PNG with a column for each of the first classes, always from the same noise."""
    columns = min(GRID_COLUMNS, model.num_classes)
    labels = list(range(columns)) * GRID_ROWS
    images = model.sample(labels, steps=recipe.sample_steps, guidance_scale=recipe.sample_guidance)
    return grid_png(images, columns)


def train(
    recipe: GeneratorRecipe,
    data: str,
    out: str,
    device: torch.device,
    init: str | None,
    command: str,
    log_to: str = "",
    fit_batch: bool = False,
) -> dict:
    """Runs a recipe to its end and writes `out/checkpoint`.

    Args:
        recipe: what to train, and how.
        data: folder of images or latents, as above.
        out: the run folder; a run that was interrupted there goes on.
        device: where to train; several processes each have their own.
        init: a checkpoint to start from, or `timm:NAME`; None for random weights.
        command: the command of this run, for the card.
        log_to: one of `training.core.log_to.LOGS`, where the log goes, too; "" for none.

    Returns:
        `val_loss`, the validation loss of the shipped weights, and `images`, on how many.

    Raises:
        RecipeError, DataError, RunError, CheckpointError: see the modules of `training.core` and `training.data`; the
            message says what to do.
    """
    world = join(device)
    train_split, val_split = (open_latents if recipe.latent else open_splits)(data, world, device)
    run = RunFolder(out, recipe, world, log_to=log_to, data=describe(train_split, val_split), init=init)
    recipe = fit(recipe, train_split.class_folders, len(train_split), world, fit_batch)
    set_tf32(recipe.tf32)
    batches, val_samples, val_labels, class_names, train_images = open_data(
        recipe, train_split, val_split, device, world
    )
    model, history = build_model(recipe, class_names, init, input_size=recipe.input_size)
    model.to(device).set_grad_checkpointing(recipe.checkpointing)
    if recipe.sample_every and model.latent_decoder:
        model.latent_decoder.load(device)

    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=recipe.lr, weight_decay=0.0)
    scheduler = StepLRScheduler(
        optimizer, decay_t=recipe.steps + 1, decay_rate=1.0, warmup_t=recipe.warmup_steps, t_in_epochs=False
    )

    def loss_fn(model, x, y, noise, t):
        return model.loss(x, y, noise, t).mean()

    trainer = Trainer(run, model, loss_fn, optimizer, scheduler, recipe, device=device, world=world)

    per_epoch, total, rows = batches.steps_per_epoch, recipe.steps, world.rows(recipe.batch_size)
    grid_file = run.path / "samples" / f"step-{total:08d}.png"
    with progress(total, trainer.step, world) as bar:
        while trainer.step < total:
            epoch, first = divmod(trainer.step, per_epoch)
            for x, y in trainer.waiting_for(batches.epoch(epoch, first)):
                trainer.seed_step()
                whole = (recipe.batch_size, *x.shape[1:])
                noise = torch.randn(whole, device=device)[rows]
                t = draw_times(model.family, recipe.time_sampling, recipe.batch_size, device)[rows]
                dropped = torch.rand(recipe.batch_size, device=device)[rows] < recipe.class_dropout
                y = torch.where(dropped, model.num_classes, y)
                metrics = trainer.train_step((x, y, noise, t))
                bar.update()
                last = trainer.step == total
                trainer.log(bar, metrics, epoch=epoch, last=last)
                if world.first and (trainer.step % recipe.val_every == 0 or last):
                    val_loss = validation_loss(trainer.eval_model, val_samples, val_labels)
                    run.log(step=trainer.step, val_loss=round(val_loss, 5))
                    plot_curve(run, "val_loss", "validation loss")
                if world.first and recipe.sample_every and (trainer.step % recipe.sample_every == 0 or last):
                    file = grid_file.with_name(f"step-{trainer.step:08d}.png")
                    file.parent.mkdir(exist_ok=True)
                    write_atomically(file, sample_grid(trainer.eval_model, recipe))
                trainer.checkpoint(force=last)
                if last:
                    break

    round_weights(trainer.eval_model, recipe.stored_as)
    result = dict(
        val_loss=round(validation_loss(trainer.eval_model, val_samples, val_labels), 5), images=len(val_labels)
    )
    if world.first:
        checkpoint = run.finish(
            trainer, trainer.eval_model, result, label_names=class_names, history=history, command=command,
            epochs=round(total / per_epoch, 1), train_images=train_images,
        )  # fmt: skip
        if recipe.sample_every:
            write_atomically(checkpoint / "samples.png", grid_file.read_bytes())
        write_card(checkpoint)
    return result


def report(result: dict) -> str:
    return f"validation loss {result['val_loss']:.4f} on {result['images']} samples"


def main() -> None:
    cli.main("training.generate", __doc__, GeneratorRecipe, train, report)


if __name__ == "__main__":
    main()
