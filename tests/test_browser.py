"""What `open_page` takes for a fault of a page."""

import threading

import gradio as gr
import pytest

from tests.helpers.browser import needs_browser, open_page

SITE = "http://a.test/"
ASKS = "() => { fetch('/never').catch((error) => console.error(error.message)); }"

pytestmark = needs_browser


def serve(page) -> None:
    """Answers every address of the site with an empty page, but one with nothing."""
    page.route(f"{SITE}**", lambda route: route.request.url.endswith("never") or route.fulfill(body="<p>here</p>"))


def test_an_error_that_is_logged_is_a_fault(running):
    with pytest.raises(AssertionError, match="wrong"), open_page(running, SITE) as page:
        serve(page)
        page.goto(SITE)
        page.evaluate("() => console.error('wrong')")


def test_a_question_to_another_machine_is_a_fault(running):
    with pytest.raises(AssertionError, match="asked for http:"), open_page(running, SITE) as page:
        serve(page)
        page.route("http://b.test/**", lambda route: route.fulfill(body=""))
        page.goto(SITE)
        page.evaluate("() => fetch('http://b.test/', { mode: 'no-cors' })")


def test_requests_that_end_with_their_page_are_none(running):
    with open_page(running, SITE) as page:
        serve(page)
        page.goto(SITE)
        page.evaluate(ASKS)
        page.goto(f"{SITE}next")
        page.evaluate(ASKS)


def test_an_error_after_another_address_is_a_fault(running):
    with pytest.raises(AssertionError, match="wrong"), open_page(running, SITE) as page:
        serve(page)
        page.goto(SITE)
        page.goto(f"{SITE}next")
        page.evaluate("() => console.error('wrong')")


def test_events_of_gradio_that_end_with_their_page_are_none(running):
    begun, done = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        done.wait(60)

    with gr.Blocks() as waits:
        gr.Button("wait").click(wait)
    _, address, _ = waits.launch(prevent_thread_lock=True, quiet=True)
    try:
        with open_page(running, address) as page:
            page.goto(address)
            page.get_by_role("button", name="wait", exact=True).click()
            assert begun.wait(60)
            page.goto(f"{address}?__theme=dark")
    finally:
        done.set()
        waits.close()
