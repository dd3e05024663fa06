"""Every kind of attention on every backbone: exact maps, grids, options, refusals, exchange in existing models."""

import copy
import json
import threading

import pytest
import timm
import torch
from timm.layers import Attention, DiffAttention
from timm.models.swin_transformer import SwinTransformerBlock
from torch import nn

import vca
from vca import functional as VF
from vca.controls import KINDS, AgentAttention, DepthwiseConvAttention, token_grids
from vca.grid import GridBlock

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
VARIANTS = [
    dict(tokens="emb"), dict(tokens="pool", dwc=False), dict(stage2_softmax="joint"), dict(pooling="learned"),
    dict(dwc=False, pooling="learned", tokens="pool"),
]  # fmt: skip


def randomised(module: nn.Module, scale: float = 0.2) -> nn.Module:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return module


def make(name: str, **overrides) -> nn.Module:
    return randomised(vca.create_model(name, **(SMALL[name] | dict(num_classes=3) | overrides))).eval()


def images(model: nn.Module, count: int = 2) -> torch.Tensor:
    size = model.patch_embed.img_size
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(0))


def kind_of(layer: nn.Module) -> str:
    return getattr(layer, "kind", None) or next(kind for kind, cls in LAYERS.items() if type(layer) is cls)


# --- what maps are: the layer's output from the record alone ---------------------------------------------------------


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


def assert_records_are_exact(model: nn.Module, x: torch.Tensor) -> list[vca.LayerMaps]:
    seen, hooks = {}, []
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
        assert not any({"forward", "_attn"} & set(vars(module)) for module in model.modules())
    return maps


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
    model = randomised(model).double().eval()
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
    distilled = randomised(timm.create_model("deit_tiny_distilled_patch16_224", **small)).double().eval()
    registers = randomised(timm.create_model("vit_tiny_patch16_224", reg_tokens=4, **small)).double().eval()
    for model, prefix in ((distilled, 2), (registers, 5)):
        assert {r.num_prefix_tokens for r in assert_records_are_exact(model, images(model).double())} == {prefix}
        vca.replace_attention(model, "vca", token_grid=(1, 2))
        randomised(model)
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
    layer = randomised(layer.double())
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
        layer = randomised(vca.create_attention(kind, 8, 2, token_grid=(3, 2), **place).double())
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

CELLS = [((4, 6), (2, 3)), ((5, 7), (3, 4)), ((14, 14), (8, 8)), ((3, 3), (3, 3))]


@pytest.mark.parametrize("grid, cells", CELLS, ids=str)
def test_learned_pooling_starts_as_the_average(grid, cells):
    q = torch.randn(2, grid[0] * grid[1], 12)
    assert torch.equal(VF.pool_queries(q, grid, cells, torch.zeros(3, 4)), VF.pool_queries(q, grid, cells))


@pytest.mark.parametrize("grid, cells", CELLS, ids=str)
def test_learned_pooling_weights_the_patches_of_a_cell_by_a_softmax(grid, cells):
    (rows, cols), heads, d = grid, 3, 4
    q, a = torch.randn(2, rows * cols, heads * d, dtype=torch.float64), torch.randn(heads, d, dtype=torch.float64)
    got = VF.pool_queries(q, grid, cells, a).unflatten(1, cells).unflatten(-1, (heads, d))
    image = q.view(2, rows, cols, heads, d)
    for i in range(cells[0]):
        for j in range(cells[1]):
            top, bottom = i * rows // cells[0], -(-(i + 1) * rows // cells[0])
            left, right = j * cols // cells[1], -(-(j + 1) * cols // cells[1])
            cell = image[:, top:bottom, left:right].flatten(1, 2)
            weights = (cell * a).sum(-1).softmax(1)
            torch.testing.assert_close(got[:, i, j], (weights[..., None] * cell).sum(1), rtol=0, atol=1e-12)


def test_learned_pooling_of_extreme_scores_is_finite():
    q = torch.randn(1, 16, 8) * 1000
    for dtype in (torch.float32, torch.bfloat16):
        query = torch.full((2, 4), 100.0, requires_grad=True)
        pooled = VF.pool_queries(q.to(dtype), (4, 4), (2, 2), query)
        pooled.sum().backward()
        assert pooled.isfinite().all() and query.grad.isfinite().all() and pooled.dtype == torch.float32


# --- grids -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vca", "agent", "mhsa_dwc", "diff", "mhsa"])
def test_dynamic_image_sizes(kind):
    options = dict(img_size=64, embed_dim=24, depth=2, num_heads=2, token_grid=(2, 2), num_classes=3, attention=kind)
    model = randomised(vca.create_model("vca_deit_tiny_patch16_224", dynamic_img_size=True, **options)).double().eval()
    fixed = vca.create_model("vca_deit_tiny_patch16_224", **options).double().eval()
    fixed.load_state_dict(model.state_dict())
    for size in ((64, 64), (96, 64), (64, 96)):
        x = torch.randn(1, 3, *size, dtype=torch.float64)
        fixed.set_input_size(img_size=size)
        with torch.no_grad():
            want = fixed(x)
            torch.testing.assert_close(model(x), want, rtol=0, atol=1e-9)
            with vca.record(model) as maps:
                torch.testing.assert_close(model(x), want, rtol=0, atol=1e-9)
            assert {r.grid_size for r in maps} == {tuple(side // 16 for side in size)}
            features = model.forward_intermediates(x, intermediates_only=True)
            assert features[0].shape[2:] == tuple(side // 16 for side in size)
        fixed.set_input_size(img_size=64)
        fixed.load_state_dict(model.state_dict())


def test_plain_timm_model_with_dynamic_image_size_reports_the_grid():
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, embed_dim=24, depth=1, num_heads=2, dynamic_img_size=True
    ).eval()
    for size in ((32, 64), (64, 32)):
        with vca.record(model) as maps, torch.no_grad():
            model(torch.randn(1, 3, *size))
        assert maps[0].grid_size == tuple(side // 16 for side in size)


def test_threads_with_different_grids_do_not_disturb_one_another():
    model = make("vca_deit_tiny_patch16_224", img_size=64, dynamic_img_size=True)
    pictures = {size: torch.randn(1, 3, *size) for size in ((64, 96), (96, 64))}  # 4x6 and 6x4: 24 patches each
    with torch.no_grad():
        want = {size: model(picture) for size, picture in pictures.items()}
    wrong, start = [], threading.Barrier(2)

    def run(size):
        start.wait(30)
        with torch.no_grad():
            for _ in range(50):
                if not torch.allclose(model(pictures[size]), want[size], atol=1e-5):
                    wrong.append(size)

    threads = [threading.Thread(target=run, args=(size,)) for size in pictures]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == [] and not any(thread.is_alive() for thread in threads)


@pytest.mark.parametrize("name", ["vca_pvt_tiny", "vca_swin_tiny", "vca_cswin_tiny"])
def test_every_layer_reports_its_own_grid(name):
    model = make(name)
    for size in ((64, 64), (64, 96)):
        model.set_input_size(img_size=size)
        with vca.record(model) as maps, torch.no_grad():
            model(images(model))
        patches = {4: 0, 8: 1, 16: 2, 32: 3}
        for record in maps:
            stage = int(record.name.split(".")[1])
            assert record.grid_size == tuple(side // list(patches)[stage] for side in size)
            if record.kind == "vca":
                n = record.token_grid[0] * record.token_grid[1]
                assert record.stage1.positive.shape[2:] == (n, record.grid_size[0] * record.grid_size[1])


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*BACKBONES, "pvt_tiny", "cswin_tiny"])
def test_unknown_kinds_are_refused_by_all(name):
    with pytest.raises(
        ValueError, match="attention='linear' is unknown; choose one of vca, mhsa, mhsa_dwc, vca_stage1"
    ):
        make(name, attention="linear")


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(num_tokens=50), "num_tokens=50 is not a square; give token_grid"),
        (dict(num_tokens=0), "num_tokens=0 is not a square"),
        (dict(num_tokens=4, token_grid=(2, 2)), "are both given; give one"),
        (dict(num_tokens=10000), r"token_grid=\(100, 100\) must lie between 1x1"),
        (dict(attention="agent", token_grid=(30, 30)), r"token_grid=\(30, 30\) must lie between 1x1"),
        (dict(pooling="max"), "pooling='max' is unknown; choose one of avg, learned"),
        (dict(pooling="learned", tokens="emb"), "pooling='learned' has nothing to pool"),
        (dict(attention="vca_stage1", stage2_softmax="joint"), "stage2_softmax='joint' needs both streams in Stage II"),
        (dict(token_grid=[(2, 2)] * 7), "7 token grids are given for"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", BACKBONES)
def test_contradictory_options_are_refused_in_words(name, options, message):
    with pytest.raises(ValueError, match=message):
        make(name, **(dict(token_grid=None if "num_tokens" in options else (2, 2)) | options))


def test_token_grids_for_stages():
    default = [(3, 3), (4, 4)]
    assert token_grids(None, None, default) == default
    assert token_grids([2, 3], None, default) == [(2, 3)] * 2
    assert token_grids([[1, 2], [2, 2]], None, default) == [(1, 2), (2, 2)]
    assert token_grids(None, 9, default) == [(3, 3)] * 2
    assert token_grids(None, [4, 1], default) == [(2, 2), (1, 1)]


def test_layers_refuse_masks_wrong_lengths_and_no_contrast_at_all():
    place = dict(grid_size=(4, 4), token_grid=(2, 2))
    for kind in ("vca", "agent", "mhsa_dwc"):
        layer = vca.create_attention(kind, 8, 2, **place)
        with pytest.raises(ValueError, match="not supported"):
            layer(torch.randn(1, 16, 8), is_causal=True)
        with pytest.raises(ValueError, match=r"got 15 tokens, but this layer is set to 0 prefix tokens and a 4x4 grid"):
            layer(torch.randn(1, 15, 8))
        assert layer(torch.randn(1, 24, 8), grid_size=(4, 6)).shape == (1, 24, 8)
    coarser = vca.create_attention("vca", 8, 2, **place)(torch.randn(1, 5, 8), grid_size=(1, 5))
    assert coarser.isfinite().all(), "a trained layer runs on any grid"
    with pytest.raises(ValueError, match="one stage at least must be differential"):
        vca.VisualContrastAttention(8, 2, **place, stage1_differential=False, stage2_differential=False)
    with pytest.raises(ValueError, match="dim=9 is not divisible by num_heads=2"):
        vca.create_attention("agent", 9, 2, **place)
    with pytest.raises(ValueError, match="'diff' halves the heads"):
        vca.create_attention("diff", 6, 2, **place)


# --- replace_attention -----------------------------------------------------------------------------------------------


def timm_model(name: str, **overrides) -> nn.Module:
    small = {
        "vit_tiny_patch16_224": dict(img_size=64, embed_dim=24, depth=2, num_heads=2),
        "deit_tiny_patch16_224": dict(img_size=64, embed_dim=24, depth=2, num_heads=2),
        "deit_tiny_distilled_patch16_224": dict(img_size=64, embed_dim=24, depth=2, num_heads=2),
        "swin_tiny_patch4_window7_224": dict(img_size=64, embed_dim=12, depths=(1, 2, 1, 2), num_heads=(1, 2, 2, 4)),
    }[name]
    torch.manual_seed(0)
    return randomised(timm.create_model(name, num_classes=3, **(small | overrides)))


@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224",
        "deit_tiny_patch16_224",
        "deit_tiny_distilled_patch16_224",
        "swin_tiny_patch4_window7_224",
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_attention_is_exchanged_in_place_and_keeps_its_projections(name, kind):
    model = timm_model(name).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert vca.replace_attention(model, kind, token_grid=(2, 2)) is model and not model.training
    after = model.state_dict()
    kept = [key for key in before if key in after]
    assert all(torch.equal(before[key], after[key]) for key in kept)
    lost = {key.split(".")[-1] for key in before if key not in after}
    assert lost == ({"relative_position_bias_table"} if "swin" in name else set())
    with torch.no_grad():
        assert model(images(model)).shape == (2, 3)
    if "swin" in name:
        blocks = [type(block) for stage in model.layers for block in stage.blocks]
        assert blocks == [GridBlock] * 4 + [SwinTransformerBlock] * 2
        assert [kind_of(b.attn) for stage in model.layers[:3] for b in stage.blocks] == [kind] * 4
    else:
        assert [kind_of(block.attn) for block in model.blocks] == [kind] * 2
    if kind == "mhsa" and "swin" not in name:
        original = timm_model(name).eval()
        with torch.no_grad():
            assert torch.equal(model(images(model)), original(images(model)))
    skipped = model.no_weight_decay()
    wanted = ("_embed", "lambda_q1", "lambda_k2", "relative_position_bias_table")
    assert {key for key in after if key.endswith(wanted) and not key.startswith("patch_embed")} <= skipped
    model.set_input_size(img_size=(96, 64))
    with torch.no_grad():
        assert model(images(model)).isfinite().all()
        assert copy.deepcopy(model)(images(model)).isfinite().all()


def test_options_and_stages_of_replace_attention():
    model = vca.replace_attention(timm_model("deit_tiny_patch16_224").double(), num_tokens=4, tokens="emb", dwc=False)
    layer = model.blocks[1].attn
    assert (layer.token_grid, layer.tokens, layer.dwc, layer.num_prefix_tokens) == ((2, 2), "emb", None, 1)
    assert {p.dtype for p in model.parameters()} == {torch.float64} and model.training
    model = vca.replace_attention(timm_model("swin_tiny_patch4_window7_224"), stages=[0, -1], token_grid=(2, 2))
    kinds = [[type(block) is GridBlock for block in stage.blocks] for stage in model.layers]
    assert kinds == [[True], [False, False], [False], [True, True]]
    assert [m.lambda_init for m in model.modules() if isinstance(m, vca.VisualContrastAttention)] == [
        VF.lambda_init(depth) for depth in (0, 4, 5)
    ]


@pytest.mark.parametrize(
    "make_model, options, message",
    [
        (
            lambda: timm.create_model("resnet10t"),
            {},
            "cannot exchange the attention of a ResNet; it must be exactly one",
        ),
        (lambda: timm_model("vit_tiny_patch16_224", qk_norm=True), {}, "block 0: attention with q_norm, k_norm cannot"),
        (lambda: timm_model("vit_tiny_patch16_224", proj_bias=False), {}, "unusual projections"),
        (lambda: timm_model("vit_tiny_patch16_224", attn_layer=DiffAttention), {}, "has DiffAttention, not timm's"),
        (lambda: timm_model("vit_tiny_patch16_224"), dict(token_grid=(5, 5)), r"token_grid=\(5, 5\) must lie"),
        (lambda: timm_model("swin_tiny_patch4_window7_224"), dict(token_grid=(5, 5)), r"token_grid=\(5, 5\) must lie"),
        (lambda: timm_model("swin_tiny_patch4_window7_224", head_dim=8), {}, "do not add up to 12"),
    ],
)
def test_what_cannot_be_exchanged_is_refused_and_unchanged(make_model, options, message):
    model = make_model()
    keys, cls = list(model.state_dict()), type(model)
    with pytest.raises(ValueError, match=message):
        vca.replace_attention(model, **options)
    assert list(model.state_dict()) == keys and type(model) is cls


def test_a_model_with_exchanged_attention_is_not_saved_as_what_it_was(tmp_path):
    model = vca.create_model("deit_tiny_patch16_224", img_size=32, embed_dim=24, depth=1, num_heads=2, num_classes=2)
    vca.replace_attention(model, token_grid=(1, 1))
    with pytest.raises(ValueError, match=r"only models of vca\.create_model can be saved"):
        vca.save(model, tmp_path, label_names=["a", "b"])
