"""What the Explore tab shows, and ways to operate it."""

import shutil
from pathlib import Path

import numpy as np
import torch

import vca
from app.runtime import records
from app.runtime.images import read_image
from app.ui import WEIGHTS
from tests.helpers.app import SMALL_PYRAMID
from tests.helpers.page import READ
from vca import preprocessing

SHIPPED = "vca_vit_pico_patch4_32_cifar10"


LABELS = ["left", "right", "up", "down"]


def save_more_checkpoints(folder: Path) -> None:
    """The shipped checkpoint, the same with other parameters and without training, and three small pyramids."""
    shutil.copytree(WEIGHTS / SHIPPED, folder / SHIPPED)
    torch.manual_seed(3)
    shipped = vca.load(WEIGHTS / SHIPPED)
    vca.save(
        vca.create_model("vca_vit_pico_patch4_32", num_classes=10),
        folder / "untrained",
        label_names=shipped.label_names,
    )
    with torch.no_grad():
        for parameter in shipped.parameters():
            parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
    vca.save(shipped, folder / "shaken", label_names=shipped.label_names)
    swin = dict(img_size=36, window_size=3, embed_dim=12, depths=(2, 1), num_heads=(2, 4))
    pyramids = {
        "swin": ("swin_tiny_patch4_window7_224", dict(num_classes=4, **swin)),
        "pvt": ("pvt_tiny", dict(SMALL_PYRAMID, img_size=64, num_heads=(1, 2, 2, 2))),
        "cswin": ("cswin_tiny", dict(SMALL_PYRAMID, num_heads=(2, 2, 2, 4), split_sizes=(2, 1, 1, None))),
    }
    for name, (architecture, options) in pyramids.items():
        model = vca.create_model(architecture, **options)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        vca.save(model, folder / name, label_names=LABELS)


TITLE = "id => gradio_config.components.flatMap((c) => c.props.choices ?? []).find(([, value]) => value === id)[0]"


def choose(page, model: str) -> None:
    """Explores the picture on the page with another model, which its dropdown calls by its title."""
    if f"model={model}&" in page.url:
        return
    page.get_by_label("Model", exact=True).click()
    page.get_by_role("option", name=page.evaluate(TITLE, model), exact=True).click()
    page.wait_for_function(f"() => location.hash.includes('model={model}&')")
    page.wait_for_selector(".vx[data-state=complete]")


def show(page, block: int, head: int | None = None, mode: str = "effective") -> None:
    """`head` None is the mean of all heads."""
    page.locator(f".vx [data-mode={mode}]").click()
    page.locator(".vx-blocks button").nth(block).click()
    page.locator(".vx-heads button").nth(0 if head is None else head + 1).click()


def point_at(page, x: float, y: float) -> None:
    canvas = page.locator(".vx-large canvas")
    box = canvas.bounding_box()
    canvas.click(position=dict(x=x * box["width"], y=box["height"] - (1 - y) * box["width"]))
    page.mouse.move(0, 0)


def rows_shown(page) -> dict[str, np.ndarray]:
    rows = page.evaluate(READ)["rows"]
    return {name: np.array([np.nan if value is None else value for value in row]) for name, row in rows.items()}


def recorded(weights, name: str, picture: Path):
    model = vca.load(weights / name)
    return records.record(model, preprocessing.preprocess(model, read_image(picture)))[1]


def save(page, form: str, folder: Path) -> Path:
    with page.expect_download() as download:
        page.locator(f".vx [data-save={form}]").click()
    download.value.save_as(path := folder / download.value.suggested_filename)
    return path
