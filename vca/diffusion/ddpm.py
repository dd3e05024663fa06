"""Denoising diffusion as in DiT (arXiv 2212.09748): linear schedule, predicted noise, learned variance.

x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise for t = 0 ... 999, where beta_t rises linearly from 1e-4 to 0.02 and
abar_t is the product of 1 - beta. A model is any function `model(x, t) -> (B, 2C, ...)` of x (B, C, ...) and integer
t (B,): the predicted noise, then v in [-1, 1], which interpolates the log-variance of a reverse step between its two
bounds (arXiv 2102.09672). Coefficients are computed in float64; x keeps its own type. Predictions are not clipped.
"""

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from vca.diffusion.sampling import Callback, Model, Noise, Sampler, at_time, per_sample, silent
from vca.functional import upcast

NUM_TIMESTEPS = 1000


def alpha_bars() -> Tensor:
    """abar_t for t = 0 ... 999, float64."""
    return (1 - torch.linspace(1e-4, 0.02, NUM_TIMESTEPS, dtype=torch.float64)).cumprod(0)


def even_times(steps: int) -> list[int]:
    """`steps` timesteps from 999 down to 0, both included, evenly spread and rounded; 0 alone for one step.

    DiT's choice for DDPM. As there, they are rounded sums, which decides where the exact value lies between two.
    """
    _check_steps(steps)
    stride = (NUM_TIMESTEPS - 1) / max(1, steps - 1)
    sums = accumulate([stride] * (steps - 1), initial=0.0)
    return [round(position) for position in sums][::-1]


def leading_times(steps: int) -> list[int]:
    """The `steps` timesteps floor(1000 i / steps), falling to 0: DiT's choice for DDIM."""
    _check_steps(steps)
    return [NUM_TIMESTEPS * i // steps for i in reversed(range(steps))]


def _check_steps(steps: int) -> None:
    if not 1 <= steps <= NUM_TIMESTEPS:
        raise ValueError(f"steps={steps} must lie between 1 and {NUM_TIMESTEPS}.")


class Schedule:
    """Coefficients of the chain that visits the given timesteps only; float64 (steps,), least noisy first.

    Args:
        times: timesteps, falling.
    """

    def __init__(self, times: Sequence[int]):
        abar = alpha_bars()[list(reversed(times))]
        self.abar = abar
        self.abar_prev = abar_prev = torch.cat([abar.new_ones(1), abar[:-1]])
        beta = 1 - abar / abar_prev
        variance = beta * (1 - abar_prev) / (1 - abar)
        variance[0] = variance[min(1, len(variance) - 1)]  # it is 0, and its logarithm would be infinite
        self.log_beta, self.log_variance = beta.log(), variance.clamp(min=1e-20).log()
        self.mean_x0 = beta * abar_prev.sqrt() / (1 - abar)
        self.mean_xt = (1 - beta).sqrt() * (1 - abar_prev) / (1 - abar)

    def noised(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t, given x_0 and standard normal noise (B, C, ...)."""
        return _at(self.abar.sqrt(), t, x0) * x0 + _at((1 - self.abar).sqrt(), t, x0) * noise

    def clean(self, xt: Tensor, noise: Tensor, t: Tensor | int) -> Tensor:
        """x_0, given x_t and the noise in it."""
        return (xt - _at((1 - self.abar).sqrt(), t, xt) * noise) / _at(self.abar.sqrt(), t, xt)

    def posterior_mean(self, x0: Tensor, xt: Tensor, t: Tensor | int) -> Tensor:
        """The mean of q(x_prev | x_t, x_0)."""
        return _at(self.mean_x0, t, xt) * x0 + _at(self.mean_xt, t, xt) * xt

    def reverse_step(self, xt: Tensor, output: Tensor, t: Tensor | int) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the model's p(x_prev | x_t), each (B, C, ...), from its output (B, 2C, ...)."""
        noise, v = output.chunk(2, dim=1)
        mean = self.posterior_mean(self.clean(xt, noise, t), xt, t)
        fraction = (v + 1) / 2
        return mean, fraction * _at(self.log_beta, t, xt) + (1 - fraction) * _at(self.log_variance, t, xt)


def _at(table: Tensor, t: Tensor | int, x: Tensor) -> Tensor:
    return per_sample(table.to(x.device)[t], x)


FULL = Schedule(range(NUM_TIMESTEPS - 1, -1, -1))


def loss(model: Model, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The hybrid loss of each sample, (B,): mean squared error of the noise, plus the variational bound of v alone.

    Args:
        model: a function of x (B, C, ...) and integer t (B,): the predicted noise and v, (B, 2C, ...).
        x0: images or latents (B, C, ...); pixels in [-1, 1].
        noise: standard normal, like x0.
        t: integer (B,), uniform over 0 ... 999.
    """
    xt = FULL.noised(x0, noise, t)
    predicted, v = upcast(model(xt, t)).chunk(2, dim=1)
    mse = (predicted - noise).square().flatten(1).mean(1)
    return mse + variational_bound(torch.cat([predicted.detach(), v], dim=1), x0, xt, t)


def predicted(model: Model, x: Tensor, t: int) -> Tensor:
    """The data x_0 that the model expects, (B, C, ...), on seeing x_t (B, C, ...) at timestep t."""
    noise, _ = model(x, at_time(t, x)).chunk(2, dim=1)
    return FULL.clean(x, noise, t)


def variational_bound(output: Tensor, x0: Tensor, xt: Tensor, t: Tensor) -> Tensor:
    """The term of the variational bound at t, bits per dimension, (B,).

    It is KL(q(x_prev | x_t, x_0) || p(x_prev | x_t)) for t > 0, and -log p(x_0 | x_1) at t = 0 with x_0 in bins of
    1/255 to either side, the outermost ones open (arXiv 2006.11239, equations 5 and 13). DiT takes it for latents, too.

    Args:
        output: the model's output at (xt, t), (B, 2C, ...).
        x0, xt: the clean and the noised images or latents, (B, C, ...).
        t: integer (B,).
    """
    mean, log_variance = FULL.reverse_step(xt, output, t)
    true_log_variance = _at(FULL.log_variance, t, xt)
    distance = (FULL.posterior_mean(x0, xt, t) - mean).square()
    kl = 0.5 * (log_variance - true_log_variance - 1 + (true_log_variance - log_variance).exp())
    kl = kl + 0.5 * distance * (-log_variance).exp()
    nll = -discretized_log_likelihood(x0, mean, log_variance)
    return torch.where(t == 0, nll.flatten(1).mean(1), kl.flatten(1).mean(1)) / math.log(2)


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Log-probability that a Gaussian gives to the 8-bit bin around x, elementwise; values are spread over [-1, 1]."""
    scale = (-0.5 * log_variance).exp()
    below = torch.special.ndtr((x - mean - 1 / 255) * scale)
    above = torch.special.ndtr((x - mean + 1 / 255) * scale)
    below = torch.where(x < -0.999, torch.zeros_like(below), below)
    above = torch.where(x > 0.999, torch.ones_like(above), above)
    return (above - below).clamp(min=1e-12).log()


def sample_ddpm(model: Model, noise: Noise, times: Sequence[int], callback: Callback = silent) -> Tensor:
    """Ancestral sampling with the learned variance.

    Args:
        model: a function of x (B, C, ...) and integer t (B,): the predicted noise and v, (B, 2C, ...).
        noise: gives the next standard normal tensor (B, C, ...) at each call; the first is the starting point, and
            every step but the last takes one more.
        times: timesteps from 0 to 999, falling; one step each.
        callback: called as (step, total, x) with the state (B, C, ...) after 0, 1, ..., total steps.

    Returns:
        x_0, (B, C, ...); pixels are in about [-1, 1].
    """
    schedule, total, x = Schedule(times), len(times), noise()
    for step, t in enumerate(times):
        callback(step, total, x)
        left = total - 1 - step
        x, log_variance = schedule.reverse_step(x, model(x, at_time(t, x)), left)
        if left:
            x = x + (0.5 * log_variance).exp() * noise()
    callback(total, total, x)
    return x


def sample_ddim(model: Model, noise: Noise, times: Sequence[int], callback: Callback = silent) -> Tensor:
    """Deterministic DDIM (arXiv 2010.02502, eta = 0); v is not used.

    Args:
        model: a function of x (B, C, ...) and integer t (B,): the predicted noise and v, (B, 2C, ...).
        noise: gives the next standard normal tensor (B, C, ...) at each call; called once, for the starting point.
        times: timesteps from 0 to 999, falling; one step each.
        callback: called as (step, total, x) with the state (B, C, ...) after 0, 1, ..., total steps.

    Returns:
        x_0, (B, C, ...); pixels are in about [-1, 1].
    """
    schedule, total, x = Schedule(times), len(times), noise()
    for step, t in enumerate(times):
        callback(step, total, x)
        left = total - 1 - step
        predicted, _ = model(x, at_time(t, x)).chunk(2, dim=1)
        x0, abar_prev = schedule.clean(x, predicted, left), schedule.abar_prev[left].item()
        x = math.sqrt(abar_prev) * x0 + math.sqrt(1 - abar_prev) * predicted
    callback(total, total, x)
    return x


ADAPTIVE: dict[str, Sampler] = {}
SAMPLERS = {"ddpm": Sampler(sample_ddpm, even_times), "ddim": Sampler(sample_ddim, leading_times)}
