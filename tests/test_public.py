"""The app as a public page: checkpoints of the Hub, limits, and what visitors may load."""

import pytest

from app import public
from app.models import Checkpoints
from app.ui import WEIGHTS, build
from tests.test_hub import LABELS
from tests.test_remote import cache, classifier, read, unreachable  # noqa: F401

SHIPPED = {folder.parent.name for folder in WEIGHTS.glob("*/config.json")}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for variable in ("VCA_MODELS", "VCA_ALLOWED", "SPACE_ID"):
        monkeypatch.delenv(variable, raising=False)


def test_checkpoints_of_the_hub_stand_beside_those_of_the_folder(hub, cache, classifier, monkeypatch):  # noqa: F811
    commit = hub.put("user/repo", read(classifier))
    hub.put("user/repo", {"config.json": b"{}"})
    monkeypatch.setenv("VCA_MODELS", f"user/repo@{commit}, user/nothing,")
    checkpoints = Checkpoints(WEIGHTS, public.served())
    assert set(checkpoints.folders) == {*SHIPPED, f"user/repo@{commit}"}
    assert checkpoints.load(f"user/repo@{commit}").label_names == LABELS
    (problem,) = checkpoints.problems
    assert problem.startswith("user/nothing: no repository on the Hub that may be read.")


def test_a_model_of_the_cache_is_served_without_a_network(hub, cache, classifier, unreachable):  # noqa: F811
    hub.put("user/repo", read(classifier))
    Checkpoints(WEIGHTS, ["user/repo"])
    unreachable()
    checkpoints = Checkpoints(WEIGHTS, ["user/repo", "user/other"])
    assert checkpoints.load("user/repo").label_names == LABELS
    (problem,) = checkpoints.problems
    assert "user/other: the Hub cannot be reached" in problem


@pytest.mark.parametrize(
    "name, on_a_space, with_list",
    [
        ("user/served", True, True),
        ("hf-hub:user/served@main", True, True),
        ("friend/any", False, True),
        ("user/other", False, False),
        ("weights/local", False, False),
        ("/etc", False, False),
        ("friend/../user/other", False, False),
        ("friend/folder/file", False, False),
    ],
)
def test_what_a_visitor_may_load(monkeypatch, name, on_a_space, with_list):
    monkeypatch.setenv("VCA_MODELS", "user/served@v1")
    assert public.may_load(name), "on one's own machine anything"
    monkeypatch.setenv("SPACE_ID", "user/space")
    assert public.may_load(name) == on_a_space
    monkeypatch.setenv("VCA_ALLOWED", "friend/*")
    assert public.may_load(name) == with_list
    monkeypatch.delenv("SPACE_ID")
    assert public.may_load(name) == with_list, "a list holds everywhere"


def test_a_public_page_limits_its_queue_and_its_cache(tmp_path, monkeypatch):
    page = build(tmp_path)
    assert page.delete_cache == (3600, 86400) and page._queue.max_size is None
    monkeypatch.setenv("SPACE_ID", "user/space")
    page = build(tmp_path)
    assert page.delete_cache == public.CACHE and page._queue.max_size == public.QUEUE
