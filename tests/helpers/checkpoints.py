"""Small models to save, and folders to damage."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import vca
from tests.helpers.runs import PATIENCE
from vca import CheckpointError
from vca.checkpoint import load_weights

TINY = dict(dim=16, depth=2, num_heads=2, input_size=8, in_channels=3, vae=None, num_classes=3)


def tiny(name="vca_sit_xs_2", **overrides):
    """A small generator whose every learned parameter differs from its initial value: adaLN-Zero starts at zero."""
    model = vca.create_model(name, **(TINY | overrides)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


NAME = "vca_vit_pico_patch4_32"


SMALL = dict(embed_dim=16, depth=2, num_heads=2, num_classes=3, token_grid=(3, 5))


LABELS = ["cat", "dog", "größe, with a comma"]


def make_model(name=NAME, **overrides):
    """A model whose every parameter differs from what creating it again would give."""
    model = vca.create_model(name, **(SMALL | overrides)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def images(size=32):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def edit_config(folder: Path, change: Callable[[dict], None]) -> None:
    """Changes a config as a person does who means it: without the checksum of what it was."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config.pop("config_sha256", None)
    change(config)
    file.write_text(json.dumps(config), encoding="utf-8")


def edit_weights(folder: Path, change: Callable[[dict], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def put(key: str, value) -> Callable[[dict], None]:
    return lambda config: config.__setitem__(key, value)


def remove(key: str) -> Callable[[dict], None]:
    return lambda config: config.pop(key)


def assert_refused(folder: Path, file: str, message: str, load_weights_too: bool = True) -> None:
    """`vca.load` names the file in full and says what is wrong; so does `load_weights`, if the weights are at fault."""
    with pytest.raises(CheckpointError, match=message) as caught:
        vca.load(folder)
    assert str(folder / file) in str(caught.value)
    if file == "model.safetensors" and load_weights_too:
        model = make_model()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(CheckpointError, match=message):
            load_weights(model, folder / file)
        after = model.state_dict()
        assert all(torch.equal(after[key], before[key]) for key in before), "a failed load has changed the model"


KEY = "blocks.1.attn.stage2.lambda_k1"


def read(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def fresh_process(program: str, *arguments, **environment) -> subprocess.CompletedProcess:
    """Runs a few lines of Python in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip


def assert_same_outputs(model, other) -> None:
    with torch.no_grad():
        assert torch.equal(model(images()), other(images()))


def pair(number: int):
    """A model and its labels, of which both say the number 1 or 2."""
    model = vca.create_model(NAME, **SMALL)
    with torch.no_grad():
        model.head.bias.fill_(number)
    return model, [f"{label} {number}" for label in LABELS]
