"""Faithfulness on models whose answer is known beforehand."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter1d, sobel
from torch import nn

from benchmarks.faithfulness import Row, measure, table
from tests.helpers.vits import make_vca_vit
from vca import faithfulness, imputation
from vca.attribution import METHODS
from vca.faithfulness import BASELINES, Curves, curves, infidelity, sensitivity

WEIGHTS = torch.tensor([[3.0, -1.0, 0.0], [0.5, 2.0, -2.0]], dtype=torch.float64)


class Additive(nn.Module):
    """Logits [sum of w times the mean of each 2x2 cell of the first colour, 0] for images of 4x6 pixels."""

    def __init__(self):
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, 1, 2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        cells = x[:, 0].unflatten(1, (2, 2)).unflatten(3, (3, 2)).mean((2, 4))
        score = (cells * WEIGHTS).sum((1, 2))
        return torch.stack([score, torch.zeros_like(score)], 1)


def picture(seed: int = 0, count: int = 1) -> torch.Tensor:
    """4x6 pixels of one value in every 2x2 cell."""
    cells = torch.randn(count, 3, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return cells.repeat_interleave(2, 2).repeat_interleave(2, 3)


def cells_of(x: torch.Tensor) -> np.ndarray:
    return x[:, 0, ::2, ::2].numpy()


def exact(x: torch.Tensor) -> torch.Tensor:
    """What each cell adds to the score beyond the mean colour, at each of its pixels."""
    contributions = WEIGHTS * (x[:, 0, ::2, ::2] - x[:, 0].mean((1, 2))[:, None, None])
    return contributions.repeat_interleave(2, 1).repeat_interleave(2, 2)


def sigmoid(score):
    return 1 / (1 + np.exp(-score))


@pytest.mark.parametrize("target", [0, 1])
@pytest.mark.parametrize("steps", [6, 4, 99])
def test_curves_by_hand(target, steps):
    model, x, weights = Additive(), picture(count=2), WEIGHTS.numpy().ravel()
    attribution = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(3))
    got = curves(model, x, torch.tensor([target, target]), dict(a=attribution), steps)["a"]
    counts = dict([(6, range(7)), (4, [0, 2, 3, 4, 6]), (99, range(7))])[steps]  # round half to even
    np.testing.assert_allclose(got.fractions, np.array(counts) / 6)
    blurred = faithfulness.blurred(x)
    for i in range(2):
        means = attribution[i].numpy().reshape(2, 2, 3, 2).mean((1, 3)).ravel()
        order = np.argsort(-means)
        start = cells_of(x)[i].ravel()
        plain = np.full(6, x[i, 0].mean())
        soft = blurred[i, 0].numpy().reshape(2, 2, 3, 2).mean((1, 3)).ravel()
        for before, after, curve in ((start, plain, got.deletion[i]), (soft, start, got.insertion[i])):
            for count, probability in zip(counts, curve, strict=True):
                mixed = before.copy()
                mixed[order[:count]] = after[order[:count]]
                score = (weights * mixed).sum()
                np.testing.assert_allclose(probability, sigmoid(score if target == 0 else -score), atol=1e-12)


def test_the_exact_attribution_beats_every_random_order():
    model, x = Additive(), picture(count=8)
    orders = {str(seed): faithfulness.random_map(x, seed) for seed in range(20)}
    found = curves(model, x, torch.zeros(8, dtype=torch.long), dict(orders, exact=exact(x)))
    for seed in orders:
        assert (found["exact"].deletion_area <= found[seed].deletion_area + 1e-12).all()
    assert (found["exact"].deletion_area < torch.stack([found[s].deletion_area for s in orders]).mean(0) - 0.01).all()
    opposite = curves(model, x, torch.zeros(8, dtype=torch.long), dict(a=-exact(x)))["a"]
    assert (opposite.deletion_area > found["exact"].deletion_area + 0.05).all()


def test_areas():
    found = Curves(torch.tensor([0, 0.5, 1]), torch.tensor([[1.0, 0, 0]]), torch.tensor([[0.2, 0.2, 1.0]]))
    torch.testing.assert_close(found.deletion_area, torch.tensor([0.25]))
    torch.testing.assert_close(found.insertion_area, torch.tensor([0.4]))


def test_progress_counts_to_one():
    seen = []
    x = picture(count=40)
    curves(Additive(), x, torch.zeros(40, dtype=torch.long), dict(a=x[:, 0], b=x[:, 1]), 99, seen.append)
    assert len(seen) > 4 and seen == sorted(seen) and seen[0] > 0 and seen[-1] == 1


def test_equal_cells_are_taken_row_by_row_and_cut_cells_count():
    places = faithfulness.ranks(torch.tensor([[[1.0, 2.0], [2.0, 0.0]]]))
    assert places.tolist() == [[[2, 0], [1, 3]]]
    cells = faithfulness.in_cells(torch.arange(15.0).view(1, 3, 5), (2, 2))
    assert cells.tolist() == [[[3, 5, 6.5], [10.5, 12.5, 14]]]
    assert faithfulness.over_pixels(cells, (2, 2), (3, 5))[0, :, -1].tolist() == [6.5, 6.5, 14]


def test_baselines():
    x = picture(count=2)
    center, edges = (BASELINES[name](x) for name in ("centre prior", "edge map"))
    assert center.shape == edges.shape == (2, 4, 6)
    assert center[0].flatten().topk(4).indices.sort().values.tolist() == [8, 9, 14, 15]
    torch.testing.assert_close(center, center.flip(1, 2))
    gray = x.mean(1).numpy()
    want = [np.hypot(*(sobel(image, axis, mode="nearest") for axis in (0, 1))) for image in gray]
    np.testing.assert_allclose(edges, want, atol=1e-12)
    assert faithfulness.random_map(x, 1).equal(faithfulness.random_map(x, 1))
    assert not faithfulness.random_map(x, 1).equal(faithfulness.random_map(x, 2))


def test_blur():
    x = torch.randn(1, 3, 24, 40, dtype=torch.float64)
    want = x.numpy()
    for axis in (2, 3):
        want = gaussian_filter1d(want, 3, axis, mode="nearest", radius=9)
    np.testing.assert_allclose(faithfulness.blurred(x), want, atol=1e-12)


def test_infidelity():
    """Zero for what an additive model adds up, in any unit; for another map, the residual of the best fit."""
    model, x, classes = Additive(), picture(), torch.tensor([0])
    for scale in (1, -20):
        assert infidelity(model, x, classes, scale * exact(x)).abs() < 1e-12
    other = torch.randn(1, 4, 6, dtype=torch.float64)
    removed = (torch.rand(32, 2, 3, generator=torch.Generator().manual_seed(0)) < 0.5).flatten(1).double().numpy()
    falls = removed @ exact(x)[0, ::2, ::2].flatten().numpy()
    explained = removed @ other[0].numpy().reshape(2, 2, 3, 2).mean((1, 3)).ravel()
    factor = (explained @ falls) / (explained @ explained)
    want = ((factor * explained - falls) ** 2).mean()
    assert want > 0.1
    np.testing.assert_allclose(infidelity(model, x, classes, other), [want], rtol=1e-6)


def test_sensitivity():
    """The largest change of a method that reads the first colour, by hand; a method that ignores the image has none."""
    model, x, classes = Additive(), picture(), torch.tensor([0])
    noise = 0.02 * (2 * torch.rand(10, 3, 4, 6, generator=torch.Generator().manual_seed(0)).double() - 1)
    want = noise[:, 0].flatten(1).norm(dim=1).max() / x[:, 0].norm()

    def first_color(model, images, classes):
        assert len(images) == len(classes)
        return images[:, 0]

    got = sensitivity(model, x, classes, first_color)
    torch.testing.assert_close(got.double(), want[None], rtol=1e-6, atol=0)
    assert sensitivity(model, x, classes, lambda model, images, classes: torch.ones(len(images), 4, 6)) == 0


def test_the_table_of_the_benchmark():
    """A shift of every image is found and named; noise is not; p is counted once for every test."""
    generator = np.random.default_rng(0)
    base, noise, shift = generator.random(40), generator.normal(0, 1e-3, 40), np.linspace(0.05, 0.15, 40)

    def row(name, deletion, insertion, **more):
        return Row(name, *(torch.from_numpy(v) for v in (deletion, insertion, base)), **more)

    rows = [
        row("random order", base, base, spread=(0.001, 0.002)),
        row("good", base - shift, base + shift, sensitivity=torch.tensor([0.25])),
        row("bad", base + shift, base - shift),
        row("none", base + noise, base - noise),
    ]
    lines = table(rows).splitlines()
    assert lines[2].startswith(f"| random order | {base.mean():.3f} ± 0.001 | {base.mean():.3f} ± 0.002 |")
    p = 6 * 2 * 0.5**40  # all 40 differences of one sign, in 6 tests
    assert lines[3].count("p < 1e-9: better") == lines[4].count("p < 1e-9: worse") == 2 and p < 1e-9
    assert lines[5].count("not significant") == 2 and lines[3].endswith("| 0.250 |") and lines[4].endswith("| - |")
    assert f"({-0.1:+.3f}, p" in lines[3]


def test_the_benchmark_measures_all_that_is_defined():
    model = make_vca_vit()
    images, notes = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)), []
    rows = measure(model, images, 4, 2, notes.append)
    assert [r.name for r in rows] == ["random order", *METHODS, *BASELINES]
    with torch.no_grad():
        classes = model(images).argmax(1)
    values = METHODS["occlusion"](model, images, classes)
    found = curves(model, images, classes, dict(a=values), 4)["a"]
    occluded = next(r for r in rows if r.name == "occlusion")
    torch.testing.assert_close(occluded.deletion, found.deletion_area.double())
    torch.testing.assert_close(occluded.insertion, found.insertion_area.double())
    assert all((r.sensitivity is not None) == (r.name in METHODS) for r in rows)
    orders = [curves(model, images, classes, dict(a=faithfulness.random_map(images, s)), 4)["a"] for s in range(3)]
    means = torch.stack([c.deletion_area.mean() for c in orders])
    np.testing.assert_allclose([rows[0].deletion.mean(), rows[0].spread[0]], [means.mean(), means.std()], rtol=1e-4)


# ---- Pixel flipping, and ROAD


def test_flipping_by_hand():
    model, x = Additive(), picture(count=2)
    attribution = exact(x)
    got = faithfulness.pixel_flipping(model, x, torch.tensor([0, 0]), attribution, steps=3, seed=4)
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    noise = low + (high - low) * torch.rand(x.shape, generator=torch.Generator().manual_seed(4)).double()
    ranking = faithfulness.ranks(attribution[:, ::2, ::2])
    for step, count in enumerate((0, 2, 4, 6)):
        flipped = (ranking < count).repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None]
        want = model(torch.where(flipped, noise, x))[:, 0]
        torch.testing.assert_close(got.logits[:, step], want)
    np.testing.assert_allclose(got.fractions, [0, 1 / 3, 2 / 3, 1])
    torch.testing.assert_close(got.aopc, (got.logits[:, :1] - got.logits).mean(1))


def test_removed_pixels_are_the_weighted_mean_of_their_neighbors(monkeypatch):
    monkeypatch.setattr(imputation, "NOISE", 0.0)
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, 7, 9, dtype=torch.float64, generator=generator)
    removed = torch.rand(7, 9, generator=generator) < 0.6
    found = imputation.impute(image, removed)
    assert torch.equal(found[:, ~removed], image[:, ~removed])
    weights = torch.tensor([[1, 2, 1], [2, 0, 2], [1, 2, 1]], dtype=torch.float64)[None, None] / 12
    sums = nn.functional.conv2d(found[:, None], weights, padding=1) / nn.functional.conv2d(
        torch.ones(1, 1, 7, 9, dtype=torch.float64), weights, padding=1
    )
    torch.testing.assert_close(found[:, removed], sums[:, 0][:, removed])
    plane = torch.arange(9.0).expand(1, 7, 9)  # what is linear is imputed exactly inside
    inside = torch.zeros(7, 9, dtype=torch.bool)
    inside[2:5, 3:6] = True
    torch.testing.assert_close(imputation.impute(plane, inside), plane)
    with pytest.raises(ValueError, match="all pixels are removed"):
        imputation.impute(plane, torch.ones(7, 9, dtype=torch.bool))


def test_the_noise_of_imputation_is_small_and_repeats():
    image, removed = torch.zeros(1, 40, 40), torch.ones(40, 40, dtype=torch.bool)
    removed[0] = False
    first = imputation.impute(image, removed, seed=1)
    assert torch.equal(first, imputation.impute(image, removed, seed=1))
    assert first[0, 1:].std() == pytest.approx(0.01, rel=0.1) and not first[0, 0].any()


def test_road_by_hand_and_for_a_faithful_map():
    model, x, classes = Additive(), picture(count=2), torch.tensor([0, 0])
    attribution = exact(x)
    got = faithfulness.road(model, x, classes, attribution, (0.5,), seed=2)
    order = attribution[:, ::2, ::2].flatten(1).argsort(descending=True)
    for image in range(2):
        for cells, column in ((order[image, :3], got.most_first), (order[image, 3:], got.least_first)):
            removed = torch.zeros(6, dtype=torch.bool)
            removed[cells] = True
            pixels = removed.view(2, 3).repeat_interleave(2, 0).repeat_interleave(2, 1)
            imputed = imputation.impute(x[image], pixels, 2)[None]
            assert column[image, 0] == pytest.approx(sigmoid(model(imputed)[0, 0].item()))
    assert (got.score > 0).all() and torch.equal(got.score, (got.least_first - got.most_first)[:, 0])
    reverse = faithfulness.road(model, x, classes, -attribution, (0.5,), seed=2)
    torch.testing.assert_close(reverse.score, -got.score)
    for fractions in ((0.0,), (1.0,), (0.01,)):
        with pytest.raises(ValueError, match="must remove some of the 6 cells"):
            faithfulness.road(model, x, classes, attribution, fractions)
