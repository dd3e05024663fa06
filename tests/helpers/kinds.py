"""Small models with every kind of attention, and what their records must hold."""

import torch
from timm.layers import Attention, DiffAttention
from torch import nn

import vca
from vca.layers.agent import AgentAttention
from vca.layers.depthwise import DepthwiseConvAttention

CONTRAST = ("vca", "vca_stage1", "vca_stage2")


LAYERS = {"mhsa": Attention, "mhsa_dwc": DepthwiseConvAttention, "diff": DiffAttention, "agent": AgentAttention}


PYRAMID = dict(img_size=64, depths=(1, 1, 1, 1), mlp_ratios=(2, 2, 2, 2))


SMALL = {
    "vca_vit_pico_patch4_32": dict(img_size=(16, 24), embed_dim=24, depth=2, num_heads=2, reg_tokens=1),
    "vca_deit_tiny_patch16_224": dict(img_size=(64, 96), embed_dim=24, depth=2, num_heads=3, token_grid=(2, 3)),
    "vca_pvt_tiny": PYRAMID | dict(embed_dims=(8, 16, 16, 24), num_heads=(1, 2, 2, 3), token_grid=(2, 2)),
    "pvt_tiny": PYRAMID | dict(embed_dims=(8, 16, 16, 24), num_heads=(1, 2, 2, 3)),
    "vca_swin_tiny": dict(img_size=64, embed_dim=12, depths=(1, 2, 1, 2), num_heads=(1, 2, 2, 4), token_grid=(2, 2)),
    "vca_cswin_tiny": PYRAMID
    | dict(embed_dims=(16, 16, 32, 32), num_heads=(2, 2, 4, 4), split_sizes=(1, 2, 2, None), token_grid=(3, 2)),
    "cswin_tiny": PYRAMID
    | dict(embed_dims=(16, 16, 32, 32), num_heads=(2, 2, 4, 4), split_sizes=(2, 4, 1, None), img_size=(64, 128)),
}


BACKBONES = ("vca_vit_pico_patch4_32", "vca_deit_tiny_patch16_224", "vca_pvt_tiny", "vca_swin_tiny", "vca_cswin_tiny")


def randomized(module: nn.Module, scale: float = 0.2) -> nn.Module:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return module


def make(name: str, **overrides) -> nn.Module:
    return randomized(vca.create_model(name, **(SMALL[name] | dict(num_classes=3) | overrides))).eval()


def images(model: nn.Module, count: int = 2) -> torch.Tensor:
    size = model.patch_embed.img_size
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(0))


def kind_of(layer: nn.Module) -> str:
    return getattr(layer, "kind", None) or next(kind for kind, cls in LAYERS.items() if type(layer) is cls)


def in_windows(patches: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(B, N, C) -> (B, windows, M, C), zero where a window is padded."""
    return torch.cat([x, torch.zeros_like(x[:, :1])], dim=1)[:, patches]


def depthwise(convolution: nn.Conv2d, v: torch.Tensor, grid_size) -> torch.Tensor:
    return convolution(v.transpose(1, 2).unflatten(2, grid_size)).flatten(2).transpose(1, 2)


def rebuilt(record: vca.LayerMaps, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The output of `layer` for the input `x`, from the effective map, the values and what follows the attention."""
    heads = layer.num_heads
    effective = record.effective
    if record.kind == "window":
        dim = x.shape[-1]
        v = layer.qkv(x)[..., 2 * dim :].unflatten(-1, (heads, -1)).transpose(1, 2)
        out = effective.flatten(0, 1) @ v
        return layer.proj(out.transpose(1, 2).flatten(2))
    if record.kind == "stripes":
        v = in_windows(record.window_patches, x[:, :, 2])  # (B, stripes, M, C)
        out = (effective @ v.unflatten(-1, (heads, -1)).transpose(2, 3)).transpose(2, 3).flatten(3)
        out = out + depthwise(layer.lepe, v.flatten(0, 1), record.window_size).unflatten(0, v.shape[:2])
        joined = torch.empty(len(x), x.shape[1], x.shape[3], dtype=x.dtype)
        joined[:, record.window_patches.flatten()] = out.flatten(1, 2)
        return joined
    if record.kind == "sr":
        rows = x.transpose(1, 2).unflatten(2, record.grid_size)
        reduced = layer.norm(layer.sr(rows).flatten(2).transpose(1, 2)) if layer.sr else x
        v = layer.kv(reduced).chunk(2, dim=-1)[1]
    else:
        v = layer.qkv(x).chunk(3, dim=-1)[2]
    gains = 1
    if record.kind in CONTRAST:
        gains = layer.stage1.norm.weight * layer.stage2.norm.weight
    elif record.kind == "diff":
        gains = layer.sub_norm.weight
    out = (effective @ v.unflatten(-1, (heads, -1)).transpose(1, 2) * gains).transpose(1, 2).flatten(2)
    if getattr(layer, "dwc", None) is not None:
        prefix = record.num_prefix_tokens
        out[:, prefix:] += depthwise(layer.dwc, v[:, prefix:], record.grid_size)
    return layer.proj(out)


def tapped(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if {"forward", "_attn"} & set(vars(module))]


def assert_records_are_exact(model: nn.Module, x: torch.Tensor) -> list[vca.LayerMaps]:
    seen, hooks, before = {}, [], tapped(model)
    for name, layer in vca.maps.attention_layers(model):

        def note(layer, args, output, name=name):
            seen[name] = layer, args[0], output

        hooks.append(layer.register_forward_hook(note))
    with torch.no_grad():
        y = model(x)
        for hook in hooks:
            hook.remove()
        with vca.record(model) as maps:
            assert (model(x) - y).abs().max() < 1e-9
        assert [r.name for r in maps] == list(seen) and [r.block for r in maps] == list(range(len(maps)))
        for record in maps:
            layer, layer_input, output = seen[record.name]
            assert (rebuilt(record, layer, layer_input) - output).abs().max() < 1e-9, record.name
            if record.window_size is None:
                assert (record.effective @ record.values - record.gathered).abs().max() < 1e-9, record.name
        assert tapped(model) == before
    return maps
