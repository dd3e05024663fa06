"""The crop box below the photo: it shows which part of it the model sees, and lets the visitor choose another.

The part is a file of its own, and becomes the photo of the page: whatever the tabs show is of that part.
"""

import json

import gradio as gr

from app.components import page_part
from app.runtime.checkpoints import Checkpoints
from app.runtime.crops import WHOLE, box_seen_as, origin_of, part_of, seen_in
from app.runtime.images import ImageError, read_image, uploaded_file
from app.runtime.validation import refused, told
from vca import drawing, preprocessing

SIDE = 480  # pixels


class CropBox:
    """The box (crop.html, .css and .js)."""

    def __init__(self, checkpoints: Checkpoints):
        self.checkpoints = checkpoints

    def build(self, upload: dict | None, name: str | None) -> None:
        """Makes the box, which first shows this photo as this model sees it."""
        shown = self.show(upload, name)
        self.view = page_part("crop.html", "crop.js", ("crop.css",), shown, elem_id="crop")

    def connect(self, image: gr.Image, model: gr.Dropdown) -> None:
        """Registers the event by which the box changes the photo of the page. Classify shows the new photo in it."""
        quiet = dict(preprocess=False, show_progress="hidden", api_visibility="private", trigger_mode="always_last")
        self.view.select(self.choose, [image, model], image, **quiet)

    def show(self, upload: dict | None, name: str | None) -> str:
        """What the page draws, as JSON: the whole photo, and which part of it the model sees."""
        try:
            origin, box = origin_of(uploaded_file(upload))
            photo = read_image(origin)
            network = self.checkpoints.load(name)
        except gr.Error:  # the tabs say so
            return ""
        seen = seen_in(network, photo.size, box)
        _, rows, cols = preprocessing.input_size(network)
        aspect = photo.width / photo.height
        photo.thumbnail((SIDE, SIDE))
        url = drawing.data_url(photo, "JPEG")
        return json.dumps(dict(url=url, aspect=aspect, model=cols / rows, seen=seen, isChosen=box != WHOLE))

    def choose(self, event: gr.EventData, upload: dict | None, name: str) -> str:
        """The file of the part that the event wants the model to see; without one, that of the whole photo."""
        origin, _ = origin_of(uploaded_file(upload))
        wanted = told(event, "seen")
        try:
            network = self.checkpoints.load(name)
            box = WHOLE if wanted is None else box_seen_as(network, read_image(origin).size, wanted)
            return str(part_of(origin, box))
        except ImageError as error:
            raise refused(error.message) from None
