"""Checkpoints that timm writes and vca reads, and the other way round."""

import json

import pytest
import timm
import torch
from timm.models import save_for_hf

import vca
from tests.helpers.classifiers import SMALL, images
from tests.helpers.kinds import randomized
from vca import CheckpointError

NAMES = ["vca_deit_tiny_patch16_224", "pvt_tiny", "vca_pvt_tiny", "vca_swin_tiny", "vca_cswin_tiny"]


def made_by_timm(name: str, folder, **more):
    model = randomized(timm.create_model(name, num_classes=4, **SMALL[name])).eval()
    save_for_hf(model, folder, safe_serialization=True, **more)
    return model


def edit(folder, change) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


@pytest.mark.parametrize("name", NAMES)
def test_timm_writes_we_read_we_write_timm_reads(name, tmp_path):
    model = made_by_timm(name, tmp_path / "timm")
    assert {"num_classes", "in_chans"} <= set(json.loads((tmp_path / "timm" / "config.json").read_text())["model_args"])
    x = images(model)
    ours = vca.load(tmp_path / "timm")
    assert ours.label_names == ["0", "1", "2", "3"] and ours.training_history == []
    vca.save(ours, tmp_path / "vca", label_names=["a", "b", "c", "d"])
    theirs = timm.create_model(f"local-dir:{tmp_path / 'vca'}", pretrained=True).eval()
    save_for_hf(theirs, tmp_path / "again", model_config=dict(label_names=ours.label_names), safe_serialization=True)
    again = vca.load(tmp_path / "again")
    with torch.no_grad():
        want = model(x)
        assert all(torch.equal(other(x), want) for other in (ours, theirs, again))
    vca.save(theirs, tmp_path / "ours", label_names=["a", "b", "c", "d"])
    assert vca.load(tmp_path / "ours").label_names == ["a", "b", "c", "d"]


@pytest.mark.parametrize("name", [*NAMES, "vca_vit_pico_patch4_32"])
def test_another_image_size_survives_timms_checkpoints(name, tmp_path):
    small = SMALL.get(name, dict(embed_dim=16, depth=3, num_heads=2))
    model = randomized(timm.create_model(name, num_classes=4, **small)).eval()
    model.set_input_size(img_size=128)
    save_for_hf(model, tmp_path, safe_serialization=True)
    for other in (vca.load(tmp_path), timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()):
        with torch.no_grad():
            assert torch.equal(other(images(model)), model(images(model)))


@pytest.mark.parametrize("name", [*NAMES, "vca_vit_pico_patch4_32"])
def test_pretrained_weights_are_resampled_to_another_image_size(name, tmp_path):
    small = SMALL.get(name, dict(embed_dim=16, depth=3, num_heads=2))
    model = randomized(vca.create_model(name, num_classes=4, **small)).eval()
    vca.save(model, tmp_path, label_names=["a", "b", "c", "d"])
    larger = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=128).eval()
    model.set_input_size(img_size=128)
    x = images(model)
    with torch.no_grad():
        torch.testing.assert_close(larger(x), model(x))
    vca.save(larger, tmp_path / "larger", label_names=["a", "b", "c", "d"])
    assert torch.equal(vca.load(tmp_path / "larger")(x), larger(x))
    features = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=128, features_only=True)
    assert all(feature.isfinite().all() for feature in features(x))


def test_names_of_classes_as_timm_writes_them(tmp_path):
    for index, (fields, want) in enumerate(
        [
            (dict(label_names=["n1", "n2", "n3", "n4"]), ["n1", "n2", "n3", "n4"]),
            (
                dict(label_names=["n1", "n2", "n3", "n4"], label_descriptions=dict(n1="cat", n3="dog")),
                ["cat", "n2", "dog", "n4"],
            ),
            (dict(label_names={0: "cat", 2: "dog"}), ["cat", "1", "dog", "3"]),
        ]
    ):
        made_by_timm("pvt_tiny", tmp_path / str(index), model_config=fields)
        assert vca.load(tmp_path / str(index)).label_names == want


def test_harmless_notes_pass_and_sources_of_weights_do_not(tmp_path):
    made_by_timm("pvt_tiny", tmp_path)
    edit(tmp_path, lambda c: c["pretrained_cfg"].update(tag="x", license="mit", paper_ids="arXiv:1", test_crop_pct=1.0))
    assert not {"tag", "license"} & set(vca.load(tmp_path).pretrained_cfg)
    edit(tmp_path, lambda c: c["pretrained_cfg"].update(url="http://localhost/weights.pth"))
    with pytest.raises(CheckpointError, match=r"unknown field pretrained_cfg\.url"):
        vca.load(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c["model_args"].update(num_classes=5), "num_classes is 4, but model_args.num_classes 5"),
        (lambda c: c.update(label_names=["a"]), "1 label_names for 4 classes"),
        (lambda c: c.update(label_names={"0": 7}), "label_names must be texts"),
        (lambda c: c.update(num_classes="4"), "field num_classes is missing or not of type int"),
        (lambda c: c.pop("pretrained_cfg"), "field pretrained_cfg is missing"),
        (lambda c: c.update(model_args=[]), "field model_args is missing or not of type dict"),
        (lambda c: c.update(label_files="x"), "unknown field label_files"),
    ],
)
def test_a_config_of_timms_with_a_fault_is_refused(tmp_path, change, message):
    made_by_timm("pvt_tiny", tmp_path)
    edit(tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        vca.load(tmp_path)


def test_a_pickle_of_timms_is_refused_with_what_to_do(tmp_path):
    model = timm.create_model("pvt_tiny", num_classes=4, **SMALL["pvt_tiny"])
    save_for_hf(model, tmp_path)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle\. timm writes both with"):
        vca.load(tmp_path)
