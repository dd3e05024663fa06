"""The About tab: what the maps mean, the models served here, the paper, the limits."""

import gradio as gr

from app.models import Checkpoints
from vca.models import GENERATORS
from vca.vae import STRIDE

MAPS = r"""
## What the maps mean

A layer of Visual-Contrast Attention (VCA) attends in two stages, through $n$ *contrast tokens*: the queries of the
image's patches, averaged over $n$ cells, once with a learned positive and once with a learned negative embedding added.
In every head

$$A_1^\pm = \operatorname{softmax}\big(t^\pm k^\top / \sqrt d\,\big), \quad D_1 = A_1^+ - \lambda_1 A_1^-,$$

$$A_2^\pm = \operatorname{softmax}\big(q\,{t^\pm}^\top / \sqrt d\,\big), \quad D_2 = A_2^+ - \lambda_2 A_2^-.$$

**Stage I** says where a contrast token looks: one row per contrast token, over all patches. **Stage II** says which
contrast tokens a patch reads: one row per patch. A row of a positive or negative map sums to 1, a row of a
differential map to $1 - \lambda$.

**The effective map** joins both stages into one signed attention from patch to patch,

$$E = \operatorname{diag}(r_2)\, D_2 \operatorname{diag}(r_1)\, D_1, \quad o = (E\,v)\, g_1 g_2,$$

where $r_1, r_2$ are the row factors of the two RMSNorms and $g_1, g_2$ their channel gains. This is exact, to rounding:
an orange patch is *drawn in* by the query, a blue one *pushed away*.

## What they do not mean

- The effective map is all of the layer's attention, but the layer also adds a depthwise 3×3 convolution of the values,
  and the block an MLP; neither is in the map.
- Attention is not an explanation by itself. That a head draws from a patch does not mean that the decision hangs on it.
- In later blocks a patch no longer stands for its own pixels only: it has already mixed with others.
- The models here are small and know few classes.
"""
PAPER = """
## The paper

*Linear Differential Vision Transformer: Learning Visual Contrasts via Pairwise Differentials*, NeurIPS 2025,
arXiv [2511.00833](https://arxiv.org/abs/2511.00833).
"""


MATH = [dict(left="$$", right="$$", display=True), dict(left="$", right="$", display=False)]


def build(checkpoints: Checkpoints) -> None:
    """Builds the tab."""
    with gr.Column(elem_classes="vca-about"):
        gr.Markdown(MAPS, latex_delimiters=MATH)
        gr.Markdown(table(checkpoints))
        gr.Markdown(PAPER)


def table(checkpoints: Checkpoints) -> str:
    """The models as a Markdown table, classifiers first."""
    lines = [
        "## Models served here",
        "",
        "| model | task | classes | image | trained on | top-1 |",
        "|---|---|---|---|---|---|",
    ]
    for name in checkpoints.classifiers + checkpoints.generators:
        config = checkpoints.configs[name]
        task = "classifies" if name in checkpoints.classifiers else "generates"
        last = config["training"][-1] if config["training"] else {}
        data = _entry(last, "recipe", "dataset") or "-"
        top1 = _entry(last, "results", "top1")
        top1 = f"{top1:.2f} %" if isinstance(top1, int | float) else "-"
        cells = [name, task, config["num_classes"], _size(config), data, top1]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _size(config: dict) -> str:
    """Width and height of the images that go in, or, of a generator, come out."""
    if "pretrained_cfg" in config:
        rows, cols = config["pretrained_cfg"]["input_size"][1:]
        return f"{cols}×{rows}"
    arguments = GENERATORS[config["architecture"]] | config["model_args"]
    scale = STRIDE if arguments["vae"] else 1
    match arguments.get("input_size", 32):
        case [int(rows), int(cols)]:
            return f"{scale * cols}×{scale * rows}"
        case int(side):
            return f"{scale * side}×{scale * side}"
    return "-"


def _entry(run: dict, *keys: str):
    """What stands under the keys, or None: the history of a checkpoint is free in form."""
    for key in keys:
        run = run.get(key) if isinstance(run, dict) else None
    return run
