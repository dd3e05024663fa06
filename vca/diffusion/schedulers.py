"""The schedulers of diffusers as samplers: `model.sample(labels, sampler=DPMSolverMultistepScheduler(...))`.

A scheduler of diffusers counts time from 1000 (noise) to 0 (data) and, where it follows a flow, points from data to
noise; SiT (arXiv 2401.08740) counts from 0 to 1 and points to the data. The adapter turns both around.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vca.diffusion.ddpm import NUM_TIMESTEPS, alpha_bars
from vca.diffusion.sampling import Callback, Model, Noise, Sampler, at_time, silent

FLOW_PREDICTIONS = (None, "flow_prediction")
LEARNED = ("learned", "learned_range")


def of_diffusers(scheduler: Any, family: str) -> Sampler:
    """A sampler that takes its steps by a scheduler of diffusers.

    Args:
        scheduler: any with `set_timesteps` and `step`; random numbers that it draws follow from the first noise.
        family: "dit" for one that takes the predicted noise, "sit" for one that takes the velocity of a flow.

    Raises:
        ValueError: it is for another kind of model, or has another noise schedule than the model was trained with.
    """
    name = type(scheduler).__name__
    if not all(hasattr(scheduler, part) for part in ("set_timesteps", "step", "config")):
        raise ValueError(f"sampler is a {name}: neither the name of a sampler nor a scheduler of diffusers.")
    flows = name.startswith("FlowMatch") or scheduler.config.get("use_flow_sigmas", False)
    predicts = scheduler.config.get("prediction_type")
    if family == "sit" and not (flows and predicts in FLOW_PREDICTIONS):
        raise ValueError(
            f"{name} is not set to follow a flow, as a SiT needs: take a FlowMatch scheduler, or one with "
            'use_flow_sigmas=True and prediction_type="flow_prediction".'
        )
    if family == "dit":
        if flows or predicts != "epsilon":
            raise ValueError(f'{name} does not take predicted noise, as a DiT gives it: set prediction_type="epsilon".')
        abar = getattr(scheduler, "alphas_cumprod", None)
        if abar is None or len(abar) != NUM_TIMESTEPS or not torch.allclose(abar.double(), alpha_bars(), atol=1e-4):
            raise ValueError(
                f'{name} has another noise schedule than DiT: set beta_schedule="linear", beta_start=1e-4 and '
                "beta_end=0.02, with 1000 timesteps."
            )
    draws = "generator" in inspect.signature(scheduler.step).parameters
    learned = scheduler.config.get("variance_type") in LEARNED

    def times(steps: int) -> list:
        scheduler.set_timesteps(steps)
        at = scheduler.timesteps.tolist()
        return [1 - t / NUM_TIMESTEPS for t in at] if family == "sit" else [round(t) for t in at]

    def run(model: Model, noise: Noise, at: Sequence, callback: Callback = silent) -> Tensor:
        x = noise()
        more = {}
        if draws:
            seed = int(x.flatten()[0].float().view(torch.int32)) % 2**31
            more["generator"] = torch.Generator().manual_seed(seed)
        scheduler.set_timesteps(len(at), device=x.device)
        x = x * scheduler.init_noise_sigma if hasattr(scheduler, "init_noise_sigma") else x
        for step, (t, ours) in enumerate(zip(scheduler.timesteps, at, strict=True)):
            callback(step, len(at), x)
            seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            output = model(seen, at_time(ours, x))
            if family == "sit":
                output = -output
            elif not learned:
                output = output[:, : x.shape[1]]
            x = scheduler.step(output, t, x, **more).prev_sample
        callback(len(at), len(at), x)
        return x

    return Sampler(run, times)
