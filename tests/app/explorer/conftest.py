"""The Explore tab in a real browser."""

from pathlib import Path

import pytest

from app.runtime.assets import example_files
from tests.helpers.app import save_checkpoints
from tests.helpers.explorer import save_more_checkpoints, watched


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    save_checkpoints(folder)
    save_more_checkpoints(folder)
    return folder


@pytest.fixture(scope="module")
def cat():
    """The first example's picture."""
    return Path(example_files()[0])


@pytest.fixture(scope="module")
def open_page(running, url):
    faults = []
    page = watched(running.new_page(viewport=dict(width=1400, height=1000), accept_downloads=True), faults, url)
    page.goto(url)
    page.get_by_role("tab", name="Explore").click()
    page.get_by_role("tabpanel").locator("visible=true").locator(".gallery-item").first.click()
    page.wait_for_selector(".vx[data-state=complete]")
    yield page, faults
    page.close()


@pytest.fixture
def page(open_page):
    page, faults = open_page
    yield page
    assert not faults
