"""A photo is decoded and recorded once for each model, whatever is asked of it."""

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from gradio_client import handle_file

import vca
from app.runtime import records
from app.runtime.gradio_adapter import upload_folder
from app.runtime.records import Recordings
from app.runtime.store import Store
from app.tabs.attribution import PREDICTED
from app.ui import build
from tests.helpers.app import LABELS, MHSA, PLAIN
from vca.attribution import METHODS


@pytest.fixture
def counts(monkeypatch):
    """How many photos were decoded, and how many were recorded, from now on."""
    counts = dict(decoded=0, recorded=0)

    def counted(what: str, function):
        def count(*arguments):
            counts[what] += 1
            return function(*arguments)

        return count

    monkeypatch.setattr(records, "read_image", counted("decoded", records.read_image))
    monkeypatch.setattr(records, "record_logits", counted("recorded", records.record_logits))
    return counts


@pytest.fixture
def upload(picture):
    """A photo as gradio hands it to a function, after it was uploaded."""
    folder = upload_folder() / "0123456789abcdef"
    folder.mkdir(parents=True, exist_ok=True)
    yield dict(path=shutil.copy(picture, folder))
    shutil.rmtree(folder)


def test_classify_and_every_attribution_share_one_recording(weights, upload, counts):
    functions = {getattr(f.fn, "__name__", ""): f.fn for f in build(weights).fns.values()}
    method, head = next(iter(METHODS)), "block 2, head 1"
    seen = json.loads(functions["classify"](upload, PLAIN)[0])
    functions["begin"](upload, PLAIN, method)
    figures = [functions["explain"](upload, PLAIN, *asked)[0] for asked in ((method, 2), (head, 2), (head, PREDICTED))]
    assert " for up" in figures[0] and "speaks for it" in figures[0]
    assert figures[1] == figures[2], "the map of a head knows no class"
    assert "Block 2, head 1: attention, the same whichever class" in figures[1] and "speaks for" not in figures[1]
    assert seen["top"][0][0] in LABELS
    next(functions["measure"](upload, PLAIN, method, 1))
    assert counts == dict(decoded=1, recorded=1)
    functions["explore"](upload, PLAIN)
    functions["compare"](upload, PLAIN, MHSA)
    assert counts == dict(decoded=2, recorded=2), "one for each model"


def test_labels_need_no_recording(client, picture, counts, monkeypatch):
    first = client.predict(handle_file(picture), PLAIN, 4, api_name="/classify")
    monkeypatch.setattr(vca, "record", None)  # it was needed only to open the model
    answer = client.predict(handle_file(picture), PLAIN, 4, api_name="/classify")
    assert set(answer) == set(LABELS) and answer == first and counts["recorded"] == 0


def test_visitors_who_ask_at_once_wait_for_one_recording(weights, picture, counts):
    model, recordings = vca.load(weights / PLAIN), Recordings()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: recordings.get(model, picture), range(16)))
    assert counts == dict(decoded=1, recorded=1) and len(set(map(id, found))) == 1


def test_a_recording_is_of_one_model_and_does_not_keep_it(weights, picture, counts):
    recordings = Recordings()
    first, second = vca.load(weights / PLAIN), vca.load(weights / MHSA)
    one, other = recordings.get(first, picture), recordings.get(second, picture)
    assert not np.allclose(one.probabilities, other.probabilities)
    np.testing.assert_allclose(one.probabilities, records.classify(first, one.x), rtol=1e-6)
    del first
    again = vca.load(weights / PLAIN)
    assert recordings.get(again, picture) is not one


def test_the_size_of_a_recording_counts_its_photo_and_every_map(weights, picture):
    recorded = Recordings().get(vca.load(weights / PLAIN), picture)
    streams = [s for m in recorded.maps for stage in (m.stage1, m.stage2) for s in (stage.positive, stage.negative)]
    least = sum(stream.nbytes for stream in streams) + 3 * 200 * 160
    assert least < recorded.size < 3 * least


def test_a_store_makes_different_items_at_once_and_keeps_none_that_is_too_large():
    store = Store(10, len)
    with ThreadPoolExecutor(2) as pool:
        slow = pool.submit(store.get_or_make, "slow", lambda: time.sleep(0.2) or "slow")
        assert store.get_or_make("fast", lambda: "fast") == "fast" and not slow.done()
    assert store.get_or_make("large", lambda: "x" * 11) == "x" * 11
    with pytest.raises(KeyError):
        store.get("large")
    assert store.size() == 8


def test_a_fault_while_an_item_is_made_is_raised_and_forgotten():
    store = Store(10, len)
    with pytest.raises(ZeroDivisionError):
        store.get_or_make("key", lambda: 1 // 0)
    assert store.get_or_make("key", lambda: "made") == "made"
    assert torch.is_grad_enabled()
