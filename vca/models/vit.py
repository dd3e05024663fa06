"""Plain vision transformers with Visual-Contrast Attention (`vca_vit_*`) or self-attention (`mhsa_vit_*`).

Names read `{attention}_vit_{size}_patch{patch}_{image size}`. Those for small images have no class token: the
patches are averaged. `vit_small_patch14_224` is the architecture of DINOv2's ViT-S/14, to be converted from it.
"""

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import generate_default_cfgs, register_model
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from vca.layers.factory import check_kind, create_attention, token_grids
from vca.layers.grid import OnGrid, running_on
from vca.models.common import entry_point, note_input_size, undecayed

SIZES = {
    "pico": dict(embed_dim=128, depth=6, num_heads=4),
    "nano": dict(embed_dim=192, depth=9, num_heads=6),
    "tiny": dict(embed_dim=192, depth=12, num_heads=3),
}
GEOMETRIES = [(2, 32), (4, 32), (4, 64), (8, 64)]
DINOV2 = dict(embed_dim=384, depth=12, num_heads=6, init_values=1e-5, class_token=True, token_grid=(8, 8))
ATTENTION = ("vca", "mhsa")
FEATURES = dict(out_indices=3, feature_cls="getter")


class ContrastViT:
    """What a timm `VisionTransformer` needs beside its own methods if its attention must know the patch grid."""

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
        if token_grid and hasattr(self, "model_args"):
            self.model_args.pop("num_tokens", None)
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


class ContrastVisionTransformer(ContrastViT, VisionTransformer):
    """timm's `VisionTransformer` with a choice of attention.

    Args:
        attention: one of `vca.layers.factory.KINDS`, in every block.
        token_grid: rows and columns of the contrast tokens; default half the patch grid in each direction.
        num_tokens: their number, a square, instead of `token_grid`.
        tokens, dwc, stage2_softmax, pooling: see `vca.VisualContrastAttention`.
        **kwargs: arguments of timm's `VisionTransformer`.
    """

    def __init__(
        self,
        *,
        attention: str = "vca",
        token_grid: tuple[int, int] | None = None,
        num_tokens: int | None = None,
        tokens: str = "pool+emb",
        dwc: bool = True,
        stage2_softmax: str = "separate",
        pooling: str = "avg",
        **kwargs,
    ):
        check_kind(attention)
        super().__init__(**kwargs)
        if attention != "mhsa":
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


class ContrastVisionTransformerDistilled(ContrastViT, VisionTransformerDistilled):
    """timm's `VisionTransformerDistilled` after `vca.replace_attention`."""


def exchange_attention(
    model: VisionTransformer,
    kind: str,
    *,
    token_grid: tuple[int, int] | None = None,
    num_tokens: int | None = None,
    **options,
) -> None:
    """Gives every block of `model` a new, untrained attention layer of the width and heads of its old one."""
    grid_size = model.patch_embed.grid_size
    half = tuple(max(1, side // 2) for side in grid_size)
    (token_grid,) = token_grids(token_grid, num_tokens, [half])
    layers = [
        create_attention(
            kind,
            model.embed_dim,
            block.attn.num_heads,
            grid_size=grid_size,
            token_grid=token_grid,
            num_prefix_tokens=model.num_prefix_tokens,
            depth=depth,
            qkv_bias=block.attn.qkv.bias is not None,
            proj_drop=block.attn.proj_drop.p,
            **options,
        )
        for depth, block in enumerate(model.blocks)
    ]
    for block, layer in zip(model.blocks, layers, strict=True):
        block.attn = layer
        if isinstance(layer, OnGrid):
            layer.dynamic_grid = model.dynamic_img_size


_SMALL = {
    (attention, size, patch, image): dict(SIZES[size], class_token=False, global_pool="avg")
    for attention in ATTENTION
    for size in SIZES
    for patch, image in GEOMETRIES
}
_SPECS = _SMALL | {(attention, "small", 14, 224): DINOV2 for attention in ATTENTION}
_VARIANTS = {
    f"{attention}_vit_{size}_patch{patch}_{image}": (attention, size, patch, image)
    for attention, size, patch, image in _SPECS
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
            mean=(0.5, 0.5, 0.5) if image < 224 else IMAGENET_DEFAULT_MEAN,
            std=(0.5, 0.5, 0.5) if image < 224 else IMAGENET_DEFAULT_STD,
            first_conv="patch_embed.proj",
            classifier="head",
        )
        for name, (_, _, _, image) in _VARIANTS.items()
    }
)

MODELS = tuple(_VARIANTS)
for _name, _key in _VARIANTS.items():
    _attention, _size, _patch, _image = _key
    _spec = dict(_SPECS[_key], attention=_attention, patch_size=_patch, img_size=_image)
    _doc = f"ViT-{_size}, patch {_patch}, {_image} px, attention={_attention!r}."
    _create = entry_point(__name__, _name, ContrastVisionTransformer, _spec, FEATURES, _doc)
    globals()[_name] = register_model(_create)
