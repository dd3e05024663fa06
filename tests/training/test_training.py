"""Training end to end at tiny size: resume after kill -9 and SIGTERM, data order, recipes, cards, evaluation."""

import json
import random
import re
import signal
import sys
import time
import warnings
from dataclasses import asdict

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

import vca
from tests.helpers.kernels import needs_compiler
from tests.helpers.runs import CLASSES, command, finish, run, run_here, start_and_signal, trainer, untimed_log
from training.card import write_card
from training.core import generator_recipe, precision
from training.core import recipe as recipes
from training.core.autoencoder_recipe import AutoencoderRecipe
from training.core.classifier_recipe import ClassifierRecipe
from training.core.init import build_model
from training.core.run import RunError, RunFolder
from training.core.transfer_recipe import TransferRecipe
from training.data.augment import pad_crop_flip
from training.data.batches import FolderBatches, MemoryBatches
from training.data.images import DataError, Images, decode, eval_transform


@pytest.mark.parametrize(
    "extra", [(), ("--memory", "false", "--workers", "2", "--crop-scale", "0.5")], ids=["memory", "folder"]
)
def test_a_killed_run_ends_with_the_bytes_of_an_undisturbed_one(data, tmp_path, extra):
    run_here(data, tmp_path / "whole", *extra)
    code, _ = start_and_signal(data, tmp_path / "killed", extra, signal.SIGKILL, random.uniform(0, 0.8))
    assert code in (-signal.SIGKILL, 0)
    run_here(data, tmp_path / "killed", *extra)
    for name in ("model.safetensors", "config.json"):
        whole, killed = (tmp_path / r / "checkpoint" / name for r in ("whole", "killed"))
        assert whole.read_bytes().replace(b"/whole", b"/killed") == killed.read_bytes(), name
    logs = [untimed_log(tmp_path / r / "log.jsonl") for r in ("whole", "killed")]
    assert logs[0] == logs[1]


def test_sigterm_saves_and_exits_with_zero(data, tmp_path):
    out = tmp_path / "run"
    code, stderr = start_and_signal(data, out, ("--epochs", "60"), signal.SIGTERM, 0.1)
    assert code == 0, stderr
    step = int(re.search(r"state saved at step (\d+)", stderr).group(1))
    assert (out / f"state-{step:08d}.pt").exists()
    assert not (out / "checkpoint").exists()


def test_checkpoint_card_and_evaluation_agree(data, tmp_path):
    finish(data, tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoint"
    printed = run([sys.executable, "-m", "training.evaluate", str(checkpoint), "--data", str(data)])
    assert printed.returncode == 0, printed.stderr
    top1 = re.search(r"top-1 (\S+) %", printed.stdout).group(1)
    card = (checkpoint / "README.md").read_text()
    assert f"Top-1 {top1} %" in card
    for fact in ("seed 0", "on own data", "python -m training.classify cifar10_vca", "sha256"):
        assert fact in card
    model = vca.load(checkpoint)
    assert model.label_names == list(CLASSES)
    assert model.pretrained_cfg["mean"] == [0.4914, 0.4822, 0.4465]
    assert (tmp_path / "run" / "curve.png").stat().st_size > 1000
    log = [json.loads(line) for line in (checkpoint / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in log] == [2, 3] and f"{log[-1]['top1']:.2f}" == top1
    losses = [
        line["loss"] for line in untimed_log(tmp_path / "run" / "log.jsonl") if "lr" in line and line["epoch"] == 2
    ]
    assert losses and log[-1]["train_loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-4)


def test_the_results_of_a_checkpoint_in_float16_are_those_of_its_weights(data, tmp_path):
    run_here(data, tmp_path / "whole")
    run_here(data, tmp_path / "half", "--stored-as", "fp16")
    whole, half = (load_file(tmp_path / run / "checkpoint" / "model.safetensors") for run in ("whole", "half"))
    assert {tensor.dtype for tensor in half.values()} == {torch.float16}
    assert all(torch.equal(half[key], whole[key].half()) for key in whole)
    checkpoint = tmp_path / "half" / "checkpoint"
    run([sys.executable, "-m", "training.evaluate", str(checkpoint), "--data", str(data)])
    measured = json.loads((checkpoint / "results.json").read_text())["results"]["val"]
    recorded = vca.load(checkpoint).training_history[-1]["results"]
    assert {key: measured[key] for key in recorded} == recorded


def test_the_cards_of_twins_name_each_other(tmp_path):
    for name, attention, seed in (("one", "vca", 0), ("two", "mhsa", 0), ("three", "mhsa", 1)):
        model = vca.create_model(f"{attention}_vit_pico_patch4_32", num_classes=3)
        recipe = ClassifierRecipe(f"{attention}_vit_pico_patch4_32", 1, 8, 1e-3, seed=seed)
        run = dict(
            recipe=asdict(recipe), command="", init=None, steps=9, epochs=1, train_images=72, torch="", device="cpu",
            results=dict(top1=50.0 + seed, top5=100.0, loss=1.0, images=9),
        )  # fmt: skip
        vca.save(model, tmp_path / name, label_names=list(CLASSES), training=[run])
    for name in ("one", "two", "three"):
        write_card(tmp_path / name)
    cards = {name: (tmp_path / name / "README.md").read_text() for name in ("one", "two", "three")}
    parameters = sum(p.numel() for p in vca.load(tmp_path / "two").parameters())
    assert f"| two | mhsa_vit_pico_patch4_32 | {parameters:,} | top-1 50.00 % |" in cards["one"]
    assert "| one | vca_vit_pico_patch4_32 |" in cards["two"]
    assert "Twins" not in cards["three"] and "| three |" not in cards["one"] + cards["two"]


def test_the_card_of_a_run_on_a_cpu_names_the_recipe_for_a_gpu(tmp_path):
    model = vca.create_model("vca_vit_pico_patch4_32", num_classes=3)
    run = dict(
        recipe=asdict(ClassifierRecipe("vca_vit_pico_patch4_32", 1, 8, 1e-3)), init=None, steps=9, epochs=1,
        train_images=72, torch="", results=dict(top1=50.0, top5=100.0, loss=1.0, images=9),
    )  # fmt: skip
    for recipe, device, told in (("cifar10_vca", "cpu", True), ("cifar10_vca", "cuda", False), ("mine", "cpu", False)):
        run |= dict(command=f"python -m training.classify {recipe} --data DATA", device=device)
        vca.save(model, tmp_path / "one", label_names=list(CLASSES), training=[run])
        write_card(tmp_path / "one")
        card = (tmp_path / "one" / "README.md").read_text()
        assert ("    python -m training.classify cifar10_vca_gpu --data DATA\n" in card) == told
    started = run | dict(command="python -m training.classify cifar10_vca --data DATA")
    then = run | dict(command="python -m training.classify mine --data DATA", init="runs/x/checkpoint")
    vca.save(model, tmp_path / "one", label_names=list(CLASSES), training=[started, then])
    write_card(tmp_path / "one")
    card = (tmp_path / "one" / "README.md").read_text()
    assert "training.classify cifar10_vca_gpu" in card and "(`--init runs/x/checkpoint`)" in card


def test_init_starts_from_the_weights_and_keeps_the_history(data, tmp_path):
    run_here(data, tmp_path / "first")
    first = tmp_path / "first" / "checkpoint"
    run_here(data, tmp_path / "second", "--init", str(first), "--lr", "1e-12", "--min-lr", "0.0", "--warmup-lr", "0.0")
    old, new = (load_file(tmp_path / r / "checkpoint" / "model.safetensors") for r in ("first", "second"))
    assert all(torch.allclose(old[k], new[k], atol=1e-6) for k in old)
    history = vca.load(tmp_path / "second" / "checkpoint").training_history
    assert [bool(entry["init"]) for entry in history] == [False, True]


def test_two_runs_cannot_share_a_folder_nor_recipes(tmp_path):
    recipe = ClassifierRecipe("vca_vit_pico_patch4_32", 1, 8, 1e-3)
    held = RunFolder(tmp_path, recipe)
    with pytest.raises(RunError, match="in use by another run"):
        RunFolder(tmp_path, recipe)
    held._lock.close()
    (tmp_path / "state-00000001.pt").touch()
    with pytest.raises(RunError, match="another lr"):
        RunFolder(tmp_path, ClassifierRecipe("vca_vit_pico_patch4_32", 1, 8, 1e-4))


def test_micro_batches_give_the_gradient_of_the_whole_batch(tmp_path):
    x, y = torch.randn(8, 3, 32, 32), torch.arange(8) % 3
    weights = []
    for micro_batch in (0, 3):
        torch.manual_seed(0)
        t = trainer(tmp_path / str(micro_batch), micro_batch=micro_batch)
        t.train_step((x, y))
        weights.append(torch.cat([p.detach().flatten() for p in t.model.parameters()]))
    assert torch.allclose(*weights, atol=1e-6)


def test_a_cpu_that_is_slow_in_bf16_is_told_of(monkeypatch):
    assert 0 < precision.bf16_slowdown() < float("inf")
    for factor, told in ((0.5, 0), (1.8, 1)):
        monkeypatch.setattr(precision, "bf16_slowdown", lambda answer=factor: answer)
        with warnings.catch_warnings(record=True) as caught:
            for device, number in (("cpu", "bf16"), ("cpu", "fp32"), ("cuda", "bf16")):
                context = precision.autocast(torch.device(device), number)
                assert context._enabled == (number == "bf16" and (device == "cpu" or torch.cuda.is_available()))
        assert [("--precision fp32" in str(w.message)) for w in caught if "bf16" in str(w.message)] == [True] * told


def test_non_finite_steps_are_skipped_counted_saved_and_end_the_run(tmp_path):
    t = trainer(tmp_path, ema_decay=0.9)
    before = {k: v.clone() for k, v in t.model.state_dict().items()}
    average = {k: v.clone() for k, v in t.eval_model.state_dict().items()}
    bad, y = torch.full((2, 3, 32, 32), float("nan")), torch.tensor([0, 1])
    t.train_step((bad, y))
    assert t.skipped == 1 and t.step == 1
    assert all(torch.equal(before[k], v) for k, v in t.model.state_dict().items())
    assert all(torch.equal(average[k], v) for k, v in t.eval_model.state_dict().items())
    saved = torch.load(tmp_path / "nonfinite" / "step-00000001-rank-0.pt", weights_only=True)
    assert saved["batch"][0].isnan().all() and torch.equal(saved["batch"][1], y) and np.isnan(saved["loss"])
    t.train_step((torch.randn(2, 3, 32, 32), y))
    t.checkpoint(force=True)
    for _ in range(9):
        t.train_step((bad, y))
    with pytest.raises(RunError, match=r"10 steps in a row \(now step 12\).*nonfinite, the last good state is kept"):
        t.train_step((bad, y))
    assert t.skipped == 11
    assert len(list((tmp_path / "nonfinite").iterdir())) == 3
    assert torch.load(t.run.states()[0], weights_only=True)["skipped"] == 1


def test_the_loader_does_not_starve_the_step_of_a_shipped_recipe(tmp_path):
    """In CPU time of this process, which does not depend on what else the machine does."""
    batch = 128
    cfg = vca.create_model("vca_vit_pico_patch4_32").pretrained_cfg
    pixels, labels = torch.zeros(10 * batch, 3, 32, 32, dtype=torch.uint8), torch.zeros(10 * batch, dtype=torch.long)
    loader = MemoryBatches(pixels, labels, batch_size=batch, seed=0, padding=4, cfg=cfg, device="cpu")
    start = time.process_time()
    batches = list(loader.epoch(0, 0))
    loading = (time.process_time() - start) / len(batches)
    t = trainer(tmp_path)
    t.train_step(batches[0])
    start = time.process_time()
    t.train_step(batches[1])
    stepping = time.process_time() - start
    print(f"loader {batch / loading:.0f} images a CPU second, step {batch / stepping:.0f}")
    assert loading < 0.05 * stepping


def folder_batches(data, workers):
    images = Images(data, "train")
    images.transform = lambda image: torch.rand(2)
    return FolderBatches(images, batch_size=16, seed=5, workers=workers, device="cpu")


def memory_batches(data, **options):
    cfg = vca.create_model("vca_vit_pico_patch4_32").pretrained_cfg
    pixels, labels = decode(Images(data, "train"), cfg)
    return MemoryBatches(pixels, labels, batch_size=16, seed=5, padding=4, cfg=cfg, device="cpu", **options)


def test_folder_batches_do_not_depend_on_workers_nor_on_where_they_start(data):
    batches = [list(folder_batches(data, workers).epoch(2, 0)) for workers in (0, 1, 3)]
    later = list(folder_batches(data, 2).epoch(2, 4))
    for (x0, y0), (x1, y1), (x3, y3) in zip(*batches, strict=True):
        assert torch.equal(x0, x1) and torch.equal(x0, x3) and torch.equal(y0, y1) and torch.equal(y0, y3)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(batches[0][4:], later, strict=True))


def test_memory_batches_resume_inside_an_epoch_and_differ_between_epochs(data):
    batches = memory_batches(data)
    whole, rest = list(batches.epoch(1, 0)), list(batches.epoch(1, 3))
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(whole[3:], rest, strict=True))
    assert not torch.equal(whole[0][0], next(batches.epoch(2, 0))[0])
    seen = torch.cat([y for _, y in whole]).bincount()
    assert seen.sum() == 144 and seen.max() <= 50


def test_pad_crop_flip_moves_pixels_as_told():
    image = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5)
    stay, corner = torch.tensor([0.5, 0.5, 0.9]), torch.tensor([0.0, 0.99, 0.1])
    out = pad_crop_flip(image, torch.stack([stay, corner]), padding=1)
    assert torch.equal(out[0], image[0])
    expected = torch.zeros_like(image[1])
    expected[:, 1:, :4] = image[1][:, :3, 1:]
    assert torch.equal(out[1], expected.flip(-1))


def test_augmentation_in_memory_is_a_function_of_seed_epoch_and_image(data):
    strong = dict(smallest_crop=0.3, rotation=15.0, color_jitter=0.4, erasing=0.5)
    whole, rest = (list(memory_batches(data, **strong).epoch(1, first)) for first in (0, 3))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(whole[3:], rest, strict=True))
    half = list(memory_batches(data, rows=slice(8, 16), **strong).epoch(1, 0))
    assert all(torch.equal(a[0][8:], b[0]) for a, b in zip(whole, half, strict=True))
    for name, off in dict(smallest_crop=1.0, rotation=0.0, color_jitter=0.0, erasing=0.0).items():
        assert not torch.equal(whole[0][0], next(memory_batches(data, **strong | {name: off}).epoch(1, 0))[0]), name


def test_decoded_images_are_what_the_app_and_timm_see(data):
    cfg = vca.create_model("vca_vit_pico_patch4_32").pretrained_cfg
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8))
    floats = eval_transform(cfg)(photo)
    pixels = eval_transform(cfg, as_bytes=True)(photo).permute(2, 0, 1)
    assert torch.allclose((pixels / 255 - 0.5) / 0.5, floats, atol=1e-6)


def test_weight_decay_leaves_out_norms_biases_positions_lambdas_and_embeddings():
    from timm.optim import create_optimizer_v2

    model, _ = build_model(ClassifierRecipe("vca_vit_pico_patch4_32", 1, 8, 1e-3), CLASSES, None)
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05)
    decayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in decayed}
    spared = {name for name, _ in model.named_parameters()} - names
    assert names == {n for n, p in model.named_parameters() if n.endswith("weight") and p.ndim > 1}
    for part in ("norm1", ".bias", "pos_embed", "lambda_q1", "positive_embed", "negative_embed", "stage2.norm"):
        assert any(part in name for name in spared)


@pytest.mark.parametrize(
    "text, overrides, message",
    [
        ("epoch = 3", {}, "did you mean epochs"),
        ('epochs = "3"', {}, "must be of type int, not str"),
        ("epochs = 3", {}, "key 'model' is missing"),
        ("epochs = ", {}, "not valid TOML"),
        ("", {"lr": "fast"}, "not a float"),
        ("", {"epochs": "0"}, "epochs = 0 must be positive"),
        ("", {"precision": "fp16"}, "must be bf16 or fp32"),
        ("", {"auto_augment": "rand-m9"}, "auto_augment and repeats need memory = false"),
        ("", {"memory": "false", "rotation": "10"}, "smallest_crop and rotation need memory = true"),
        ("", {"color_jitter": "1.5"}, "smallest_crop, color_jitter and unlabeled_weight must be at most 1"),
        ("", {"smallest_crop": "0"}, "smallest_crop = 0.0 must be positive"),
    ],
)
def test_bad_recipes_are_refused_in_words(tmp_path, text, overrides, message):
    file = tmp_path / "mine.toml"
    if "epochs" not in text:
        text = 'model = "vca_vit_pico_patch4_32"\nepochs = 1\nbatch_size = 8\nlr = 1e-3\n' + text
    file.write_text(text)
    with pytest.raises(recipes.RecipeError, match=re.escape(message)):
        recipes.read(str(file), ClassifierRecipe, overrides)


def test_an_unknown_recipe_names_the_known_ones():
    with pytest.raises(recipes.RecipeError, match="cifar10_vca"):
        recipes.read("cifar11", ClassifierRecipe, {})


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_reads(name):
    kinds = dict(
        autoencoder=AutoencoderRecipe, classify=ClassifierRecipe, generate=generator_recipe.GeneratorRecipe,
        transfer=TransferRecipe,
    )  # fmt: skip
    model = recipes.read(name, kinds[recipes.task(name)], {}).model
    assert model in vca.list_models() or model in timm.list_models() or model == recipes.AUTOENCODER


def test_unusable_data_is_refused_in_words(data, tmp_path):
    with pytest.raises(DataError, match="no folder 'train'"):
        Images(tmp_path, "train")
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match="holds no images"):
        Images(tmp_path, "train")
    one = tmp_path / "train" / "cat"
    one.mkdir()
    Image.new("RGB", (8, 8)).save(one / "a.png")
    with pytest.raises(DataError, match="at least two"):
        Images(tmp_path, "train")
    (tmp_path / "train" / "dog").mkdir()
    (tmp_path / "train" / "dog" / "b.png").write_text("not an image")
    with pytest.raises(DataError, match=r"b\.png is not a readable image"):
        decode(Images(tmp_path, "train"), vca.create_model("vca_vit_pico_patch4_32").pretrained_cfg)
    result = run(command(tmp_path, tmp_path / "out"))
    assert result.returncode == 1 and result.stderr.startswith("error:") and "Traceback" not in result.stderr


@needs_compiler
def test_what_is_compiled_for_a_cpu_computes_what_is_not_compiled(monkeypatch):
    """Sums over transposed bf16: GCC 12's own 512-bit vectors make NaN of them on some CPUs."""
    from torch._inductor import config

    def sums(x, y, scale):
        scaled = x.float() * scale.float().unsqueeze(1)
        return scaled.sum(-1), (scaled * y).sum(-1)

    monkeypatch.setattr(config.cpp, "march", None)
    precision.prepare_compiler()
    torch.manual_seed(0)
    x, scale = torch.randn(4, 64, 160).bfloat16(), torch.randn(4, 160).bfloat16()
    y = torch.randn(4, 160, 64).transpose(1, 2)
    torch.testing.assert_close(torch.compile(sums)(x, y, scale), sums(x, y, scale))
