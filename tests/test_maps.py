"""Recording: what a record says, that it is exact, and that it disturbs nobody."""

import copy
import itertools
import sys
import threading
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from timm.layers import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import vca
from tests.reference import parameters, visual_contrast_attention
from vca import VisualContrastAttention

OPTIONS = [
    dict(zip(("dwc", "tokens", "stage2_softmax"), values, strict=True))
    for values in itertools.product((True, False), ("pool+emb", "emb", "pool"), ("separate", "joint"))
]
GEOMETRY = dict(grid_size=(5, 6), token_grid=(2, 3), num_prefix_tokens=2, depth=3)
HEADS, DIM = 3, 12


def names(options: dict) -> str:
    return "-".join(str(value) for value in options.values())


def randomised(module: nn.Module, scale: float = 0.3, seed: int = 5) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return module


def make_layer(**options) -> VisualContrastAttention:
    return randomised(VisualContrastAttention(DIM, HEADS, **GEOMETRY, **options).double())


def make_vca_vit(**overrides):
    arguments = dict(embed_dim=24, depth=3, num_heads=3, img_size=16, num_classes=5) | overrides
    model = vca.create_model("vca_vit_pico_patch4_32", **arguments)
    return randomised(model, 0.1).eval()


def make_timm_vit(**overrides) -> VisionTransformer:
    arguments = dict(img_size=16, patch_size=4, embed_dim=24, depth=3, num_heads=3, num_classes=5) | overrides
    return randomised(VisionTransformer(**arguments), 0.1).eval()


def images(count: int = 2, size: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def attention_layers(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, VisualContrastAttention | Attention)]


def assert_fast_path(model: nn.Module) -> None:
    assert not any("forward" in vars(layer) for layer in attention_layers(model)), "a layer is still tapped"


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


def test_a_later_forward_replaces_the_maps_of_an_earlier_one():
    model = make_vca_vit()
    with vca.record(model) as maps, torch.no_grad():
        model(images(1, seed=1))
        first = list(maps)
        model(images(2, seed=2))
    assert len(maps) == len(first) == 3
    assert [len(r.stage1.positive) for r in first] == [1] * 3
    assert [len(r.stage1.positive) for r in maps] == [2] * 3


def test_recording_after_set_input_size_reports_the_new_grid():
    for model in (make_vca_vit(), make_timm_vit()):
        model.set_input_size(img_size=(24, 32))
        with vca.record(model) as maps, torch.no_grad():
            model(torch.randn(1, 3, 24, 32))
        for record in maps:
            assert record.grid_size == (6, 8)
            assert record.effective.shape[-1] == 48 + record.num_prefix_tokens


@pytest.mark.parametrize("make", [make_vca_vit, make_timm_vit])
def test_gradients_reach_the_recorded_maps(make):
    """Gradient-weighted attributions ask for the gradient of a logit with respect to a map."""
    model = make()
    with vca.record(model) as maps:
        logit = model(images())[:, 0].sum()
    for record in maps:
        if record.kind == "vca":
            recorded = [record.stage1.differential, record.stage2.differential]
        else:
            recorded = [record.stage1.positive]
        for map_, gradient in zip(recorded, torch.autograd.grad(logit, recorded, retain_graph=True), strict=True):
            assert gradient.shape == map_.shape
            assert gradient.isfinite().all() and gradient.abs().max() > 0


# --- on and off ------------------------------------------------------------------------------------------------------


def test_fast_path_returns_after_exit_and_after_an_exception():
    model = make_vca_vit()
    with vca.record(model) as maps, torch.no_grad():
        model(images())
    assert_fast_path(model)
    before = list(maps)
    with torch.no_grad():
        model(images(seed=9))
    assert maps == before, "the model still writes into a recording that has ended"

    with pytest.raises(KeyError, match="inside"), vca.record(model):
        raise KeyError("inside")
    assert_fast_path(model)
    with pytest.raises(ValueError, match="tokens"), vca.record(model.blocks[0].attn):
        model.blocks[0].attn(torch.randn(1, 5, 24))
    assert_fast_path(model)
    with vca.record(model) as maps, torch.no_grad():
        model(images())
    assert len(maps) == 3


def test_nested_recordings_each_get_their_own():
    model = make_vca_vit()
    with torch.no_grad(), vca.record(model) as outer:
        model(images(1, seed=1))
        alone = list(outer)
        with vca.record(model, blocks=[1]) as inner:
            model(images(1, seed=2))
        assert [r.block for r in inner] == [1]
        assert [r.block for r in outer] == [0, 1, 2]
        assert torch.equal(inner[0].stage1.positive, outer[1].stage1.positive)
        assert not torch.equal(alone[1].stage1.positive, outer[1].stage1.positive)
        kept = list(inner)
        model(images(1, seed=1))
        assert inner == kept
        assert torch.equal(outer[1].stage1.positive, alone[1].stage1.positive)
    assert_fast_path(model)


def test_recordings_may_end_in_any_order():
    model = make_vca_vit()
    first, second = ExitStack(), ExitStack()
    early, late = first.enter_context(vca.record(model)), second.enter_context(vca.record(model))
    first.close()
    with torch.no_grad():
        model(images())
    assert (len(early), len(late)) == (0, 3)
    second.close()
    assert_fast_path(model)


def test_two_models_are_recorded_side_by_side():
    one, other = make_vca_vit(), make_timm_vit()
    with torch.no_grad(), vca.record(one) as vca_maps, vca.record(other) as mhsa_maps:
        one(images())
        other(images())
    assert [r.kind for r in vca_maps] == ["vca"] * 3
    assert [r.kind for r in mhsa_maps] == ["mhsa"] * 3


# --- a server's threads ----------------------------------------------------------------------------------------------


def test_threads_that_share_a_model_do_not_see_one_another(monkeypatch):
    """Two threads enter, run and leave 200 recordings of their own images; a third only runs the model."""
    model, rounds = make_vca_vit(depth=2), 200
    pictures = {who: images(1, seed=i) for i, who in enumerate(("first", "second", "bystander"))}
    with torch.no_grad():
        outputs = {who: model(picture) for who, picture in pictures.items()}
        want = {}
        for who, picture in pictures.items():
            with vca.record(model) as maps:
                model(picture)
            want[who] = list(maps)
    assert (want["first"][0].stage1.positive - want["second"][0].stage1.positive).abs().max() > 1e-3

    explicit = VisualContrastAttention.forward_with_maps
    took_the_maps_path = []

    def noting_the_thread(self, *args, **kwargs):
        took_the_maps_path.append(threading.current_thread().name)
        return explicit(self, *args, **kwargs)

    monkeypatch.setattr(VisualContrastAttention, "forward_with_maps", noting_the_thread)
    start, recorders_done, failures, runs = threading.Barrier(3), threading.Event(), [], []

    def check(condition, message):
        if not condition:
            raise AssertionError(message)

    def recorder(who):
        for _ in range(rounds):
            with vca.record(model) as maps:
                y = model(pictures[who])
            check(torch.allclose(y, outputs[who], atol=1e-5), f"{who} got another image's output")
            check(len(maps) == 2, f"{who} got {len(maps)} records")
            for got, mine in zip(maps, want[who], strict=True):
                for stage in ("stage1", "stage2"):
                    pair = getattr(got, stage).differential, getattr(mine, stage).differential
                    check(torch.allclose(*pair, atol=1e-5), f"{who} got another image's maps")

    def bystander(who):
        while not recorders_done.is_set():
            check(torch.allclose(model(pictures[who]), outputs[who], atol=1e-5), f"{who} got another output")
            runs.append(1)

    def guarded(work, who):
        with torch.no_grad():
            try:
                start.wait(60)
                work(who)
            except BaseException as error:
                failures.append(f"{who}: {error!r}")

    threads = [
        threading.Thread(target=guarded, args=(work, who), name=who)
        for who, work in (("first", recorder), ("second", recorder), ("bystander", bystander))
    ]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads[:2]:
            thread.join(60)
        recorders_done.set()
        threads[2].join(60)
    finally:
        recorders_done.set()
        sys.setswitchinterval(interval)
    assert failures == []
    assert not any(thread.is_alive() for thread in threads)
    assert len(runs) > 10, "the bystander hardly ran beside the recordings"
    assert "bystander" not in took_the_maps_path, "a thread that does not record has left the fast path"
    assert took_the_maps_path.count("first") == took_the_maps_path.count("second") == rounds * 2
    assert_fast_path(model)


def test_a_recording_does_not_see_the_forwards_of_a_thread_started_inside_it():
    model = make_vca_vit()
    with vca.record(model) as maps:
        thread = threading.Thread(target=lambda: model(images()))
        thread.start()
        thread.join()
    assert maps == []


def test_a_copy_made_while_recording_runs_its_own_weights():
    layer = VisualContrastAttention(16, 2, grid_size=(4, 4), token_grid=(2, 2))
    x = torch.randn(1, 16, 16)
    with vca.record(layer):
        twin = copy.deepcopy(layer)
    torch.nn.init.zeros_(twin.proj.weight)
    assert torch.equal(twin(x), twin.proj.bias.expand(1, 16, 16))
    with vca.record(twin) as maps:
        twin(x)
    assert len(maps) == 1
