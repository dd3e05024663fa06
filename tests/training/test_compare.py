"""Comparing kinds of attention: what is trained, what is not trained again, and the table from the logs."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict

import pytest
from scipy.stats import ttest_rel

import vca
from tests.helpers.runs import CLASSES, PATIENCE, environment, write_images
from tests.helpers.transfers import random_teacher, transfer_recipe
from training import compare
from training.core import recipe as recipes
from training.core.classifier_recipe import ClassifierRecipe

TOP1 = {("mhsa", 0): 60.0, ("mhsa", 1): 61.0, ("mhsa", 2): 62.5, ("vca", 0): 64.0, ("vca", 1): 66.0, ("vca", 2): 65.0}


def trained(out, kind, seed, top1, epochs=5):
    """What a finished run leaves."""
    given = compare.overrides(kind) | dict(seed=str(seed), epochs=str(epochs))
    recipe = recipes.read("cifar10_compare", ClassifierRecipe, given)
    folder = out / f"{kind.replace(':', '-')}-seed{seed}"
    model = vca.create_model(recipe.model, **recipe.model_args(), num_classes=3)
    vca.save(model, folder / "checkpoint", label_names=list(CLASSES), training=[dict(recipe=asdict(recipe))])
    (folder / "recipe.json").write_text(json.dumps(asdict(recipe)))
    lines = [dict(step=20, epoch=0, seconds=10.0, loss=1.0, grad_norm=1.0, lr=0.1)]
    lines += [dict(step=40, epoch=0, seconds=14.0, loss=0.7, grad_norm=1.0, lr=0.1)]
    lines += [dict(step=40, epoch=1, top1=top1 - 9, images=30), dict(step=60, epoch=5, top1=top1, images=30)]
    lines += [dict(step=60, epoch=1, seconds=20.0, loss=0.5, grad_norm=1.0, lr=0.1)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return model


def command(monkeypatch, out, *extra):
    arguments = ["compare", "cifar10_compare", "--out", str(out), "--kinds", "mhsa,vca", "--seeds", "0,1,2", *extra]
    monkeypatch.setattr(sys, "argv", arguments)
    compare.main()


def test_the_table_is_made_from_the_logs_alone(tmp_path, monkeypatch, capsys):
    models = {kind: trained(tmp_path, kind, seed, top1) for (kind, seed), top1 in TOP1.items()}
    command(monkeypatch, tmp_path, "--report")
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "table.md").read_text()
    assert (tmp_path / "curves.png").stat().st_size > 5000
    count = {kind: sum(p.numel() for p in model.parameters()) for kind, model in models.items()}
    low, high = ttest_rel([64, 66, 65], [60, 61, 62.5]).confidence_interval(0.95)
    per_epoch = 60 / 5 * 0.25  # the median of 0.2 and 0.3 s a step
    mhsa = f"| mhsa | 61.17 ± 1.26 | 60.00 61.00 62.50 |  | {count['mhsa']:,} | {per_epoch:.0f} |"
    ours = f"| vca | 65.00 ± 1.00 | 64.00 66.00 65.00 | +3.83 ({low:+.2f} to {high:+.2f}) | {count['vca']:,} | 3 |"
    assert f"{ours}\n{mhsa}\n" in printed
    assert "CIFAR-10, 5 epochs: top-1 in percent on 30 images" in printed and "the seeds 0, 1, 2; best first" in printed
    (tmp_path / "vca-seed1" / "checkpoint" / "config.json").unlink()
    command(monkeypatch, tmp_path, "--report")
    assert "seeds 0, 2;" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="mhsa-seed0 holds a run with another epochs"):
        command(monkeypatch, tmp_path, "--report", "--epochs", "6")


def test_the_published_log_alone_gives_the_table_and_the_curves(tmp_path, monkeypatch, capsys):
    for (kind, seed), top1 in TOP1.items():
        trained(tmp_path, kind, seed, top1)
    command(monkeypatch, tmp_path, "--report")
    log = json.loads((tmp_path / "log.json").read_text())
    assert compare.table(log) + "\n" == capsys.readouterr().out
    compare.draw_curves(log, tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "curves.png").read_bytes()


def test_kinds_take_options_and_are_compared_with_the_convolution_too(tmp_path, monkeypatch, capsys):
    kinds = ["mhsa", "mhsa_dwc", "vca", "vca:tokens=emb:dwc=false", "vca:pooling=learned"]
    top1 = [60, 66, 64, 61, 65]
    models = [trained(tmp_path, kind, 0, value) for kind, value in zip(kinds, top1, strict=True)]
    command(monkeypatch, tmp_path, "--report", "--kinds", ",".join(kinds), "--seeds", "0")
    printed = capsys.readouterr().out
    for kind, value, model in zip(kinds, top1, models, strict=True):
        parameters = sum(p.numel() for p in model.parameters())
        first = "" if kind == "mhsa" else f"{value - 60:+.2f}"
        control = "" if kind == "mhsa_dwc" else f"{value - 66:+.2f}"
        assert f"| {kind} | {value:.2f} | {value:.2f} | {first} | {control} | {parameters:,} | 3 |" in printed
    layer = models[3].blocks[0].attn
    assert layer.tokens == "emb" and layer.dwc is None and models[4].blocks[0].attn.pool_query is not None


def test_runs_that_were_not_trained_alike_are_not_compared(tmp_path, monkeypatch):
    for (kind, seed), top1 in TOP1.items():
        trained(tmp_path, kind, seed, top1)
    log = tmp_path / "vca-seed2" / "log.jsonl"
    log.write_text(log.read_text().replace('"images": 30', '"images": 31'))
    with pytest.raises(SystemExit, match=r"vca-seed2 and .*mhsa-seed0 differ in images"):
        command(monkeypatch, tmp_path, "--report")


def test_only_what_is_unfinished_is_trained_each_with_its_kind_and_seed(tmp_path, monkeypatch, capsys):
    for (kind, seed), top1 in TOP1.items():
        if seed < 2:
            trained(tmp_path, kind, seed, top1)
    started = []

    def given(arguments, key):
        return next(argument for argument in arguments if argument.startswith(f"--{key}=")).partition("=")[2]

    class Process:
        returncode = 0

        def __init__(self, arguments, **_):
            started.append(arguments)

        def wait(self):
            kind, seed = given(started[-1], "attention"), int(given(started[-1], "seed"))
            trained(tmp_path, kind, seed, TOP1[kind, seed])
            return 0

    monkeypatch.setattr(subprocess, "Popen", Process)
    command(monkeypatch, tmp_path, "--data", "FOLDER", "--epochs", "5")
    assert [given(arguments, "attention") for arguments in started] == ["mhsa", "vca"]
    for arguments in started:
        assert arguments[1:4] == ["-m", "training.classify", "cifar10_compare"]
        assert {"--data=FOLDER", "--epochs=5", "--seed=2"} <= set(arguments)
    assert "65.00 ± 1.00" in capsys.readouterr().out


@pytest.mark.parametrize(
    "extra, message",
    [
        (("--kinds", "mhsa,hydra", "--report"), "'hydra' is none of vca, mhsa"),
        (("--kinds", "vca:heads=3", "--report"), "'heads=3' in 'vca:heads=3' is not num_tokens=..., tokens=..., dwc="),
        (("--kinds", "vca:dwc", "--report"), "'dwc' in 'vca:dwc' is not num_tokens=..., tokens=..., dwc="),
        (("--kinds", "vca:dwc=maybe", "--report"), "--dwc maybe: not a bool"),
        (("--kinds", "vca,mhsa,vca", "--report"), "--kinds: 'vca' is given twice"),
        (("--kinds", "vca:num_tokens=5", "--report"), "cannot build .*num_tokens=5 is not a square"),
        (("--kinds", "vca:tokens=none", "--report"), "cannot build .*tokens='none'"),
        (("--kinds", "vca:blocks=[0,6]", "--report"), r"cannot build .*blocks=\[0, 6\] must be different indices"),
        (("--kinds", "vca:blocks=[0", "--report"), r"--blocks \[0: not a list"),
        (("--seeds", "one", "--report"), "--seeds one: must be numbers"),
        (("--seeds", "0,0", "--report"), "--seeds: '0' is given twice"),
        (("--finetune", "cifar10_vca", "--report"), "--finetune names a classification recipe for what a transfer"),
        (("--report",), "no seed has been trained with all kinds yet"),
        (("--lr", "fast", "--report"), "--lr fast: not a float"),
        (("--lr-kept", "1", "--report"), "--lr-kept is of another sort of recipe than cifar10_compare"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_words(tmp_path, monkeypatch, extra, message):
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        command(monkeypatch, tmp_path, *extra)


@pytest.mark.parametrize(
    "recipe, message", [("cifar10_sit_vca", "trains a generator"), ("none.toml", "no recipe 'none'")]
)
def test_a_recipe_that_cannot_be_compared_is_refused_in_words(monkeypatch, recipe, message):
    monkeypatch.setattr(sys, "argv", ["compare", recipe, "--report"])
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        compare.main()


@pytest.mark.long
@pytest.mark.parametrize("task, number, code", [("classify", signal.SIGINT, 130), ("transfer", signal.SIGTERM, 0)])
def test_a_comparison_is_interrupted_and_goes_on(tmp_path, task, number, code):
    write_images(tmp_path / "data", "train", 20, seed=0)
    write_images(tmp_path / "data", "val", 5, seed=1)
    if task == "classify":
        of_task = ["cifar10_compare", "--epochs", "2", "--compile", "false"]
    else:
        vca.save(random_teacher(), tmp_path / "teacher", label_names=list(CLASSES))
        of_task = [str(transfer_recipe(tmp_path)), "--teacher", str(tmp_path / "teacher")]
    arguments = [
        sys.executable, "-m", "training.compare", *of_task, "--data", str(tmp_path / "data"), "--out",
        str(tmp_path / "out"), "--kinds", "mhsa,vca", "--seeds", "0,1", "--jobs", "2", "--device", "cpu",
        "--batch-size", "16", "--workers", "0",
    ]  # fmt: skip
    first = subprocess.Popen(
        arguments, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert "done" in first.stdout.readline()
    os.killpg(first.pid, number)  # as a terminal does it
    printed, said = first.communicate(timeout=PATIENCE)
    assert first.returncode == code and "FAILED" not in printed and said.endswith("The same command goes on.\n")
    done = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("*/checkpoint/config.json")}
    second = subprocess.run(arguments, env=environment(), capture_output=True, text=True, timeout=PATIENCE)
    assert second.returncode == 0, second.stdout + second.stderr
    assert len(done) >= 1 and all(file.stat().st_mtime_ns == time for file, time in done.items())
    assert "| vca | " in second.stdout and len(list((tmp_path / "out").glob("*/checkpoint/config.json"))) == 4
