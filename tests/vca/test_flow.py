"""The flow against diffusers' Euler scheduler, and all samplers on a mixture with a closed-form velocity."""

import pytest
import torch

from vca.diffusion import flow

CENTERS = torch.tensor([[2.0, 2.0], [-2.0, 1.0], [0.0, -3.0]])
WEIGHTS = torch.tensor([0.5, 0.3, 0.2])
SPREAD = 0.15


def mixture_velocity(x, t):
    """E[x_1 - x_0 | x_t = x] for x_1 from a Gaussian mixture in the plane and x_0 standard normal."""
    t = t[:, None, None]
    variance = (1 - t) ** 2 + (t * SPREAD) ** 2
    offset = x[:, None] - t * CENTERS
    share = (WEIGHTS.log() - offset.square().sum(-1) / (2 * variance[..., 0])).softmax(-1)[..., None]
    slope = (t * SPREAD**2 - (1 - t)) / variance
    return (share * (CENTERS + slope * offset)).sum(1)


def planar_noise(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(count, 2, generator=generator)


@pytest.mark.parametrize("name, steps", [("euler", 200), ("heun", 60), ("sde", 400)])
def test_samplers_recover_a_mixture_with_its_weights_and_spread(name, steps):
    sampler, times = flow.SAMPLERS[name]
    x = sampler(mixture_velocity, planar_noise(8000), times(steps))
    nearest = torch.cdist(x, CENTERS).argmin(1)
    assert torch.allclose(nearest.bincount(minlength=3) / len(x), WEIGHTS, atol=0.02)
    for mode in range(3):
        members = x[nearest == mode]
        assert torch.allclose(members.mean(0), CENTERS[mode], atol=0.03)
        assert torch.allclose(members.std(0), torch.full((2,), SPREAD), atol=0.02)


def test_orders_of_the_solvers():
    """Halving the step divides Euler's error by 2 and Heun's by 4."""
    exact = flow.sample_heun(mixture_velocity, planar_noise(200), flow.even_times(1000))
    for sampler, order in ((flow.sample_euler, 1), (flow.sample_heun, 2)):
        coarse, fine = (
            (sampler(mixture_velocity, planar_noise(200), flow.even_times(steps)) - exact).abs().mean()
            for steps in (100, 200)
        )
        assert coarse / fine == pytest.approx(2**order, rel=0.15)


def test_euler_equals_diffusers_with_the_sign_turned():
    oracle = pytest.importorskip(
        "diffusers.schedulers.scheduling_flow_match_euler_discrete", reason="diffusers, the oracle, is not installed"
    )
    steps, states = 20, []
    theirs = oracle.FlowMatchEulerDiscreteScheduler()
    theirs.set_timesteps(sigmas=[1 - step / steps for step in range(steps)])
    flow.sample_euler(
        mixture_velocity, planar_noise(50), flow.even_times(steps), lambda step, total, x: states.append(x)
    )
    x = planar_noise(50)()
    for step, t in enumerate(theirs.timesteps):
        assert torch.allclose(states[step], x, atol=1e-5)
        x = theirs.step(-mixture_velocity(x, 1 - t.expand(len(x)) / 1000), t, x).prev_sample
    assert torch.allclose(states[-1], x, atol=1e-5)


def test_the_loss_is_least_at_the_velocity_and_counts_its_error():
    x1, x0, t = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5), torch.rand(4)
    seen = {}

    def model(x, t):
        seen.update(x=x, t=t)
        return x1 - x0 + 0.5

    assert torch.allclose(flow.loss(model, x1, x0, t), torch.full((4,), 0.25), atol=1e-5)
    weight = t.view(-1, 1, 1, 1)
    assert torch.allclose(seen["x"], weight * x1 + (1 - weight) * x0) and seen["t"] is t


def test_the_expected_loss_of_the_mixture_is_least_at_its_closed_form():
    torch.manual_seed(0)
    x1 = CENTERS[torch.multinomial(WEIGHTS, 20000, replacement=True)] + SPREAD * torch.randn(20000, 2)
    x0, t = torch.randn_like(x1), torch.rand(20000)
    best = flow.loss(mixture_velocity, x1, x0, t).mean()
    for factor in (0.95, 1.05):
        assert flow.loss(lambda x, t, f=factor: f * mixture_velocity(x, t), x1, x0, t).mean() > best


def test_times():
    assert flow.even_times(4) == [0, 0.25, 0.5, 0.75, 1]
    times = flow.sde_times(250)
    assert len(times) == 251 and times[0] == 0 and times[-2] == pytest.approx(0.96) and times[-1] == 1
    assert flow.sde_times(25) == pytest.approx(flow.even_times(25))
    assert flow.sde_times(1) == [0, 1]
    for make in (flow.even_times, flow.sde_times):
        with pytest.raises(ValueError, match="steps=0 must be at least 1"):
            make(0)


def test_logit_normal_times_are_dense_in_the_middle():
    t = flow.logit_normal(torch.randn(100_000, generator=torch.Generator().manual_seed(0)))
    assert t.min() > 0 and t.max() < 1 and t.mean().item() == pytest.approx(0.5, abs=0.005)
    assert ((t > 0.25) & (t < 0.75)).float().mean().item() == pytest.approx(0.728, abs=0.01)


def test_a_callback_sees_every_state_and_ends_the_sampling_by_raising():
    class Stop(Exception):
        pass

    for sampler, times in flow.SAMPLERS.values():
        seen = []

        def callback(step, total, x, seen=seen):
            seen.append((step, total, tuple(x.shape)))
            if step == 3:
                raise Stop

        sampler(mixture_velocity, planar_noise(5), times(3), lambda *state, seen=seen: seen.append(state[:2]))
        assert seen == [(step, 3) for step in range(4)]
        seen.clear()
        with pytest.raises(Stop):
            sampler(mixture_velocity, planar_noise(5), times(9), callback)
        assert seen == [(step, 9, (5, 2)) for step in range(4)]


def test_the_predicted_data_is_where_the_velocity_leads():
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    x1 = torch.randn_like(x)
    exact = lambda state, t: (x1 - state) / (1 - t.view(-1, 1, 1, 1))  # noqa: E731
    torch.testing.assert_close(flow.predicted(exact, x, 0.25), x1)
