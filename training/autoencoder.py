"""Trains a small autoencoder, on whose latents a generator can work in place of Stable Diffusion's.

    python -m training.autoencoder scenes_autoencoder_4 --data FOLDER --teacher weights/NAME
    python -m training.autoencoder scenes_autoencoder_4 --data FOLDER --teacher timm:NAME=FILE.safetensors

FOLDER holds train/CLASS/IMAGE and val/CLASS/IMAGE, which are held in memory. The result, OUT/checkpoint, is a folder in
diffusers' own format, with mean and deviation of the latents in its config, and `results.json`; --vae of
training.latents and training.generate takes it. The teacher, a pretrained classifier, says how much a reconstruction
differs from its image. The same command resumes an interrupted run. --plan says what a run costs (without the teacher),
--smoke tries it for a few steps on noise.
"""

import json
from dataclasses import asdict

import torch
from timm.scheduler import CosineLRScheduler

from training.core import cli
from training.core.autoencoder import Reconstruction, losses, measure, reconstruct, save, set_scaling
from training.core.autoencoder_recipe import AutoencoderRecipe
from training.core.datasets import fit
from training.core.distributed import join
from training.core.features import at_side
from training.core.init import place_of
from training.core.plots import grid_png, plot_curve
from training.core.precision import STORED, round_weights, set_tf32
from training.core.run import RunFolder, progress
from training.core.trainer import Trainer
from training.data.batches import MemoryBatches, evenly
from training.data.images import decode, describe, generator_cfg, normalize, open_splits
from vca.checkpoint import write_atomically

SHOWN = 10
SCALED_BY = 2000  # training images, about: mean and deviation of the latents


def train(
    recipe: AutoencoderRecipe, data: str, out: str, device: torch.device, init: str | None, command: str,
    log_to: str = "", teacher: str = "",
) -> dict:  # fmt: skip
    """Runs a recipe to its end and writes `out/checkpoint`.

    Args:
        recipe: what to train, and how.
        data: folder of images, as above.
        out: the run folder; a run that was interrupted there goes on.
        device: where to train; several processes each have their own.
        init: None.
        command: the command of this run, for `results.json`.
        log_to: one of `training.core.log_to.LOGS`, where the log goes, too; "" for none.
        teacher: the model whose features are compared, see `training.core.teacher.open_teacher`.

    Returns:
        What `training.core.autoencoder.measure` finds of the shipped weights on the validation images.

    Raises:
        RecipeError, DataError, RunError, CheckpointError: the message says what to do.
    """
    world = join(device)
    train_images, val_images = open_splits(data, world, device)
    run = RunFolder(out, recipe, world, log_to=log_to, data=describe(train_images, val_images), teacher=teacher)
    recipe = fit(recipe, train_images.class_folders, len(train_images), world)
    set_tf32(recipe.tf32)
    model = Reconstruction(recipe).to(device)
    features = at_side(teacher, recipe.feature_size, recipe.feature_layers, device)
    cfg, rows = generator_cfg(recipe.image_size), world.rows(recipe.batch_size)
    pixels, labels = decode(train_images, cfg, recipe.workers)
    batches = MemoryBatches(
        pixels, labels, batch_size=recipe.batch_size, seed=recipe.seed, padding=0, cfg=cfg, device=device, rows=rows
    )
    held_out = normalize(decode(val_images, cfg, recipe.workers)[0], cfg)
    held_out = held_out[evenly(len(held_out), recipe.eval_images)][: recipe.eval_images]
    shown = held_out[evenly(len(held_out), SHOWN)][:SHOWN].to(device)

    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=0.0)
    scheduler = CosineLRScheduler(
        optimizer, t_initial=recipe.steps, lr_min=recipe.min_lr, warmup_t=recipe.warmup_steps, t_in_epochs=False
    )

    def loss_fn(model, x, normal):
        found = losses(model, features, x, normal)
        return found["l1"] + recipe.feature_weight * found["features"] + recipe.kl_weight * found["kl"]

    trainer = Trainer(run, model, loss_fn, optimizer, scheduler, recipe, device=device, world=world)

    per_epoch = batches.steps_per_epoch
    with progress(recipe.steps, trainer.step, world) as bar:
        while trainer.step < recipe.steps:
            epoch, first = divmod(trainer.step, per_epoch)
            for x, _ in trainer.waiting_for(batches.epoch(epoch, first)):
                trainer.seed_step()
                normal = torch.randn(recipe.batch_size, *model.latent_shape, device=device)[rows]
                metrics = trainer.train_step((x, normal))
                bar.update()
                done = trainer.step == recipe.steps
                trainer.log(bar, metrics, epoch=epoch, last=done)
                if world.first and (trainer.step % recipe.eval_every == 0 or done):
                    run.log(step=trainer.step, **measure(trainer.eval_model, features, held_out))
                    plot_curve(run, "psnr", "PSNR in dB, validation images")
                    file = run.path / "samples" / f"step-{trainer.step:08d}.png"
                    file.parent.mkdir(exist_ok=True)
                    write_atomically(file, reconstructions(trainer.eval_model, shown))
                trainer.checkpoint(force=done)
                if done:
                    break

    shipped = trainer.eval_model
    round_weights(shipped, recipe.stored_as)
    result = measure(shipped, features, held_out)
    if world.first:
        folder = run.path / "checkpoint"
        measured = pixels[evenly(len(pixels), SCALED_BY)]
        set_scaling(shipped, (normalize(part, cfg) for part in measured.split(recipe.batch_size)))
        save(shipped, folder, STORED[recipe.stored_as])
        made = dict(
            recipe=asdict(recipe), command=command, teacher=place_of(teacher), steps=trainer.step,
            train_images=len(pixels), skipped_steps=trainer.skipped, torch=torch.__version__, device=device.type,
            results=result,
        )  # fmt: skip
        write_atomically(folder / "results.json", json.dumps(made, indent=2).encode())
        write_atomically(folder / "log.jsonl", run.compact_log())
        write_atomically(folder / "samples.png", reconstructions(shipped.float(), shown))
    return result


def reconstructions(model: Reconstruction, images: torch.Tensor) -> bytes:
    """A PNG with images (N, 3, H, W) in [-1, 1] in a row, and their reconstructions below."""
    both = torch.cat([images, reconstruct(model, images)])
    return grid_png((both / 2 + 0.5).clamp(0, 1), len(images))


def report(result: dict) -> str:
    return (
        f"L1 {result['l1']:.4f}, PSNR {result['psnr']:.2f} dB, distance of features {result['features']:.4f} "
        f"on {result['images']} images"
    )


def main() -> None:
    cli.main("training.autoencoder", __doc__, AutoencoderRecipe, train, report, teacher="required", loads=False)


if __name__ == "__main__":
    main()
