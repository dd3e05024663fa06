"""The section of Classify that attributes a class to the image and measures how faithful the attribution is."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from html import escape

import gradio as gr
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from app.context import Context
from app.runtime import records
from app.runtime.images import ImageError, uploaded_file
from app.runtime.limits import heavy_work
from app.runtime.records import Recorded
from app.runtime.validation import refused, whole
from vca import drawing, preprocessing
from vca.attribution import METHODS, Method, cell_size, head_map, rollout
from vca.config import MOST_CLASSES
from vca.faithfulness import BASELINES, Curves, curves, infidelity, random_map, sensitivity

PREDICTED = -1
STEPS = 16
ORDERS = 5
LEAST_PROBABILITY = 0.01  # of a class whose curves say something
RANDOM = "random order"
INFIDELITY_DRAWS, SENSITIVITY_DRAWS = 32, 5
STYLES = {"centre prior": "centre", "edge map": "edges", RANDOM: "random"}
WIDTH, HEIGHT, LEFT, BOTTOM = 300, 190, 44, 34  # of a plot, its margins included


@dataclass(frozen=True)
class Question:
    """What a visitor asks: how much each patch of a recorded photo speaks for a class, by one method.

    Attributes:
        methods: all methods that this model allows, by name.
        method: the name of the chosen one.
        index: the class.
    """

    network: nn.Module
    recorded: Recorded
    methods: dict[str, Method]
    method: str
    index: int

    def attribution(self) -> Tensor:
        """The answer (1, H, W). Raises a ValueError that says why if the method is not defined for this model."""
        with heavy_work():
            return self.methods[self.method](self.network, self.recorded.x, self.classes)

    @property
    def classes(self) -> Tensor:
        """The index of the class, (1,)."""
        return torch.tensor([self.index])


def build(context: Context, image: gr.Image, model: gr.Dropdown) -> None:
    """Builds the section for an image and a choice of model that are on the page already."""
    checkpoints = context.checkpoints

    def question(upload: dict, name: str, method: str, target: int) -> Question:
        """The question, about the likeliest class if `target` is no class. Raises ImageError or gr.Error."""
        if not isinstance(method, str):
            raise refused("method must be a text.")
        if target != PREDICTED:
            whole("target", target, PREDICTED, MOST_CLASSES)
        network = checkpoints.load(name)
        recorded = context.recordings.get(network, uploaded_file(upload))
        methods = methods_of(records.whole_grid(recorded.maps))
        method = method if method in methods else next(iter(METHODS))
        index = target if 0 <= target < network.num_classes else int(recorded.probabilities.argmax())
        return Question(network, recorded, methods, method, index)

    def explain(upload: dict | None, name: str, method: str, target: int):
        """After a choice of method or class: the figure, the button, and no measurement yet."""
        return begin(upload, name, method, target)[2:]

    def begin(upload: dict | None, name: str, method: str, target: int = PREDICTED):
        """After a new image or model: the methods and classes to choose from, then what `explain` returns."""
        nothing = gr.skip(), gr.skip(), "", gr.Button(interactive=False), ""
        if upload is None:
            return nothing
        try:
            asked = question(upload, name, method, target)
        except ImageError:  # the tab says so already
            return nothing
        labels = asked.network.label_names
        choices = (
            gr.Dropdown(method_choices(asked.methods), value=asked.method),
            gr.Dropdown(class_choices(labels), value=target),
        )
        try:
            values = asked.attribution()[0].numpy()
        except ValueError as error:
            return *choices, _problem(f"{_sentence(asked.method)} is not defined here: {error}"), *nothing[3:]
        crop = preprocessing.center_crop(asked.network, asked.recorded.image)
        probability = float(asked.recorded.probabilities[asked.index])
        html = figure(values, crop, asked.method, labels[asked.index], probability)
        return *choices, html, gr.Button(interactive=True), ""

    def measure(upload: dict | None, name: str, method: str, target: int) -> Iterator[str]:
        try:
            yield from measurements(question(upload, name, method, target))
        except ImageError as error:
            yield _problem(error.message)
        except ValueError as error:
            yield _problem(f"This cannot be measured: {error}")

    names = checkpoints.configs[model.value]["label_names"] if model.value else []
    with gr.Column(elem_classes="vca-attribution"):
        gr.HTML("<h3>What speaks for a class, and what against it</h3>")
        with gr.Row():
            method = gr.Dropdown(
                method_choices(METHODS),
                value=next(iter(METHODS)),
                label="Method, or the map of one head",
                min_width=220,
            )
            target = gr.Dropdown(class_choices(names), value=PREDICTED, label="Class", min_width=160)
        shown = gr.HTML("", min_height=24)
        button = gr.Button("Measure faithfulness", interactive=False)
        measured = gr.HTML("")
    inputs = [image, model, method, target]
    measuring = button.click(
        measure, inputs, measured, preprocess=False, show_progress="hidden", api_visibility="private"
    )
    options = dict(
        preprocess=False,
        show_progress="minimal",
        show_progress_on=shown,
        trigger_mode="always_last",
        api_visibility="private",
        cancels=measuring,
    )
    gr.on(
        [image.change, model.change, context.page.load],
        begin,
        inputs[:3],
        [method, target, shown, button, measured],
        **options,
    )
    gr.on([method.input, target.input], explain, inputs, [shown, button, measured], **options)


def speaks_of_class(method: str) -> bool:
    """Whether a method's map depends on the class; of attention alone, by rollout or of one head, none does."""
    return method in METHODS and METHODS[method] is not rollout


def method_choices(methods: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs of the name that a visitor sees and the name of the method."""
    return [(_sentence(name), name) for name in methods]


def class_choices(names: list[str]) -> list[tuple[str, int]]:
    """Pairs of label and index; the first stands for the predicted class."""
    return [("the predicted class", PREDICTED), *((label, index) for index, label in enumerate(names))]


def methods_of(maps: list) -> dict[str, Method]:
    """All methods of `vca.attribution`, and the effective map of each head."""
    heads = {
        f"block {layer.block + 1}, head {head + 1}": partial(head_map, block=layer.block, head=head)
        for layer in maps
        for head in range(layer.stage1.positive.shape[1])
    }
    return METHODS | heads


def figure(values: np.ndarray, crop: Image.Image, method: str, label: str, probability: float) -> str:
    """HTML of an attribution (H, W) over the picture, with a colour bar and its numbers."""
    limit = np.abs(values).max()
    photo = drawing.data_url(drawing.muted(crop.resize((360 * crop.width // crop.height, 360))), "JPEG")
    if speaks_of_class(method):
        words = f"{escape(_sentence(method))} for {escape(label)} ({probability:.1%})"
        plus, minus = "speaks for it", "speaks against it"
    else:
        words = f"{escape(_sentence(method))}: attention, the same whichever class is asked for"
        plus, minus = "drawn in", "pushed away"
    alt = f"{words}: from {values.min():+.3g} to {values.max():+.3g} a pixel"
    return f"""<figure class="vca-attribution-figure">
        <img src="{drawing.data_url(drawing.overlay(values), "PNG")}" alt="{alt}"
            style="--photo:url({photo}); --aspect:{crop.width / crop.height:.4f}">
        <figcaption><p><b>{words}</b></p>
        <p><b class="vca-positive">{plus}</b> <b class="vca-negative">{minus}</b></p>
        <div class="vca-bar" aria-hidden="true"></div>
        <div class="vca-bar-numbers"><span>−{limit:.2g}</span><span>0</span><span>{limit:+.2g}</span></div>
        <p>The numbers are per pixel. Whether the model relies on what is marked can be measured:</p>
        </figcaption></figure>"""


def measurements(question: Question) -> Iterator[str]:
    """HTML with a progress bar while the measures are computed, and at the end HTML with all of them."""
    found: dict[str, Curves] = {}
    network, x, classes, name = question.network, question.recorded.x, question.classes, question.method
    values = question.attribution()
    maps = {name: values} | {RANDOM + f" {i}": random_map(x, i) for i in range(ORDERS)}
    maps |= {key: baseline(x) for key, baseline in BASELINES.items()}
    parts = len(maps) + 2
    for done, (key, attribution) in enumerate(maps.items()):
        yield _progress(done, parts, f"Removing and restoring cells in the order of: {key}")
        with heavy_work():
            found |= curves(network, x, classes, {key: attribution}, STEPS)
    yield _progress(parts - 2, parts, "Infidelity")
    with heavy_work():
        unfaithful = infidelity(network, x, classes, values, INFIDELITY_DRAWS).item()
    yield _progress(parts - 1, parts, "Sensitivity")
    with heavy_work():
        unstable = sensitivity(network, x, classes, question.methods[name], SENSITIVITY_DRAWS).item()
    yield report(name, found, cell_size(network, x), unfaithful, unstable)


def report(name: str, found: dict[str, Curves], cell: tuple[int, int], unfaithful: float, unstable: float) -> str:
    """HTML with both plots, a table of their areas, which is also the legend, and Captum's measures."""
    orders = [found[key] for key in found if key.startswith(RANDOM)]
    lines = {name: found[name]} | {key: found[key] for key in BASELINES}
    plots = "".join(plot(kind, lines, orders) for kind in ("deletion", "insertion"))

    def row(key: str, areas: list[str]) -> str:
        sample = f"<svg viewBox='0 0 28 8' aria-hidden='true'><path class='{_style(key)}' d='M0 4H28'/></svg>"
        return f"<tr><th>{sample}{escape(key)}</th>{''.join(f'<td>{area}</td>' for area in areas)}</tr>"

    rows = [row(k, [f"{c.deletion_area.item():.3f}", f"{c.insertion_area.item():.3f}"]) for k, c in lines.items()]
    spread = []
    for kind in ("deletion_area", "insertion_area"):
        areas = torch.cat([getattr(curve, kind) for curve in orders])
        spread.append(f"{areas.mean():.3f} ± {areas.std():.3f}")
    rows.insert(1, row(RANDOM, spread))
    steps = len(orders[0].fractions) - 1
    said = escape(verdict(name, found))
    return f"""<div class="vca-faithfulness"><div class="vca-plots">{plots}</div>
        <p class="vca-verdict"><b>{said}</b></p>
        <table><thead><tr><th>order of the cells</th><th>deletion area</th><th>insertion area</th></tr></thead>
        <tbody>{"".join(rows)}</tbody></table>
        <p>Deletion: cells give way to the image's mean colour, the most important first; a faithful order has a
        <b>small</b> area. Insertion: they come back to the blurred image; a faithful order has a <b>large</b> area.
        Cells of {cell[0]}×{cell[1]} pixels in {steps} steps; {ORDERS} random orders, the band is one standard
        deviation.</p>
        <p>Infidelity <b>{unfaithful:.3g}</b> (squared logits, best scale; lower is better) · sensitivity
        <b>{unstable:.3g}</b> (largest relative change under ±0.02 of noise; lower is steadier).</p></div>"""


def verdict(name: str, found: dict[str, Curves]) -> str:
    """What the curves say of an attribution, in a sentence: whether it beats chance, and what ignores the model.

    It beats chance where its area is better than that of random orders by two standard deviations.
    """
    curve = found[name]
    probability = float(curve.deletion[0, 0])
    if probability < LEAST_PROBABILITY:
        return f"The model gives this class {probability:.1%} to begin with: these curves can show nothing of it."
    gains, priors = {}, []
    for kind, sign in (("deletion", -1), ("insertion", 1)):
        random = torch.stack([getattr(c, f"{kind}_area") for key, c in found.items() if key.startswith(RANDOM)])
        area = sign * float(getattr(curve, f"{kind}_area"))
        gains[kind] = area > sign * float(random.mean()) + 2 * float(random.std())
        priors += [p for p in BASELINES if sign * float(getattr(found[p], f"{kind}_area")) >= area and p not in priors]
    faithful = [kind for kind, is_better in gains.items() if is_better]
    if not faithful:
        return "No better than a random order: the model does not rely on what is marked more than on the rest."
    by = "both curves" if len(faithful) == 2 else f"{faithful[0]} alone"
    said = f"Better than a random order by {by}: the model relies on what is marked"
    if not priors:
        return f"{said}."
    same = f"the {' and the '.join(priors)}, which know{'s' * (len(priors) == 1)} nothing of the model"
    return f"{said}; yet {same}, do{'es' * (len(priors) == 1)} as well or better by a curve."


def plot(kind: str, lines: dict[str, Curves], orders: list[Curves]) -> str:
    """SVG of one kind of curve, for the first image: the probability over the fraction of cells that is exchanged."""

    def x(fraction: float) -> float:
        return LEFT + fraction * (WIDTH - LEFT - 8)

    def y(probability: float) -> float:
        return 8 + (1 - probability) * (HEIGHT - BOTTOM - 8)

    def path(fractions: Tensor, values: Tensor) -> str:
        return "M" + "L".join(
            f"{x(f):.1f} {y(v):.1f}" for f, v in zip(fractions.tolist(), values.tolist(), strict=True)
        )

    fractions = orders[0].fractions
    random = torch.cat([getattr(curve, kind) for curve in orders])
    mean, spread = random.mean(0), random.std(0)
    band = path(fractions, (mean + spread).clamp(max=1)) + path(
        fractions.flip(0), (mean - spread).clamp(min=0).flip(0)
    ).replace("M", "L")
    drawn = [f"<path class='vca-band' d='{band}Z'/>", f"<path class='{_style(RANDOM)}' d='{path(fractions, mean)}'/>"]
    for key, curve in reversed(lines.items()):
        drawn.append(f"<path class='{_style(key)}' d='{path(curve.fractions, getattr(curve, kind)[0])}'/>")
    grid = "".join(
        f"<path class='vca-grid' d='M{x(0)} {y(v)}H{x(1)}'/><text x='{LEFT - 5}' y='{y(v) + 4}' text-anchor='end'>{v:g}"
        "</text>"
        for v in (0, 0.5, 1)
    )
    ticks = "".join(
        f"<text x='{x(f)}' y='{HEIGHT - BOTTOM + 15}' text-anchor='{anchor}'>{f:.0%}</text>"
        for f, anchor in ((0, "middle"), (0.5, "middle"), (1, "end"))
    )
    middle = (y(0) + y(1)) / 2
    grid += f"<text transform='translate(12 {middle}) rotate(-90)' text-anchor='middle'>probability of the class</text>"
    under = {"deletion": "cells removed", "insertion": "cells restored"}[kind]
    areas = ", ".join(f"{key} {getattr(curve, kind + '_area').item():.2f}" for key, curve in lines.items())
    return f"""<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" data-curve="{kind}"
        aria-label="{kind.capitalize()}: probability of the class. Areas: {escape(areas)}">
        {grid}{ticks}<text x="{x(0.5)}" y="{HEIGHT - 4}" text-anchor="middle">{kind}: {under}</text>
        {"".join(drawn)}</svg>"""


def _sentence(name: str) -> str:
    return name[0].upper() + name[1:]


def _style(key: str) -> str:
    return f"vca-line-{STYLES.get(key, 'method')}"


def _progress(done: int, parts: int, words: str) -> str:
    return f"""<div class="vca-progress" role="status"><progress value="{done}" max="{parts}" aria-label="Measuring">
        </progress><p>{escape(words)}</p></div>"""


def _problem(sentence: str) -> str:
    return f"<p class='vca-problem' role='alert'>{escape(sentence)}</p>"
