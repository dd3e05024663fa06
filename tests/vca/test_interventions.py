"""Interventions are the changed equations, end, nest, and do not disturb one another."""

import sys
import threading

import numpy as np
import pytest
import torch

import vca
from tests.helpers import kinds
from tests.helpers.classifiers import FAMILIES, small
from tests.helpers.classifiers import images as images_of
from tests.helpers.kernels import needs_compiler
from tests.helpers.reference import parameters, visual_contrast_attention
from tests.helpers.reference_vit import answers
from tests.helpers.vits import (
    DIM,
    GEOMETRY,
    HEADS,
    assert_fast_path,
    images,
    make_layer,
    make_timm_vit,
    make_vca_vit,
    randomized,
)

CHANGES = {
    "lambda1": (dict(lambda1=0.3), dict(lambdas=(0.3, None))),
    "lambda2": (dict(lambda2=-1.5), dict(lambdas=(None, -1.5))),
    "scales": (dict(lambda1_scale=0.5, lambda2_scale=2.0), dict(scales=(0.5, 2.0))),
    "set and scaled": (dict(lambda2=0.4, lambda2_scale=3.0), dict(lambdas=(None, 0.4), scales=(1.0, 3.0))),
    "a head": (dict(mute=[1]), dict(muted=(1,))),
    "all heads": (dict(mute=range(3)), dict(muted=(0, 1, 2))),
    "positive": (dict(off="positive"), dict(off=("positive",))),
    "negative": (dict(off=["negative"]), dict(off=("negative",))),
    "both streams": (dict(off=["negative", "positive"]), dict(off=("negative", "positive"))),
    "stage1": (dict(off="stage1"), dict(off=("stage1",))),
    "stage2": (dict(off="stage2"), dict(off=("stage2",))),
    "several": (
        dict(lambda1=0.7, mute=[0, 2], off=["positive", "stage2"]),
        dict(lambdas=(0.7, None), muted=(0, 2), off=("positive", "stage2")),
    ),
}


def run(model, x, blocks=None, **change):
    with torch.no_grad(), vca.intervene(model, blocks, **change):
        return model(x)


# ---- The changed equations


@pytest.mark.parametrize("blocks", [[0], [1], [-1], [0, 2], None], ids=str)
@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_model_is_the_reference_with_changed_equations(name, blocks):
    change, changed = CHANGES[name]
    model, x = make_vca_vit().double(), images().double()
    chosen = range(3) if blocks is None else [block % 3 for block in blocks]
    known = dict(heads=3, patch=4, token_grid=(2, 2))
    want = answers(model, x, **known, changes={block: changed for block in chosen})[-1]
    np.testing.assert_allclose(run(model, x, blocks, **change), want, rtol=0, atol=1e-12)
    assert np.abs(want - answers(model, x, **known)[-1]).max() > 1e-4, "this change changes nothing"


@pytest.mark.parametrize("softmax", ["separate", "joint"])
@pytest.mark.parametrize("name", CHANGES)
def test_recorded_maps_are_those_of_the_changed_layer(name, softmax):
    change, changed = CHANGES[name]
    layer = make_layer(stage2_softmax=softmax)
    x = torch.randn(2, 32, DIM, dtype=torch.float64)
    want = visual_contrast_attention(
        parameters(layer), x, num_heads=HEADS, stage2_softmax=softmax, **GEOMETRY, **changed
    )
    np.testing.assert_allclose(run(layer, x, **change), want.output, rtol=0, atol=1e-10)
    with torch.no_grad(), vca.intervene(layer, **change), vca.record(layer) as maps:
        y = layer(x)
    (record,) = maps
    np.testing.assert_allclose(y, want.output, rtol=0, atol=1e-10)
    for stage in ("stage1", "stage2"):
        for stream in ("positive", "negative", "differential"):
            got = getattr(getattr(record, stage), stream)
            np.testing.assert_allclose(got, getattr(want, f"{stage}_{stream}"), rtol=0, atol=1e-12)
    np.testing.assert_allclose(record.effective, want.effective, rtol=0, atol=1e-10)
    torch.testing.assert_close(record.effective @ record.values, record.gathered, rtol=0, atol=1e-10)
    assert (float(record.lambda1), float(record.lambda2)) == pytest.approx((want.lambda1, want.lambda2))


@pytest.mark.parametrize("blocks", [[0], [2], None], ids=str)
def test_a_muted_head_of_self_attention_is_that_of_the_reference(blocks):
    model, x = make_timm_vit().double(), images().double()
    changes = {block: dict(muted=(1,)) for block in blocks or range(3)}
    want = answers(model, x, heads=3, patch=4, prefix=1, changes=changes)[-1]
    np.testing.assert_allclose(run(model, x, blocks, mute=[1]), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["vca", "vca_stage1", "vca_stage2", "diff", "agent", "mhsa", "mhsa_dwc"])
def test_every_kind_mutes_heads_and_its_maps_explain_its_output(kind):
    model = kinds.make("vca_vit_pico_patch4_32", attention=kind).double()
    x = kinds.images(model).double()
    with vca.intervene(model, mute=[1]):
        for record in kinds.assert_records_are_exact(model, x):
            assert not record.effective[:, 1].any() and record.effective[:, 0].abs().max() > 0.01


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_mutes_heads_of_its_last_block(name):
    model = small(name).eval()
    x = images_of(model)
    last = vca.maps.attention_layers(model)[-1][1]
    with torch.no_grad(), vca.intervene(model, [-1], mute=range(last.num_heads)), vca.record(model) as maps:
        muted = model(x)
    assert not maps[-1].stage1.applied.any() or not maps[-1].stage2.applied.any()
    torch.testing.assert_close(run(model, x, [-1], mute=range(last.num_heads)), muted)
    with torch.no_grad():
        assert (model(x) - muted).abs().max() > 1e-6


@pytest.mark.parametrize(
    "kind, change",
    [
        ("vca_stage1", dict(lambda1=0.1)),
        ("vca_stage1", dict(off="negative")),
        ("vca_stage1", dict(off="stage2")),
        ("vca_stage2", dict(lambda2_scale=0.3)),
        ("vca_stage2", dict(off="stage1")),
        ("diff", dict(lambda1=0.1)),
        ("diff", dict(off="positive")),
        ("diff", dict(off="negative")),
        ("agent", dict(off="stage1")),
        ("agent", dict(off="stage2")),
    ],
    ids=str,
)
def test_what_other_kinds_have_is_changed_on_both_paths(kind, change):
    model = kinds.make("vca_vit_pico_patch4_32", attention=kind).double()
    x = kinds.images(model).double()
    with torch.no_grad():
        before = model(x)
    with vca.intervene(model, [1], **change):
        record = kinds.assert_records_are_exact(model, x)[1]
    assert (run(model, x, [1], **change) - before).abs().max() > 1e-5
    if change == dict(lambda1=0.1):
        torch.testing.assert_close(record.stage1.differential, record.stage1.positive - 0.1 * record.stage1.negative)
    elif change.get("off") == "negative":
        torch.testing.assert_close(record.stage1.differential, record.stage1.positive)
        torch.testing.assert_close(record.stage1.positive.sum(-1), torch.ones_like(record.stage1.positive[..., 0]))
    elif change.get("off") == "positive":
        torch.testing.assert_close(record.stage1.differential, -record.lambda1 * record.stage1.negative)
    elif change.get("off") in ("stage1", "stage2"):
        map_ = getattr(record, change["off"]).positive
        torch.testing.assert_close(map_, torch.full_like(map_, 1 / map_.shape[-1]))
    else:
        own = model.blocks[1].attn.stage2.contrast_lambda(model.blocks[1].attn.lambda_init)
        torch.testing.assert_close(record.lambda2, own * 0.3)


@needs_compiler
@pytest.mark.parametrize("name", ["lambda1", "a head", "positive", "negative", "stage1", "stage2"])
def test_fused_operators_take_the_changes(name):
    change, changed = CHANGES[name]
    geometry = dict(grid_size=(4, 4), token_grid=(2, 2), num_prefix_tokens=1, depth=1)
    layer = randomized(vca.VisualContrastAttention(48, 3, **geometry), 0.1)
    layer.fused_attn = True
    x = torch.randn(2, 17, 48)
    assert layer._is_fused(x.unflatten(-1, (3, 16)).transpose(1, 2))
    want = visual_contrast_attention(parameters(layer), x, num_heads=3, **geometry, **changed).output
    np.testing.assert_allclose(run(layer, x, **change), want, rtol=0, atol=2e-5)


def test_gradients_pass_through_a_changed_model():
    model, x = make_vca_vit(), images().requires_grad_()
    with vca.intervene(model, [1], lambda1_scale=0.5, mute=[0], off=["positive", "stage1"]):
        model(x).sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().max() > 0


# ---- Nothing changed, and nothing left behind


@pytest.mark.parametrize("make", [make_vca_vit, make_timm_vit])
@pytest.mark.parametrize("blocks", [None, [1], []], ids=str)
def test_a_call_that_changes_nothing_gives_the_same_bits(make, blocks):
    model, x = make(), images()
    with torch.no_grad():
        want = model(x)
        assert torch.equal(run(model, x, blocks), want)
        with vca.record(model):
            recorded = model(x)
        with vca.record(model), vca.intervene(model, blocks):
            assert torch.equal(model(x), recorded)


def test_the_learned_lambdas_set_anew_give_the_same_bits():
    model, x = make_vca_vit(), images()
    with torch.no_grad(), vca.record(model) as maps:
        recorded = model(x)
    lambdas = [(float(record.lambda1), float(record.lambda2)) for record in maps]
    with torch.no_grad():
        want = model(x)
        for block, (lambda1, lambda2) in enumerate(lambdas):
            assert torch.equal(run(model, x, [block], lambda1=lambda1, lambda2=lambda2), want)
            with vca.intervene(model, [block], lambda1=lambda1), vca.record(model):
                assert torch.equal(model(x), recorded)


def test_the_model_is_as_before_after_the_block_and_after_an_exception():
    model, x = make_vca_vit(), images()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        want = model(x)
    assert not torch.equal(run(model, x, lambda1=0.0, mute=[1]), want)
    with pytest.raises(KeyError, match="inside"), vca.intervene(model, off="negative"):
        raise KeyError("inside")
    with pytest.raises(ValueError, match="tokens"), vca.intervene(model.blocks[0].attn, off="negative"):
        model.blocks[0].attn(torch.randn(1, 5, 24))
    assert_fast_path(model)
    with torch.no_grad():
        assert torch.equal(model(x), want)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_interventions_nest_and_end_apart():
    model, x = make_vca_vit().double(), images().double()

    def reference(**changed):
        changes = {0: changed} if changed else None
        return answers(model, x, heads=3, patch=4, token_grid=(2, 2), changes=changes)[-1]

    def check(want):
        np.testing.assert_allclose(model(x), want, rtol=0, atol=1e-12)

    with torch.no_grad(), vca.intervene(model, [0], lambda1=0.2, mute=[0]):
        with vca.intervene(model, [0], lambda1_scale=2.0, lambda2=0.1, mute=[2], off="stage1"):
            check(reference(lambdas=(0.2, 0.1), scales=(2.0, 1.0), muted=(0, 2), off=("stage1",)))
            with vca.intervene(model, [0], lambda1=0.9):
                check(reference(lambdas=(0.9, 0.1), muted=(0, 2), off=("stage1",)))
        check(reference(lambdas=(0.2, None), muted=(0,)))
    with torch.no_grad():
        check(reference())


def test_threads_that_change_a_model_do_not_see_one_another():
    """Two threads change one model in ways of their own and record it, 100 times; a third only runs it."""
    model, rounds = make_vca_vit(depth=2), 100
    x = images(1)
    changes = {"first": dict(lambda1=0.0, mute=[1]), "second": dict(lambda2=2.0, off="positive"), "bystander": {}}
    want = {who: run(model, x, **change) for who, change in changes.items()}
    assert min((want[a] - want[b]).abs().max() for a, b in [("first", "second"), ("first", "bystander")]) > 1e-3
    start, done, failures, runs = threading.Barrier(3), threading.Event(), [], []

    def check(who, y):
        if not torch.equal(y, want[who]):
            raise AssertionError(f"{who} got the answer of another model")

    def changer(who):
        for _ in range(rounds):
            with vca.intervene(model, **changes[who]):
                check(who, model(x))
                with vca.record(model, [0]) as maps:
                    model(x)
            muted = not maps[0].stage2.differential[:, 1].any()
            if muted != (who == "first"):
                raise AssertionError(f"{who} recorded the maps of another model")

    def bystander(who):
        while not done.is_set():
            check(who, model(x))
            runs.append(1)

    def guarded(work, who):
        with torch.no_grad():
            try:
                start.wait(60)
                work(who)
            except BaseException as error:
                failures.append(f"{who}: {error!r}")

    works = dict(first=changer, second=changer, bystander=bystander)
    threads = [threading.Thread(target=guarded, args=(work, who)) for who, work in works.items()]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads[:2]:
            thread.join(60)
        done.set()
        threads[2].join(60)
    finally:
        done.set()
        sys.setswitchinterval(interval)
    assert failures == []
    assert not any(thread.is_alive() for thread in threads)
    assert len(runs) > 10, "the bystander hardly ran beside the interventions"
    assert_fast_path(model)


# ---- Refusals


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(off="contrast"), "off='contrast' is unknown; choose of positive, negative, stage1, stage2"),
        (dict(lambda1=float("nan")), "lambda1=nan is not a finite number"),
        (dict(lambda2_scale=float("inf")), "lambda2_scale=inf is not a finite number"),
        (dict(mute=[3]), "mute=3 is out of range: block 0 has heads 0 to 2"),
        (dict(mute=[-1]), "mute=-1 is out of range"),
        (dict(mute=[0.5]), "mute=0.5 is out of range"),
        (dict(blocks=[3], mute=[0]), "out of range: the model has 3 attention layers"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused(change, message):
    model = make_vca_vit()
    with pytest.raises(ValueError, match=message), vca.intervene(model, **change):
        raise AssertionError("the block was entered")
    assert_fast_path(model)


@pytest.mark.parametrize(
    "kind, change, message",
    [
        ("mhsa", dict(lambda1=0.0), "no lambda1 to change: beside its heads it has no lambda, stream or stage"),
        ("mhsa_dwc", dict(off="negative"), "no negative to change"),
        ("diff", dict(lambda2=0.0), "no lambda2 to change: beside its heads it has lambda1, negative, positive"),
        ("diff", dict(off="stage1"), "no stage1 to change"),
        ("agent", dict(off="positive"), "no positive to change: beside its heads it has stage1, stage2"),
        ("vca_stage1", dict(lambda2_scale=0.5), r"block 0 \(vca_stage1\) has no lambda2 to change"),
        ("vca_stage1", dict(off="positive"), "no positive to change"),
        ("vca_stage2", dict(lambda1=0.5), "no lambda1 to change"),
    ],
    ids=str,
)
def test_what_a_kind_does_not_have_is_refused(kind, change, message):
    model = kinds.make("vca_vit_pico_patch4_32", attention=kind)
    with pytest.raises(ValueError, match=message), vca.intervene(model, **change):
        raise AssertionError("the block was entered")


def test_a_model_of_several_kinds_names_the_block_that_refuses():
    model = small("vca_swin_tiny").eval()
    with pytest.raises(ValueError, match=r"block 4 .*no lambda1"), vca.intervene(model, lambda1=0.0):
        raise AssertionError("the block was entered")
    with pytest.raises(ValueError, match="no attention layer"), vca.intervene(torch.nn.Linear(2, 2)):
        raise AssertionError("the block was entered")
    assert run(model, images_of(model), [0, 1, 2, 3], lambda1=0.0).isfinite().all()


# ---- Patches


@pytest.mark.parametrize("patches", [[], [0], [5, 6, 15], list(range(16))], ids=str)
def test_patches_are_painted_out_or_replaced(patches):
    model, x, other = make_vca_vit(), images(2), images(2, seed=1)
    painted, swapped = vca.replace_patches(model, x, patches), vca.replace_patches(model, x, patches, other)
    taken = vca.replace_patches(model, x, patches, other[:1])
    for image in range(2):
        mean = x[image].double().mean((1, 2)).float()
        for row in range(16):
            for column in range(16):
                inside = row // 4 * 4 + column // 4 in patches
                before = x[image, :, row, column]
                if inside:
                    torch.testing.assert_close(painted[image, :, row, column], mean)
                else:
                    assert torch.equal(painted[image, :, row, column], before)
                for result, source in ((swapped, other[image]), (taken, other[0])):
                    assert torch.equal(result[image, :, row, column], source[:, row, column] if inside else before)


def test_an_image_with_other_patches_is_answered_as_the_reference_does():
    model, x = make_vca_vit().double(), images().double()
    replaced = vca.replace_patches(model, x, [2, 7])
    by_hand = x.clone()
    mean = x.mean((2, 3))[..., None, None]
    by_hand[:, :, 0:4, 8:12] = mean
    by_hand[:, :, 4:8, 12:16] = mean
    want = answers(model, by_hand, heads=3, patch=4, token_grid=(2, 2))[-1]
    np.testing.assert_allclose(run(model, replaced), want, rtol=0, atol=1e-12)


def test_impossible_patches_are_refused():
    model, x = make_vca_vit(), images()
    with pytest.raises(ValueError, match="patch 16 is out of range: 4x4 patches are 0 to 15"):
        vca.replace_patches(model, x, [3, 16])
    with pytest.raises(ValueError, match=r"replacement has shape \(1, 3, 8, 8\)"):
        vca.replace_patches(model, x, [3], images(1, size=8))
    with pytest.raises(ValueError, match="Linear has no patch_embed"):
        vca.replace_patches(torch.nn.Linear(2, 2), x, [0])
