"""From a reference to a ready classifier: a folder, a Hub id or an upload; ours, or a ViT, DeiT, Swin or CNN of timm's.

Every parameter of a model that leaves here came from its file.
"""

import re
import shutil
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from textwrap import shorten

import timm
import torch
import yaml
from huggingface_hub import get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import HFValidationError, HTTPError
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.models import is_model_in_modules, swin_transformer, vision_transformer
from timm.models.deit import VisionTransformerDistilled
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import vca
from app import settings
from app.runtime.folders import temporary_folder
from app.runtime.limits import heavy_work
from vca.checkpoint import load_folder, load_weights, open_weights
from vca.config import MOST_BYTES, check_arguments, check_config, check_labels, check_preprocessing, read_json
from vca.hub import REPO_ID, fetch
from vca.maps import attention_layers
from vca.models import BASELINES, list_models, task_of

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
TIMM_MODULES = {"vision_transformer", "deit", "swin_transformer"}
TIMM_FILTERS = {  # timm's own conversions from the names and layouts of older files
    VisionTransformer: partial(vision_transformer.checkpoint_filter_fn, adapt_layer_scale=True),
    VisionTransformerDistilled: vision_transformer.checkpoint_filter_fn,
    SwinTransformer: swin_transformer.checkpoint_filter_fn,
}
TIMM_CNNS = {"resnet", "resnetv2", "regnet", "convnext", "efficientnet", "mobilenetv3", "densenet"}
WHAT_LOADS = (
    "only classifiers of this project and ViT, DeiT and Swin models of timm can be shown, and as the second model of "
    "Compare CNNs such as ResNet and ConvNeXt"
)
UPLOADED = "upload:/"  # how the names of uploaded models begin
MODEL_BYTES = 2 * 2**30
UNPACKED_BYTES = 256 * 2**20
TABLE_BYTES = 128 * 2**20
MAP_BYTES = 512 * 2**20
GRADIENT_BYTES = 768 * 2**20
LARGEST_INPUT = 1024
OPENED_AT_ONCE = 8  # models of the Hub, for all visitors together
ARCHIVE_ENTRIES = 1000
ENTRY = b"PK\x01\x02"  # how an entry of the table of a zip file begins
FRONT_MATTER = re.compile(r"\s*---[ \t]*\r?\n(.{0,50000}?)\n---", re.DOTALL)


@dataclass(frozen=True)
class Card:
    """What a checkpoint's card and history say of it, as far as they do.

    Attributes:
        trained_on: its data set.
        top1: its accuracy, in percent.
        images_seen: the images that it was trained on, all runs and epochs together; not those of attention transfer.
    """

    trained_on: str | None = None
    top1: float | None = None
    images_seen: int | None = None


def open_model(reference: str) -> nn.Module:
    """A classifier by folder or by Hub id (`user/repo` or `hf-hub:user/repo`, either with `@revision`), ready to use.

    It has `label_names`, `pretrained_cfg` with its `architecture`, and `card`. It may be a CNN, see `is_cnn`.

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
    with temporary_folder("upload") as folder:
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
        if archive.read_bytes().count(ENTRY) > ARCHIVE_ENTRIES:
            raise vca.CheckpointError(f"{archive.name}: holds more than {ARCHIVE_ENTRIES} files.")
        with zipfile.ZipFile(archive) as stored:
            wanted = [i for i in stored.infolist() if Path(i.filename).name in (CONFIG, WEIGHTS, CARD)]
            home = {str(Path(i.filename).parent) for i in wanted if Path(i.filename).name == CONFIG}
            if len(home) > 1:
                raise vca.CheckpointError(f"{archive.name}: holds {len(home)} checkpoints; one is needed.")
            for item in (i for i in wanted if str(Path(i.filename).parent) in home):
                name = Path(item.filename).name
                if item.file_size > (limit := UNPACKED_BYTES if name == WEIGHTS else MOST_BYTES):
                    raise vca.CheckpointError(f"{archive.name}: unpacked, {name} is larger than {_size(limit)}.")
                with stored.open(item) as source, open(folder / name, "wb") as target:
                    shutil.copyfileobj(source, target)
    except vca.CheckpointError:
        raise
    except Exception as error:  # a damaged archive fails wherever its reader first trusts it
        raise vca.CheckpointError(f"{archive.name}: not a zip file that can be read ({_line(error)}).") from error


def open_folder(folder: Path, shown: str) -> nn.Module:
    """The classifier in a checkpoint folder; `shown` stands for the folder in messages.

    Raises:
        vca.CheckpointError: as `open_model`.
    """
    try:
        config = read_json(folder / CONFIG)
        if not isinstance(config.get("architecture"), str):
            raise vca.CheckpointError(f"{folder / CONFIG}: names no architecture; {WHAT_LOADS}.")
        load = _load_ours if _is_ours(config) else _load_timm
        with heavy_work():
            model = load(folder, config)
    except vca.CheckpointError as error:
        raise vca.CheckpointError(_line(str(error).replace(str(folder), shown), 400)) from error
    model.card = read_card(folder, getattr(model, "training_history", []))
    return model


def open_generator(folder: Path, shown: str) -> nn.Module:
    """The generator in a checkpoint folder, as `open_folder`."""
    try:
        return load_folder(folder)
    except vca.CheckpointError as error:
        raise vca.CheckpointError(_line(str(error).replace(str(folder), shown), 400)) from error


def _is_ours(config: dict) -> bool:
    """Was this written by `vca.save`? timm's own architectures may be in either format."""
    architecture = config["architecture"]
    return architecture in {*list_models()} - {*BASELINES} or ("training" in config)


def _load_ours(folder: Path, config: dict) -> nn.Module:
    def check(config: dict) -> None:
        if task_of(config["architecture"]) == "generation":
            raise vca.CheckpointError(f"{folder}: {config['architecture']} is a generator, not a classifier.")
        architecture, arguments = config["architecture"], config["model_args"]
        build = lambda: vca.create_model(architecture, num_classes=config["num_classes"], **arguments)  # noqa: E731
        _check_size(folder, architecture, build)

    return load_folder(folder, check_config(config, folder / CONFIG), check)


def _load_timm(folder: Path, config: dict) -> nn.Module:
    file, architecture = folder / CONFIG, config["architecture"]
    if not is_model_in_modules(architecture, TIMM_MODULES | TIMM_CNNS):
        raise vca.CheckpointError(f"{file}: {architecture[:100]} is not known; {WHAT_LOADS}.")
    if not isinstance(arguments := config.get("model_args", {}), dict):
        raise vca.CheckpointError(f"{file}: model_args must be an object.")
    check_arguments(arguments, file)

    def build() -> nn.Module:
        return timm.create_model(f"local-dir:{folder}")  # untrained: timm's own loading is not always strict

    _check_size(folder, architecture, build)
    model = build()
    convert = TIMM_FILTERS.get(type(model))
    load_weights(model, folder / WEIGHTS, convert=convert and partial(convert, model=model))
    model.pretrained_cfg["architecture"] = architecture
    model.label_names = _label_names(model)
    return model.eval()


def _check_size(folder: Path, architecture: str, build: Callable[[], nn.Module]) -> None:
    """Builds the model and its maps without memory, to learn their sizes and whether they can be shown at all."""
    file = folder / CONFIG
    stored = _elements(folder / WEIGHTS)
    try:
        with torch.device("meta"):
            model = build()
    except vca.CheckpointError:
        raise
    except Exception as error:  # a wrong argument fails wherever the model first uses it
        raise vca.CheckpointError(f"{file}: cannot build {architecture}: {_line(error)}") from error
    convolves = is_model_in_modules(architecture, TIMM_CNNS) and isinstance(getattr(model, "feature_info", None), list)
    if not hasattr(model, "model_args") and type(model) not in TIMM_FILTERS and not convolves:
        raise vca.CheckpointError(f"{file}: the model is a {type(model).__name__}; {WHAT_LOADS}.")
    if not model.num_classes:
        raise vca.CheckpointError(f"{file}: the model has no classes; only classifiers can be shown.")
    if not hasattr(model, "model_args"):
        _check_timm_config(model, file)
    channels, *_ = size = timm.data.resolve_data_config(model=model)["input_size"]
    if channels != 3:
        raise vca.CheckpointError(f"{file}: the model takes {channels} channels, but images here have 3.")
    if max(size) > LARGEST_INPUT:
        raise vca.CheckpointError(f"{file}: the model takes {size[1]}x{size[2]} px, the limit is {LARGEST_INPUT}.")
    needed = sum(tensor.numel() for tensor in model.state_dict().values())
    if (held := bytes_of(model)) > MODEL_BYTES:
        raise vca.CheckpointError(f"{folder}: the model takes {_size(held)}, the limit is {_size(MODEL_BYTES)}.")
    if stored < needed / 2:  # `load_weights` names what is missing, in memory
        raise vca.CheckpointError(f"{folder}: {WEIGHTS} holds {stored:,} values, but the model has {needed:,}.")
    if (tables := held - 4 * needed) > TABLE_BYTES:
        raise vca.CheckpointError(f"{folder}: the model takes {_size(tables)} beside its weights, which is too much.")
    try:
        if convolves:
            return _check_gradients(model.eval(), size, folder)
        with torch.device("meta"), torch.no_grad(), vca.record(model.eval()) as maps:
            model(torch.zeros(1, *size))
    except vca.CheckpointError:
        raise
    except Exception as error:
        raise vca.CheckpointError(f"{file}: the model cannot run at {size[1]}x{size[2]} ({_line(error)}).") from error
    tokens = [(m.stage1.positive.shape[1], m.stage1.positive.shape[-1]) for m in maps if m.window_size is None]
    whole = max((4 * heads * count**2 for heads, count in tokens), default=0)  # the effective map of a layer
    streams = [s for m in maps for stage in (m.stage1, m.stage2) if stage for s in (stage.positive, stage.negative)]
    if (taken := max(whole, sum(4 * s.numel() for s in streams if s is not None))) > MAP_BYTES:
        raise vca.CheckpointError(f"{folder}: its maps take {_size(taken)}, the limit is {_size(MAP_BYTES)}.")


def _check_gradients(model: nn.Module, size: tuple[int, int, int], folder: Path) -> None:
    """Runs a CNN without memory, to learn what a forward pass keeps for its gradient at most."""
    taken = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal taken
        taken += 0 if isinstance(tensor, nn.Parameter) else tensor.nbytes
        return tensor

    with torch.device("meta"), saved_tensors_hooks(count, lambda tensor: tensor):
        logits = model(torch.zeros(1, *size, requires_grad=True))
    if logits.shape != (1, model.num_classes):
        raise ValueError(f"it returns {tuple(logits.shape)}, not {model.num_classes} logits")
    if taken > GRADIENT_BYTES:
        raise vca.CheckpointError(f"{folder}: its gradient takes {_size(taken)}, the limit is {_size(GRADIENT_BYTES)}.")


def is_cnn(model: nn.Module) -> bool:
    """Whether a model that was opened here has no attention to show."""
    return not attention_layers(model)


def _check_timm_config(model: nn.Module, file: Path) -> None:
    config = model.pretrained_cfg
    check_preprocessing(config, file)
    if (names := config.get("label_names")) is not None:
        if not isinstance(names, list | tuple):
            raise vca.CheckpointError(f"{file}: label_names must be a list of texts.")
        check_labels(names, file)
        if len(names) != model.num_classes:
            raise vca.CheckpointError(f"{file}: {len(names)} label_names for {model.num_classes} classes.")
    descriptions = config.get("label_descriptions")
    check_labels(list(descriptions.values()) if isinstance(descriptions, dict) else [], file)


def bytes_of(model: nn.Module) -> int:
    """Bytes that a model holds, in its weights and in the tables that it computes for itself."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


def _elements(file: Path) -> int:
    """How many numbers a safetensors file holds, by its header."""
    with open_weights(file) as stored:
        shapes = [stored.get_slice(key).get_shape() for key in stored.keys()]  # noqa: SIM118
    return sum(torch.Size(shape).numel() for shape in shapes)


def _label_names(model: nn.Module) -> list[str]:
    """A short, distinct name for each class of a timm model: its own, ImageNet's, or its number."""
    count, config = model.num_classes, model.pretrained_cfg
    names, descriptions = config.get("label_names"), config.get("label_descriptions")
    if names is None:
        subset = infer_imagenet_subset(dict(num_classes=count))
        if subset is None:
            return [f"class {i}" for i in range(count)]
        names = ImageNetInfo(subset).label_names()
        descriptions = ImageNetInfo(subset).label_descriptions(as_dict=True)
    full = [descriptions.get(name, name) for name in names] if isinstance(descriptions, dict) else names
    short = [text.split(",")[0] for text in full]
    count_of = Counter(short)
    return [text if count_of[text] == 1 else f"{text} ({name})" for name, text in zip(names, short, strict=True)]


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases, by which a few bytes stand for gigabytes."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not read.")
        return super().compose_node(parent, index)


def _front_matter(file: Path) -> dict:
    """The metadata at the beginning of a card; nothing if there are none, or too many, or they are damaged."""
    try:
        with open(file, encoding="utf-8") as stream:
            found = FRONT_MATTER.match(stream.read(60_000))
        metadata = yaml.load(found[1], Loader=_PlainLoader) if found else {}
    except Exception:  # anybody's file
        return {}
    return metadata if isinstance(metadata, dict) else {}


def read_card(folder: Path, history: list[dict]) -> Card:
    """What the card (`README.md`) and the training history of a checkpoint say; neither has to be there."""
    metadata = _front_matter(folder / CARD)
    datasets = metadata.get("datasets")
    datasets = [datasets] if isinstance(datasets, str) else datasets if isinstance(datasets, list) else []
    last = history[-1] if history else {}
    stated = _at(metadata, "model-index", 0, "results", 0, "metrics")
    top1 = [m.get("value") for m in stated if isinstance(m, dict) and m.get("name") == "top-1"] if stated else []
    top1 = (top1 or [_at(last, "results", "top1")])[0]
    named = [name for name in [_at(last, "recipe", "dataset")] if isinstance(name, str)]
    named = named or [name for name in datasets if isinstance(name, str)]
    return Card(
        trained_on=shorten(", ".join(named), 200, placeholder=" ...") or None,
        top1=float(top1) if type(top1) in (int, float) and 0 <= top1 <= 100 else None,
        images_seen=_images_seen(history),
    )


def _images_seen(history: list[dict]) -> int | None:
    """Steps times images of a step over the runs that learned labels; None where a run does not say them."""
    runs = [run for run in _single_runs(history) if _at(run, "results", "error") is None]
    factors = [(_at(run, "steps"), _at(run, "recipe", "batch_size")) for run in runs]
    if not factors or any(type(number) is not int or not 0 < number < 2**40 for pair in factors for number in pair):
        return None
    return sum(steps * images for steps, images in factors)


def _single_runs(history: list[dict]) -> Iterator[dict]:
    """The runs, with those whose weights were averaged in place of their mean, each once."""
    for run in history:
        branches = _at(run, "averaged")
        lists = [branch for branch in branches if isinstance(branch, list)] if isinstance(branches, list) else [[run]]
        yield from (part for index, branch in enumerate(lists) if branch not in lists[:index] for part in branch)


def _at(value, *path):
    for key in path:
        try:
            value = value[key]
        except (LookupError, TypeError):
            return None
    return value


def _line(error: Exception | str, limit: int = 200) -> str:
    return shorten(str(error), limit, placeholder=" ...") or type(error).__name__


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GB" if count >= 2**30 else f"{count / 2**20:.0f} MB"
