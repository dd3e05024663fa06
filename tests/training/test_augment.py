"""Augmentation of batches: each function against what its numbers say it does."""

import pytest
import torch
import torch.nn.functional as F

from training.data import augment

IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
WHOLE = [1.0, 0.5, 0.5, 0.5, 0.5]  # area, aspect, vertical and horizontal place, angle


def warp(change: dict[int, float], smallest_area: float = 0.25, degrees: float = 90) -> torch.Tensor:
    draws = torch.tensor([change.get(i, value) for i, value in enumerate(WHOLE)]).expand(2, -1)
    return augment.warp(IMAGES, draws, smallest_area, degrees)


def test_the_whole_image_stays_as_it_is():
    torch.testing.assert_close(warp({}), IMAGES)


@pytest.mark.parametrize("top, left", [(0, 0), (0, 8), (8, 8)])
def test_a_crop_is_resized(top, left):
    """Half of each side, where the numbers say; along its border interpolation sees what lies outside."""
    quarter = F.interpolate(IMAGES[..., top : top + 8, left : left + 8], scale_factor=2, mode="bilinear")
    out = warp({0: 0.0, 2: top / 8, 3: left / 8})
    torch.testing.assert_close(out[..., 1:-1, 1:-1], quarter[..., 1:-1, 1:-1])


def test_a_quarter_turn():
    torch.testing.assert_close(warp({4: 1.0}), IMAGES.rot90(1, (2, 3)), atol=1e-5, rtol=0)
    torch.testing.assert_close(warp({4: 0.0}), IMAGES.rot90(-1, (2, 3)), atol=1e-5, rtol=0)


def test_colors():
    middle = [0.5, 0.5, 0.5]

    def jitter(change: dict[int, float]) -> torch.Tensor:
        draws = torch.tensor([change.get(i, value) for i, value in enumerate(middle)]).expand(2, -1)
        return augment.jitter(IMAGES, draws, 1.0)

    torch.testing.assert_close(jitter({}), IMAGES)
    torch.testing.assert_close(jitter({0: 0.25}), IMAGES / 2)
    torch.testing.assert_close(jitter({0: 1.0}), (2 * IMAGES).clamp(max=1))
    torch.testing.assert_close(jitter({1: 0.0}), IMAGES.mean((1, 2, 3), keepdim=True).expand_as(IMAGES))
    torch.testing.assert_close(jitter({2: 0.0}), IMAGES.mean(1, keepdim=True).expand_as(IMAGES))


def test_erasing():
    draws = torch.rand(4000, 5, generator=torch.Generator().manual_seed(0))
    erased = augment.erase(torch.ones(4000, 3, 32, 48), draws, 0.25) == 0
    assert torch.equal(erased[:, 0], erased[:, 2])
    share = erased[:, 0].float().mean((1, 2))
    assert torch.equal(share > 0, draws[:, 0] < 0.25)
    found = share[share > 0]
    assert found.min() >= 0.01 and found.max() < 0.36 and abs(found.mean() - 0.17) < 0.02
    rows, cols = erased[:, 0].any(2).sum(1), erased[:, 0].any(1).sum(1)
    assert torch.equal(erased[:, 0].sum((1, 2)), rows * cols), "not a rectangle"
    assert erased[:, 0].float().mean(0)[:, [0, -1]].mean() > 0.002, "the border is never reached"


def test_nothing_depends_on_the_other_images():
    generator = torch.Generator().manual_seed(0)
    for function, count, options in (
        (augment.warp, augment.WARP_DRAWS, (0.3, 20.0)),
        (augment.jitter, augment.JITTER_DRAWS, (0.4,)),
        (augment.erase, augment.ERASE_DRAWS, (1.0,)),
    ):
        draws = torch.rand(2, count, generator=generator)
        torch.testing.assert_close(function(IMAGES, draws, *options)[1:], function(IMAGES[1:], draws[1:], *options))
