"""The guided tour of the Classify tab: what a model did with one photo, in scenes of one sentence and one picture.

Every number in a sentence is the model's own. A scene that has no counterpart in a kind of attention is left out.
"""

import torch
from torch import nn

import vca
from app.runtime import records, thinking
from app.runtime.records import Recorded
from vca.attribution import readout

PATCH = "a square of the photo, and the token, a list of numbers, that the model makes of it"
WORDS = {
    "patch": PATCH,
    "block": "one of the model's layers, passed one after another: attention, then a small network for every token",
    "head": "one of several attentions that a block runs side by side, each with a view of its own",
    "contrast token": "the average of the queries of a cell of patches; a few of them stand in for all patches",
    "λ": "the learned factor of the second map, one for each stage of a block: D = A⁺ − λ A⁻",
    "row sum": "the sum of a map over all tokens: 1 for each of the two, and 1 − λ for their difference",
    "effective map": "both stages of a head in one: how much of every patch its output takes in, exactly",
    "logit lens": "the last layer's reading, applied after an earlier block: it was not trained for that",
}


def scenes(model: nn.Module, recorded: Recorded, block: int, head: int) -> list[dict]:
    """The scenes, as JSON values for the page: `id`, `title`, `text`, `words`, and what its picture is drawn from.

    Args:
        model: a classifier.
        recorded: the photo as it saw it.
        block: index of an attention layer that joins every two places of the grid.
        head: index of one of its heads.

    Raises:
        LookupError, ValueError: there is no such layer or head, or no row that the classifier reads.
    """
    layer = {layer.block: layer for layer in records.whole_grid(recorded.maps)}[block]
    if not 0 <= head < layer.stage1.positive.shape[1]:
        raise LookupError(head)
    best = model.label_names[int(recorded.probabilities.argmax())]
    place = f"head {head + 1} of block {block + 1}"
    found = [_patches(layer)]
    if layer.token_grid:
        found += _contrast(model, layer, head, place)
    else:
        reads = readout(model, layer)
        row = reads.effective(layer)[0, head].flatten()
        text = (
            f"In {place}, {reads.name} attends to {_peak(row, layer)}; this kind of attention has nothing to contrast."
        )
        found.append(_scene("attention", "Where it looks", text, ["block", "head"], values=row))
    if lens := thinking.lens(model, recorded):
        found.append(_lens(lens, best, place))
    return found


def _patches(layer: vca.LayerMaps) -> dict:
    rows, cols = layer.grid_size
    more = f" and {layer.num_prefix_tokens} more token{'s' * (layer.num_prefix_tokens > 1)}"
    text = (
        f"The model cuts the photo into {rows} × {cols} = {rows * cols} patches, and works on these"
        f"{more * bool(layer.num_prefix_tokens)} alone."
    )
    return _scene("patches", "Patches", text, ["patch"])


def _contrast(model: nn.Module, layer: vca.LayerMaps, head: int, place: str) -> list[dict]:
    """The scenes of attention through pooled tokens, for the token that what the classifier reads takes most from."""
    rows, cols = layer.token_grid
    reads = readout(model, layer)
    weights = layer.stage2.applied[0, head, reads.tokens].mean(0).abs()
    token = int(weights.argmax())
    pooled = (
        f"{place[0].upper()}{place[1:]} pools the patches' queries in {rows} × {cols} cells; of these {rows * cols} "
        f"contrast tokens, {reads.name} reads the marked one most."
    )
    drawn = dict(token=token)
    found = [_scene("tokens", "Contrast tokens", pooled, ["block", "head", "contrast token"], **drawn)]
    positive = layer.stage1.positive[0, head, token]
    prefix = layer.num_prefix_tokens
    first = f"With its first embedding added, the contrast token looks most at {_peak(positive[prefix:], layer)}."
    found.append(_scene("positive", "What the first stream looks for", first, [], values=positive[prefix:], **drawn))
    if layer.stage1.negative is None:
        return found
    negative = layer.stage1.negative[0, head, token]
    shared = float(torch.minimum(positive, negative).sum())
    second = (
        f"With the second embedding, the same cell looks most at {_peak(negative[prefix:], layer)}; "
        f"{shared:.0%} of the two maps is the same."
    )
    found.append(_scene("negative", "What the second stream looks for", second, [], values=negative[prefix:], **drawn))
    lam = float(layer.lambda1)
    if lam < 0:
        amount = _number(-lam)
        does = f"λ is {_number(lam)} here: negative, so the model learned to add {amount} of the second map"
    else:
        does = f"λ is {_number(lam)} here: the model takes {_number(lam)} of the second map off the first"
    total = float((positive - layer.lambda1 * negative).sum())
    text = f"{does}, so a row sums to 1 − λ = {_number(total)}. Drag to see what another λ would make of it."
    found.append(
        _scene(
            "subtraction", "Adding the two" if lam < 0 else "The subtraction", text, ["λ", "row sum"],
            values=positive[prefix:], second=negative[prefix:],
            applied=layer.stage1.applied[0, head, token, prefix:], own=lam, **drawn,
        )
    )  # fmt: skip
    return found


def _lens(lens: list[dict], best: str, place: str) -> dict:
    """The last scene. `place` is whose effective map is drawn beside the chart."""
    settled = len(lens)
    while settled > 1 and lens[settled - 2]["label"] == best:
        settled -= 1
    first = lens[0]
    if settled == 1:
        text = f"Read after every block, the answer is “{best}” from the first block on."
    else:
        text = (
            f"Read after block 1, the answer would be “{first['label']}” ({first['probability']:.0%}); “{best}” leads "
            f"from block {settled} of {len(lens)} on, and ends at {lens[-1]['answer']:.0%}."
        )
    return _scene("lens", "The answer, block by block", text, ["logit lens", "effective map"], chart=lens, place=place)


def _scene(id: str, title: str, text: str, words: list[str], values=None, second=None, applied=None, **drawn) -> dict:
    arrays = dict(values=values, second=second, applied=applied)
    packed = {name: thinking.packed(array) for name, array in arrays.items() if array is not None}
    return dict(id=id, title=title, text=text, words={word: WORDS[word] for word in words}, **packed, **drawn)


def _peak(row: torch.Tensor, layer: vca.LayerMaps) -> str:
    at = int(row.argmax())
    cols = layer.grid_size[1]
    return f"the patch in row {at // cols + 1}, column {at % cols + 1} ({_percent(float(row[at]))})"


def _percent(part: float) -> str:
    return f"{part:.0%}" if part >= 0.0995 else f"{part:.1%}"


def _number(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")
