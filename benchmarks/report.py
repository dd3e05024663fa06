"""Tables and plot of the speed benchmark."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import log
from pathlib import Path
from statistics import linear_regression

REFERENCE = "mhsa"


RATIOS = (0.125, 0.25, 0.5, 1, 2, 4, 8, 16, 32)  # marks of the plot


@dataclass(frozen=True)
class Row:
    """One measurement: milliseconds (median), and the peak of newly allocated memory in MB (10^6 bytes)."""

    scope: str
    step: str
    dtype: str
    patches: int
    variant: str
    ms: float
    peak_mb: float
    floor_ms: float | None = None


def line(cells: Iterable) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def table(rows: list[Row], variants: list[str]) -> str:
    """Markdown: milliseconds of the reference, how many times faster the others are, and peak memory."""
    others = [v for v in variants if v != REFERENCE]
    head = ["scope", "step", "type", "patches", f"{REFERENCE} (ms)", *(f"{v}" for v in others), "peak MB, same order"]
    lines = [line(head), "|---" * len(head) + "|"]
    keys = dict.fromkeys((r.scope, r.step, r.dtype, r.patches) for r in rows)
    for key in keys:
        found = {r.variant: r for r in rows if (r.scope, r.step, r.dtype, r.patches) == key}
        ms = found[REFERENCE].ms
        cells = [*key, f"{ms:.3g}", *(f"{ms / found[v].ms:.2f}x" for v in others)]
        memory = " / ".join(f"{found[v].peak_mb:.3g}" for v in variants)
        lines.append(line([*cells, memory]))
    return "\n".join(lines)


def floors(rows: list[Row]) -> str:
    """Markdown: what was measured beside its roofline, for those that have one."""
    head = ["scope", "step", "type", "patches", "variant", "ms", "roofline (ms)", "times the roofline"]
    lines = [line(head), "|---" * len(head) + "|"]
    for r in rows:
        if r.floor_ms:
            cells = r.scope, r.step, r.dtype, r.patches, r.variant, f"{r.ms:.3g}", f"{r.floor_ms:.3g}"
            lines.append(line([*cells, f"{r.ms / r.floor_ms:.2f}"]))
    return "\n".join(lines)


def growth(rows: list[Row], variants: list[str]) -> str:
    """Markdown: the exponent p by which time grows with the number of patches N, as N^p, fitted by least squares."""
    head = ["scope", "step", "type", "patches", *variants]
    lines = [line(head), "|---" * len(head) + "|"]
    for key in dict.fromkeys((r.scope, r.step, r.dtype) for r in rows):
        found = [r for r in rows if (r.scope, r.step, r.dtype) == key]
        patches = sorted({r.patches for r in found})
        if len(patches) > 1:
            cells = [f"{exponent([r for r in found if r.variant == variant]):.2f}" for variant in variants]
            lines.append(line([*key, f"{patches[0]} to {patches[-1]}", *cells]))
    return "Time grows as patches to the power of\n\n" + "\n".join(lines)


def exponent(rows: list[Row]) -> float:
    """The slope of the line through log time over log patches."""
    return linear_regression([log(r.patches) for r in rows], [log(r.ms) for r in rows]).slope


def plot(rows: list[Row], variants: list[str], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = list(dict.fromkeys((r.scope, r.step, r.dtype) for r in rows))
    columns = min(len(panels), 3)
    shape = -(-len(panels) // columns), columns
    figure, axes = pyplot.subplots(*shape, figsize=(4 * shape[1], 3.4 * shape[0]), squeeze=False, sharey=True)
    for axis, panel in zip(axes.flat, sorted(panels, key=lambda p: (p[2], p[1])), strict=False):
        reference = {r.patches: r.ms for r in rows if (r.scope, r.step, r.dtype, r.variant) == (*panel, REFERENCE)}
        for variant in variants:
            points = [r for r in rows if (r.scope, r.step, r.dtype, r.variant) == (*panel, variant)]
            axis.plot([r.patches for r in points], [reference[r.patches] / r.ms for r in points], "o-", label=variant)
        axis.set(xscale="log", yscale="log", xlabel="patches", title=", ".join(panel))
        axis.set_xticks(list(reference), list(map(str, reference)))
        axis.minorticks_off()
        axis.set_yticks(RATIOS, [f"{ratio:g}" for ratio in RATIOS])
        axis.grid(alpha=0.3)
    for row in axes:
        row[0].set_ylabel(f"times faster than {REFERENCE}")
    axes[0][0].legend(fontsize=8)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    figure.tight_layout()
    figure.savefig(file, dpi=120)
