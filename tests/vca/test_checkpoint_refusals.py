"""A damaged or foreign checkpoint is refused by name, and never half loaded."""

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import vca
from tests.helpers.checkpoints import (
    KEY,
    LABELS,
    NAME,
    SMALL,
    assert_refused,
    edit_config,
    edit_weights,
    make_model,
    put,
    remove,
)
from vca import CheckpointError


def set_value(key: str, value: float) -> Callable[[dict], None]:
    return lambda tensors: tensors[key].view(-1)[-1:].fill_(value)


@pytest.mark.parametrize(
    "change, message",
    [
        (remove(KEY), f"missing {KEY}"),
        (lambda t: t.update({"blocks.2.attn.extra": torch.zeros(2)}), r"unexpected blocks\.2\.attn\.extra"),
        (lambda t: t.update({f"_orig_mod.{KEY}": t.pop(KEY)}), f"missing {KEY}; unexpected _orig_mod.{KEY}"),
        (put(KEY, torch.zeros(7)), rf"{KEY} is \(7,\) instead of \(8,\)"),
        (put(KEY, torch.zeros(1)), rf"{KEY} is \(1,\) instead of \(8,\)"),
        (put(KEY, torch.zeros(8, 1)), rf"{KEY} is \(8, 1\) instead of \(8,\)"),
        (put("head.weight", torch.zeros(4, 16)), r"head\.weight is \(4, 16\) instead of \(3, 16\)"),
        (set_value(KEY, float("nan")), f"{KEY} holds NaN or infinite values"),
        (set_value("head.bias", float("inf")), r"head\.bias holds NaN or infinite values"),
        (set_value("pos_embed", float("-inf")), "pos_embed holds NaN or infinite values"),
        (lambda t: t.clear(), "missing .* and [0-9]+ more"),
    ],
    ids=["missing", "extra", "renamed", "shape", "broadcastable", "rank", "head", "nan", "inf", "-inf", "empty"],
)
def test_wrong_tensors_are_refused_by_name(folder, change, message):
    edit_weights(folder, change)
    assert_refused(folder, "model.safetensors", message)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 100, 0.25, 0.5, 0.9, -1000, -1])
def test_a_truncated_file_is_refused(folder, length):
    file = folder / "model.safetensors"
    content = file.read_bytes()
    length = int(len(content) * length) if isinstance(length, float) else length % len(content)
    file.write_bytes(content[:length])
    assert_refused(folder, "model.safetensors", "not a complete safetensors file")


def test_a_file_with_something_behind_it_is_refused(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"\0" * 16)
    assert_refused(folder, "model.safetensors", "not a complete safetensors file")


@pytest.mark.parametrize("length", [1, 8, 64, 4096])
def test_random_bytes_are_refused(folder, length):
    values = torch.randint(256, (length,), generator=torch.Generator().manual_seed(length))
    (folder / "model.safetensors").write_bytes(bytes(values.tolist()))
    assert_refused(folder, "model.safetensors", "not a complete safetensors file")


@pytest.mark.parametrize(
    "header",
    [b"{}", b"[]", b"{", b'{"a": 1}', b'{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}', b"\xff\xfe"],
    ids=["no tensors", "list", "half", "number", "beyond the end", "no text"],
)
def test_a_well_framed_but_wrong_header_is_refused(folder, header):
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert_refused(folder, "model.safetensors", "missing|not a complete safetensors file")


class Trap:
    """Unpickling this creates a file."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize("write", [torch.save, lambda content, file: file.write_bytes(pickle.dumps(content))])
def test_a_pickle_under_the_name_of_safetensors_is_refused_and_not_run(folder, tmp_path, write):
    content = {"weights": make_model().state_dict(), "trap": Trap(tmp_path / "sprung")}
    write(content, folder / "model.safetensors")
    assert_refused(folder, "model.safetensors", "not a complete safetensors file")
    assert not (tmp_path / "sprung").exists()


def test_a_pickle_beside_no_safetensors_is_not_looked_at(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    torch.save({"trap": Trap(tmp_path / "sprung")}, folder / "pytorch_model.bin")
    assert_refused(folder, "model.safetensors", "file not found")
    assert not (tmp_path / "sprung").exists()


def test_a_folder_in_place_of_the_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    assert_refused(folder, "model.safetensors", "not a complete safetensors file")


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "not a readable JSON file"),
        (b"{", "not a readable JSON file"),
        (b'{"architecture": "vca_vit_pico_patch4_32"', "not a readable JSON file"),
        (b"architecture: vca", "not a readable JSON file"),
        (b"\xff\xfe\x00", "not a readable JSON file"),
        (b"[" * 100_000, "not a readable JSON file"),
        (b"[]", "must hold a JSON object"),
        (b'["architecture"]', "must hold a JSON object"),
        (b'"text"', "must hold a JSON object"),
        (b"null", "must hold a JSON object"),
        (b"{}", "field architecture is missing"),
    ],
    ids=lambda value: repr(value[:12]) if isinstance(value, bytes) else "",
)
def test_a_config_that_is_no_json_object_is_refused(folder, content, message):
    (folder / "config.json").write_bytes(content)
    assert_refused(folder, "config.json", message)


def put_cfg(key: str, value) -> Callable[[dict], None]:
    return lambda config: config["pretrained_cfg"].__setitem__(key, value)


def put_arg(key: str, value) -> Callable[[dict], None]:
    return lambda config: config["model_args"].__setitem__(key, value)


CONFIG_FAULTS = {
    "unknown field": (put("labels", []), "unknown field labels"),
    "unknown field of the preprocessing": (put_cfg("hf_hub_id", "a/b"), r"unknown field pretrained_cfg\.hf_hub_id"),
    "a file to load": (put_cfg("file", "weights.bin"), r"unknown field pretrained_cfg\.file"),
    "a url to load": (put_cfg("url", "http://localhost/weights.pth"), r"unknown field pretrained_cfg\.url"),
    "no architecture": (remove("architecture"), "field architecture is missing or not of type str"),
    "architecture a list": (put("architecture", [NAME]), "field architecture is missing or not of type str"),
    "unknown architecture": (put("architecture", "vca_vit_giant"), "unknown architecture 'vca_vit_giant'"),
    "foreign architecture": (put("architecture", "resnet18"), "unknown architecture 'resnet18'"),
    "no classes": (remove("num_classes"), "field num_classes is missing or not of type int"),
    "classes a text": (put("num_classes", "3"), "field num_classes is missing or not of type int"),
    "no labels": (remove("label_names"), "field label_names is missing or not of type list"),
    "labels null": (put("label_names", None), "field label_names is missing or not of type list"),
    "a label too few": (put("label_names", LABELS[:2]), "2 label_names for 3 classes"),
    "a label too many": (put("label_names", [*LABELS, "x"]), "4 label_names for 3 classes"),
    "classes without labels": (put("num_classes", 4), "3 label_names for 4 classes"),
    "no preprocessing": (remove("pretrained_cfg"), "field pretrained_cfg is missing or not of type dict"),
    "preprocessing null": (put("pretrained_cfg", None), "field pretrained_cfg is missing or not of type dict"),
    "preprocessing a number": (put("pretrained_cfg", 7), "field pretrained_cfg is missing or not of type dict"),
    "preprocessing a list": (put("pretrained_cfg", [[]]), "field pretrained_cfg is missing or not of type dict"),
    "unknown argument": (put_arg("kernel", 3), f"cannot build {NAME}: .*kernel"),
    "argument given twice": (put_arg("num_classes", 3), f"cannot build {NAME}: .*num_classes"),
    "impossible token grid": (put_arg("token_grid", [9, 9]), f"cannot build {NAME}: token_grid=.* must lie between"),
    "token grid of texts": (put_arg("token_grid", ["3", "5"]), f"cannot build {NAME}"),
    "token grid a number": (put_arg("token_grid", 3), f"cannot build {NAME}"),
    "unknown tokens": (put_arg("tokens", "none"), f"cannot build {NAME}: tokens='none' is unknown"),
    "unknown attention": (put_arg("attention", "none"), f"cannot build {NAME}: attention='none' is unknown"),
    "indivisible heads": (put_arg("num_heads", 5), f"cannot build {NAME}"),
    "no heads": (put_arg("num_heads", 0), f"cannot build {NAME}"),
    "negative width": (put_arg("embed_dim", -16), f"cannot build {NAME}"),
    "depth a text": (put_arg("depth", "deep"), f"cannot build {NAME}"),
    "image smaller than a patch": (put_arg("img_size", 1), f"cannot build {NAME}"),
    "weights from elsewhere": (put_arg("pretrained", True), r"model_args\.pretrained would load weights from"),
    "labels not texts": (put("label_names", ["a", "b", 3]), "label_names must be texts"),
    "training a text": (put("training", "long"), "field training is missing or not of type list"),
    "arguments a list": (put("model_args", ["depth"]), "field model_args is missing or not of type dict"),
    "arguments null": (put("model_args", None), "field model_args is missing or not of type dict"),
}


@pytest.mark.parametrize("change, message", CONFIG_FAULTS.values(), ids=CONFIG_FAULTS.keys())
def test_a_wrong_config_is_refused(folder, change, message):
    edit_config(folder, change)
    assert_refused(folder, "config.json", message)


def test_a_checkpoint_file_named_in_the_arguments_is_refused_and_not_read(folder, tmp_path):
    torch.save({"trap": Trap(tmp_path / "sprung")}, tmp_path / "other.pth")
    edit_config(folder, put_arg("checkpoint_path", str(tmp_path / "other.pth")))
    assert_refused(folder, "config.json", r"model_args\.checkpoint_path would load weights from elsewhere")
    assert not (tmp_path / "sprung").exists()


def test_a_wrong_number_of_classes_is_refused_by_the_weights(folder):
    edit_config(folder, lambda config: config.update(num_classes=4, label_names=[*LABELS, "x"]))
    with pytest.raises(CheckpointError, match=r"head\.bias is \(3,\) instead of \(4,\); head\.weight is") as caught:
        vca.load(folder)
    assert str(folder / "model.safetensors") in str(caught.value)


@pytest.mark.parametrize(
    "change, key",
    [
        (put_arg("token_grid", [3, 4]), r"positive_embed is \(15, 16\) instead of \(12, 16\)"),
        (put_arg("depth", 3), r"missing blocks\.2\."),
        (put_arg("depth", 1), r"unexpected blocks\.1\."),
        (put_arg("dwc", False), r"unexpected blocks\.0\.attn\.dwc\.bias"),
        (put_arg("attention", "mhsa"), r"unexpected blocks\.0\.attn\.dwc\.bias"),
        (remove("model_args"), r"\(15, 16\) instead of \(16, 128\).* and [0-9]+ more"),
    ],
    ids=["token grid", "deeper", "shallower", "no convolution", "other attention", "no arguments"],
)
def test_arguments_that_do_not_fit_the_weights_are_refused(folder, change, key):
    edit_config(folder, change)
    with pytest.raises(CheckpointError, match=key) as caught:
        vca.load(folder)
    assert str(folder / "model.safetensors") in str(caught.value)


def test_missing_files_are_refused_by_name(folder):
    (folder / "config.json").rename(folder / "kept")
    assert_refused(folder, "config.json", "file not found")
    (folder / "kept").rename(folder / "config.json")
    (folder / "model.safetensors").unlink()
    assert_refused(folder, "model.safetensors", "file not found; a checkpoint needs safetensors weights")


def test_a_path_that_is_no_folder_is_refused(folder, tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: no such checkpoint folder"):
        vca.load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        vca.load(folder / "model.safetensors")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert_refused(empty, "config.json", "file not found")


def test_a_failed_load_leaves_no_trace_on_the_next(folder, saved):
    edit_config(folder, put_cfg("mean", [9, 9, 9]))
    edit_weights(folder, remove(KEY))
    with pytest.raises(CheckpointError):
        vca.load(folder)
    assert vca.load(saved).pretrained_cfg["mean"] == [0.5, 0.5, 0.5]
    assert vca.create_model(NAME, **SMALL).pretrained_cfg["mean"] == (0.5, 0.5, 0.5)


def test_loading_does_not_change_the_defaults_of_the_architecture(folder):
    edit_config(folder, put_cfg("mean", [0.1, 0.2, 0.3]))
    assert list(vca.load(folder).pretrained_cfg["mean"]) == [0.1, 0.2, 0.3]
    assert vca.create_model(NAME, **SMALL).pretrained_cfg["mean"] == (0.5, 0.5, 0.5)
