"""What the samplers of `vca.diffusion.ddpm` and `vca.diffusion.flow` share.

A sampler is a plain function `run(model, noise, times, callback) -> x`: `model(x, t)` is the network at times t (B,),
`noise()` gives a new standard normal tensor (B, C, ...) at each call, the first of which is the starting point, and
`callback(step, total, x)` sees the state after 0, 1, ..., total steps. A callback that raises ends the sampling.
"""

import difflib
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

Model = Callable[[Tensor, Tensor], Tensor]
Noise = Callable[[], Tensor]
Callback = Callable[[int, int, Tensor], object]


class Sampler(NamedTuple):
    """A sampling function and the times it asks the network at, given the number of steps."""

    run: Callable[[Model, Noise, Sequence, Callback], Tensor]
    times: Callable[[int], list]


def silent(step: int, total: int, x: Tensor) -> None:
    """The callback that does nothing."""


def normal_noise(seed: int, indices: Sequence[int], shape: Sequence[int], device: torch.device) -> Noise:
    """Noise for a batch of samples, each a function of (seed, index) alone, whatever batch it is part of.

    Args:
        seed, indices: non-negative; one index per sample.
        shape: of one sample.

    Returns:
        A function that draws the next standard normal tensor (len(indices), *shape), float32.
    """
    generators = [np.random.default_rng((seed, index)) for index in indices]

    def draw() -> Tensor:
        draws = [generator.standard_normal(shape, dtype=np.float32) for generator in generators]
        return torch.from_numpy(np.stack(draws)).to(device)

    return draw


def class_indices(labels: Sequence[int | str] | int | str | Tensor, num_classes: int, names: Sequence[str]) -> Tensor:
    """Classes by number or name as indices (B,); `num_classes` is no class, a single label a batch of one.

    Raises:
        ValueError: a label is none of the classes.
    """
    listed = list(labels) if isinstance(labels, list | tuple) else [labels] if isinstance(labels, str | int) else None
    if listed is not None:
        if unknown := [label for label in listed if isinstance(label, str) and label not in names]:
            near = difflib.get_close_matches(unknown[0], names, 3) or list(names)[:3]
            meant = f"did you mean {', '.join(near)}?" if names else "this model has no names of classes."
            raise ValueError(f"label {unknown[0]!r} is none of the {num_classes} classes; {meant}")
        listed = [names.index(label) if isinstance(label, str) else label for label in listed]
    y = torch.as_tensor(labels if listed is None else listed)
    whole = not (y.dtype.is_floating_point or y.dtype.is_complex or y.dtype == torch.bool)
    whole = whole and not any(isinstance(label, bool) for label in listed or ())  # a tensor of both takes True for 1
    if y.ndim != 1 or not len(y) or not whole or y.min() < 0 or y.max() > num_classes:
        raise ValueError(f"labels must be a list of names or of whole numbers from 0 to {num_classes} (no class).")
    return y.long()


def check_guidance(scale: float, interval: Sequence[float]) -> None:
    """Raises a ValueError if a guidance scale, or the interval in which it applies, is impossible."""
    if not math.isfinite(scale):
        raise ValueError(f"guidance_scale = {scale} must be a finite number.")
    if len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1:
        raise ValueError(f"guidance_interval = {tuple(interval)} must be two numbers, 0 <= from <= to <= 1.")


def at_time(t: float, x: Tensor) -> Tensor:
    """One time for every sample of x, as the network takes it: (B,), an integer where `t` is one."""
    return torch.full((len(x),), t, device=x.device, dtype=torch.long if isinstance(t, int) else x.dtype)


def per_sample(values: Tensor, x: Tensor) -> Tensor:
    """Values (B,) or a scalar, in the type of x and with as many dimensions, for broadcasting."""
    return values.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


def to_bytes(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] -> uint8, rounded as DiT does: 127.5 x + 128 for x in [-1, 1], cut off."""
    return (255 * images + 0.5).clamp(0, 255).byte()
