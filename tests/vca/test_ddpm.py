"""The diffusion against diffusers' schedulers, the loss against a float64 reference written here, and the schedules."""

import math

import pytest
import torch

from vca.diffusion import ddpm

SHAPE = (2, 3, 4, 4)


def toy(x, t):
    """A fixed smooth model with learned variance, (B, 2C, ...); its noise is that in unit Gaussian data, disturbed."""
    abar = ddpm.alpha_bars()[t].to(x.dtype).view(-1, 1, 1, 1)
    return torch.cat([(1 - abar).sqrt() * x + 0.05 * torch.sin(3 * x + abar), torch.cos(3 * x - abar)], dim=1)


def noise_source(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(SHAPE, generator=generator)


@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_trajectories_equal_those_of_diffusers(name, steps):
    oracle = pytest.importorskip(f"diffusers.schedulers.scheduling_{name}", reason="diffusers is not installed")
    schedule = dict(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False)
    if name == "ddpm":
        theirs = oracle.DDPMScheduler(**schedule, variance_type="learned_range", timestep_spacing="leading")
    else:
        theirs = oracle.DDIMScheduler(**schedule, timestep_spacing="leading", steps_offset=0)
    theirs.set_timesteps(steps)
    assert theirs.timesteps.tolist() == ddpm.leading_times(steps)

    states = []
    ddpm.SAMPLERS[name].run(toy, noise_source(0), ddpm.leading_times(steps), lambda step, total, x: states.append(x))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SHAPE, generator=generator)
    for step, t in enumerate(theirs.timesteps):
        assert torch.allclose(states[step], x, rtol=1e-5, atol=1e-5), step
        output = toy(x, t.expand(len(x)))
        if name == "ddpm":
            x = theirs.step(output, t, x, generator=generator).prev_sample
        else:
            x = theirs.step(output[:, :3], t, x).prev_sample
    assert torch.allclose(states[-1], x, rtol=1e-5, atol=1e-5)
    assert len(states) == steps + 1


def reference_terms(x0, noise, t, output):
    """MSE and variational term of one value, in Python floats, straight from arXiv 2006.11239 and 2102.09672."""
    betas = [1e-4 + (0.02 - 1e-4) * i / 999 for i in range(1000)]
    abar = [math.prod(1 - b for b in betas[: i + 1]) for i in range(t + 2)]
    before = abar[t - 1] if t else 1.0
    predicted, v = output
    xt = math.sqrt(abar[t]) * x0 + math.sqrt(1 - abar[t]) * noise

    def posterior(x0):
        a = math.sqrt(before) * betas[t] / (1 - abar[t])
        b = math.sqrt(1 - betas[t]) * (1 - before) / (1 - abar[t])
        return a * x0 + b * xt

    s = max(t, 1)
    true_variance = betas[s] * (1 - abar[s - 1]) / (1 - abar[s])
    mean = posterior((xt - math.sqrt(1 - abar[t]) * predicted) / math.sqrt(abar[t]))
    log_variance = (v + 1) / 2 * math.log(betas[t]) + (1 - v) / 2 * math.log(true_variance)
    variance = math.exp(log_variance)
    if t:
        term = 0.5 * (log_variance - math.log(true_variance)) - 0.5
        term += (true_variance + (posterior(x0) - mean) ** 2) / (2 * variance)
    else:

        def cdf(x):
            return 0.5 * (1 + math.erf((x - mean) / math.sqrt(2 * variance)))

        upper = 1.0 if x0 > 0.999 else cdf(x0 + 1 / 255)
        lower = 0.0 if x0 < -0.999 else cdf(x0 - 1 / 255)
        term = -math.log(max(upper - lower, 1e-12))
    return (predicted - noise) ** 2, term / math.log(2)


@pytest.mark.parametrize("t", [0, 1, 2, 500, 999])
def test_hybrid_loss_equals_a_float64_reference(t):
    torch.manual_seed(t)
    x0 = torch.tensor([-1.0, -0.5, 0.01, 0.7, 1.0], dtype=torch.float64).view(1, 1, 5)
    noise = torch.randn_like(x0)
    output = torch.cat([noise + 0.02 * torch.randn_like(x0), torch.rand_like(x0) * 2 - 1], dim=1)
    terms = [
        reference_terms(*pair, t, both)
        for *pair, both in zip(x0[0, 0].tolist(), noise[0, 0].tolist(), output[0].T.tolist(), strict=True)
    ]
    want = sum(mse + bound for mse, bound in terms) / len(terms)
    got = ddpm.loss(lambda x, t: output, x0, noise, torch.tensor([t]))
    assert got.item() == pytest.approx(want, rel=1e-9)
    single = ddpm.loss(lambda x, t: output.float(), x0.float(), noise.float(), torch.tensor([t]))
    assert single.item() == pytest.approx(want, rel=2e-3)


def test_the_bound_trains_only_the_variance():
    x0, noise, t = torch.randn(SHAPE), torch.randn(SHAPE), torch.tensor([0, 700])
    output = torch.randn(2, 6, 4, 4, requires_grad=True)
    ddpm.loss(lambda x, t: output, x0, noise, t).sum().backward()
    mse_alone = 2 * (output.detach()[:, :3] - noise) / noise[0].numel()
    assert torch.allclose(output.grad[:, :3], mse_alone)
    assert output.grad[1, 3:].abs().sum() > 0


def test_a_perfect_prediction_costs_nothing():
    x0, noise, t = torch.randn(SHAPE).clamp(-1, 1), torch.randn(SHAPE), torch.tensor([300, 900])
    output = torch.cat([noise, torch.full_like(noise, -1)], dim=1)
    assert torch.allclose(ddpm.loss(lambda x, t: output, x0, noise, t), torch.zeros(2), atol=1e-5)


def test_exact_noise_brings_ddim_back_to_the_image_and_ddpm_close():
    """For one single image the noise in x_t is known exactly."""
    image = torch.rand(SHAPE) * 2 - 1

    def exact(x, t):
        abar = ddpm.alpha_bars()[t].float().view(-1, 1, 1, 1)
        return torch.cat([(x - abar.sqrt() * image) / (1 - abar).sqrt(), torch.zeros_like(x)], dim=1)

    for sampler, times in ddpm.SAMPLERS.values():
        assert torch.allclose(sampler(exact, noise_source(1), times(20)), image, atol=1e-4)


def test_timesteps():
    assert ddpm.even_times(250)[:3] == [999, 995, 991] and ddpm.even_times(250)[-1] == 0
    assert ddpm.leading_times(250)[:2] == [996, 992] and ddpm.leading_times(250)[-1] == 0
    for times in (ddpm.even_times, ddpm.leading_times):
        for steps in (1, 2, 7, 30, 999, 1000):
            chosen = times(steps)
            assert len(set(chosen)) == steps and chosen == sorted(chosen, reverse=True)
        for steps in (0, 1001):
            with pytest.raises(ValueError, match=f"steps={steps} must lie between 1 and 1000"):
                times(steps)
    assert ddpm.even_times(1) == [0], "DiT's script takes the cleanest timestep alone"


@pytest.mark.parametrize("steps", [1, 2, 3, 50, 250, 277, 999, 1000])
def test_timesteps_are_spaced_as_in_dit(steps):
    """DiT adds up a stride and rounds to even, which tells where the position is halfway, as at 277 steps."""
    position, stride, want = 0.0, 999 / (steps - 1) if steps > 1 else 1.0, []
    for _ in range(steps):
        want.append(round(position))
        position += stride
    assert ddpm.even_times(steps) == want[::-1]


def test_a_callback_that_raises_ends_the_sampling():
    seen = []

    def callback(step, total, x):
        seen.append(step)
        if step == 3:
            raise KeyboardInterrupt

    for sampler, times in ddpm.SAMPLERS.values():
        seen.clear()
        with pytest.raises(KeyboardInterrupt):
            sampler(toy, noise_source(0), times(10), callback)
        assert seen == [0, 1, 2, 3]


def test_the_predicted_data_is_what_was_noised():
    x0 = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    noise, t = torch.randn_like(x0), torch.tensor([400, 400])
    xt = ddpm.FULL.noised(x0, noise, t)
    torch.testing.assert_close(ddpm.predicted(lambda x, t: torch.cat([noise, x], 1), xt, 400), x0)
