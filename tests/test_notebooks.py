"""The notebooks run from the first cell to the last, and show pictures."""

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
ROOT = Path(__file__).parent.parent
BOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def outputs(book) -> list[dict]:
    return [output for cell in book.cells for output in cell.get("outputs", [])]


@pytest.mark.long
@pytest.mark.parametrize("file", BOOKS, ids=lambda file: file.stem)
def test_a_notebook_runs(file, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    book = nbformat.read(file, 4)
    place = dict(metadata=dict(path=str(file.parent)))
    nbclient.NotebookClient(book, timeout=600, kernel_name="python3", resources=place).execute()
    pictures = [output for output in outputs(book) if "image/png" in output.get("data", {})]
    assert pictures


@pytest.mark.parametrize("file", BOOKS, ids=lambda file: file.stem)
def test_a_notebook_is_stored_as_it_ran(file):
    """With its pictures, without errors, and small."""
    book = nbformat.read(file, 4)
    counts = [cell.execution_count for cell in book.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert any("image/png" in output.get("data", {}) for output in outputs(book))
    assert not any(
        output.output_type in ("error", "stream") and output.get("name") == "stderr" for output in outputs(book)
    )
    assert file.stat().st_size < 600_000


def test_there_are_notebooks():
    assert [file.stem for file in BOOKS] == ["see_maps", "swap_and_train", "transfer"]
