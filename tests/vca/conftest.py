"""A checkpoint folder, and memory that holds NaN."""

import shutil
from pathlib import Path

import pytest
import torch

import vca
from tests.helpers.checkpoints import LABELS, make_model
from tests.helpers.kernels import DEVICE


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "checkpoint"
    vca.save(make_model(), folder, label_names=LABELS)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A checkpoint of one's own to damage."""
    return Path(shutil.copytree(saved, tmp_path / "checkpoint"))


@pytest.fixture
def every_new_tensor_holds_nan():
    """Until it is written to: what a kernel leaves out is then seen."""
    torch.use_deterministic_algorithms(True, warn_only=DEVICE != "cpu")
    assert torch.empty(3, device=DEVICE).isnan().all() and torch.ones(1, device=DEVICE).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
