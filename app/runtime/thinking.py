"""What the Classify tab shows of a photo: the answer, what every head draws in, and what would change the answer."""

import base64

import numpy as np
import torch
from torch import nn

import vca
from app.runtime import interventions, records
from app.runtime.limits import heavy_work
from app.runtime.records import Recorded
from vca import drawing, preprocessing
from vca.attribution import head_relevance, readout
from vca.interventions import changeable

TOP = 5
LEAST_SHOWN = 0.0005  # a class less likely than that is not listed: it would read "0.0 %"


def look(model: nn.Module, recorded: Recorded) -> dict:
    """The answer of a classifier and its maps, as JSON values for the page."""
    crop = preprocessing.center_crop(model, recorded.image)
    top = records.top_labels(model, recorded.probabilities, TOP)
    best = next(iter(top.values()))
    return dict(
        photo=drawing.data_url(crop, "JPEG"),
        grey=drawing.data_url(drawing.muted(crop), "JPEG"),
        top=[[label, p, p] for label, p in top.items() if p >= min(LEAST_SHOWN, best)],
        verdict=verdict(model, recorded),
        classes=model.num_classes,
        **_blocks(model, recorded.maps),
    )


def verdict(model: nn.Module, recorded: Recorded) -> str:
    """A sentence when the photo is probably of none of the model's classes; "" when it is, or nobody measured when.

    The checkpoint says by which score, from which threshold on, and how well that tells the two apart.
    """
    history = getattr(model, "training_history", [])
    try:
        measured = history[-1]["results"]["calibration"]["rejection"]
        score = dict(energy=recorded.energy, probability=float(recorded.probabilities.max()))[measured["score"]]
        threshold, kept = float(measured["threshold"]), float(measured["known_kept"])
        caught, auroc = float(measured["unknown_caught"]), float(measured["auroc"])
    except (LookupError, TypeError, ValueError):
        return ""
    if score >= threshold:
        return ""
    return (
        f"Probably none of the {model.num_classes} classes: the score, {score:.2f}, is below {threshold:.2f}, as for "
        f"{1 - kept:.0%} of photos of its classes and {caught:.0%} of others (AUROC {auroc:.2f})."
    )


def look_inside(model: nn.Module, recorded: Recorded) -> dict:
    """What takes further passes, as JSON values: how much each head adds to the answer, and the answer by block."""
    best = torch.tensor([int(recorded.probabilities.argmax())])
    with heavy_work():
        try:
            relevance = [layer[0].tolist() for layer in head_relevance(model, recorded.x, best)]
        except ValueError:  # windows
            relevance = None
    return dict(relevance=relevance, lens=lens(model, recorded))


@torch.inference_mode()
def lens(model: nn.Module, recorded: Recorded) -> list[dict] | None:
    """The likeliest label after every block, its probability and that of the answer; None of a pyramid."""
    best = int(recorded.probabilities.argmax())
    with heavy_work():
        try:
            by_block = vca.logit_lens(model, recorded.x)[:, 0].softmax(-1)
        except ValueError:
            return None
    labels = [model.label_names[int(p.argmax())] for p in by_block]
    return [
        dict(label=label, probability=float(p.max()), answer=float(p[best]))
        for label, p in zip(labels, by_block, strict=True)
    ]


def what_if(model: nn.Module, recorded: Recorded, change: dict, patches: list[int]) -> dict:
    """The answer before and after an intervention, and the maps of the changed model, as JSON values.

    Raises:
        gr.Error: as `interventions.changed` and `interventions.painted`.
    """
    with heavy_work(), interventions.changed(model, **change):
        after, maps = records.record(model, interventions.painted(model, recorded.x, patches))
    before = recorded.probabilities
    shown = dict.fromkeys([*np.argsort(-after)[:TOP], *np.argsort(-before)[:TOP]])
    listed = sorted(shown, key=lambda i: -after[i])
    top = [[model.label_names[i], float(before[i]), float(after[i])] for i in listed]
    return dict(top=[row for row in top if max(row[1:]) >= LEAST_SHOWN], **_blocks(model, maps))


def _blocks(model: nn.Module, maps: list[vca.LayerMaps]) -> dict:
    """The row that the classifier reads, of every head's effective map; or the reason in words why there is none."""
    layers = records.whole_grid(maps)
    if not layers:
        return dict(blocks=[], problem=records.NO_MAPS)
    changes = {block: changeable(layer) for block, (_, layer) in enumerate(vca.maps.attention_layers(model))}
    try:
        reads = [readout(model, layer) for layer in layers]
    except ValueError as error:
        return dict(blocks=[], problem=f"No maps of the decision: {error}")
    blocks = [
        dict(
            block=layer.block,
            kind=layer.kind,
            heads=layer.stage1.positive.shape[1],
            grid=layer.grid_size,
            tokens=layer.token_grid,
            lambdas=[None if value is None else float(value) for value in (layer.lambda1, layer.lambda2)],
            changeable=sorted(changes[layer.block]),
            rows=packed(reader.effective(layer)[0]),
        )
        for layer, reader in zip(layers, reads, strict=True)
    ]
    return dict(blocks=blocks, reader=reads[-1].name, problem="")


def packed(values: torch.Tensor) -> str:
    """Numbers as the page takes them: float32, little-endian, in base64."""
    return base64.b64encode(values.numpy().astype("<f4").tobytes()).decode()
