"""Sampling into files."""

import copy
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import vca
from tests.helpers.runs import PATIENCE, run
from training.core.sampling import SampleError, label_of, sample_files, write_npz
from training.sample import main
from vca.diffusion.sampling import to_bytes


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
    deadline = time.monotonic() + PATIENCE
    while not list(tmp_path.glob("parts/*.png")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    assert process.wait(PATIENCE) in (-signal.SIGKILL, 0) and list(tmp_path.glob("parts/*.png"))
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
    monkeypatch.setattr(sys, "argv", [*base, str(tmp_path / "y"), "--guidance-interval", "0.8", "0.2"])
    with pytest.raises(SystemExit, match=r"error: guidance_interval = \(0\.8, 0\.2\) must be two numbers"):
        main()
    monkeypatch.setattr(sys, "argv", [*base, str(tmp_path / "y"), "--time-shift", "-1"])
    with pytest.raises(SystemExit, match=r"error: time_shift = -1\.0 must be a positive number"):
        main()
    assert not (tmp_path / "y").exists()


def test_samples_note_what_is_not_the_default(finished, tmp_path, monkeypatch):
    base = ["sample", str(finished / "checkpoint"), "--device", "cpu", "--steps", "2", "--count", "2", "--out"]
    chosen = ["--guidance", "2", "--guidance-interval", "0", "0.4", "--time-shift", "2"]
    for name, more in (("plain", []), ("chosen", chosen)):
        monkeypatch.setattr(sys, "argv", [*base, str(tmp_path / name), *more])
        main()
    plain, noted = (json.loads((tmp_path / name / "samples.json").read_text()) for name in ("plain", "chosen"))
    assert noted.keys() - plain.keys() == {"guidance_interval", "time_shift"}
    assert noted["guidance_interval"] == [0.0, 0.4] and noted["time_shift"] == 2.0
    model = vca.load(finished / "checkpoint")
    images = model.sample([0, 1], steps=2, guidance_scale=2.0, guidance_interval=(0.0, 0.4), time_shift=2.0)
    first = np.asarray(Image.open(next((tmp_path / "chosen").glob("0000_*/000000.png"))))
    assert np.array_equal(first, to_bytes(images)[0].permute(1, 2, 0).numpy())


def test_bytes_are_rounded_as_in_dit():
    x = torch.linspace(-1.2, 1.2, 1001)
    want = (127.5 * x + 128).clamp(0, 255).byte()
    assert torch.equal(to_bytes(((x + 1) / 2).clamp(0, 1)), want)
