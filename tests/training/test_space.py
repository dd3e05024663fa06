"""The assembled Space: it has what its code imports, and it starts and answers."""

import ast
import os
import re
import signal
import socket
import subprocess
import sys
import time
from importlib.metadata import packages_distributions
from pathlib import Path

import httpx
import numpy as np
import pytest
from gradio_client import handle_file
from PIL import Image

from tests.helpers import http
from tests.helpers.app import photo
from tests.helpers.checkpoints import LABELS
from tests.helpers.published import lines_of, run
from training.publish import ROOT, space_files

BUILDER = {"gradio_client", "spaces", "numpy", "pillow"}  # what the Spaces builder or gradio brings along
STARTS = 120  # seconds


def module_imports(source: str) -> set[str]:
    """The packages that a module imports as soon as it is imported."""
    found = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names)


def test_a_space_has_all_that_its_code_imports():
    files = space_files([], ["user/repo"])
    required = {re.split(r"[\[<>=]", line)[0] for line in lines_of(Path(files["requirements.txt"]).read_bytes())}
    code = {
        name: Path(file).read_text() for name, file in files.items() if isinstance(file, Path) and name[-3:] == ".py"
    }
    distributed_as = packages_distributions()
    for name, source in (code | {"app.py": files["app.py"].decode()}).items():
        for package in module_imports(source):
            if package in ("app", "vca", "triton"):  # torch brings Triton along where it runs
                continue
            distributions = {d.lower().replace("_", "-") for d in distributed_as.get(package, [package])}
            assert distributions & (required | {b.replace("_", "-") for b in BUILDER}), f"{name} imports {package}"
    shipped = {file.relative_to(ROOT).as_posix() for folder in ("app", "vca") for file in (ROOT / folder).rglob("*.*")}
    assert {name for name in shipped if "__pycache__" not in name} <= set(files)


@pytest.mark.long
def test_the_assembled_space_starts_and_answers(owner, checkpoints, tmp_path, monkeypatch):
    """As on CPU basic: the folder alone, its models from the Hub with a cold cache, and nobody's token."""
    for name, folder in checkpoints.items():
        run(folder, "--repo", f"owner/{name}", monkeypatch=monkeypatch)
    run("owner/classifier", "owner/generator", "--space", "owner/space", monkeypatch=monkeypatch)
    for name, content in owner.files("owner/space", kind="space").items():
        file = tmp_path / "space" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_TOKEN", "PYTHONPATH")} | {
        "SPACE_ID": "owner/space", "HF_HOME": str(tmp_path / "home"), "GRADIO_SERVER_PORT": port,
    }  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "app.py"], cwd=tmp_path / "space", env=environment, stdout=log, stderr=log
        )
    try:
        wait_for(address, server, tmp_path / "log")
        client = http.connect(address)
        photo(60, 50).save(tmp_path / "photo.png")
        image = handle_file(tmp_path / "photo.png")
        answer = client.predict(image=image, model="owner/classifier", top_k=3, api_name="/classify")
        assert set(answer) == set(LABELS) and sum(answer.values()) == pytest.approx(1)
        asked = dict(label=LABELS[1], count=2, steps=2, guidance=1, seed=0, sampler="euler")
        for file in client.predict(model="owner/generator", **asked, api_name="/generate"):
            assert np.asarray(Image.open(file)).shape == (8, 8, 3)
        with pytest.raises(Exception, match="owner/other: this page does not load it"):
            client.predict(image=image, model="owner/other", top_k=3, api_name="/classify")
        large = http.post(f"{address}/gradio_api/upload", files={"files": ("large.png", bytes(17 * 2**20))})
        assert large.status_code == 413
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)


def wait_for(address: str, server: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + STARTS
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()
        try:
            if http.get(address).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(1)
    pytest.fail(f"the app did not start within {STARTS} s: {log.read_text()}")
