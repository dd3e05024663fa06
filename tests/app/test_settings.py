"""The app as a public page: checkpoints of the Hub, limits, and what visitors may load."""

import pickle
from types import SimpleNamespace

import pytest
import torch

from app import settings
from app.runtime import sampling
from app.runtime.checkpoints import Checkpoints
from app.ui import WEIGHTS, build
from tests.helpers.checkpoints import (
    LABELS,
    read,
    tiny,
)
from vca.diffusion.sampling import silent

SHIPPED = {folder.parent.name for folder in WEIGHTS.glob("*/config.json")}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for variable in ("VCA_MODELS", "VCA_ALLOWED", "SPACE_ID"):
        monkeypatch.delenv(variable, raising=False)


def test_checkpoints_of_the_hub_stand_beside_those_of_the_folder(hub, cache, classifier, monkeypatch):
    commit = hub.put("user/repo", read(classifier))
    hub.put("user/repo", {"config.json": b"{}"})
    monkeypatch.setenv("VCA_MODELS", f"user/repo@{commit}, user/nothing,")
    checkpoints = Checkpoints(WEIGHTS, settings.served())
    assert set(checkpoints.folders) == {*SHIPPED, f"user/repo@{commit}"}
    assert checkpoints.load(f"user/repo@{commit}").label_names == LABELS
    (problem,) = checkpoints.problems
    assert problem.startswith("user/nothing: no repository on the Hub that may be read.")


def test_a_model_of_the_cache_is_served_without_a_network(hub, cache, classifier, unreachable):
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
    assert settings.may_load(name), "on one's own machine anything"
    monkeypatch.setenv("SPACE_ID", "user/space")
    assert settings.may_load(name) == on_a_space
    monkeypatch.setenv("VCA_ALLOWED", "friend/*")
    assert settings.may_load(name) == with_list
    monkeypatch.delenv("SPACE_ID")
    assert settings.may_load(name) == with_list, "a list holds everywhere"


def test_a_public_page_limits_its_queue_and_its_cache(tmp_path, monkeypatch):
    page = build(tmp_path)
    assert page.delete_cache == (3600, 86400) and page._queue.max_size is None
    monkeypatch.setenv("SPACE_ID", "user/space")
    page = build(tmp_path)
    assert page.delete_cache == settings.CACHE and page._queue.max_size == settings.QUEUE


@pytest.fixture
def lent(monkeypatch):
    """A Space with ZeroGPU, as its callers see it: arguments and results are pickled. Gives the times asked for."""
    work, seconds = sampling.on_lent_gpu, []

    def lend(*arguments):
        seconds.append(sampling.gpu_seconds(*arguments))
        return pickle.loads(pickle.dumps(work(*pickle.loads(pickle.dumps(arguments)))))

    monkeypatch.setenv("SPACES_ZERO_GPU", "true")
    monkeypatch.setattr(settings, "spaces", SimpleNamespace())
    monkeypatch.setattr(sampling, "on_lent_gpu", lend)
    return seconds


def test_a_lent_gpu_makes_the_same_pictures_and_states(monkeypatch, lent):
    model = tiny()
    model.label_names = LABELS
    request = sampling.check_request(model, LABELS[1], 2, 5, 1.5, 3, None)
    run = sampling.Run(model, request)
    frames = list(run.progress())
    assert frames == [] and lent == [20 + 2 * 5 // 40]
    monkeypatch.delenv("SPACES_ZERO_GPU")
    here = sampling.Run(model, request)
    here.sample(silent)
    assert torch.equal(run.images, here.images)
    assert run.states.keys() == here.states.keys()
    assert all(torch.equal(run.states[step], here.states[step]) for step in here.states)


def test_a_gpu_is_lent_for_seconds_that_grow_with_the_work(monkeypatch):
    model = tiny()
    model.label_names = LABELS
    largest = sampling.check_request(model, LABELS[0], 16, 100, 1, 0, None)
    smallest = sampling.check_request(model, LABELS[0], 1, 1, 1, 0, None)
    assert sampling.gpu_seconds(model, smallest) == 20 and sampling.gpu_seconds(model, largest) == 60


def test_without_the_package_a_function_stays_as_it_is(monkeypatch):
    assert settings.on_lent_gpu(lambda: 1)(build) is build
    asked = []
    monkeypatch.setattr(
        settings, "spaces", SimpleNamespace(GPU=lambda duration: asked.append(duration) or (lambda f: f))
    )
    assert settings.on_lent_gpu(max)(build) is build and asked == [max]
