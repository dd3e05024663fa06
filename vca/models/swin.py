"""Swin Transformer with Visual-Contrast Attention over the whole grid of its early stages (`vca_swin_tiny`).

The baseline is timm's own `swin_tiny_patch4_window7_224`. The last stage keeps its shifted windows.
"""

from collections.abc import Sequence

from timm.models import generate_default_cfgs, register_model
from timm.models.swin_transformer import SwinTransformer

from vca.layers.factory import check_kind, create_attention, token_grids
from vca.layers.grid import GridBlock
from vca.models.common import entry_point, imagenet_cfg, note_input_size, undecayed

SIZES = {"vca_swin_tiny": dict(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24))}
TOKEN_GRIDS = [(3, 3), (4, 4), (7, 7)]


class ContrastSwinTransformer(SwinTransformer):
    """timm's `SwinTransformer` with a choice of attention, over the whole grid, in all stages but the last.

    Args:
        attention: one of `vca.layers.factory.KINDS`.
        token_grid: rows and columns of the contrast tokens, for all stages or one for each; default 3x3, 4x4, 7x7.
        num_tokens: their number, a square, instead of `token_grid`; for all stages or one for each.
        tokens, dwc, stage2_softmax, pooling: see `vca.VisualContrastAttention`.
        **kwargs: arguments of timm's `SwinTransformer`.
    """

    def __init__(
        self,
        *,
        attention: str = "vca",
        token_grid: tuple[int, int] | Sequence[tuple[int, int]] | None = None,
        num_tokens: int | Sequence[int] | None = None,
        tokens: str = "pool+emb",
        dwc: bool = True,
        stage2_softmax: str = "separate",
        pooling: str = "avg",
        **kwargs,
    ):
        check_kind(attention)
        super().__init__(**kwargs)
        exchange_attention(
            self,
            attention,
            token_grid=token_grid,
            num_tokens=num_tokens,
            tokens=tokens,
            dwc=dwc,
            stage2_softmax=stage2_softmax,
            pooling=pooling,
        )
        self.init_weights(needs_reset=False)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are not decayed, beside all of fewer than two dimensions."""
        return super().no_weight_decay() | undecayed(self)

    def set_input_size(
        self, img_size=None, patch_size=None, window_size=None, window_ratio=None, always_partition=None
    ):
        """Changes the image size; unlike in timm, the windows keep their size unless one is given.

        The preprocessing and the arguments that a checkpoint is rebuilt from follow.
        """
        if window_size is None and window_ratio is None:
            window_size = self._ref_window_sizes
        super().set_input_size(img_size, patch_size, window_size, window_ratio, always_partition)
        note_input_size(self, patch_size=self.patch_embed.patch_size[0], window_size=self._ref_window_sizes)


def exchange_attention(
    model: SwinTransformer,
    kind: str,
    *,
    stages: Sequence[int] | None = None,
    token_grid: tuple[int, int] | Sequence[tuple[int, int]] | None = None,
    num_tokens: int | Sequence[int] | None = None,
    **options,
) -> None:
    """Gives the blocks of `stages`, default all but the last, a new attention layer over their whole grid."""
    count = len(model.layers)
    stages = range(count - 1) if stages is None else [stage % count for stage in stages]
    grids = token_grids(token_grid, num_tokens, [TOKEN_GRIDS[min(stage, 2)] for stage in stages])
    depths = [len(layer.blocks) for layer in model.layers]
    new = {}
    for stage, token_grid in zip(stages, grids, strict=True):
        for index, block in enumerate(model.layers[stage].blocks):
            new[stage, index] = create_attention(
                kind,
                block.dim,
                block.attn.num_heads,
                grid_size=model.layers[stage].output_resolution,
                token_grid=token_grid,
                depth=sum(depths[:stage]) + index,
                qkv_bias=block.attn.qkv.bias is not None,
                proj_drop=block.attn.proj_drop.p,
                **options,
            )
    for (stage, index), attention in new.items():
        block = model.layers[stage].blocks[index]
        parts = block.norm1, attention, block.drop_path1, block.norm2, block.mlp, block.drop_path2
        model.layers[stage].blocks[index] = GridBlock(*parts)


FEATURES = dict(flatten_sequential=True, out_indices=(0, 1, 2, 3))
MODELS = tuple(SIZES)
default_cfgs = generate_default_cfgs({name: imagenet_cfg(classifier="head.fc") for name in MODELS})

for _name, _spec in SIZES.items():
    _spec = dict(_spec, attention="vca", patch_size=4, window_size=7, img_size=224)
    _doc = "Swin-T, 224 px, with 3x3, 4x4 and 7x7 contrast tokens in stages 1 to 3."
    _create = entry_point(__name__, _name, ContrastSwinTransformer, _spec, FEATURES, _doc)
    globals()[_name] = register_model(_create)
