"""Fixtures for all tests, and a Hub on this machine in the place of the real one."""

import os
import socket
import tempfile
from pathlib import Path

from tests.helpers.hub_server import HubServer

HUB = HubServer()
os.environ |= {  # huggingface_hub reads them once, when it is imported
    "HF_ENDPOINT": HUB.url,
    "HF_HOME": tempfile.mkdtemp(prefix="vca-hub-"),
    "GRADIO_TEMP_DIR": tempfile.mkdtemp(prefix="vca-uploads-"),  # an app that ends empties it, and two workers test
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "VCA_FUSED": "0",  # read by vca, likewise: no test changes its path in the middle, or starts a compiler unasked
}
for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
    os.environ.pop(variable, None)

import pytest  # noqa: E402
import torch  # noqa: E402

import vca  # noqa: E402
from tests.helpers.browser import NO_BROWSER, browser, open_page  # noqa: E402
from tests.helpers.checkpoints import LABELS, make_model  # noqa: E402


@pytest.fixture
def hub():
    """The Hub of this machine, empty; the client's cache keeps what earlier tests have loaded."""
    HUB.reset()
    yield HUB
    HUB.reset()


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Small tensors are fastest on one thread, and results do not depend on the machine's number of cores."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder of checkpoints for the app."""
    from tests.helpers.app import save_checkpoints

    folder = tmp_path_factory.mktemp("weights")
    save_checkpoints(folder)
    return folder


@pytest.fixture(scope="module")
def url(weights):
    """The address of the app, started with `weights`."""
    from app.ui import LAUNCH, build

    demo = build(weights)
    _, address, _ = demo.launch(prevent_thread_lock=True, quiet=True, **LAUNCH)
    yield address
    demo.close()


@pytest.fixture(scope="module")
def client(url):
    """A client of the app."""
    from tests.helpers.http import connect

    return connect(url)


@pytest.fixture(scope="module")
def running():
    """A browser."""
    with browser() as chromium:
        yield chromium


@pytest.fixture
def theme() -> str:
    """The theme of `page`; a test that wants another, or several, is parametrized with it."""
    return "light"


@pytest.fixture
def page(running, url, theme):
    """An open page of the app, which must neither log an error nor ask anything of another machine."""
    with open_page(running, url, viewport=dict(width=1400, height=1000)) as page:
        page.goto(f"{url}?__theme={theme}")
        yield page


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """The path of a photo to upload."""
    from tests.helpers.app import photo

    path = tmp_path_factory.mktemp("pictures") / "photo.png"
    photo(200, 160, seed=3).save(path)
    return path


def pytest_collection_modifyitems(items):
    """The time limit of every test in pyproject.toml is not meant for the long ones."""
    for item in items:
        if item.get_closest_marker("long") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(6 * 3600))


def pytest_terminal_summary(terminalreporter):
    """A skipped browser test must not go unseen: says how many there were, and how to run them."""
    skipped = [report for report in terminalreporter.stats.get("skipped", []) if NO_BROWSER in str(report.longrepr)]
    if skipped:
        terminalreporter.write_line(
            f"{len(skipped)} browser tests were SKIPPED: {NO_BROWSER}. To run them: apt-get install chromium. "
            "With VCA_REQUIRE_BROWSER=1 its absence is a failure.",
            yellow=True,
        )


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("classifier") / "checkpoint"
    vca.save(make_model(), folder, label_names=LABELS)
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """A cold cache."""
    folder = tmp_path / "cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    return folder


@pytest.fixture
def unreachable(monkeypatch):
    """A function after which the Hub is at an address where nothing listens."""

    def disconnect() -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")

    return disconnect
