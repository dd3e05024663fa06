"""The About tab: what the maps mean, the models served here, the paper, the limits."""

import json
from pathlib import Path

import gradio as gr
from PIL import Image

from app.context import Context
from app.runtime.assets import STATIC
from app.runtime.checkpoints import Checkpoints
from app.runtime.names import dataset_of
from vca import drawing, fused
from vca.checkpoint import AUTOENCODER_FILES
from vca.diffusion.vae import SD_VAE, STRIDE, stride_of
from vca.models import GENERATORS, autoencoder_of

TITLE = "About"
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
TIMESTEPS = """
## On the way from noise to picture

The same layers look differently at noise and at a picture. Below are the effective maps of
`vca_sit_xs_2_scenes` while it generates, for the patch under the cross, mean of the heads; to the right two numbers of
every block, over all heads, patches and three pictures of each class.

- **Attention narrows a little while the picture forms.** Block 2 spans 3.6 patches on average at the start and 3.4 from
  t = 0.4 on; a map that is the same everywhere spans 4.1. Most blocks widen again towards the end.
- **Contrast comes with content.** Block 5 pushes away 15 % of what it attends by at noise, and 24 % at the picture;
  block 3 rises from 8 to 12 %. The first two blocks and the last one hardly push anything away.
- **What to look at is settled early.** In this picture block 2 looks along the query's row from t = 0.2 on.
"""
TIMESTEPS_PICTURE = (
    STATIC / "timesteps.png",
    "States of a picture of a forest at six times from noise to picture, the effective maps of blocks 2, 5 and 7 "
    "then, and two curves of every block over time: how far its attention reaches, and how much it pushes away.",
)
PAPER = """
## The paper

*Linear Differential Vision Transformer: Learning Visual Contrasts via Pairwise Differentials*, NeurIPS 2025,
arXiv [2511.00833](https://arxiv.org/abs/2511.00833).
"""


MATH = [dict(left="$$", right="$$", display=True), dict(left="$", right="$", display=False)]


def build(context: Context) -> None:
    """Builds the tab."""
    with gr.Column(elem_classes="vca-about"):
        gr.Markdown(MAPS, latex_delimiters=MATH)
        gr.Markdown(TIMESTEPS)
        file, alt = TIMESTEPS_PICTURE
        gr.HTML(f'<img src="{drawing.data_url(Image.open(file), "PNG")}" alt="{alt}" style="width: 100%">')
        gr.Markdown(table(context.checkpoints))
        path = gr.Markdown(attention_path())
        context.page.load(attention_path, outputs=path, show_progress="hidden", api_visibility="private")
        gr.Markdown(PAPER)


def attention_path() -> str:
    """How this server computes attention just now, in Markdown."""
    return f"Attention is computed here by {fused.status()}."


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
        top1 = _entry(last, "results", "top1")
        top1 = f"{top1:.2f} %" if isinstance(top1, int | float) else "-"
        data = dataset_of(config) or "-"
        titled = f"{checkpoints.title(name)}<br>`{name}`"
        cells = [titled, task, config["num_classes"], _size(config, checkpoints.folders[name]), data, top1]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _size(config: dict, folder: Path) -> str:
    """Width and height of the images that a classifier takes or a generator makes, as far as `folder` tells."""
    if "pretrained_cfg" in config:
        rows, cols = config["pretrained_cfg"]["input_size"][1:]
        return f"{cols}×{rows}"
    arguments = GENERATORS[config["architecture"]] | config["model_args"]
    if not (scale := _stride(autoencoder_of(config), folder)):
        return "-"
    match arguments.get("input_size", 32):
        case [int(rows), int(cols)]:
            return f"{scale * cols}×{scale * rows}"
        case int(side):
            return f"{scale * side}×{scale * side}"
    return "-"


def _stride(vae: str | None, folder: Path) -> int | None:
    """Pixels to a number of what a generator makes, in each direction; None for an autoencoder that is not here."""
    if vae in (None, SD_VAE):
        return STRIDE if vae else 1
    try:
        return stride_of(json.loads((folder / AUTOENCODER_FILES[0]).read_text(encoding="utf-8")))
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _entry(run: dict, *keys: str):
    """The value under nested keys, or None. The history of a checkpoint may have any form."""
    for key in keys:
        run = run.get(key) if isinstance(run, dict) else None
    return run
