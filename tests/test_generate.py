"""Training a generator end to end at tiny size: resume after kill -9, grids, cards, latents, samples."""

import copy
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import vca
from training import evaluate
from training import recipe as recipes
from training.data import DataError, Images, derive_seed, epoch_order, eval_transform, generator_cfg
from training.generate import Recipe, draw_times, open_data, train, validation_loss
from training.latents import LatentBatches, Latents, encode
from training.latents import main as encode_main
from training.sample import SampleError, grid_png, label_of, main, sample_files, write_npz
from vca.sampling import to_bytes
from vca.vae import SCALE, DecoderError, LatentDecoder, sample_latents

CLASSES = ("bird", "cat", "dog")
SHORT = dict(
    steps=14, batch_size=16, warmup_steps=3, input_size=8, save_every=3, val_every=7, sample_every=7, sample_steps=2,
    compile="false", workers=0, device="cpu",
)  # fmt: skip
VAE_SCALE = 2
LATENT = dict(in_channels=4, vae="none")


def write_images(root, split, per_class, seed, size=8):
    rng = np.random.default_rng(seed)
    for shade, name in enumerate(CLASSES):
        folder = root / split / name
        folder.mkdir(parents=True)
        for i in range(per_class):
            pixels = rng.integers(0, 120, (size, size, 3)) + np.array([60 * shade, 0, 120 - 60 * shade])
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i:03d}.png")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_images(root, "train", 20, seed=0)
    write_images(root, "val", 5, seed=1)
    return root


def command(data, out, recipe="cifar10_sit_vca", **options):
    given = [f"--{key.replace('_', '-')}={value}" for key, value in (SHORT | options).items()]
    return [sys.executable, "-m", "training.generate", recipe, "--data", str(data), "--out", str(out), *given]


def run(arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=120)


def train_here(data, out, recipe="cifar10_sit_vca", init=None, **options):
    """A run inside this process, which is faster to start; the signal handler it sets is taken back."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        overrides = {key: str(value) for key, value in (SHORT | options).items()}
        read = recipes.read(recipe, Recipe, overrides)
        return train(read, str(data), str(out), torch.device("cpu"), init, "command")
    finally:
        signal.signal(signal.SIGTERM, handler)


def untimed_log(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("seconds")} for line in lines]


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A run folder of an undisturbed run."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    result = run(command(data, out))
    assert result.returncode == 0, result.stderr
    assert re.search(r"whole/checkpoint: validation loss \d\.\d+ on 15 samples", result.stdout)
    return out


def test_a_killed_run_ends_with_the_bytes_of_an_undisturbed_one(data, finished, tmp_path):
    out = tmp_path / "killed"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command(data, out), env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(out.glob("state-*.pt")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.3))
    process.send_signal(signal.SIGKILL)
    assert process.wait(30) in (-signal.SIGKILL, 0)
    result = run(command(data, out))
    assert result.returncode == 0 and "resumed" in result.stderr, result.stderr
    for name in ("model.safetensors", "config.json", "samples.png"):
        whole, killed = (folder / "checkpoint" / name for folder in (finished, out))
        assert whole.read_bytes().replace(bytes(finished), bytes(out)) == killed.read_bytes(), name
    assert untimed_log(finished / "log.jsonl") == untimed_log(out / "log.jsonl")


def test_evaluation_prints_the_number_of_the_card(data, finished, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evaluate", str(finished / "checkpoint"), "--data", str(data), "--device", "cpu"])
    evaluate.main()
    printed = re.fullmatch(r"validation loss (\d\.\d{4})  \(15 images\)\n", capsys.readouterr().out)
    assert f"Validation loss {printed[1]} on 15 images" in (finished / "checkpoint" / "README.md").read_text()


def test_sigterm_saves_and_exits_with_zero(data, tmp_path):
    out = tmp_path / "run"
    process = subprocess.Popen(command(data, out, steps=100000), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(out.glob("state-*.pt")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    stderr = process.communicate(timeout=30)[1]
    assert process.returncode == 0, stderr
    step = int(re.search(r"state saved at step (\d+)", stderr).group(1))
    assert (out / f"state-{step:08d}.pt").exists() and not (out / "checkpoint").exists()


def test_the_run_folder_shows_and_the_card_tells_what_was_trained(data, finished):
    checkpoint = finished / "checkpoint"
    assert {p.name for p in checkpoint.iterdir()} == {
        "config.json", "model.safetensors", "README.md", "log.jsonl", "samples.png",
    }  # fmt: skip
    grids = sorted(finished.glob("samples/*.png"))
    assert [grid.name for grid in grids] == ["step-00000007.png", "step-00000014.png"]
    assert Image.open(grids[0]).size == (3 * 8, 8 * 8)
    assert (finished / "curve.png").stat().st_size > 1000
    log = untimed_log(finished / "log.jsonl")
    assert [line["step"] for line in log if "val_loss" in line] == [7, 14]
    assert [line["lr"] for line in log if "lr" in line] == [5e-4]

    model = vca.load(checkpoint)
    assert model.label_names == list(CLASSES) and model.sample_shape == (3, 8, 8)
    images = model.sample(list(range(3)) * 8, steps=2, guidance_scale=2.0)
    assert grid_png(images, 3) == (checkpoint / "samples.png").read_bytes()
    card = (checkpoint / "README.md").read_text()
    entry = model.training_history[-1]
    assert entry["steps"] == 14 and entry["train_images"] == 60
    for fact in (
        f"Validation loss {entry['results']['val_loss']:.4f} on 15 images", "seed 0", "CIFAR-10", "2 steps, guidance 2",
        "euler", "exponential moving average", "python -m training.generate cifar10_sit_vca", "sha256", "No FID",
    ):  # fmt: skip
        assert fact in card, fact


def test_validation_loss_is_repeatable_and_comparable(data, finished):
    recipe = recipes.read("cifar10_sit_vca", Recipe, dict(input_size="8", batch_size="16", workers="0"))
    opened = open_data(recipe, str(data), torch.device("cpu"))
    model = vca.load(finished / "checkpoint")
    assert opened.val_samples.shape == (15, 3, 8, 8) and opened.val_samples.abs().max() <= 1
    whole = validation_loss(model, opened.val_samples, opened.val_labels)
    assert whole == pytest.approx(model.training_history[-1]["results"]["val_loss"], abs=1e-5)
    assert whole == pytest.approx(validation_loss(model, opened.val_samples, opened.val_labels, batch_size=4), rel=1e-5)
    x, _ = next(opened.batches.epoch(0, 0))
    assert x.shape == (16, 3, 8, 8) and x.min() >= -1 and x.max() <= 1


def test_init_starts_from_the_weights_and_diffusion_trains_in_the_same_loop(data, finished, tmp_path):
    first = finished / "checkpoint"
    train_here(data, tmp_path / "second", init=str(first), lr=1e-12, sample_every=0, steps=2)
    old, new = (load_file(c / "model.safetensors") for c in (first, tmp_path / "second" / "checkpoint"))
    assert all(torch.allclose(old[key], new[key], atol=1e-6) for key in old)
    assert [bool(entry["init"]) for entry in vca.load(tmp_path / "second" / "checkpoint").training_history] == [0, 1]
    card = (tmp_path / "second" / "checkpoint" / "README.md").read_text()
    assert card.index("from random weights") < card.index(f"(`--init {first}`)")
    assert "      python -m training.generate cifar10_sit_vca" in card and "\n      command\n" in card
    options = dict(model="dit_xs_4", time_sampling="uniform", attention="mhsa_dwc", micro_batch=5)
    train_here(data, tmp_path / "dit", **options)
    assert vca.load(tmp_path / "dit" / "checkpoint").family == "dit"
    assert "ddpm, 2 steps" in (tmp_path / "dit" / "checkpoint" / "README.md").read_text()


def test_times_are_drawn_as_the_objective_needs_them():
    torch.manual_seed(0)
    t = draw_times("dit", "uniform", 5000, "cpu")
    assert t.dtype == torch.long and t.min() >= 0 and t.max() <= 999 and len(t.unique()) > 900
    uniform, middle = (draw_times("sit", kind, 5000, "cpu") for kind in ("uniform", "logit_normal"))
    assert uniform.min() >= 0 and uniform.max() <= 1 and middle.std() < 0.22 < uniform.std()


@pytest.mark.parametrize(
    "overrides, message",
    [
        (dict(model="vca_vit_pico_patch4_32"), "is no generator"),
        (dict(model="dit_xs_4"), "'logit_normal' is for SiT"),
        (dict(time_sampling="cosine"), "must be one of uniform, logit_normal"),
        (dict(class_dropout="1.0"), "class_dropout = 1.0 must lie in"),
        (dict(steps="0"), "steps = 0 must be positive"),
    ],
)
def test_bad_recipes_are_refused_in_words(overrides, message):
    with pytest.raises(recipes.RecipeError, match=re.escape(message)):
        recipes.read("cifar10_sit_vca", Recipe, overrides)


@pytest.mark.parametrize("pair", ["cifar10_sit_{}", "cifar10_sit_{}_gpu", "imagenet_{}sit_b_2", "imagenet_{}dit_s_4"])
def test_twins_differ_in_the_attention_alone(pair):
    names = ("vca_", "") if pair.startswith("imagenet") else ("vca", "mhsa")
    ours, baseline = (recipes.read(pair.format(name), Recipe, {}) for name in names)
    assert ours.model == f"vca_{baseline.model}"
    assert {**vars(ours), "model": ""} == {**vars(baseline), "model": ""}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = vca.create_model("vca_sit_xs_4", input_size=8, dim=20, depth=1, num_classes=3).eval()
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.1)
    model.label_names = ["a cat", "a/b", "dog"]
    return model


def settings(**more):
    base = dict(seed=3, steps=2, sampler="sde", guidance_scale=1.0, guided_channels=None, precision="fp32")
    return base | more


def test_sampling_to_files_resumes_and_grows(model, tmp_path):
    args = dict(flat=False, balanced=True, settings=settings())
    files = sample_files(model, tmp_path / "a", 7, 4, **args)
    assert [str(f.relative_to(tmp_path / "a")) for f in files[:3]] == [
        "0000_a cat/000000.png", "0001_a_b/000001.png", "0002_dog/000002.png",
    ]  # fmt: skip
    before = {file: file.read_bytes() for file in files}
    files[2].unlink()
    more = sample_files(model, tmp_path / "a", 9, 2, **args)
    assert more[:7] == files and all(file.read_bytes() == pixels for file, pixels in before.items())
    with pytest.raises(SampleError, match="another steps"):
        sample_files(model, tmp_path / "a", 7, 4, **(args | dict(settings=settings(steps=3))))
    image = to_bytes(model.sample([1], steps=2, sampler="sde", seed=3, indices=[4]))[0]
    assert np.array_equal(np.asarray(Image.open(files[4])), image.permute(1, 2, 0).numpy())


def sample_here(monkeypatch, arguments, rank=0, processes=1):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setattr(sys, "argv", ["sample", *arguments])
    main()


def test_a_killed_job_of_several_processes_ends_with_the_bytes_of_a_single_one(model, tmp_path, monkeypatch, capsys):
    vca.save(model, tmp_path / "c", label_names=model.label_names)
    shared = [str(tmp_path / "c"), "--count", "26", "--batch-size", "4", "--steps", "3", "--device", "cpu", "--out"]
    whole, parts = tmp_path / "whole.npz", tmp_path / "parts.npz"
    sample_here(monkeypatch, [*shared, str(whole)])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RANK": "1", "WORLD_SIZE": "3"}
    process = subprocess.Popen(
        [sys.executable, "-m", "training.sample", *shared, str(parts)], env=environment, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("parts/*.png")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    assert process.wait(30) in (-signal.SIGKILL, 0) and list(tmp_path.glob("parts/*.png"))
    for rank in (2, 0):
        sample_here(monkeypatch, [*shared, str(parts)], rank, 3)
    made = {int(file.stem) for file in tmp_path.glob("parts/*.png")}
    assert made >= {i for i in range(26) if i // 4 % 3 != 1}
    sample_here(monkeypatch, [*shared, str(parts)], 1, 3)
    assert "parts.npz: 26 images\n" in capsys.readouterr().out
    assert parts.read_bytes() == whole.read_bytes()
    files = sorted(tmp_path.glob("whole/*.png"))
    assert len(files) == 26 and all(f.read_bytes() == (tmp_path / "parts" / f.name).read_bytes() for f in files)
    with pytest.raises(SystemExit, match="RANK=3 of WORLD_SIZE=3 is no process number"):
        sample_here(monkeypatch, [*shared, str(parts)], 3, 3)


@pytest.mark.long
def test_torchrun_shares_the_images_among_processes(model, tmp_path):
    vca.save(model, tmp_path / "c", label_names=model.label_names)
    arguments = ["-m", "training.sample", str(tmp_path / "c"), "--count", "10", "--batch-size", "2", "--steps", "2"]
    for folder, launcher in (("one", []), ("two", ["-m", "torch.distributed.run", "--nproc-per-node", "2"])):
        result = run([sys.executable, *launcher, *arguments, "--device", "cpu", "--out", str(tmp_path / folder)])
        assert result.returncode == 0 and "10 images" in result.stdout, result.stderr
    one, two = (sorted(tmp_path.glob(f"{folder}/*/*.png")) for folder in ("one", "two"))
    assert len(one) == len(two) == 10
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(one, two, strict=True))


def test_samples_of_other_weights_are_not_mixed(model, tmp_path):
    args = dict(flat=True, balanced=True, settings=settings())
    sample_files(model, tmp_path / "a", 2, 2, **args)
    other = copy.deepcopy(model)
    torch.nn.init.zeros_(other.final_layer.linear.bias.data)
    assert sample_files(other, tmp_path / "a", 3, 2, **args)
    torch.nn.init.ones_(other.final_layer.linear.bias.data)
    with pytest.raises(SampleError, match="another weights"):
        sample_files(other, tmp_path / "a", 3, 2, **args)


def test_samples_pack_into_what_the_adm_suite_reads(model, tmp_path):
    files = sample_files(model, tmp_path / "s", 5, 2, flat=True, balanced=False, settings=settings())
    write_npz(tmp_path / "s.npz", files)
    packed = np.load(tmp_path / "s.npz")["arr_0"]
    assert packed.shape == (5, 8, 8, 3) and packed.dtype == np.uint8
    assert all(np.array_equal(image, np.asarray(Image.open(file))) for image, file in zip(packed, files, strict=True))
    drawn = [label_of(index, 3, 3, balanced=False) for index in range(3000)]
    assert min(np.bincount(drawn)) > 900


def test_the_sample_command_writes_files_and_refuses_in_words(finished, tmp_path, monkeypatch, capsys):
    base = ["sample", str(finished / "checkpoint"), "--device", "cpu", "--steps", "2", "--count", "3", "--out"]
    monkeypatch.setattr(sys, "argv", [*base, str(tmp_path / "x.npz")])
    main()
    assert capsys.readouterr().out == f"{tmp_path / 'x.npz'}: 3 images\n"
    assert np.load(tmp_path / "x.npz")["arr_0"].shape == (3, 8, 8, 3)
    monkeypatch.setattr(sys, "argv", [*base, str(tmp_path / "y"), "--sampler", "ddim"])
    with pytest.raises(SystemExit, match="error: sampler='ddim' is unknown; sit has euler, heun, sde"):
        main()


def test_bytes_are_rounded_as_in_dit():
    x = torch.linspace(-1.2, 1.2, 1001)
    want = (127.5 * x + 128).clamp(0, 255).byte()
    assert torch.equal(to_bytes(((x + 1) / 2).clamp(0, 1)), want)


class FakeDecoder(LatentDecoder):
    """Stands for an autoencoder: means are pooled pixels, log-variances a constant."""

    calls = 0

    def moments(self, images):
        self.calls += 1
        pooled = torch.nn.functional.avg_pool2d(images, VAE_SCALE)
        mean = torch.cat([pooled, pooled[:, :1]], dim=1)
        return torch.cat([mean, torch.full_like(mean, -3)], dim=1)


def encode_all(data, out, decoder, split="train"):
    encode(Images(data, split), out / split, decoder, 8, batch_size=7, workers=0, device="cpu")


def test_cached_latents_are_those_of_the_images(data, tmp_path):
    decoder = FakeDecoder("fake")
    encode_all(data, tmp_path, decoder)
    latents = Latents(tmp_path, "train")
    assert len(latents) == 60 and latents.shape == (4, 4, 4) and latents.class_names == list(CLASSES)
    pixels = np.asarray(Image.open(data / "train" / "cat" / "003.png"))
    image = torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1).float()[None]
    stored = latents.read(torch.tensor([23, 23]), torch.tensor([False, True]))
    assert torch.allclose(stored, decoder.moments(torch.cat([image, image.flip(-1)])), atol=1e-6)
    assert latents.labels[23] == 1
    online = sample_latents(stored[:1], torch.ones(1, 4, 4, 4))
    assert torch.allclose(online, SCALE * (stored[:1, :4] + np.exp(-1.5)), atol=1e-6)

    batches = LatentBatches(latents, batch_size=16, seed=1, device=torch.device("cpu"))
    whole, rest = list(batches.epoch(2, 0)), list(batches.epoch(2, 1))
    assert len(whole) == 3 and whole[0][0].shape == (16, 4, 4, 4)
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(whole[1:], rest, strict=True))
    assert not torch.equal(whole[0][0], next(batches.epoch(3, 0))[0])


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    """A folder with diffusers' autoencoder, tiny and of random weights: images of side 8 -> latents of side 4."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers, which has the autoencoder, is not installed")
    folder = tmp_path_factory.mktemp("vae")
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(**blocks, block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4)
    vae.save_pretrained(folder)
    return folder


def test_losses_with_cached_moments_equal_those_with_online_encoding(data, autoencoder, tmp_path):
    """Two trainings of the same seeds: one from stored moments, one that flips and encodes each image in each epoch."""
    decoder = LatentDecoder(str(autoencoder))
    encode_all(data, tmp_path, decoder)
    batches = LatentBatches(Latents(tmp_path, "train"), batch_size=20, seed=1, device=torch.device("cpu"))
    images = Images(data, "train", eval_transform(generator_cfg(8)))

    def online(epoch):
        for number, chosen in enumerate(epoch_order(60, 1, epoch).split(20)):
            generator = torch.Generator().manual_seed(derive_seed(1, epoch, number, 3))
            flipped = torch.rand(20, generator=generator) < 0.5
            x = torch.stack([images[i][0].flip(-1 if flip else ()) for i, flip in zip(chosen, flipped, strict=True)])
            with torch.no_grad():
                latents = decoder.load("cpu").encode(x).latent_dist.sample(generator) * SCALE
            yield latents, torch.tensor([images[i][1] for i in chosen])

    losses = []
    for source in (lambda epoch: batches.epoch(epoch, 0), online):
        torch.manual_seed(2)
        model = vca.create_model("vca_dit_xs_2", dim=16, depth=2, num_heads=2, input_size=4, num_classes=3, **LATENT)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses.append([])
        for epoch in range(2):
            for x, y in source(epoch):
                loss = model.loss(x, y, torch.randn(x.shape), draw_times("dit", "uniform", len(x), "cpu")).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses[-1].append(loss.item())
    cached, encoded = losses
    assert len(cached) == 6 and cached == pytest.approx(encoded, rel=1e-4) and cached[-1] < cached[0]


def test_killed_encoding_ends_with_the_bytes_of_undisturbed_encoding(data, autoencoder, tmp_path, monkeypatch):
    """In chunks of 5 images, so that there is something to resume."""
    code = "import training.latents as l; l.CHUNK = 5; l.main()"
    arguments = ["--data", str(data), "--vae", str(autoencoder), "--image-size", "8", "--batch-size", "2"]
    arguments += ["--workers", "0", "--device", "cpu", "--out"]
    out, note = tmp_path / "killed", tmp_path / "killed" / "train" / "index.json"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments, str(out)], env=environment, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not note.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    assert process.wait(30) in (-signal.SIGKILL, 0) and note.exists()
    monkeypatch.setattr("training.latents.CHUNK", 5)
    for folder in (out, tmp_path / "whole"):
        monkeypatch.setattr(sys, "argv", ["latents", *arguments, str(folder)])
        encode_main()
    for name in ("train/moments.npy", "train/index.json", "val/moments.npy", "val/index.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_encoding_resumes_and_finds_damage(data, tmp_path, monkeypatch):
    monkeypatch.setattr("training.latents.CHUNK", 20)
    decoder = FakeDecoder("fake")
    encode_all(data, tmp_path, decoder)
    array, note = tmp_path / "train" / "moments.npy", tmp_path / "train" / "index.json"
    whole, index = array.read_bytes(), json.loads(note.read_text())
    assert len(index["checksums"]) == 3

    note.write_text(json.dumps(index | dict(checksums=index["checksums"][:2])))
    damaged = bytearray(whole)
    damaged[-10:] = bytes(10)
    array.write_bytes(damaged)
    with pytest.raises(DataError, match="unfinished"):
        Latents(tmp_path, "train")
    decoder.calls = 0
    encode_all(data, tmp_path, decoder)
    assert array.read_bytes() == whole and decoder.calls == 2 * 3

    damaged[1000:1010] = bytes(10)
    array.write_bytes(damaged)
    with pytest.raises(DataError, match="images 0 to 19 are damaged"):
        encode_all(data, tmp_path, decoder)
    with pytest.raises(DataError, match="another vae"):
        encode_all(data, tmp_path, FakeDecoder("other"))
    with pytest.raises(DataError, match=r"python -m training\.latents"):
        Latents(tmp_path, "val")


def test_a_latent_generator_trains_from_cached_latents(data, tmp_path, monkeypatch):
    for split in ("train", "val"):
        encode_all(data, tmp_path / "latents", FakeDecoder("fake"), split)
    options = dict(steps=2, batch_size=4, time_sampling="uniform", input_size=4)
    train_here(tmp_path / "latents", tmp_path / "run", recipe="imagenet_vca_sit_s_4", **options, sample_every=0)
    model = vca.load(tmp_path / "run" / "checkpoint")
    assert model.sample_shape == (4, 4, 4) and model.latent_decoder.source == "stabilityai/sd-vae-ft-ema"
    with pytest.raises(DataError, match="holds latents of side 4"):
        train_here(tmp_path / "latents", tmp_path / "other", recipe="imagenet_vca_sit_s_4", input_size=8)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(DecoderError, match="sd-vae-ft-ema"):
        train_here(tmp_path / "latents", tmp_path / "third", recipe="imagenet_vca_sit_s_4", **options, sample_every=1)
