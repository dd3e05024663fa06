"""Recording: what a record says, that it is exact, and that it disturbs nobody."""

import numpy as np
import pytest
import torch
from timm.layers import Attention
from torch import nn

import vca
from tests.helpers.reference import parameters, visual_contrast_attention
from tests.helpers.vits import (
    DIM,
    GEOMETRY,
    HEADS,
    OPTIONS,
    assert_fast_path,
    attention_layers,
    images,
    make_layer,
    make_timm_vit,
    make_vca_vit,
    names,
)

# --- exactness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=names)
def test_effective_map_reproduces_the_output_of_the_layer(options):
    layer = make_layer(**options)
    x = torch.randn(2, 32, DIM, dtype=torch.float64)
    with vca.record(layer) as maps:
        y = layer(x)
    (record,) = maps
    settings = {k: v for k, v in options.items() if k != "dwc"}
    want = visual_contrast_attention(parameters(layer), x, num_heads=HEADS, **GEOMETRY, **settings)

    effective = record.effective.detach()
    assert effective.shape == (2, HEADS, 32, 32)
    np.testing.assert_allclose(effective, want.effective, rtol=0, atol=1e-10)

    v = layer.qkv(x).detach()[..., 2 * DIM :].unflatten(-1, (HEADS, -1)).transpose(1, 2)
    gains = (layer.stage1.norm.weight * layer.stage2.norm.weight).detach()
    heads = (effective @ v * gains).transpose(1, 2).flatten(2)
    rebuilt = layer.proj(heads + torch.from_numpy(want.local)).detach()
    torch.testing.assert_close(rebuilt, y.detach(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("options", OPTIONS, ids=names)
def test_row_sums_and_rank(options):
    layer = make_layer(**options)
    with vca.record(layer) as maps, torch.no_grad():
        layer(torch.randn(2, 32, DIM, dtype=torch.float64))
    (record,) = maps
    one, two = record.stage1, record.stage2

    def assert_rows_sum_to(map_, value):
        sums = map_.sum(-1)
        torch.testing.assert_close(sums, torch.as_tensor(value, dtype=sums.dtype).expand_as(sums), rtol=0, atol=1e-12)

    assert one.positive.shape == one.negative.shape == one.differential.shape == (2, HEADS, 6, 32)
    assert two.positive.shape == two.negative.shape == two.differential.shape == (2, HEADS, 32, 6)
    for stream in (one.positive, one.negative, two.positive, two.negative):
        assert (stream >= 0).all()
    assert_rows_sum_to(one.positive, 1)
    assert_rows_sum_to(one.negative, 1)
    assert_rows_sum_to(one.differential, 1 - record.lambda1)
    if options["stage2_softmax"] == "joint":
        assert_rows_sum_to(two.positive + two.negative, 1)
    else:
        assert_rows_sum_to(two.positive, 1)
        assert_rows_sum_to(two.negative, 1)
        assert_rows_sum_to(two.differential, 1 - record.lambda2)
    torch.testing.assert_close(one.differential, one.positive - record.lambda1 * one.negative, rtol=0, atol=1e-14)
    torch.testing.assert_close(two.differential, two.positive - record.lambda2 * two.negative, rtol=0, atol=1e-14)
    assert (torch.linalg.matrix_rank(record.effective, rtol=1e-10) <= 6).all()


def manual_attention(layer: Attention, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Self-attention head by head: the maps (B, H, T, T) and the layer's output."""
    q, k, v = layer.qkv(x).chunk(3, dim=-1)
    d = q.shape[-1] // layer.num_heads
    maps, outputs = [], []
    for head in range(layer.num_heads):
        own = slice(head * d, (head + 1) * d)
        scores = layer.q_norm(q[..., own]) @ layer.k_norm(k[..., own]).transpose(1, 2) / d**0.5
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        maps.append(weights)
        outputs.append(weights @ v[..., own])
    return torch.stack(maps, dim=1), layer.proj(torch.cat(outputs, dim=-1))


@pytest.mark.parametrize(
    "overrides",
    [dict(), dict(reg_tokens=2), dict(qk_norm=True, reg_tokens=1), dict(class_token=False, global_pool="avg")],
    ids=["class token", "registers", "qk norm", "no prefix"],
)
def test_self_attention_of_a_timm_vit(overrides):
    model = make_timm_vit(**overrides).double()
    x = images().double()
    inputs = {}
    hooks = [
        layer.register_forward_pre_hook(lambda layer, args: inputs.update({layer: args[0]}))
        for layer in attention_layers(model)
    ]
    with torch.no_grad():
        outside = model(x)
        with vca.record(model) as maps:
            inside = model(x)
        torch.testing.assert_close(inside, outside, rtol=0, atol=1e-10)
        prefix = model.num_prefix_tokens
        length = prefix + 16
        assert [(r.kind, r.block, r.name) for r in maps] == [("mhsa", i, f"blocks.{i}.attn") for i in range(3)]
        for record, layer in zip(maps, attention_layers(model), strict=True):
            want, y = manual_attention(layer, inputs[layer])
            assert record.stage1.positive.shape == (2, 3, length, length)
            torch.testing.assert_close(record.stage1.positive, want, rtol=0, atol=1e-12)
            assert torch.equal(record.effective, record.stage1.positive)
            v = layer.qkv(inputs[layer])[..., 48:].unflatten(-1, (3, 8)).transpose(1, 2)
            rebuilt = layer.proj((record.effective @ v).transpose(1, 2).flatten(2))
            torch.testing.assert_close(rebuilt, y, rtol=0, atol=1e-10)
            assert (record.grid_size, record.num_prefix_tokens) == ((4, 4), prefix)
            assert record.stage1.negative is record.stage1.differential is record.stage2 is None
            assert record.lambda1 is record.lambda2 is record.token_grid is None
    for hook in hooks:
        hook.remove()


# --- the records -----------------------------------------------------------------------------------------------------


def test_records_can_be_read_without_the_model():
    model = make_vca_vit(class_token=True, global_pool="token", reg_tokens=1, token_grid=(2, 3), img_size=(16, 24))
    x = torch.randn(2, 3, 16, 24)
    with vca.record(model) as maps, torch.no_grad():
        assert maps == []
        model(x)
    assert len(maps) == 3
    for i, record in enumerate(maps):
        assert isinstance(record, vca.LayerMaps)
        assert (record.kind, record.block, record.name) == ("vca", i, f"blocks.{i}.attn")
        assert (record.grid_size, record.token_grid, record.num_prefix_tokens) == ((4, 6), (2, 3), 2)
        assert record.stage1.positive.shape == (2, 3, 6, 26)
        assert record.stage2.positive.shape == (2, 3, 26, 6)
        assert record.effective.shape == (2, 3, 26, 26)
        layer = model.blocks[i].attn
        for stage, value in ((layer.stage1, record.lambda1), (layer.stage2, record.lambda2)):
            first, second = stage.lambda_q1 @ stage.lambda_k1, stage.lambda_q2 @ stage.lambda_k2
            torch.testing.assert_close(value, first.exp() - second.exp() + layer.lambda_init)
    assert maps[0].lambda1 != maps[1].lambda1


def test_output_inside_the_record_equals_the_output_outside():
    model, x = make_vca_vit(), images()
    with torch.no_grad():
        outside = model(x)
        with vca.record(model):
            inside = model(x)
        torch.testing.assert_close(inside, outside)
        assert torch.equal(model(x), outside)


@pytest.mark.parametrize("make", [make_vca_vit, make_timm_vit])
@pytest.mark.parametrize(
    "blocks, want",
    [
        (None, [0, 1, 2]),
        ([1], [1]),
        ([-1], [2]),
        ([2, 0], [0, 2]),
        ([1, -2, 1], [1]),
        (range(2), [0, 1]),
        ((-3, -1), [0, 2]),
        ([], []),
    ],
    ids=str,
)
def test_blocks_choose_the_layers(make, blocks, want):
    model = make()
    with vca.record(model, blocks=blocks) as maps, torch.no_grad():
        tapped = [i for i, layer in enumerate(attention_layers(model)) if "forward" in vars(layer)]
        model(images())
    assert tapped == want, "a layer that was not asked for has left the fast path"
    assert [record.block for record in maps] == want
    assert [record.name for record in maps] == [f"blocks.{b}.attn" for b in want]


@pytest.mark.parametrize("blocks", [[3], [-4], [0, 7]], ids=str)
def test_blocks_out_of_range_are_refused(blocks):
    model = make_vca_vit()
    with (
        pytest.raises(ValueError, match="is out of range: the model has 3 attention layers"),
        vca.record(model, blocks),
    ):
        pytest.fail("entered")
    assert_fast_path(model)


def test_a_model_without_attention_is_refused():
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="Sequential has no attention layer that can be recorded"), vca.record(model):
        pytest.fail("entered")


def test_a_single_layer_is_a_model():
    layer = make_layer()
    x = torch.randn(1, 32, DIM, dtype=torch.float64)
    with vca.record(layer) as maps, torch.no_grad():
        y = layer(x)
    (record,) = maps
    assert (record.block, record.kind, record.grid_size, record.num_prefix_tokens) == (0, "vca", (5, 6), 2)
    with torch.no_grad():
        torch.testing.assert_close(y, layer(x), rtol=0, atol=1e-12)

    plain = make_timm_vit().blocks[0].attn
    with vca.record(plain) as maps, torch.no_grad():
        plain(torch.randn(1, 17, 24))
    assert maps[0].effective.shape == (1, 3, 17, 17)


# --- on and off ------------------------------------------------------------------------------------------------------


# --- a server's threads ----------------------------------------------------------------------------------------------
