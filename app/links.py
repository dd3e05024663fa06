"""Links to what the page shows: #TAB?model=...&image=...&crop=... and what the tab adds to it.

A photo of one's own is in no link, unless its visitor asks for that: then a reduced copy of it stands in the link
itself. It never reaches another server, nor a log of this one: what follows # stays in the browser until the page asks.
"""

import base64
import binascii
import filecmp
import io
import json
from pathlib import Path
from urllib.parse import parse_qsl

import gradio as gr
from PIL import Image

from app.context import Context
from app.runtime import crops, loading
from app.runtime.examples import examples
from app.runtime.gradio_adapter import kept_file
from app.runtime.images import ImageError, read_image, uploaded_file
from app.runtime.validation import plain

TABS = ("classify", "explore", "generate", "compare", "about")
LINKED = "photo-of-a-link.jpg"
SIDE, MOST_BYTES = 256, 32_000
ASKED = "(_, ...shown) => [JSON.stringify({ hash: location.hash, path: history.state?.path }), ...shown]"


def base_of(name: str, path: Path) -> dict | None:
    """What every link to a photo and a model begins with; None for a visitor's own model, which is in no link."""
    if name.startswith(loading.UPLOADED):
        return None
    path, box = crops.origin_of(path)
    part = {} if box == crops.WHOLE else dict(crop=",".join(map(str, box)))
    try:
        if path.name == LINKED:
            return dict(model=name, photo=base64.urlsafe_b64encode(path.read_bytes()).decode()) | part
        example = example_of(path)
    except FileNotFoundError:  # uploads are kept for a time only, and it may end while the photo is shown
        example = None
    return dict(model=name, image=example) | part if example else dict(model=name)


def example_of(path: Path) -> str | None:
    """The name of the example with the same content as a file, or None. Raises a FileNotFoundError."""
    same = (e.name for e in examples().values() if filecmp.cmp(path, e.path, shallow=False))
    return next(same, None)


def reduced(path: Path) -> str:
    """A copy of a photo that is small enough for a link, in base64. Raises an ImageError."""
    image = read_image(path)
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=70)
    return base64.urlsafe_b64encode(stream.getvalue()).decode()


def connect(context: Context) -> None:
    """Follows a link when the page opens, and whenever the page says that its address has changed."""
    checkpoints = context.checkpoints

    nothing = (gr.skip(),) * 4

    def follow(asked: str, upload: dict | None, name: str, second: str) -> tuple:
        try:
            asked = json.loads(asked)
            tab, _, rest = asked["hash"].removeprefix("#").partition("?")
            if tab not in TABS:
                return nothing
            link = dict(parse_qsl(rest))
            path = asked.get("path")
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            return nothing
        models = _model(link.get("model", name), name), _model(link.get("with", second), second)
        return _photo(link, path, upload), *models, gr.Tabs(selected=tab)

    def _model(wanted: str, name: str):
        if wanted == name:
            return gr.skip()
        if wanted in (*checkpoints.classifiers, *checkpoints.finer):
            return wanted
        said = plain(f"The model of this link is not here: {wanted}", 120)
        gr.Warning(f"{said}. “Load another model” loads it.", title="Link")
        return gr.skip()

    gr.on(
        [context.page.load, context.asking.input],
        follow,
        [context.asking, context.image, context.model, context.second],
        [context.image, context.model, context.second, context.tabs],
        js=ASKED,
        preprocess=False,
        show_progress="hidden",
        api_visibility="private",
    )


def _photo(link: dict[str, str], path: str | None, upload: dict | None):
    """The photo of a link as an update."""
    try:
        wanted = _wanted(link, path)
    except ImageError:
        wanted = None
    if wanted is None or not wanted.is_file():
        return gr.skip()
    try:
        shown = uploaded_file(upload)
    except ImageError:
        return str(wanted)
    return gr.skip() if shown.is_file() and filecmp.cmp(shown, wanted, shallow=False) else str(wanted)


def _wanted(link: dict[str, str], path: str | None) -> Path | None:
    """The photo of a link: an example, the one in the link, or a part of either; or one that this visitor sent before.

    Raises:
        ImageError: there is none.
    """
    if example := examples().get(link.get("image", "")):
        photo = example.path
    elif "photo" in link:
        try:
            content = base64.urlsafe_b64decode(link["photo"])
        except (binascii.Error, ValueError):
            return None
        if not 0 < len(content) <= MOST_BYTES:
            return None
        photo = Path(kept_file(content, LINKED))
    else:
        return uploaded_file(dict(path=path))
    try:
        box = crops.box_of(link["crop"].split(","))
    except (LookupError, ValueError):
        return photo
    return crops.part_of(photo, box)
