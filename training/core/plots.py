"""Curves of a run, and grids of images."""

import io
from pathlib import Path

from PIL import Image
from torch import Tensor

from training.core.run import RunFolder
from vca import drawing
from vca.checkpoint import write_atomically


def plot_curve(run: RunFolder, key: str, label: str) -> None:
    """Draws training loss and validation metric `key`, learning rate and gradient norm from the log: `curve.png`."""
    if not run.writes:
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = run.read_log()
    figure, (loss_axis, lr_axis) = plt.subplots(
        2, sharex=True, figsize=(7, 5.5), height_ratios=(2, 1), layout="constrained"
    )
    train = [line for line in lines if "lr" in line]
    steps = [line["step"] for line in train]
    loss_axis.plot(steps, [line["loss"] for line in train], color="0.55", linewidth=1)
    loss_axis.set_ylabel("training loss")
    metric_axis = loss_axis.twinx()
    val = [line for line in lines if key in line]
    metric_axis.plot([line["step"] for line in val], [line[key] for line in val], color="#4338ca", marker=".")
    metric_axis.set_ylabel(label, color="#4338ca")
    lr_axis.plot(steps, [line["lr"] for line in train], color="#0f766e")
    lr_axis.set(xlabel="step", ylim=(0, None))
    lr_axis.set_ylabel("learning rate", color="#0f766e")
    norm_axis = lr_axis.twinx()
    norm_axis.plot(steps, [line["grad_norm"] for line in train], color="0.55", linewidth=1)
    norm_axis.set_ylabel("gradient norm")
    save_figure(figure, run.path / "curve.png")


def save_figure(figure, file: Path) -> None:
    """Writes a figure of matplotlib as a PNG file, whole or not at all, and closes it."""
    import matplotlib.pyplot as plt

    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=120)
    plt.close(figure)
    write_atomically(file, stream.getvalue())


def png(pixels: Tensor) -> bytes:
    """A PNG file of one image, uint8 (3, H, W)."""
    stream = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy()).save(stream, format="PNG")
    return stream.getvalue()


def grid_png(images: Tensor, columns: int) -> bytes:
    """A PNG file of images (N, 3, H, W) in [0, 1], row by row; the last row may be filled up with black."""
    stream = io.BytesIO()
    drawing.grid(images, columns).save(stream, format="PNG")
    return stream.getvalue()
