"""Figures of maps, by matplotlib: `maps[3].plot(image)`, `maps.overview(image)` and `vca.attribution.plot` draw here.

Every function takes plain arrays, and returns a figure that a notebook shows and `savefig` writes. Orange is positive,
blue negative.
"""

import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from vca import drawing
from vca.extras import import_extra

figures = import_extra("matplotlib.figure", "plot")
colors = import_extra("matplotlib.colors", "plot")
cm = import_extra("matplotlib.cm", "plot")
patches = import_extra("matplotlib.patches", "plot")

SIDE = 2.4  # inches, of a panel
CELLS_SIDE = 384  # pixels, of a panel without an image


class Figure(figures.Figure):  # type: ignore[name-defined]
    """A figure of its own, outside pyplot's list of figures: it is shown once, and is gone when nobody holds it."""

    def _repr_png_(self) -> bytes:
        stream = io.BytesIO()
        self.savefig(stream, format="png", dpi=100)
        return stream.getvalue()


class Panel(NamedTuple):
    """One map: its title, its signed values (rows, columns), and both ends of its scale, of which one may be 0."""

    title: str
    values: np.ndarray
    low: float
    high: float


def panels(
    maps: Sequence[Panel],
    image: Image.Image | None = None,
    *,
    box: tuple[float, float, float, float] | None = None,
    title: str = "",
    smooth: bool = False,
    figure: Any = None,
) -> Any:
    """The image, and maps over it in a row, each with a colour bar.

    Args:
        maps: what to draw.
        image: of the aspect of the maps; default none, and the maps on white.
        box: left, top, width and height of a frame around the query, in parts of the image.
        title: above all of it.
        smooth: interpolate between the cells.
        figure: a matplotlib figure or subfigure to draw into; default a new one.
    """
    rows, cols = maps[0].values.shape
    below = image or Image.new("L", (CELLS_SIDE, max(1, round(CELLS_SIDE * rows / cols))), 255)
    count = len(maps) + (image is not None)
    if figure is None:
        figure = Figure(figsize=(SIDE * count, SIDE * below.height / below.width + 0.9), layout="constrained")
    axes, bars = figure.subplots(2, count, squeeze=False, height_ratios=[1, 0.04])
    for bar in bars[: count - len(maps)]:
        bar.set_axis_off()
    if title:
        figure.suptitle(title, fontsize=10)
    if image is not None:
        _show(axes[0], image, "", box)
    for ax, bar_ax, panel in zip(axes[-len(maps) :], bars[-len(maps) :], maps, strict=True):
        limit = max(-panel.low, panel.high)
        drawn = drawing.laid_over(below, panel.values, limit, smooth)
        _show(ax, drawn, panel.title, box)
        scale = cm.ScalarMappable(colors.Normalize(panel.low, panel.high or 1e-12), _colors(panel.low, panel.high))
        bar = figure.colorbar(scale, cax=bar_ax, orientation="horizontal")
        ticks = sorted({panel.low, 0, panel.high})
        bar.set_ticks(ticks, labels=[_number(value, signed=panel.low < 0 < panel.high) for value in ticks])
        bar.ax.tick_params(labelsize=7, length=2)
        bar.outline.set_visible(False)
    return figure


def tiles(
    columns: Sequence[np.ndarray],
    image: Image.Image | None = None,
    labels: Sequence[Any] = (),
    *,
    signed: bool = True,
    figure: Any = None,
) -> Any:
    """Many small maps, each over the image and on a scale of its own, beside the image itself.

    Args:
        columns: of each column the signed maps of its rows, (rows, Hg, Wg): blocks, and their heads.
        image: of the aspect of the maps; default none, and the maps on white.
        labels: of the columns; default 0, 1, ...
        signed: whether blue has a meaning.
        figure: as in `panels`.
    """
    picture = drawing.tiles(columns, image)
    heads = max(map(len, columns))
    across, down = (picture.width + drawing.GAP) / len(columns), (picture.height + drawing.GAP) / heads
    height = max(0.55 * heads * down / drawing.TILE, 1.2)
    if figure is None:
        width = height * picture.width / picture.height + (height if image else 0)
        figure = Figure(figsize=(width + 0.6, height + 0.7), layout="constrained")
    if image:
        ratios = dict(width_ratios=[image.width / image.height, picture.width / picture.height])
        photo, ax = figure.subplots(1, 2, **ratios)
        _show(photo, image, "", None)
    else:
        ax = figure.subplots()
    ax.imshow(picture, interpolation="antialiased")
    half = drawing.TILE / 2
    ax.set_xticks([half + across * i for i in range(len(columns))], labels=labels or range(len(columns)))
    ax.set_yticks([(down - drawing.GAP) / 2 + down * i for i in range(heads)], labels=range(heads))
    ax.tick_params(length=0, labelsize=8)
    ax.set_xlabel("block", fontsize=8)
    ax.set_ylabel("head", fontsize=8)
    ax.set_title("draws in: orange" + (", pushes away: blue" if signed else ""), fontsize=9)
    ax.spines[:].set_visible(False)
    return figure


def _show(ax: Any, picture: Image.Image, title: str, box: tuple[float, float, float, float] | None) -> None:
    ax.imshow(picture, extent=(0, 1, 1, 0), interpolation="antialiased")
    ax.set_aspect(picture.height / picture.width)
    ax.set_axis_off()
    ax.set_title(title, fontsize=9)
    if box is None:
        return
    left, top, width, height = box
    for color, line in (("white", 2.5), ("black", 1)):  # shows on any image
        ax.add_patch(patches.Rectangle((left, top), width, height, fill=False, edgecolor=color, linewidth=line))


def _colors(low: float, high: float) -> Any:
    """The colours of a scale, as they are on white."""
    values = np.linspace(low, high, 256)[None]
    drawn = drawing.laid_over(Image.new("L", (256, 1), 255), values, max(-low, high))
    return colors.ListedColormap(np.asarray(drawn)[0] / 255)


def _number(value: float, signed: bool) -> str:
    return f"{value:+.2g}" if signed and value else f"{abs(value):.2g}"
