"""Checkpoints: what is written comes back bit for bit, and nothing damaged, unknown or incomplete is ever loaded."""

import json
import os
import pickle
import shutil
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.data import create_transform, resolve_data_config

import vca
from tests.disk import full_at
from training.card import STATED
from vca import CheckpointError
from vca.checkpoint import load_weights, sha256, write_atomically

NAME = "vca_vit_pico_patch4_32"
SMALL = dict(embed_dim=16, depth=2, num_heads=2, num_classes=3, token_grid=(3, 5))
LABELS = ["cat", "dog", "größe, with a comma"]


def make_model(name=NAME, **overrides):
    """A model whose every parameter differs from what creating it again would give."""
    model = vca.create_model(name, **(SMALL | overrides)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def images(size=32):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "checkpoint"
    vca.save(make_model(), folder, label_names=LABELS)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A checkpoint of one's own to damage."""
    return Path(shutil.copytree(saved, tmp_path / "checkpoint"))


def edit_config(folder: Path, change: Callable[[dict], None]) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    change(config)
    file.write_text(json.dumps(config), encoding="utf-8")


def edit_weights(folder: Path, change: Callable[[dict], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def put(key: str, value) -> Callable[[dict], None]:
    return lambda config: config.__setitem__(key, value)


def remove(key: str) -> Callable[[dict], None]:
    return lambda config: config.pop(key)


def assert_refused(folder: Path, file: str, message: str, load_weights_too: bool = True) -> None:
    """`vca.load` names the file in full and says what is wrong; so does `load_weights`, if the weights are at fault."""
    with pytest.raises(CheckpointError, match=message) as caught:
        vca.load(folder)
    assert str(folder / file) in str(caught.value)
    if file == "model.safetensors" and load_weights_too:
        model = make_model()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(CheckpointError, match=message):
            load_weights(model, folder / file)
        after = model.state_dict()
        assert all(torch.equal(after[key], before[key]) for key in before), "a failed load has changed the model"


# --- round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, overrides",
    [
        (NAME, dict()),
        (NAME, dict(tokens="emb", dwc=False)),
        (NAME, dict(tokens="pool", stage2_softmax="joint", qkv_bias=False)),
        (NAME, dict(class_token=True, global_pool="token", reg_tokens=2)),
        (NAME, dict(attention="mhsa")),
        (NAME, dict(img_size=(24, 40))),
        (NAME, dict(in_chans=1)),
        (NAME, dict(drop_path_rate=0.1, proj_drop_rate=0.1)),
        ("mhsa_vit_pico_patch8_64", dict(qk_norm=True)),
    ],
    ids=lambda value: "-".join(map(str, value)) or "plain" if isinstance(value, dict) else value,
)
def test_round_trip_bit_for_bit(name, overrides, tmp_path):
    arguments = SMALL | overrides
    if name.startswith("mhsa"):
        del arguments["token_grid"]
        model = vca.create_model(name, **arguments).eval()
    else:
        model = make_model(name, **overrides)
    vca.save(model, tmp_path / "a" / "b", label_names=LABELS)
    assert sorted(os.listdir(tmp_path / "a" / "b")) == ["config.json", "model.safetensors"]

    other = vca.load(tmp_path / "a" / "b")
    assert not other.training
    assert other.label_names == LABELS
    assert other.num_classes == 3
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours)
    x = torch.randn(2, *model.pretrained_cfg["input_size"])
    with torch.no_grad():
        assert torch.equal(other(x), model(x))

    vca.save(other, tmp_path / "again", label_names=LABELS)
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "a" / "b" / file).read_bytes()


def test_load_accepts_a_string_and_a_device(saved):
    model = vca.load(str(saved), device="cpu")
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_config_says_how_to_build_the_model(saved):
    config = json.loads((saved / "config.json").read_text(encoding="utf-8"))
    assert config["architecture"] == NAME
    assert config["num_classes"] == config["pretrained_cfg"]["num_classes"] == 3
    assert config["label_names"] == LABELS
    assert config["pretrained_cfg"]["custom_load"] is False
    assert config["model_args"] == dict(embed_dim=16, depth=2, num_heads=2, token_grid=[3, 5])
    assert vca.load(saved).blocks[1].attn.token_grid == (3, 5)


def test_weights_are_safetensors_alone(saved):
    assert sorted(os.listdir(saved)) == ["config.json", "model.safetensors"]
    assert set(load_file(saved / "model.safetensors")) == set(make_model().state_dict())


def test_half_precision_storage(tmp_path):
    model = make_model()
    vca.save(model, tmp_path, label_names=LABELS, dtype=torch.float16)
    stored = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}, "saving has changed the model"
    other = vca.load(tmp_path)
    assert {p.dtype for p in other.parameters()} == {torch.float32}
    for key, value in other.state_dict().items():
        assert torch.equal(value, model.state_dict()[key].half().float()), key
    with torch.no_grad():
        torch.testing.assert_close(other(images()), model(images()), rtol=2e-2, atol=2e-2)


def test_training_history_comes_back(tmp_path):
    history = [dict(recipe="first", results={"top1": 71.5}), dict(recipe="second")]
    vca.save(make_model(), tmp_path, label_names=LABELS, training=history)
    assert vca.load(tmp_path).training_history == history
    vca.save(make_model(), tmp_path, label_names=LABELS)
    assert vca.load(tmp_path).training_history == []


def test_preprocessing_comes_back(tmp_path):
    model = make_model()
    model.pretrained_cfg.update(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), interpolation="bilinear", crop_pct=0.9)
    vca.save(model, tmp_path, label_names=LABELS)
    want = resolve_data_config(model=model)
    for other in (vca.load(tmp_path), timm.create_model(f"local-dir:{tmp_path}", pretrained=True)):
        data = resolve_data_config(model=other)
        assert data["interpolation"] == "bilinear" and data["crop_pct"] == 0.9
        for key in ("mean", "std", "input_size"):
            assert tuple(data[key]) == want[key]
        assert create_transform(**data) is not None


@pytest.mark.parametrize("dtype", [None, torch.float16], ids=["float32", "float16"])
def test_timm_loads_the_same_folder(tmp_path, dtype):
    model = make_model(class_token=True, global_pool="token", stage2_softmax="joint")
    vca.save(model, tmp_path, label_names=LABELS, dtype=dtype)
    ours = vca.load(tmp_path)
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert type(theirs) is type(ours)
    assert theirs.num_classes == 3
    with torch.no_grad():
        assert torch.equal(theirs(images()), ours(images()))


def test_saving_twice_replaces_the_first(folder):
    model = make_model()
    vca.save(model, folder, label_names=LABELS)
    with torch.no_grad():
        assert torch.equal(vca.load(folder)(images()), model(images()))


def test_a_card_that_states_other_weights_does_not_outlive_them(folder):
    card = folder / "README.md"
    card.write_text(STATED.format(size=1, sha256=sha256(folder / "model.safetensors")))
    model = vca.load(folder)
    vca.save(model, folder, label_names=LABELS)
    assert card.exists(), "the weights are still those of the card"
    vca.save(make_model(), folder, label_names=LABELS)
    assert not card.exists()
    card.write_text("a card that states nothing")
    vca.save(make_model(), folder, label_names=LABELS)
    assert card.exists()
    assert vca.load(folder).label_names == LABELS


def test_other_weights_than_those_of_the_card_are_refused(folder):
    (folder / "README.md").write_text(STATED.format(size=12345678, sha256="a" * 64))
    assert_refused(folder, "model.safetensors", r"its sha256 is .*README\.md says aaaa", load_weights_too=False)


def test_the_wrong_number_of_labels_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="2 label names for a model with 3 classes"):
        vca.save(make_model(), tmp_path / "new", label_names=LABELS[:2])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("value, dtype", [(float("nan"), None), (float("-inf"), None), (1e5, torch.float16)], ids=str)
def test_weights_that_could_not_be_loaded_are_not_saved(folder, value, dtype):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    model = make_model()
    with torch.no_grad():
        model.blocks[1].attn.stage2.lambda_k1[3] = value
    with pytest.raises(ValueError, match=f"{KEY} holds NaN or infinite values"):
        vca.save(model, folder, label_names=LABELS, dtype=dtype)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.parametrize("overrides", [dict(), dict(token_grid=None), dict(attention="mhsa")], ids=str)
def test_a_model_with_a_new_input_size_is_saved(tmp_path, overrides):
    model = make_model(**overrides)
    model.set_input_size(img_size=(40, 48))
    vca.save(model, tmp_path, label_names=LABELS)
    x = torch.randn(2, 3, 40, 48)
    for other in (vca.load(tmp_path), timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()):
        assert tuple(other.pretrained_cfg["input_size"]) == (3, 40, 48)
        with torch.no_grad():
            assert torch.equal(other(x), model(x))


def test_rates_of_training_are_no_part_of_a_checkpoint(tmp_path):
    rates = dict(drop_rate=0.1, drop_path_rate=0.2, proj_drop_rate=0.3, pos_drop_rate=0.1)
    vca.save(make_model(**rates), tmp_path, label_names=LABELS)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config["model_args"] == dict(embed_dim=16, depth=2, num_heads=2, token_grid=[3, 5])


def test_arguments_that_json_cannot_hold_are_not_saved(folder):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(TypeError, match="not JSON serializable"):
        vca.save(make_model(norm_layer=torch.nn.LayerNorm), folder, label_names=LABELS)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_new_head_is_saved(tmp_path):
    model = make_model()
    model.reset_classifier(2)
    vca.save(model, tmp_path, label_names=LABELS[:2])
    with torch.no_grad():
        assert torch.equal(vca.load(tmp_path)(images()), model(images()))


# --- damaged weights -------------------------------------------------------------------------------------------------

KEY = "blocks.1.attn.stage2.lambda_k1"


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


# --- wrong configs ---------------------------------------------------------------------------------------------------


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


# --- writing ---------------------------------------------------------------------------------------------------------


def test_write_atomically_replaces_the_file(tmp_path):
    file = tmp_path / "file"
    write_atomically(file, b"old")
    write_atomically(file, b"new")
    assert file.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]


def test_a_failure_during_the_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"old")
    with pytest.raises(OSError), full_at(1024):
        write_atomically(file, b"new" * 1000)
    assert file.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_failed_save_leaves_the_old_checkpoint(folder):
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(OSError), full_at(1024):
        vca.save(make_model(), folder, label_names=LABELS)
    assert (folder / "model.safetensors").read_bytes() == before
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    assert vca.load(folder).label_names == LABELS


def test_a_failure_before_and_at_the_renaming_leaves_no_temporary_file(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"old")
    with pytest.raises(TypeError):
        write_atomically(file, "text is not bytes")
    assert file.read_bytes() == b"old"
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        write_atomically(tmp_path / "folder", b"new")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "nowhere" / "file", b"new")


def test_readers_never_see_a_part(tmp_path):
    file, wrong, done = tmp_path / "file", [], threading.Event()
    write_atomically(file, b"a" * 100_000)

    def read():
        while not done.is_set():
            content = file.read_bytes()
            if len(content) != 100_000 or len(set(content)) != 1:
                wrong.append(len(content))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for letter in b"bcdefgh" * 3:
            write_atomically(file, bytes([letter]) * 100_000)
    finally:
        done.set()
        reader.join(60)
    assert wrong == []


def test_saved_files_can_be_read_by_others(saved):
    for file in saved.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) & 0o444 == 0o444 & ~current_umask()


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
