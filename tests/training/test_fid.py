"""FID and its kin against torch-fidelity's own command, with Inception weights drawn at random and kept in a file."""

import json
import pickle
import sys
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch_fidelity
from PIL import Image
from torch_fidelity import feature_extractor_inceptionv3 as inception
from torch_fidelity.metric_fid import fid_statistics_to_metric

import vca
from training import fid
from training.core.sampling import write_npz
from training.fid import FidError, features_of, main, mapped, measure, open_inception, open_source, statistics_of
from training.sample import main as sample

COUNT = 12


def write_folder(folder, seed, count=COUNT, side=8):
    """Random images in two sub-folders; the files in order."""
    rng = np.random.default_rng(seed)
    files = [folder / "ab"[i % 2] / f"{i:03d}.png" for i in range(count)]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256 - 100 * seed, (side, side, 3), dtype=np.uint8)).save(file)
    return sorted(files)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Samples, a reference as folder and `.npz`, and a file of weights that keep the activations alive."""
    root = tmp_path_factory.mktemp("fid")
    write_folder(root / "samples", 0)
    write_npz(root / "reference.npz", write_folder(root / "reference", 1))
    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        context.setattr(inception, "load_state_dict_from_url", lambda *args, **kwargs: {})
        context.setattr(inception.FeatureExtractorInceptionV3, "load_state_dict", lambda *args: None)
        network = inception.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    torch.save(network.state_dict(), root / "weights.pth")
    return root


@pytest.fixture(scope="module")
def features(root):
    """Of samples and reference."""
    network = open_inception(root / "weights.pth", cuda=False)
    return [features_of(open_source(root / side)[0], network, 5, False) for side in ("samples", "reference")]


def test_the_numbers_are_torch_fidelitys_own(root):
    shared = dict(cuda=False, cache=False, verbose=False, save_cpu_ram=True, samples_find_deep=True)
    theirs = torch_fidelity.calculate_metrics(
        input1=str(root / "samples"), input2=str(root / "reference"), isc=True, fid=True, prc=True,
        feature_extractor="inception-v3-compat", feature_extractor_weights_path=str(root / "weights.pth"), **shared,
    )  # fmt: skip
    ours = measure(root / "samples", root / "reference", root / "weights.pth", batch_size=5)
    assert ours["fid"] > 1 and ours["fid"] == pytest.approx(theirs["frechet_inception_distance"], abs=1e-3)
    assert ours["inception_score"] == pytest.approx(theirs["inception_score_mean"], abs=1e-3)
    assert ours["inception_std"] == pytest.approx(theirs["inception_score_std"], abs=1e-3)
    for name in ("precision", "recall"):
        assert ours[name] == pytest.approx(theirs[name], abs=1e-3)
    assert ours["images"] == ours["reference_images"] == COUNT and ours["statistics"] == "its images"


def test_fid_is_the_distance_of_two_normal_distributions(features):
    """By symmetric square roots, where torch-fidelity takes eigenvalues of a product."""
    ours, theirs = (statistics_of(side) for side in features)
    few, sigma = 24, []  # a rotation onto the span of the features leaves the distance as it is
    basis = np.linalg.svd(np.concatenate([side["2048"].double().numpy() for side in features]), full_matrices=False)[2]
    for side in (ours, theirs):
        sigma.append(basis[:few] @ side["sigma"] @ basis[:few].T)
    values, vectors = np.linalg.eigh(sigma[0])
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ sigma[1] @ root).clip(0)).sum()
    want = np.square(ours["mu"] - theirs["mu"]).sum() + np.trace(sigma[0]) + np.trace(sigma[1]) - 2 * cross
    got = fid_statistics_to_metric(ours, theirs, verbose=False)["frechet_inception_distance"]
    assert got == pytest.approx(want, abs=1e-3)


def test_an_npz_holds_the_same_images_and_may_bring_statistics(root, features, tmp_path, monkeypatch):
    packed, folder = open_source(root / "reference.npz")[0], open_source(root / "reference")[0]
    assert isinstance(packed.pixels, np.memmap) and len(packed) == COUNT and packed.size == folder.size == (8, 8)
    assert all(torch.equal(packed[i], folder[i]) for i in range(COUNT))
    np.savez_compressed(tmp_path / "small.npz", arr_0=packed.pixels)
    assert np.array_equal(mapped(tmp_path / "small.npz"), packed.pixels)

    statistics = {name: array.astype(np.float32) for name, array in statistics_of(features[1]).items()}
    np.savez(tmp_path / "both.npz", arr_0=packed.pixels, **statistics)
    np.savez(tmp_path / "statistics.npz", **statistics)
    both, alone = (open_source(tmp_path / name) for name in ("both.npz", "statistics.npz"))
    assert torch.equal(both[0][3], folder[3]) and alone[0] is None
    assert alone[1]["mu"].dtype == np.float64 and np.array_equal(alone[1]["sigma"], statistics["sigma"])
    monkeypatch.setattr(fid, "features_of", lambda *args: features[0])
    monkeypatch.setattr(fid, "open_inception", lambda *args: None)
    result = measure(root / "samples", tmp_path / "statistics.npz", None)
    assert "recall" not in result and result["statistics"] == "mu and sigma of the file"
    assert result["reference_images"] == 0 and result["fid"] > 1


def refuse(message, samples, reference, weights=None):
    with pytest.raises(FidError, match=message):
        measure(samples, reference, weights)


def test_what_cannot_be_measured_is_refused_in_words(root, tmp_path, monkeypatch):
    good = root / "samples"
    write_folder(tmp_path / "few", 0, count=9)
    write_folder(tmp_path / "large", 0, side=16)
    write_folder(tmp_path / "mixed", 0)
    Image.new("RGB", (9, 8)).save(tmp_path / "mixed" / "b" / "011.png")
    np.savez(tmp_path / "wrong.npz", x=np.zeros(3))
    np.savez(tmp_path / "grey.npz", arr_0=np.zeros((12, 8, 8), np.uint8))
    np.savez(tmp_path / "short.npz", mu=np.zeros(64), sigma=np.eye(64))
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.npz").write_text("no archive")
    refuse("few holds 9 images; at least 10 are needed", tmp_path / "few", good)
    refuse("samples are 8x8, .*large 16x16: not comparable", good, tmp_path / "large")
    refuse("empty holds no images", good, tmp_path / "empty")
    refuse("wrong.npz has neither images arr_0 nor statistics mu and sigma; it has x", good, tmp_path / "wrong.npz")
    refuse(r"grey.npz: arr_0 must be uint8 \(N, H, W, 3\), not uint8 \(12, 8, 8\)", good, tmp_path / "grey.npz")
    refuse("text.npz is neither a folder of images nor an .npz", good, tmp_path / "text.npz")
    refuse(r"short.npz: mu is \(64,\) instead of \(2048,\)", good, tmp_path / "short.npz")
    whole = dict(mu=np.zeros(2048), sigma=np.eye(2048))
    np.savez(tmp_path / "alone.npz", **whole)
    refuse("alone.npz holds statistics alone", tmp_path / "alone.npz", good)
    np.savez(tmp_path / "other.npz", **whole | dict(sigma=np.eye(64)))
    refuse(r"other.npz: sigma is \(64, 64\) instead of", good, tmp_path / "other.npz")
    np.savez(tmp_path / "nan.npz", **whole | dict(mu=np.full(2048, np.nan)))
    refuse("nan.npz: mu holds NaN", good, tmp_path / "nan.npz")
    np.save(tmp_path / "array.npy", np.zeros((12, 8, 8, 3), np.uint8))
    refuse("array.npy is neither a folder of images nor an .npz", good, tmp_path / "array.npy")
    images = open_source(tmp_path / "mixed")[0]
    with pytest.raises(FidError, match=r"011\.png is 9x8, others in .*mixed are 8x8"):
        list(map(images.__getitem__, range(COUNT)))

    refuse("none.pth: file not found", good, good, tmp_path / "none.pth")
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other.pth")
    refuse("other.pth: not the weights of this network", good, good, tmp_path / "other.pth")
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Evil(), protocol=2))
    refuse("evil.pth: not a file of tensors that can be read safely", good, good, tmp_path / "evil.pth")

    def offline(*args, **kwargs):
        raise URLError("no route")

    monkeypatch.setattr(inception, "load_state_dict_from_url", offline)
    refuse("weights cannot be downloaded .*no route.*give the file as --weights", good, good)


class Evil:
    def __reduce__(self):
        return sys.exit, ("a weights file ran code",)


def test_the_command_writes_number_and_protocol_onto_the_card(root, features, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    generator = vca.create_model("vca_sit_xs_4", input_size=8, dim=20, depth=1, num_classes=3)
    torch.nn.init.normal_(generator.final_layer.linear.weight, std=0.1)
    recipe = dict(dataset="noise", license="", seed=0, input_size=8, ema_decay=0, sample_steps=2, sample_guidance=1.0)
    run = dict(recipe=recipe, command="train", init=None, steps=2, epochs=1, train_images=60, torch="2", device="cpu")
    run["results"] = dict(val_loss=0.5, images=12)
    checkpoint, out = tmp_path / "generator", tmp_path / "made.npz"
    vca.save(generator, checkpoint, label_names=["a", "b", "c"], training=[run])
    monkeypatch.setattr(
        sys,
        "argv",
        ["sample", str(checkpoint), "--count", "12", "--steps", "2", "--guidance", "1.5", "--out", str(out)],
    )
    sample()
    sides = iter(features * 2)
    monkeypatch.setattr(fid, "features_of", lambda *args: next(sides))
    monkeypatch.setattr(fid, "open_inception", lambda *args: None)
    monkeypatch.setattr(fid, "fid_statistics_to_metric", lambda *args, **kwargs: {"frechet_inception_distance": 61.256})
    arguments = ["fid", str(out), str(root / "reference.npz"), "--weights", str(root / "weights.pth"), "--card"]
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", [*arguments, str(checkpoint)])
        main()
    assert "fid " in capsys.readouterr().out
    (result,) = json.loads((checkpoint / "config.json").read_text())["training"][-1]["results"]["fid"]
    card = (checkpoint / "README.md").read_text()
    for fact in (
        "**FID 61.26**", f"precision {result['precision']:.3f}",
        "12 images; euler, 2 steps, guidance 1.5 on all channels, labels in turn",
        "seed 0, fp32, decoder none", "reference reference.npz (its images; 12 images)", "torch-fidelity",
    ):  # fmt: skip
        assert fact in card, fact
    assert "No FID" not in card and vca.load(checkpoint)

    torch.nn.init.zeros_(generator.final_layer.linear.weight)
    vca.save(generator, tmp_path / "other", label_names=["a", "b", "c"], training=[run])
    monkeypatch.setattr(sys, "argv", [*arguments, str(tmp_path / "other")])
    with pytest.raises(SystemExit, match="were not made with the weights of"):
        main()
