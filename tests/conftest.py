"""Fixtures for all tests."""

import pytest
import torch

from tests.browser import NO_BROWSER


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
