"""The picture on a classifier's card: where every head looks in one photo."""

import io

import numpy as np
import skimage.data
import timm.data
import torch
from PIL import Image

import vca
from vca.attribution import readout

CELL, GAP = 72, 4  # pixels
DRAWS_IN, PUSHES_AWAY = np.array([255, 106, 0]), np.array([10, 99, 255])


@torch.inference_mode()
def maps_png(model: torch.nn.Module) -> bytes | None:
    """A PNG: what the model sees of scikit-image's cat, and its effective maps, heads as rows and blocks as columns.

    A map is the row of the effective map that the classifier reads, see `vca.attribution.readout`: orange what is drawn
    in, blue what is pushed away, each on a scale of its own. None if the model has no attention over a whole grid, or
    if what it reads is no row of a map.
    """
    config = timm.data.resolve_data_config(model=model)
    x = timm.data.create_transform(**config)(Image.fromarray(skimage.data.cat()))[None]
    with vca.record(model) as maps:
        model(x)
    maps = [layer for layer in maps if layer.window_size is None and layer.key_grid is None]
    try:
        read = [readout(model, layer).rows(layer.effective[0]).numpy() for layer in maps]  # (H, Hg, Wg) of each
    except ValueError:  # it pools in another way
        return None
    if not read:
        return None
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    seen = Image.fromarray(((x[0] * std + mean).clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy())
    gray = np.asarray(seen.convert("L").resize((CELL, CELL), Image.Resampling.BICUBIC))[..., None].astype(np.float64)
    rows = max(layer.stage1.positive.shape[1] for layer in maps)
    side = rows * (CELL + GAP) - GAP
    canvas = Image.new("RGB", (side + len(maps) * (CELL + GAP), side), "white")
    canvas.paste(seen.resize((side, side), Image.Resampling.NEAREST), (0, 0))
    for column, heads in enumerate(read):
        for row, values in enumerate(heads):
            corner = (side + GAP + column * (CELL + GAP), row * (CELL + GAP))
            canvas.paste(_overlay(values, gray), corner)
    stream = io.BytesIO()
    canvas.save(stream, format="PNG", optimize=True)
    return stream.getvalue()


def _overlay(values: np.ndarray, gray: np.ndarray) -> Image.Image:
    weights = np.abs(values) / (np.abs(values).max() or 1)
    weights, signs = (
        np.asarray(Image.fromarray(v).resize((CELL, CELL), Image.Resampling.NEAREST))[..., None]
        for v in (weights.astype(np.float32), (values >= 0).astype(np.uint8))
    )
    colors = np.where(signs, DRAWS_IN, PUSHES_AWAY)
    return Image.fromarray(((1 - 0.9 * weights) * gray + 0.9 * weights * colors).round().astype(np.uint8))
