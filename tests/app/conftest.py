"""Forward passes of generators."""

import time

import pytest

from tests.helpers.generate_tab import Calls
from vca.models.dit import DiffusionTransformer


@pytest.fixture
def forwards(monkeypatch) -> Calls:
    """The forward passes from now on."""
    calls, running, forward = Calls(), [0], DiffusionTransformer.forward

    def slow(self, x, t, y):
        running[0] += 1
        calls.append(dict(x=x, t=t, y=y, running=running[0]))
        try:
            time.sleep(calls.delay)
            return forward(self, x, t, y)
        finally:
            running[0] -= 1

    monkeypatch.setattr(DiffusionTransformer, "forward", slow)
    return calls
