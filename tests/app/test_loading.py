"""Any checkpoint: what opens, what it then is, and what is refused in one sentence."""

import json
import shutil
import zipfile
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

import vca
from app.runtime import checkpoints, loading
from app.runtime.store import Store
from tests.helpers.app import LABELS, PLAIN, PREFIXED, TIMM, save_checkpoints, save_timm


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    save_checkpoints(folder)
    torch.manual_seed(3)
    for name in TIMM:
        save_timm(folder / name, name)
    return folder


def logits(model: torch.nn.Module) -> torch.Tensor:
    torch.manual_seed(1)
    with torch.inference_mode():
        return model(torch.randn(2, *timm.data.resolve_data_config(model=model)["input_size"]))


def copy(source: Path, target: Path, **config) -> Path:
    """A copy of a checkpoint with fields of its config.json replaced."""
    shutil.copytree(source, target)
    stored = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(stored | config))
    return target


# ---- What opens


@pytest.mark.parametrize("name", TIMM)
def test_every_parameter_of_a_timm_model_comes_from_the_file(weights, name):
    model = loading.open_model(str(weights / name))
    stored = load_file(weights / name / "model.safetensors")
    assert model.state_dict().keys() == stored.keys()
    for key, value in model.state_dict().items():
        assert torch.equal(value, stored[key]), key
    torch.manual_seed(5)
    trusted = timm.create_model(f"local-dir:{weights / name}", pretrained=True).eval()
    assert torch.equal(logits(model), logits(trusted))
    assert not model.training
    assert model.label_names == [f"class {i}" for i in range(5)]
    kinds = {"vit": "mhsa", "deit": "mhsa", "swin": "window"}
    x = torch.randn(1, 3, 32, 32)
    with vca.record(model) as maps, torch.inference_mode():
        model(x)
    assert {m.kind for m in maps} == {kinds[name]}
    assert len(maps) == (4 if name == "swin" else 2)


@pytest.mark.parametrize("name", [PLAIN, PREFIXED])
def test_ours_opens_as_vca_load_does(weights, name):
    model = loading.open_model(str(weights / name))
    assert torch.equal(logits(model), logits(vca.load(weights / name)))
    assert model.label_names == LABELS


def test_by_hub_id(hub, weights):
    for name in (PLAIN, "vit"):
        files = {f.name: f.read_bytes() for f in (weights / name).iterdir()}
        hub.put(f"owner/{name}", files)
        for reference in (f"owner/{name}", f"hf-hub:owner/{name}", f"hf-hub:owner/{name}@main"):
            model = loading.open_model(reference)
            assert torch.equal(logits(model), logits(loading.open_model(str(weights / name))))


def test_nobody_borrows_the_servers_token(hub, weights, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_owner")
    hub.put("owner/secret", {f.name: f.read_bytes() for f in (weights / PLAIN).iterdir()}, private=True)
    vca.load("owner/secret")
    with pytest.raises(vca.CheckpointError, match="may be read"):
        loading.open_model("owner/other-secret")
    hub.put("owner/secret2", {f.name: f.read_bytes() for f in (weights / PLAIN).iterdir()}, private=True)
    with pytest.raises(vca.CheckpointError, match="may be read"):
        loading.open_model("owner/secret2")


def test_older_names_are_converted_as_timm_does(weights, tmp_path):
    """Swin's first files had its buffers among the weights, and the downsampling at the end of a stage."""
    folder = copy(weights / "swin", tmp_path / "old")
    stored = load_file(folder / "model.safetensors")
    old = {
        k.replace("layers.1.downsample", "layers.0.downsample").replace("head.fc.", "head."): v
        for k, v in stored.items()
    }
    old["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(16, 16)
    save_file(old, folder / "model.safetensors")
    assert torch.equal(logits(loading.open_model(str(folder))), logits(loading.open_model(str(weights / "swin"))))


def test_names_of_classes(weights, tmp_path):
    def labels(**config):
        model = timm.create_model("vit_tiny_patch16_224", num_classes=config.get("count", 5), depth=1)
        model.pretrained_cfg |= config
        return loading._label_names(model)

    assert labels(label_names=list("abcde")) == list("abcde")
    described = dict(label_names=list("abcde"), label_descriptions={"a": "an ant, insect", "b": "bat", "c": "bat"})
    assert labels(**described) == ["an ant", "bat (b)", "bat (c)", "d", "e"]
    imagenet = labels(count=1000)
    assert imagenet[:3] == ["tench", "goldfish", "great white shark"]
    assert len(set(imagenet)) == 1000 and "crane (n02012849)" in imagenet


@pytest.mark.parametrize("inside", ["", "folder/", "a/b/"])
def test_a_zip_file(weights, tmp_path, inside):
    with zipfile.ZipFile(tmp_path / "mine.zip", "w") as archive:
        for file in (weights / "vit").iterdir():
            archive.write(file, inside + file.name)
        archive.writestr("__MACOSX/._config.json", b"not this one")
        archive.writestr("../config.txt", b"nor this one")
    name, model = loading.open_upload([tmp_path / "mine.zip"])
    assert name == "mine"
    assert torch.equal(logits(model), logits(loading.open_model(str(weights / "vit"))))


def test_two_files(weights):
    name, model = loading.open_upload([weights / "deit" / f for f in ("model.safetensors", "config.json")])
    assert name == "deit_tiny_distilled_patch16_224"
    assert torch.equal(logits(model), logits(loading.open_model(str(weights / "deit"))))


def test_card(weights, tmp_path):
    shipped = Path(__file__).parents[2] / "weights" / "vca_vit_pico_patch4_32_cifar10"
    assert loading.open_folder(shipped, "it").card == loading.Card("CIFAR-10", 86.89, 1_996_800)
    folder = copy(weights / "vit", tmp_path / "vit")
    (folder / "README.md").write_text("---\ndatasets:\n- imagenet-1k\n- imagenet-21k\n---\n")
    assert loading.open_model(str(folder)).card == loading.Card("imagenet-1k, imagenet-21k", None)
    for damaged in ("---\n: [\n---\n", "---\nmodel-index: 3\n---", "\xff", ""):
        (folder / "README.md").write_text(damaged, encoding="latin-1")
        assert loading.open_model(str(folder)).card == loading.Card()


TRANSFER = dict(steps=9, recipe=dict(batch_size=9), results=dict(error=0.1))
A, B = (dict(steps=steps, recipe=dict(batch_size=10)) for steps in (1, 2))


@pytest.mark.parametrize(
    "history, images",
    [
        ([dict(steps=10, recipe=dict(batch_size=32)), dict(steps=5, recipe=dict(batch_size=64), results={})], 640),
        ([TRANSFER, dict(steps=2, recipe=dict(batch_size=4))], 8),
        ([dict(steps=10, recipe=dict(batch_size=32)), dict(steps=5)], None),
        ([dict(steps=10.5, recipe=dict(batch_size=32))], None),
        ([dict(steps=True, recipe=dict(batch_size=-3))], None),
        ([dict(steps=10**99, recipe=dict(batch_size=1))], None),
        ([A, dict(averaged=[[B], [A], [B], []])], 40),
        ([A, dict(averaged=[3, [4]])], None),
        (["", 3, None], None),
        ([], None),
    ],
)
def test_images_seen_are_counted_over_all_runs_with_labels(tmp_path, history, images):
    assert loading.read_card(tmp_path, history).images_seen == images


# ---- What is refused


def remove(key):
    return lambda tensors: tensors.pop(key)


DAMAGED = {
    "missing": (remove("head.bias"), "head.bias"),
    "misshapen": (lambda t: t.update({"head.bias": torch.zeros(6)}), "head.bias"),
    "left over": (lambda t: t.update(extra=torch.zeros(1)), "extra"),
    "not finite": (lambda t: t["head.bias"].fill_(torch.nan), "NaN"),
    "another grid": (lambda t: t.update(pos_embed=torch.zeros(1, 17, 24)), "pos_embed"),
    "of another model": (lambda t: (t.clear(), t.update(conv1=torch.zeros(99999))), "missing"),
    "empty": (lambda t: t.clear(), "holds 0 values"),
}
CONFIGS = {
    "another family": (dict(architecture="vgg11"), "ViT, DeiT and Swin"),
    "a relative": (dict(architecture="vit_relpos_small_patch16_224"), "ViT, DeiT and Swin"),
    "unknown": (dict(architecture="vit_enormous"), "not known"),
    "no architecture": (dict(architecture=None), "names no architecture"),
    "a generator": (dict(architecture="vca_dit_s_2", label_names=["a"], num_classes=1, training=[]), "generator"),
    "weights from elsewhere": (dict(model_args=dict(checkpoint_path="/etc/passwd")), "from elsewhere"),
    "another source": (dict(model_args=dict(pretrained_cfg=dict(url="http://x"))), "from elsewhere"),
    "unknown argument": (dict(model_args=dict(color="red")), "cannot build vit_tiny_patch16_224"),
    "too deep": (dict(model_args=dict(depth=10**7)), "model_args.depth is larger than 4096"),
    "too large": (dict(model_args=dict(embed_dim=4096, depth=64, num_heads=8)), "the limit is 2.0 GB"),
    "maps too large": (dict(model_args=TIMM["vit"][1] | dict(img_size=1024)), "values, but the model has"),
    "no classes": (dict(num_classes=0), "no classes"),
    "grey": (dict(model_args=TIMM["vit"][1] | dict(in_chans=1)), "1 channels"),
    "model_args": (dict(model_args=[1]), "must be an object"),
    "a large input": (dict(model_args=TIMM["vit"][1] | dict(img_size=2048)), "2048x2048 px, the limit is 1024"),
    "many blocks": (dict(model_args=dict(depth=513)), "model_args.depth asks for more than 512 blocks"),
    "many blocks of a CNN": (dict(architecture="resnet18", model_args=dict(layers=[512, 1])), "more than 512 blocks"),
    "a long list": (dict(model_args=dict(x=[0] * 257)), "model_args.x holds more than 256 values"),
    "one label": (dict(label_names=["a"]), "1 label_names for 5 classes"),
    "labels a text": (dict(label_names="abcde"), "label_names must be a list"),
    "labels numbers": (dict(label_names=[1, 2, 3, 4, 5]), "label_names must be texts"),
    "a long label": (dict(label_names=["x" * 301, *"bcde"]), "from 1 to 300 characters"),
}
PREPROCESSING = [
    dict(crop_pct="a"), dict(crop_pct=-1), dict(crop_pct=float("nan")), dict(crop_pct=100), dict(crop_pct=0.002),
    dict(crop_pct=True), dict(interpolation="foo"), dict(interpolation=3), dict(interpolation="random"),
    dict(interpolation=[]), dict(mean=[0.5, 0.5]), dict(mean="abc"), dict(mean=None), dict(mean=[float("nan")] * 3),
    dict(std=[0, 0, 0]), dict(std=[1e-300] * 3), dict(std=[float("inf")] * 3), dict(std=[True] * 3),
    dict(crop_mode="x"), dict(input_size=[3, 32]), dict(input_size=[3, 32, "32"]), dict(input_size=[3, 10**6, 10**6]),
    dict(input_size=[3, 32.0, 32.0]),
]  # fmt: skip


@pytest.mark.parametrize(
    "name, fields",
    [(PLAIN, fields) for fields in PREPROCESSING]
    + [("vit", fields) for fields in PREPROCESSING if "input_size" not in fields],  # timm replaces that one
    ids=str,
)
def test_a_preprocessing_that_cannot_work_is_refused_by_its_field(weights, tmp_path, name, fields):
    """By the app in either format, and by `vca.load`."""
    config = json.loads((weights / name / "config.json").read_text())
    config.pop("config_sha256", None)
    shutil.copytree(weights / name, tmp_path / name)
    (tmp_path / name / "config.json").write_text(
        json.dumps(config | dict(pretrained_cfg=config["pretrained_cfg"] | fields))
    )
    refuse(str(tmp_path / name), next(iter(fields)))
    if name == PLAIN:
        with pytest.raises(vca.CheckpointError, match=rf"pretrained_cfg\.{next(iter(fields))} = .* must be"):
            vca.load(tmp_path / name)


def test_tables_beside_the_weights_count(tmp_path, monkeypatch):
    """Window attention computes tables that no file holds: here 16 MB for 9 kB of weights."""
    arguments = dict(img_size=32, embed_dim=8, depths=(2,), num_heads=(1,), num_classes=4, patch_size=1, window_size=32)
    model = timm.create_model("swin_tiny_patch4_window7_224", **arguments)
    save_for_hf(model, tmp_path / "swin", model_args=arguments, safe_serialization=True)
    assert loading.bytes_of(loading.open_model(str(tmp_path / "swin"))) > 16_000_000
    monkeypatch.setattr(loading, "TABLE_BYTES", 10_000_000)
    refuse(str(tmp_path / "swin"), "16 MB beside its weights")


def test_integers_are_no_weights(weights, tmp_path):
    folder = copy(weights / "vit", tmp_path / "vit")
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"head.bias": tensors["head.bias"].int()}, folder / "model.safetensors")
    refuse(str(folder), "head.bias is stored as torch.int32 instead of torch.float32")


CARDS = {
    "aliases": "a: &a [x, x]\nb: &b [*a, *a]\ndatasets: [*b, *b]",
    "long": "datasets:\n" + "- x\n" * 100_000,
    "deep": "datasets: " + "[" * 5000 + "]" * 5000,
    "numbers": "datasets: [1, 2]",
    "no end": "datasets: x\n" * 10,
}  # fmt: skip


@pytest.mark.parametrize("name", CARDS)
def test_a_card_that_takes_long_says_nothing(weights, tmp_path, name):
    folder = copy(weights / "vit", tmp_path / "vit")
    (folder / "README.md").write_text(f"---\n{CARDS[name]}" + ("" if name == "no end" else "\n---\n"))
    assert loading.read_card(folder, []) == loading.Card()


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_weights(weights, tmp_path, name):
    damage, words = DAMAGED[name]
    folder = copy(weights / "vit", tmp_path / "vit")
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "model.safetensors")
    refuse(str(folder), words)


@pytest.mark.parametrize("name", CONFIGS)
def test_configs(weights, tmp_path, name):
    config, words = CONFIGS[name]
    stored = json.loads((weights / "vit" / "config.json").read_text())
    if config.get("num_classes") == 0:
        config = config | dict(model_args=stored["model_args"] | dict(num_classes=0))
    refuse(str(copy(weights / "vit", tmp_path / "vit", **config)), words)


def refuse(reference: str, words: str) -> None:
    with pytest.raises(vca.CheckpointError) as caught:
        loading.open_model(reference)
    message = str(caught.value)
    assert words in message and "\n" not in message and "Traceback" not in message and len(message) < 500, message


def test_maps_that_no_server_should_hold(tmp_path):
    """A model whose file is small and whose maps are not."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=1024, patch_size=8, embed_dim=12, depth=1, num_heads=3)
    arguments = dict(img_size=1024, patch_size=8, embed_dim=12, depth=1, num_heads=3)
    save_for_hf(model, tmp_path / "vit", model_args=arguments, safe_serialization=True)
    refuse(str(tmp_path / "vit"), "its maps take 3.0 GB, the limit is 512 MB")


@pytest.mark.parametrize(
    "reference, words",
    [
        ("", "no such checkpoint folder"),
        ("no such thing/at all", "no such checkpoint folder"),
        ("owner/nothing-there", "no repository on the Hub"),
        ("hf-hub:owner/../..", "no such checkpoint folder"),
        ("/etc", "file not found"),
    ],
)
def test_references(hub, reference, words):
    refuse(reference, words)


def test_a_repository_of_pickles(hub):
    hub.put("owner/pickled", {"config.json": b"{}", "pytorch_model.bin": b"\x80"})
    refuse("owner/pickled", "is a pickle")


def test_too_large_to_download(hub, weights, monkeypatch):
    hub.put("owner/large", {f.name: f.read_bytes() for f in (weights / PLAIN).iterdir()})
    monkeypatch.setattr(loading, "MODEL_BYTES", 1000)
    refuse("owner/large", "the limit is")
    assert not any(r.startswith("GET") and "model.safetensors" in r for r in hub.requests)


def test_folders_of_a_public_server(weights, monkeypatch):
    monkeypatch.setenv("SPACE_ID", "owner/space")
    refuse(str(weights / PLAIN), "this page does not load it")


def test_uploads_that_are_none(weights, tmp_path):
    bad, two, bomb, table, text = (tmp_path / f"{name}.zip" for name in ("bad", "two", "bomb", "table", "text"))
    bad.write_bytes(b"PK not a zip")
    with zipfile.ZipFile(two, "w") as archive:
        for folder in "ab":
            archive.writestr(f"{folder}/config.json", "{}")
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("config.json", "{}")
        with archive.open("model.safetensors", "w", force_zip64=True) as stream:
            for _ in range(8):
                stream.write(bytes(2**25))
            stream.write(b"one more")
    with zipfile.ZipFile(table, "w") as archive:
        for number in range(1001):
            archive.writestr(f"{number}", "")
    with zipfile.ZipFile(text, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model.safetensors", "")
        archive.writestr("config.json", "[" + "{}," * 400_000 + "{}]")
    for files, words in (
        ([bad], "not a zip file"),
        ([two], "holds 2 checkpoints"),
        ([bomb], "unpacked, model.safetensors is larger than 256 MB"),
        ([table], "more than 1000 files"),
        ([text], "unpacked, config.json is larger than 1 MB"),
        ([weights / "vit" / "config.json"], "no model.safetensors"),
        ([weights / "vit" / "model.safetensors"], "no config.json"),
    ):
        with pytest.raises(vca.CheckpointError, match=words) as caught:
            loading.open_upload(files)
        assert str(tmp_path) not in str(caught.value)


# ---- How long they are kept


def test_the_cache_is_bounded_and_forgets_the_longest_unused():
    made = []

    def model(name):
        made.append(name)
        return torch.nn.Linear(10, 10, bias=False)  # 400 bytes

    cache = Store(1000, loading.bytes_of)
    for name in "abacab":
        cache.get_or_make(name, lambda name=name: model(name))
        assert cache.size() <= 1000
    assert made == ["a", "b", "c", "b"]


def test_an_upload_is_found_by_its_token_alone(weights):
    served = checkpoints.Checkpoints(weights, limit=2_000_000)
    mine = loading.open_model(str(weights / "vit"))
    token = served.keep(mine)
    assert served.load(token) is mine
    for other in ("upload:/", token[:-1], token + "x"):
        with pytest.raises(Exception, match="no longer kept"):
            served.load(other)
