"""Small vision transformers with Visual-Contrast Attention and with self-attention."""

import itertools

import torch
from timm.layers import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import vca
from vca import VisualContrastAttention

OPTIONS = [
    dict(zip(("dwc", "tokens", "stage2_softmax"), values, strict=True))
    for values in itertools.product((True, False), ("pool+emb", "emb", "pool"), ("separate", "joint"))
]


GEOMETRY = dict(grid_size=(5, 6), token_grid=(2, 3), num_prefix_tokens=2, depth=3)


HEADS, DIM = 3, 12


def names(options: dict) -> str:
    return "-".join(str(value) for value in options.values())


def randomized(module: nn.Module, scale: float = 0.3, seed: int = 5) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return module


def make_layer(**options) -> VisualContrastAttention:
    return randomized(VisualContrastAttention(DIM, HEADS, **GEOMETRY, **options).double())


def make_vca_vit(**overrides):
    arguments = dict(embed_dim=24, depth=3, num_heads=3, img_size=16, num_classes=5) | overrides
    model = vca.create_model("vca_vit_pico_patch4_32", **arguments)
    return randomized(model, 0.1).eval()


def make_timm_vit(**overrides) -> VisionTransformer:
    arguments = dict(img_size=16, patch_size=4, embed_dim=24, depth=3, num_heads=3, num_classes=5) | overrides
    return randomized(VisionTransformer(**arguments), 0.1).eval()


def images(count: int = 2, size: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def attention_layers(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, VisualContrastAttention | Attention)]


def assert_fast_path(model: nn.Module) -> None:
    assert not any("forward" in vars(layer) for layer in attention_layers(model)), "a layer is still tapped"
