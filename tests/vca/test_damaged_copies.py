"""Damaged copies of a checkpoint are refused, or answer as the checkpoint does: nothing in between."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch

import vca
from app.runtime import loading
from tests.helpers.checkpoints import images

COPIES = 20  # in each test
VALUES = [
    None, True, False, 0, 1, -1, 3, 0.5, 2.5, 1e300, -1e300, float("nan"), float("inf"), 10**12, "", "x", "bicubic", [],
    {}, [[]], [0], [None], [0.5] * 3, [[0.5] * 3], {"x": 1}, "mhsa", "joint", [1, 1], [3, 32, 32],
]  # fmt: skip


def flip_bits(folder: Path, draw: random.Random) -> None:
    file = folder / draw.choice(["config.json", "model.safetensors"])
    content = bytearray(file.read_bytes())
    for _ in range(draw.choice([1, 1, 1, 2, 10])):
        place = draw.choice([draw.randrange(len(content)), draw.randrange(min(len(content), 3000))])
        content[place] ^= 1 << draw.randrange(8)
    file.write_bytes(content)


def truncate(folder: Path, draw: random.Random) -> None:
    file = folder / draw.choice(["config.json", "model.safetensors"])
    content = file.read_bytes()
    file.write_bytes(content[: draw.randrange(len(content))] + draw.choice([b"", b"", bytes(9)]))


def change_a_field(folder: Path, draw: random.Random) -> None:
    config = json.loads((folder / "config.json").read_text())
    places = []

    def walk(value) -> None:
        for key in value if isinstance(value, dict) else range(len(value)):
            places.append((value, key))
            if isinstance(value[key], dict | list):
                walk(value[key])

    walk(config)
    value, key = draw.choice(places)
    if draw.random() < 0.2:
        del value[key]
    elif draw.random() < 0.2 and isinstance(value[key], list):
        draw.shuffle(value[key])
    else:
        value[key] = draw.choice(VALUES)
    (folder / "config.json").write_text(json.dumps(config))


def mix_up(folder: Path, draw: random.Random) -> None:
    """A file of another checkpoint with the same shapes."""
    shutil.copy(folder.parent / "other" / draw.choice(["config.json", "model.safetensors"]), folder)


def answer(model: torch.nn.Module) -> tuple:
    with torch.no_grad():
        fields = ("mean", "std", "interpolation", "crop_pct", "crop_mode", "input_size")
        return model(images()).tolist(), model.label_names, [model.pretrained_cfg.get(field) for field in fields]


@pytest.mark.parametrize("seed", [*range(3), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(3, 25))])
def test_damaged_copies_are_refused_or_answer_the_same(saved, tmp_path, seed):
    draw, expected, refused = random.Random(seed), answer(vca.load(saved)), 0
    other = vca.load(saved)
    with torch.no_grad():
        other.head.bias.add_(1)
    vca.save(other, tmp_path / "other", label_names=other.label_names[::-1])
    for number in range(COPIES):
        folder = Path(shutil.copytree(saved, tmp_path / str(number)))
        draw.choice([flip_bits, flip_bits, truncate, change_a_field, change_a_field, mix_up])(folder, draw)
        for load in (vca.load, lambda folder: loading.open_folder(folder, "upload")):
            try:
                assert answer(load(folder)) == expected
            except vca.CheckpointError as error:
                assert len(str(error)) < 2000
                refused += 1
    assert refused > COPIES
