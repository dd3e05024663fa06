"""Guidance in an interval and shifted times: against plain float64 loops, and diffusers' schedule."""

import math

import numpy as np
import pytest
import torch

import vca
from vca.diffusion import ddpm, flow


@pytest.fixture(scope="module")
def models():
    """A SiT and a DiT of random weights, in float64."""
    made = {}
    for name in ("vca_sit_xs_4", "vca_dit_xs_4"):
        torch.manual_seed(0)
        model = vca.create_model(name, input_size=8, dim=20, depth=2, num_classes=3).double().eval()
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.2)
        made[model.family] = model
    return made


def test_shifted_times_are_those_of_stable_diffusion_3():
    oracle = pytest.importorskip(
        "diffusers.schedulers.scheduling_flow_match_euler_discrete", reason="diffusers, the oracle, is not installed"
    )
    for shift in (0.5, 3.0):
        theirs = oracle.FlowMatchEulerDiscreteScheduler(shift=shift)
        theirs.set_timesteps(sigmas=np.linspace(1, 0.05, 20))
        ours = flow.shifted(flow.even_times(20), shift)
        assert np.allclose(1 - np.array(ours), theirs.sigmas.double().numpy(), atol=1e-6)
        assert ours[0] == 0 and ours[-1] == 1 and (np.diff(ours) > 0).all()
        assert (ours[10] < 0.5) == (shift > 1)
    assert flow.shifted(flow.even_times(7), 1.0) == flow.even_times(7)


@torch.no_grad()
def test_shifted_euler_with_guidance_in_an_interval_is_the_plain_loop(models):
    model, steps, scale, shift, (begin, end) = models["sit"], 7, 2.5, 3.0, (0.1, 0.6)
    y, null = torch.tensor([0, 2]), torch.tensor([3, 3])
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    network = model.conditioned(y, scale, guidance_interval=(begin, end))
    sampler, times = model._sampler("euler", shift)
    found = sampler(network, lambda: x, times(steps))
    expected, guided = x, 0
    for step in range(steps):
        t, following = ((k / steps) / (shift - (shift - 1) * k / steps) for k in (step, step + 1))
        at = torch.full((2,), t, dtype=torch.float64)
        velocity = model(expected, at, y)[:, :3]
        if begin <= t <= end:
            guided += 1
            without = model(expected, at, null)[:, :3]
            velocity = without + scale * (velocity - without)
        expected = expected + (following - t) * velocity
    assert 1 < guided < steps - 1
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    assert model.times(steps, "euler", shift) == pytest.approx(times(steps)[:-1])


@torch.no_grad()
def test_the_interval_of_a_dit_counts_from_noise_to_data(models):
    model, y = models["dit"], torch.tensor([1])
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    plain, guided = model.conditioned(y), model.conditioned(y, 3.0)
    late = model.conditioned(y, 3.0, guidance_interval=(0.5, 1.0))
    for t in (999, 600, 400, 0):
        at = torch.tensor([t])
        same = guided if t <= ddpm.NUM_TIMESTEPS // 2 else plain
        assert torch.allclose(late(x, at), same(x, at), atol=1e-12)
        assert not torch.allclose(plain(x, at), guided(x, at), atol=1e-3)


def test_defaults_are_the_even_steps_guided_everywhere(models):
    model = models["sit"]
    shared = dict(steps=3, guidance_scale=2.0, seed=5)
    model.float()
    plain = model.sample([0, 1], **shared)
    assert torch.equal(plain, model.sample([0, 1], **shared, guidance_interval=(0.0, 1.0), time_shift=1.0))
    assert not torch.equal(plain, model.sample([0, 1], **shared, guidance_interval=(0.5, 1.0)))
    assert not torch.equal(plain, model.sample([0, 1], **shared, time_shift=2.0))
    never = model.sample([0, 1], **shared, guidance_interval=(0.9, 0.95))
    assert torch.equal(never, model.sample([0, 1], steps=3, seed=5))


@pytest.mark.parametrize(
    "family, options, message",
    [
        ("sit", dict(guidance_interval=(0.6, 0.4)), r"guidance_interval = \(0.6, 0.4\) must be two numbers"),
        ("sit", dict(guidance_interval=(0.0, 1.5)), "0 <= from <= to <= 1"),
        ("sit", dict(guidance_interval=(math.nan, 1.0)), "0 <= from <= to <= 1"),
        ("sit", dict(guidance_interval=(0.5,)), "must be two numbers"),
        ("sit", dict(time_shift=0.0), "time_shift = 0.0 must be a positive number"),
        ("sit", dict(time_shift=math.inf), "must be a positive number"),
        ("dit", dict(time_shift=2.0), "time_shift = 2.0 is for SiT"),
    ],
)
def test_what_is_impossible_is_refused_in_a_line(models, family, options, message):
    with pytest.raises(ValueError, match=message):
        models[family].sample([0], steps=1, **options)
