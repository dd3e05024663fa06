"""What models are called on the page."""

import pytest

from app.runtime.names import title_of, titles
from app.ui import WEIGHTS
from vca.checkpoint import read_config
from vca.models import list_models


def config(architecture: str, dataset="CIFAR-10", **arguments) -> dict:
    return dict(architecture=architecture, model_args=arguments, training=[dict(recipe=dict(dataset=dataset))])


@pytest.mark.parametrize(
    "architecture, dataset, arguments, title",
    [
        ("vca_vit_small_patch14_224", "Everyday photos (212 classes)", {}, "VCA ViT-S/14 · Everyday photos"),
        ("mhsa_vit_pico_patch4_32", "CIFAR-10", {}, "Self-attention ViT-Pico/4 · CIFAR-10"),
        ("mhsa_vit_pico_patch4_32", "CIFAR-10", dict(attention="vca"), "VCA ViT-Pico/4 · CIFAR-10"),
        ("deit_tiny_patch16_224.fb_in1k", "flowers", dict(attention="agent"), "Agent attention DeiT-Ti/16 · flowers"),
        ("sit_xs_4", "CIFAR-10", {}, "Self-attention SiT-XS/4 · CIFAR-10"),
        ("vca_pvt_medium", "ImageNet-1k", {}, "VCA PVT-Medium · ImageNet-1k"),
        ("cswin_tiny", "ImageNet-1k", {}, "CSwin-Ti · ImageNet-1k"),
    ],
)
def test_titles(architecture, dataset, arguments, title):
    assert title_of(config(architecture, dataset, **arguments)) == title


@pytest.mark.parametrize("history", [[], None, "x", [dict(recipe=None)], [dict(recipe=dict(dataset=7))], [{}]])
def test_without_a_data_set_a_model_goes_by_its_id(history):
    assert titles({"user/mine": config("vca_pvt_tiny") | dict(training=history)}) == {"user/mine": "user/mine"}


def test_every_architecture_has_a_title_of_its_own():
    """Tables of the same network with and without VCA, and of other sizes and patches, name each."""
    names = [name for name in list_models() if not name.endswith("_64")]  # other input sizes of the same network
    found = [title_of(config(name)) for name in names]
    assert len({*found}) == len(names)


def test_two_of_one_title_are_told_apart_by_their_ids():
    assert titles({"a": config("vca_pvt_tiny"), "b": config("vca_pvt_tiny"), "c": config("pvt_tiny")}) == {
        "a": "VCA PVT-Ti · CIFAR-10 (a)",
        "b": "VCA PVT-Ti · CIFAR-10 (b)",
        "c": "PVT-Ti · CIFAR-10",
    }


def test_what_ships_has_titles():
    configs = {file.parent.name: read_config(file.parent) for file in WEIGHTS.glob("*/config.json")}
    assert configs and all(" · " in title for title in titles(configs).values())
