"""The list of records that `vca.record` yields, and how it draws itself."""

from typing import Any

import numpy as np

from vca import drawing
from vca.layers.layer_maps import LayerMaps
from vca.layers.pictured import Query


class Maps(list[LayerMaps]):
    """The records of the attention layers of one forward pass, in order."""

    def overview(
        self,
        image: Any = None,
        *,
        stage: str = "effective",
        query: Query = None,
        sample: int = 0,
        figure: Any = None,
    ) -> Any:
        """Draws the map of one query of every head (row) of every layer (column), each on a scale of its own.

        Args:
            image, sample, figure: as in `LayerMaps.plot`.
            stage, query: as in `heads_on_grid`.

        Returns:
            The figure.

        Raises:
            ImportError: matplotlib is not installed; the message names the extra.
            ValueError: as `heads_on_grid`.
        """
        from vca import plot

        shown = self.heads_on_grid(stage, query, sample)
        grid = next(iter(shown.values())).shape[1:]
        photo = drawing.backdrop(image, grid, sample) if image is not None else None
        signed = any((values < 0).any() for values in shown.values())
        return plot.tiles(list(shown.values()), photo, list(shown), signed=signed, figure=figure)

    def heads_on_grid(self, stage: str = "effective", query: Query = None, sample: int = 0) -> dict[int, np.ndarray]:
        """Block -> the signed maps (H, rows, columns) of its heads for one query, see `LayerMaps.on_grid`.

        Without a query, layers that attend within windows are left out.

        Raises:
            ValueError: there is nothing to draw: the model has not run, or no layer has such a map.
        """
        drawn = {}
        for layer in self:
            if layer.grid_size is None or (query is None and layer.window_size is not None):
                continue
            rows = layer.on_grid(stage, query, sample)
            drawn[layer.block] = rows.get("differential", rows["positive"])
        if not drawn:
            raise ValueError("there are no maps to draw: run the model inside the with block, or give a query.")
        return drawn

    def __repr__(self) -> str:
        return "\n".join(map(repr, self)) or "<no maps: the model has not run>"

    def _repr_html_(self) -> str | None:
        """What a notebook shows: the overview, without the image."""
        try:
            shown = self.heads_on_grid()
        except ValueError:
            return None
        picture = drawing.data_url(drawing.tiles(list(shown.values())), "PNG")
        words = "Effective map of every head (row) of every layer (column)"
        return f"<figure><img src='{picture}' alt='{words}'><figcaption>{words}</figcaption></figure>"
