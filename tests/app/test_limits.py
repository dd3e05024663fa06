"""One stranger exhausts nothing, and one visitor waits for no other."""

import base64
import inspect
import os
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import pytest
import timm
import torch
from PIL import Image
from torch.nn.modules import module as hooks
from torch.utils.flop_counter import FlopCounterMode

import vca
from app import settings
from app.runtime import checkpoints, cost, export, folders, images, limits, loading
from app.runtime.gradio_adapter import nobody_listens, with_lasting_queue
from app.runtime.images import ImageError, read_image
from app.runtime.validation import page_request, plain, refused
from tests.helpers import http
from tests.helpers.app import LABELS, PLAIN, photo, save_checkpoints
from tests.helpers.checkpoints import tiny

PATIENCE = 60

# ---- Counting


COUNTED = {
    "vca": lambda: vca.create_model("vca_vit_pico_patch4_32", num_classes=4),
    "mhsa": lambda: vca.create_model("mhsa_vit_pico_patch4_32", num_classes=4),
    "swin": lambda: timm.create_model("swin_tiny_patch4_window7_224", embed_dim=12, depths=(1, 1), num_heads=(1, 2)),
    "generator": tiny,
}


@pytest.mark.parametrize("name", COUNTED)
def test_flops_are_those_of_pytorch_and_hook_no_other_module(name):
    model, hooked = COUNTED[name]().eval(), []
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        cost.forward_of(model)()
    handle = model.register_forward_pre_hook(
        lambda *_: hooked.append(len(hooks._global_forward_pre_hooks) + len(hooks._global_forward_hooks))
    )
    assert cost.size_facts(model)["Multiply-adds, one image"] == f"{counter.get_total_flops() / 2e9:.3g} G"
    assert hooked == [0]
    cost.size_facts(model)
    assert hooked == [0], "it is counted once"
    handle.remove()


# ---- Waiting


@pytest.mark.skipif(not hasattr(limits._libc, "mallinfo2"), reason="the C library is not glibc")
@pytest.mark.parametrize("ends", [nullcontext(), pytest.raises(ZeroDivisionError)], ids=["well", "in an error"])
def test_freed_memory_goes_back_to_the_system_after_heavy_work(ends):
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    with ends, limits.heavy_work():
        pieces = [bytearray(100_000) for _ in range(6000)]
        del pieces[::2], pieces[1::2]  # what is left lies between what is freed
        held = resident()
        if not isinstance(ends, nullcontext):
            1 / 0  # noqa: B018
    assert len(pieces) == 1500 and resident() < held - 256 * 2**20


def test_heavy_work_has_one_limit_and_may_nest():
    inside, most, go = [], [], threading.Event()

    def work() -> None:
        with limits.heavy_work(), limits.heavy_work():
            inside.append(1)
            most.append(len(inside))
            go.wait(PATIENCE)
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads:
        thread.start()
    while len(most) < limits.AT_A_TIME:
        time.sleep(0.01)
    go.set()
    for thread in threads:
        thread.join(PATIENCE)
    assert len(most) == 5 and max(most) <= limits.AT_A_TIME


@pytest.fixture
def served(tmp_path, monkeypatch):
    """Models that are served, and a Hub that does not answer until `answer` is set."""
    save_checkpoints(tmp_path)
    served, answer, asked = checkpoints.Checkpoints(tmp_path), threading.Event(), []

    def open_model(reference):
        asked.append(reference)
        answer.wait(PATIENCE)
        if reference == "a/missing":
            raise vca.CheckpointError(f"{reference}: no repository <b>.")
        return loading.open_folder(tmp_path / PLAIN, reference)

    monkeypatch.setattr(loading, "open_model", open_model)
    yield served, answer, asked
    answer.set()


def test_a_silent_hub_keeps_nobody_waiting(served, monkeypatch):
    served, answer, asked = served
    monkeypatch.setattr(checkpoints, "PATIENCE", 0.3)
    for _ in range(2):
        with pytest.raises(gr.Error, match="a/b: the Hub takes long"):
            served.load("a/b")
    assert asked == ["a/b"], "the second visitor waits for the same"
    assert served.load(PLAIN).label_names == LABELS
    waiting = served.opening("a/c")
    next(waiting)
    waiting.close()
    answer.set()
    monkeypatch.setattr(checkpoints, "PATIENCE", PATIENCE)
    assert served.load("a/b").label_names == served.load("a/c").label_names == LABELS
    assert sorted(asked) == ["a/b", "a/c"]
    with pytest.raises(gr.Error, match="a/missing: no repository ‹b›"):
        served.load("a/missing")


def test_few_models_are_opened_at_once(served, monkeypatch):
    served, answer, _ = served
    monkeypatch.setattr(loading, "OPENED_AT_ONCE", 2)
    for name in ("a/b", "a/c"):
        next(served.opening(name))
    with pytest.raises(gr.Error, match="Too many models"):
        next(served.opening("a/d"))
    answer.set()


def test_who_takes_no_message_does_not_listen():
    waiting = SimpleNamespace(qsize=lambda: 40)
    page = SimpleNamespace(_queue=SimpleNamespace(pending_messages_per_session=dict(here=waiting)))
    gone = partial(nobody_listens, page, SimpleNamespace(session_hash="here"))
    assert gone(30) and gone(40)
    assert not gone(29), "it may be about to"
    assert not gone(41), "it has taken one"
    assert not nobody_listens(page, SimpleNamespace(session_hash="other"), 100)


# ---- Images


def test_what_decoding_takes_is_known_before(tmp_path, monkeypatch):
    files = {"float.tiff": "F", "rgba.png": "RGBA", "grey.png": "L"}
    for name, mode in files.items():
        Image.new(mode, (300, 200)).save(tmp_path / name)
    photo(300, 200).save(tmp_path / "progressive.jpg", progressive=True)
    photo(300, 200).save(tmp_path / "plain.jpg")
    monkeypatch.setattr(images, "MAX_BYTES", 4 * 300 * 200 - 1)
    assert read_image(tmp_path / "grey.png").size == (300, 200)
    for name in ("float.tiff", "rgba.png", "progressive.jpg"):
        with pytest.raises(ImageError, match="This image is too large: decoding it takes"):
            read_image(tmp_path / name)


def test_large_images_are_reduced_whatever_their_shape(tmp_path):
    Image.new("L", (1, 1_000_000)).save(tmp_path / "tall.png")
    assert max(read_image(tmp_path / "tall.png").size) <= images.LONGEST_SIDE
    Image.new("L", (2600, 7000), 200).save(tmp_path / "large.png")
    assert read_image(tmp_path / "large.png").size == (1300, 3500)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_without_its_end_is_read_if_it_is_whole(tmp_path, progressive):
    image, file = photo(200, 150), tmp_path / "photo.jpg"
    image.save(file, quality=95, progressive=progressive)
    whole = read_image(file)
    content = file.read_bytes()
    assert content[-2:] == b"\xff\xd9"
    file.write_bytes(content[:-2])
    assert read_image(file).tobytes() == whole.tobytes()
    file.write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(ImageError, match="damaged or incomplete"):
        read_image(file)


@pytest.mark.parametrize(
    "start, words",
    [
        (b"\0\0\0\x18ftypheic", "HEIC"),
        (b"\0\0\0\x18ftypmif1", "HEIC"),
        (b"II*\0\x08\0\0\0", "This kind of TIFF image"),
        (b"MM\0*\0\0\0\x08", "This kind of TIFF image"),
        (b"RIFF\0\1\0\0WEBPVP8 ", "damaged or incomplete"),
        (b"\x89PNG\r\n\x1a\n", "damaged or incomplete"),
    ],
)
def test_a_refusal_names_what_the_file_is(tmp_path, start, words):
    (tmp_path / "file").write_bytes(start + bytes(200))
    with pytest.raises(ImageError, match=words):
        read_image(tmp_path / "file")


# ---- Requests


def test_nothing_from_outside_is_html():
    said = refused("x: <form action=//evil>" + "y" * 10_000).message
    assert "<" not in said and "‹form" in said and len(said) <= 600
    assert plain("<img src=x onerror=alert(1)>") == "‹img src=x onerror=alert(1)›"


@pytest.mark.parametrize(
    "error", [KeyError("x"), TypeError(), ValueError(), AttributeError(), OverflowError(), RecursionError()], ids=repr
)
def test_a_request_that_is_none_is_answered(error):
    @page_request
    def function(request):
        raise error

    assert function.__name__ == "function" and function(None) == dict(expired=True)


def test_a_page_that_would_be_too_large_is_refused(monkeypatch):
    arrays = dict(x=dict(shape=[1], type="float16", data=base64.b64encode(bytes(600)).decode()))
    run = dict(caption=("a", "b"))
    assert export.page(run, [arrays] * 3, {}).count('"float16"') == 3
    monkeypatch.setattr("vca.explorer.page.MOST_BYTES", 2000)
    with pytest.raises(gr.Error, match="too large for a page"):
        export.page(run, [arrays] * 3, {})


WRONG = [None, True, -7, 1e300, "", "x", [], {}, [[]], "[" * 100_000]


@pytest.mark.parametrize(
    "element, function",
    [
        ("explorer", "fetch_maps"),
        ("explorer", "export_numbers"),
        ("explorer", "export_page"),
        ("compare", "fetch_maps"),
        ("compare", "measure"),
        ("compare", "look"),
        ("think", "look_inside"),
        ("think", "what_if"),
        ("think", "take_tour"),
        ("think", "reduce"),
    ],
)
def test_wrong_types_to_a_page_function(url, element, function):
    config = http.get(f"{url}config").json()
    component = next(c for c in config["components"] if c["props"].get("elem_id") == element)
    keys = "token block mode head query lambda view run step picture withoutClass model path off lambda_scale patches"
    keys = keys.split()
    for value in [*WRONG, *(dict.fromkeys(keys, value) for value in WRONG)]:
        body = dict(session_hash="test", component_id=component["id"], fn_name=function, data=value)
        answer = http.post(f"{url}gradio_api/component_server", json=body)
        assert answer.status_code == 200 and answer.json().keys() & {"expired", "failed"}, (value, answer.text)


def test_wrong_types_to_an_event(url, weights, capfd):
    """Every event of the page, with values that no page sends: an answer or a refusal, no traceback of the app."""
    from app.ui import build

    for event in build(weights).fns.values():
        function = getattr(event.fn, "func", event.fn)  # some are partial
        if function is None or not function.__module__.startswith("app.") or event.api_name in ("models", "generate"):
            continue
        annotations = [parameter.annotation for parameter in inspect.signature(event.fn).parameters.values()]
        given = [annotation for annotation in annotations if annotation in (gr.Request, gr.EventData)]
        fields = ("name", "model", "seen", "token", "step", "picture", "withoutClass")
        told = [None, {}, *(dict.fromkeys(fields, value) for value in WRONG)]
        for data, value in product(told if gr.EventData in given else [{}], WRONG):
            by_gradio = {gr.Request: gr.Request(session_hash="test"), gr.EventData: gr.EventData(None, data)}
            try:
                answer = event.fn(*map(by_gradio.get, given), *[value] * len(event.inputs))
                list(answer) if hasattr(answer, "__next__") else None
            except gr.Error as error:
                assert "<" not in error.message and len(error.message) < 700


# ---- The server


def test_a_forgotten_session_does_not_end_the_queue():
    """More sessions than are kept join while the first is at work: its answers are lost, those of the last are not."""
    started, go_on = threading.Event(), threading.Event()

    def work() -> str:
        started.set()
        assert go_on.wait(PATIENCE)
        return "done"

    with gr.Blocks(analytics_enabled=False) as page:
        gr.api(work, api_name="work")
    page.queue()
    page._queue.pending_messages_per_session.max_size = 4
    _, address, _ = with_lasting_queue(page).launch(prevent_thread_lock=True, quiet=True)
    try:
        for number in range(8):
            body = dict(data=[], fn_index=0, session_hash=f"visitor{number}")
            assert http.post(f"{address}gradio_api/queue/join", json=body).status_code == 200
        assert started.wait(PATIENCE)
        go_on.set()
        deadline = time.monotonic() + PATIENCE
        while len(page._queue) and not page._queue.stopped and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not page._queue.stopped
        said = http.get(f"{address}gradio_api/queue/data", params=dict(session_hash="visitor7")).text
        assert '"process_completed"' in said and '"done"' in said
        messages = page._queue.pending_messages_per_session
        del messages["visitor7"], messages["visitor7"]
        assert "visitor7" not in messages
    finally:
        page.close()


@pytest.mark.parametrize(
    "variables, public",
    [
        (dict(), False),
        (dict(GRADIO_SERVER_NAME="127.0.0.1"), False),
        (dict(GRADIO_SERVER_NAME="localhost", GRADIO_SHARE="False"), False),
        (dict(GRADIO_SERVER_NAME="0.0.0.0"), True),
        (dict(GRADIO_SERVER_NAME="192.168.1.2"), True),
        (dict(GRADIO_SERVER_NAME="::"), True),
        (dict(GRADIO_SHARE="True"), True),
        (dict(SPACE_ID="user/space"), True),
    ],
    ids=str,
)
def test_who_can_reach_the_page(monkeypatch, variables, public):
    for name in ("GRADIO_SERVER_NAME", "GRADIO_SHARE", "SPACE_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert settings.is_public() == public
    assert settings.may_load("/etc") != public


def test_folders_of_killed_servers_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait(PATIENCE)
    for name in (f"vca-app-{dead.pid}-upload-x", "vca-app-notes", f"vca-app-{os.getppid()}-upload-y"):
        (tmp_path / name).mkdir()
    (tmp_path / f"vca-app-{dead.pid}-link").symlink_to(tmp_path / "vca-app-notes")
    mine = folders.new_folder("upload")
    with folders.temporary_folder("upload") as used:
        assert used.is_dir()
    assert not used.exists()
    folders.remove_left()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {mine.name, "vca-app-notes", f"vca-app-{os.getppid()}-upload-y", f"vca-app-{dead.pid}-link"}


def test_no_message_names_a_folder_of_the_server(weights, tmp_path):
    folder = Path(tmp_path / "weights")
    save_checkpoints(folder)
    (folder / PLAIN / "model.safetensors").write_bytes(b"x")
    with pytest.raises(gr.Error) as caught:
        checkpoints.Checkpoints(folder).load(PLAIN)
    assert str(tmp_path) not in caught.value.message and caught.value.message.startswith(f"{PLAIN}/model.safetensors:")
