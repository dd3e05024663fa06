"""Images to train a generator on, and a finished run."""

import re

import pytest

from tests.helpers.generator_runs import command, write_images
from tests.helpers.runs import run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_images(root, "train", 20, seed=0)
    write_images(root, "val", 5, seed=1)
    return root


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A run folder of an undisturbed run."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    result = run(command(data, out))
    assert result.returncode == 0, result.stderr
    assert re.search(r"whole/checkpoint: validation loss \d\.\d+ on 15 samples", result.stdout)
    return out
