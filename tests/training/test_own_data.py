"""Runs on one's own images: what the card claims, what a run protects, and which files it touches."""

import json
import re
import signal
from dataclasses import replace

import pytest
import yaml

import vca
from tests.helpers.checkpoints import make_model
from tests.helpers.runs import run_here, run_main, trainer, write_images
from training import evaluate
from training.card import main as write_cards
from training.core.classifier_recipe import ClassifierRecipe
from training.core.datasets import DATASETS, fit, is_dataset
from training.core.distributed import ALONE
from training.core.generator_recipe import GeneratorRecipe
from training.core.recipe import FOLDER, RecipeError
from training.core.run import RunError, RunFolder

RECIPE = ClassifierRecipe("vca_vit_pico_patch4_32", 1, 8, 0.1)
DATA = dict(classes=["birds", "cats"], train_images=9, val_images=2, train_names="a", val_names="b")


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A run of the recipe for CIFAR-10 on other images, and what it said."""
    out = tmp_path_factory.mktemp("home of the user") / "run"
    return out, run_here(data, out, "--epochs=1", "--workers=1")


def test_a_recipe_for_a_public_set_claims_nothing_of_own_images(data, trained, monkeypatch):
    out, said = trained
    assert "these are not the images of CIFAR-10: own data" in said
    monkeypatch.setattr("sys.argv", ["evaluate", str(out / "checkpoint"), "--data", str(data), "--device", "cpu"])
    monkeypatch.setattr("os.cpu_count", lambda: 0)
    evaluate.main()
    card = (out / "checkpoint" / "README.md").read_text()
    metadata = yaml.safe_load(card.split("---")[1])
    (result,) = metadata["model-index"][0]["results"]
    assert result["dataset"] == dict(name="own data", type="own-data")
    assert "datasets" not in metadata and "license" not in metadata
    assert [metric["name"] for metric in result["metrics"]] == ["top-1"]
    assert "# vca_vit_pico_patch4_32 on own data" in card and "Data: own data\n" in card
    published = "".join((out / "checkpoint" / name).read_text() for name in ("README.md", "config.json", "log.jsonl"))
    published += (results := (out / "checkpoint" / "results.json").read_text())
    for claim in ("CIFAR-10", "Krizhevsky", str(data), str(out), str(out.parent), "top-5", "top5"):
        assert claim not in published, claim
    assert json.loads(results)["dataset"] == ""
    assert vca.load(out / "checkpoint").training_history[0]["recipe"]["dataset"] == ""


def test_a_name_that_was_given_stands(data, tmp_path):
    run_here(data, tmp_path / "run", "--epochs=1", "--dataset=My birds", "--license=mine alone")
    card = (tmp_path / "run" / "checkpoint" / "README.md").read_text()
    assert "name: My birds" in card and "type: my-birds" in card and "Data: My birds. mine alone\n" in card


def test_public_sets_are_known_by_their_classes_or_their_size():
    ten = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    assert is_dataset("CIFAR-10", ten, 100) and is_dataset("CIFAR-10", [f"{k:04d}" for k in range(10)], 50_000)
    assert not is_dataset("CIFAR-10", ten[1:], 100) and not is_dataset("CIFAR-10", [*ten[1:], "cow"], 49_999)
    assert is_dataset("Mine", ["a"], 1) and is_dataset("", ["a"], 1)


def test_the_data_set_of_every_shipped_recipe_is_one_that_is_recognised():
    said = [re.findall(r'^dataset = "(.*)"', file.read_text(), re.M) for file in FOLDER.glob("*/*.toml")]
    assert {name for found in said for name in found} == DATASETS.keys()


def test_a_batch_larger_than_the_data_is_halved_unless_the_user_chose_it(capsys):
    recipe = ClassifierRecipe("vca_vit_pico_patch4_32", 1, 128, 1e-3, mix_group=64, dataset="CIFAR-10", license="x")
    fitted = fit(recipe, ["a", "b"], 48, ALONE, fit_batch=True)
    assert (fitted.batch_size, fitted.mix_group, fitted.dataset, fitted.license) == (32, 0, "", "")
    assert "48 training images are fewer than a batch of 128: --batch-size 32." in capsys.readouterr().err
    assert fit(fitted, ["a", "b"], 48, ALONE) == fitted and capsys.readouterr().err == ""
    with pytest.raises(RecipeError, match="48 training images are fewer than one batch of 128; give --batch-size 32"):
        fit(recipe, ["a", "b"], 48, ALONE)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(classes=["cats", "zebras"]), "class birds is gone, class zebras is new"),
        (
            dict(classes=["birds", "cats", "dogs"], train_images=12),
            "class dogs is new, 12 training images instead of 9",
        ),
        (dict(classes=["cats", "birds"]), "the classes have another order"),
        (dict(train_images=10), "10 training images instead of 9"),
        (dict(val_images=3), "3 validation images instead of 2"),
        (dict(train_names="c"), "some training images have another name or class"),
    ],
)
def test_a_run_knows_its_data(tmp_path, change, words):
    RunFolder(tmp_path, RECIPE, data=DATA)._lock.close()
    RunFolder(tmp_path, RECIPE, data=DATA | change)._lock.close()  # nothing is saved yet
    RunFolder(tmp_path, RECIPE, data=DATA)._lock.close()
    (tmp_path / "state-00000003.pt").touch()
    with pytest.raises(RunError, match=f"holds a run on other data: {words}; give the same data"):
        RunFolder(tmp_path, RECIPE, data=DATA | change)
    RunFolder(tmp_path, RECIPE, data=DATA)._lock.close()


def test_what_a_run_learns_must_not_change_and_the_rest_may(tmp_path):
    RunFolder(tmp_path, RECIPE, data=DATA, init=None)._lock.close()
    (tmp_path / "state-00000003.pt").touch()
    same = ClassifierRecipe("vca_vit_pico_patch4_32", 1, 8, 0.1, workers=9, log_every=3, save_every=7, dataset="Mine")
    RunFolder(tmp_path, same, data=DATA, init=None)._lock.close()
    with pytest.raises(RunError, match="another batch_size, init"):
        RunFolder(tmp_path, ClassifierRecipe("vca_vit_pico_patch4_32", 1, 4, 0.1), data=DATA, init="weights/x")
    recipe = json.loads((tmp_path / "recipe.json").read_text())
    del recipe["data"]  # as an earlier version wrote it
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    RunFolder(tmp_path, same, data=DATA, init=None)._lock.close()


def test_a_generators_run_may_be_made_longer_but_not_shorter(tmp_path):
    recipe = GeneratorRecipe("sit_xs_4", 10, 8, 0.1)
    RunFolder(tmp_path, recipe)._lock.close()
    (tmp_path / "state-00000010.pt").touch()
    RunFolder(tmp_path, replace(recipe, steps=20))._lock.close()
    with pytest.raises(RunError, match=r"holds a run with steps = 20; .* more to train it longer"):
        RunFolder(tmp_path, recipe)


def test_a_start_that_failed_reserves_nothing(data, tmp_path):
    assert "error: nowhere: no such checkpoint" in run_here(data, tmp_path / "run", "--init=nowhere", ends_with=1)
    run_here(data, tmp_path / "run", "--epochs=1")
    assert "another init, lr" in run_here(data, tmp_path / "run", "--epochs=1", "--init=x", "--lr=1", ends_with=1)


def test_only_files_of_the_run_are_touched(tmp_path):
    mine = ["thesis.tmp", "notes/thesis.tmp", ".draft.tmp", ".recipe.json.old.tmp", "checkpoint/x.tmp", "samples/y.tmp",
            "state-of-the-art.pt", "state-1.pt", "nonfinite/a-rank-0.pt"]  # fmt: skip
    own = [".recipe.json.12.34.tmp", "state-00000007.tmp", "checkpoint/.model.safetensors.1.2.tmp",
           "samples/.step-00000007.png.1.2.tmp", "nonfinite/step-00000007-rank-0.tmp"]  # fmt: skip
    RunFolder(tmp_path, RECIPE)._lock.close()
    for name in mine + own:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    saved = trainer(tmp_path, save_every=1)
    for step in range(4):
        saved.step = step
        saved.checkpoint()
    assert [name for name in mine if (tmp_path / name).read_text() != name] == []
    assert [name for name in own if (tmp_path / name).exists()] == []
    assert [file.name for file in saved.run.states()] == ["state-00000003.pt", "state-00000002.pt"]


@pytest.mark.parametrize("name", ["environment.json", "log.jsonl", "checkpoint", "recipe.json"])
def test_a_folder_with_files_that_look_like_a_run_but_are_not_is_refused(tmp_path, name):
    (tmp_path / name).write_text('{"servings": 4}')
    with pytest.raises(RunError, match=r"choose another --out"):
        RunFolder(tmp_path, RECIPE)
    assert (tmp_path / name).read_text() == '{"servings": 4}'


def test_ctrl_c_saves_the_state_and_a_second_one_ends_at_once(tmp_path, capfd):
    t = trainer(tmp_path)
    t.step = 5
    signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    with pytest.raises(SystemExit) as end:
        t.checkpoint()
    assert end.value.code == 130 and (tmp_path / "state-00000005.pt").exists()
    said = capfd.readouterr().err
    assert "Ctrl-C again ends at once" in said and "stopped by Ctrl-C; state saved at step 5" in said


def test_ctrl_c_before_the_first_step_is_a_line(data, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("training.classify.open_splits", interrupted)
    said = run_here(data, tmp_path / "run", ends_with=130)
    assert said == "stopped by Ctrl-C before the first step; nothing was saved.\n"


def test_a_log_is_there_once_a_step_is_logged(tmp_path):
    """So that what waits for the log, and then interrupts, finds a run that can save."""
    t = trainer(tmp_path)
    assert not (tmp_path / "log.jsonl").exists()
    t.run.log(step=1, loss=0.5)
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1, "loss": 0.5}\n'


def test_a_run_says_that_it_compiles_before_it_does(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.nn.Module.compile", lambda self: None)
    trainer(tmp_path, compile=True)
    assert re.search(r"the first step compiles the model: that takes", capsys.readouterr().err)


def test_the_command_that_writes_cards_explains_itself(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["card", "--help"])
    with pytest.raises(SystemExit) as end:
        write_cards()
    assert end.value.code == 0 and "python -m training.card weights" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["card", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"error: .* holds no checkpoint folders"):
        write_cards()
    vca.save(make_model(), tmp_path / "one", label_names=["a", "b", "c"])
    (tmp_path / "one" / "config.json").write_text("{")
    with pytest.raises(SystemExit, match=r"error: .*not a readable JSON file"):
        write_cards()


def test_a_folder_of_few_photos_becomes_a_model_at_the_first_try(tmp_path):
    write_images(tmp_path, "photos", 20, seed=0)
    command = f"classify cifar10_vca --data {tmp_path}/photos --out {tmp_path}/run --epochs 1 --compile false"
    said = run_main([*command.split(), "--device=cpu", "--precision=fp32"])
    assert "train: 48 images of 3 classes (16, 16, 16)\nval: 12 images of 3 classes (4, 4, 4)\n" in said
    assert "48 training images are fewer than a batch of 128: --batch-size 32." in said
    assert "error" not in said and "Warning" not in said
    model = vca.load(tmp_path / "run" / "checkpoint")
    assert model.label_names == ["bird", "cat", "dog"] and model.training_history[0]["results"]["images"] == 12
