"""Layers on grids that change from image to image."""

import threading

import pytest
import timm
import torch

import vca
from tests.helpers.kinds import images, make, randomized


@pytest.mark.parametrize("kind", ["vca", "agent", "mhsa_dwc", "diff", "mhsa"])
def test_dynamic_image_sizes(kind):
    options = dict(img_size=64, embed_dim=24, depth=2, num_heads=2, token_grid=(2, 2), num_classes=3, attention=kind)
    model = randomized(vca.create_model("vca_deit_tiny_patch16_224", dynamic_img_size=True, **options)).double().eval()
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
