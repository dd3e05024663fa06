"""The page: a header, and the tabs."""

from functools import partial
from html import escape
from pathlib import Path

import gradio as gr

from app import api, inputs, links, settings
from app.components import ModelChoice
from app.context import Context
from app.runtime.assets import STATIC
from app.runtime.checkpoints import Checkpoints
from app.runtime.folders import remove_left
from app.runtime.gradio_adapter import with_lasting_queue
from app.tabs import about, classify, compare, explore, generate
from vca import fused

TABS = (classify, explore, generate, compare, about)  # in this order: a tab may use those before it

WEIGHTS = Path(__file__).parent.parent / "weights"
FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"]
THEME = gr.themes.Base(
    primary_hue="indigo",
    neutral_hue="zinc",
    font=FONTS,
    font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"],
).set(
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_dark="*primary_600",
    button_primary_background_fill_hover_dark="*primary_700",
    button_primary_text_color="white",
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_400",
)
LAUNCH = dict(
    theme=THEME,
    css_paths=STATIC / "style.css",
    run_history=False,
    ssr_mode=False,
    mcp_server=True,
    max_file_size=settings.upload_limit(),
    state_session_capacity=settings.SESSIONS,
    footer_links=["api", "settings"],
)
HEADER = """<header class="vca-header"><h1>Visual-Contrast Attention</h1>
<p>See where every head of a vision transformer looks: what it draws in, and what it pushes away.</p></header>"""
ADDRESS = "() => {{ location.hash.startsWith('#{0}') || history.pushState(history.state, '', '#{0}') }}"
NO_WEIGHTS = """<p class="vca-problem">There is no trained model yet. Train one with
<code>python -m training.classify cifar10_vca --data FOLDER</code>, copy <code>runs/cifar10_vca/checkpoint</code> to
<code>weights/NAME</code>, and start the app again.</p>"""


def build(weights: Path = WEIGHTS) -> gr.Blocks:
    """The whole app for the checkpoints in a folder and those of VCA_MODELS. Launch it with `**LAUNCH`."""
    remove_left()
    fused.prepare()  # so that the first photo finds the kernels, if a compiler is there
    checkpoints = Checkpoints(Path(weights), settings.served())
    cleanup = settings.CACHE if settings.is_public() else (3600, 86400)
    choice = ModelChoice(checkpoints)
    with gr.Blocks(title="Visual-Contrast Attention", analytics_enabled=False, delete_cache=cleanup) as demo:
        api.build(checkpoints)  # first, so that no event of a tab takes one of its names
        problems = [f"<p class='vca-problem'>{escape(problem)}</p>" for problem in checkpoints.problems]
        gr.HTML(HEADER + "".join(problems) + ("" if checkpoints.classifiers else NO_WEIGHTS))
        with gr.Row(elem_classes="vca-page"):
            with gr.Column(scale=2, min_width=280, elem_classes="vca-inputs"):
                image, model, crop = inputs.build(checkpoints, choice)
            with gr.Column(scale=7, min_width=320), gr.Tabs() as tabs:
                context = Context(demo, tabs, checkpoints, choice, image, model, crop)
                for tab in TABS:
                    name = tab.TITLE.lower()
                    with gr.Tab(tab.TITLE, id=name, elem_id=f"tab-{name}") as shown:
                        tab.build(context)
                    if tab in (generate, about):  # the others write an address with what they show
                        shown.select(None, js=ADDRESS.format(name), show_progress="hidden", api_visibility="private")
                    if tab is generate:
                        prepare = partial(generate.prepare, checkpoints)
                        shown.select(prepare, show_progress="hidden", api_visibility="private")
        choice.connect()
        links.connect(context)
    return with_lasting_queue(demo.queue(max_size=settings.QUEUE if settings.is_public() else None))
