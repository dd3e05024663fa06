"""Inputs that several tabs use: a choice of model, and the settings of a generator."""

from functools import partial
from html import escape
from pathlib import Path

import gradio as gr

import vca
from app import settings
from app.runtime import assets, loading, sampling
from app.runtime.checkpoints import Checkpoints

FILE_TYPES = [".json", ".safetensors", ".zip"]
HINT = """<p class='vca-hint'>One of ours, or any ViT, DeiT or Swin of timm: by its id on the Hub, or as config.json and
model.safetensors, or a zip file of these, up to {limit}.{more} Nobody else sees what you upload.</p>"""
CNNS = " Here also a CNN of timm, such as ResNet or ConvNeXt: its Grad-CAM is shown."

SHOW_ID = "(name) => {{ document.querySelector('#{} input').title = name ?? ''; }}"
NEW_SEED = "() => Math.floor(Math.random() * 2 ** 32)"


def page_part(html: str, script: str, styles: tuple[str, ...], value: str, **options) -> gr.HTML:
    """A part of the page that a script of ours draws.

    Args:
        html, script, styles: its files, see `app.runtime.assets`.
        value: what it shows first.
        **options: those of `gr.HTML`; others are the script's `props`.
    """
    return gr.HTML(
        value,
        html_template=assets.text(html),
        css_template=assets.text(*styles),
        js_on_load=assets.script(script),
        apply_default_css=False,
        **options,
    )


def model_dropdown(label: str, choices: list[tuple[str, str]], chosen: str | None) -> gr.Dropdown:
    """A choice of models: it shows their titles, and the id of the chosen one in a tooltip."""
    id = f"model-{label.lower().replace(' ', '-')}"
    dropdown = gr.Dropdown(choices, label=label, value=chosen, elem_classes="vca-model", elem_id=id)
    gr.on(None, None, dropdown, js=SHOW_ID.format(id), show_progress="hidden", api_visibility="private")
    return dropdown


class ModelChoice:
    """The choice of a classifier in every tab that has one, and the control "Load another model".

    A model that a visitor loads in one tab can be chosen in all of them. Call `connect` after the last tab is built.
    """

    def __init__(self, checkpoints: Checkpoints):
        self.checkpoints = checkpoints
        self._dropdowns: dict[gr.Dropdown, bool] = {}  # and whether each takes CNNs
        self._loaders: list[tuple] = []

    def dropdown(self, label: str, chosen: str | None, *, cnns: bool = False) -> gr.Dropdown:
        """A dropdown of all classifiers, of which one is `chosen` when the page opens, with `cnns` of CNNs as well."""
        made = model_dropdown(label, self._served(), chosen)
        self._dropdowns[made] = cnns
        return made

    def _served(self) -> list[tuple[str, str]]:
        return self.checkpoints.choices([*self.checkpoints.classifiers, *self.checkpoints.finer])

    def loader(self, chosen_in: gr.Dropdown) -> None:
        """The control "Load another model". The model that it loads is then chosen in `chosen_in`."""
        with gr.Accordion("Load another model", open=False, elem_classes="vca-loader"):
            reference = gr.Textbox(
                label="Hub id, or a folder on this machine",
                placeholder="timm/deit_tiny_patch16_224.fb_in1k",
                max_lines=1,
            )
            button = gr.Button("Load", size="sm")
            stop = gr.Button("Stop waiting", size="sm", visible=False)
            files = gr.File(label="Or your own", file_count="multiple", file_types=FILE_TYPES, height=110)
            more = CNNS if self._dropdowns[chosen_in] else ""
            said = gr.HTML(HINT.format(limit=settings.upload_limit(), more=more))
        self._loaders.append((chosen_in, reference, button, stop, files, said))

    def connect(self) -> None:
        """Registers the events: a model that is loaded in one tab appears in every dropdown of the visitor's page."""
        others = gr.State([])

        def add(tab: int, label: str, value: str, known: list):
            here = self._loaders[tab][0]
            model = self.checkpoints.load(value, cnn=self._dropdowns[here])
            known = [entry for entry in known if entry[1] != value] + [(label, value, loading.is_cnn(model))]
            dropdowns = []
            for dropdown, cnns in self._dropdowns.items():
                choices = [*self._served(), *((label, value) for label, value, cnn in known if cnns or not cnn)]
                chosen = dict(value=value) if dropdown is here else {}
                dropdowns.append(gr.Dropdown(choices=choices, **chosen))
            return [note(f"{label} is loaded, and chosen above."), known, *dropdowns]

        def note(text: str, kind: str = "vca-hint", role: str = "status") -> str:
            return f"<p class='{kind}' role='{role}'>{escape(text)}</p>"

        def told_only(html: str) -> list:
            return [html, gr.skip(), *[gr.skip()] * len(self._dropdowns)]

        def nothing(text: str) -> list:
            return told_only(note(text, "vca-problem", "alert"))

        def by_reference(tab: int, reference: str, known: list):
            reference = reference.strip() if isinstance(reference, str) else ""
            try:
                told = 0
                for seconds in self.checkpoints.opening(reference):
                    if seconds >= told:
                        told += 1
                        waiting = f"{reference} is being loaded: {seconds:.0f} s."
                        yield [gr.Button(visible=True), *told_only(note(waiting))]
                yield [gr.Button(visible=False), *add(tab, reference, reference, known)]
            except gr.Error as error:
                yield [gr.Button(visible=False), *nothing(error.message)]

        def stop_waiting():
            return [
                note("Stopped waiting. The model may still arrive: load it again to see."),
                gr.Button(visible=False),
            ]

        def by_files(tab: int, files: list[str], known: list):
            try:
                if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
                    raise vca.CheckpointError("The upload has no files.")
                name, model = loading.open_upload(list(map(Path, files)))
                return [*add(tab, f"{name} (uploaded)", self.checkpoints.keep(model), known), None]
            except vca.CheckpointError as error:
                return [*nothing(str(error)), None]
            except gr.Error as error:
                return [*nothing(error.message), None]

        for tab, (_, reference, button, stop, files, said) in enumerate(self._loaders):
            joined, shared = [said, others, *self._dropdowns], dict(show_progress_on=said, api_visibility="private")
            loading_it = gr.on(
                [button.click, reference.submit],
                partial(by_reference, tab),
                [reference, others],
                [stop, *joined],
                concurrency_limit=loading.OPENED_AT_ONCE,
                **shared,
            )
            stop.click(stop_waiting, None, [said, stop], cancels=[loading_it], api_visibility="private")
            files.upload(partial(by_files, tab), [files, others], [*joined, files], **shared)


def sampling_settings(steps: int, guidance: float) -> tuple[gr.Number, gr.Slider, gr.Slider]:
    """Inputs for the seed, the number of steps and the guidance of a generator."""
    with gr.Row(equal_height=True):
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=sampling.MAX_SEED, min_width=120)
        new_seed = gr.Button("New seed", size="sm", min_width=90, elem_classes="vca-new-seed")
    chosen_steps = gr.Slider(1, sampling.MAX_STEPS, steps, step=1, label="Steps", buttons=[])
    scale = gr.Slider(1, sampling.MAX_GUIDANCE, guidance, step=0.1, label="Guidance (1 is none)", buttons=[])
    new_seed.click(None, outputs=seed, js=NEW_SEED, show_progress="hidden", api_visibility="private")
    return seed, chosen_steps, scale
