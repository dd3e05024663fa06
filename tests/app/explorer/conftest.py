"""The Explore tab in a real browser."""

import pytest

from app.runtime.examples import examples
from tests.helpers.app import save_checkpoints
from tests.helpers.browser import open_page
from tests.helpers.explorer import save_more_checkpoints


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    save_checkpoints(folder)
    save_more_checkpoints(folder)
    return folder


@pytest.fixture(scope="module")
def cat():
    """An example's picture."""
    return examples()["cat"].path


@pytest.fixture(scope="module")
def page(running, url):
    """One page for the tests of a file."""
    with open_page(running, url, viewport=dict(width=1400, height=1000)) as page:
        page.goto(f"{url}#explore?image=cat")
        page.wait_for_function("() => location.hash.includes('image=cat&')")
        page.wait_for_selector(".vx[data-state=complete]")
        yield page
