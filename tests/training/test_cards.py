"""The cards of the checkpoints that ship: what `training.card` writes today, and numbers that can be measured again."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from training.card import card_text, write_table
from training.data.images import Images
from vca.checkpoint import read_config, sha256, write_config

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


def test_a_classifiers_card_has_what_was_measured_by_source_and_size_and_how_it_began(checkpoints, tmp_path):
    folder = tmp_path / "weights" / "photo"
    shutil.copytree(checkpoints["classifier"], folder)
    config = json.loads((folder / "config.json").read_text())
    run = config["training"][-1]
    recipe = dict(model="vca_vit_pico_patch4_32", seed=0, origin="The teacher is old.", stored_as="fp16")
    errors = dict(error=0.055, error_112=0.023, error_224=0.055, by_block=[0.1, 0.01])
    transfer = dict(run, recipe=recipe, teacher="timm:vit", init=None, results=errors, command="transferred")
    rejection = dict(score="energy", threshold=1.5, auroc=0.875, known_kept=0.95, unknown_caught=0.5,
                     unknown_images=70, unknown="streets")  # fmt: skip
    run["results"]["calibration"] = dict(temperature=1.25, fitted_on=50, measured_on=60, error=0.021,
                                         error_before=0.1, bins=15, rejection=rejection)  # fmt: skip
    begun = dict(init="runs/transfer/checkpoint", teacher="lite")
    write_config(folder, config | dict(training=[transfer, run | begun]))
    row = dict(top1=80.0, top5=95.0, loss=0.5, images=100, top1_interval=[71.1, 86.7])
    measured = dict(results=dict(val=row, other_sources=row | dict(top1=60.0)), precision="bf16",
                    by_size={"32": row, "64": row | dict(top1=70.0)}, architecture="mhsa_vit_tiny")  # fmt: skip
    (folder / "results.json").write_text(json.dumps(measured))
    assert "contrast tokens, on 100" not in card_text(folder) and "sizes on 100" in card_text(folder)
    (folder / "results.json").write_text(json.dumps(measured | dict(architecture="vca_vit_pico_patch4_32")))
    text = " ".join(card_text(folder).split())
    for said in (
        "**Top-1 80.00 %** on 100 images",
        "bfloat16; one view",
        "| 60.00 % (71.10-86.70) | 95.00 % |",
        "sizes, with as many contrast tokens, on 100 of the validation images (bf16):",
        "| 32 px | 64 px |",
        "| 80.0 % | 70.0 % |",
        "temperature 1.250",
        "AUROC of 0.875",
        "is 0.021 (0.100 before",
        "attention transfer from `timm:vit`",
        "mean relative error 0.023 at 112 px, 0.055 at 224 px",
        "The teacher is old.",
        "with the teacher `lite`",
    ):
        assert said in text, said
