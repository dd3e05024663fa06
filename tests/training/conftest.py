"""Images to train on, and trained checkpoints."""

import signal
from pathlib import Path

import pytest
from PIL import Image

from tests.helpers.checkpoints import (
    assert_same_outputs,  # noqa: F401
    fresh_process,  # noqa: F401
    make_model,
    read,  # noqa: F401
    tiny,
)
from tests.helpers.published import checkpoint
from tests.helpers.runs import write_images
from training.core import classifier_recipe, generator_recipe
from training.core.recipe import read as read_recipe


@pytest.fixture(autouse=True)
def handlers():
    """A run in this process sets handlers of signals; the tests' own come back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """A classifier and a generator, trained by the word of their configs."""
    folder = tmp_path_factory.mktemp("weights")
    recipe = read_recipe("cifar10_vca", classifier_recipe.ClassifierRecipe, {})
    checkpoint(folder / "classifier", make_model(), recipe, dict(top1=71.25, top5=98.5, loss=0.9, images=10000))
    Image.new("RGB", (8, 8)).save(folder / "samples.png")
    (folder / "generator").mkdir()
    (folder / "samples.png").rename(folder / "generator" / "samples.png")
    recipe = read_recipe("cifar10_sit_vca", generator_recipe.GeneratorRecipe, {})
    checkpoint(folder / "generator", tiny(), recipe, dict(val_loss=0.1875, images=10000))
    return {name: folder / name for name in ("classifier", "generator")}


@pytest.fixture
def owner(hub, monkeypatch):
    """The Hub, and a login to it."""
    monkeypatch.setenv("HF_TOKEN", "hf_owner")
    return hub


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_images(root, "train", 50, seed=0)
    write_images(root, "val", 10, seed=1)
    return root
