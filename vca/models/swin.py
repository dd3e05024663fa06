"""Swin Transformer with Visual-Contrast Attention over the whole grid of its early stages (`vca_swin_*`).

The baselines are timm's own `swin_*_patch4_window7_224`. The last stage keeps its shifted windows.
"""

from collections.abc import Sequence

import torch
from timm.models import generate_default_cfgs, register_model
from timm.models.swin_transformer import SwinTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from vca.layers.factory import AttentionConfig
from vca.layers.grid import GridBlock
from vca.models.common import create_classifier, imagenet_cfg, note_input_size, undecayed
from vca.models.vit import check_dropout
from vca.timm_internals import window_sizes

TOKEN_GRIDS = [(3, 3), (4, 4), (7, 7)]


class ContrastSwinTransformer(SwinTransformer):
    """timm's `SwinTransformer` with a choice of attention, over the whole grid, in all stages but the last.

    Args:
        **kwargs: those of timm's `SwinTransformer`, and the options of attention, by the names of
            `vca.layers.factory.AttentionConfig`: `attention` (default "vca"), `token_grid` or `num_tokens`, for all of
            these stages or one for each (default 3x3, 4x4, 7x7), `tokens`, `dwc`, `stage2_softmax` and `pooling`.
    """

    filter_checkpoint = staticmethod(checkpoint_filter_fn)

    def __init__(self, **kwargs):
        config = AttentionConfig.pop_from(kwargs, default="vca")
        super().__init__(**kwargs)
        exchange_attention(self, config)
        self.init_weights(needs_reset=False)

    def forward_features(self, x: Tensor) -> Tensor:
        """timm's. An empty batch, of which timm cannot cut windows, is an AssertionError."""
        torch._assert(x.shape[0] > 0, "the batch is empty: a Swin needs at least one image.")
        return super().forward_features(x)

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
            window_size = window_sizes(self)
        super().set_input_size(img_size, patch_size, window_size, window_ratio, always_partition)
        note_input_size(self, patch_size=self.patch_embed.patch_size[0], window_size=window_sizes(self))


def exchange_attention(model: SwinTransformer, config: AttentionConfig, *, stages: Sequence[int] | None = None) -> None:
    """Gives the blocks of `stages`, default all but the last, a new attention layer over their whole grid."""
    count = len(model.layers)
    stages = range(count - 1) if stages is None else [stage % count for stage in stages]
    grids = config.token_grids([TOKEN_GRIDS[min(stage, 2)] for stage in stages])
    depths = [len(layer.blocks) for layer in model.layers]
    new = {}
    for stage, token_grid in zip(stages, grids, strict=True):
        for index, block in enumerate(model.layers[stage].blocks):
            check_dropout(sum(depths[:stage]) + index, block.attn)
            new[stage, index] = config.create(
                block.dim,
                block.attn.num_heads,
                grid_size=model.layers[stage].output_resolution,
                token_grid=token_grid,
                depth=sum(depths[:stage]) + index,
                qkv_bias=block.attn.qkv.bias is not None,
                proj_drop=block.attn.proj_drop.p,
            )
    for (stage, index), attention in new.items():
        block = model.layers[stage].blocks[index]
        parts = block.norm1, attention, block.drop_path1, block.norm2, block.mlp, block.drop_path2
        model.layers[stage].blocks[index] = GridBlock(*parts)


FEATURES = dict(flatten_sequential=True, out_indices=(0, 1, 2, 3))
SHARED = dict(patch_size=4, window_size=7, img_size=224, attention="vca")
TINY = dict(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), **SHARED)
SMALL = dict(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24), **SHARED)
BASE = dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), **SHARED)
default_cfgs = generate_default_cfgs(
    {f"vca_swin_{size}": imagenet_cfg(classifier="head.fc") for size in ("tiny", "small", "base")}
)
MODELS = tuple(default_cfgs)


@register_model
def vca_swin_tiny(pretrained: bool = False, **kwargs) -> nn.Module:
    """Swin-Tiny, 224 px, with 3x3, 4x4 and 7x7 contrast tokens in stages 1 to 3."""
    return create_classifier(ContrastSwinTransformer, "vca_swin_tiny", pretrained, FEATURES, TINY, kwargs)


@register_model
def vca_swin_small(pretrained: bool = False, **kwargs) -> nn.Module:
    """Swin-Small, 224 px, with 3x3, 4x4 and 7x7 contrast tokens in stages 1 to 3."""
    return create_classifier(ContrastSwinTransformer, "vca_swin_small", pretrained, FEATURES, SMALL, kwargs)


@register_model
def vca_swin_base(pretrained: bool = False, **kwargs) -> nn.Module:
    """Swin-Base, 224 px, with 3x3, 4x4 and 7x7 contrast tokens in stages 1 to 3."""
    return create_classifier(ContrastSwinTransformer, "vca_swin_base", pretrained, FEATURES, BASE, kwargs)
