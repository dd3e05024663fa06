"""Checkpoints: a folder with `config.json`, `model.safetensors` and `README.md`.

Reading is strict. Nothing here returns a model whose weights did not all come from the file.
"""

import hashlib
import json
import os
import re
import threading
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from vca.models import CLASSIFIERS, GENERATORS, create_model
from vca.models.common import follow_input_size, input_size
from vca.models.dit import DiffusionTransformer

CONFIG_FIELDS = {
    "architecture", "num_classes", "num_features", "global_pool", "label_names", "model_args", "pretrained_cfg",
    "training",
}  # fmt: skip
FIELD_TYPES = {
    "architecture": str, "num_classes": int, "label_names": list, "pretrained_cfg": dict, "model_args": dict,
    "training": list,
}  # fmt: skip
GENERATOR_FIELDS = {"architecture", "num_classes", "label_names", "model_args", "training"}
PREPROCESSING_FIELDS = {
    "input_size", "fixed_input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std", "num_classes",
    "pool_size", "first_conv", "classifier", "custom_load",
}  # fmt: skip
PREPROCESSING_NUMBERS = {"input_size": 1, "mean": -1e9, "std": 1e-9}  # and the smallest value of each
LOADING_ARGS = {
    "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_model_args", "checkpoint_path", "cache_dir",
}  # fmt: skip
FILES = ("config.json", "model.safetensors", "README.md")
STATED_SHA256 = re.compile(r"`model\.safetensors`: [\d,]+ bytes, sha256 `([0-9a-f]{64})`")


class CheckpointError(ValueError):
    """A checkpoint that cannot be trusted; the message names the file and what is wrong with it."""


def save(
    model: nn.Module,
    path: str | os.PathLike,
    *,
    label_names: list[str],
    training: list[dict] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes `config.json` and `model.safetensors` into a folder, each atomically.

    A card there that states the sha256 of other weights is removed; `training.card.write_card` writes the new one.

    Args:
        model: one of `vca.list_models()`; a classifier's `pretrained_cfg` holds the preprocessing it was trained with.
        path: the folder, made if needed.
        label_names: one name per class, in order.
        training: what made these weights, oldest run first: recipe, command, results (JSON values).
        dtype: store floating-point tensors so; default as they are.

    Raises:
        ValueError: the number of names is not that of the model's classes, the model was not made by `create_model`, or
            a tensor, as stored, is NaN or infinite.
    """
    if len(label_names) != model.num_classes:
        raise ValueError(f"{len(label_names)} label names for a model with {model.num_classes} classes.")
    tensors = {
        key: value.detach().to("cpu", dtype if value.is_floating_point() else None).contiguous()
        for key, value in model.state_dict().items()
    }
    if faults := [key for key, value in tensors.items() if not value.isfinite().all()]:
        raise ValueError(f"{faults[0]} holds NaN or infinite values as {tensors[faults[0]].dtype}; nothing was saved.")
    if not hasattr(model, "model_args"):
        raise ValueError(f"only models of vca.create_model can be saved, not this {type(model).__name__}.")
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    if not isinstance(model, DiffusionTransformer):
        follow_input_size(model)
    shared = dict(label_names=list(label_names), model_args=model.model_args, training=training or [])
    if isinstance(model, DiffusionTransformer):
        config = dict(architecture=model.architecture, num_classes=model.num_classes, **shared)
    else:
        config = dict(
            architecture=model.pretrained_cfg["architecture"],
            num_classes=model.num_classes,
            num_features=model.num_features,
            global_pool=model.global_pool,
            **shared,
            pretrained_cfg={k: v for k, v in model.pretrained_cfg.items() if k in PREPROCESSING_FIELDS}
            | dict(num_classes=model.num_classes, custom_load=False),
        )
    description = json.dumps(config, indent=2).encode()
    weights = to_safetensors(tensors, metadata={"format": "pt"})
    write_atomically(folder / "model.safetensors", weights)
    if stated_sha256(folder) not in (None, hashlib.sha256(weights).hexdigest()):
        (folder / "README.md").unlink()
    write_atomically(folder / "config.json", description)


def read_config(folder: str | os.PathLike) -> dict:
    """The `config.json` of a checkpoint folder, with every field checked.

    Raises:
        CheckpointError: as `load`.
    """
    file = Path(folder) / "config.json"
    try:
        config: Any = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: file not found.") from error
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointError(f"{file}: not a readable JSON file ({error}).") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file}: must hold a JSON object.")
    config = {"model_args": {}, "training": [], **config}
    task_fields = GENERATOR_FIELDS if str(config.get("architecture")) in GENERATORS else CONFIG_FIELDS
    for field, kind in FIELD_TYPES.items():
        if field in task_fields and not isinstance(config.get(field), kind):
            raise CheckpointError(f"{file}: field {field} is missing or not of type {kind.__name__}.")
    for where, fields, known in (
        ("", config, task_fields),
        ("pretrained_cfg.", config.get("pretrained_cfg", {}), PREPROCESSING_FIELDS),
    ):
        if unknown := sorted(set(fields) - known):
            raise CheckpointError(f"{file}: unknown field {where}{unknown[0]}.")
    for field, low in PREPROCESSING_NUMBERS.items() if task_fields is CONFIG_FIELDS else ():
        values = config["pretrained_cfg"].get(field)
        if not isinstance(values, list) or not values or not all(_is_number(value, low) for value in values):
            raise CheckpointError(f"{file}: pretrained_cfg.{field} = {values!r} must be a list of fitting numbers.")
    if not all(isinstance(run, dict) for run in config["training"]):
        raise CheckpointError(f"{file}: training must be a list of objects.")
    if loading := sorted(LOADING_ARGS.intersection(config["model_args"])):
        raise CheckpointError(f"{file}: model_args.{loading[0]} would load weights from elsewhere.")
    if config["architecture"] not in {*CLASSIFIERS, *GENERATORS}:
        raise CheckpointError(f"{file}: unknown architecture {config['architecture']!r}; vca.list_models() names them.")
    if not all(isinstance(name, str) for name in config["label_names"]):
        raise CheckpointError(f"{file}: label_names must be texts.")
    if len(config["label_names"]) != config["num_classes"]:
        raise CheckpointError(f"{file}: {len(config['label_names'])} label_names for {config['num_classes']} classes.")
    return config


def _is_number(value, low: float) -> bool:
    return type(value) in (int, float) and low <= value < 1e9


def load_unverified(folder: Path) -> nn.Module:
    """`load` from a folder, but for the card."""
    config = read_config(folder)
    try:
        model = create_model(config["architecture"], num_classes=config["num_classes"], **config["model_args"])
    except Exception as error:  # a wrong argument fails wherever the model first uses it
        raise CheckpointError(f"{folder / 'config.json'}: cannot build {config['architecture']}: {error}") from error
    load_weights(model, folder / "model.safetensors")
    if config["architecture"] in CLASSIFIERS:
        if (stated := tuple(config["pretrained_cfg"]["input_size"])) != (takes := input_size(model)):
            raise CheckpointError(f"{folder / 'config.json'}: input_size is {stated}, but the model takes {takes}.")
        model.pretrained_cfg.update(config["pretrained_cfg"])
    model.label_names = list(config["label_names"])
    model.training_history = config["training"]
    return model.eval()


def load_weights(
    model: nn.Module, file: str | os.PathLike, convert: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None
) -> None:
    """Fills `model` with the tensors of a safetensors file; every key and shape must match, every value be finite.

    Args:
        model: the model.
        file: the file.
        convert: if the file's keys are not the model's, turns its tensors into those of the model.

    Raises:
        CheckpointError: as `load`. The model is then unchanged.
    """
    file = Path(file)
    try:
        with safe_open(file, framework="pt") as stored:
            tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: file not found; a checkpoint needs safetensors weights.") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a complete safetensors file ({error}).") from error
    if convert and tensors.keys() != model.state_dict().keys():
        try:
            tensors = convert(tensors)
        except Exception as error:  # written for other models, it fails wherever these differ
            raise CheckpointError(f"{file}: holds no tensors of this model ({error!r}).") from error
    _fill(model, tensors, file)


def load_official(model: nn.Module, file: str | os.PathLike) -> None:
    """Fills a generator with a `.pt` file of the official DiT or SiT repository, as strictly as `load_weights`.

    Args:
        model: the generator with self-attention of the same size, such as `vca.create_model("dit_xl_2")`.
        file: what was published, or a state of a training run, of which the EMA is taken.

    Raises:
        CheckpointError: as `load_weights`, or the file holds more than tensors and plain values.
    """
    file = Path(file)
    try:
        with torch.serialization.safe_globals([Namespace]):  # training states hold their command line
            stored = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: file not found.") from error
    except Exception as error:  # torch.load has no error of its own for what it cannot or must not read
        raise CheckpointError(f"{file}: not a checkpoint that can be read safely ({error}).") from error
    if isinstance(stored, dict):
        stored = stored.get("ema", stored)
    if not isinstance(stored, dict) or not all(isinstance(value, Tensor) for value in stored.values()):
        raise CheckpointError(f"{file}: must hold a dictionary of tensors, or one under 'ema'.")
    _fill(model, stored, file)


def _fill(model: nn.Module, tensors: dict[str, Tensor], file: Path) -> None:
    expected = model.state_dict()
    faults = [f"missing {key}" for key in expected.keys() - tensors.keys()]
    faults += [f"unexpected {key}" for key in tensors.keys() - expected.keys()]
    for key in expected.keys() & tensors.keys():
        if tensors[key].shape != expected[key].shape:
            faults.append(f"{key} is {tuple(tensors[key].shape)} instead of {tuple(expected[key].shape)}")
        elif not tensors[key].isfinite().all():
            faults.append(f"{key} holds NaN or infinite values")
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise CheckpointError(f"{file}: {'; '.join(sorted(faults)[:5])}{more}.")
    model.load_state_dict(tensors, strict=True)


def stated_sha256(folder: str | os.PathLike) -> str | None:
    """The sha256 of the weights according to the folder's card, if it has a card that states one."""
    try:
        found = STATED_SHA256.search((Path(folder) / "README.md").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return None
    return found and found[1]


def check_card(folder: Path) -> None:
    """Refuses weights that are not those of the folder's card. A folder without a card, or a card without, passes."""
    weights = folder / "model.safetensors"
    if (stated := stated_sha256(folder)) and stated != (found := sha256(weights)):
        raise CheckpointError(
            f"{weights}: its sha256 is {found[:16]}..., but {folder / 'README.md'} says {stated[:16]}...: the file is "
            "damaged, or the card is of other weights."
        )


def sha256(file: str | os.PathLike) -> str:
    """sha256 of a file, in hexadecimal."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def place(folder: str | os.PathLike) -> str:
    """What a checkpoint folder is called on its own card, such as `weights/NAME`."""
    return "/".join(Path(folder).resolve().parts[-2:])


def write_atomically(file: Path, content: bytes) -> None:
    """Replaces `file` so that a crash or a full disk leaves the old one or the new one, never a part."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with open(temporary, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
