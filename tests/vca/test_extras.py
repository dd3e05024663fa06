"""The library alone: what it needs, and what it says of an optional package that is missing."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from vca.extras import import_extra

ROOT = Path(__file__).parents[2]
OPTIONAL = (
    "cachetools", "captum", "diffusers", "gradio", "matplotlib", "ninja", "scipy", "skimage", "torch_fidelity",
    "torchdiffeq", "transformers",
)  # fmt: skip
PROGRAM = f"""
import sys
for name in {OPTIONAL}:
    sys.modules[name] = None
sys.path.insert(0, sys.argv[1])
import contextlib
import torch, vca
from PIL import Image
from vca.cli import main
model = vca.create_model("vca_vit_pico_patch4_32", num_classes=3).eval()
given = torch.zeros(1, 3, 32, 32), torch.tensor([0])
vca.attribution.rollout(model, *given)
with vca.record(model) as maps, torch.no_grad():
    model(given[0])
assert "<img" in maps._repr_html_()
vca.save(model, "checkpoint", label_names=["a", "b", "c"])
Image.new("RGB", (40, 30)).save("photo.png")
with contextlib.redirect_stdout(None):
    assert main(["classify", "photo.png", "--model", "checkpoint"]) == 0
    assert main(["explain", "photo.png", "--model", "checkpoint"]) == 0
for use in (
    lambda: vca.attribution.integrated_gradients(model, *given),
    lambda: vca.faithfulness.infidelity(model, *given, torch.zeros(1, 32, 32)),
    maps[0].plot,
    maps.overview,
    lambda: vca.attribution.plot(torch.zeros(4, 4)),
):
    try:
        use()
    except ImportError as error:
        print(error)
"""
MISSING = [
    f"this needs the package {package}, of the extra [{extra}] of vca: pip install {package}."
    for package, extra, uses in (("captum", "explain", 2), ("matplotlib", "plot", 3))
    for _ in range(uses)
]


def test_the_library_imports_anywhere_without_optional_packages_and_names_the_extra_of_one(tmp_path):
    done = subprocess.run(
        [sys.executable, "-I", "-c", PROGRAM, ROOT], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == MISSING


def test_an_error_inside_an_optional_package_is_not_taken_for_its_absence(tmp_path, monkeypatch):
    (tmp_path / "broken_extra.py").write_text("import a_package_that_it_needs")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="No module named 'a_package_that_it_needs'"):
        import_extra("broken_extra", "explain")


def test_every_extra_that_an_error_names_exists():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {"app", "train", "explain", "plot", "latents", "fused", "dev"} <= extras.keys()
    for file in (ROOT / "vca").rglob("*.py"):
        text = file.read_text()
        named = {part.partition("]")[0] for part in text.split("of the extra [")[1:]}
        assert {name for name in named if "{" not in name} <= extras.keys(), file
