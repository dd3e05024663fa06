"""The package as others install it: `vca` alone."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import vca

ROOT = Path(__file__).parent.parent
PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
import torch, vca
assert vca.__file__.startswith(sys.argv[1]), vca.__file__
model = vca.create_model("vca_vit_pico_patch4_32", num_classes=3)
with vca.record(model) as maps:
    model(torch.zeros(1, 3, 32, 32))
vca.save(model, "checkpoint", label_names=["a", "b", "c"])
from PIL import Image
from vca.cli import main
Image.new("RGB", (40, 30), "red").save("photo.png")
assert main(["explain", "photo.png", "--model", "checkpoint", "--out", "maps.html"]) == 0
assert "fetch_maps" in open("maps.html").read()
print(vca.__version__, maps[0].effective.shape[-1], vca.load("checkpoint").label_names, len(vca.list_models()))
"""


@pytest.mark.long
def test_the_wheel_holds_vca_alone_and_imports_from_any_folder(tmp_path):
    source = tmp_path / "source"
    subprocess.run(["git", "clone", "-q", "--shared", ROOT, source], check=True)  # no build folder is left behind
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", tmp_path / "wheel"]
    command = [sys.executable, "-m", "pip", "wheel", ".", *options]
    built = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (wheel,) = (tmp_path / "wheel").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert {name.split("/")[0] for name in names} == {"vca", f"vca-{vca.__version__}.dist-info"}
    suffixes = (".py", ".cpp", ".typed", ".js", ".css", ".html")
    code = {str(file.relative_to(ROOT)) for file in (ROOT / "vca").rglob("*.*") if file.suffix in suffixes}
    assert {name for name in names if name.startswith("vca/")} == code
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = subprocess.run(
        [sys.executable, "-I", "-c", PROGRAM, tmp_path / "site"], cwd=elsewhere, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    page, printed = done.stdout.splitlines()
    assert page.startswith("maps.html: ")
    assert printed.split() == [vca.__version__, "64", "['a',", "'b',", "'c']", str(len(vca.list_models()))]
