"""What a run will cost, before it starts; and a few steps of it on noise.

The plan runs nothing: one forward pass is traced with shapes alone. Multiply-adds are those of `FlopCounterMode`,
activations what the backward pass keeps. GPU-hours assume a share of the GPU's bf16 peak that models of this size
reach in practice (`utilization`): read them as an order of magnitude, and `--smoke` on the GPU itself as the number.
"""

import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import vca
from training.core.autoencoder import Reconstruction
from training.core.datasets import DATASETS, fit
from training.core.distributed import ALONE, join
from training.core.init import build_model
from training.core.recipe import RunRecipe
from training.data.images import DataError, Images
from training.data.latents import Latents, are_stored
from vca.models.common import input_size

FUSED_ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
SMALL_TEACHER = "mhsa_vit_pico_patch4_32"  # of an autoencoder or a generator that is tried on noise
READ_BY_A_CORE = 200  # JPEG photos of 500x375 a second, with DeiT's augmentation: measured on one core of a server CPU


class GPU(NamedTuple):
    """Dense bf16 (V100, T4: fp16) peak in TFLOP/s and memory in GB, by the maker's data sheet."""

    name: str
    peak: float
    memory: float


GPUS = {
    "t4": GPU("T4", 65, 16),
    "v100": GPU("V100", 125, 32),
    "l4": GPU("L4", 121, 24),
    "rtx4090": GPU("RTX 4090", 165, 24),
    "a100": GPU("A100", 312, 80),
    "h100": GPU("H100", 989, 80),
    "h200": GPU("H200", 989, 141),
}


class Cost(NamedTuple):
    """What one recipe asks for.

    Attributes:
        parameters: of the model, frozen ones included.
        macs: multiply-adds of a forward pass of one image.
        fixed_bytes: weights, gradients, optimizer moments and EMA.
        image_bytes: activations kept for the backward pass, for one image.
        steps, images: optimizer steps of the run, and the images they see.
        hours: on one GPU, at the assumed utilisation.
        latent_bytes: of the stored moments of both splits; 0 without latents.
    """

    parameters: int
    macs: int
    fixed_bytes: int
    image_bytes: int
    steps: int
    images: int
    hours: float
    latent_bytes: int


def estimate(recipe: RunRecipe, gpu: GPU, data: str | None = None) -> Cost:
    """The cost of a recipe on its own data set, or on `data`.

    Raises:
        DataError: the recipe's data set is not one of `DATASETS`, and no `data` is given.
    """
    train = val = classes = 0
    if recipe.labeled:
        recipe, train, val, classes = _sizes(recipe, data)
    model = _trace_once(recipe, classes)
    copies = 4 + (recipe.ema_decay > 0)
    steps = recipe.steps if hasattr(recipe, "steps") else train // recipe.batch_size * recipe.epochs
    images = steps * recipe.batch_size
    flops = 2 * recipe.passes * model.macs * recipe.relative_area(model.side) * images
    hours = flops / (gpu.peak * 1e12 * utilization(model.learned)) / 3600
    moments = 2 * 2 * math.prod(model.sample_shape) * 4 if recipe.latent else 0
    return Cost(
        model.parameters, model.macs, 4 * copies * model.learned, model.image_bytes, steps, images, hours,
        moments * (train + val),
    )  # fmt: skip


class _Traced(NamedTuple):
    parameters: int
    learned: int
    macs: int
    image_bytes: int
    sample_shape: tuple[int, int, int] | None
    side: int


_traced: dict[tuple, _Traced] = {}


def _trace_once(recipe: RunRecipe, classes: int) -> _Traced:
    """What is known of a recipe's model without running it; twins of the recipe share it."""
    args = dict(input_size=recipe.input_size) if recipe.task == "generation" else {}
    options = str(recipe.model_args())
    key = (recipe.model, classes, *args.items(), options, recipe.checkpointing, recipe.precision)
    if key not in _traced:
        with torch.device("meta"):
            is_autoencoder = recipe.task == "autoencoder"
            model = Reconstruction(recipe) if is_autoencoder else build_model(recipe, [""] * classes, None, **args)[0]
        with FakeTensorMode(allow_non_fake_inputs=True):
            model.to_empty(device="cpu")
            macs, image_bytes = trace(model, recipe)
        parameters = sum(p.numel() for p in model.parameters())
        learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
        shape = getattr(model, "sample_shape", None)
        side = (shape or input_size(model))[-1]
        _traced[key] = _Traced(parameters, learned, macs, image_bytes, shape, side)
    return _traced[key]


def utilization(parameters: int) -> float:
    """The share of a GPU's peak that training is assumed to reach: small models are bound by memory, not by products.

    A rule of thumb of ours, from throughputs that others published for DeiT and DiT; not measured here.
    """
    return 0.08 if parameters < 10e6 else 0.12 if parameters < 50e6 else 0.25


def example(model: nn.Module, count: int) -> tuple[torch.Tensor, ...]:
    """What the forward pass of a model takes, for `count` images of zeros."""
    if model.task == "autoencoder":
        return torch.zeros(count, *model.sample_shape), torch.zeros(count, *model.latent_shape)
    if model.task == "generation":
        return torch.zeros(count, *model.sample_shape), torch.zeros(count), torch.zeros(count, dtype=torch.long)
    return (torch.zeros(count, *input_size(model)),)


def trace(model: nn.Module, recipe: RunRecipe) -> tuple[int, int]:
    """Multiply-adds of one image's forward pass, and the bytes it keeps for the backward pass, without parameters."""
    count = 2
    model.train()
    if recipe.checkpointing:
        model.set_grad_checkpointing()
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            kept[storage._cdata] = storage
        return tensor

    counter = FlopCounterMode(display=False, custom_mapping={FUSED_ON_CPU: _fused_attention_flops})
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bf16")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), counter, autocast:
        output = model(*example(model, count))
    del output
    return counter.get_total_flops() // (2 * count), sum(storage.nbytes() for storage in kept.values()) // count


def _fused_attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_, **__) -> int:
    return sdpa_flop_count(query, key, value)


def _sizes(recipe: RunRecipe, data: str | None) -> tuple[RunRecipe, int, int, int]:
    """The recipe as it would run, and the numbers of training images, validation images and classes."""
    if not data:
        known = DATASETS.get(recipe.dataset)
        if not known or not known.classes:
            names = ", ".join(name for name, other in DATASETS.items() if other.classes)
            raise DataError(f"--plan knows the sizes of {names}; of other data sets say where they are: --data.")
        return recipe, known.train, known.val, known.classes
    opened = Latents if recipe.latent and are_stored(data) else Images
    train, val = opened(data, "train"), opened(data, "val")
    recipe = fit(recipe, train.class_folders, len(train), ALONE, fit_batch=True)
    return recipe, len(train), len(val), len(train.class_names)


def plan(recipe: RunRecipe, data: str | None, gpu: str) -> str:
    """A few lines about the cost of a run."""
    chosen = GPUS[gpu]
    cost = estimate(recipe, chosen, data)
    rows = recipe.micro_batch or recipe.batch_size
    memory = cost.fixed_bytes + rows * cost.image_bytes
    fits = int((0.9 * chosen.memory * 1e9 - cost.fixed_bytes) / cost.image_bytes)
    lines = [
        f"model            {recipe.model}{', ' + kind if (kind := getattr(recipe, 'attention', '')) else ''}",
        f"parameters       {cost.parameters:,}",
        f"multiply-adds    {cost.macs / 1e9:.4f} G for an image",
        f"steps            {cost.steps:,} of {recipe.batch_size} images, {cost.images:,} images in all",
        f"learning rate    {recipe.lr * getattr(recipe, 'lr_scale', 1.0):.3g}{_scaling(recipe)}",
        f"memory           about {memory / 1e9:.1f} GB on one {chosen.name} ({chosen.memory:g} GB): "
        f"{cost.fixed_bytes / 1e9:.2f} GB of weights and optimizer, {cost.image_bytes / 1e6:.1f} MB for an image",
        f"                 {_advice(recipe, rows, fits)}",
        f"time             about {cost.hours:.3g} {chosen.name} hours at an assumed share of its peak; "
        f"{cost.hours / 8:.2g} hours on 8",
    ]
    if not getattr(recipe, "memory", True):
        rate = cost.images / cost.hours / 3600
        lines.append(
            f"loader           {rate:,.0f} images/s at that speed: about {math.ceil(rate / READ_BY_A_CORE)} CPU cores "
            f"for a GPU (--workers, {recipe.workers} now); with fewer, they bound the time"
        )
    if recipe.task == "autoencoder" or getattr(recipe, "align_weight", 0):
        lines.append("teacher          not counted")
    if cost.latent_bytes:
        lines.append(f"latents          {cost.latent_bytes / 1e9:.1f} GB on disk")
    state = cost.fixed_bytes / 4 * (3 + (recipe.ema_decay > 0)) / (4 + (recipe.ema_decay > 0)) * 4
    lines.append(f"run folder       {2 * state / 1e9:.2f} GB for the last two states")
    return "\n".join(lines)


def _scaling(recipe: RunRecipe) -> str:
    batch = getattr(recipe, "lr_batch", 0)
    return f" (linear rule: {recipe.lr:g} for a batch of {batch})" if batch else ""


def _advice(recipe: RunRecipe, rows: int, fits: int) -> str:
    if fits < 1:
        return "one image does not fit; use --checkpointing true or a larger GPU"
    if fits >= rows:
        return "fits at once"
    micro = next(size for size in range(min(fits, rows), 0, -1) if rows % size == 0)
    return f"does not fit at once; use --micro-batch {micro}, or --checkpointing true"


def smoke(recipe: RunRecipe, train: Callable, device: torch.device, steps: int) -> str:
    """Runs `train` for some steps, at the recipe's batch and model size, on images of noise; says what it measured.

    The run folder is temporary. A latent generator draws no sample grids, for which it would need its autoencoder.
    """
    classes = (DATASETS[recipe.dataset].classes if recipe.dataset in DATASETS else 0) or 10
    short = dict(save_every=steps, log_every=1, dataset="", license="")
    more = {}
    if recipe.task == "generation":
        short |= dict(steps=steps, val_every=steps, sample_every=0 if recipe.latent else steps, sample_steps=2)
    elif recipe.task == "autoencoder":
        short |= dict(steps=steps, eval_every=steps, eval_images=8, feature_size=32, feature_layers=[0])
    elif recipe.labeled:
        short |= dict(epochs=1, cooldown_epochs=0)
    else:
        short |= dict(steps=steps, eval_every=steps, eval_images=8)
    with tempfile.TemporaryDirectory() as folder:
        if recipe.task == "autoencoder" or not recipe.labeled or getattr(recipe, "align_weight", 0):
            taught = recipe.model if recipe.task == "classification" else SMALL_TEACHER
            more = dict(teacher=str(_random_teacher(taught, Path(folder) / "teacher")))
        out = Path(folder) / "run"
        data = f"synthetic:{steps * recipe.batch_size}x{classes}"
        train(replace(recipe, **short), data, str(out), device, None, "--smoke", **more)
        if not join(device).first:
            return ""
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "lr" in line]
    first, last = lines[len(lines) // 2 - 1], lines[-1]  # the first half compiles and warms up
    seconds, waiting = (last[key] - first[key] for key in ("seconds", "seconds_waiting"))
    rate = (last["step"] - first["step"]) * recipe.batch_size / max(seconds, 0.1)
    text = f"smoke: {steps} steps of {recipe.batch_size} images, loss {lines[0]['loss']:.3f} to {last['loss']:.3f}; "
    text += f"a process takes {rate:.0f} img/s and waits for data {100 * waiting / max(seconds, 0.1):.0f} % on top"
    if device.type == "cuda":
        text += f"; {torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB of GPU memory"
    return text


def _random_teacher(name: str, folder: Path) -> Path:
    """A checkpoint of the model of that name with self-attention and random weights."""
    classes = [f"class{label}" for label in range(10)]
    vca.save(vca.create_model(name, attention="mhsa", num_classes=10), folder, label_names=classes)
    return folder
