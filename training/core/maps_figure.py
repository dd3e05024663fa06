"""The picture on a classifier's card: where every head looks in one photo."""

import io

import skimage.data
import torch
from PIL import Image

import vca
from vca import drawing, preprocessing


@torch.inference_mode()
def maps_png(model: torch.nn.Module) -> bytes | None:
    """A PNG: what the model sees of scikit-image's cat, and its effective maps, heads as rows and blocks as columns.

    A map is the row of the effective map that the classifier reads, see `vca.attribution.readout`: orange what is drawn
    in, blue what is pushed away, each on a scale of its own. None if the model has no attention over a whole grid, or
    if what it reads is no row of a map.
    """
    x = preprocessing.preprocess(model, Image.fromarray(skimage.data.cat()))
    with vca.record(model) as maps:
        model(x)
    if any(layer.readout is None for layer in maps):
        return None
    try:
        columns = list(maps.heads_on_grid().values())
    except ValueError:  # all of it attends within windows
        return None
    seen = preprocessing.input_picture(model, x)
    strip = drawing.tiles(columns, seen)
    canvas = Image.new("RGB", (strip.height + drawing.GAP + strip.width, strip.height), "white")
    canvas.paste(seen.resize((strip.height, strip.height), Image.Resampling.NEAREST), (0, 0))
    canvas.paste(strip, (strip.height + drawing.GAP, 0))
    stream = io.BytesIO()
    canvas.save(stream, format="PNG", optimize=True)
    return stream.getvalue()
