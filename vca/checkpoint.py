"""Checkpoints: a folder with `config.json`, `model.safetensors` and `README.md`.

Reading is strict. Nothing here returns a model whose weights did not all come from the file.
"""

import fcntl
import hashlib
import json
import os
import threading
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save as to_safetensors
from timm.utils import unwrap_model
from torch import Tensor, nn

from vca.config import (
    COMPUTED_IN,
    MOST_BYTES,
    PREPROCESSING_FIELDS,
    CheckpointError,
    check_config,
    fields_sha256,
    read_config,
    sealed,
)
from vca.layers.grid import OnGrid, check_token_grid
from vca.models import create_model, task_of
from vca.models.common import CLASSIFICATION, follow_input_size, input_size
from vca.models.dit import DiffusionTransformer

FILES = ("config.json", "model.safetensors", "README.md")
AUTOENCODER_FOLDER = "vae"  # of a generator that brings its own autoencoder
AUTOENCODER_FILES = tuple(
    f"{AUTOENCODER_FOLDER}/{name}" for name in ("config.json", "diffusion_pytorch_model.safetensors")
)
STORED_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PENDING = ".model.safetensors."  # and their sha256: weights that a config.json may state already
MOST_HEADER = 10_000_000
ATTEMPTS = 4  # at loading beside writers; they are kept waiting during the last one


def save(
    model: nn.Module,
    path: str | os.PathLike,
    *,
    label_names: list[str],
    training: list[dict] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes `config.json` and `model.safetensors` into a folder, as one: a load gives the old or the new checkpoint.

    That holds beside this call, and after a crash at any moment. Other files of the folder stay as they are; a card
    there may thus be of older weights until `training.card.write_card` writes the new one.

    Args:
        model: one of `vca.list_models()`, also within `torch.compile`, DataParallel or timm's moving average; a
            classifier's `pretrained_cfg` holds the preprocessing it was trained with.
        path: the folder, made if needed.
        label_names: one name per class, in order.
        training: what made these weights, oldest run first: recipe, command, results (JSON values).
        dtype: store floating-point tensors so; default as they are.

    Raises:
        ValueError: `load` would refuse it: the number of names is not that of the model's classes, the model was not
            made by `create_model`, a field is out of its range, a tensor, as stored, is NaN or infinite, or
            `set_input_size` has left it with fewer patches in a direction than contrast tokens.
    """
    model = unwrap_model(model)
    if not hasattr(model, "model_args"):
        raise ValueError(f"only models of vca.create_model can be saved, not this {type(model).__name__}.")
    if len(label_names) != model.num_classes:
        raise ValueError(f"{len(label_names)} label names for a model with {model.num_classes} classes.")
    tensors = {
        key.replace("_orig_mod.", ""): value.detach()
        .to("cpu", dtype if value.is_floating_point() else None)
        .contiguous()
        for key, value in model.state_dict().items()
    }
    if faults := [key for key, value in tensors.items() if not value.isfinite().all()]:
        raise ValueError(f"{faults[0]} holds NaN or infinite values as {tensors[faults[0]].dtype}; nothing was saved.")
    weights = to_safetensors(tensors, metadata={"format": "pt"})
    digest = hashlib.sha256(weights).hexdigest()
    described = _description(model, list(label_names), training or []) | dict(weights_sha256=digest)
    if any(value.is_floating_point() and value.dtype.itemsize < 4 for value in tensors.values()):
        described["dtype"] = COMPUTED_IN  # which transformers would take from the file
    description = sealed(described)
    folder = Path(path)
    check_config(json.loads(description), folder / "config.json")
    if len(description) > MOST_BYTES:
        raise ValueError("config.json would be larger than 1 MB; nothing was saved.")
    folder.mkdir(parents=True, exist_ok=True)
    with _one_writer(folder):
        pending = folder / (PENDING + digest)
        write_atomically(pending, weights)
        write_atomically(folder / "config.json", description)  # from here on the folder is the new checkpoint
        os.replace(pending, folder / "model.safetensors")
        for left in folder.glob(PENDING + "*"):  # by a save that was killed
            left.unlink()


def _description(model: nn.Module, label_names: list[str], training: list[dict]) -> dict:
    shared = dict(label_names=label_names, model_args=model.model_args, training=training)
    if isinstance(model, DiffusionTransformer):
        sampling = dict(sampling=model.sampling) if model.sampling else {}
        return dict(architecture=model.architecture, num_classes=model.num_classes, **shared, **sampling)
    follow_input_size(model)
    for layer in model.modules():
        if isinstance(layer, OnGrid):
            check_token_grid(layer.token_grid, layer.grid_size)
    return dict(
        architecture=model.pretrained_cfg["architecture"],
        num_classes=model.num_classes,
        num_features=model.num_features,
        global_pool=model.global_pool,
        **shared,
        pretrained_cfg={k: v for k, v in model.pretrained_cfg.items() if k in PREPROCESSING_FIELDS}
        | dict(num_classes=model.num_classes, custom_load=False),
    )


@contextmanager
def _one_writer(folder: Path) -> Iterator[None]:
    """Lets one process or thread at a time write into a checkpoint folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def write_config(folder: Path, config: dict) -> None:
    """Replaces the `config.json` of a checkpoint folder, of which other fields than the weights have changed."""
    with _one_writer(folder):
        write_atomically(folder / "config.json", sealed(config))


def load_folder(
    folder: Path, config: dict | None = None, check: Callable[[dict], None] = lambda config: None
) -> nn.Module:
    """The model of a checkpoint folder; `vca.load` without the Hub.

    Args:
        folder: it.
        config: what `read_config` has read there, if that has been done.
        check: is given the config before a model is built, and may refuse it.
    """
    config = read_config(folder) if config is None else config
    for attempt in range(ATTEMPTS):
        is_last = attempt == ATTEMPTS - 1
        with _one_writer(folder) if is_last else nullcontext():
            config = read_config(folder) if is_last else config
            stamp = _stamp(folder)
            check(config)
            model = _build(config, folder / "config.json")
            try:
                _fill_verified(model, folder, config.get("weights_sha256"))
                break
            except CheckpointError:
                newer = read_config(folder)
                if is_last or (newer == config and stamp == _stamp(folder)):
                    raise
                config = newer  # another process is saving
    if task_of(config["architecture"]) == CLASSIFICATION:
        if (stated := tuple(config["pretrained_cfg"]["input_size"])) != (takes := input_size(model)):
            raise CheckpointError(f"{folder / 'config.json'}: input_size is {stated}, but the model takes {takes}.")
        model.pretrained_cfg.update(config["pretrained_cfg"])
    if config.get("config_sha256", fields := fields_sha256(config)) != fields:
        raise CheckpointError(
            f"{folder / 'config.json'}: has been changed since it was saved, or is damaged. If the change is meant, "
            "remove its field config_sha256."
        )
    if getattr(model, "latent_decoder", None) and all((folder / name).is_file() for name in AUTOENCODER_FILES):
        model.latent_decoder.source = str((folder / AUTOENCODER_FILES[0]).parent)
    if "sampling" in config:
        model.sampling = config["sampling"]
    model.label_names = list(config["label_names"])
    model.training_history = config["training"]
    return model.eval()


def _stamp(folder: Path) -> tuple[int, int]:
    """Another one after every save into a folder."""
    stat = os.stat(folder / "config.json")
    return stat.st_ino, stat.st_mtime_ns


def _build(config: dict, file: Path) -> nn.Module:
    try:
        return create_model(config["architecture"], num_classes=config["num_classes"], **config["model_args"])
    except Exception as error:  # a wrong argument fails wherever the model first uses it
        raise CheckpointError(f"{file}: cannot build {config['architecture']}: {error}") from error


def _fill_verified(model: nn.Module, folder: Path, digest: str | None) -> None:
    """Fills a model with the weights of a folder that have this sha256, wherever a save that goes on has them now."""
    weights = folder / "model.safetensors"
    try:
        return load_weights(model, weights, digest=digest)
    except CheckpointError as error:
        for file in (folder / (PENDING + digest), weights) if digest else ():
            try:
                return load_weights(model, file, digest=digest)
            except CheckpointError:
                pass
        raise error


def load_weights(
    model: nn.Module,
    file: str | os.PathLike,
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
    digest: str | None = None,
) -> None:
    """Fills `model` with the tensors of a safetensors file; every key and shape must match, every value be finite.

    Args:
        model: the model.
        file: the file.
        convert: if the file's keys are not the model's, turns its tensors into those of the model.
        digest: the sha256 that the file must have.

    Raises:
        CheckpointError: as `load`. The model is then unchanged.
    """
    file = Path(file)
    with open_weights(file) as stored:
        tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
        if convert and tensors.keys() != model.state_dict().keys():
            try:
                tensors = convert(tensors)
            except Exception as error:  # written for other models, it fails wherever these differ
                raise CheckpointError(f"{file}: holds no tensors of this model ({error!r}).") from error
        _check(model, tensors, file)
        if digest and (found := sha256(file)) != digest:
            raise CheckpointError(
                f"{file}: its sha256 is {found[:16]}..., but config.json says {digest[:16]}...: the file is damaged or "
                "another checkpoint's."
            )
    model.load_state_dict(tensors, strict=True)


@contextmanager
def open_weights(file: Path) -> Iterator[safe_open]:
    """A safetensors file to read from.

    Raises:
        CheckpointError: it is not there or damaged, or was replaced meanwhile.
    """
    try:
        with open(file, "rb") as stream:
            if (header := int.from_bytes(stream.read(8), "little")) > MOST_HEADER:
                raise CheckpointError(f"{file}: not a complete safetensors file (a header of {header:,} bytes).")
            with safe_open(file, framework="pt") as stored:
                yield stored
            if not os.path.samestat(os.fstat(stream.fileno()), os.stat(file)):
                raise CheckpointError(f"{file}: was replaced while it was read.")
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        message = f"{file}: file not found; a checkpoint needs safetensors weights"
        if file.with_name("pytorch_model.bin").exists():
            message += ", and pytorch_model.bin is a pickle. timm writes both with safe_serialization='both'"
        raise CheckpointError(f"{message}.") from error
    except Exception as error:  # the reader has no error of its own for all that a damaged file may say
        raise CheckpointError(f"{file}: not a complete safetensors file ({error}).") from error


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
    _check(model, stored, file)
    model.load_state_dict(stored, strict=True)


def _check(model: nn.Module, tensors: dict[str, Tensor], file: Path) -> None:
    """Refuses tensors that are not exactly those of the model."""
    expected = model.state_dict()
    faults = [f"missing {key}" for key in expected.keys() - tensors.keys()]
    faults += [f"unexpected {key[:200]}" for key in tensors.keys() - expected.keys()]
    for key in expected.keys() & tensors.keys():
        given, wanted = tensors[key], expected[key]
        if given.shape != wanted.shape:
            faults.append(f"{key} is {tuple(given.shape)} instead of {tuple(wanted.shape)}")
        elif given.dtype != wanted.dtype and not {given.dtype, wanted.dtype}.issubset(STORED_TYPES):
            faults.append(f"{key} is stored as {given.dtype} instead of {wanted.dtype}")
        elif not given.isfinite().all():
            faults.append(f"{key} holds NaN or infinite values")
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise CheckpointError(f"{file}: {'; '.join(sorted(faults)[:5])}{more}.")


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
