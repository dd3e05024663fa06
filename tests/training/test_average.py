"""The mean of weights that were trained on from the same checkpoint, what its card says, and what is refused."""

import sys

import pytest
import torch

import vca
from tests.helpers.runs import CLASSES, write_images
from training import average as A
from training.calibrate import fold_temperature
from training.core.run import RunError

RECIPE = dict(model="vca_vit_pico_patch4_32", seed=0, stored_as="fp32", dataset="", license="", ema_decay=0.9)
RUN = dict(
    recipe=RECIPE, command="python -m training.classify mine --data DATA", init=None, steps=3, epochs=1,
    train_images=8, skipped_steps=0, torch="2", device="cpu", results=dict(top1=50.0),
)  # fmt: skip


def checkpoint(folder, seed, *runs, names=CLASSES, temperature=None, **options):
    """A model with the weights of a seed, and those as they were before a calibration."""
    torch.manual_seed(seed)
    model = vca.create_model("vca_vit_pico_patch4_32", num_classes=len(names), **options)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    runs = [dict(run, results=dict(run["results"])) for run in runs]
    if temperature:
        fold_temperature(model, temperature)
        runs[-1]["results"]["calibration"] = dict(temperature=temperature)
    vca.save(model, folder, label_names=list(names), training=runs)
    return str(folder), before


@pytest.fixture
def three(tmp_path):
    """What was trained, calibrated, and twice trained on from there."""
    start, before = checkpoint(tmp_path / "start", 0, RUN, temperature=0.5)
    begun = vca.load(start).training_history
    more = [dict(RUN, init="start", command=f"python -m training.classify {name} --data DATA") for name in "ab"]
    a, of_a = checkpoint(tmp_path / "a", 1, *begun, more[0])
    b, of_b = checkpoint(tmp_path / "b", 2, *begun, more[1])
    return (start, a, b), (before, of_a, of_b), begun, more


def test_the_mean_is_that_of_every_tensor_without_temperatures(three):
    folders, tensors, begun, more = three
    model, history = A.average([*folders, folders[1]])
    for key, value in model.state_dict().items():
        parts = [part[key].double() for part in (*tensors, tensors[1])]
        torch.testing.assert_close(value.double(), sum(parts) / 4, atol=1e-6, rtol=0)
    assert history[:-1] == begun and history[-1]["averaged"] == [[], [more[0]], [more[1]], [more[0]]]
    assert not model.training


def test_the_command_measures_it_and_the_card_says_what_it_is(three, tmp_path, monkeypatch, capsys):
    folders, *_ = three
    write_images(tmp_path / "data", "val", 4, seed=1)
    out = tmp_path / "mean"
    folders = (*folders, folders[1])
    monkeypatch.setattr(sys, "argv", ["average", *folders, "--data", str(tmp_path / "data"), "--out", str(out)])
    A.main()
    said = capsys.readouterr().out
    loaded = vca.load(out)
    expected, _ = A.average(folders)
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, expected.state_dict()[key]), key
    reached = loaded.training_history[-1]["results"]
    assert said == f"the mean of 4 checkpoints: top-1 {reached['top1']:.2f} % on {reached['images']} images\n"
    card = (out / "README.md").read_text()
    given = " ".join(f"{tmp_path.name}/{name}" for name in ("start", "a", "b", "a"))
    for part in (
        "one view; the mean of the weights of 3 checkpoints. This command",
        f"\n- the mean of the weights of 3 checkpoints that began there: top-1 {reached['top1']:.2f} %.",
        f"python -m training.average {given} --data DATA --out OUT",
        "\n  - that result\n",
        "\n  - 1 epochs (3 steps, 8 images) from the result of the last run that they share (`--init start`)",
        "\n        python -m training.classify a --data DATA\n\n    This one counts 2 times.\n  - 1 epochs",
    ):
        assert part in card, part
    assert str(tmp_path) not in card
    with pytest.raises(SystemExit, match="already holds a checkpoint; name another folder"):
        A.main()


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(names=["x", "y", "z"]), "differ in their label_names"),
        (dict(dwc=False), "differ in their model_args"),
        (dict(runs=[dict(RUN, command="another")]), "no training is common"),
        (dict(runs=[]), "no training is common"),
    ],
)
def test_what_has_no_mean_is_refused(tmp_path, change, said):
    runs = change.pop("runs", [RUN])
    first, _ = checkpoint(tmp_path / "first", 0, RUN)
    other, _ = checkpoint(tmp_path / "other", 1, *runs, **change)
    with pytest.raises(RunError, match=said):
        A.average([first, other])


def test_a_generator_is_refused(tmp_path):
    model = vca.create_model("sit_xs_2", num_classes=2, input_size=8)
    vca.save(model, tmp_path / "generator", label_names=["a", "b"])
    with pytest.raises(RunError, match="generator is no classifier"):
        A.average([tmp_path / "generator"] * 2)
