"""Publishing: checkpoints to repositories and the app to a Space, by the real client, over HTTP."""

import os
import re
import signal
import subprocess
import sys
from ast import literal_eval
from importlib.util import find_spec
from pathlib import Path

import pytest
import timm
import torch
import yaml
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from packaging.requirements import Requirement
from PIL import Image

import vca
from tests.helpers.checkpoints import (
    LABELS,
    assert_same_outputs,
    fresh_process,
    images,
    make_model,
    read,
    tiny,
)
from tests.helpers.published import RUN, checkpoint, lines_of, run
from tests.helpers.runs import PATIENCE
from training import evaluate
from training.core import classifier_recipe
from training.core.recipe import read as read_recipe
from training.publish import ROOT, front_matter
from vca import CheckpointError, PushError
from vca.checkpoint import AUTOENCODER_FILES, FILES, sha256, write_atomically

CARDS = [("classifier", make_model), ("generator", tiny)]


# --- cards -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["classifier", "generator"])
def test_a_card_is_valid_and_says_what_was_measured(checkpoints, name):
    card = ModelCard.load(checkpoints[name] / "README.md")
    config = yaml.safe_load((checkpoints[name] / "config.json").read_text())
    results = config["training"][-1]["results"]
    model_name, evaluations = model_index_to_eval_results(card.data.to_dict()["model-index"])
    assert model_name == config["architecture"]
    assert {e.dataset_name for e in evaluations} == {"CIFAR-10"} and {e.dataset_type for e in evaluations} == {
        "uoft-cs/cifar10"
    }
    measured = {e.metric_name: e.metric_value for e in evaluations}
    if name == "classifier":
        assert measured == {"top-1": results["top1"]}, "of three classes no top-5"
    else:
        assert measured["validation loss"] == results["val_loss"]
    assert card.data.license == "apache-2.0" and card.data.library_name == "vca"
    for text in (
        sha256(checkpoints[name] / "model.safetensors"), "CIFAR-10 carries no formal licence", RUN["command"], "seed 0",
        "https://arxiv.org/abs/2511.00833", "@inproceedings{pu2025linear", 'pip install ".[plot]"',
        f'vca.load("weights0/{name}")' if "weights0" in str(checkpoints[name]) else "vca.load(",
        "(maps.png)" if name == "classifier" else "(samples.png)",
    ):  # fmt: skip
        assert text in card.text, text
    place, picture = "/".join(checkpoints[name].parts[-2:]), "maps.png" if name == "classifier" else "samples.png"
    assert card.data.thumbnail == f"https://huggingface.co/{place}/resolve/main/{picture}"


def test_the_use_on_a_card_runs(checkpoints, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (50, 40), "red").save("photo.jpg")
    for name, folder in checkpoints.items():
        examples = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
        local = "/".join(folder.parts[-2:])
        names = {}
        for example in examples:
            if "transformers" in example and not find_spec("transformers"):
                continue
            exec(example.replace(local, str(folder)).replace("steps=50", "steps=2"), names)
            if "vca.record" in example:
                assert capsys.readouterr().out.strip() in LABELS and Path("maps.png").exists()
            elif "pipeline" in example:
                said = literal_eval(capsys.readouterr().out)
                assert {answer["label"] for answer in said} <= set(LABELS) and len(said) == len(LABELS)
        assert len(examples) == (3 if name == "classifier" else 1)
        if name == "generator":
            assert names["images"].shape == (2, 3, 8, 8) and Image.open("picture.png").size == (8, 8)


# --- checkpoints -----------------------------------------------------------------------------------------------------


def test_end_to_end(owner, checkpoints, tmp_path, monkeypatch, capsys):
    for name, folder in checkpoints.items():
        run(folder, "--repo", f"owner/{name}", monkeypatch=monkeypatch)
        assert f"owner/{name}: {owner.url}/owner/{name}/commit/" in capsys.readouterr().out
        assert set(HfApi().list_repo_files(f"owner/{name}")) == {".gitattributes", *os.listdir(folder)}
        for file, content in read(folder).items():
            if file != "README.md":
                assert owner.files(f"owner/{name}")[file] == content
        card = owner.files(f"owner/{name}")["README.md"].decode()
        assert f'vca.load("owner/{name}")' in card and "/".join(folder.parts[-2:]) not in card
        assert f"thumbnail: https://huggingface.co/owner/{name}/resolve/main/" in card
        assert name == "generator" or f'pipeline("image-classification", model="owner/{name}")' in card
    assert (
        'timm.create_model("hf-hub:owner/classifier", pretrained=True)'
        in owner.files("owner/classifier")["README.md"].decode()
    )

    program = """
import sys, timm, torch, vca
from tests.helpers.checkpoints import images
with torch.no_grad():
    logits = vca.load("owner/classifier")(images())
    through_timm = timm.create_model("hf-hub:owner/classifier", pretrained=True).eval()(images())
samples = vca.load("hf-hub:owner/generator").sample([0, 2], steps=2, seed=5)
torch.save((logits, through_timm, samples), sys.argv[1])
"""
    done = fresh_process(program, tmp_path / "outputs.pt", HF_HOME=str(tmp_path / "home"), HF_TOKEN="")
    assert done.returncode == 0, done.stderr
    logits, through_timm, samples = torch.load(tmp_path / "outputs.pt", weights_only=True)
    with torch.no_grad():
        assert torch.equal(logits, vca.load(checkpoints["classifier"])(images()))
    assert torch.equal(through_timm, logits)
    assert torch.equal(samples, vca.load(checkpoints["generator"]).sample([0, 2], steps=2, seed=5))


def test_a_second_push_of_the_same_sends_nothing(owner, checkpoints):
    first = vca.push(checkpoints["classifier"], "owner/repo")
    assert owner.uploads() != []
    owner.requests.clear()
    assert vca.push(checkpoints["classifier"], "owner/repo") == first
    assert owner.uploads() == []


def test_only_what_has_changed_is_sent(owner, checkpoints, tmp_path, cache):
    vca.push(checkpoints["classifier"], "owner/repo")
    (commit,) = {owner.repos["models/owner/repo"].resolve("main")}
    folder = tmp_path / "classifier"
    recipe = read_recipe("cifar10_vca", classifier_recipe.ClassifierRecipe, {})
    model = make_model()
    checkpoint(folder, model, recipe, dict(top1=72.0, top5=98.5, loss=0.9, images=10000))
    (folder / "maps.png").write_bytes((checkpoints["classifier"] / "maps.png").read_bytes())
    owner.requests.clear()
    vca.push(folder, "owner/repo")
    assert owner.uploads() == [
        f"PUT /objects/{sha256(folder / 'model.safetensors')}",
        "POST /api/models/owner/repo/commit/main",
    ]
    assert_same_outputs(vca.load("owner/repo"), model)
    assert_same_outputs(vca.load("owner/repo", revision=commit), vca.load(checkpoints["classifier"]))


def test_a_branch(owner, checkpoints):
    vca.push(checkpoints["generator"], "owner/repo")
    vca.push(checkpoints["classifier"], "owner/repo", revision="small")
    vca.push(checkpoints["classifier"], "owner/repo", revision="small")
    assert vca.load("owner/repo").family == "sit"
    assert timm.create_model("hf-hub:owner/repo@small", pretrained=True).num_classes == len(LABELS)
    assert_same_outputs(vca.load("owner/repo@small"), vca.load(checkpoints["classifier"]))


def test_private_repositories(owner, checkpoints, cache, monkeypatch, capsys):
    run(checkpoints["classifier"], "--repo", "owner/hidden", "--private", monkeypatch=monkeypatch)
    assert owner.repos["models/owner/hidden"].private
    assert vca.load("owner/hidden").label_names == LABELS
    with pytest.raises(CheckpointError, match=r"owner/hidden: .*private or gated"):
        vca.load("owner/hidden", token=False)
    vca.push(checkpoints["classifier"], "owner/open")
    owner.requests.clear()
    with pytest.raises(PushError, match="owner/open: is there already and public"):
        vca.push(checkpoints["generator"], "owner/open", private=True)
    assert owner.uploads() == []


def test_an_upload_that_was_killed_can_be_repeated(owner, checkpoints, tmp_path):
    command = [sys.executable, "-m", "training.publish", checkpoints["classifier"], "--repo", "owner/repo"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with owner.failing("PUT .*" + sha256(checkpoints["classifier"] / "model.safetensors"), "stall"):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        assert owner.stalled.wait(PATIENCE)
        process.send_signal(signal.SIGKILL)
        process.wait(PATIENCE)
    assert set(owner.files("owner/repo")) == {".gitattributes"}, "nothing is published by halves"
    vca.push(checkpoints["classifier"], "owner/repo")
    assert_same_outputs(vca.load("owner/repo"), vca.load(checkpoints["classifier"]))


@pytest.mark.parametrize("where, status", [("PUT ", 400), ("POST .*/commit/", 500), ("POST .*/preupload/", 413)])
def test_an_upload_that_fails_leaves_what_was_there(owner, checkpoints, where, status):
    first = vca.push(checkpoints["generator"], "owner/repo")
    before = dict(owner.files("owner/repo"))
    with owner.failing(where, status), pytest.raises(PushError, match="owner/repo: the "):
        vca.push(checkpoints["classifier"], "owner/repo")
    assert owner.files("owner/repo") == before
    assert vca.push(checkpoints["classifier"], "owner/repo") != first
    assert owner.files("owner/repo")["config.json"] == (checkpoints["classifier"] / "config.json").read_bytes()


def test_the_command_of_a_published_card_runs(owner, checkpoints, cache, tmp_path, monkeypatch, capsys):
    vca.push(checkpoints["classifier"], "owner/repo")
    (command,) = re.findall(r"    python -m (training\.evaluate .*)", owner.files("owner/repo")["README.md"].decode())
    for label in LABELS:
        (tmp_path / "val" / label).mkdir(parents=True)
        Image.new("RGB", (32, 32), "red").save(tmp_path / "val" / label / "0.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [*command.replace("DATA", str(tmp_path)).split(" "), "--device", "cpu"])
    evaluate.main()
    assert capsys.readouterr().out.startswith("top-1 33.33 %") and (tmp_path / "results.json").exists()


# --- what is refused -------------------------------------------------------------------------------------------------


def test_without_a_token_nothing_is_sent(hub, checkpoints, monkeypatch, capsys):
    for target in ("--repo", "--space"):
        with pytest.raises(SystemExit) as stopped:
            run(checkpoints["classifier"], target, "owner/name", monkeypatch=monkeypatch)
        assert stopped.value.code == 2
        assert "no token for the Hub: log in with `hf auth login`, or set HF_TOKEN" in capsys.readouterr().err
    with pytest.raises(PushError, match="no token"):
        vca.push(checkpoints["classifier"], "owner/repo", token=False)
    assert hub.requests == [] and hub.repos == {}


@pytest.mark.parametrize(
    "token, repo, message",
    [
        ("hf_wrong", "owner/repo", "owner/repo: the Hub does not accept the token"),
        ("hf_reader", "owner/repo", "owner/repo: the token may not write there"),
        ("hf_owner", "reader/repo", "reader/repo: the token may not write there"),
        ("hf_owner", "reader/there", "reader/there: the token may not write there"),
        ("hf_owner", "owner/a--b", "owner/a--b: the Hub refuses it: "),
    ],
)
def test_what_the_hub_refuses_is_not_sent(hub, checkpoints, monkeypatch, capsys, token, repo, message):
    hub.put("reader/there", {"README.md": b"mine"})
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(SystemExit) as stopped:
        run(checkpoints["classifier"], "--repo", repo, monkeypatch=monkeypatch)
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert list(hub.repos) == ["models/reader/there"] and hub.files("reader/there") == {"README.md": b"mine"}
    assert hub.objects == {}


def damage(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


REFUSED = {
    "a pickle": (lambda f: (f / "optimizer.pt").write_bytes(b"x"), r"optimizer\.pt: is a pickle"),
    "a link to elsewhere": (lambda f: (f / "key.txt").symlink_to("/etc/hostname"), r"key\.txt: is a link that leads"),
    "no card": (lambda f: (f / "README.md").unlink(), "no README.md"),
    "damaged weights": (damage, "not a complete safetensors file"),
    "other weights": (lambda f: write_atomically(f / "README.md", b"`model.safetensors`: 1 bytes, sha256 `"
                      + b"0" * 64 + b"`"), r"README\.md is of other weights"),
    "no checkpoint": (lambda f: (f / "config.json").unlink(), r"config\.json: file not found"),
}  # fmt: skip


@pytest.mark.parametrize("change, message", REFUSED.values(), ids=REFUSED.keys())
def test_a_folder_that_could_not_be_loaded_is_not_published(owner, checkpoints, tmp_path, change, message):
    for name, content in read(checkpoints["classifier"]).items():
        (tmp_path / name).write_bytes(content)
    change(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        vca.push(tmp_path, "owner/repo")
    assert owner.requests == []


@pytest.mark.parametrize(
    "arguments",
    [[], ["--repo", "name"], ["--repo", "owner/repo"], ["a/b", "--repo", "owner/repo"], ["--space", "../x"]],
)
def test_wrong_arguments(hub, monkeypatch, capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        run(*arguments, monkeypatch=monkeypatch)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and "error: " in said
    assert ("There is no folder a/b." in said) == ("a/b" in arguments)
    assert hub.requests == []


# --- the Space -------------------------------------------------------------------------------------------------------


def test_a_dry_run_names_every_file_and_size_and_sends_nothing(owner, checkpoints, monkeypatch, capsys):
    arguments = [checkpoints["classifier"], "--repo", "owner/repo", "--space", "owner/space"]
    run(*arguments, "--dry-run", monkeypatch=monkeypatch)
    printed = capsys.readouterr().out
    assert owner.requests == []
    run(*arguments, monkeypatch=monkeypatch)
    for kind, repo in (("model", "owner/repo"), ("space", "owner/space")):
        files = {k: v for k, v in owner.files(repo, kind=kind).items() if k != ".gitattributes"}
        lines = printed.split(f"{repo} ({kind}): ")[1].split(" (space)")[0].splitlines()
        assert lines[0].startswith(f"{len(files)} files, {sum(map(len, files.values())):,} bytes")
        listed = dict(reversed(line.split()) for line in lines[1 : 1 + len(files)])
        assert listed == {name: f"{len(content):,}" for name, content in files.items()}


def test_every_requirement_has_an_upper_bound():
    files = [ROOT / "requirements.txt", ROOT / "requirements-dev.txt"]
    lines = [line.partition(" #")[0] for file in files for line in lines_of(file.read_bytes()) if line[0] != "-"]
    assert len(lines) > 20
    assert [line for line in lines if {part.operator for part in Requirement(line).specifier} != {">=", "<"}] == []


def test_a_space_says_how_it_is_built(owner, checkpoints, monkeypatch):
    arguments = [checkpoints["classifier"], "user/other@v1", "--repo", "owner/repo", "--space", "owner/space"]
    run(*arguments, monkeypatch=monkeypatch)
    files = owner.files("owner/space", kind="space")
    front = yaml.safe_load(files["README.md"].decode().split("---")[1])
    assert front["sdk"] == "gradio" and front["app_file"] == "app.py" and front["python_version"] == "3.12"
    assert 0 < len(front["short_description"]) <= 60 and front["license"] == "apache-2.0"
    assert front["models"] == ["owner/repo", "user/other"]
    assert front["preload_from_hub"] == [
        "owner/repo config.json,model.safetensors,README.md",
        "user/other config.json,model.safetensors,README.md v1",
    ]
    brings = [*FILES, *AUTOENCODER_FILES, "quality.png"]
    assert front_matter(["owner/repo@v2", "user/other"], brings)["preload_from_hub"] == [
        "owner/repo config.json,model.safetensors,README.md,vae/config.json,vae/diffusion_pytorch_model.safetensors v2",
        "user/other config.json,model.safetensors,README.md",
    ]
    required = {line.name: line for line in map(Requirement, lines_of(files["requirements.txt"]))}
    assert {"torch", "timm", "scikit-image", "cachetools"} <= required.keys()
    assert front["sdk_version"] in required["gradio"].specifier, "the builder installs it beside these"
    assert not required.keys() & {"pytest", "ruff", "playwright", "oxlint"}
    assert 'setdefault("VCA_MODELS", "owner/repo,user/other@v1")' in files["app.py"].decode()
    for name, content in files.items():
        if name.endswith(".py"):
            compile(content, name, "exec")
    assert {"vca/hub.py", "app/ui.py", "vca/explorer/static/explorer.js", "LICENSE"} <= set(files)
    assert not any(name.startswith(("weights/", "tests/", "training/")) or "pycache" in name for name in files)


def test_a_space_carries_folders_and_loses_what_is_gone(owner, checkpoints, monkeypatch):
    owner.put(
        "owner/space", {"app/old.py": b"old", "weights/old/config.json": b"{}", "mine.txt": b"mine"}, kind="space"
    )
    for _ in range(2):
        owner.requests.clear()
        run(*checkpoints.values(), "--space", "owner/space", monkeypatch=monkeypatch)
    assert owner.uploads() == []
    files = owner.files("owner/space", kind="space")
    assert "app/old.py" not in files and "weights/old/config.json" not in files and files["mine.txt"] == b"mine"
    for name, folder in checkpoints.items():
        assert files[f"weights/{name}/model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert 'setdefault("VCA_MODELS", "")' in files["app.py"].decode()
