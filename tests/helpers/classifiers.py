"""Small models of every family of classifiers."""

import torch
from torch import nn

import vca
from vca.models import BASELINES

PAPER = {  # parameters, and GMACs at 224 px on the fast path
    "deit_tiny_patch16_224": (5_717_416, 1.2537),
    "vca_deit_tiny_patch16_224": (5_973_928, 1.2124),
    "deit_small_patch16_224": (22_050_664, 4.5989),
    "vca_deit_small_patch16_224": (22_556_008, 4.5162),
    "vca_deit_base_patch16_224": (87_570_664, 17.3985),
    "pvt_tiny": (13_227_240, 1.9264),
    "vca_pvt_tiny": (11_555_560, 2.0172),
    "pvt_small": (24_483_816, 3.8060),
    "vca_pvt_small": (20_593_704, 4.0228),
    "pvt_medium": (44_206_056, 6.6494),
    "vca_pvt_medium": (35_811_624, 7.1410),
    "swin_tiny_patch4_window7_224": (28_288_354, 4.4906),
    "vca_swin_tiny": (28_546_680, 4.5641),
    "swin_small_patch4_window7_224": (49_606_258, 8.7409),
    "vca_swin_small": (50_341_752, 8.9996),
    "swin_base_patch4_window7_224": (87_768_224, 15.4309),
    "vca_swin_base": (88_746_536, 15.7760),
    "cswin_tiny": (20_393_320, 4.3419),
    "vca_cswin_tiny": (20_413_928, 4.3122),
    "cswin_small": (34_643_304, 6.8007),
    "vca_cswin_small": (34_663_912, 6.7711),
}


OURS = sorted(set(PAPER) - set(BASELINES))


PYRAMID = dict(img_size=64, depths=(1, 2, 1, 1), mlp_ratios=(2, 2, 2, 2))


PVT = PYRAMID | dict(embed_dims=(8, 16, 16, 24), num_heads=(1, 2, 2, 3))


CSWIN = PYRAMID | dict(embed_dims=(16, 16, 32, 32), num_heads=(2, 2, 4, 4), split_sizes=(1, 2, 2, None))


SMALL = {
    "vca_deit_tiny_patch16_224": dict(img_size=64, embed_dim=32, depth=3, num_heads=2, token_grid=(2, 2)),
    "vca_pvt_tiny": PVT | dict(token_grid=(2, 2)),
    "pvt_tiny": PVT,
    "vca_swin_tiny": dict(
        img_size=64, embed_dim=16, depths=(1, 2, 1, 2), num_heads=(1, 2, 2, 4), token_grid=(2, 2), drop_path_rate=0
    ),
    "vca_cswin_tiny": CSWIN | dict(token_grid=(2, 2)),
    "cswin_tiny": CSWIN,
}


FAMILIES = sorted(SMALL)


def small(name: str, **overrides) -> nn.Module:
    torch.manual_seed(0)
    return vca.create_model(name, **(SMALL[name] | dict(num_classes=4) | overrides))


def images(model: nn.Module, count: int = 2) -> torch.Tensor:
    size = (model.in_chans, *model.patch_embed.img_size)
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(0))


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def on_meta(name: str, **overrides) -> nn.Module:
    with torch.device("meta"):
        return vca.create_model(name, **overrides).eval()
