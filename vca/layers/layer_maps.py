"""What an attention layer records of one forward pass: its maps, one class for each family of attention.

Shapes: B batch, H heads, d channels of a head, T = P + N tokens (P prefix tokens, then N patches), n contrast tokens.
"""

from dataclasses import dataclass, field

from torch import Tensor, nn

from vca import functional as VF
from vca.layers.pictured import Pictured


@dataclass(frozen=True, repr=False)
class StageMaps:
    """The maps of one stage. Rows are queries, columns keys; streams an attention kind lacks are None."""

    positive: Tensor
    negative: Tensor | None = None
    differential: Tensor | None = None

    @property
    def applied(self) -> Tensor:
        """The map that multiplies the values: the differential one, or the positive one of a single stream."""
        return self.positive if self.differential is None else self.differential

    def __repr__(self) -> str:
        streams = [name for name, map_ in vars(self).items() if map_ is not None]
        return f"<{', '.join(streams)}: {tuple(self.positive.shape)}>"


@dataclass(frozen=True)
class Readout:
    """What a classifier reads of the tokens of a layer.

    Attributes:
        name: what it reads, in words, such as "the class token".
        tokens: which of the T tokens are read, and averaged if they are several.
        num_prefix_tokens: P, the tokens before the patches.
        grid_size: rows and columns (Hg, Wg) of the patches.
    """

    name: str
    tokens: slice
    num_prefix_tokens: int
    grid_size: tuple[int, int]

    def rows(self, maps: Tensor) -> Tensor:
        """The row of maps (..., T, T) that is read, over the patches: (..., Hg, Wg)."""
        return self._over_patches(maps[..., self.tokens, :])

    def effective(self, layer: "LayerMaps") -> Tensor:
        """The row of its effective map that is read, over the patches: (B, H, Hg, Wg)."""
        return self._over_patches(layer.effective_rows(self.tokens))

    def _over_patches(self, rows: Tensor) -> Tensor:
        return rows[..., self.num_prefix_tokens :].mean(-2).unflatten(-1, self.grid_size)


class _Lacking(Pictured):
    """What a family of attention lacks is None; its own class of records says what it has."""

    token_grid: tuple[int, int] | None = None
    stage2: StageMaps | None = None
    row_scale1: Tensor | None = None
    row_scale2: Tensor | None = None
    lambda1: Tensor | None = None
    lambda2: Tensor | None = None
    values: Tensor | None = None
    gathered: Tensor | None = None
    key_grid: tuple[int, int] | None = None
    window_size: tuple[int, int] | None = None
    shift_size: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True, repr=False)
class LayerMaps(_Lacking):
    """The attention maps of one layer for one forward pass. A picture can be drawn from this record alone.

    Each family of attention has a subclass with what it has beyond this; what a family lacks is None.

    Attributes:
        kind: the kind of attention, such as "vca"; see `vca.layers.factory.KINDS`; and "sr", "window", "stripes", and
            CaiT's "talking_heads", whose maps are mixed after the softmax, and "class", with the class token's row.
        stage1: the maps of the only stage, or of the first of two.
        block: index of the layer among all attention layers of the model.
        name: its name in the model.
        grid_size: rows and columns of the patches, if the model says.
        num_prefix_tokens: P.
        readout: what the model's classifier reads of this layer's tokens, if it is known.
    """

    kind: str
    stage1: StageMaps
    block: int = 0
    name: str = ""
    grid_size: tuple[int, int] | None = None
    num_prefix_tokens: int = 0
    readout: Readout | None = None

    @property
    def effective(self) -> Tensor:
        """The exact map from every token (row) to every token it draws from, computed on demand.

        The heads' output before the depthwise convolution and `proj` is E v, times the gains of the layer's norms:
        (E v) * g1 * g2 for the VCA kinds, (E v) * g for "diff". To rounding.
        """
        return self.effective_rows(slice(None))

    def effective_rows(self, tokens: slice) -> Tensor:
        """The rows of `effective` of these tokens alone, which take no more than their share of its cost."""
        d1, r1 = self.stage1.applied, self.row_scale1
        if self.stage2 is None:
            return VF.effective_map(d1[..., tokens, :], None if r1 is None else r1[..., tokens, :])
        r2 = self.row_scale2
        d2 = self.stage2.applied[..., tokens, :]
        return VF.effective_map(d1, r1, d2, None if r2 is None else r2[..., tokens, :])


@dataclass(frozen=True, kw_only=True, repr=False)
class GlobalMaps(LayerMaps):
    """Self-attention over all tokens ("mhsa", "mhsa_dwc"): `stage1` has one map (B, H, T, T).

    Attributes:
        values: what the effective map multiplies, (B, H, keys, d): v, for the VCA kinds times g1.
        gathered: their product (B, H, queries, d), a part of the graph of the forward pass: the gradient of a score
            with respect to the effective map is its gradient with respect to `gathered`, times `values` transposed.
    """

    values: Tensor = field()
    gathered: Tensor = field()


@dataclass(frozen=True, kw_only=True, repr=False)
class DifferentialMaps(GlobalMaps):
    """Differential attention over all tokens ("diff"): `stage1` has three maps (B, H, T, T).

    Attributes:
        row_scale1: the row factors of the RMSNorm, (B, H, T, 1).
        lambda1: lambda, a scalar.
    """

    row_scale1: Tensor = field()
    lambda1: Tensor = field()


@dataclass(frozen=True, kw_only=True, repr=False)
class ReducedMaps(GlobalMaps):
    """Attention to keys on a coarser grid ("sr"): `stage1` has one map (B, H, N, keys).

    Attributes:
        key_grid: rows and columns of the keys.
    """

    key_grid: tuple[int, int] = field()


@dataclass(frozen=True, kw_only=True, repr=False)
class TwoStageMaps(GlobalMaps):
    """Attention through n pooled tokens ("agent"): `stage1` has maps (B, H, n, T), `stage2` (B, H, T, n).

    Attributes:
        token_grid: rows and columns of the n pooled tokens.
    """

    stage2: StageMaps = field()
    token_grid: tuple[int, int] = field()


@dataclass(frozen=True, kw_only=True, repr=False)
class ContrastMaps(TwoStageMaps):
    """Visual-Contrast Attention ("vca", "vca_stage1", "vca_stage2").

    Attributes:
        row_scale1, row_scale2: the row factors of both RMSNorms, (B, H, n, 1) and (B, H, T, 1).
        lambda1, lambda2: the lambda of each stage, a scalar; None for a stage that is not differential.
    """

    row_scale1: Tensor = field()
    row_scale2: Tensor = field()
    lambda1: Tensor | None = None
    lambda2: Tensor | None = None


@dataclass(frozen=True, kw_only=True, repr=False)
class WindowMaps(LayerMaps):
    """Attention within windows ("window", "stripes"): `stage1` has one map (B, windows, H, M, M).

    Attributes:
        window_size: rows and columns of a window.
        shift_size: by how much the grid is rolled up and left before it is cut.
    """

    window_size: tuple[int, int] = field()
    shift_size: tuple[int, int] = (0, 0)

    @property
    def window_patches(self) -> Tensor | None:
        """Indices (windows, M) into the row-major grid, -1 where a window is padded; None without a grid."""
        if self.grid_size is None:
            return None
        return VF.window_patches(self.grid_size, self.window_size, self.shift_size)


def readout(model: nn.Module, layer: LayerMaps) -> Readout:
    """What a classifier reads of the tokens of a layer: the class token, or the average of the patches.

    timm's distilled models average what a class and a distillation token say. `model` may be one in a wrapper.

    Raises:
        ValueError: it reads something else, such as the maximum over the patches.
    """
    prefix = layer.num_prefix_tokens
    model = next((m for m in model.modules() if hasattr(m, "patch_embed")), model)
    pool = getattr(model, "global_pool", None)
    if pool == "token":
        if getattr(model, "head_dist", None) is not None:
            name, tokens = "the average of the class token and the distillation token", slice(0, 2)
        else:
            name, tokens = "the class token", slice(0, 1)
    elif pool == "avg" and getattr(model, "pool_include_prefix", False):
        name, tokens = "the average token", slice(0, None)
    elif pool == "avg":
        name, tokens = "the average patch", slice(prefix, None)
    else:
        raise ValueError(f"what this model's classifier reads is no row of a map: it pools with {pool!r}.")
    if layer.grid_size is None:
        raise ValueError("this layer works on no grid of patches.")
    return Readout(name, tokens, prefix, layer.grid_size)
