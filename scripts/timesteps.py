"""How the attention of a generator changes on the way from noise to picture.

    python -m scripts.timesteps weights/NAME

Generates pictures of every class with one seed, and records the effective maps at times from noise to picture. Draws
`app/static/timesteps.png`: the states and maps of one picture, and two numbers of every block, over all heads and
pictures. The *reach* is the mean distance from the query to what it attends to, in patches, weighted by the size of the
map's entries; what is *pushed away* is the share of the negative entries in the sum of all sizes. Prints both.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

import vca
from vca.diffusion.sampling import at_time

STEPS, GUIDANCE, SEED, PER_CLASS = 50, 3.0, 0, 3
SHOWN = (0, 10, 20, 30, 40, 49)  # steps whose state and maps are drawn
PICTURE, QUERY = 1, 0.5  # of which picture; the query's place, from 0 to 1 in both directions


def distances(grid_size: tuple[int, int]) -> Tensor:
    """Between the centres of any two patches, in patches (N, N)."""
    places = torch.cartesian_prod(*(torch.arange(float(side)) for side in grid_size))
    return torch.cdist(places, places)


def reach(effective: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """The mean distance that effective maps (..., N, N) span, weighted by the size of their entries."""
    size = effective.abs()
    return ((size * distances(grid_size)).sum((-2, -1)) / size.sum((-2, -1))).mean()


def pushed_away(effective: Tensor) -> Tensor:
    """The share of negative entries in the sum of all sizes, of effective maps (..., N, N)."""
    return (effective.clamp(max=0).abs().sum((-2, -1)) / effective.abs().sum((-2, -1))).mean()


@torch.inference_mode()
def measure(model: torch.nn.Module) -> tuple[list[float], list[Tensor], list[list[Tensor]]]:
    """Times, the states (B, C, H, W) and the effective maps (B, heads, N, N) of every block at each of them."""
    labels = list(range(model.num_classes)) * PER_CLASS
    states = []
    model.sample(
        labels, steps=STEPS, guidance_scale=GUIDANCE, seed=SEED, callback=lambda step, total, x: states.append(x)
    )
    times = model.times(STEPS, next(iter(model.objective.SAMPLERS)))[:STEPS]
    maps = []
    for t, x in zip(times, states[:STEPS], strict=True):
        with vca.record(model) as layers:
            model(x, at_time(t, x), torch.tensor(labels))
        maps.append([layer.effective for layer in layers])
    return times, states[:STEPS], maps


def draw(
    model: torch.nn.Module, times: list[float], states: list[Tensor], maps: list[list[Tensor]], file: Path
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    blocks = len(model.blocks)
    drawn = sorted({min(1, blocks - 1), blocks // 2, max(0, blocks - 2)})
    figure = plt.figure(figsize=(12, 5.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1.5, 1])
    axes = left.subplots(1 + len(drawn), len(SHOWN))
    rows, cols = model.grid_size
    query = int(QUERY * rows) * cols + int(QUERY * cols)
    for column, step in enumerate(SHOWN):
        image = model.decode(states[step][PICTURE : PICTURE + 1])[0]
        axes[0, column].imshow(image.permute(1, 2, 0))
        axes[0, column].set_title(f"t = {times[step]:.2f}", fontsize=9)
        for axis, block in zip(axes[1:, column], drawn, strict=True):
            effective = maps[step][block][PICTURE].mean(0)[query].unflatten(0, model.grid_size)
            limit = effective.abs().max()
            axis.imshow(effective, cmap="PuOr_r", vmin=-limit, vmax=limit)
            axis.plot(query % cols, query // cols, "k+", markersize=6)
    for axis, label in zip(axes[:, 0], ["state", *(f"block {block + 1}" for block in drawn)], strict=True):
        axis.set_ylabel(label, fontsize=9)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    numbers = {
        "reach (patches)": lambda effective: reach(effective, model.grid_size),
        "pushed away (share)": pushed_away,
    }
    colors = plt.get_cmap("viridis")
    panels = right.subplots(2, 1, sharex=True)
    for axis, (label, number) in zip(panels, numbers.items(), strict=True):
        for block in range(blocks):
            values = [float(number(layers[block])) for layers in maps]
            axis.plot(times, values, color=colors(block / max(1, blocks - 1)), label=f"block {block + 1}")
            print(f"{label}, block {block + 1}: {' '.join(f'{value:.2f}' for value in values[:: STEPS // 10])}")
        axis.set_ylabel(label, fontsize=9)
        axis.grid(alpha=0.3)
    panels[0].axhline(distances(model.grid_size).mean(), color="0.5", linestyle=":", label="everywhere alike")
    right.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", fontsize=8, ncols=3)
    panels[1].set_xlabel("t, from noise (0) to picture (1)", fontsize=9)
    figure.savefig(file, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--out", type=Path, default=Path("app/static/timesteps.png"))
    args = parser.parse_args()
    model = vca.load(args.checkpoint)
    draw(model, *measure(model), args.out)


if __name__ == "__main__":
    main()
