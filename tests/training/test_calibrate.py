"""Temperature, calibration error and the rejection of other classes, against their definitions."""

import pytest
import torch

import vca
from training import calibrate as C


def overconfident(factor, count=20000, classes=5, seed=0):
    """Logits whose softmax gives the labels' true frequencies when divided by `factor`."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(count, classes, generator=generator)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    return factor * logits, labels


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_the_temperature_is_the_factor_by_which_logits_are_too_large(factor):
    logits, labels = overconfident(factor)
    assert C.fit_temperature(logits, labels) == pytest.approx(factor, rel=0.05)
    assert C.calibration_error(logits / factor, labels) < 0.01
    if factor != 1:
        assert C.calibration_error(logits, labels) > 0.05


def test_the_calibration_error_is_the_weighted_gap_of_the_bins():
    probabilities = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.9, 0.1], [0.6, 0.4]])
    labels = torch.tensor([0, 0, 1, 0])
    expected = (abs(2 - 2.7) + abs(1 - 0.6)) / 4
    assert C.calibration_error(probabilities.log(), labels) == pytest.approx(expected, abs=1e-6)


def test_auroc_counts_pairs_and_halves_ties():
    known, unknown = torch.tensor([3.0, 1.0, 2.0]), torch.tensor([2.0, 0.0])
    pairs = [(1.0 if k > u else 0.5 if k == u else 0.0) for k in known for u in unknown]
    assert C.auroc(known, unknown) == pytest.approx(sum(pairs) / 6)


def test_the_threshold_keeps_19_of_20_known_images():
    torch.manual_seed(0)
    known, unknown = torch.randn(2000, 4) * 4, torch.randn(500, 4) * 0.1
    found = C.rejection(known, unknown)
    kept = (C.SCORES[found["score"]](known) >= found["threshold"]).float().mean()
    assert kept == pytest.approx(0.95, abs=0.002)
    assert found["auroc"] == max(found["auroc_of_scores"].values())


def test_folding_divides_the_logits():
    model = vca.create_model("vca_vit_pico_patch4_32", num_classes=3).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before = model(images)
        C.fold_temperature(model, 2.5)
        torch.testing.assert_close(model(images), before / 2.5)
