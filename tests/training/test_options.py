"""What timm's users expect of training: trackers, a choice of optimizer, and a push at the end."""

import sys
import types
from dataclasses import replace

import pytest

from tests.helpers.vits import make_vca_vit
from training import classify
from training.classify import create_optimizer
from training.core.classifier_recipe import ClassifierRecipe
from training.core.run import RunError, RunFolder


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_the_log_goes_to_a_tracker(tmp_path, monkeypatch, name):
    recipe, said = ClassifierRecipe("vca_vit_pico_patch4_32", 1, 8, 1e-3), []
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(RunError, match=f"--log-to {name} needs the package: pip install {name}"):
        RunFolder(tmp_path / "without", recipe, log_to=name)
    module = types.ModuleType(name)
    module.init = lambda **about: said.append(about)
    module.log = lambda numbers, step: said.append((step, numbers))
    monkeypatch.setitem(sys.modules, name, module)
    RunFolder(tmp_path / "with", recipe, log_to=name).log(step=7, loss=0.5, note="text")
    about, line = said
    assert about["project"] == "vca" and about["name"] == "with" and about["config"]["lr"] == 1e-3
    assert line == (7, dict(loss=0.5))


def test_the_optimizer_is_one_of_timms():
    model = make_vca_vit()
    recipe = ClassifierRecipe("vca_vit_pico_patch4_32", 1, 8, 1e-3, optimizer="lion")
    assert type(create_optimizer(recipe, model, model)).__name__ == "Lion"
    with pytest.raises(ValueError, match="optimizer = 'lyon' is none of timm's"):
        replace(recipe, optimizer="lyon")


def test_the_log_goes_to_tensorboard_where_it_is_installed(tmp_path, monkeypatch):
    recipe, written = ClassifierRecipe("vca_vit_pico_patch4_32", 1, 8, 1e-3), []
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(RunError, match="pip install tensorboard"):
        RunFolder(tmp_path / "without", recipe, log_to="tensorboard")

    class Writer:
        def __init__(self, folder):
            assert folder == tmp_path / "with" / "tensorboard"

        def add_scalar(self, *entry):
            written.append(entry)

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    RunFolder(tmp_path / "with", recipe, log_to="tensorboard").log(step=7, loss=0.5, lr=0.1)
    assert written == [("loss", 0.5, 7), ("lr", 0.1, 7)]


@pytest.mark.parametrize(
    "repo, said", [("user", "'user' is no name such as user/repo"), ("user/repo", "no token for the Hub")]
)
def test_a_push_that_cannot_succeed_is_refused_before_the_run(tmp_path, monkeypatch, capsys, repo, said):
    monkeypatch.setattr("training.core.cli.get_token", lambda: None)
    words = ["cifar10_vca", "--data", str(tmp_path), "--out", str(tmp_path / "run"), "--push", repo]
    monkeypatch.setattr(sys, "argv", ["training.classify", *words])
    with pytest.raises(SystemExit) as end:
        classify.main()
    assert end.value.code == 2 and said in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_the_checkpoint_is_pushed_at_the_end(tmp_path, monkeypatch, capsys):
    pushed = []
    monkeypatch.setattr("training.core.cli.get_token", lambda: "token")
    monkeypatch.setattr("vca.push", lambda *given: pushed.append(given) or "address")
    words = ["cifar10_vca", "--data", str(tmp_path), "--out", str(tmp_path / "run"), "--push", "user/repo"]
    monkeypatch.setattr(sys, "argv", ["training.classify", *words])
    monkeypatch.setattr(classify, "train", lambda *given, **more: dict(top1=50.0, images=2))
    classify.main()
    assert pushed == [(f"{tmp_path}/run/checkpoint", "user/repo")]
    assert capsys.readouterr().out.splitlines()[-1] == "user/repo: address"
