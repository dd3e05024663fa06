"""Checkpoints: what is written comes back bit for bit, and nothing damaged, unknown or incomplete is ever loaded."""

import json
import os
import stat
import threading

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.data import create_transform, resolve_data_config
from timm.utils import ModelEmaV3

import vca
from tests.helpers.checkpoints import (
    KEY,
    LABELS,
    NAME,
    SMALL,
    assert_refused,
    edit_config,
    fresh_process,
    images,
    make_model,
    pair,
)
from tests.helpers.disk import full_at
from vca.checkpoint import sha256, write_atomically

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


def test_saving_leaves_what_it_did_not_write(folder):
    for name in ("README.md", "notes.tmp", ".hidden"):
        (folder / name).write_text("mine")
    vca.save(make_model(), folder, label_names=LABELS)
    assert all((folder / name).read_text() == "mine" for name in ("README.md", "notes.tmp", ".hidden"))
    assert len(os.listdir(folder)) == 5


def test_the_config_states_the_sha256_of_the_weights(folder):
    assert json.loads((folder / "config.json").read_text())["weights_sha256"] == sha256(folder / "model.safetensors")
    vca.save(make_model(), folder.parent / "other", label_names=LABELS)
    (folder / "model.safetensors").write_bytes((folder.parent / "other" / "model.safetensors").read_bytes())
    assert_refused(folder, "model.safetensors", r"its sha256 is .*config\.json says", load_weights_too=False)


def test_a_config_that_was_changed_is_refused_until_its_checksum_is_removed(folder):
    file = folder / "config.json"
    changed = json.loads(file.read_text()) | dict(label_names=["other", "names", "here"])
    file.write_text(json.dumps(changed))
    assert_refused(folder, "config.json", "changed since it was saved, or is damaged.* remove its field config_sha256")
    file.write_text(json.dumps({key: value for key, value in changed.items() if key != "config_sha256"}, indent=7))
    assert vca.load(folder).label_names == ["other", "names", "here"]


def test_a_checkpoint_without_checksums_loads(folder):
    before = vca.load(folder)
    edit_config(folder, lambda config: config.pop("weights_sha256"))
    with torch.no_grad():
        assert torch.equal(vca.load(folder)(images()), before(images()))


WRAPPERS = {
    "compile": torch.compile,
    "data parallel": torch.nn.DataParallel,
    "average": ModelEmaV3,
    "average of compiled": lambda model: ModelEmaV3(torch.compile(model)),
    "compiled part": lambda model: model.blocks.__setitem__(0, torch.compile(model.blocks[0])) or model,
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_a_wrapped_model_is_saved_as_the_model(tmp_path, wrap):
    model = make_model()
    with torch.no_grad():
        expected = model(images())
    vca.save(wrap(model), tmp_path, label_names=LABELS)
    with torch.no_grad():
        assert torch.equal(vca.load(tmp_path)(images()), expected)


def test_what_is_no_model_of_ours_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match=r"only models of vca\.create_model"):
        vca.save(torch.nn.Linear(3, 3), tmp_path / "new", label_names=LABELS)
    assert not (tmp_path / "new").exists()


# --- one thing -------------------------------------------------------------------------------------------------------

SAVE_AND_DIE = """
import os, sys
import vca.checkpoint as checkpoint
from tests.helpers.checkpoints import pair
steps = iter(range(int(sys.argv[2]) + 1))
def dying(function):
    def call(*args):
        if next(steps) == int(sys.argv[2]):
            os.kill(os.getpid(), 9)
        return function(*args)
    return call
checkpoint.write_atomically, os.replace = dying(checkpoint.write_atomically), dying(os.replace)
checkpoint.save(*pair(2)[:1], sys.argv[1], label_names=pair(2)[1])
"""


@pytest.mark.parametrize("step, expected", [(0, 1), (1, 1), (2, 1), (3, 1), (4, 2)])
def test_a_save_killed_at_any_step_leaves_the_old_or_the_new(tmp_path, step, expected):
    """Steps: writing and renaming the new weights, writing and renaming the config, renaming the weights again."""
    vca.save(pair(1)[0], tmp_path, label_names=pair(1)[1])
    assert fresh_process(SAVE_AND_DIE, tmp_path, step).returncode == -9
    assert number_of(vca.load(tmp_path)) == expected
    vca.save(pair(1)[0], tmp_path, label_names=pair(1)[1])
    assert number_of(vca.load(tmp_path)) == 1
    left = [file for file in os.listdir(tmp_path) if not file.endswith(".tmp")]
    assert sorted(left) == ["config.json", "model.safetensors"]


def number_of(model) -> int:
    """Which of `pair` a loaded model is; its weights and its labels must say the same."""
    number = int(model.head.bias[0].item())
    assert model.label_names == pair(number)[1]
    return number


def test_loads_beside_writers_give_one_of_the_saves(tmp_path):
    vca.save(pair(1)[0], tmp_path, label_names=pair(1)[1])
    done = threading.Event()

    def write(number: int) -> None:
        model, labels = pair(number)
        while not done.is_set():
            vca.save(model, tmp_path, label_names=labels)

    writers = [threading.Thread(target=write, args=(number,)) for number in (1, 2)]
    for writer in writers:
        writer.start()
    try:
        seen = {number_of(vca.load(tmp_path)) for _ in range(40)}
    finally:
        done.set()
        for writer in writers:
            writer.join(60)
    assert seen <= {1, 2}
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


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


# --- wrong configs ---------------------------------------------------------------------------------------------------


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
