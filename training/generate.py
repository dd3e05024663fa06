"""Trains a generator: images or latents in, checkpoint out.

    python -m training.generate cifar10_sit_vca --data FOLDER
    python -m training.generate cifar10_sit_vca --data FOLDER --out runs/mine --steps 2000 --lr 1e-4
    python -m training.generate cifar10_sit_vca --data FOLDER --init weights/NAME

    torchrun --nproc-per-node 8 -m training.generate imagenet_vca_dit_s_2 --data LATENTS

    python -m training.generate scenes_sit_vca_align --data FOLDER --teacher timm:NAME

FOLDER holds train/CLASS/IMAGE and val/CLASS/IMAGE (for shards and Hugging Face data sets see training/data), or what
`python -m training.latents` makes of such images if the model works on latents: images are then held in memory and
encoded again and again. --teacher is a pretrained model, or the folder that `python -m training.features` made by one:
with align_weight a middle block learns to say what it sees. The same command resumes an interrupted run. --plan says
what a run costs, --smoke tries it for a few steps on noise.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from timm.scheduler import StepLRScheduler
from torch import Tensor

from training.card import write_card
from training.core import cli
from training.core.align import Aligned
from training.core.datasets import fit
from training.core.distributed import ALONE, World, join
from training.core.generator_card import AUTOENCODER_RESULTS
from training.core.generator_recipe import GeneratorRecipe
from training.core.init import build_model
from training.core.metrics import draw_times, validation_data, validation_loss
from training.core.plots import grid_png, plot_curve
from training.core.precision import round_weights, set_tf32
from training.core.recipe import RecipeError
from training.core.run import RunFolder, progress
from training.core.trainer import Trainer
from training.data.batches import MemoryBatches
from training.data.features import Features, OnlineFeatures, open_features, seen_by
from training.data.images import Images, decode, describe, generator_cfg, open_splits
from training.data.latents import LatentBatches, Latents, open_latents
from vca.checkpoint import AUTOENCODER_FILES, AUTOENCODER_FOLDER, write_atomically
from vca.diffusion.vae import LatentDecoder
from vca.models import GENERATORS
from vca.models.dit import DiffusionTransformer

GRID_ROWS, GRID_COLUMNS = 8, 10


class Data(NamedTuple):
    """Training batches, the clean samples of the validation loss, and what is known about them."""

    batches: MemoryBatches | LatentBatches
    val_samples: Tensor
    val_labels: Tensor
    class_names: list[str]
    train_images: int
    features: Features | OnlineFeatures | None


def open_data(
    recipe: GeneratorRecipe, train: Images | Latents, val: Images | Latents, device: torch.device,
    world: World = ALONE, teacher: str = "",
) -> Data:  # fmt: skip
    """Images held in memory, or latents, flipped half of the time; of each batch this process's rows.

    With a teacher, its features of the images are the third part of a batch.
    """
    shared = dict(batch_size=recipe.batch_size, seed=recipe.seed, device=device, rows=world.rows(recipe.batch_size))
    cfg = generator_cfg(recipe.input_size)
    pixels, labels = (getattr(train, "pixels", None), None) if recipe.latent else decode(train, cfg, recipe.workers)
    features = None
    if teacher:
        grid_size = recipe.input_size // GENERATORS[recipe.model]["patch_size"]
        features = open_features(teacher, train, pixels, grid_size, recipe.precision, device)
        shared |= dict(beside=features.read)
    if recipe.latent:
        batches = LatentBatches(train, **shared)
    else:
        batches = MemoryBatches(pixels, labels, padding=0, cfg=cfg, **shared)
    samples = validation_data(val, recipe.input_size, recipe.workers)
    return Data(batches, *samples, train.class_names, len(train), features)


def bring_autoencoder(source: str, checkpoint: Path) -> None:
    """Copies an autoencoder in a folder into a checkpoint, where `vca.load` finds it, and what was measured of it."""
    (checkpoint / AUTOENCODER_FOLDER).mkdir(parents=True, exist_ok=True)
    for name in (*AUTOENCODER_FILES, AUTOENCODER_RESULTS):
        file = Path(source) / Path(name).name
        if name in AUTOENCODER_FILES or file.exists():
            write_atomically(checkpoint / name, file.read_bytes())


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
    teacher: str | None = None,
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
        teacher: the pretrained model that a block is aligned with, see `training.core.teacher.open_teacher`, or the
            folder of its features.

    Returns:
        `val_loss`, the validation loss of the shipped weights, and `images`, on how many.

    Raises:
        RecipeError, DataError, RunError, CheckpointError: see the modules of `training.core` and `training.data`; the
            message says what to do.
    """
    if bool(teacher) != bool(recipe.align_weight):
        raise RecipeError(
            f"align_weight = {recipe.align_weight:g} {'is for no' if teacher else 'needs a'} --teacher, whose features "
            "a block is aligned with."
        )
    world = join(device)
    if recipe.latent:
        vae = LatentDecoder(recipe.vae or GENERATORS[recipe.model]["vae"])
        train_split, val_split = open_latents(data, vae, recipe.sample_shape, recipe.workers, world, device)
    else:
        train_split, val_split = open_splits(data, world, device)
    aligned_with = dict(teacher=seen_by(teacher)) if teacher else {}
    run = RunFolder(out, recipe, world, log_to=log_to, data=describe(train_split, val_split), init=init, **aligned_with)
    recipe = fit(recipe, train_split.class_folders, len(train_split), world, fit_batch)
    set_tf32(recipe.tf32)
    batches, val_samples, val_labels, class_names, train_images, features = open_data(
        recipe, train_split, val_split, device, world, teacher or ""
    )
    model, history = build_model(recipe, class_names, init, input_size=recipe.input_size)
    model.to(device).set_grad_checkpointing(recipe.checkpointing)
    if recipe.sample_every and model.latent_decoder:
        model.latent_decoder.load(device)

    trained = Aligned(model, recipe.align_block, features.shape[1]).to(device) if features else model
    learned = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=recipe.lr, weight_decay=0.0)
    scheduler = StepLRScheduler(
        optimizer, decay_t=recipe.steps + 1, decay_rate=1.0, warmup_t=recipe.warmup_steps, t_in_epochs=False
    )

    def loss_fn(trained, x, y, noise, t, *seen):
        more = (*seen, recipe.align_weight) if seen else ()
        return trained.loss(x, y, noise, t, *more).mean()

    trainer = Trainer(run, trained, loss_fn, optimizer, scheduler, recipe, device=device, world=world)
    shipped = trainer.eval_model.model if features else trainer.eval_model

    per_epoch, total, rows = batches.steps_per_epoch, recipe.steps, world.rows(recipe.batch_size)
    grid_file = run.path / "samples" / f"step-{total:08d}.png"
    with progress(total, trainer.step, world) as bar:
        while trainer.step < total:
            epoch, first = divmod(trainer.step, per_epoch)
            for x, y, *seen in trainer.waiting_for(batches.epoch(epoch, first)):
                trainer.seed_step()
                whole = (recipe.batch_size, *x.shape[1:])
                noise = torch.randn(whole, device=device)[rows]
                t = draw_times(model.family, recipe.time_sampling, recipe.batch_size, device)[rows]
                dropped = torch.rand(recipe.batch_size, device=device)[rows] < recipe.class_dropout
                y = torch.where(dropped, model.num_classes, y)
                metrics = trainer.train_step((x, y, noise, t, *seen))
                if features:
                    metrics["align"] = trained.distance()
                bar.update()
                last = trainer.step == total
                trainer.log(bar, metrics, epoch=epoch, last=last)
                if world.first and (trainer.step % recipe.val_every == 0 or last):
                    val_loss = validation_loss(shipped, val_samples, val_labels)
                    run.log(step=trainer.step, val_loss=round(val_loss, 5))
                    plot_curve(run, "val_loss", "validation loss")
                if world.first and recipe.sample_every and (trainer.step % recipe.sample_every == 0 or last):
                    file = grid_file.with_name(f"step-{trainer.step:08d}.png")
                    file.parent.mkdir(exist_ok=True)
                    write_atomically(file, sample_grid(shipped, recipe))
                trainer.checkpoint(force=last)
                if last:
                    break

    round_weights(shipped, recipe.stored_as)
    result = dict(val_loss=round(validation_loss(shipped, val_samples, val_labels), 5), images=len(val_labels))
    if world.first:
        if brings := bool(recipe.vae) and Path(recipe.vae).is_dir():
            shipped.model_args["vae"] = AUTOENCODER_FOLDER
        checkpoint = run.finish(
            trainer, shipped, result, label_names=class_names, history=history, command=command,
            epochs=round(total / per_epoch, 1), train_images=train_images,
        )  # fmt: skip
        if brings:
            bring_autoencoder(recipe.vae, checkpoint)
        if recipe.sample_every:
            write_atomically(checkpoint / "samples.png", grid_file.read_bytes())
        write_card(checkpoint)
    return result


def report(result: dict) -> str:
    return f"validation loss {result['val_loss']:.4f} on {result['images']} samples"


def main() -> None:
    cli.main("training.generate", __doc__, GeneratorRecipe, train, report, teacher="optional")


if __name__ == "__main__":
    main()
