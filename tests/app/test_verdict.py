"""The sentence under the curves of faithfulness."""

import pytest
import torch

from app.tabs.attribution import ORDERS, RANDOM, speaks_of_class, verdict
from vca.attribution import METHODS
from vca.faithfulness import BASELINES, Curves

BETTER = "Better than a random order by"
LINE = torch.linspace(0, 1, 5)


def curves(deletion: float, insertion: float, start: float = 0.9) -> Curves:
    """Curves that are straight but for their areas."""
    down = torch.cat([torch.tensor([start]), torch.full((4,), deletion)])[None]
    return Curves(LINE, down, torch.full((1, 5), insertion))


def found(method: Curves, prior: Curves) -> dict[str, Curves]:
    orders = {f"{RANDOM} {i}": curves(0.5 + 0.01 * i, 0.5 + 0.01 * i) for i in range(ORDERS)}
    return dict(map=method) | orders | dict.fromkeys(BASELINES, prior)


@pytest.mark.parametrize(
    "method, prior, beginning, end",
    [
        (curves(0.1, 0.9), curves(0.5, 0.5), f"{BETTER} both curves", "relies on what is marked."),
        (curves(0.1, 0.4), curves(0.5, 0.3), f"{BETTER} deletion alone", "is marked."),
        (curves(0.1, 0.9), curves(0.1, 0.5), f"{BETTER} both curves", "as well or better by a curve."),
        (curves(0.6, 0.4), curves(0.5, 0.5), "No better than a random order", "than on the rest."),
        (curves(0.0, 0.0, start=0.001), curves(0.5, 0.5), "The model gives this class 0.1%", "nothing of it."),
    ],
)  # fmt: skip
def test_verdicts(method, prior, beginning, end):
    said = verdict("map", found(method, prior))
    assert said.startswith(beginning) and said.endswith(end)


def test_a_prior_that_does_as_well_is_named():
    said = verdict("map", found(curves(0.1, 0.9), curves(0.05, 0.5)))
    assert "the centre prior and the edge map, which know nothing of the model, do as well" in said


def test_attention_is_no_evidence_for_a_class():
    assert {name for name in METHODS if not speaks_of_class(name)} == {"effective-map rollout"}
    assert not speaks_of_class("block 2, head 1")
