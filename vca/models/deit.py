"""DeiT with Visual-Contrast Attention in every block (`vca_deit_*`). The baselines are timm's own `deit_*`."""

from timm.models import generate_default_cfgs, register_model

from vca.models.common import entry_point, imagenet_cfg
from vca.models.vit import FEATURES, ContrastVisionTransformer

SIZES = {
    "tiny": dict(embed_dim=192, depth=12, num_heads=3),
    "small": dict(embed_dim=384, depth=12, num_heads=6),
    "base": dict(embed_dim=768, depth=12, num_heads=12),
}
MODELS = tuple(f"vca_deit_{size}_patch16_224" for size in SIZES)

default_cfgs = generate_default_cfgs({name: imagenet_cfg(pool_size=None) for name in MODELS})

for _name, (_size, _spec) in zip(MODELS, SIZES.items(), strict=True):
    _spec = dict(_spec, attention="vca", token_grid=(7, 7), patch_size=16, img_size=224)
    _doc = f"DeiT-{_size}, patch 16, 224 px, with 7x7 contrast tokens."
    _create = entry_point(__name__, _name, ContrastVisionTransformer, _spec, FEATURES, _doc)
    globals()[_name] = register_model(_create)
