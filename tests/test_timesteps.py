"""The numbers of attention by timestep on maps whose answer is known, and the picture of a small generator."""

import pytest
import torch

import vca
from scripts import timesteps


def test_reach_is_the_mean_distance_weighted_by_size():
    assert timesteps.reach(torch.eye(6), (2, 3)) == 0
    assert timesteps.reach(torch.ones(2, 6, 6), (2, 3)) == pytest.approx(float(timesteps.distances((2, 3)).mean()))
    far = torch.zeros(6, 6)
    far[0, 5] = -3.0  # from one corner of the grid to the other
    assert timesteps.reach(far, (2, 3)) == pytest.approx(5**0.5)


def test_what_is_pushed_away_is_the_negative_share():
    assert timesteps.pushed_away(torch.ones(4, 4)) == 0
    assert timesteps.pushed_away(torch.tensor([[3.0, -1.0], [0.0, 0.0]])) == 0.25


def test_the_picture_and_the_numbers_of_a_generator(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    model = vca.create_model("vca_sit_xs_4", input_size=8, dim=20, depth=2, num_classes=3).eval()
    vca.save(model, tmp_path / "model", label_names=["a", "b", "c"])
    monkeypatch.setattr(timesteps, "STEPS", 10)
    monkeypatch.setattr(timesteps, "SHOWN", (0, 9))
    monkeypatch.setattr("sys.argv", ["timesteps", str(tmp_path / "model"), "--out", str(tmp_path / "out.png")])
    timesteps.main()
    assert (tmp_path / "out.png").stat().st_size > 10_000
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all(len(line.partition(": ")[2].split()) == 10 for line in lines)
