"""The path of attention is decided before a run's first step, and kept when the run is resumed."""

import pytest
import torch

import vca
from training.core.attention_path import settle_attention
from training.core.distributed import World
from vca import fused

CPU = torch.device("cpu")
LAYER = dict(grid_size=(4, 4), token_grid=(2, 2))


class Others(World):
    """Two processes, of which the other one has no kernels."""

    def sum(self, values, device):
        return values


@pytest.fixture
def asked(monkeypatch):
    """What `vca.fused.settle` is asked, in turn; every process has its kernels compiled."""
    asked = []

    def settle(use: bool = True) -> bool:
        asked.append(use)
        return use

    monkeypatch.setattr(fused, "settle", settle)
    monkeypatch.setattr(fused, "must_compile", lambda: True)
    return asked


def test_a_new_run_takes_the_kernels_and_says_so(asked, capsys):
    assert settle_attention(vca.VisualContrastAttention(32, 2, **LAYER), device=CPU)
    printed = capsys.readouterr().err.splitlines()
    assert asked == [True] and "are compiled, once on this machine" in printed[0]
    assert printed[1:] == [f"attention: {fused.status()}"]


@pytest.mark.parametrize("options", [dict(before=False), dict(wins=False), dict(device=torch.device("meta"))], ids=str)
def test_other_runs_stay_plain(asked, options, capsys):
    layer = vca.VisualContrastAttention(32, 2, **LAYER)
    assert not settle_attention(layer, **dict(device=CPU) | options) and asked == [False]
    assert "compiled, once" not in capsys.readouterr().err


def test_nothing_is_compiled_for_a_model_that_has_no_use_for_it(asked, capsys):
    joint = vca.VisualContrastAttention(32, 2, stage2_softmax="joint", **LAYER)
    assert not settle_attention(joint, torch.nn.Linear(2, 2), device=CPU)
    assert not settle_attention(torch.nn.Linear(2, 2), device=CPU)
    assert asked == [False, False] and capsys.readouterr().err.count("\n") == 1


def test_processes_take_one_path_and_a_changed_one_is_told(asked, capsys):
    layer = vca.VisualContrastAttention(32, 2, **LAYER)
    assert not settle_attention(layer, device=CPU, before=True, world=Others(0, 2))
    assert asked == [True, False] and "differ by rounding" in capsys.readouterr().err
