"""Recording attention maps: `with vca.record(model) as maps: model(x)`, then `maps[i].effective` and its parts."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn

from vca.layers.grid import GridBlock
from vca.layers.layer_maps import LayerMaps, StageMaps, WindowMaps, readout
from vca.recorded import Maps
from vca.taps import Tap, Watcher, attention_layers, chosen_layers, run_layer, tapped
from vca.timm_internals import FORWARD_OF_ATTENTION

__all__ = ["attention_layers", "record"]


class _Recording(Watcher):
    """One `record` block: which layers it wants, where they stand, and what they gave in the newest forward pass.

    Args:
        layers: the layers, each with `block` and `name` of its `LayerMaps`.
        model: `grid_size` and `num_prefix_tokens` of the layers that do not know theirs.
        watched: all modules that this recording taps.
        owner: the module with the classifier, or None.
    """

    keeps_maps = True

    def __init__(self, layers: dict[nn.Module, dict], model: dict, watched: set[nn.Module], owner: nn.Module | None):
        super().__init__(watched)
        self.layers = layers
        self.model = model
        self.owner = owner
        self.located: dict[nn.Module | None, dict] = {}
        self.maps = Maps()

    def add(self, layer: nn.Module, maps: LayerMaps) -> None:
        new = replace(maps, **self.layers[layer])
        if maps.grid_size is None:  # a layer of timm, which does not know where it stands
            found = self.model | (self.located.get(layer) or self.located.get(None, {}))
            shift_size = found.pop("shift_size", (0, 0))
            new = replace(new, **found)
            if isinstance(new, WindowMaps):
                new = replace(new, shift_size=shift_size)
                if (patches := new.window_patches) is not None:
                    attention = new.stage1.positive[0].unflatten(0, (-1, len(patches)))  # (B, windows, H, M, M)
                    new = replace(new, stage1=StageMaps(attention))
        with suppress(ValueError):  # it reads no row of a map
            new = replace(new, readout=readout(self.owner, new))
        self.maps[:] = sorted([m for m in self.maps if m.block != new.block] + [new], key=lambda m: m.block)


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
        recording.located[None] = dict(grid_size=tuple(patch_embed.dynamic_feat_size(x.shape[-2:])))
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
        ValueError: `model` has no attention layer that can be recorded, or a block index is out of range.
    """
    chosen = chosen_layers(model, blocks)
    owner = next((m for m in model.modules() if hasattr(m, "patch_embed")), None)
    patch_embed = getattr(owner, "patch_embed", None)
    whole = dict(
        grid_size=getattr(patch_embed, "grid_size", None), num_prefix_tokens=getattr(owner, "num_prefix_tokens", 0)
    )
    layers = {layer: dict(block=block, name=name) for block, name, layer in chosen}
    taps: list[Tap] = [(layer, "forward", run_layer) for layer in layers]
    taps += [
        (m, FORWARD_OF_ATTENTION, _note_block)
        for m in model.modules()
        if isinstance(m, SwinTransformerBlock | GridBlock) and m.attn in layers
    ]
    if patch_embed is not None and hasattr(patch_embed, "dynamic_feat_size"):
        taps.append((patch_embed, "forward", _note_image))
    recording = _Recording(layers, whole, {module for module, _, _ in taps}, owner)
    with tapped(recording, taps):
        yield recording.maps
