"""Generators as diffusers' users know them: names of classes, its arguments, its schedulers, and an adaptive solver."""

import pytest
import torch

import vca
from tests.helpers.checkpoints import tiny
from vca.diffusion import flow
from vca.diffusion.schedulers import of_diffusers

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
DIT = dict(beta_schedule="linear", beta_start=1e-4, beta_end=0.02)


@pytest.fixture(scope="module")
def sit():
    model = tiny("vca_sit_xs_2")
    model.label_names = ["cat", "dog", "ship"]
    return model


@pytest.fixture(scope="module")
def dit():
    return tiny("vca_dit_xs_2")


def test_classes_have_names_and_numbers(sit):
    want = sit.sample([2, 0, 3], steps=2)
    assert torch.equal(sit.sample(["ship", 0, 3], steps=2), want)
    for one in ("ship", 2):
        torch.testing.assert_close(sit.sample(one, steps=2), want[:1], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="label 'shop' is none of the 3 classes; did you mean ship"):
        sit.sample(["cat", "shop"], steps=2)
    for wrong in ([True, "cat"], [0.5], [4], [-1], [], True):
        with pytest.raises(ValueError, match="labels must be a list of names or of whole numbers from 0 to 3"):
            sit.sample(wrong, steps=2)
    with pytest.raises(ValueError, match="this model has no names of classes"):
        tiny("dit_xs_2").sample(["cat"], steps=2)


def test_arguments_by_the_names_of_diffusers(sit):
    assert torch.equal(sit.sample([0], num_inference_steps=3), sit.sample([0], steps=3))
    generator = torch.Generator().manual_seed(5)
    first, second = (sit.sample([0], steps=2, generator=generator) for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(sit.sample([0], steps=2, generator=torch.Generator().manual_seed(5)), first)


def test_images_become_pictures(sit):
    images = torch.rand(5, 3, 4, 6)
    pictures = vca.to_pil(images)
    assert [picture.size for picture in pictures] == [(6, 4)] * 5
    assert pictures[1].getpixel((2, 3)) == tuple((255 * images[1, :, 3, 2] + 0.5).int().tolist())
    sheet = vca.drawing.grid(images, 3)
    assert sheet.size == (18, 8) and sheet.getpixel((8, 7)) == pictures[4].getpixel((2, 3))
    assert sheet.getpixel((17, 7)) == (0, 0, 0)


def test_ddim_of_diffusers_is_ours(dit):
    options = dict(clip_sample=False, timestep_spacing="leading", set_alpha_to_one=True)
    theirs = diffusers.DDIMScheduler(**DIT, **options)
    states = []
    images = dit.sample([0, 2], steps=10, sampler=theirs, callback=lambda step, total, x: states.append((step, total)))
    torch.testing.assert_close(images, dit.sample([0, 2], steps=10, sampler="ddim"), atol=1e-4, rtol=0)
    assert states == [(step, 10) for step in range(11)]
    assert dit.times(10, theirs) == dit.times(10, "ddim")


def test_a_flow_scheduler_of_diffusers_is_euler_on_its_own_times(sit):
    theirs = diffusers.FlowMatchEulerDiscreteScheduler()
    images = sit.sample([1], steps=6, sampler=theirs, seed=3)
    times = [*of_diffusers(theirs, "sit").times(6), 1.0]
    assert times[0] == 0 and sorted(times) == times
    noise = vca.diffusion.sampling.normal_noise(3, [0], sit.sample_shape, torch.device("cpu"))
    with torch.no_grad():
        want = flow.sample_euler(sit.conditioned(torch.tensor([1])), noise, times)
    torch.testing.assert_close(images, sit.decode(want), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "name, options",
    [("DPMSolverMultistepScheduler", {}), ("EulerDiscreteScheduler", {}), ("DDPMScheduler", dict(clip_sample=False))],
)
def test_other_schedulers_reach_what_many_steps_reach(dit, name, options):
    scheduler = getattr(diffusers, name)(**DIT, **options)
    images = dit.sample([0], steps=8, sampler=scheduler, seed=1)
    assert images.shape == (1, 3, 8, 8) and images.isfinite().all()
    assert torch.equal(images, dit.sample([0], steps=8, sampler=getattr(diffusers, name)(**DIT, **options), seed=1))


@pytest.mark.parametrize(
    "family, scheduler, said",
    [
        ("sit", lambda: diffusers.DDIMScheduler(), "not set to follow a flow"),
        ("dit", lambda: diffusers.FlowMatchEulerDiscreteScheduler(), "does not take predicted noise"),
        ("dit", lambda: diffusers.DDIMScheduler(**DIT, prediction_type="v_prediction"), "set prediction_type"),
        ("dit", lambda: diffusers.DDIMScheduler(beta_schedule="scaled_linear"), 'set beta_schedule="linear"'),
        ("sit", lambda: 3, "sampler is a int: neither the name of a sampler nor a scheduler"),
    ],
)
def test_a_scheduler_for_another_model_is_refused(family, scheduler, said):
    with pytest.raises(ValueError, match=said):
        of_diffusers(scheduler(), family)


def test_the_adaptive_solver_is_as_exact_as_its_tolerance(sit):
    pytest.importorskip("torchdiffeq", reason="torchdiffeq is not installed")
    calls = []
    network = sit.conditioned(torch.tensor([0, 2]))

    def counted(x, t):
        calls.append(t.tolist())
        return network(x, t)

    def noise():
        return vca.diffusion.sampling.normal_noise(0, [0, 1], sit.sample_shape, torch.device("cpu"))

    states = []
    with torch.no_grad():
        exact = flow.sample_heun(network, noise(), flow.even_times(400))
        found = flow.sample_dopri5(counted, noise(), flow.even_times(5), lambda *state: states.append(state))
    assert (found - exact).abs().max() < 5e-3 and len(calls) < 200
    assert all(first == second for first, second in calls)
    assert [state[:2] for state in states] == [(step, 5) for step in range(6)] and torch.equal(states[-1][2], found)
    assert torch.equal(sit.sample([0, 2], steps=5, sampler="dopri5"), sit.decode(found))
