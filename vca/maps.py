"""Recording attention maps: `with vca.record(model) as maps: model(x)`, then `maps[i].effective` and its parts."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

from timm.models.naflexvit import NaFlexVit
from torch import Tensor, nn

from vca.layers.grid import GridBlock
from vca.layers.layer_maps import GlobalMaps, LayerMaps, StageMaps, WindowMaps, readout
from vca.recorded import Maps
from vca.taps import Tap, Watcher, attention_layers, chosen_layers, run_layer, tapped
from vca.timm_internals import FORWARD_OF_ATTENTION, GRID_BLOCKS

__all__ = ["attention_layers", "record"]


class _Recording(Watcher):
    """One `record` block: which layers it wants, where they stand, and what they gave in the newest forward pass.

    Args:
        layers: the layers, each with `block` and `name` of its `LayerMaps`.
        owners: the model that each layer is part of, the innermost with a patch embedding, or None.
        watched: all modules that this recording taps.

    Attributes:
        located: `grid_size`, and `shift_size` of windows, that blocks and patch embeddings have noted on the way.
    """

    keeps_maps = True

    def __init__(
        self, layers: dict[nn.Module, dict], owners: dict[nn.Module, nn.Module | None], watched: set[nn.Module]
    ):
        super().__init__(watched)
        self.layers = layers
        self.owners = owners
        self.located: dict[nn.Module | None, dict] = {}
        self.maps = Maps()

    def add(self, layer: nn.Module, maps: LayerMaps) -> None:
        new, owner = replace(maps, **self.layers[layer]), self.owners[layer]
        if maps.grid_size is None:  # a layer of timm, which does not know where it stands
            patch_embed = getattr(owner, "patch_embed", None)
            found = self.located.get(layer) or self.located.get(patch_embed, {})
            shift_size = found.get("shift_size", (0, 0))
            grid_size = found.get("grid_size") or getattr(patch_embed, "grid_size", None)
            new = replace(new, grid_size=grid_size, num_prefix_tokens=getattr(owner, "num_prefix_tokens", 0))
            if isinstance(new, GlobalMaps) and grid_size is not None:
                new = replace(new, num_prefix_tokens=_prefix_tokens(new, grid_size))
            if isinstance(new, WindowMaps):
                new = replace(new, shift_size=shift_size)
                if (patches := new.window_patches) is not None:
                    attention = new.stage1.positive[0].unflatten(0, (-1, len(patches)))  # (B, windows, H, M, M)
                    new = replace(new, stage1=StageMaps(attention))
        if owner is not None:
            with suppress(ValueError):  # it reads no row of a map
                new = replace(new, readout=readout(owner, new))
        self.maps[:] = sorted([m for m in self.maps if m.block != new.block] + [new], key=lambda m: m.block)


def _prefix_tokens(maps: LayerMaps, grid_size: tuple[int, int]) -> int:
    """How many of a layer's keys stand before the patches of its model's grid: all prefix tokens, or none (CaiT)."""
    (rows, cols), prefix, keys = grid_size, maps.num_prefix_tokens, maps.stage1.positive.shape[-1]
    if keys - rows * cols not in (0, prefix):
        raise ValueError(
            f"{maps.name}: its {keys} tokens are not the {prefix} prefix tokens and {rows}x{cols} patches of the image."
            " Models that pool, merge or drop patches on the way cannot be recorded."
        )
    return keys - rows * cols


def _note_block(recordings: list[_Recording], block: nn.Module, x: Tensor) -> Tensor:
    """A block over a grid (B, Hg, Wg, C) knows where its attention stands."""
    for recording in recordings:
        recording.located[block.attn] = dict(
            grid_size=tuple(x.shape[1:3]), shift_size=getattr(block, "shift_size", (0, 0))
        )
    return getattr(type(block), FORWARD_OF_ATTENTION)(block, x)


def _note_image(recordings: list[_Recording], patch_embed: nn.Module, x: Tensor) -> Tensor:
    """The patch embedding of a ViT knows the grid of all its layers."""
    for recording in recordings:
        recording.located[patch_embed] = dict(grid_size=tuple(patch_embed.dynamic_feat_size(x.shape[-2:])))
    return type(patch_embed).forward(patch_embed, x)


@contextmanager
def record(model: nn.Module, blocks: Sequence[int] | None = None) -> Iterator[Maps]:
    """Records the attention maps of the forward passes that this thread runs inside the `with` block.

    The chosen layers take the path that materialises maps, and the fast path again on exit. Other threads that run or
    record the same model are not disturbed. A later forward pass replaces the maps of an earlier one.

    Args:
        model: a model or a single attention layer.
        blocks: indices of the attention layers to record, counted through the whole network; default all.

    Yields:
        A list that holds one `LayerMaps` per recorded layer, in order, once the model has run. It can draw itself:
        `maps.overview(image)`, `maps[3].plot(image)`.

    Raises:
        ValueError: `model` has no attention layer that can be recorded, a block index is out of range, or its patches
            are not those of one grid. The last may be known only when the model runs.
    """
    chosen = chosen_layers(model, blocks)
    if any(isinstance(module, NaFlexVit) for module in model.modules()):
        raise ValueError("a NaFlexVit cannot be recorded: its patches come from images of several sizes, not one grid.")
    models = {name: m for name, m in model.named_modules() if isinstance(getattr(m, "patch_embed", None), nn.Module)}
    layers, owners = {}, {}
    for block, name, layer in chosen:
        layers[layer] = dict(block=block, name=name)
        within = [outer for outer in models if not outer or f"{name}.".startswith(f"{outer}.")]
        owners[layer] = models[max(within, key=len)] if within else None
    taps: list[Tap] = [(layer, "forward", run_layer) for layer in layers]
    taps += [
        (m, FORWARD_OF_ATTENTION, _note_block)
        for m in model.modules()
        if isinstance(m, GRID_BLOCKS | GridBlock) and m.attn in layers
    ]
    patch_embeds = {owner.patch_embed for owner in owners.values() if owner is not None}
    taps += [(m, "forward", _note_image) for m in patch_embeds if hasattr(m, "dynamic_feat_size")]
    recording = _Recording(layers, owners, {module for module, _, _ in taps})
    with tapped(recording, taps):
        yield recording.maps
