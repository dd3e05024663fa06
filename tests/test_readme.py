"""The examples of the README and of docs/ run as they stand there, and their tables are those of what was measured."""

import argparse
import re
from pathlib import Path

import matplotlib
import pytest
import yaml
from PIL import Image

import vca
from benchmarks import faithfulness
from scripts import evidence, speed
from tests.helpers.classifiers import PAPER
from training import compare
from training.evaluate import table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SPEED = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")


def examples(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S)


def run(page: Path) -> dict:
    """The names that the examples of a page leave, run one after another."""
    names = {}
    for example in examples(page):
        exec(compile(example, str(page), "exec"), names)
    return names


def rows_of(text: str) -> list[list[str]]:
    """The cells of every row of every table of a page."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_the_examples_of_the_readme_run(monkeypatch, tmp_path):
    matplotlib.use("Agg")
    for folder in ("app", "weights"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    names = run(ROOT / "README.md")
    assert names["y"].shape == (2, 197, 192)
    assert names["label"] == "ship"
    layer = names["maps"][3]
    assert layer.stage2.differential.shape == (1, 4, 64, 16) and layer.effective.shape == (1, 4, 64, 64)
    for file in ("overview.png", "head.png"):
        with Image.open(tmp_path / file) as picture:
            assert picture.width > 300
    assert all(type(block.attn) is vca.VisualContrastAttention for block in names["vit"].blocks)


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.stem)
def test_the_examples_of_docs_run(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    if "gradio_client" in page.read_text(encoding="utf-8"):  # needs a running app; tests/app/test_app.py drives one
        for example in examples(page):
            compile(example, str(page), "exec")
    else:
        run(page)


def test_the_endpoints_of_the_app_are_those_of_its_page():
    text = (ROOT / "docs" / "app.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\| `/(\w+)`", text, re.M))
    assert named == set(re.findall(r'api_name="(\w+)"', (ROOT / "app" / "api.py").read_text(encoding="utf-8")))
    assert set(re.findall(r'api_name="/(\w+)"', text)) <= named


def test_the_table_of_results_is_that_of_the_results_files():
    files = sorted(map(str, (ROOT / "weights").glob("*/results.json")))
    assert len(files) >= 3
    assert table(files) in README


def test_the_tables_of_evidence_are_those_of_the_published_logs():
    logs = evidence.read_logs()
    assert logs
    text = evidence.PAGE.read_text(encoding="utf-8")
    assert evidence.fill(text, evidence.sections(logs)) == text
    for name, log in logs.items():
        if "generators" in log:
            continue
        assert f"<!-- {name} -->\n{compare.table(log)}\n\n![" in text
        with Image.open(ROOT / "docs" / "evidence" / f"{name}.png") as curves:
            assert curves.width > 1000


def finals(log: str, metric: str) -> dict[str, list[float]]:
    """What the runs of each kind end with in a published log, one value a seed."""
    values = {}
    for run in evidence.read_logs()[log]["runs"]:
        values.setdefault(run["kind"], []).append(run[metric][-1][1])
    return values


def test_the_sentences_of_the_readme_on_evidence_are_those_of_its_page_and_its_log():
    _, _, text = README.partition("**Is it more than its convolution?** ")
    first, second = re.split(r"(?<=\.) ", " ".join(text.partition("([docs/evidence.md]")[0].split()))[:2]
    top, *_ = evidence.PAGE.read_text(encoding="utf-8").partition("\n## ")
    assert f"{first} {second}." in " ".join(top.split())
    top1 = finals("cifar10-5-epochs", "top1")
    mhsa, mhsa_dwc, ours = (sum(top1[kind]) / len(top1[kind]) for kind in ("mhsa", "mhsa_dwc", "vca"))
    assert round(mhsa_dwc - ours) == 4 and "four points ahead of VCA" in first
    assert round(ours - mhsa) == 2 and "VCA two points ahead of plain self-attention" in first
    assert len(top1["vca"]) == 3 and "three seeds" in second and mhsa_dwc - mhsa > ours - mhsa


def test_what_evidence_says_of_stand_ins_is_in_the_published_logs():
    names = [f"transfer-{question}" for question in ("kinds", "parts", "softmax", "pooling")]
    errors = {name: finals(name, "error") for name in names}

    def percent(name: str, kind: str, of: str) -> str:
        """How much the error of one kind is above that of another, over three seeds."""
        one, other = errors[name][kind], errors[name][of]
        assert len(one) == len(other) == 3
        return f"{abs(100 * (sum(one) / sum(other) - 1)):.0f} %"

    words = " ".join(evidence.PAGE.read_text(encoding="utf-8").split())
    agent = f"Agent attention is left with {percent('transfer-kinds', 'agent', 'vca')} less error"
    assert agent in words and f"{agent} than VCA." in " ".join(README.split())
    embeddings, plain = (percent("transfer-parts", f"vca:{kind}", "vca") for kind in ("tokens=emb", "dwc=false"))
    assert f"Embeddings alone are worse ({embeddings}); without the convolution, too ({plain})" in words
    joint = percent("transfer-softmax", "vca", "vca:stage2_softmax=joint")
    assert f"Two softmaxes are better, with every seed, by {joint} of the error" in words
    assert all(
        map(float.__lt__, errors["transfer-softmax"]["vca"], errors["transfer-softmax"]["vca:stage2_softmax=joint"])
    )
    assert all(map(float.__lt__, errors["transfer-kinds"]["agent"], errors["transfer-kinds"]["vca"]))
    learned = percent("transfer-pooling", "vca:pooling=learned", "vca")
    assert f"Learned pooling is better, with every seed, by {learned} of the error" in words
    assert all(map(float.__lt__, errors["transfer-pooling"]["vca:pooling=learned"], errors["transfer-pooling"]["vca"]))


SCOPES = {
    "between the projections": ("core", "forward"),
    "the layer": ("layer", "forward"),
    "the layer, forward and backward": ("layer", "train"),
    "between the projections, forward and backward": ("core", "train"),
}


def measured(*head: str) -> dict[tuple[str, ...], dict[str, str]]:
    """What the tables of docs/speed.md with these columns after `patches` say, by scope, step, type and patches."""
    names, found = [], {}
    for row in rows_of(SPEED):
        if row[:4] == ["scope", "step", "type", "patches"]:
            names = row[4:]
        elif row[0] in {"core", "layer", "deit_tiny_patch16_224"} and names == [*head, "peak MB, same order"]:
            found[tuple(row[:4])] = {name: cell.removesuffix("x") for name, cell in zip(names, row[4:], strict=True)}
    return found


EVERY_KIND = measured("mhsa (ms)", "vca_fused", "vca", "agent", "diff", "mhsa_dwc")


def test_the_speeds_of_the_readme_are_those_measured():
    (head,) = (row for row in rows_of(README) if row[0].startswith("patches"))
    patches = [cell.split()[0] for cell in head[1:]]
    shown = {row[0]: row[1:] for row in rows_of(README) if row[0] in SCOPES}
    assert shown.keys() == SCOPES.keys()
    for name, (scope, step) in SCOPES.items():
        assert shown[name] == [EVERY_KIND[scope, step, "float32", n]["vca_fused"] for n in patches], name
    times = [EVERY_KIND["deit_tiny_patch16_224", "forward", "float32", n]["vca_fused"] for n in ("196", "784")]
    assert "runs at {} times the speed of its baseline at 224 px, and at {} times".format(*times) in " ".join(
        README.split()
    )


def test_the_first_table_of_speeds_is_that_measured():
    deit = measured("mhsa (ms)", "vca_fused", "vca_fused_compiled")
    photo = {row[0].split()[0]: row[3] for row in rows_of(SPEED) if len(row) == 4 and row[0].endswith("px)")}
    half = measured("mhsa (ms)", "vca_fused", "vca", "agent")
    photo_in_half = {
        row[0].split()[0]: row[4] for row in rows_of(SPEED) if row[0].endswith("px)") and row[1] == "bfloat16"
    }
    shown = [row for row in rows_of(SPEED) if len(row) == 6 and row[1].endswith(" px")]
    assert [row[2] for row in shown] == ["196", "784"] * 2 + ["256", "576", "1369"]
    for name, _, patches, *cells in shown:
        if name.startswith("DeiT"):
            model, step = "deit_tiny_patch16_224", "train" if "training" in name else "forward"
            row = deit[model, step, "float32", patches]
            in_half = half[model, step, "bfloat16", patches]["vca_fused"]
            assert cells == [row["vca_fused"], row["vca_fused_compiled"], in_half], (name, patches)
        else:
            assert cells == [photo[patches], "-", photo_in_half[patches]], patches


def test_what_the_kernels_have_gained_is_that_measured():
    parts = {"between the projections": "core", "a layer": "layer", "DeiT-Tiny": "deit_tiny_patch16_224"}
    shown = [row for row in rows_of(SPEED) if len(row) == 6 and row[0].split(",")[0] in parts and row[1].isdigit()]
    assert len(shown) == 9
    for name, patches, *_, now in shown:
        part, _, backward = name.partition(",")
        row = EVERY_KIND[parts[part], "train" if backward else "forward", "float32", patches]
        assert now == row["vca_fused"], (name, patches)


def test_the_growth_of_49_tokens_is_that_measured():
    shown = [row for row in rows_of(SPEED) if len(row) == 5 and row[0].isdigit()]
    assert [row[0] for row in shown] == ["64", "196", "400", "784", "1764", "4096"]
    for patches, core, _, layer, _ in shown:
        expected = [EVERY_KIND[scope, "forward", "float32", patches]["vca_fused"] for scope in ("core", "layer")]
        assert [core, layer] == expected, patches


def test_the_plot_of_speeds_shows_what_the_tables_say(tmp_path):
    shown = speed.curves(SPEED, "layer")
    assert shown.keys() == {"vca", "vca_fused", "agent"}
    for name, points in shown.items():
        rows = {int(key[3]): float(row[name]) for key, row in EVERY_KIND.items() if key[:2] == ("layer", "forward")}
        assert points == rows, name
    speed.draw(SPEED, tmp_path / "speed.png")
    with Image.open(tmp_path / "speed.png") as drawn, Image.open(ROOT / "docs" / "speed.png") as published:
        assert drawn.size == published.size


def test_the_protocol_of_faithfulness_is_what_its_command_writes(monkeypatch):
    text = (ROOT / "docs" / "faithfulness.md").read_text(encoding="utf-8")
    measured = re.search(r"^\| attribution.*?\|\n(?=\n)", text, re.M | re.S)[0].rstrip("\n")
    monkeypatch.setattr(faithfulness, "table", lambda rows: measured)
    given = argparse.Namespace(checkpoint="vca_vit_pico_patch4_32_cifar10", count=200, measured=20, steps=8)
    assert faithfulness.page(given, [], (4, 4), 64) == text


def test_the_sizes_of_models_are_those_tested():
    rows = rows_of((ROOT / "docs" / "models.md").read_text(encoding="utf-8"))
    shown = {row[0].strip("`"): row[1:3] for row in rows if row[0].strip("`") in PAPER}
    assert shown.keys() == PAPER.keys()
    for name, (parameters, gmacs) in PAPER.items():
        assert shown[name][0] == f"{parameters:,}" and float(shown[name][1]) == pytest.approx(gmacs, abs=1.5e-4)


def test_the_citation_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == vca.__version__
    paper = citation["preferred-citation"]
    (entry,) = re.findall(r"```bibtex\n(.*?)```", README, re.S)
    entry = " ".join(entry.split())
    assert f"{{{paper['title']}}}" in entry and f"{{{paper['year']}}}" in entry
    assert " and ".join(f"{a['family-names']}, {a['given-names']}" for a in paper["authors"]) in entry


def test_a_mark_without_an_end_is_refused():
    with pytest.raises(ValueError, match="a mark has no <!-- end -->"):
        evidence.fill("<!-- a -->\n", {})


def test_a_table_takes_the_place_of_the_old_one_and_without_a_log_the_page_says_so(monkeypatch):
    monkeypatch.setattr(evidence, "table", str.upper)
    page = "words\n<!-- a -->\nold\n\nold\n<!-- end -->\nmore\n<!-- b -->\n<!-- end -->\n"
    curves = "![The curves of every run](evidence/a.png)"
    filled = f"words\n<!-- a -->\nLOG\n\n{curves}\n<!-- end -->\nmore\n<!-- b -->\n{evidence.NOT_RUN}\n<!-- end -->\n"
    sections = {"a": evidence.section("a", "log")}
    assert evidence.fill(page, sections) == filled
    assert evidence.fill(filled, sections) == filled
