"""The app through its endpoints: what it answers, what it refuses, and that it never falls over."""

import base64
import shutil
import time

import gradio as gr
import numpy as np
import pytest
import timm
import torch
from gradio_client import handle_file
from gradio_client.exceptions import AppError

import vca
from app.runtime import packing, records
from app.runtime.checkpoints import Checkpoints
from app.runtime.images import MAX_PIXELS, WORKING_SIDE, read_image
from app.runtime.packing import MapStore
from app.tabs import about, generate
from app.ui import build
from tests.helpers import http
from tests.helpers.app import LABELS, MHSA, PLAIN, PREFIXED, SMALL_PYRAMID, photo, recorded
from vca import fused, preprocessing
from vca.checkpoint import AUTOENCODER_FILES, AUTOENCODER_FOLDER
from vca.explorer.packing import pack


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "photo.png"
    photo(90, 60).save(path)
    return path


# ---- Endpoints


def test_endpoints_are_exactly_the_documented_ones(client):
    assert set(client.view_api(return_format="dict", print_info=False)["named_endpoints"]) == {
        "/models",
        "/classify",
        "/attention",
        "/attribution",
        "/faithfulness",
        "/compare",
        "/intervene",
        "/generate",
    }


def test_models(client):
    by_name = {entry["name"]: entry for entry in client.predict(api_name="/models")}
    assert set(by_name) == {PLAIN, PREFIXED, MHSA}
    assert by_name[PREFIXED]["input_size"] == [3, 16, 20]
    assert by_name[PREFIXED]["prefix_tokens"] == ["class", "register 1"]
    assert by_name[PREFIXED]["classes"] == LABELS
    facts = dict(kind="vca", heads=3, grid_size=[4, 5], token_grid=[3, 2])
    assert by_name[PREFIXED]["blocks"] == [dict(block=block, **facts) for block in range(3)]
    assert by_name[MHSA]["blocks"][0]["token_grid"] is None


@pytest.mark.parametrize("name", [PLAIN, PREFIXED, MHSA])
def test_classify_is_the_model(client, weights, picture, name):
    answer = client.predict(handle_file(picture), name, 3, api_name="/classify")
    _, probabilities, _ = recorded(weights, name, picture)
    assert list(answer) == [LABELS[i] for i in np.argsort(-probabilities)[:3]]
    np.testing.assert_allclose(list(answer.values()), np.sort(probabilities)[::-1][:3], rtol=1e-4)


@pytest.mark.parametrize(
    "name, stage, query", [(PLAIN, "stage1", 5), (PREFIXED, "stage2", 1), (PREFIXED, "effective", 21)]
)
def test_attention_is_the_record(client, weights, picture, name, stage, query):
    file = client.predict(handle_file(picture), name, 1, 2, stage, query, api_name="/attention")
    _, _, maps = recorded(weights, name, picture)
    with np.load(file) as arrays:
        expected = maps[1].effective if stage == "effective" else getattr(maps[1], stage).differential
        np.testing.assert_allclose(
            arrays["effective" if stage == "effective" else "differential"], expected[0, 2, query].numpy(), atol=1e-6
        )
        assert tuple(arrays["grid_size"]) == maps[1].grid_size
        assert tuple(arrays["token_grid"]) == maps[1].token_grid
        assert arrays["num_prefix_tokens"] == maps[1].num_prefix_tokens
        np.testing.assert_allclose(arrays["lambdas"], [maps[1].lambda1.item(), maps[1].lambda2.item()])


def test_attention_of_self_attention(client, weights, picture):
    file = client.predict(handle_file(picture), MHSA, 0, 0, "effective", 3, api_name="/attention")
    with np.load(file) as arrays:
        assert arrays["effective"].sum() == pytest.approx(1, abs=1e-5)
        assert "token_grid" not in arrays


@pytest.mark.parametrize(
    "arguments, names",
    [
        (("nothing", 0, 0, "stage1", 0), [PLAIN, PREFIXED, MHSA]),
        ((PLAIN, 3, 0, "stage1", 0), ["block", "0, 1, 2"]),
        ((PLAIN, -1, 0, "stage1", 0), ["block", "0, 1, 2"]),
        ((PLAIN, 0, 3, "stage1", 0), ["head", "0 to 2"]),
        ((PLAIN, 0, "all", "stage1", 0), ["head", "0 to 2"]),
        ((PLAIN, 0, 0, "stage3", 0), ["stage1", "stage2", "effective"]),
        ((PLAIN, 0, 0, "stage1", 16), ["query", "0 to 15"]),
        ((PLAIN, 0, 0, "stage2", 1.5), ["query", "0 to 63"]),
        ((PLAIN, 0, 0, "effective", None), ["query", "0 to 63"]),
        ((MHSA, 0, 0, "stage2", 0), ["stage1, effective"]),
    ],
)
def test_wrong_arguments_name_the_allowed_ones(client, picture, arguments, names):
    with pytest.raises(AppError) as caught:
        client.predict(handle_file(picture), *arguments, api_name="/attention")
    assert "\n" not in str(caught.value)
    assert all(name in str(caught.value) for name in names), str(caught.value)


@pytest.mark.parametrize("top_k", [0, 5, "two", True])
def test_wrong_top_k(client, picture, top_k):
    with pytest.raises(AppError, match="top_k must be a whole number from 1 to 4"):
        client.predict(handle_file(picture), PLAIN, top_k, api_name="/classify")


@pytest.mark.parametrize("image", [None, "photo.png", 3, {"path": "/etc/hostname"}, {"path": None}, {}])
def test_only_uploads_are_read(client, image):
    with pytest.raises(AppError, match="upload"):
        client.predict(image, PLAIN, 1, api_name="/classify")


# ---- Files


def test_large_photo_is_fast_and_right(client, weights, tmp_path):
    path = tmp_path / "large.jpg"
    large = photo(4000, 3000)
    large.save(path, quality=95)
    client.predict(handle_file(path), PLAIN, 4, api_name="/classify")
    start = time.perf_counter()
    answer = client.predict(handle_file(path), PLAIN, 4, api_name="/classify")
    assert time.perf_counter() - start < 8
    assert min(read_image(path).size) >= WORKING_SIDE
    model = vca.load(weights / PLAIN)
    exact, _ = records.record(model, preprocessing.preprocess(model, large))
    np.testing.assert_allclose([answer[label] for label in LABELS], exact, atol=0.02)


def test_limit_is_what_the_sentence_says():
    assert MAX_PIXELS == 100_000_000


# ---- What the visitor sees


def test_crop_is_the_part_that_reaches_the_model(weights, tmp_path):
    image = photo(300, 100)
    model = vca.load(weights / PLAIN)
    crop = preprocessing.center_crop(model, image)
    assert crop.size == (100, 100)
    np.testing.assert_array_equal(np.asarray(crop), np.asarray(image)[:, 100:200])


# ---- The store of maps


def layers(kilobytes: int) -> list[packing.Layer]:
    arrays = dict(positive1=np.zeros((kilobytes, 512), np.float16))
    return [packing.Layer("mhsa", 0, 1, (1, 1), None, 0, None, None, (1, 0), arrays)]


def test_store_is_bounded_and_forgets_the_longest_unused():
    store = MapStore(limit=10 * 1024)
    first, second = store.put(layers(4)), store.put(layers(4))
    store.get(first)
    third = store.put(layers(4))
    assert store.size() <= store.limit
    assert store.get(first) and store.get(third)
    with pytest.raises(KeyError):
        store.get(second)


def test_store_refuses_what_cannot_fit():
    with pytest.raises(Exception, match="too large"):
        MapStore(limit=1024).put(layers(4))


def test_visitors_do_not_mix(weights):
    store = MapStore(limit=2**20)
    tokens = [store.put(layers(k)) for k in range(1, 40)]
    assert len(set(tokens)) == 39 and min(map(len, tokens)) >= 32
    assert [store.get(token)[0].arrays["positive1"].shape[0] for token in tokens] == list(range(1, 40))


def fetch(url: str, component: int, request, function: str = "fetch_maps") -> dict:
    body = dict(session_hash="test", component_id=component, fn_name=function, data=request)
    answer = http.post(f"{url}gradio_api/component_server", json=body)
    assert answer.status_code == 200
    return answer.json()


@pytest.mark.parametrize("function", ["fetch_maps", "export_numbers", "export_page"])
def test_server_functions_give_maps_only_for_a_token(url, function):
    components = http.get(f"{url}config").json()["components"]
    explorer = next(c["id"] for c in components if c["props"].get("elem_id") == "explorer")
    for request in (dict(token="guess", block=0), dict(), None, "token", dict(token=["x"], block="0")):
        assert fetch(url, explorer, request, function) == dict(expired=True)


def test_float16_survives_the_way_to_the_page(weights, picture):
    _, _, maps = recorded(weights, PLAIN, picture)
    array = pack(maps[0]).arrays["positive1"]
    copy = np.frombuffer(base64.b64decode(base64.b64encode(array.tobytes())), np.float16).reshape(array.shape)
    np.testing.assert_allclose(copy, maps[0].stage1.positive[0], atol=5e-4)


def test_no_weights_is_said_in_words(tmp_path):
    demo = build(tmp_path)
    words = "".join(str(block.value) for block in demo.blocks.values() if hasattr(block, "value"))
    assert "python -m training.classify" in words


def test_a_damaged_checkpoint_is_named_and_the_others_served(weights, tmp_path):
    for name in (PLAIN, "damaged"):
        shutil.copytree(weights / PLAIN, tmp_path / name)
    (tmp_path / "damaged" / "config.json").write_text("{")
    demo = build(tmp_path)
    words = "".join(str(block.value) for block in demo.blocks.values() if hasattr(block, "value"))
    assert "damaged/config.json: not a readable JSON file" in words
    assert Checkpoints(tmp_path).classifiers == [PLAIN]


# ---- Layers as the explorer draws them


KINDS = {
    "swin": lambda: timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=36, window_size=3, embed_dim=12, depths=(2, 1), num_heads=(2, 4)
    ),
    "pvt": lambda: vca.create_model("pvt_tiny", **SMALL_PYRAMID, num_heads=(1, 2, 2, 2)),
    "cswin": lambda: vca.create_model(
        "cswin_tiny", **SMALL_PYRAMID, num_heads=(2, 2, 2, 4), split_sizes=(2, 1, 1, None)
    ),
}


def packed(name: str):
    """The layers of a small untrained model for a random image: what was recorded, and what the explorer gets."""
    model = KINDS[name]().eval()
    side = model.patch_embed.img_size[0]
    _, maps = records.record(model, torch.randn(1, 3, side, side))
    return maps, packing.pack_all(maps)


@pytest.mark.parametrize("name", KINDS)
def test_every_layer_of_a_pyramid_is_drawn_on_its_own_grid(name):
    maps, layers = packed(name)
    assert [layer.block for layer in layers] == [layer.block for layer in maps]
    assert [layer.grid for layer in layers] == [layer.grid_size for layer in maps]
    assert len({layer.grid for layer in layers}) > 1


@pytest.mark.parametrize("name", ["swin", "cswin"])
def test_windows_keep_their_rows_and_patches(name):
    maps, layers = packed(name)
    shifted = 0
    for record, layer in zip(maps, layers, strict=True):
        patches, slots = layer.arrays["patches"], record.stage1.positive.shape[-1]
        assert sorted(patches[patches >= 0]) == list(range(layer.grid[0] * layer.grid[1]))
        shifted += record.shift_size != (0, 0)
        for window, head, slot in ((0, 0, 0), (-1, -1, slots - 1)):
            rows = layer.arrays["positive1"][head].reshape(-1, slots, slots)
            np.testing.assert_allclose(rows[window, slot], record.stage1.positive[0, window, head, slot], atol=5e-4)
            assert patches.reshape(-1, slots)[window, slot] == record.window_patches[window, slot]
    assert shifted == (1 if name == "swin" else 0)


def test_reduced_keys_have_a_grid():
    _, layers = packed("pvt")
    assert [layer.keys for layer in layers] == [(1, 1)] * 4
    assert layers[0].arrays["positive1"].shape == (1, 64, 1)


def test_the_branches_of_cross_shaped_attention_share_a_block():
    _, layers = packed("cswin")
    assert [layer.label for layer in layers] == ["1↕", "1↔", "2↕", "2↔", "3↕", "3↔", "4"]


def test_the_default_is_the_vca_model_with_most_classes(tmp_path):
    small = dict(embed_dim=24, depth=1, num_heads=3)
    for name, attention, count in (("vca_a", "vca", 2), ("vca_b", "vca", 9), ("mhsa", "mhsa", 99)):
        model = vca.create_model(f"{attention}_vit_pico_patch4_32", num_classes=count, **small)
        vca.save(model, tmp_path / name, label_names=[str(i) for i in range(count)])
    assert Checkpoints(tmp_path).classifiers == ["vca_b", "vca_a", "mhsa"]


def test_prefix_tokens_have_names():
    model = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, embed_dim=24, depth=1)
    assert records.prefix_names(model) == ["class", "distillation"]


def test_maps_recorded_elsewhere_can_be_shown():
    store = MapStore()
    generator = vca.create_model("vca_dit_s_2", input_size=8, dim=24, depth=2, num_heads=3, num_classes=4)
    with torch.no_grad(), vca.record(generator) as maps:
        generator(torch.randn(2, 4, 8, 8), torch.tensor([3, 3]), torch.tensor([0, 1]))
    run = packing.run_of(store, maps, photo(8, 8), ("Sample", "left, step 3"), [], sample=1)
    assert run["caption"] == ("Sample", "left, step 3")
    assert [block["grid"] for block in run["blocks"]] == [(4, 4), (4, 4)]
    kept = store.get(run["token"])[1].arrays["positive2"]
    np.testing.assert_allclose(kept, maps[1].stage2.positive[1], atol=5e-4)


def test_classifiers_and_generators_are_told_apart(weights, tmp_path):
    shutil.copytree(weights / PLAIN, tmp_path / PLAIN)
    for name, architecture, options in (
        ("pixels", "vca_sit_xs_4", dict(input_size=(16, 32))),
        ("vca_latents", "vca_dit_s_8", dict(dim=24, depth=1, num_heads=2)),
        ("brings_its_own", "sit_xs_4", dict(dim=24, depth=1, num_heads=2, input_size=16, vae=AUTOENCODER_FOLDER)),
        ("of_another", "sit_xs_4", dict(dim=24, depth=1, num_heads=2, vae="user/autoencoder")),
    ):
        generator = vca.create_model(architecture, num_classes=len(LABELS), **options)
        vca.save(generator, tmp_path / name, label_names=LABELS)
    (tmp_path / "brings_its_own" / AUTOENCODER_FOLDER).mkdir()
    (tmp_path / "brings_its_own" / AUTOENCODER_FILES[0]).write_text('{"block_out_channels": [8, 16, 16]}')
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.classifiers == [PLAIN]
    assert checkpoints.generators == ["vca_latents", "brings_its_own", "of_another", "pixels"]
    assert checkpoints.load_generator("pixels").label_names == LABELS
    for load, name, known in ((checkpoints.load, "pixels", PLAIN), (checkpoints.load_generator, PLAIN, "vca_latents")):
        with pytest.raises(gr.Error, match=f"model must be one of: {known}"):
            load(name)
    assert about.attention_path() == f"Attention is computed here by {fused.status()}."
    table = about.table(checkpoints)
    assert "| pixels<br>`pixels` | generates | 4 | 32×16 |" in table
    assert "| vca_latents<br>`vca_latents` | generates | 4 | 256×256 |" in table
    assert "| brings_its_own<br>`brings_its_own` | generates | 4 | 64×64 |" in table
    assert "| of_another<br>`of_another` | generates | 4 | - |" in table
    said = {name: generate._choices(checkpoints.configs[name])[2] for name in checkpoints.generators}
    assert "stabilityai/sd-vae-ft-ema (335 MB), fetched when it is first used, turns" in said["vca_latents"]
    assert "An autoencoder that comes with it turns" in said["brings_its_own"]
    assert "user/autoencoder, fetched when it is first used, turns" in said["of_another"] and not said["pixels"]
