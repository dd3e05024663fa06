"""Flow matching on the straight line from noise to data, as in SiT (arXiv 2401.08740).

x_t = (1 - t) x_0 + t x_1 with x_0 standard normal (t = 0) and x_1 data (t = 1). A model is any function
`model(x, t) -> (B, C, ...)` of x (B, C, ...) and t (B,) in [0, 1]: the velocity, the mean of x_1 - x_0 given x_t.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from vca.diffusion.sampling import Callback, Model, Noise, Sampler, at_time, per_sample, silent
from vca.extras import import_extra
from vca.functional import upcast

LAST_STEP = 0.04
RTOL, ATOL = 1e-3, 1e-6  # of "dopri5"


def loss(model: Model, x1: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """Mean squared error of the velocity of each sample, (B,).

    Args:
        model: a function of x (B, C, ...) and t (B,) in [0, 1]: the velocity (B, C, ...).
        x1: images or latents (B, C, ...); pixels in [-1, 1].
        x0: standard normal noise, like x1.
        t: (B,) in [0, 1].
    """
    weight = per_sample(t, x1)
    velocity = upcast(model((1 - weight) * x0 + weight * x1, t))
    return (velocity - (x1 - x0)).square().flatten(1).mean(1)


def predicted(model: Model, x: Tensor, t: float) -> Tensor:
    """The data x_1 that the model expects, (B, C, ...), on seeing x_t (B, C, ...) at time t: x + (1 - t) v."""
    return x + (1 - t) * model(x, at_time(t, x))


def logit_normal(normal: Tensor) -> Tensor:
    """Standard normal draws -> times in (0, 1), dense in the middle (arXiv 2403.03206)."""
    return normal.sigmoid()


def even_times(steps: int) -> list[float]:
    """The ends of `steps` equal steps from 0 to 1: steps + 1 times."""
    _check_steps(steps)
    return [step / steps for step in range(steps + 1)]


def sde_times(steps: int) -> list[float]:
    """The ends of steps - 1 equal steps from 0 to 0.96 and of a last one: SiT's choice."""
    _check_steps(steps)
    return [(1 - LAST_STEP) * step / max(steps - 1, 1) for step in range(steps)] + [1.0]


def shifted(times: Sequence[float], shift: float) -> list[float]:
    """Times closer to the noise for a shift above 1, and to the data below (arXiv 2403.03206, section 5.3.2).

    With the share of noise s = 1 - t it is s -> shift s / (1 + (shift - 1) s), which keeps 0 and 1.
    """
    return [t / (shift + (1 - shift) * t) for t in times]


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1.")


def sample_euler(model: Model, noise: Noise, times: Sequence[float], callback: Callback = silent) -> Tensor:
    """The ODE dx = v dt by Euler's method: one call of the model per step.

    Args:
        model: a function of x (B, C, ...) and t (B,) in [0, 1]: the velocity (B, C, ...).
        noise: gives the next standard normal tensor (B, C, ...) at each call; called once, for the starting point.
        times: rising from 0 to 1, one more than there are steps.
        callback: called as (step, total, x) with the state (B, C, ...) after 0, 1, ..., total steps.

    Returns:
        x_1, (B, C, ...); pixels are in about [-1, 1].
    """
    total, x = len(times) - 1, noise()
    for step, (t, end) in enumerate(pairwise(times)):
        callback(step, total, x)
        x = x + (end - t) * model(x, at_time(t, x))
    callback(total, total, x)
    return x


def sample_heun(model: Model, noise: Noise, times: Sequence[float], callback: Callback = silent) -> Tensor:
    """The ODE dx = v dt by Heun's method, of second order: two calls of the model per step.

    Args:
        model: a function of x (B, C, ...) and t (B,) in [0, 1]: the velocity (B, C, ...).
        noise: gives the next standard normal tensor (B, C, ...) at each call; called once, for the starting point.
        times: rising from 0 to 1, one more than there are steps.
        callback: called as (step, total, x) with the state (B, C, ...) after 0, 1, ..., total steps.

    Returns:
        x_1, (B, C, ...); pixels are in about [-1, 1].
    """
    total, x = len(times) - 1, noise()
    for step, (t, end) in enumerate(pairwise(times)):
        callback(step, total, x)
        slope = model(x, at_time(t, x))
        slope_end = model(x + (end - t) * slope, at_time(end, x))
        x = x + (end - t) / 2 * (slope + slope_end)
    callback(total, total, x)
    return x


def sample_sde(model: Model, noise: Noise, times: Sequence[float], callback: Callback = silent) -> Tensor:
    """Euler-Maruyama for dx = (v + w s) dt + sqrt(2 w) dW with w = 1 - t, SiT's default; the last step adds no noise.

    s = (t v - x) / (1 - t) is the score on the straight line, so the drift is (1 + t) v - x, without a singularity.

    Args:
        model: a function of x (B, C, ...) and t (B,) in [0, 1]: the velocity (B, C, ...).
        noise: gives the next standard normal tensor (B, C, ...) at each call; the first is the starting point, and
            every step but the last takes one more.
        times: rising from 0 to 1, one more than there are steps.
        callback: called as (step, total, x) with the state (B, C, ...) after 0, 1, ..., total steps.

    Returns:
        x_1, (B, C, ...); pixels are in about [-1, 1].
    """
    total, x = len(times) - 1, noise()
    for step, (t, end) in enumerate(pairwise(times)):
        callback(step, total, x)
        x = x + (end - t) * ((1 + t) * model(x, at_time(t, x)) - x)
        if step < total - 1:
            x = x + math.sqrt(2 * (1 - t) * (end - t)) * noise()
    callback(total, total, x)
    return x


def sample_dopri5(model: Model, noise: Noise, times: Sequence[float], callback: Callback = silent) -> Tensor:
    """The ODE dx = v dt by torchdiffeq's adaptive Dormand-Prince method of order 5, with SiT's tolerances.

    It chooses its own steps, from 0 to 1 in one go: the callback sees the states at `times` after the last of them.
    Arguments and result are those of `sample_heun`. The error is controlled over the whole batch, so that an image
    depends on the others by about the tolerance.

    Raises:
        ImportError: torchdiffeq is not installed; the message names the extra.
    """
    odeint = import_extra("torchdiffeq", "ode").odeint
    x, total = noise(), len(times) - 1
    grid = torch.tensor(times, dtype=x.dtype, device=x.device)

    def velocity(t: Tensor, x: Tensor) -> Tensor:
        return model(x, t.to(x.dtype).expand(len(x)))

    states = odeint(velocity, x, grid, rtol=RTOL, atol=ATOL, method="dopri5")
    for step, state in enumerate(states):
        callback(step, total, state)
    return states[-1]


ADAPTIVE = {"dopri5": Sampler(sample_dopri5, even_times)}
SAMPLERS = {
    "euler": Sampler(sample_euler, even_times),
    "heun": Sampler(sample_heun, even_times),
    "sde": Sampler(sample_sde, sde_times),
}
