"""Loading by Hub id: the real huggingface_hub client against the Hub of `tests/helpers/hub_server.py`, over HTTP."""

import json
import os
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load, save

import vca
from tests.helpers.checkpoints import LABELS, assert_same_outputs, fresh_process, make_model, read
from vca import CheckpointError
from vca.checkpoint import FILES

KEY = "blocks.1.attn.stage2.lambda_k1"


# --- what loads ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["user/repo", "hf-hub:user/repo", "hf-hub:user/repo@main"])
def test_a_classifier_loads_by_id(hub, cache, classifier, name):
    hub.put("user/repo", read(classifier))
    model = vca.load(name)
    assert not model.training and model.label_names == LABELS
    assert_same_outputs(model, vca.load(classifier))


def test_only_the_three_files_of_a_checkpoint_are_downloaded(hub, cache, classifier):
    hub.put("user/repo", read(classifier) | {"README.md": b"# A card", "pytorch_model.bin": b"x", "huge.npz": b"x"})
    vca.load("user/repo")
    (snapshot,) = cache.glob("models--user--repo/snapshots/*")
    assert sorted(os.listdir(snapshot)) == sorted(FILES)


def test_a_folder_goes_before_a_repository_of_the_same_name(hub, classifier, tmp_path, monkeypatch):
    hub.put("user/repo", {"config.json": b"{}"})
    shutil.copytree(classifier, tmp_path / "user" / "repo")
    monkeypatch.chdir(tmp_path)
    assert vca.load("user/repo").label_names == LABELS
    assert hub.requests == []
    with pytest.raises(CheckpointError, match=r"hf-hub:user/repo|user/repo: the repository has no model\.safetensors"):
        vca.load("hf-hub:user/repo")


def test_older_revisions(hub, cache, tmp_path):
    commits, models = [], []
    for number in range(2):
        models.append(make_model())
        vca.save(models[-1], tmp_path / str(number), label_names=LABELS)
        commits.append(hub.put("user/repo", read(tmp_path / str(number))))
    hub.repos["models/user/repo"].names["v1"] = commits[0]
    assert_same_outputs(vca.load("user/repo"), models[1])
    for revision in (commits[0], "v1"):
        assert_same_outputs(vca.load("user/repo", revision=revision), models[0])
        assert_same_outputs(vca.load(f"hf-hub:user/repo@{revision}"), models[0])
    assert_same_outputs(timm.create_model(f"hf-hub:user/repo@{commits[0]}", pretrained=True).eval(), models[0])
    with pytest.raises(CheckpointError, match="user/repo@v2: the repository has no such revision"):
        vca.load("user/repo", revision="v2")


def test_a_new_commit_is_seen(hub, cache, tmp_path):
    for number in range(2):
        model = make_model()
        vca.save(model, tmp_path / str(number), label_names=LABELS)
        hub.put("user/repo", read(tmp_path / str(number)))
        assert_same_outputs(vca.load("user/repo"), model)


def test_a_private_repository_needs_a_token(hub, cache, classifier, monkeypatch):
    hub.put("owner/repo", read(classifier), private=True)
    for token in (None, False, "hf_reader"):
        with pytest.raises(
            CheckpointError, match=r"owner/repo: no such folder, and no repository .*private or gated, log in"
        ):
            vca.load("owner/repo", token=token)
    with pytest.raises(CheckpointError, match="owner/repo: the Hub does not accept the token"):
        vca.load("owner/repo", token="hf_wrong")
    assert vca.load("owner/repo", token="hf_owner").label_names == LABELS
    shutil.rmtree(cache)
    monkeypatch.setenv("HF_TOKEN", "hf_owner")
    assert vca.load("owner/repo").label_names == LABELS


def test_the_cache_folder_can_be_chosen(hub, cache, classifier, tmp_path):
    hub.put("user/repo", read(classifier))
    vca.load("user/repo", cache_dir=tmp_path / "mine")
    assert os.listdir(tmp_path / "mine") and not cache.exists()


# --- without a network -----------------------------------------------------------------------------------------------


def test_an_unreachable_hub_falls_back_to_the_cache(hub, cache, classifier, unreachable):
    hub.put("user/repo", read(classifier))
    model = vca.load("user/repo")
    unreachable()
    assert_same_outputs(vca.load("user/repo"), model)
    with pytest.raises(
        CheckpointError, match=r"user/other: no such folder, and the Hub cannot be reached .* and the cache has no"
    ):
        vca.load("user/other")


def test_a_hub_out_of_order_falls_back_to_the_cache(hub, cache, classifier):
    hub.put("user/repo", read(classifier))
    model = vca.load("user/repo")
    with hub.failing("GET /api/models", 503):
        assert_same_outputs(vca.load("user/repo"), model)
        with pytest.raises(CheckpointError, match=r"user/other: no such folder, and the Hub cannot be reached .*503"):
            vca.load("user/other")


def test_local_files_only_asks_nothing(hub, cache, classifier):
    hub.put("user/repo", read(classifier))
    with pytest.raises(
        CheckpointError, match="user/repo: no such folder, and the network is not to be used, and the cache has no"
    ):
        vca.load("user/repo", local_files_only=True)
    assert hub.requests == []
    model = vca.load("user/repo")
    hub.requests.clear()
    assert_same_outputs(vca.load("user/repo", local_files_only=True), model)
    assert hub.requests == []


def test_offline_mode_is_honoured(hub, tmp_path, classifier):
    hub.put("user/repo", read(classifier))
    vca.load("user/repo", cache_dir=tmp_path / "home" / "hub")
    hub.requests.clear()
    program = "import vca; print(vca.load('user/repo').label_names[0]); vca.load('user/other')"
    done = fresh_process(program, HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="1")
    assert done.stdout.strip() == LABELS[0]
    assert "CheckpointError: user/other: no such folder, and the Hub cannot be reached" in done.stderr.splitlines()[-1]
    assert "HF_HUB_OFFLINE" in done.stderr.splitlines()[-1]
    assert hub.requests == []


def test_a_copy_that_lacks_a_file_is_not_used(hub, cache, classifier, unreachable):
    hub.put("user/repo", read(classifier))
    vca.load("user/repo")
    (weights,) = cache.glob("models--user--repo/snapshots/*/model.safetensors")
    weights.unlink()
    unreachable()
    with pytest.raises(
        CheckpointError, match=r"user/repo: no such folder, and the Hub cannot be reached .* the cache has no"
    ):
        vca.load("user/repo")


# --- what is refused -------------------------------------------------------------------------------------------------


def with_tensors(folder: Path, change) -> dict[str, bytes]:
    files = read(folder)
    tensors = load(files["model.safetensors"])
    change(tensors)
    return files | {"model.safetensors": save(tensors)}


def with_config(folder: Path, **fields) -> dict[str, bytes]:
    files = read(folder)
    return files | {"config.json": json.dumps(json.loads(files["config.json"]) | fields).encode()}


FAULTS = {
    "missing key": (lambda f: with_tensors(f, lambda t: t.pop(KEY)), rf"model\.safetensors: missing {KEY}"),
    "extra key": (
        lambda f: with_tensors(f, lambda t: t.update(more=torch.zeros(2))),
        r"model\.safetensors: unexpected more",
    ),
    "misshapen key": (
        lambda f: with_tensors(f, lambda t: t.update({KEY: torch.zeros(7)})),
        rf"model\.safetensors: {KEY} is \(7,\) instead of \(8,\)",
    ),
    "NaN": (
        lambda f: with_tensors(f, lambda t: t[KEY].fill_(float("nan"))),
        rf"model\.safetensors: {KEY} holds NaN or infinite values",
    ),
    "unknown field": (lambda f: with_config(f, labels=[]), r"config\.json: unknown field labels"),
    "unknown model": (lambda f: with_config(f, architecture="resnet18"), r"config\.json: unknown architecture"),
    "truncated file": (
        lambda f: read(f) | {"model.safetensors": read(f)["model.safetensors"][:-1000]},
        r"model\.safetensors: not a complete safetensors file",
    ),
    "other weights than the config's": (
        lambda f: with_tensors(f, lambda t: t[KEY].add_(1)),
        r"model\.safetensors: its sha256 is [0-9a-f]{16}\.\.\., but config\.json says [0-9a-f]{16}\.\.\.: the",
    ),
    "another config": (
        lambda f: with_config(f, label_names=["x", "y", "z"]),
        r"config\.json: has been changed since it was saved, or is damaged",
    ),
    "pickle only": (
        lambda f: {"config.json": read(f)["config.json"], "pytorch_model.bin": b"\x80\x04."},
        r"the repository has no model\.safetensors; pytorch_model\.bin is a pickle, which may run code and is not read",
    ),
    "no weights": (lambda f: {"config.json": b"{}"}, r"the repository has no model\.safetensors\."),
    "path traversal": (
        lambda f: read(f) | {"../../../escaped": b"x"},
        r"the file name '\.\./\.\./\.\./escaped' leads out of the folder; nothing was downloaded",
    ),
    "an absolute path": (lambda f: read(f) | {"/tmp/escaped": b"x"}, r"the file name '/tmp/escaped' leads out of"),
    "a path of another system": (lambda f: read(f) | {"..\\escaped": b"x"}, "leads out of the folder"),
}


@pytest.mark.parametrize("make, message", FAULTS.values(), ids=FAULTS.keys())
def test_a_wrong_repository_is_refused(hub, cache, classifier, make, message):
    hub.put("user/repo", make(classifier))
    with pytest.raises(CheckpointError, match=message) as caught:
        vca.load("user/repo")
    assert str(caught.value).startswith("user/repo") and str(cache) not in str(caught.value)
    assert not any("escaped" in name for _, folders, files in os.walk(cache.parent) for name in folders + files)


def test_a_download_that_ends_early_is_tried_again(hub, cache, classifier):
    hub.put("user/repo", read(classifier))
    with hub.failing(r"^GET /user/repo/resolve/\w+/model.safetensors", "truncate", times=1):
        assert vca.load("user/repo").label_names == LABELS
    assert sum("GET /user/repo/resolve" in request and "safetensors" in request for request in hub.requests) == 2


@pytest.mark.parametrize(
    "name",
    ["nowhere", "user/repo/more", "../user/repo", "/etc/passwd", "user/../repo", "hf-hub:repo", "hf-hub:", "",
     "user/..", "hf-hub:../repo", "user/re po", "user/repo\n", "http://localhost/repo"],
)  # fmt: skip
def test_what_is_no_name_of_a_repository_asks_nothing(hub, name):
    with pytest.raises(CheckpointError, match="no such checkpoint folder, and not a repository"):
        vca.load(name)
    assert hub.requests == []


@pytest.mark.parametrize("name", ["user/a--b", "user/a..b", "user/repo.git"])
def test_a_name_that_the_hub_does_not_allow(hub, name):
    with pytest.raises(CheckpointError, match=f"{name}: not the name of a repository"):
        vca.load(name)
    assert hub.requests == []


@pytest.mark.parametrize("revision", ["../../main", "/main", "refs/../../x", "a\\b"])
def test_a_revision_cannot_leave_the_cache(hub, classifier, revision):
    hub.put("user/repo", read(classifier))
    with pytest.raises(CheckpointError, match="is not the name of a revision"):
        vca.load("user/repo", revision=revision)
    assert hub.requests == []


def test_a_name_that_does_not_exist(hub, cache):
    with pytest.raises(CheckpointError, match="user/nothing: no such folder, and no repository on the Hub"):
        vca.load("user/nothing")
    with pytest.raises(CheckpointError, match="user/nothing: no repository on the Hub"):
        vca.load("hf-hub:user/nothing")
