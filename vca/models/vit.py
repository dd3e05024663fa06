"""Vision transformers for small images, with Visual-Contrast Attention (`vca_vit_*`) or self-attention (`mhsa_vit_*`).

Names read `{attention}_vit_{size}_patch{patch}_{image size}`. They have no class token: the patches are averaged.
"""

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer

from vca.attention import VisualContrastAttention

SIZES = {
    "pico": dict(embed_dim=128, depth=6, num_heads=4),
    "nano": dict(embed_dim=192, depth=9, num_heads=6),
    "tiny": dict(embed_dim=192, depth=12, num_heads=3),
}
GEOMETRIES = [(2, 32), (4, 32), (4, 64), (8, 64)]
ATTENTION = ("vca", "mhsa")


class ContrastVisionTransformer(VisionTransformer):
    """timm's `VisionTransformer` with a choice of attention.

    Args:
        attention: "vca" for Visual-Contrast Attention in every block, "mhsa" for timm's self-attention.
        token_grid: rows and columns of the contrast tokens; default half the patch grid in each direction.
        tokens, dwc, stage2_softmax: see `vca.VisualContrastAttention`.
        **kwargs: arguments of timm's `VisionTransformer`.
    """

    def __init__(
        self,
        *,
        attention: str = "vca",
        token_grid: tuple[int, int] | None = None,
        tokens: str = "pool+emb",
        dwc: bool = True,
        stage2_softmax: str = "separate",
        **kwargs,
    ):
        if attention not in ATTENTION:
            raise ValueError(f"attention={attention!r} is unknown; choose one of {', '.join(ATTENTION)}.")
        super().__init__(**kwargs)
        if attention == "vca":
            grid_size = self.patch_embed.grid_size
            for depth, block in enumerate(self.blocks):
                block.attn = VisualContrastAttention(
                    self.embed_dim,
                    block.attn.num_heads,
                    grid_size=grid_size,
                    token_grid=token_grid or tuple(max(1, side // 2) for side in grid_size),
                    num_prefix_tokens=self.num_prefix_tokens,
                    depth=depth,
                    qkv_bias=block.attn.qkv.bias is not None,
                    proj_drop=block.attn.proj_drop.p,
                    tokens=tokens,
                    dwc=dwc,
                    stage2_softmax=stage2_softmax,
                )
            self.init_weights(needs_reset=False)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are not decayed, beside all of fewer than two dimensions."""
        layers = ((name, m) for name, m in self.named_modules() if isinstance(m, VisualContrastAttention))
        return super().no_weight_decay() | {f"{name}.{p}" for name, layer in layers for p in layer.no_weight_decay()}

    def set_input_size(self, img_size=None, patch_size=None) -> None:
        """Changes the image size: resamples the position embedding and tells every layer its new grid."""
        super().set_input_size(img_size=img_size, patch_size=patch_size)
        for layer in self.modules():
            if isinstance(layer, VisualContrastAttention):
                layer.grid_size = self.patch_embed.grid_size


def _entry_point(name: str, attention: str, size: str, patch: int, image: int):
    def create(pretrained: bool = False, **kwargs) -> ContrastVisionTransformer:
        args = dict(
            SIZES[size],
            attention=attention,
            patch_size=patch,
            img_size=image,
            class_token=False,
            global_pool="avg",
        )
        model = build_model_with_cfg(ContrastVisionTransformer, name, pretrained, **(args | kwargs))
        runtime = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "num_classes")
        model.model_args = {k: v for k, v in kwargs.items() if k not in runtime and not k.endswith("drop_rate")}
        return model

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"ViT-{size}, patch {patch}, {image} px, attention={attention!r}."
    return create


_VARIANTS = {
    f"{attention}_vit_{size}_patch{patch}_{image}": (attention, size, patch, image)
    for attention in ATTENTION
    for size in SIZES
    for patch, image in GEOMETRIES
}

default_cfgs = generate_default_cfgs(
    {
        name: dict(
            num_classes=1000,
            input_size=(3, image, image),
            pool_size=None,
            crop_pct=1.0,
            crop_mode="center",
            interpolation="bicubic",
            fixed_input_size=True,
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
            first_conv="patch_embed.proj",
            classifier="head",
        )
        for name, (_, _, _, image) in _VARIANTS.items()
    }
)

MODELS = tuple(_VARIANTS)
for _name, _variant in _VARIANTS.items():
    globals()[_name] = register_model(_entry_point(_name, *_variant))
