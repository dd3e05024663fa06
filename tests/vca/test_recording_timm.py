"""Attention of timm's that is recorded, or refused: its own kinds, and models within wrappers."""

import pytest
import timm
import torch
from torch import nn

import vca
from tests.helpers.kinds import images, randomized

TINY = dict(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=3)
SWIN = dict(img_size=64, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 2), num_classes=3)
MODELS = {
    "eva_giant_patch14_224": TINY,
    "eva02_tiny_patch14_224": TINY,
    "vit_small_patch16_dinov3": TINY,
    "vit_small_patch16_rope_mixed_224": TINY,
    "beit_base_patch16_224": TINY,
    "beitv2_base_patch16_224": TINY | dict(use_rel_pos_bias=False, use_shared_rel_pos_bias=True),
    "cait_xxs24_224": TINY,
    "swinv2_tiny_window8_256": SWIN,
}


def timm_model(name: str, **overrides) -> nn.Module:
    torch.manual_seed(0)
    small = dict(token_grid=(2, 2)) if name.startswith("vca") else {}
    return randomized(timm.create_model(name, **(MODELS.get(name, TINY) | small | overrides))).eval()


def tail(layer: nn.Module, joined: torch.Tensor) -> torch.Tensor:
    """What a layer does with the heads' joined outputs."""
    return layer.proj(getattr(layer, "norm", nn.Identity())(joined))


@pytest.mark.parametrize("name", MODELS)
def test_maps_times_values_are_the_output_of_the_layer(name):
    model = timm_model(name)
    seen, x = {}, images(model)
    layers = vca.maps.attention_layers(model)
    hooks = [
        layer.register_forward_hook(lambda layer, args, y, name=name: seen.update({name: (layer, args[0], y)}))
        for name, layer in layers
    ]
    with torch.no_grad():
        want = model(x)
        for hook in hooks:
            hook.remove()
        with vca.record(model) as maps:
            torch.testing.assert_close(model(x), want, rtol=0, atol=1e-5)
        assert [record.name for record in maps] == [name for name, _ in layers] == list(seen)
        for record in maps:
            layer, layer_input, output = seen[record.name]
            effective, values = record.effective, record.values
            if record.kind == "window":
                width = layer_input.shape[-1]
                v = nn.functional.linear(layer_input, layer.qkv.weight[2 * width :], layer.v_bias)
                effective, values = effective.flatten(0, 1), v.unflatten(-1, (layer.num_heads, -1)).transpose(1, 2)
                grid = record.window_patches[record.window_patches >= 0]
                assert sorted(grid.tolist()) == list(range(record.grid_size[0] * record.grid_size[1]))
            else:
                torch.testing.assert_close(effective @ values, record.gathered, rtol=0, atol=1e-5)
                assert effective.shape[-1] == record.num_prefix_tokens + 16 and record.grid_size == (4, 4)
            got = tail(layer, (effective @ values).transpose(1, 2).flatten(2))
            torch.testing.assert_close(got, output, rtol=0, atol=1e-5)
            if record.kind != "talking_heads":
                torch.testing.assert_close(effective.sum(-1), torch.ones(effective.shape[:-1]), rtol=0, atol=1e-5)


def test_a_kind_says_what_it_is_and_whose_tokens_it_has():
    with torch.no_grad(), vca.record(model := timm_model("cait_xxs24_224")) as maps:
        model(images(model))
    assert [(r.kind, r.num_prefix_tokens) for r in maps] == [("talking_heads", 0)] * 2 + [("class", 1)] * 2
    assert maps[-1].effective.shape == (2, 2, 1, 17)
    with torch.no_grad(), vca.record(model := timm_model("vit_small_patch16_dinov3")) as maps:
        model(images(model))
    assert {(r.kind, r.num_prefix_tokens) for r in maps} == {("mhsa", 5)}
    with pytest.raises(ValueError, match="do not all work on the same tokens"):
        vca.attribution.rollout(timm_model("cait_xxs24_224"), images(model), torch.tensor([0, 0]))


def test_heads_of_rotary_attention_are_muted():
    model = timm_model("eva02_tiny_patch14_224")
    with torch.no_grad(), vca.intervene(model, mute=[1]), vca.record(model) as maps:
        changed = model(images(model))
    assert all(not r.effective[:, 1].any() and r.effective[:, 0].any() for r in maps)
    assert not torch.allclose(changed, model(images(model)))


def test_models_without_one_grid_are_refused():
    pit = timm.create_model("pit_ti_224", base_dims=(8, 8, 8), depth=(1, 1, 1), heads=(2, 2, 2)).eval()
    with pytest.raises(ValueError, match=r"730 tokens are not the 0 prefix tokens and 27x27 patches"), vca.record(pit):
        pit(torch.randn(1, 3, 224, 224))
    naflex = timm.create_model("naflexvit_base_patch16_gap", embed_dim=24, depth=1, num_heads=2)
    with pytest.raises(ValueError, match="a NaFlexVit cannot be recorded"), vca.record(naflex):
        pass
    dropping = timm.create_model("vit_tiny_patch16_224", **TINY, patch_drop_rate=0.5).train()
    with pytest.raises(ValueError, match="9 tokens are not the 1 prefix tokens and 4x4 patches"), vca.record(dropping):
        dropping(torch.randn(1, 3, 32, 32))


class Behind(nn.Module):
    """A user's model: two backbones of different grids behind a normalisation."""

    def __init__(self):
        super().__init__()
        self.near, self.far = timm_model("vit_tiny_patch16_224"), timm_model("vit_tiny_patch16_224", patch_size=16)

    def forward(self, x):
        return self.near(x / 2) + self.far(x)


@pytest.fixture
def process_group():
    """A process on its own, as torchrun starts it."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def recorded(model: nn.Module, x: torch.Tensor) -> list[vca.LayerMaps]:
    with vca.record(model) as maps:
        model(x)
    return maps


def test_a_users_own_module_may_hold_several_models():
    model, x = Behind().eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        maps = recorded(model, x)
        alone = recorded(model.near, x / 2) + recorded(model.far, x)
    assert [record.grid_size for record in maps] == [(4, 4)] * 2 + [(2, 2)] * 2
    assert [record.name for record in maps[::2]] == ["near.blocks.0.attn", "far.blocks.0.attn"]
    assert all(torch.equal(a.effective, b.effective) for a, b in zip(maps, alone, strict=True))
    assert all(record.readout.name == "the class token" for record in maps)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vca_deit_tiny_patch16_224"])
def test_recording_within_wrappers_and_inference_mode(name, process_group):
    model = timm_model(name, depth=1)
    x = images(model)
    with torch.no_grad():
        want = [record.effective for record in recorded(model, x)]
    wrappers = [
        nn.parallel.DistributedDataParallel(model),
        torch.compile(model, backend="eager"),
        nn.Sequential(nn.Identity(), model),
    ]
    for wrapped in wrappers:
        with torch.no_grad():
            before = wrapped(x)
            for _ in range(2):
                got = [record.effective for record in recorded(wrapped, x)]
                assert len(got) == 1 and all(torch.allclose(a, b, atol=1e-6) for a, b in zip(got, want, strict=True))
            assert torch.equal(wrapped(x), before)
    with torch.inference_mode():
        got = [record.effective for record in recorded(model, x)]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(got, want, strict=True))
