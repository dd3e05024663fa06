"""DeiT with Visual-Contrast Attention in every block (`vca_deit_*`). The baselines are timm's own `deit_*`."""

from timm.models import generate_default_cfgs, register_model
from torch import nn

from vca.models.common import create_classifier, imagenet_cfg
from vca.models.vit import FEATURES, ContrastVisionTransformer

TINY = dict(embed_dim=192, depth=12, num_heads=3)
SMALL = dict(embed_dim=384, depth=12, num_heads=6)
BASE = dict(embed_dim=768, depth=12, num_heads=12)

default_cfgs = generate_default_cfgs(
    {
        "vca_deit_tiny_patch16_224": imagenet_cfg(pool_size=None),
        "vca_deit_small_patch16_224": imagenet_cfg(pool_size=None),
        "vca_deit_base_patch16_224": imagenet_cfg(pool_size=None),
    }
)
MODELS = tuple(default_cfgs)


def _create(name: str, pretrained: bool, size: dict, arguments: dict) -> nn.Module:
    spec = dict(size, attention="vca", token_grid=(7, 7), patch_size=16, img_size=224)
    return create_classifier(ContrastVisionTransformer, name, pretrained, FEATURES, spec, arguments)


@register_model
def vca_deit_tiny_patch16_224(pretrained: bool = False, **kwargs) -> nn.Module:
    """DeiT-Tiny, patch 16, 224 px, with 7x7 contrast tokens."""
    return _create("vca_deit_tiny_patch16_224", pretrained, TINY, kwargs)


@register_model
def vca_deit_small_patch16_224(pretrained: bool = False, **kwargs) -> nn.Module:
    """DeiT-Small, patch 16, 224 px, with 7x7 contrast tokens."""
    return _create("vca_deit_small_patch16_224", pretrained, SMALL, kwargs)


@register_model
def vca_deit_base_patch16_224(pretrained: bool = False, **kwargs) -> nn.Module:
    """DeiT-Base, patch 16, 224 px, with 7x7 contrast tokens."""
    return _create("vca_deit_base_patch16_224", pretrained, BASE, kwargs)
