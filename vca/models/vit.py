"""Plain vision transformers with Visual-Contrast Attention (`vca_vit_*`) or self-attention (`mhsa_vit_*`).

Names read `{attention}_vit_{size}_patch{patch}_{image size}`. Those for small images have no class token: the patches
are averaged. `vit_small_patch14_224` is the architecture of DINOv2's ViT-S/14, to be converted from it.
"""

from collections.abc import Sequence

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import to_2tuple
from timm.models import generate_default_cfgs, register_model
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from vca.layers.factory import AttentionConfig
from vca.layers.grid import OnGrid, running_on
from vca.models.common import create_classifier, note_input_size, undecayed
from vca.timm_internals import creation_arguments

PICO = dict(embed_dim=128, depth=6, num_heads=4)
NANO = dict(embed_dim=192, depth=9, num_heads=6)
TINY = dict(embed_dim=192, depth=12, num_heads=3)
SMALL = dict(embed_dim=384, depth=12, num_heads=6)
MOST_TOKENS = 8  # contrast tokens in a direction unless asked for: more would make the cost quadratic again
FEATURES = dict(out_indices=3, feature_cls="getter")


class ContrastViT(VisionTransformer):
    """What a timm `VisionTransformer` needs beside its own methods if its attention must know the patch grid."""

    filter_checkpoint = staticmethod(checkpoint_filter_fn)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are not decayed, beside all of fewer than two dimensions."""
        return super().no_weight_decay() | undecayed(self)

    def set_input_size(self, img_size=None, patch_size=None) -> None:
        """Changes the image size: resamples the position embedding and tells every layer its new grid.

        The preprocessing and the arguments that a checkpoint is rebuilt from follow.
        """
        super().set_input_size(img_size=img_size, patch_size=patch_size)
        token_grid = {}
        for layer in self.modules():
            if isinstance(layer, OnGrid):
                layer.grid_size = self.patch_embed.grid_size
                token_grid = dict(token_grid=layer.token_grid) if layer.token_grid else {}
        if token_grid:
            for arguments in (getattr(self, "model_args", {}), creation_arguments(self)):
                arguments.pop("num_tokens", None)
        note_input_size(self, patch_size=self.patch_embed.patch_size, **token_grid)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Enables gradient checkpointing, for models of a fixed image size.

        Raises:
            ValueError: with `dynamic_img_size`, as the grid is not known any more when a block is computed again.
        """
        if enable and self.dynamic_img_size:
            raise ValueError("gradient checkpointing needs a fixed image size; build without dynamic_img_size.")
        super().set_grad_checkpointing(enable)

    def forward_features(self, x: Tensor, *args, **kwargs) -> Tensor:
        if not self.dynamic_img_size:
            return super().forward_features(x, *args, **kwargs)
        with running_on(self.patch_embed.dynamic_feat_size(x.shape[-2:])):
            return super().forward_features(x, *args, **kwargs)

    def forward_intermediates(self, x: Tensor, *args, **kwargs):
        if not self.dynamic_img_size:
            return super().forward_intermediates(x, *args, **kwargs)
        with running_on(self.patch_embed.dynamic_feat_size(x.shape[-2:])):
            return super().forward_intermediates(x, *args, **kwargs)


class ContrastVisionTransformer(ContrastViT):
    """timm's `VisionTransformer` with a choice of attention.

    Args:
        **kwargs: those of timm's `VisionTransformer`, and the options of attention in every block, by the names of
            `vca.layers.factory.AttentionConfig`: `attention` (default "vca"), `token_grid` or `num_tokens` (default
            half the patch grid in each direction, at most 8), `tokens`, `dwc`, `stage2_softmax` and `pooling`. And
            `blocks`, indices of those that have it (default all); the others have timm's self-attention.
    """

    def __init__(self, **kwargs):
        config = AttentionConfig.pop_from(kwargs, default="vca")
        blocks = kwargs.pop("blocks", None)
        super().__init__(**kwargs)
        if config.attention != "mhsa":
            exchange_attention(self, config, blocks=blocks)
            self.init_weights(needs_reset=False)


class ContrastVisionTransformerDistilled(ContrastViT, VisionTransformerDistilled):
    """timm's `VisionTransformerDistilled` after `vca.replace_attention`."""


def exchange_attention(
    model: VisionTransformer, config: AttentionConfig, *, blocks: Sequence[int] | None = None
) -> None:
    """Gives some blocks, default all, a new, untrained attention layer of the width and heads of their old one.

    Raises:
        ValueError: the arguments contradict one another, or the model has what the new layers would drop.
    """
    grid_size = model.patch_embed.grid_size
    (token_grid,) = config.token_grids([half_grid(grid_size)])
    there = range(len(model.blocks))
    chosen = there if blocks is None else blocks
    if not chosen or not set(chosen) <= set(there) or len(set(chosen)) < len(chosen):
        raise ValueError(f"blocks={blocks} must be different indices, from 0 to {there[-1]}.")
    for index, block in ((index, model.blocks[index]) for index in chosen):
        if not isinstance(getattr(block, "attn", None), nn.Module):
            raise ValueError(f"block {index} is a {type(block).__name__}, which has no attention layer to exchange.")
        check_dropout(index, block.attn)
    layers = {
        index: config.create(
            model.embed_dim,
            model.blocks[index].attn.num_heads,
            grid_size=grid_size,
            token_grid=token_grid,
            num_prefix_tokens=model.num_prefix_tokens,
            depth=index,
            qkv_bias=model.blocks[index].attn.qkv.bias is not None,
            proj_drop=model.blocks[index].attn.proj_drop.p,
        )
        for index in chosen
    }
    if isinstance(next(iter(layers.values())), OnGrid) and not isinstance(model.patch_drop, nn.Identity):
        raise ValueError(f"patch_drop_rate: attention={config.attention!r} needs all patches; leave it out.")
    for index, layer in layers.items():
        model.blocks[index].attn = layer
        if isinstance(layer, OnGrid):
            layer.dynamic_grid = model.dynamic_img_size


def half_grid(grid_size: Sequence[int]) -> tuple[int, int]:
    """Half a patch grid in each direction, at most `MOST_TOKENS`: the contrast tokens unless asked for."""
    rows, cols = (min(MOST_TOKENS, max(1, side // 2)) for side in grid_size)
    return rows, cols


def check_dropout(index: int, layer: nn.Module) -> None:
    """Refuses a layer with dropout of its maps, which the new layers do not have."""
    if layer.attn_drop.p:
        raise ValueError(
            f"block {index}: attention dropout ({layer.attn_drop.p}) would be lost, as the new attention has none; "
            "set attn_drop_rate=0."
        )


def _cfg(image: int, **more) -> dict:
    """timm's preprocessing of a model for images of that side."""
    shared = dict(num_classes=1000, input_size=(3, image, image), pool_size=None, crop_pct=1.0, crop_mode="center")
    shared |= dict(interpolation="bicubic", fixed_input_size=True, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    return shared | dict(first_conv="patch_embed.proj", classifier="head") | more


IMAGENET = dict(mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD)
default_cfgs = generate_default_cfgs(
    {
        "vca_vit_pico_patch2_32": _cfg(32),
        "vca_vit_pico_patch4_32": _cfg(32),
        "vca_vit_pico_patch4_64": _cfg(64),
        "vca_vit_pico_patch8_64": _cfg(64),
        "vca_vit_nano_patch2_32": _cfg(32),
        "vca_vit_nano_patch4_32": _cfg(32),
        "vca_vit_nano_patch4_64": _cfg(64),
        "vca_vit_nano_patch8_64": _cfg(64),
        "vca_vit_tiny_patch2_32": _cfg(32),
        "vca_vit_tiny_patch4_32": _cfg(32),
        "vca_vit_tiny_patch4_64": _cfg(64),
        "vca_vit_tiny_patch8_64": _cfg(64),
        "mhsa_vit_pico_patch2_32": _cfg(32),
        "mhsa_vit_pico_patch4_32": _cfg(32),
        "mhsa_vit_pico_patch4_64": _cfg(64),
        "mhsa_vit_pico_patch8_64": _cfg(64),
        "mhsa_vit_nano_patch2_32": _cfg(32),
        "mhsa_vit_nano_patch4_32": _cfg(32),
        "mhsa_vit_nano_patch4_64": _cfg(64),
        "mhsa_vit_nano_patch8_64": _cfg(64),
        "mhsa_vit_tiny_patch2_32": _cfg(32),
        "mhsa_vit_tiny_patch4_32": _cfg(32),
        "mhsa_vit_tiny_patch4_64": _cfg(64),
        "mhsa_vit_tiny_patch8_64": _cfg(64),
        "vca_vit_small_patch14_224": _cfg(224, **IMAGENET),
        "mhsa_vit_small_patch14_224": _cfg(224, **IMAGENET),
    }
)
MODELS = tuple(default_cfgs)


def _small(
    name: str, pretrained: bool, size: dict, patch: int, image: int, attention: str, arguments: dict
) -> nn.Module:
    """A ViT for small images: without a class token, the patches are averaged."""
    geometry = dict(patch_size=patch, img_size=image, class_token=False, global_pool="avg")
    spec = dict(size, attention=attention, **geometry)
    stored = arguments.get("pretrained_cfg")
    if pretrained and isinstance(stored, dict) and not {"token_grid", "num_tokens"} & set(arguments):
        trained_on = arguments.get("pretrained_model_args", {}).get("img_size") or stored["input_size"][-2:]
        patches = [side // arguments.get("patch_size", patch) for side in to_2tuple(trained_on)]
        arguments = arguments | dict(token_grid=half_grid(patches))  # at another image size, too
    return create_classifier(ContrastVisionTransformer, name, pretrained, FEATURES, spec, arguments)


def _dinov2_small(name: str, pretrained: bool, attention: str, arguments: dict) -> nn.Module:
    """The architecture of DINOv2's ViT-S/14 for images of 224 px, with 8x8 contrast tokens."""
    spec = dict(SMALL, attention=attention, patch_size=14, img_size=224)
    spec |= dict(class_token=True, init_values=1e-5, token_grid=(8, 8))
    return create_classifier(ContrastVisionTransformer, name, pretrained, FEATURES, spec, arguments)


@register_model
def vca_vit_pico_patch2_32(pretrained: bool = False, **kwargs) -> nn.Module:
    """ViT-Pico, patch 2, 32 px, with Visual-Contrast Attention."""
    return _small("vca_vit_pico_patch2_32", pretrained, PICO, 2, 32, "vca", kwargs)


@register_model
def vca_vit_pico_patch4_32(pretrained: bool = False, **kwargs) -> nn.Module:
    """ViT-Pico, patch 4, 32 px, with Visual-Contrast Attention."""
    return _small("vca_vit_pico_patch4_32", pretrained, PICO, 4, 32, "vca", kwargs)


@register_model
def vca_vit_pico_patch4_64(pretrained: bool = False, **kwargs) -> nn.Module:
    """ViT-Pico, patch 4, 64 px, with Visual-Contrast Attention."""
    return _small("vca_vit_pico_patch4_64", pretrained, PICO, 4, 64, "vca", kwargs)


@register_model
def vca_vit_pico_patch8_64(pretrained: bool = False, **kwargs) -> nn.Module:
    """ViT-Pico, patch 8, 64 px, with Visual-Contrast Attention."""
    return _small("vca_vit_pico_patch8_64", pretrained, PICO, 8, 64, "vca", kwargs)


@register_model
def vca_vit_nano_patch2_32(pretrained: bool = False, **kwargs) -> nn.Module:
    """ViT-Nano, patch 2, 32 px, with Visual-Contrast Attention."""
    return _small("vca_vit_nano_patch2_32", pretrained, NANO, 2, 32, "vca", kwargs)


@register_model
def vca_vit_nano_patch4_32(pretrained: bool = False, **kwargs) -> nn.Module:
    """ViT-Nano, patch 4, 32 px, with Visual-Contrast Attention."""
    return _small("vca_vit_nano_patch4_32", pretrained, NANO, 4, 32, "vca", kwargs)


@register_model
def vca_vit_nano_patch4_64(pretrained: bool = False, **kwargs) -> nn.Module:
    """ViT-Nano, patch 4, 64 px, with Visual-Contrast Attention."""
    return _small("vca_vit_nano_patch4_64", pretrained, NANO, 4, 64, "vca", kwargs)


@register_model
def vca_vit_nano_patch8_64(pretrained: bool = False, **kwargs) -> nn.Module:
    """ViT-Nano, patch 8, 64 px, with Visual-Contrast Attention."""
    return _small("vca_vit_nano_patch8_64", pretrained, NANO, 8, 64, "vca", kwargs)


@register_model
def vca_vit_tiny_patch2_32(pretrained: bool = False, **kwargs) -> nn.Module:
    """ViT-Tiny, patch 2, 32 px, with Visual-Contrast Attention."""
    return _small("vca_vit_tiny_patch2_32", pretrained, TINY, 2, 32, "vca", kwargs)


@register_model
def vca_vit_tiny_patch4_32(pretrained: bool = False, **kwargs) -> nn.Module:
    """ViT-Tiny, patch 4, 32 px, with Visual-Contrast Attention."""
    return _small("vca_vit_tiny_patch4_32", pretrained, TINY, 4, 32, "vca", kwargs)


@register_model
def vca_vit_tiny_patch4_64(pretrained: bool = False, **kwargs) -> nn.Module:
    """ViT-Tiny, patch 4, 64 px, with Visual-Contrast Attention."""
    return _small("vca_vit_tiny_patch4_64", pretrained, TINY, 4, 64, "vca", kwargs)


@register_model
def vca_vit_tiny_patch8_64(pretrained: bool = False, **kwargs) -> nn.Module:
    """ViT-Tiny, patch 8, 64 px, with Visual-Contrast Attention."""
    return _small("vca_vit_tiny_patch8_64", pretrained, TINY, 8, 64, "vca", kwargs)


@register_model
def mhsa_vit_pico_patch2_32(pretrained: bool = False, **kwargs) -> nn.Module:
    """ViT-Pico, patch 2, 32 px, with self-attention."""
    return _small("mhsa_vit_pico_patch2_32", pretrained, PICO, 2, 32, "mhsa", kwargs)


@register_model
def mhsa_vit_pico_patch4_32(pretrained: bool = False, **kwargs) -> nn.Module:
    """ViT-Pico, patch 4, 32 px, with self-attention."""
    return _small("mhsa_vit_pico_patch4_32", pretrained, PICO, 4, 32, "mhsa", kwargs)


@register_model
def mhsa_vit_pico_patch4_64(pretrained: bool = False, **kwargs) -> nn.Module:
    """ViT-Pico, patch 4, 64 px, with self-attention."""
    return _small("mhsa_vit_pico_patch4_64", pretrained, PICO, 4, 64, "mhsa", kwargs)


@register_model
def mhsa_vit_pico_patch8_64(pretrained: bool = False, **kwargs) -> nn.Module:
    """ViT-Pico, patch 8, 64 px, with self-attention."""
    return _small("mhsa_vit_pico_patch8_64", pretrained, PICO, 8, 64, "mhsa", kwargs)


@register_model
def mhsa_vit_nano_patch2_32(pretrained: bool = False, **kwargs) -> nn.Module:
    """ViT-Nano, patch 2, 32 px, with self-attention."""
    return _small("mhsa_vit_nano_patch2_32", pretrained, NANO, 2, 32, "mhsa", kwargs)


@register_model
def mhsa_vit_nano_patch4_32(pretrained: bool = False, **kwargs) -> nn.Module:
    """ViT-Nano, patch 4, 32 px, with self-attention."""
    return _small("mhsa_vit_nano_patch4_32", pretrained, NANO, 4, 32, "mhsa", kwargs)


@register_model
def mhsa_vit_nano_patch4_64(pretrained: bool = False, **kwargs) -> nn.Module:
    """ViT-Nano, patch 4, 64 px, with self-attention."""
    return _small("mhsa_vit_nano_patch4_64", pretrained, NANO, 4, 64, "mhsa", kwargs)


@register_model
def mhsa_vit_nano_patch8_64(pretrained: bool = False, **kwargs) -> nn.Module:
    """ViT-Nano, patch 8, 64 px, with self-attention."""
    return _small("mhsa_vit_nano_patch8_64", pretrained, NANO, 8, 64, "mhsa", kwargs)


@register_model
def mhsa_vit_tiny_patch2_32(pretrained: bool = False, **kwargs) -> nn.Module:
    """ViT-Tiny, patch 2, 32 px, with self-attention."""
    return _small("mhsa_vit_tiny_patch2_32", pretrained, TINY, 2, 32, "mhsa", kwargs)


@register_model
def mhsa_vit_tiny_patch4_32(pretrained: bool = False, **kwargs) -> nn.Module:
    """ViT-Tiny, patch 4, 32 px, with self-attention."""
    return _small("mhsa_vit_tiny_patch4_32", pretrained, TINY, 4, 32, "mhsa", kwargs)


@register_model
def mhsa_vit_tiny_patch4_64(pretrained: bool = False, **kwargs) -> nn.Module:
    """ViT-Tiny, patch 4, 64 px, with self-attention."""
    return _small("mhsa_vit_tiny_patch4_64", pretrained, TINY, 4, 64, "mhsa", kwargs)


@register_model
def mhsa_vit_tiny_patch8_64(pretrained: bool = False, **kwargs) -> nn.Module:
    """ViT-Tiny, patch 8, 64 px, with self-attention."""
    return _small("mhsa_vit_tiny_patch8_64", pretrained, TINY, 8, 64, "mhsa", kwargs)


@register_model
def vca_vit_small_patch14_224(pretrained: bool = False, **kwargs) -> nn.Module:
    """ViT-Small with LayerScale, patch 14, 224 px, with Visual-Contrast Attention."""
    return _dinov2_small("vca_vit_small_patch14_224", pretrained, "vca", kwargs)


@register_model
def mhsa_vit_small_patch14_224(pretrained: bool = False, **kwargs) -> nn.Module:
    """ViT-Small with LayerScale, patch 14, 224 px, with self-attention."""
    return _dinov2_small("mhsa_vit_small_patch14_224", pretrained, "mhsa", kwargs)
