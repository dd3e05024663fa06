"""Requests to an app on this machine, which may be slow to answer while it does other work: httpx itself waits 5 s."""

from functools import partial

import httpx
from gradio_client import Client

PATIENCE = 120  # seconds

get = partial(httpx.get, timeout=PATIENCE)
post = partial(httpx.post, timeout=PATIENCE)


def connect(url: str) -> Client:
    """A client of the app."""
    return Client(url, verbose=False, httpx_kwargs=dict(timeout=PATIENCE))
