"""What a record of attention maps shows of itself: the map of one query over a grid, a picture, a line of text."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

STAGES = ("effective", "stage1", "stage2")
TITLES = {
    "effective": ("Draws in", "Pushes away", "Effective E"),
    "stage1": ("Positive A₁⁺", "Negative A₁⁻", "Differential D₁"),
    "stage2": ("Positive A₂⁺", "Negative A₂⁻", "Differential D₂"),
}
Query = int | Sequence[int] | None


class Pictured:
    """The part of `vca.LayerMaps` that chooses maps and draws them; its attributes are given there."""

    kind: str
    block: int
    name: str
    grid_size: tuple[int, int] | None
    num_prefix_tokens: int
    readout: Any
    stage1: Any
    stage2: Any
    token_grid: tuple[int, int] | None
    key_grid: tuple[int, int] | None
    window_size: tuple[int, int] | None
    lambda1: Tensor | None
    lambda2: Tensor | None

    def effective_rows(self, tokens: slice) -> Tensor:
        raise NotImplementedError

    @property
    def window_patches(self) -> Tensor | None:
        return None

    def on_grid(self, stage: str = "effective", query: Query = None, sample: int = 0) -> dict[str, np.ndarray]:
        """What a query attends to in every head, over the grid of the keys, without the prefix tokens.

        Args:
            stage: "effective", "stage1" or "stage2".
            query: the (row, column) of a patch, or of Stage I of the two-stage kinds of a contrast token; or the index
                of a row of the map, where the prefix tokens come first. Default: what the classifier reads, such as the
                class token; where that is not known the average patch, and of contrast tokens their average.
            sample: index of the image in the recorded batch.

        Returns:
            float32 arrays (H, rows, columns), NaN outside the window of the query: `positive`; and of signed attention
            `negative` and `differential`. Of the effective map these are its positive part, minus its negative part,
            and itself.

        Raises:
            ValueError: this attention has no such stage or no grid, or windows and no query is given.
            IndexError: the query or the sample is out of range.
        """
        if self.grid_size is None:
            raise ValueError(f"block {self.block} works on no grid of patches: its maps cannot be drawn.")
        if stage not in STAGES or (stage == "stage2" and self.stage2 is None):
            has = STAGES if self.stage2 is not None else STAGES[:2]
            raise ValueError(f"stage={stage!r}: this attention has {', '.join(has)}.")
        index = self._index(stage, query)
        if stage == "effective" and self.window_size is None:
            maps = dict(positive=self.effective_rows(slice(index, index + 1) if isinstance(index, int) else index))
            index = slice(None)
        else:  # within windows the only map is the effective one
            recorded = self.stage2 if stage == "stage2" else self.stage1
            maps = {name: map_ for name, map_ in vars(recorded).items() if map_ is not None}
        rows = {name: self._row(map_, stage, index, sample) for name, map_ in maps.items()}
        if stage == "effective" and self.signed:
            row = rows["positive"]
            rows = dict(positive=row.clip(min=0), negative=(-row).clip(min=0), differential=row)
        return rows

    @property
    def signed(self) -> bool:
        """Whether this attention has a negative stream in any stage."""
        return any(stage is not None and stage.negative is not None for stage in (self.stage1, self.stage2))

    def plot(
        self,
        image: Any = None,
        *,
        stage: str = "effective",
        head: int | None = None,
        query: Query = None,
        sample: int = 0,
        smooth: bool = False,
        figure: Any = None,
    ) -> Any:
        """Draws the map of a query over the image: both streams and their difference in a row. Needs matplotlib.

        Args:
            image: what the model saw: a tensor (3, H, W) or (B, 3, H, W), normalised or not, a PIL image or a file.
                What has another aspect than the grid is cropped at its centre. None for the maps alone.
            stage, query, sample: as in `on_grid`.
            head: index of a head; default the mean over the heads.
            smooth: interpolate between the cells.
            figure: a matplotlib figure or subfigure to draw into; default a new one.

        Returns:
            The figure: a notebook shows it, `savefig` writes it.

        Raises:
            ImportError: matplotlib is not installed; the message names the extra.
            ValueError, IndexError: as `on_grid`, or there is no such head, or the image is none.
        """
        from vca import drawing, plot

        rows = self.on_grid(stage, query, sample)
        heads = len(rows["positive"])
        if head is not None and not 0 <= head < heads:
            raise IndexError(f"head={head}: block {self.block} has heads 0 to {heads - 1}.")
        values = {name: row.mean(0) if head is None else row[head] for name, row in rows.items()}
        most = max(float(np.nanmax(values[name])) for name in ("positive", "negative") if name in values)
        if len(values) == 1:
            panels = [plot.Panel("Attention", values["positive"], 0, most)]
        else:
            limit = float(np.nanmax(np.abs(values["differential"])))
            first, second, third = TITLES[stage]
            panels = [
                plot.Panel(first, values["positive"], 0, most),
                plot.Panel(second, -values["negative"], -most, 0),
                plot.Panel(third, values["differential"], -limit, limit),
            ]
        shown = drawing.backdrop(image, self.grid_size or (1, 1), sample) if image is not None else None
        title = f"block {self.block}, {'mean of heads' if head is None else f'head {head}'}, query: "
        title += self._name_of(stage, query)
        return plot.panels(panels, shown, box=self._box(stage, query), title=title, smooth=smooth, figure=figure)

    def __repr__(self) -> str:
        count = self.stage1.positive.shape[1 if self.window_size is None else 2]
        parts = [f"block {self.block}", f"batch of {len(self.stage1.positive)}", f"{count} heads"]
        for grid, what in (
            (self.grid_size, "patches"),
            (self.token_grid, "contrast tokens" if self.signed else "tokens"),
            (self.key_grid, "keys"),
            (self.window_size, "windows"),
        ):
            parts += [f"{grid[0]}x{grid[1]} {what}"] if grid else []
        lambdas = [value for value in (self.lambda1, self.lambda2) if value is not None]
        parts += [f"lambda {', '.join(f'{float(value):.3f}' for value in lambdas)}"] if lambdas else []
        return f"<{self.kind} maps: {', '.join(parts)}>"

    # ---- Choosing a row

    def _pools(self, stage: str) -> bool:
        return stage == "stage1" and self.token_grid is not None

    def _index(self, stage: str, query: Query) -> int | slice:
        """The rows of a map that a query stands for."""
        grid = self.token_grid if self._pools(stage) else self.grid_size
        prefix = 0 if self._pools(stage) else self.num_prefix_tokens
        assert grid is not None
        if query is None:
            read = None if self._pools(stage) else self.readout
            return slice(prefix, None) if read is None else read.tokens
        if isinstance(query, int):
            if not 0 <= query < prefix + grid[0] * grid[1]:
                raise IndexError(f"query={query}: there are {prefix + grid[0] * grid[1]} rows, counted from 0.")
            return query
        row, column = query
        if not (0 <= row < grid[0] and 0 <= column < grid[1]):
            raise IndexError(f"query={(row, column)} is outside the {grid[0]}x{grid[1]} grid.")
        return prefix + row * grid[1] + column

    def _row(self, maps: Tensor, stage: str, index: int | slice, sample: int) -> np.ndarray:
        """The row of maps (B, ..., rows, keys) over the grid of the keys, in every head: (H, rows, columns)."""
        if not 0 <= sample < len(maps):
            raise IndexError(f"sample={sample}: {len(maps)} images were recorded.")
        chosen = maps[sample].detach()
        grid = self.token_grid if stage == "stage2" and self.token_grid else self.key_grid or self.grid_size
        assert grid is not None
        if (patches := self.window_patches) is not None:
            if isinstance(index, slice):
                raise ValueError(f"block {self.block} attends within windows: give a query, such as query=(0, 0).")
            window, slot = (patches == index).nonzero()[0].tolist()
            keys = patches[window]
            row = chosen.new_full((chosen.shape[1], grid[0] * grid[1]), torch.nan)
            row[:, keys[keys >= 0]] = chosen[window, :, slot, keys >= 0]
        else:
            row = chosen[:, index].mean(1) if isinstance(index, slice) else chosen[:, index]
        return row[:, -grid[0] * grid[1] :].unflatten(1, grid).float().cpu().numpy()

    def _box(self, stage: str, query: Query) -> tuple[float, float, float, float] | None:
        """Left, top, width and height of the query in parts of the image; None if it is no single place."""
        index = self._index(stage, query)
        prefix = 0 if self._pools(stage) else self.num_prefix_tokens
        grid, patches = (self.token_grid if self._pools(stage) else self.grid_size), self.grid_size
        if isinstance(index, slice) or index < prefix or grid is None or patches is None:
            return None
        place = divmod(index - prefix, grid[1])
        (top, bottom), (left, right) = (
            (at * n // m / n, -(-(at + 1) * n // m) / n) for at, m, n in zip(place, grid, patches, strict=True)
        )
        return left, top, right - left, bottom - top

    def _name_of(self, stage: str, query: Query) -> str:
        index = self._index(stage, query)
        if isinstance(index, slice):
            if self._pools(stage):
                return "the average contrast token"
            return "the average patch" if self.readout is None else self.readout.name
        grid = self.token_grid if self._pools(stage) else self.grid_size
        prefix = 0 if self._pools(stage) else self.num_prefix_tokens
        if index < prefix:
            return f"prefix token {index}"
        assert grid is not None
        return f"{'contrast token' if self._pools(stage) else 'patch'} {divmod(index - prefix, grid[1])}"
