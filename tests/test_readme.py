"""The examples of the README run as they stand there."""

import re
from pathlib import Path

import matplotlib
import pytest

from scripts import evidence
from training import compare
from training.evaluate import table

ROOT = Path(__file__).parent.parent


def test_the_python_examples_run(monkeypatch):
    matplotlib.use("Agg")
    monkeypatch.chdir(ROOT)
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    names = {}
    for example in examples:
        if "gradio_client" not in example:  # needs a running app; tests/app/test_app.py drives one
            exec(example, names)
    assert names["y"].shape == (2, 197, 192)
    assert names["model"].label_names[3] == "cat"


def test_the_table_of_results_is_that_of_the_results_files():
    files = sorted(map(str, (ROOT / "weights").glob("*/results.json")))
    assert len(files) >= 3
    assert table(files) in (ROOT / "README.md").read_text()


def test_the_tables_of_evidence_are_those_of_the_published_logs():
    tables = {name: compare.table(log) for name, log in evidence.read_logs().items()}
    assert tables
    for page in evidence.PAGES:
        text = page.read_text(encoding="utf-8")
        assert evidence.fill(text, tables) == text
    assert all(f"<!-- {name} -->" in evidence.PAGES[0].read_text() for name in tables)


@pytest.mark.parametrize(
    "page, message", [("<!-- b -->\n<!-- end -->", "no log b.json"), ("<!-- a -->\n", "a mark has no <!-- end -->")]
)
def test_a_mark_without_a_log_or_an_end_is_refused(page, message):
    with pytest.raises(ValueError, match=message):
        evidence.fill(page, {"a": "table"})


def test_a_table_takes_the_place_of_the_old_one():
    page = "words\n<!-- a -->\nold\n\nold\n<!-- end -->\nmore\n<!-- b -->\n<!-- end -->\n"
    filled = "words\n<!-- a -->\nA\n<!-- end -->\nmore\n<!-- b -->\nB\n<!-- end -->\n"
    assert evidence.fill(page, {"a": "A", "b": "B"}) == filled
