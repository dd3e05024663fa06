"""The judge's numbers on images whose answer is known, and the command from checkpoint to card."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import vca
from tests.helpers.generator_runs import CLASSES, write_images
from training.quality import (
    QualityReference,
    best_of,
    frechet_distance,
    judged,
    main,
    nearest,
    nearest_pixels,
    precision_recall,
    read_images,
    spread,
)

SIDE = 8


@pytest.fixture(scope="module")
def judge():
    torch.manual_seed(0)
    model = vca.create_model("vca_vit_pico_patch4_32", num_classes=3, embed_dim=32, depth=1, num_heads=2).eval()
    torch.nn.init.normal_(model.head.weight)
    return model


@pytest.fixture(scope="module")
def images():
    """Training images, held-out images and their labels: each class has a shade of its own."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    pixels = [
        (torch.randint(0, 120, (60, 3, SIDE, SIDE), generator=generator) + 60 * labels.view(-1, 1, 1, 1)).byte()
        for _ in range(2)
    ]
    return (*pixels, labels)


def test_the_judge_sees_images_in_its_own_preprocessing(judge, images):
    pixels = images[0][:3]
    features, logits = judged(judge, pixels)
    for index, image in enumerate(pixels):
        large = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((32, 32), Image.Resampling.BICUBIC)
        mean, std = (np.array(judge.pretrained_cfg[key]) for key in ("mean", "std"))
        x = torch.from_numpy((np.asarray(large) / 255 - mean) / std).permute(2, 0, 1)[None].float()
        with torch.no_grad():
            assert torch.allclose(logits[index], judge(x)[0], atol=1e-4)
            assert torch.allclose(judge.head(features[index]), logits[index], atol=1e-5)


def test_nearest_is_that_of_a_plain_loop():
    queries, references = torch.randn(7, 5), torch.randn(40, 5)
    far = np.linalg.norm(queries.numpy()[:, None] - references.numpy()[None], axis=-1)
    distances, indices = nearest(queries, references, 4, chunk=11)
    assert np.array_equal(indices.numpy(), far.argsort(1)[:, :4])
    assert np.allclose(distances.numpy(), np.sort(far, axis=1)[:, :4], atol=1e-5)


def test_a_mirrored_copy_is_found(images):
    train = images[0]
    distances, indices = nearest_pixels(train[[5, 9]].flip(-1), train)
    assert indices[:, 0].tolist() == [5, 9] and distances[:, 0].max() < 0.1 < distances[:, 1].min()
    lighter = (train[:2].int() + 3).clamp(0, 255).byte()
    assert nearest_pixels(lighter, train)[0][:, 0].tolist() == pytest.approx([3, 3], abs=0.01)


def test_spread_is_the_mean_over_pairs():
    features, labels = torch.tensor([[0.0, 0], [3, 4], [0, 4], [9, 9], [9, 9]]), torch.tensor([0, 0, 0, 1, 1])
    assert spread(features, labels, 2) == pytest.approx([(5 + 4 + 3) / 3, 0])


def test_frechet_distance_of_normal_distributions_in_closed_form():
    ours = dict(mu=np.array([1.0, 2, 3]), sigma=np.diag([1.0, 4, 9]))
    theirs = dict(mu=np.array([1.0, 0, 2]), sigma=np.diag([4.0, 1, 9]))
    assert frechet_distance(ours, theirs) == pytest.approx(4 + 1 + (1 - 2) ** 2 + (2 - 1) ** 2)


def test_precision_and_recall_of_points_on_a_line():
    ours, theirs = (torch.tensor([0, 1, 2, 3, outlier])[:, None].float() for outlier in (50, 120))
    # a ball reaches the third neighbor: around 120 it holds 50, around 50 it ends at 99
    assert precision_recall(ours, theirs) == pytest.approx((100, 80))
    assert precision_recall(ours[:4], theirs[:4] + 9) == (0, 0)
    assert precision_recall(ours, ours) == (100, 100)


def test_known_images_get_known_numbers(judge, images):
    train, held_out, labels = images
    reference = QualityReference(judge, train, held_out, labels)
    real = reference.held_out
    assert real["diversity_by_class"] == [100] * 3 and real["diversity"] == 100 and real["copies"] == 0
    assert real["nearest_pixels"] > 1 and real["frechet_distance"] > 0

    answers = judged(judge, train)[1].argmax(1)
    copied = reference.measure(train, labels)[0]
    assert copied["copies"] == 100 and copied["nearest_pixels"] < 0.1 and copied["frechet_distance"] < 1e-6
    assert copied["precision"] == copied["recall"] == 100
    assert copied["recognised"] == pytest.approx(100 * (answers == labels).float().mean().item(), abs=0.01)
    shares = [100 * (answers[labels == k] == k).float().mean().item() for k in range(3)]
    assert copied["recognised_by_class"] == pytest.approx(shares, abs=0.06)

    collapsed = held_out.clone()
    collapsed[labels == 1] = held_out[1]
    assert reference.measure(collapsed, labels)[0]["diversity_by_class"] == pytest.approx([100, 0, 100], abs=0.1)


def test_the_best_guidance_is_the_nearest_of_those_recognised_as_real_images_are():
    rows = [
        dict(guidance=guidance, recognised=recognised, frechet_distance=distance)
        for guidance, recognised, distance in ((1, 60, 3), (2, 90, 2), (3, 95, 4), (4, 96, 5))
    ]
    assert best_of(rows, 95) == 3 and best_of(rows, 85) == 2 and best_of(rows, 99) == 4


@pytest.fixture(scope="module")
def folders(judge, tmp_path_factory):
    """A generator, a judge and the data of both, as folders."""
    root = tmp_path_factory.mktemp("quality")
    write_images(root / "data", "train", 20, seed=0)
    write_images(root / "data", "val", 4, seed=1)
    vca.save(judge, root / "judge", label_names=list(CLASSES))
    torch.manual_seed(1)
    generator = vca.create_model("vca_sit_xs_4", input_size=SIDE, dim=20, depth=1, num_classes=3)
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    recipe = dict(
        dataset="shades", license="", seed=0, input_size=SIDE, ema_decay=0, sample_steps=2, sample_guidance=1.0
    )
    run = dict(recipe=recipe, command="train", init=None, steps=2, epochs=1, train_images=60, torch="2", device="cpu")
    run["results"] = dict(val_loss=0.5, images=12)
    vca.save(generator, root / "generator", label_names=list(CLASSES), training=[run])
    return root


def command(folders, *more):
    base = ["quality", str(folders / "generator"), "--judge", str(folders / "judge"), "--data", str(folders / "data")]
    return [*base, "--count", "12", "--steps", "2", "--out", str(folders / "out"), "--device", "cpu", *more]


def test_the_command_measures_resumes_and_writes_the_card(folders, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", command(folders, "--guidance", "1", "3"))
    main()
    config = json.loads((folders / "generator" / "config.json").read_text())
    quality = config["training"][-1]["results"]["quality"]
    assert [row["guidance"] for row in quality["guidance"]] == [1, 3] and quality["held_out"]["images"] == 12
    assert quality["guidance"][0]["frechet_distance"] != quality["guidance"][1]["frechet_distance"]
    assert quality["precision"] == "bf16" and quality["sampler"] == "euler" and quality["train_images"] == 60
    assert "--guidance 1 3 --steps 2" in quality["options"] and str(folders) not in json.dumps(quality)
    card = (folders / "generator" / "README.md").read_text()
    for row in quality["guidance"]:
        assert f"| guidance {row['guidance']:g} | {row['recognised']:.1f} % |" in card
        assert f"{row['frechet_distance']:.2f} |" in card
    assert (
        "12 held-out images | " in card
        and f"training.quality {folders.name}/generator {quality['options']}" in card
        and "No FID" in card
    )
    for picture, size in (("quality.png", (3 * 64, 4 * 64)), ("nearest.png", (10 * 64, 2 * 64))):
        assert f"({picture})" in card and Image.open(folders / "generator" / picture).size == size
    assert vca.load(folders / "generator").training_history == config["training"]

    files = sorted(folders.glob("out/*/generator/guidance-3/seed-0/*.png"))
    before = {file: file.stat().st_mtime_ns for file in files}
    files[4].unlink()
    main()
    assert json.loads((folders / "generator" / "config.json").read_text()) == config
    assert sum(file.stat().st_mtime_ns != before[file] for file in files) == 1
    assert read_images(files).shape == (12, 3, SIDE, SIDE)
    monkeypatch.setattr(sys, "argv", command(folders, "--guidance", "1", "--steps", "3"))
    with pytest.raises(SystemExit, match="another steps"):
        main()
    capsys.readouterr()


def test_when_guidance_applies_and_where_the_steps_lie_is_on_the_card(folders, monkeypatch, capsys):
    chosen = ["--seeds", "4", "5", "--guidance-interval", "0.2", "0.9", "--time-shift", "2", "--judge-size", "16"]
    monkeypatch.setattr(sys, "argv", command(folders, "--guidance", "3", "--out", str(folders / "timed"), *chosen))
    main()
    quality = json.loads((folders / "generator" / "config.json").read_text())["training"][-1]["results"]["quality"]
    assert (quality["guidance_interval"], quality["time_shift"], quality["judge_size"]) == ([0.2, 0.9], 2, 16)
    for option in ("--judge-size 16", "--guidance-interval 0.2 0.9", "--time-shift 2.0"):
        assert option in quality["options"]
    card = (folders / "generator" / "README.md").read_text()
    (row,) = quality["guidance"]
    by_seed = row["by_seed"]["frechet_distance"]
    assert len(set(by_seed)) == 2 and row["frechet_distance"] == pytest.approx(sum(by_seed) / 2, abs=0.01)
    assert (
        f"{row['frechet_distance']:.2f} ± {abs(by_seed[0] - by_seed[1]) / 2**0.5:.1f} |" in card and "seed 4, 5" in card
    )
    assert "shifted by 2, guidance on all channels from 0.2 to 0.9 of the way" in card and "`judge` at 16 px" in card
    best = dict(steps=2, guidance_scale=3, guidance_interval=[0.2, 0.9], time_shift=2)
    assert vca.load(folders / "generator").sampling == best
    assert 'model.sample(["bird", 1], **model.sampling, seed=0)' in card
    assert "guidance_scale=3.0, guidance_interval=[0.2, 0.9], time_shift=2.0. " in card
    capsys.readouterr()


def test_two_generators_share_what_is_measured_of_real_images(folders, monkeypatch, capsys):
    alone, twin = folders / "generator", folders / "twin"
    shutil.copytree(alone, twin)
    torch.manual_seed(2)
    other = vca.load(twin)
    with torch.no_grad():
        other.final_layer.linear.bias.add_(torch.randn_like(other.final_layer.linear.bias))
    vca.save(other, twin, label_names=list(CLASSES), training=other.training_history)
    name, first, *rest = command(folders, "--guidance", "1", "--out", str(folders / "both"))
    asked = [name, first, str(twin), *rest]
    monkeypatch.setattr(sys, "argv", asked)
    main()
    assert capsys.readouterr().err.count("the judge looks at 60 training images") == 1
    measured = [vca.load(folder).training_history[-1]["results"]["quality"] for folder in (alone, twin)]
    assert measured[0]["guidance"] != measured[1]["guidance"] and measured[0]["held_out"] == measured[1]["held_out"]
    assert measured[0]["options"] == measured[1]["options"]
    assert all("training.quality" in (folder / "README.md").read_text() for folder in (alone, twin))

    monkeypatch.setattr(sys, "argv", [name, first, str(folders / "nowhere"), *rest])
    with pytest.raises(SystemExit, match="nowhere: no such checkpoint folder"):
        main()


@pytest.mark.parametrize(
    "change, message",
    [
        (("--count", "5"), "--count 5 is too few"),
        (("--judge", "GENERATOR"), "a classifier is needed"),
        (("--sampler", "ddim"), "sit has euler, heun, sde"),
        (("--time-shift", "0"), "time_shift = 0.0 must be a positive number"),
        (("--guidance-interval", "0.5", "0.2"), "guidance_interval"),
        (("--data", "nowhere"), "nowhere has no folder 'train'"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_words(folders, monkeypatch, capsys, change, message):
    change = [str(folders / "generator") if word == "GENERATOR" else word for word in change]
    monkeypatch.setattr(sys, "argv", command(folders, "--guidance", "1", "--out", str(folders / "fresh"), *change))
    with pytest.raises(SystemExit, match=message):
        main()
    capsys.readouterr()
