"""Recordings end, nest, and do not disturb one another."""

import copy
import sys
import threading
from contextlib import ExitStack

import pytest
import torch

import vca
from tests.helpers.vits import assert_fast_path, images, make_timm_vit, make_vca_vit
from vca import VisualContrastAttention


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
