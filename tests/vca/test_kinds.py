"""Every kind of attention on every backbone: exact maps, grids, options, refusals, exchange in existing models."""

import json

import pytest
import timm
import torch
from timm.models.swin_transformer import SwinTransformerBlock

import vca
from tests.helpers.kinds import (
    BACKBONES,
    CONTRAST,
    assert_records_are_exact,
    depthwise,
    images,
    in_windows,
    kind_of,
    make,
    randomized,
)
from vca.layers.factory import KINDS
from vca.layers.grid import GridBlock

VARIANTS = [
    dict(tokens="emb"), dict(tokens="pool", dwc=False), dict(stage2_softmax="joint"), dict(pooling="learned"),
    dict(dwc=False, pooling="learned", tokens="pool"),
]  # fmt: skip


# --- what maps are: the layer's output from the record alone ---------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BACKBONES)
def test_the_effective_map_reproduces_every_layer(name, kind):
    model = make(name, attention=kind).double()
    maps = assert_records_are_exact(model, images(model).double())
    kinds = {"window", "stripes"} & {r.kind for r in maps}
    assert {r.kind for r in maps} == {kind} | kinds
    for record in maps:
        if record.kind != kind:
            continue
        rows, cols = record.grid_size
        length = record.num_prefix_tokens + rows * cols
        assert record.effective.shape[2:] == (length, length)
        some = record.effective_rows(slice(1, 3))
        torch.testing.assert_close(some, record.effective[..., 1:3, :], rtol=0, atol=1e-12)
        for stage in (record.stage1, record.stage2):
            if stage is not None:
                for stream in (stage.positive, stage.negative):
                    assert stream is None or (stream.sum(-1) - 1).abs().max() < 1e-9
        contrasts = {
            "vca": (True, True),
            "vca_stage1": (True, False),
            "vca_stage2": (False, True),
            "diff": (True, None),
        }
        for stage, lam, wanted in zip(
            (record.stage1, record.stage2),
            (record.lambda1, record.lambda2),
            contrasts.get(kind, (False, False)),
            strict=True,
        ):
            if stage is not None:
                assert (stage.differential is not None) == (stage.negative is not None) == (lam is not None) == wanted
                if wanted:
                    torch.testing.assert_close(stage.differential, stage.positive - lam * stage.negative)


@pytest.mark.parametrize("kind", CONTRAST)
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_the_effective_map_of_every_option(options, kind):
    if kind == "vca_stage1" and "stage2_softmax" in options:
        pytest.skip("there is one stream in Stage II")
    model = make("vca_deit_tiny_patch16_224", attention=kind, **options).double()
    assert_records_are_exact(model, images(model).double())


@pytest.mark.parametrize("name", ["pvt_tiny", "cswin_tiny"])
def test_the_effective_map_of_the_baselines(name):
    model = make(name).double()
    maps = assert_records_are_exact(model, images(model).double())
    if name == "pvt_tiny":
        assert [r.kind for r in maps] == ["sr"] * 4
        assert [r.grid_size for r in maps] == [(16, 16), (8, 8), (4, 4), (2, 2)]
        assert [r.key_grid for r in maps] == [(2, 2)] * 4
        assert [r.effective.shape[2:] for r in maps] == [(256, 4), (64, 4), (16, 4), (4, 4)]
    else:
        assert [r.kind for r in maps] == ["stripes"] * 7
        assert [r.window_size for r in maps] == [(16, 2), (2, 32), (8, 4), (4, 16), (4, 1), (1, 8), (2, 4)]
        assert [r.effective.shape[1] for r in maps] == [16, 8, 4, 2, 8, 4, 1]


@pytest.mark.parametrize("options", [dict(), dict(strict_img_size=False)], ids=["fixed", "any size"])
@pytest.mark.parametrize("size", [(56, 56), (48, 72)], ids=str)
def test_windows_of_a_plain_swin(size, options):
    """Padding, shift and mask: a window's map lies over the patches that `window_patches` names."""
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=size, embed_dim=12, depths=(2, 2), num_heads=(2, 3), num_classes=3,
        window_size=5, **options,
    )  # fmt: skip
    model = randomized(model).double().eval()
    if options:
        size = (64, 44)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    maps = assert_records_are_exact(model, x)
    grid = tuple(side // 4 for side in size)
    assert [r.grid_size for r in maps] == [grid] * 2 + [tuple((side + 1) // 2 for side in grid)] * 2
    assert maps[0].window_size == (5, 5)
    assert [r.shift_size for r in maps][:2] == [(0, 0), (2, 2)]
    blocks = [m for m in model.modules() if isinstance(m, SwinTransformerBlock)]
    for record, block in zip(maps, blocks, strict=True):
        patches, (rows, cols) = record.window_patches, record.grid_size
        assert record.stage1.positive.shape == (2, len(patches), block.attn.num_heads, *patches.shape[1:] * 2)
        assert patches[patches >= 0].sort().values.equal(torch.arange(rows * cols))
        # The whole attention step of the block, from the record: windows -> patches, no roll, no reverse.
        y = torch.randn(2, rows, cols, block.dim, dtype=torch.float64)
        with torch.no_grad(), vca.record(block) as own:
            want = block._attn(y)
        windows = in_windows(patches, y.flatten(1, 2))
        v = block.attn.qkv(windows).chunk(3, dim=-1)[2].unflatten(-1, (block.attn.num_heads, -1)).transpose(2, 3)
        out = block.attn.proj((own[0].effective @ v).transpose(2, 3).flatten(3))
        got = torch.empty(2, rows * cols + 1, block.dim, dtype=torch.float64)
        got[:, patches.flatten()] = out.flatten(1, 2).detach()
        torch.testing.assert_close(got[:, :-1].unflatten(1, (rows, cols)), want, rtol=0, atol=1e-9)


def test_distilled_and_register_tokens_are_kept_apart():
    small = dict(img_size=32, embed_dim=24, depth=1, num_heads=2, num_classes=3)
    distilled = randomized(timm.create_model("deit_tiny_distilled_patch16_224", **small)).double().eval()
    registers = randomized(timm.create_model("vit_tiny_patch16_224", reg_tokens=4, **small)).double().eval()
    for model, prefix in ((distilled, 2), (registers, 5)):
        assert {r.num_prefix_tokens for r in assert_records_are_exact(model, images(model).double())} == {prefix}
        vca.replace_attention(model, "vca", token_grid=(1, 2))
        randomized(model)
        (record,) = assert_records_are_exact(model, images(model).double())
        assert record.num_prefix_tokens == prefix and record.stage2.positive.shape == (2, 2, prefix + 4, 2)


# --- the kinds -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load_of_every_kind(name, kind, tmp_path):
    model = make(name, attention=kind)
    vca.save(model, tmp_path, label_names=["a", "b", "c"])
    assert json.loads((tmp_path / "config.json").read_text())["model_args"]["attention"] == kind
    other = vca.load(tmp_path)
    with torch.no_grad():
        assert torch.equal(other(images(model)), model(images(model)))
    layers = [m.attn for m in other.modules() if isinstance(m, GridBlock)] or [b.attn for b in other.blocks]
    assert kind in {kind_of(layer) for layer in layers if kind != "stripes" and not hasattr(layer, "branches")}


@pytest.mark.parametrize("options", [*VARIANTS, dict(token_grid=None, num_tokens=4)], ids=str)
def test_save_and_load_of_every_option(options, tmp_path):
    for name in ("vca_deit_tiny_patch16_224", "vca_swin_tiny"):
        model = make(name, **options)
        vca.save(model, tmp_path / name, label_names=["a", "b", "c"])
        with torch.no_grad():
            assert torch.equal(vca.load(tmp_path / name)(images(model)), model(images(model)))


def test_a_new_input_size_is_saved(tmp_path):
    small = dict(embed_dim=24, depth=1, num_heads=2, num_classes=3)
    models = {
        "deit": (vca.create_model("deit_tiny_patch16_224", **small, img_size=32), (48, 64)),
        "square": (make("vca_vit_pico_patch4_32", num_tokens=4), (24, 40)),
        "swin": (
            vca.create_model(
                "swin_tiny_patch4_window7_224", embed_dim=12, depths=(1, 1), num_heads=(2, 2), num_classes=3
            ),
            (112, 168),
        ),
        "contrast swin": (make("vca_swin_tiny"), (96, 128)),
        "pvt": (make("vca_pvt_tiny"), (96, 128)),
        "cswin": (make("vca_cswin_tiny"), (96, 128)),
    }
    for case, (model, size) in models.items():
        model.set_input_size(img_size=size)
        vca.save(model.eval(), tmp_path / case, label_names=["a", "b", "c"])
        other = vca.load(tmp_path / case)
        assert tuple(other.pretrained_cfg["input_size"]) == (3, *size), case
        with torch.no_grad():
            assert torch.equal(other(images(model)), model(images(model))), case


def test_the_stages_of_vca_differ_as_the_paper_says():
    layers = {kind: vca.create_attention(kind, 16, 2, grid_size=(4, 4), token_grid=(2, 2)) for kind in KINDS}
    parameters = {kind: {name for name, _ in layer.named_parameters()} for kind, layer in layers.items()}
    lambdas = {f"lambda_{v}" for v in ("q1", "k1", "q2", "k2")}
    assert parameters["vca"] - parameters["vca_stage1"] == {f"stage2.{v}" for v in lambdas}
    assert parameters["vca"] - parameters["vca_stage2"] == {f"stage1.{v}" for v in lambdas}
    assert parameters["mhsa_dwc"] - parameters["mhsa"] == {"dwc.weight", "dwc.bias"}
    assert parameters["agent"] == parameters["mhsa_dwc"]
    assert {kind: kind_of(layer) for kind, layer in layers.items()} == {kind: kind for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_every_kind(kind):
    torch.manual_seed(0)
    options = dict(pooling="learned") if kind in CONTRAST else {}
    layer = vca.create_attention(kind, 8, 2, grid_size=(3, 3), token_grid=(2, 2), num_prefix_tokens=1, **options)
    layer = randomized(layer.double())
    x = torch.randn(2, 10, 8, dtype=torch.float64, requires_grad=True)
    (layer(x) ** 2).sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 1e-9, name
    with torch.no_grad():
        assert (layer(x) - layer(x.detach().requires_grad_())).abs().max() < 1e-12


def test_agents_and_the_control_against_their_equations():
    torch.manual_seed(0)
    x = torch.randn(2, 1 + 6 * 4, 8, dtype=torch.float64)
    for kind in ("agent", "mhsa_dwc"):
        place = dict(grid_size=(6, 4), num_prefix_tokens=1)
        layer = randomized(vca.create_attention(kind, 8, 2, token_grid=(3, 2), **place).double())
        q, k, v = layer.qkv(x).chunk(3, dim=-1)
        pooled = q[:, 1:].reshape(2, 3, 2, 2, 2, 8).mean((2, 4)).reshape(2, 6, 8)
        out = []
        for own in (slice(0, 4), slice(4, 8)):
            scores = lambda a, b: (a[..., own] @ b[..., own].transpose(1, 2) / 2).softmax(-1)  # noqa: B023, E731
            if kind == "agent":
                out.append(scores(q, pooled) @ (scores(pooled, k) @ v[..., own]))
            else:
                out.append(scores(q, k) @ v[..., own])
        out = torch.cat(out, dim=-1)
        out[:, 1:] += depthwise(layer.dwc, v[:, 1:], (6, 4))
        torch.testing.assert_close(layer(x), layer.proj(out), rtol=0, atol=1e-12)


def test_options_that_a_kind_has_not_are_ignored():
    for kind in ("mhsa", "mhsa_dwc", "diff", "agent"):
        make("vca_deit_tiny_patch16_224", attention=kind, tokens="emb", stage2_softmax="joint")


# --- learned pooling -------------------------------------------------------------------------------------------------


# --- grids -----------------------------------------------------------------------------------------------------------


# --- refusals --------------------------------------------------------------------------------------------------------


# --- replace_attention -----------------------------------------------------------------------------------------------
