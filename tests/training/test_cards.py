"""The cards of the checkpoints that ship: what `training.card` writes today, and numbers that can be measured again."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from training.card import card_text, write_table
from training.data.images import Images
from vca.checkpoint import read_config, sha256

ROOT = Path(__file__).parents[2]
SHIPPED = sorted(file.parent for file in (ROOT / "weights").glob("*/config.json"))
NUMBER = r"-?\d+(?:\.\d+)?"


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda folder: folder.name)
def test_a_shipped_card_is_what_the_command_writes(folder):
    assert (folder / "README.md").read_text(encoding="utf-8") == card_text(folder)
    assert read_config(folder)["weights_sha256"] == sha256(folder / "model.safetensors")
    assert read_config(folder)["weights_sha256"] in card_text(folder)
    assert sum(file.suffix == ".png" for file in folder.iterdir()) > 0, "a card has a picture"
    for picture in re.findall(r"!\[.*\]\((.*)\)", card_text(folder)):
        assert (folder / picture).is_file(), picture


def test_the_table_of_shipped_checkpoints_is_up_to_date(tmp_path):
    for folder in SHIPPED:
        (tmp_path / folder.name).mkdir()
        for name in ("config.json", "model.safetensors"):
            (tmp_path / folder.name / name).symlink_to(folder / name)
    write_table(tmp_path)
    assert (ROOT / "weights" / "README.md").read_text() == (tmp_path / "README.md").read_text()


@pytest.mark.long
@pytest.mark.parametrize("folder", SHIPPED, ids=lambda folder: folder.name)
def test_the_numbers_on_a_shipped_card_are_those_that_evaluation_prints(folder, tmp_path):
    """VCA_DATA names folders of images, each with train/ and val/, separated by colons; by its classes one fits."""
    places = [place for place in os.environ.get("VCA_DATA", "").split(os.pathsep) if place]
    names = read_config(folder)["label_names"]
    data = next((place for place in places if Images(place, "val").class_names == names), None)
    if data is None:
        pytest.skip(f"VCA_DATA names no folder with the classes of {folder.name}")
    command = [sys.executable, "-m", "training.evaluate", folder, "--data", data, "--out", tmp_path / "results.json"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert printed.returncode == 0, printed.stderr
    assert printed.stdout.splitlines()[0] == expected_line(folder)


def expected_line(folder: Path) -> str:
    """What `training.evaluate` must print, from the card alone."""
    card = ModelCard.load(folder / "README.md")
    _, evaluations = model_index_to_eval_results(card.data.to_dict()["model-index"])
    measured = {evaluation.metric_name: evaluation.metric_value for evaluation in evaluations}
    if "top-1" not in measured:
        loss, images = re.search(rf"Validation loss ({NUMBER}) on ([\d,]+) images", card.text).groups()
        assert float(loss) == round(measured["validation loss"], 4)
        return f"validation loss {loss}  ({images.replace(',', '')} images)"
    top1, top5, images, loss = re.search(
        rf"\*\*Top-1 ({NUMBER}) %, top-5 ({NUMBER}) %\*\* on ([\d,]+) images.*\n.*cross-entropy ({NUMBER})", card.text
    ).groups()
    assert (float(top1), float(top5)) == (measured["top-1"], measured["top-5"])
    return f"top-1 {top1} %  top-5 {top5} %  loss {loss}  ({images.replace(',', '')} images)"
