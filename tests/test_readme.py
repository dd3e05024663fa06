"""The examples of the README run as they stand there."""

import re
from pathlib import Path

import matplotlib

from training.evaluate import table

ROOT = Path(__file__).parent.parent


def test_the_python_examples_run(monkeypatch):
    matplotlib.use("Agg")
    monkeypatch.chdir(ROOT)
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    names = {}
    for example in examples:
        if "gradio_client" not in example:  # needs a running app; tests/test_app.py drives one
            exec(example, names)
    assert names["y"].shape == (2, 197, 192)
    assert names["model"].label_names[3] == "cat"


def test_the_table_of_results_is_that_of_the_results_files():
    files = sorted(map(str, (ROOT / "weights").glob("*/results.json")))
    assert len(files) >= 3
    assert table(files) in (ROOT / "README.md").read_text()
