"""A checkpoint folder."""

import shutil
from pathlib import Path

import pytest

import vca
from tests.helpers.checkpoints import LABELS, make_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "checkpoint"
    vca.save(make_model(), folder, label_names=LABELS)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A checkpoint of one's own to damage."""
    return Path(shutil.copytree(saved, tmp_path / "checkpoint"))
