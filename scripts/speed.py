"""Draws `docs/speed.png`, the plot of docs/speed.md.

    python -m scripts.speed

The numbers are those of the tables of that page, which `benchmarks.attention` wrote.
"""

from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "speed.md"
LABELS = {"vca_fused": "VCA, as it comes", "agent": "Agent attention, plain", "vca": "VCA, plain"}
STYLES = {"vca": "o--", "vca_fused": "o-", "agent": "s:"}


def curves(page: str, scope: str, step: str = "forward", dtype: str = "float32") -> dict[str, dict[int, float]]:
    """How many times faster than SDPA each variant of `LABELS` is, by patches, in all tables of a page together.

    Where two tables have the same number, it is the one of the first.
    """
    found: dict[str, dict[int, float]] = {name: {} for name in LABELS}
    head: list[str] = []
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[:4] == ["scope", "step", "type", "patches"]:
            head = cells
        elif cells[:3] == [scope, step, dtype]:
            for name in found.keys() & set(head):
                found[name].setdefault(int(cells[3]), float(cells[head.index(name)].removesuffix("x")))
    return found


def draw(page: str, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7.2, 4), layout="constrained")
    for name, points in curves(page, "layer").items():
        axis.plot(
            list(points), list(points.values()), STYLES[name], label=LABELS[name], color=f"C{2 * (name == 'agent')}"
        )
    axis.axhline(1, color="0.3", linewidth=1)
    axis.axhspan(0.2, 1, color="0.5", alpha=0.12, linewidth=0)
    axis.text(4096, 0.23, "slower than self-attention", fontsize=9, color="0.3", ha="right")
    axis.set(
        xscale="log", yscale="log", ylim=(0.2, 12), xlabel="patches", ylabel="times faster than self-attention (SDPA)"
    )
    marks = sorted(curves(page, "layer")["vca"])
    axis.set_xticks(marks, list(map(str, marks)))
    axis.set_yticks((0.25, 0.5, 1, 2, 4, 8), ("1/4", "1/2", "1", "2", "4", "8"))
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(loc="upper left", fontsize=9)
    axis.set_title("One layer, forward, float32, one thread: C = 192, 3 heads, 7 x 7 contrast tokens", fontsize=9)
    figure.savefig(file, dpi=120)


def main() -> None:
    draw(PAGE.read_text(encoding="utf-8"), PAGE.with_suffix(".png"))


if __name__ == "__main__":
    main()
