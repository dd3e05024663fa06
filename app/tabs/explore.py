"""The Explore tab: click a patch or a contrast token, and see every map of it.

The server runs the model once and keeps the maps; the page (explorer*.html, .css, .js, and map*.js, which other tabs
share) fetches those of each block once and draws every click by itself.
"""

import base64
import filecmp
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl

import gradio as gr
from PIL import Image

import vca
from app.components import ModelChoice, image_and_model
from app.runtime import assets, drawing, export, loading, preprocessing, records
from app.runtime.images import ImageError, read_image, uploaded_file
from app.runtime.packing import MapStore, arrays_of, fetched, run_of

STORE_BYTES = 512 * 2**20
LINK = "#explore?"


@dataclass(frozen=True)
class Explorer:
    """The tab, for other tabs.

    Setting `image` and `model` from elsewhere explores that image. Setting `view` to what `opened` returns shows maps
    that were recorded elsewhere; set it to a plain string, since an update like `gr.skip()` makes Gradio drop its other
    properties. `restore` turns the link of a view, the hash of the page's address, into values for `image` and `model`.
    """

    image: gr.Image
    model: gr.Dropdown
    view: gr.HTML
    store: MapStore
    restore: Callable[[str], tuple]

    def opened(
        self,
        maps: list[vca.LayerMaps],
        picture: Image.Image,
        caption: tuple[str, str],
        prefix_names: Sequence[str] = (),
        sample: int = 0,
    ) -> str:
        """A value for `view`: these maps over this picture.

        Args:
            maps: what `vca.record` gave. Layers without a grid are left out.
            picture: of any size; its sides are those of the patch grid.
            caption: a term and what is to be said of it, such as ("Sample", "airplane, step 12 of 50").
            prefix_names: a name for each prefix token of the model; `records.prefix_names` gives a classifier's.
            sample: index of the image in the recorded batch.

        Raises:
            gr.Error: the maps are larger than the server keeps.
        """
        return json.dumps(run_of(self.store, maps, drawing.muted(picture), caption, list(prefix_names), sample))


def _file(content: bytes) -> dict:
    return dict(data=base64.b64encode(content).decode())


def build(choice: ModelChoice, examples: list[str]) -> Explorer:
    """Builds the tab."""
    store = MapStore(STORE_BYTES)

    def explore(upload: dict | None, name: str) -> str:
        if upload is None:
            return ""
        model = choice.checkpoints.load(name)
        try:
            image = read_image(uploaded_file(upload))
        except ImageError as error:
            return json.dumps(dict(problem=error.message))
        probabilities, maps = records.record(model, preprocessing.preprocess(model, image))
        [(label, probability)] = records.top_labels(model, probabilities, 1).items()
        crop = drawing.muted(preprocessing.center_crop(model, image))
        says = ("The model says", f"{label} {probability:.0%}")
        run = run_of(store, maps, crop, says, records.prefix_names(model))
        public_name = None if name.startswith(loading.UPLOADED) else name  # a visitor's own model is in no link
        return json.dumps(run | dict(repeatable=True, model=public_name, example=example_of(uploaded_file(upload))))

    def example_of(path: Path) -> str | None:
        """The name of the example that an uploaded file is a copy of."""
        return next((name for name, example in by_name.items() if filecmp.cmp(path, example, shallow=False)), None)

    def fetch_maps(request: dict) -> dict:
        return fetched(store, request)

    def export_numbers(request: dict) -> dict:
        """The numbers of a view as an .npz file in base64."""
        try:
            layer = store.get(request["token"])[request["block"]]
            place = (request[key] for key in ("mode", "head", "query", "lambda"))
            return _file(export.numbers(layer, *place, request["view"]))
        except (LookupError, TypeError, ValueError):
            return dict(expired=True)

    def export_page(request: dict) -> dict:
        """All maps of a run as a web page in base64."""
        try:
            maps = [arrays_of(layer) for layer in store.get(request["token"])]
            return _file(export.page(json.loads(request["run"]), maps, request["view"]).encode())
        except (LookupError, TypeError, ValueError, AttributeError):
            return dict(expired=True)

    def restore(link: str) -> tuple:
        """The image and the model that the link of a view asks for; what it does not name stays as it is."""
        if not isinstance(link, str) or not link.startswith(LINK):
            return gr.skip(), gr.skip()
        asked = dict(parse_qsl(link.removeprefix(LINK)))
        name, picture = asked.get("model"), by_name.get(asked.get("image"), gr.skip())
        if name not in choice.checkpoints.classifiers:
            gr.Warning(f"The model of this link is not here: {name}. Load it on the left.", title="Link")
            name = gr.skip()
        return picture, name

    by_name = {Path(example).stem: example for example in examples}
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            image, model = image_and_model(choice, examples, height=240)
        with gr.Column(scale=7, min_width=320):
            explorer = gr.HTML(
                "",
                html_template=assets.text("explorer.html"),
                css_template=assets.text("view.css", "explorer.css"),
                js_on_load=assets.text(*assets.EXPLORER_SCRIPTS),
                apply_default_css=False,
                server_functions=[fetch_maps, export_numbers, export_page],
                palette=drawing.PALETTE,
                view={},
                offline=False,
                elem_id="explorer",
            )
    gr.on(
        [image.change, model.change, explorer.submit],
        explore,
        [image, model],
        explorer,
        preprocess=False,
        show_progress="hidden",
        trigger_mode="always_last",
        api_visibility="private",
    )
    return Explorer(image, model, explorer, store, restore)
