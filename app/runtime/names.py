"""What models are called on the page. Links, the API and files call them by their ids."""

import re
from collections import Counter
from collections.abc import Mapping

FAMILIES = dict(vit="ViT", deit="DeiT", pvt="PVT", swin="Swin", cswin="CSwin", dit="DiT", sit="SiT")
SELF_ATTENTION = {"vit", "deit", "dit", "sit"}  # families whose attention that is, unless the name says otherwise
SIZES = dict(ti="Ti", tiny="Ti", small="S", base="B", large="L")
KINDS = dict(
    vca="VCA", vca_stage1="VCA in Stage I", vca_stage2="VCA in Stage II", mhsa="Self-attention",
    mhsa_dwc="Self-attention and convolution", diff="Differential attention", agent="Agent attention",
)  # fmt: skip
ARCHITECTURE = re.compile(
    rf"(?:(?P<kind>vca|mhsa)_)?(?P<family>{'|'.join(FAMILIES)})_(?P<size>[a-z]+)(?:_(?:patch)?(?P<patch>\d+))?"
)


def titles(configs: Mapping[str, dict]) -> dict[str, str]:
    """What models are called, by id: the attention, the architecture and the data set of their `config.json`.

    Models of one such title have their ids behind it. The id alone is the title where the config does not say enough.
    """
    found = {name: title_of(config) or name for name, config in configs.items()}
    count_of = Counter(found.values())
    return {name: title if count_of[title] == 1 else f"{title} ({name})" for name, title in found.items()}


def title_of(config: dict) -> str | None:
    """Such as "VCA ViT-S/14 · Everyday photos"; None where the config does not say enough for one."""
    parts = ARCHITECTURE.match(config["architecture"])
    data = dataset_of(config)
    if parts is None or not data:
        return None
    kind = config["model_args"].get("attention") or parts["kind"]
    if kind is None and parts["family"] in SELF_ATTENTION:
        kind = "mhsa"
    size = parts["size"]
    size = SIZES.get(size) or (size.upper() if len(size) < 3 else size.capitalize())
    patch = f"/{parts['patch']}" if parts["patch"] else ""
    network = f"{FAMILIES[parts['family']]}-{size}{patch}"
    return " ".join(filter(None, [KINDS.get(kind, kind), network, "·", data.partition(" (")[0]]))


def dataset_of(config: dict) -> str | None:
    """The data set that a model was last trained on, by its history, which may have any form."""
    try:
        data = config["training"][-1]["recipe"]["dataset"]
    except (LookupError, TypeError):
        return None
    return data if isinstance(data, str) else None
