"""What a run starts from: a checkpoint, of the same or of other classes, or a model of timm; and what it reads."""

import io
import json
import subprocess
import sys
import tarfile
import types
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import vca
from tests.helpers.runs import CLASSES, PATIENCE, write_images
from training import evaluate
from training.core.classifier_recipe import ClassifierRecipe
from training.core.generator_recipe import GeneratorRecipe as GenerateRecipe
from training.core.init import build_model
from training.core.metrics import interval
from training.data.images import DataError, Images, decode, generator_cfg
from training.evaluate import table, variant_accuracy
from vca.checkpoint import write_config

RECIPE = ClassifierRecipe("vca_vit_pico_patch4_32", 1, 8, 1e-3)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_images(root, "train", 4, seed=0)
    write_images(root, "val", 4, seed=1)
    return root


def saved(model, folder, names):
    vca.save(model, folder, label_names=names, training=[dict(results={})])
    return str(folder)


def test_other_classes_take_over_all_but_the_head(tmp_path, capsys):
    torch.manual_seed(5)
    source = vca.create_model("vca_vit_pico_patch4_32", num_classes=3)
    init = saved(source, tmp_path / "old", list(CLASSES))
    model, history = build_model(RECIPE, ["owl", "lynx"], init)
    assert model.num_classes == 2 and len(history) == 1
    assert "NOTE" in (said := capsys.readouterr().err) and "3 other classes; drawn anew: head.weight, head.bias" in said
    fresh, _ = build_model(RECIPE, ["owl", "lynx"], None)
    for key, value in model.state_dict().items():
        expected = fresh if key.startswith("head.") else source
        assert torch.equal(value, expected.state_dict()[key]), key
    same, _ = build_model(RECIPE, list(CLASSES), init)
    assert torch.equal(same.head.weight, source.head.weight) and not capsys.readouterr().err
    renamed, _ = build_model(RECIPE, ["bird", "cat", "fox"], init)
    assert not torch.equal(renamed.head.weight, source.head.weight)
    with pytest.raises(vca.CheckpointError, match=r"old is no ContrastVisionTransformer of this size: .*blocks"):
        build_model(ClassifierRecipe("vca_vit_nano_patch4_32", 1, 8, 1e-3), ["owl", "lynx"], init)


def test_a_checkpoint_for_another_image_size_keeps_it(tmp_path):
    source = vca.create_model("vca_vit_pico_patch4_32", num_classes=3, img_size=16, num_tokens=4)
    init = saved(source, tmp_path / "small", list(CLASSES))
    model, _ = build_model(replace(RECIPE, num_tokens=4), ["owl", "lynx"], init)
    assert torch.equal(model.pos_embed, source.pos_embed) and model.pretrained_cfg["input_size"] == (3, 16, 16)
    assert vca.load(saved(model, tmp_path / "tuned", ["owl", "lynx"])).pos_embed.shape == source.pos_embed.shape
    with pytest.raises(vca.CheckpointError, match=r"small is no ContrastVisionTransformer of this size: .*pos_embed"):
        build_model(replace(RECIPE, num_tokens=4), ["owl", "lynx"], init, img_size=32)


def test_a_generator_with_other_classes_keeps_its_null_class(tmp_path, capsys):
    torch.manual_seed(5)
    source = vca.create_model("vca_sit_xs_4", num_classes=3)
    init = saved(source, tmp_path / "old", list(CLASSES))
    recipe = GenerateRecipe("vca_sit_xs_4", 1, 8, 1e-3)
    model, _ = build_model(recipe, ["owl", "lynx"], init)
    old, new = (m.y_embedder.embedding_table.weight for m in (source, model))
    assert new.shape == (3, 160) and torch.equal(new[-1], old[-1]) and not torch.equal(new[:2], old[:2])
    assert torch.equal(model.blocks[3].attn.qkv.weight, source.blocks[3].attn.qkv.weight)
    assert "drawn anew: y_embedder.embedding_table.weight" in capsys.readouterr().err


def test_a_model_of_timm_is_exchanged_as_replace_attention_does_it(tmp_path, monkeypatch, capsys):
    torch.manual_seed(5)
    source = timm.create_model("deit_tiny_patch16_224", num_classes=1000)
    folder = tmp_path / "deit"
    folder.mkdir()
    save_file(source.state_dict(), folder / "model.safetensors")
    config = dict(architecture="deit_tiny_patch16_224", num_classes=1000, pretrained_cfg=dict(source.pretrained_cfg))
    (folder / "config.json").write_text(json.dumps(config, default=str))
    recipe = ClassifierRecipe("vca_deit_tiny_patch16_224", 1, 8, 1e-3)
    model, history = build_model(recipe, ["owl", "lynx"], f"timm:local-dir:{folder}")
    said = capsys.readouterr().err
    assert "drawn anew: dwc.bias, dwc.weight, head.bias, head.weight, negative_embed, positive_embed, stage1" in said
    exchanged = vca.replace_attention(source, "vca", token_grid=(7, 7)).state_dict()
    assert exchanged.keys() == model.state_dict().keys() and history == []
    drawn = ("head.", "_embed", "dwc", "stage1", "stage2")
    for key, value in model.state_dict().items():
        new = key != "pos_embed" and any(part in key for part in drawn)
        assert value.shape == exchanged[key].shape or key.startswith("head.")
        assert new or torch.equal(value, exchanged[key]), key
    kept, _ = build_model(recipe, [str(i) for i in range(1000)], f"timm:local-dir:{folder}")
    assert torch.equal(kept.head.weight, source.head.weight)
    with pytest.raises(vca.CheckpointError, match="timm:nothing: "):
        build_model(recipe, ["owl", "lynx"], "timm:nothing")


def pixels_of(path):
    return np.asarray(Images(path, "train")[0][0])


def test_images_are_read_upright_and_8_bit_as_the_app_reads_them(tmp_path):
    rng = np.random.default_rng(0)
    plain = rng.integers(0, 256, (6, 9, 3), dtype=np.uint8)
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
    file = tmp_path / "train" / "a" / "x.png"
    Image.fromarray(plain).save(tmp_path / "train" / "b" / "y.png")
    Image.fromarray(plain).save(file)
    assert np.array_equal(pixels_of(tmp_path), plain)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    Image.fromarray(plain).save(file, exif=exif)
    assert np.array_equal(pixels_of(tmp_path), np.rot90(plain, -1))
    deep = rng.integers(0, 65536, (6, 9), dtype=np.uint16)
    Image.fromarray(deep).save(file)
    assert np.array_equal(pixels_of(tmp_path)[..., 0], deep >> 8)
    Image.fromarray(np.zeros((6, 9, 4), dtype=np.uint8)).save(file)
    assert (pixels_of(tmp_path) == 255).all()


def write_shards(data, out, suffix="cls", samples_per_shard=5):
    """The images of a folder as WebDataset shards, in the order of timm's reader of folders."""
    out.mkdir()
    for split in ("train", "val"):
        images = Images(data, split)
        for start in range(0, len(images), samples_per_shard):
            with tarfile.open(out / f"{split}-{start:06d}.tar", "w") as archive:
                for index in range(start, min(start + samples_per_shard, len(images))):
                    stream, label = images.reader[index]
                    text = str(label) if suffix == "cls" else json.dumps(dict(label=label))
                    for name, content in (
                        (f"{index:06d}.png", stream.read()),
                        (f"{index:06d}.{suffix}", text.encode()),
                    ):
                        member = tarfile.TarInfo(name)
                        member.size = len(content)
                        archive.addfile(member, io.BytesIO(content))
    (out / "classes.txt").write_text("\n".join(CLASSES))


@pytest.mark.parametrize("suffix", ["cls", "json"])
def test_shards_hold_what_the_folder_holds(data, tmp_path, suffix):
    write_shards(data, tmp_path / "shards", suffix)
    folder, shards = Images(data, "train"), Images(tmp_path / "shards", "train")
    assert len(shards) == 12 and shards.class_names == list(CLASSES) and shards.labels() == folder.labels()
    ours, theirs = (decode(images, generator_cfg(32)) for images in (shards, folder))
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


def test_unusable_shards_are_refused_in_words(data, tmp_path):
    write_shards(data, tmp_path / "shards", "txt")
    with pytest.raises(DataError, match=r"train-000000\.tar: 000000\.png has no label"):
        Images(tmp_path / "shards", "train")
    (tmp_path / "shards" / "train-000000.tar").write_bytes(b"nothing")
    with pytest.raises(DataError, match="is not a readable shard"):
        Images(tmp_path / "shards", "train")


def test_hugging_face_data_sets_are_read_through_timm(data, monkeypatch):
    """A stand-in for the package `datasets`, with what timm's reader asks of it."""
    folder = Images(data, "val")

    class Stored(list):
        features = types.SimpleNamespace(names=list(CLASSES))
        info = types.SimpleNamespace(splits=None, features=dict(label=types.SimpleNamespace(names=list(CLASSES))))

        def cast_column(self, *_):
            return self

        def remove_columns(self, *_):
            return [dict(label=item["label"]) for item in self]

    def load_dataset(name, split, **_):
        if name != "user/pets" or split not in ("train", "test"):
            raise ValueError(f"Unknown split {split}")
        items = [folder.reader[index] for index in range(len(folder))]
        return Stored(dict(image=dict(bytes=s.read(), path=None), label=label) for s, label in items)

    package = types.ModuleType("datasets")
    package.load_dataset, package.Image, package.__version__ = load_dataset, lambda decode: None, "4.0.0"
    package.ClassLabel = types.SimpleNamespace
    monkeypatch.setitem(sys.modules, "datasets", package)
    for module in [name for name in sys.modules if name.endswith(("reader_hfds", "_hfds"))]:
        monkeypatch.delitem(sys.modules, module)
    images = Images("hfds:user/pets", "val")
    assert images.class_names == list(CLASSES) and images.labels() == folder.labels()
    assert torch.equal(decode(images, generator_cfg(32))[0], decode(folder, generator_cfg(32))[0])
    with pytest.raises(DataError, match="hfds:user/nothing cannot be read: train: Unknown split"):
        Images("hfds:user/nothing", "train")


def test_the_interval_holds_the_truth_19_times_in_20():
    rng = np.random.default_rng(0)
    for truth in (50.0, 97.0):
        found = 100 * rng.binomial(400, truth / 100, 4000) / 400
        held = np.mean([low <= truth <= high for low, high in (interval(value, 400) for value in found)])
        assert 0.93 < held < 0.97


class ByMean(torch.nn.Module):
    """Says class k, then k + 1, for an image of grey value 10 k."""

    def __init__(self, classes):
        super().__init__()
        self.pretrained_cfg = dict(generator_cfg(32), mean=(0.0,) * 3, std=(1.0,) * 3)
        self.one = torch.nn.Parameter(torch.ones(1))
        self.classes = classes

    def forward(self, x):
        k = (x.mean((1, 2, 3)) * 25.5).round().long()
        return 2 * torch.eye(self.classes)[k] + torch.eye(self.classes)[(k + 1) % self.classes]


def test_variants_of_imagenet_count_the_classes_that_they_have(tmp_path):
    names = [f"n{i:02d}" for i in range(6)]
    for variant, folders in dict(numbers=["0", "2", "5"], wnids=["n02", "n04"]).items():
        for number, folder in enumerate(folders):
            (tmp_path / variant / folder).mkdir(parents=True)
            k = int(folder) if variant == "numbers" else int(folder[1:]) - number
            Image.new("RGB", (32, 32), (10 * k,) * 3).save(tmp_path / variant / folder / "x.png")
    model = ByMean(6)
    numbers = variant_accuracy(model, str(tmp_path / "numbers"), names, 0)
    assert (numbers["top1"], numbers["images"]) == (100.0, 3)
    # the image of n04 shows class 3, which is none of the two that compete; of those the second guess is right
    assert variant_accuracy(model, str(tmp_path / "wnids"), names, 0)["top1"] == 100.0
    with pytest.raises(DataError, match="class n04 is none of the model's"):
        variant_accuracy(model, str(tmp_path / "wnids"), names[:4], 0)


def test_imagenet_real_counts_any_of_its_labels(tmp_path):
    (tmp_path / "val" / "a").mkdir(parents=True)
    (tmp_path / "val" / "b").mkdir()
    for index, (folder, k) in enumerate([("a", 0), ("a", 3), ("b", 4), ("b", 1)]):
        Image.new("RGB", (32, 32), (10 * k,) * 3).save(
            tmp_path / "val" / folder / f"ILSVRC2012_val_{index + 1:08d}.JPEG", format="PNG"
        )
    (tmp_path / "real.json").write_text(json.dumps([[0, 9], [5, 3], [0], []]))
    images, model = Images(tmp_path, "val"), ByMean(6)
    batches = evaluate.FolderEvaluation(images, model.pretrained_cfg, 0)
    result = evaluate.real_accuracy(model, images, batches, str(tmp_path / "real.json"))
    assert result == dict(top1=66.67, top5=100.0, images=3)
    with pytest.raises(DataError, match="50,000 validation images"):
        evaluate.real_accuracy(model, images, batches, "")


def test_results_are_written_and_make_the_table(data, tmp_path, monkeypatch, capsys):
    model = vca.create_model("vca_vit_pico_patch4_32", num_classes=3)
    checkpoint = saved(model, tmp_path / "mine", list(CLASSES))
    config = json.loads((tmp_path / "mine" / "config.json").read_text())
    config["training"] = [dict(recipe=dict(dataset="Mine"))]
    write_config(tmp_path / "mine", config)
    monkeypatch.setattr(sys, "argv", ["evaluate", checkpoint, "--data", str(data), "--device", "cpu"])
    monkeypatch.setattr("os.cpu_count", lambda: 0)
    evaluate.main()
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "mine" / "results.json").read_text())
    val = results["results"]["val"]
    low, high = val["top1_interval"]
    assert f"top-1 {val['top1']:.2f} %" in printed and "(12 images" in printed and low <= val["top1"] <= high
    assert results["throughput"]["images_per_second"] > 0
    text = table([str(tmp_path / "mine" / "results.json")])
    assert f"| mine | 1.24 M | Mine | {val['top1']:.2f} ({low:.2f}-{high:.2f}) |" in text
    with pytest.raises(DataError, match="is no results file"):
        table([str(tmp_path / "mine" / "config.json")])


def test_a_machine_that_only_trains_needs_neither_the_app_nor_what_draws():
    """In a process of its own, in which these packages cannot be imported."""
    missing = ("gradio", "captum", "diffusers", "matplotlib", "skimage", "torch_fidelity", "scipy", "datasets")
    modules = ("core.cli", "classify", "generate", "evaluate", "compare", "latents", "sample", "card")
    program = "import sys\n" + "".join(f"sys.modules[{name!r}] = None\n" for name in missing)
    program += "".join(f"import training.{name}\n" for name in modules)
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE)
    assert result.returncode == 0, result.stderr
