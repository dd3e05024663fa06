"""The paper's classifiers: exact sizes and costs, structure, what timm asks of a model, image sizes, and learning."""

import inspect
from pathlib import Path

import pytest
import timm
import torch
from timm.layers import Attention
from timm.models.swin_transformer import SwinTransformerBlock
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import vca
from tests.helpers.classifiers import FAMILIES, OURS, PAPER, count, images, on_meta, small
from vca.layers.grid import GridBlock
from vca.models import CLASSIFIERS, cswin, deit, pvt, swin
from vca.models.cswin import CrossShapedAttention, StripeAttention
from vca.models.pvt import SpatialReductionAttention

# --- size and structure ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAPER)
def test_exact_parameters_and_multiply_adds(name):
    parameters, gmacs = PAPER[name]
    model = on_meta(name)
    assert count(model) == parameters
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        assert model(torch.empty(1, 3, 224, 224, device="meta")).shape == (1, 1000)
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmacs, rel=5e-4)


def added(dim: int, head_dim: int, tokens: int) -> int:
    """What a VCA layer has beyond self-attention: 2nC of embeddings, 10C of convolution, 10d of lambdas and gains."""
    return 2 * tokens * dim + 10 * dim + 10 * head_dim


PVT_STAGES = [(64, 64, 9, 8), (128, 64, 16, 4), (320, 64, 49, 2), (512, 64, 49, 1)]


def swin_stages(dim: int) -> list[int]:
    """Of each stage with VCA, for a block: what is added, less the table of relative positions."""
    widths = [(dim * 2**stage, tokens) for stage, tokens in enumerate((9, 16, 49))]
    return [added(width, 32, tokens) - 169 * width // 32 for width, tokens in widths]


DIFFERENCES = {  # docs/models.md: VCA model, baseline, blocks of each stage, and what changes in each
    **{
        f"vca_pvt_{size}": (
            f"pvt_{size}",
            depths,
            [added(c, d, n) - (r**2 * c**2 + 3 * c if r > 1 else 0) for c, d, n, r in PVT_STAGES],
        )
        for size, depths in dict(tiny=(2, 2, 2, 2), small=(3, 4, 6, 3), medium=(3, 4, 18, 3)).items()
    },
    "vca_swin_tiny": ("swin_tiny_patch4_window7_224", (2, 2, 6), swin_stages(96)),
    "vca_swin_small": ("swin_small_patch4_window7_224", (2, 2, 18), swin_stages(96)),
    "vca_swin_base": ("swin_base_patch4_window7_224", (2, 2, 18), swin_stages(128)),
    **{
        f"vca_cswin_{size}": (f"cswin_{size}", (2, 4), [added(c, 32, n) - 10 * c for c, n in ((64, 9), (128, 16))])
        for size in ("tiny", "small")
    },
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_the_size_of_a_vca_model_follows_from_its_baselines(name):
    baseline, blocks, changes = DIFFERENCES[name]
    difference = sum(count * change for count, change in zip(blocks, changes, strict=True))
    assert PAPER[name][0] - PAPER[baseline][0] == difference
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    assert all(f"{number:+,}" in page for number in (*changes, difference))


def test_names_are_registered_and_listed():
    assert set(PAPER) <= set(CLASSIFIERS) <= set(vca.list_models())
    assert set(deit.MODELS + pvt.MODELS + swin.MODELS + cswin.MODELS) == set(OURS)
    for name in OURS:
        entry = timm.models.model_entrypoint(name)
        assert entry.__name__ == name and inspect.getdoc(entry)


def test_structure_of_deit():
    for size, (dim, heads) in dict(tiny=(192, 3), small=(384, 6), base=(768, 12)).items():
        model = on_meta(f"vca_deit_{size}_patch16_224")
        assert (model.embed_dim, len(model.blocks), model.num_prefix_tokens, model.global_pool) == (dim, 12, 1, "token")
        for depth, block in enumerate(model.blocks):
            layer = block.attn
            assert (layer.num_heads, layer.grid_size, layer.token_grid) == (heads, (14, 14), (7, 7))
            assert layer.num_prefix_tokens == 1 and layer.dwc is not None and layer.qkv.bias is not None
            assert layer.lambda_init == vca.functional.lambda_init(depth)


def test_structure_of_pvt_stage_by_stage():
    for name in ("pvt_tiny", "vca_pvt_tiny"):
        model, depth = on_meta(name), 0
        assert isinstance(model.norm, nn.Identity) and not hasattr(model, "cls_token")
        embeds = [model.patch_embed, *(stage.downsample for stage in model.stages[1:])]
        assert [e.proj.kernel_size[0] for e in embeds] == [e.proj.stride[0] for e in embeds] == [4, 2, 2, 2]
        for i, stage in enumerate(model.stages):
            dim, heads, grid = (64, 128, 320, 512)[i], (1, 2, 5, 8)[i], (56, 28, 14, 7)[i]
            assert stage.pos_embed.shape == (1, grid, grid, dim) and len(stage.blocks) == 2
            for block in stage.blocks:
                layer = block.attn
                assert block.mlp.fc1.out_features == dim * (8, 8, 4, 4)[i]
                assert (layer.num_heads, layer.grid_size) == (heads, (grid, grid))
                assert block.norm1.eps == block.norm2.eps == 1e-6
                if name == "pvt_tiny":
                    ratio = (8, 4, 2, 1)[i]
                    assert type(layer) is SpatialReductionAttention and layer.ratio == ratio
                    assert (layer.sr is None) == (layer.norm is None) == (ratio == 1)
                    assert layer.sr is None or layer.sr.kernel_size == layer.sr.stride == (ratio, ratio)
                else:
                    assert layer.token_grid == ((3, 3), (4, 4), (7, 7), (7, 7))[i] and layer.dwc is not None
                    assert layer.lambda_init == vca.functional.lambda_init(depth)
                depth += 1
        assert depth == 8


def test_structure_of_swin_stage_by_stage():
    model, depth = on_meta("vca_swin_tiny"), 0
    for i, stage in enumerate(model.layers):
        for block in stage.blocks:
            if i < 3:
                assert type(block) is GridBlock and type(block.attn) is vca.VisualContrastAttention
                assert block.attn.grid_size == ((56, 56), (28, 28), (14, 14))[i]
                assert block.attn.token_grid == ((3, 3), (4, 4), (7, 7))[i]
                assert block.attn.lambda_init == vca.functional.lambda_init(depth)
            else:
                assert type(block) is SwinTransformerBlock and block.window_size == (7, 7)
            depth += 1
    tables = [name for name, _ in model.named_parameters() if "relative_position" in name]
    assert tables == [f"layers.3.blocks.{i}.attn.relative_position_bias_table" for i in range(2)]


def test_structure_of_cswin_stage_by_stage():
    for name in ("cswin_tiny", "vca_cswin_tiny"):
        model = on_meta(name)
        stem, merges = model.patch_embed.proj, [stage.downsample.proj for stage in model.stages[1:]]
        assert (stem.kernel_size, stem.stride, stem.padding) == ((7, 7), (4, 4), (2, 2))
        assert {(m.kernel_size, m.stride, m.padding) for m in merges} == {((3, 3), (2, 2), (1, 1))}
        assert [len(stage.blocks) for stage in model.stages] == [2, 4, 18, 1]
        assert isinstance(model.norm, nn.LayerNorm)
        for i, stage in enumerate(model.stages):
            dim, heads, grid = (64, 128, 256, 512)[i], (2, 4, 8, 16)[i], (56, 28, 14, 7)[i]
            assert stage.pos_embed is None
            for block in stage.blocks:
                layer = block.attn
                assert block.mlp.fc1.out_features == 4 * dim and layer.grid_size == (grid, grid)
                if name == "vca_cswin_tiny" and i < 2:
                    assert type(layer) is vca.VisualContrastAttention and layer.dwc is not None
                    assert (layer.num_heads, layer.token_grid) == (heads, ((3, 3), (4, 4))[i])
                    continue
                assert type(layer) is CrossShapedAttention
                if i == 3:
                    (branch,) = layer.branches
                    assert (branch.num_heads, branch.window_size((7, 7))) == (heads, (7, 7))
                else:
                    width = (1, 2, 7)[i]
                    assert [b.num_heads for b in layer.branches] == [heads // 2] * 2
                    windows = [b.window_size(b.grid_size) for b in layer.branches]
                    assert windows == [(grid, width), (width, grid)]


def test_stripes_equal_attention_with_a_mask():
    """A stripe attends to its own patches only: the same as attention over the whole grid with all others masked."""
    torch.manual_seed(0)
    grid, width = (4, 6), 2
    patch = torch.arange(24).view(grid)
    for vertical in (True, False):
        layer = StripeAttention(8, 2, grid_size=grid, width=width, vertical=vertical).double()
        nn.init.zeros_(layer.lepe.weight)
        nn.init.zeros_(layer.lepe.bias)
        qkv = torch.randn(2, 24, 3, 8, dtype=torch.float64)
        line = patch % 6 // width if vertical else patch // 6 // width
        same = line.flatten()[:, None] == line.flatten()
        q, k, v = qkv.unflatten(-1, (2, 4)).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1) / 2).masked_fill(~same, -torch.inf)
        want = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        torch.testing.assert_close(layer(qkv), want, rtol=0, atol=1e-12)


def test_lepe_stops_at_the_border_of_a_stripe():
    layer = StripeAttention(4, 1, grid_size=(4, 4), width=1, vertical=True)
    nn.init.ones_(layer.lepe.weight)
    nn.init.zeros_(layer.lepe.bias)
    qkv = torch.zeros(1, 16, 3, 4)
    qkv[:, 5, 2] = 1  # row 1, column 1
    lit = layer(qkv)[0, :, 0].view(4, 4) > 0.9
    assert lit.nonzero().tolist() == [[0, 1], [1, 1], [2, 1]]


def test_spatial_reduction_of_ratio_one_is_self_attention():
    torch.manual_seed(0)
    layer = SpatialReductionAttention(8, 2, grid_size=(3, 4), ratio=1, qkv_bias=True, proj_drop=0.0)
    plain = Attention(8, 2, qkv_bias=True)
    with torch.no_grad():
        plain.qkv.weight.copy_(torch.cat([layer.q.weight, layer.kv.weight]))
        plain.qkv.bias.copy_(torch.cat([layer.q.bias, layer.kv.bias]))
    plain.proj = layer.proj
    x = torch.randn(2, 12, 8)
    torch.testing.assert_close(layer(x), plain(x))


# --- a small member of every family ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_forward_and_backward(name):
    model = small(name, drop_path_rate=0.1, drop_rate=0.1, proj_drop_rate=0.1)
    y = model(images(model))
    assert y.shape == (2, 4)
    y.square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
    rates = [m.drop_prob for m in model.modules() if type(m).__name__ == "DropPath"]
    assert rates[-1] == pytest.approx(0.1) and rates == sorted(rates)


@pytest.mark.parametrize("name", FAMILIES)
def test_determinism_and_state_dict_round_trip(name):
    model, same = small(name).eval(), small(name).eval()
    x = images(model)
    with torch.no_grad():
        want = model(x)
        assert torch.equal(model(x), want) and torch.equal(same(x), want)
        for parameter in same.parameters():
            parameter.add_(0.1)
        assert not torch.equal(same(x), want)
        same.load_state_dict(model.state_dict(), strict=True)
        assert torch.equal(same(x), want)


@pytest.mark.parametrize("name", FAMILIES)
def test_one_batch_is_learnt_by_heart(name):
    model = small(name)
    x, labels = images(model, 8), torch.arange(8) % 4
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), labels)
        if loss < 0.05:
            break
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16(name):
    model = small(name).eval()
    x = images(model)
    with torch.no_grad():
        want = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(x)
        low = model.to(torch.bfloat16)(x.bfloat16())
    for got in (mixed, low):
        assert got.dtype == torch.bfloat16
        assert (got.float() - want).norm() < 0.05 * want.norm() + 0.02


@pytest.mark.parametrize("name", FAMILIES)
def test_torch_export(name):
    model = small(name).eval()
    x = images(model)
    with torch.no_grad():
        exported = torch.export.export(model, (x,))
        torch.testing.assert_close(exported.module()(x), model(x))


@pytest.mark.long
@pytest.mark.parametrize("name", FAMILIES)
def test_torch_compile(name):
    torch._dynamo.reset()
    model = small(name)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = images(model)
    want, got = model(x), compiled(x)
    torch.testing.assert_close(got, want)
    parameters = list(model.parameters())
    for a, b in zip(
        torch.autograd.grad(got.sum(), parameters), torch.autograd.grad(want.sum(), parameters), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_checkpointing_changes_nothing(name):
    model = small(name)
    x, parameters = images(model), list(model.parameters())
    plain = torch.autograd.grad(model(x).sum(), parameters)
    model.set_grad_checkpointing()
    for a, b in zip(plain, torch.autograd.grad(model(x).sum(), parameters), strict=True):
        torch.testing.assert_close(a, b)
    model.set_grad_checkpointing(False)
    for a, b in zip(plain, torch.autograd.grad(model(x).sum(), parameters), strict=True):
        torch.testing.assert_close(a, b)


# --- what timm asks of a model ---------------------------------------------------------------------------------------


# --- image sizes -----------------------------------------------------------------------------------------------------


# --- full size -------------------------------------------------------------------------------------------------------
