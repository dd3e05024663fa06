"""What was measured of generators, from their checkpoints to the page of evidence."""

import copy
import json
import sys

import pytest

from scripts import evidence
from vca.checkpoint import write_config
from vca.config import read_config

SHIPPED = evidence.FOLDER.parents[1] / "weights" / "vca_sit_xs_2_scenes"


@pytest.fixture
def page(tmp_path, monkeypatch):
    """An empty page with marks."""
    monkeypatch.setattr(evidence, "FOLDER", tmp_path / "evidence")
    monkeypatch.setattr(evidence, "PAGE", tmp_path / "evidence.md")
    evidence.FOLDER.mkdir()
    evidence.PAGE.write_text("<!-- steps -->\n<!-- end -->\n\n<!-- twins -->\n<!-- end -->\n")
    return evidence.PAGE


def publish(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["evidence", "--publish", *map(str, words)])
    evidence.main()


def measured(folder, architecture, steps, distances):
    """A config of a generator with a Fréchet distance at each guidance scale."""
    config = copy.deepcopy(read_config(SHIPPED))
    run = config["training"][-1]
    row = run["results"]["quality"]["guidance"][0]
    rows = [dict(row, guidance=scale, frechet_distance=distance) for scale, distance in distances.items()]
    run["results"]["quality"]["guidance"] = rows
    run["steps"], config["architecture"] = steps, architecture
    folder.mkdir()
    write_config(folder, config)
    return folder


def test_the_same_generator_at_several_steps_has_a_curve(page, monkeypatch, tmp_path):
    late = measured(tmp_path / "late", "vca_sit_xs_2", 2000, {1: 40.0, 4: 30.0})
    early = measured(tmp_path / "early", "vca_sit_xs_2", 1000, {1: 70.0})
    publish(monkeypatch, "steps", late, early)
    log = json.loads((evidence.FOLDER / "steps.json").read_text())
    (name, points), *others = evidence.curves_of(log).items()
    assert name == "vca_sit_xs_2, guidance 1" and not others
    assert [(steps, row["frechet_distance"]) for steps, row in points] == [(1000, 70.0), (2000, 40.0)]
    table, picture = page.read_text().split("<!-- end -->")[0].split("\n\n")
    assert "| `late` | 2,000 |" in table and "| `early` | 1,000 |" in table
    assert picture.strip() == "![Quality against steps](evidence/steps.png)"
    assert (evidence.FOLDER / "steps.png").stat().st_size > 5000


def test_twins_have_a_table_alone(page, monkeypatch, tmp_path):
    twins = [measured(tmp_path / name, name, 1000, {4: 30.0}) for name in ("vca_sit_xs_2", "sit_xs_2")]
    publish(monkeypatch, "twins", *twins)
    text = page.read_text()
    assert "| `sit_xs_2` | 1,000 |" in text and "![" not in text and evidence.NOT_RUN in text
    assert [file.name for file in evidence.FOLDER.iterdir()] == ["twins.json"]
