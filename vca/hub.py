"""Checkpoints: a folder with `config.json`, `model.safetensors` and `README.md`, which is also a Hub repository.

Reading is strict. Nothing here returns a model whose weights did not all come from the file.
"""

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import nn

from vca.models import CLASSIFIERS, create_model

CONFIG_FIELDS = {
    "architecture", "num_classes", "num_features", "global_pool", "label_names", "model_args", "pretrained_cfg",
    "training",
}  # fmt: skip
PREPROCESSING_FIELDS = {
    "input_size", "fixed_input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std", "num_classes",
    "pool_size", "first_conv", "classifier", "custom_load",
}  # fmt: skip


class CheckpointError(ValueError):
    """A checkpoint that cannot be trusted; the message names the file and what is wrong with it."""


def load(path: str | os.PathLike, device: str | torch.device = "cpu") -> nn.Module:
    """Loads a trained model, in evaluation mode, from a checkpoint folder.

    The model carries `label_names` (a list of class names), `pretrained_cfg` (its preprocessing, for timm's
    `create_transform`) and `training_history` (what `save` was given as `training`).

    Raises:
        CheckpointError: a file is missing or damaged, a config field is unknown, or a tensor is missing, left over, of
            the wrong shape, NaN or infinite.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint folder.")
    config = _read_config(folder / "config.json")
    try:
        model = create_model(config["architecture"], num_classes=config["num_classes"], **config.get("model_args", {}))
    except Exception as error:  # a wrong argument fails wherever the model first uses it
        raise CheckpointError(f"{folder / 'config.json'}: cannot build {config['architecture']}: {error}") from error
    load_weights(model, folder / "model.safetensors")
    model.pretrained_cfg.update(config["pretrained_cfg"])
    model.label_names = list(config["label_names"])
    model.training_history = config.get("training", [])
    return model.to(device).eval()


def load_weights(model: nn.Module, file: str | os.PathLike) -> None:
    """Fills `model` with the tensors of a safetensors file; every key and shape must match, every value be finite.

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


def save(
    model: nn.Module,
    path: str | os.PathLike,
    *,
    label_names: list[str],
    training: list[dict] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes `config.json` and `model.safetensors` into a folder, each atomically.

    Args:
        model: one of `vca.list_models()`; `model.pretrained_cfg` holds the preprocessing it was trained with.
        path: the folder, made if needed.
        label_names: one class name per output, in order.
        training: what made these weights, oldest run first: recipe, command, results (JSON values).
        dtype: store floating-point tensors so; default as they are.

    Raises:
        ValueError: the number of names is not that of the model's classes.
    """
    if len(label_names) != model.num_classes:
        raise ValueError(f"{len(label_names)} label names for a model with {model.num_classes} classes.")
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    config = dict(
        architecture=model.pretrained_cfg["architecture"],
        num_classes=model.num_classes,
        num_features=model.num_features,
        global_pool=model.global_pool,
        label_names=list(label_names),
        model_args=model.model_args,
        training=training or [],
        pretrained_cfg={k: v for k, v in model.pretrained_cfg.items() if k in PREPROCESSING_FIELDS}
        | dict(num_classes=model.num_classes, custom_load=False),
    )
    tensors = {
        key: value.detach().to("cpu", dtype if value.is_floating_point() else None).contiguous()
        for key, value in model.state_dict().items()
    }
    write_atomically(folder / "model.safetensors", to_safetensors(tensors, metadata={"format": "pt"}))
    write_atomically(folder / "config.json", json.dumps(config, indent=2).encode())


def write_atomically(file: Path, content: bytes) -> None:
    """Replaces `file` so that a crash or a full disk leaves the old one or the new one, never a part."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def _read_config(file: Path) -> dict:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: file not found.") from error
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointError(f"{file}: not a readable JSON file ({error}).") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file}: must hold a JSON object.")
    required = {"architecture": str, "num_classes": int, "label_names": list, "pretrained_cfg": dict, "model_args": dict}
    for field, kind in required.items():
        if not isinstance(config.get(field), kind):
            raise CheckpointError(f"{file}: field {field} is missing or not of type {kind.__name__}.")
    for where, fields, known in (("", config, CONFIG_FIELDS), ("pretrained_cfg.", config["pretrained_cfg"], PREPROCESSING_FIELDS)):
        if unknown := sorted(set(fields) - known):
            raise CheckpointError(f"{file}: unknown field {where}{unknown[0]}.")
    if loading := sorted(LOADING_ARGS.intersection(config["model_args"])):
        raise CheckpointError(f"{file}: model_args.{loading[0]} is no property of a model.")
    if config["architecture"] not in CLASSIFIERS:
        raise CheckpointError(f"{file}: unknown architecture {config['architecture']!r}; vca.list_models() names them.")
    if len(config["label_names"]) != config["num_classes"]:
        raise CheckpointError(f"{file}: {len(config['label_names'])} label_names for {config['num_classes']} classes.")
    return config
