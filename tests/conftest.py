"""Fixtures for all tests, and a Hub on this machine in the place of the real one."""

import os
import tempfile

from tests.hub_server import HubServer

HUB = HubServer()
os.environ |= {  # huggingface_hub reads them once, when it is imported
    "HF_ENDPOINT": HUB.url,
    "HF_HOME": tempfile.mkdtemp(prefix="vca-hub-"),
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
    os.environ.pop(variable, None)

import pytest  # noqa: E402
import torch  # noqa: E402

from tests.browser import NO_BROWSER  # noqa: E402


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


def pytest_terminal_summary(terminalreporter):
    """A skipped browser test must not go unseen: says how many there were, and how to run them."""
    skipped = [report for report in terminalreporter.stats.get("skipped", []) if NO_BROWSER in str(report.longrepr)]
    if skipped:
        terminalreporter.write_line(
            f"{len(skipped)} browser tests were SKIPPED: {NO_BROWSER}. To run them: apt-get install chromium. "
            "With VCA_REQUIRE_BROWSER=1 its absence is a failure.",
            yellow=True,
        )
