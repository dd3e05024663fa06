"""From a reference to a ready classifier: a folder, a Hub id or an upload; ours, or a ViT, DeiT or Swin of timm's.

Every parameter of a model that leaves here came from its file.
"""

import json
import shutil
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import timm
import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url, metadata_load
from huggingface_hub.errors import HFValidationError, HTTPError
from safetensors import SafetensorError, safe_open
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.models import is_model_in_modules, swin_transformer, vision_transformer
from timm.models.deit import VisionTransformerDistilled
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import vca
from app import settings
from vca.checkpoint import load_folder, load_weights, open_weights
from vca.config import check_arguments, check_config, check_labels, check_preprocessing, read_json
from vca.hub import REPO_ID, fetch
from vca.models import BASELINES, CLASSIFIERS, GENERATORS

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
TIMM_MODULES = {"vision_transformer", "deit", "swin_transformer"}
TIMM_FILTERS = {  # timm's own conversions from the names and layouts of older files
    VisionTransformer: partial(vision_transformer.checkpoint_filter_fn, adapt_layer_scale=True),
    VisionTransformerDistilled: vision_transformer.checkpoint_filter_fn,
    SwinTransformer: swin_transformer.checkpoint_filter_fn,
}
WHAT_LOADS = "only classifiers of this project and ViT, DeiT and Swin models of timm can be shown"
UPLOADED = "upload:/"  # how the names of uploaded models begin
MODEL_BYTES = 2 * 2**30
MAP_BYTES = 2**30
LARGEST_ARGUMENT = 4096


@dataclass(frozen=True)
class Card:
    """What a checkpoint's card and history say of it, as far as they do."""

    trained_on: str | None = None
    top1: float | None = None


def open_model(reference: str) -> nn.Module:
    """A classifier by folder or by Hub id (`user/repo` or `hf-hub:user/repo`, either with `@revision`), ready to use.

    It has `label_names`, `pretrained_cfg` with its `architecture`, and `card`.

    Raises:
        vca.CheckpointError: it is none, or not to be trusted; the message is a sentence for the visitor.
    """
    if reference.startswith(UPLOADED):
        raise vca.CheckpointError("This uploaded model is no longer kept here; please upload it again.")
    if not settings.may_load(reference):
        raise vca.CheckpointError(
            f"{reference}: this page does not load it; please upload it, or ask who runs the page."
        )
    _check_download(reference)
    return open_folder(fetch(reference, token=False), reference)  # a visitor does not borrow the server's rights


def _check_download(reference: str) -> None:
    """Refuses a repository whose weights are too large, before they are downloaded."""
    match = REPO_ID.fullmatch(reference.removeprefix("hf-hub:"))
    if not match or Path(reference).is_dir():
        return
    try:
        url = hf_hub_url(match["repo"], WEIGHTS, revision=match["revision"])
        size = get_hf_file_metadata(url, token=False).size or 0
    except (HTTPError, OSError, HFValidationError):  # `fetch` looks in the cache, or says what is wrong
        return
    if size > MODEL_BYTES:
        raise vca.CheckpointError(f"{reference}: {WEIGHTS} has {_size(size)}, the limit is {_size(MODEL_BYTES)}.")


def open_upload(files: list[Path]) -> tuple[str, nn.Module]:
    """Name and model of what a visitor uploaded: `config.json` and `model.safetensors`, or a zip archive of these.

    Raises:
        vca.CheckpointError: as `open_model`.
    """
    with TemporaryDirectory(prefix="vca-upload-") as place:
        folder = Path(place)
        if len(files) == 1 and files[0].suffix.lower() == ".zip":
            _unzip(files[0], folder)
            name = files[0].stem
        else:
            for file in files:
                if file.name in (CONFIG, WEIGHTS, CARD):
                    shutil.copyfile(file, folder / file.name)
            name = None
        if missing := [file for file in (CONFIG, WEIGHTS) if not (folder / file).is_file()]:
            raise vca.CheckpointError(
                f"The upload has no {' and no '.join(missing)}: a model is config.json and model.safetensors, or a zip "
                "file of these."
            )
        model = open_folder(folder, "upload")
    return name or model.pretrained_cfg["architecture"], model


def _unzip(archive: Path, folder: Path) -> None:
    """Puts the files of the one checkpoint in an archive into a folder, whatever folder of the archive they are in."""
    try:
        with zipfile.ZipFile(archive) as stored:
            wanted = [i for i in stored.infolist() if Path(i.filename).name in (CONFIG, WEIGHTS, CARD)]
            home = {str(Path(i.filename).parent) for i in wanted if Path(i.filename).name == CONFIG}
            if len(home) > 1:
                raise vca.CheckpointError(f"{archive.name}: holds {len(home)} checkpoints; one is needed.")
            wanted = [i for i in wanted if str(Path(i.filename).parent) in home]
            if sum(i.file_size for i in wanted) > MODEL_BYTES:
                raise vca.CheckpointError(f"{archive.name}: unpacked it is larger than {_size(MODEL_BYTES)}.")
            for item in wanted:
                with stored.open(item) as source, open(folder / Path(item.filename).name, "wb") as target:
                    shutil.copyfileobj(source, target)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError) as error:
        raise vca.CheckpointError(f"{archive.name}: not a zip file that can be read ({error}).") from error


def open_folder(folder: Path, shown: str) -> nn.Module:
    """The classifier in a checkpoint folder; `shown` stands for the folder in messages.

    Raises:
        vca.CheckpointError: as `open_model`.
    """
    try:
        config = _config(folder)
        load = _load_ours if _is_ours(config) else _load_timm
        model = load(folder, config)
    except vca.CheckpointError as error:
        raise vca.CheckpointError(str(error).replace(str(folder), shown)) from error
    model.card = read_card(folder, getattr(model, "training_history", []))
    return model


def _config(folder: Path) -> dict:
    file = folder / CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise vca.CheckpointError(f"{file}: file not found.") from error
    except (ValueError, RecursionError, OSError) as error:
        raise vca.CheckpointError(f"{file}: not a readable JSON file ({error}).") from error
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        raise vca.CheckpointError(f"{file}: names no architecture; {WHAT_LOADS}.")
    arguments = config.get("model_args", {})
    if not isinstance(arguments, dict):
        raise vca.CheckpointError(f"{file}: model_args must be an object.")
    for name, value in arguments.items():
        if name != "num_classes" and any(number > LARGEST_ARGUMENT for number in _numbers(value)):
            raise vca.CheckpointError(f"{file}: model_args.{name} is larger than {LARGEST_ARGUMENT}.")
    return config


def _numbers(value) -> Iterator[float]:
    if isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _numbers(part)
    elif isinstance(value, int | float):
        yield value


def _is_ours(config: dict) -> bool:
    """Was this written by `vca.save`? timm's own architectures may be in either format."""
    architecture = config["architecture"]
    return architecture in {*CLASSIFIERS, *GENERATORS} - {*BASELINES} or ("training" in config)


def _load_ours(folder: Path, config: dict) -> nn.Module:
    config = read_config(folder)
    if config["architecture"] in GENERATORS:
        raise vca.CheckpointError(f"{folder}: {config['architecture']} is a generator, not a classifier.")
    arguments = dict(num_classes=config["num_classes"], **config["model_args"])
    _check_size(folder, config["architecture"], lambda: vca.create_model(config["architecture"], **arguments))
    return vca.load(folder)


def _load_timm(folder: Path, config: dict) -> nn.Module:
    file, architecture = folder / CONFIG, config["architecture"]
    if not is_model_in_modules(architecture, TIMM_MODULES):
        raise vca.CheckpointError(f"{file}: {architecture} is not known; {WHAT_LOADS}.")
    if loading := sorted(LOADING_ARGS.intersection(config.get("model_args", {}))):
        raise vca.CheckpointError(f"{file}: model_args.{loading[0]} would load weights from elsewhere.")

    def build() -> nn.Module:
        return timm.create_model(f"local-dir:{folder}")  # untrained: timm's own loading is not always strict

    _check_size(folder, architecture, build)
    model = build()
    load_weights(model, folder / WEIGHTS, convert=partial(TIMM_FILTERS[type(model)], model=model))
    model.pretrained_cfg["architecture"] = architecture
    model.label_names = _label_names(model)
    return model.eval()


def _check_size(folder: Path, architecture: str, build: Callable[[], nn.Module]) -> None:
    """Builds the model and its maps without memory, to learn their sizes and whether they can be shown at all."""
    file = folder / CONFIG
    try:
        with torch.device("meta"):
            model = build()
    except vca.CheckpointError:
        raise
    except Exception as error:  # a wrong argument fails wherever the model first uses it
        raise vca.CheckpointError(f"{file}: cannot build {architecture}: {_line(error)}") from error
    if not hasattr(model, "model_args") and type(model) not in TIMM_FILTERS:
        raise vca.CheckpointError(f"{file}: the model is a {type(model).__name__}; {WHAT_LOADS}.")
    if not model.num_classes:
        raise vca.CheckpointError(f"{file}: the model has no classes; only classifiers can be shown.")
    channels, *_ = size = timm.data.resolve_data_config(model=model)["input_size"]
    if channels != 3:
        raise vca.CheckpointError(f"{file}: the model takes {channels} channels, but images here have 3.")
    needed = sum(tensor.numel() for tensor in model.state_dict().values())
    if 4 * needed > MODEL_BYTES:
        raise vca.CheckpointError(f"{folder}: the model takes {_size(4 * needed)}, the limit is {_size(MODEL_BYTES)}.")
    if (stored := _elements(folder / WEIGHTS)) < needed / 2:  # `load_weights` names what is missing, in memory
        raise vca.CheckpointError(f"{folder}: {WEIGHTS} holds {stored:,} values, but the model has {needed:,}.")
    try:
        with torch.device("meta"), torch.no_grad(), vca.record(model.eval()) as maps:
            model(torch.zeros(1, *size))
    except Exception as error:
        raise vca.CheckpointError(f"{file}: the model cannot run at {size[1]}x{size[2]} ({_line(error)}).") from error
    streams = [s for m in maps for stage in (m.stage1, m.stage2) if stage for s in (stage.positive, stage.negative)]
    if (taken := sum(4 * s.numel() for s in streams if s is not None)) > MAP_BYTES:
        raise vca.CheckpointError(f"{folder}: its maps take {_size(taken)}, the limit is {_size(MAP_BYTES)}.")


def _elements(file: Path) -> int:
    """How many numbers a safetensors file holds, by its header."""
    try:
        with safe_open(file, framework="pt") as stored:
            shapes = [stored.get_slice(key).get_shape() for key in stored.keys()]  # noqa: SIM118
    except FileNotFoundError as error:
        raise vca.CheckpointError(f"{file}: file not found; a checkpoint needs safetensors weights.") from error
    except (SafetensorError, OSError) as error:
        raise vca.CheckpointError(f"{file}: not a complete safetensors file ({error}).") from error
    return sum(torch.Size(shape).numel() for shape in shapes)


def _label_names(model: nn.Module) -> list[str]:
    """A short, distinct name for each class of a timm model: its own, ImageNet's, or its number."""
    count, config = model.num_classes, model.pretrained_cfg
    names, descriptions = config.get("label_names"), config.get("label_descriptions")
    if not isinstance(names, list | tuple) or len(names) != count:
        subset = infer_imagenet_subset(dict(num_classes=count))
        if subset is None:
            return [f"class {i}" for i in range(count)]
        names = ImageNetInfo(subset).label_names()
        descriptions = ImageNetInfo(subset).label_descriptions(as_dict=True)
    names = list(map(str, names))
    full = [str(descriptions.get(name, name)) for name in names] if isinstance(descriptions, dict) else names
    short = [text.split(",")[0] for text in full]
    count_of = Counter(short)
    return [text if count_of[text] == 1 else f"{text} ({name})" for name, text in zip(names, short, strict=True)]


def read_card(folder: Path, history: list[dict]) -> Card:
    """What the card (`README.md`) and the training history of a checkpoint say; neither has to be there."""
    try:
        metadata = metadata_load(folder / CARD) or {}
    except Exception:  # anybody's file: damaged metadata say nothing
        metadata = {}
    datasets = metadata.get("datasets")
    datasets = [datasets] if isinstance(datasets, str) else datasets if isinstance(datasets, list) else []
    last = history[-1] if history else {}
    stated = _at(metadata, "model-index", 0, "results", 0, "metrics")
    top1 = [m.get("value") for m in stated if isinstance(m, dict) and m.get("name") == "top-1"] if stated else []
    top1 = (top1 or [_at(last, "results", "top1")])[0]
    return Card(
        trained_on=_at(last, "recipe", "dataset") or ", ".join(map(str, datasets)) or None,
        top1=float(top1) if isinstance(top1, int | float) else None,
    )


def _at(value, *path):
    for key in path:
        try:
            value = value[key]
        except (LookupError, TypeError):
            return None
    return value


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GB" if count >= 2**30 else f"{count / 2**20:.0f} MB"
