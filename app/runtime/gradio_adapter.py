"""What the app uses of gradio beyond its documented interface: all of it is here, so that an update has one place."""

import asyncio
import io
from pathlib import Path

import gradio as gr
from gradio.processing_utils import save_bytes_to_cache
from gradio.utils import LRUCache, get_upload_folder
from PIL import Image

PATIENCE = 30  # messages


def upload_folder() -> Path:
    """The folder in which gradio keeps the files of visitors."""
    return Path(get_upload_folder()).resolve()


def kept_file(content: bytes, name: str) -> str:
    """Writes a file for a visitor where gradio may serve it; returns its path."""
    return save_bytes_to_cache(content, name, str(upload_folder()))


def png_file(image: Image.Image, name: str) -> str:
    """Writes an image as a PNG file for a visitor; returns its path."""
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return kept_file(stream.getvalue(), name)


def bundled_image(name: str) -> Path:
    """A picture that comes with gradio."""
    return Path(gr.__file__).parent / "media_assets" / "images" / name


def nobody_listens(page: gr.Blocks, request: gr.Request, sent: int) -> bool:
    """Whether a visitor whose event has sent so many messages has taken none of them, after `PATIENCE` messages."""
    waiting = page._queue.pending_messages_per_session.get(request.session_hash)
    return sent >= PATIENCE and waiting is not None and waiting.qsize() >= sent


class _Messages(LRUCache):
    """The messages by session, of which those used longest ago are forgotten.

    gradio's own forgets the oldest session, be it in use or not. If one of its events waits at that time, sending word
    of the event's place in the queue is a KeyError that ends the queue for everyone.
    """

    def __getitem__(self, session: str) -> asyncio.Queue:
        if session in self:
            self.move_to_end(session)
        return super().__getitem__(session)

    def __missing__(self, session: str) -> asyncio.Queue:
        return asyncio.Queue()  # nobody listens

    def __delitem__(self, session: str) -> None:
        self.pop(session, None)  # of two streams of a session that ends, each deletes it


def with_lasting_queue(page: gr.Blocks) -> gr.Blocks:
    """Lets the queue of a page, as `gr.Blocks.queue` has set it up, outlast visitors that it has forgotten."""
    page._queue.pending_messages_per_session = _Messages(page._queue.pending_messages_per_session.max_size)
    return page
