"""`config.json` of a checkpoint: read within bounds, and every field checked before anything is built from it.

It may be anybody's. What is refused is named by its field.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from math import floor
from pathlib import Path
from typing import Any

from vca.models import GENERATORS, is_classifier

CONFIG_FIELDS = {
    "architecture", "num_classes", "num_features", "global_pool", "label_names", "model_args", "pretrained_cfg",
    "training", "weights_sha256", "config_sha256", "dtype",
}  # fmt: skip
FIELD_TYPES = {
    "architecture": str, "num_classes": int, "label_names": list, "pretrained_cfg": dict, "model_args": dict,
    "training": list,
}  # fmt: skip
OPTIONAL_TYPES = {
    "num_features": int, "global_pool": str, "weights_sha256": str, "config_sha256": str, "dtype": str,
    "sampling": dict,
}  # fmt: skip
COMPUTED_IN = "float32"  # whatever the type of the stored weights
GENERATOR_FIELDS = CONFIG_FIELDS - {"num_features", "global_pool", "pretrained_cfg"} | {"sampling"}
SAMPLING_FIELDS = {"steps", "guidance_scale", "guidance_interval", "time_shift"}
PREPROCESSING_FIELDS = {
    "input_size", "fixed_input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std", "num_classes",
    "pool_size", "first_conv", "classifier", "custom_load",
}  # fmt: skip
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
CROP_MODES = ("center", "squash", "border")
TIMM_NOTES = {  # of `pretrained_cfg`: what timm also writes there, and nothing here depends on
    "tag", "license", "description", "origin_url", "paper_name", "paper_ids", "notes", "test_input_size",
    "test_crop_pct", "test_pool_size", "min_input_size", "label_names", "label_descriptions",
}  # fmt: skip
LOADING_ARGS = {
    "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_model_args", "checkpoint_path", "cache_dir",
}  # fmt: skip
MOST_BYTES = 1_000_000
MOST_CLASSES, LONGEST_LABEL = 100_000, 300
LARGEST_SIDE = 4096  # of an input, and of what is resized before the crop
SMALLEST_CROP, LARGEST_CROP = 0.1, 2
LARGEST_MEAN, SMALLEST_STD, LARGEST_STD = 1000, 1e-4, 1000
MOST_STEPS, LARGEST_GUIDANCE, LARGEST_SHIFT = 1000, 100, 100
MOST_LEVELS = 20
LARGEST_ARGUMENT, MOST_ARGUMENTS, MOST_BLOCKS = 4096, 256, 512
DEPTHS = ("depth", "depths", "layers", "block_config")  # what timm's families call the number of blocks


class CheckpointError(ValueError):
    """A checkpoint that cannot be trusted; the message names the file and what is wrong with it."""


def read_config(folder: str | os.PathLike) -> dict:
    """The `config.json` of a checkpoint folder, with every field checked.

    Raises:
        CheckpointError: it is not there, larger than 1 MB, no JSON object, or a field is missing, unknown, or of a
            wrong type, length or range.
    """
    file = Path(folder) / "config.json"
    return check_config(read_json(file), file)


def read_json(file: Path) -> dict:
    """The JSON object in a file of at most 1 MB.

    Raises:
        CheckpointError: as `read_config`, but for the fields.
    """
    try:
        with open(file, "rb") as stream:
            content = stream.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise CheckpointError(f"{file}: is larger than 1 MB.")
        config = json.loads(content.decode("utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: file not found.") from error
    except CheckpointError:
        raise
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointError(f"{file}: not a readable JSON file ({error}).") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file}: must hold a JSON object.")
    if _is_deep(config):
        raise CheckpointError(f"{file}: not a readable JSON file (it is nested more than {MOST_LEVELS} times).")
    return config


def check_config(config: dict, file: Path) -> dict:
    """A config as `vca.save` writes it, with its optional fields filled in; errors are those of `read_config`.

    One that timm wrote (`save_for_hf`, `push_to_hf_hub`) is translated first.
    """
    if "training" not in config:
        config = _from_timm(config, file)
    config = {"model_args": {}, "training": []} | config
    fields = GENERATOR_FIELDS if str(config.get("architecture")) in GENERATORS else CONFIG_FIELDS
    for field, kind in FIELD_TYPES.items():
        if field in fields and type(config.get(field)) is not kind:
            raise CheckpointError(f"{file}: field {field} is missing or not of type {kind.__name__}.")
    for field, kind in OPTIONAL_TYPES.items():
        if field in config and type(config[field]) is not kind:
            raise CheckpointError(f"{file}: field {field} is not of type {kind.__name__}.")
    if config.get("dtype", COMPUTED_IN) != COMPUTED_IN:
        raise CheckpointError(f"{file}: dtype must be {COMPUTED_IN}.")
    for where, given, known in (
        ("", config, fields),
        ("pretrained_cfg.", config.get("pretrained_cfg", {}), PREPROCESSING_FIELDS),
    ):
        if unknown := sorted(set(given) - known):
            raise CheckpointError(f"{file}: unknown field {where}{unknown[0][:100]}.")
    if fields is CONFIG_FIELDS:
        check_preprocessing(config["pretrained_cfg"], file)
    if not all(isinstance(run, dict) for run in config["training"]):
        raise CheckpointError(f"{file}: training must be a list of objects.")
    check_arguments(config["model_args"], file)
    if config["architecture"] not in GENERATORS and not is_classifier(config["architecture"]):
        architecture = config["architecture"][:100]
        raise CheckpointError(f"{file}: unknown architecture {architecture!r}; vca.list_models() names them.")
    if not 0 <= config["num_classes"] <= MOST_CLASSES:  # 0: features alone, without a head
        raise CheckpointError(f"{file}: num_classes must be from 0 to {MOST_CLASSES:,}.")
    check_sampling(config.get("sampling", {}), file)
    check_labels(config["label_names"], file)
    if len(config["label_names"]) != config["num_classes"]:
        raise CheckpointError(f"{file}: {len(config['label_names'])} label_names for {config['num_classes']} classes.")
    return config


def _from_timm(config: dict, file: Path) -> dict:
    """A config of timm's as `vca.save` would have written it. Classes without names are "0", "1", ...

    What timm repeats in `model_args` must agree; faults that `check_config` finds are left to it.
    """
    count = config.get("num_classes")
    if type(count) is not int or not 0 <= count <= MOST_CLASSES:
        return config
    translated = {key: value for key, value in config.items() if key != "label_descriptions"}
    stated, arguments = config.get("pretrained_cfg"), config.get("model_args")
    if isinstance(arguments, dict):
        if (repeated := arguments.get("num_classes", count)) != count:
            raise CheckpointError(f"{file}: num_classes is {count}, but model_args.num_classes {repeated!r}.")
        translated["model_args"] = {key: value for key, value in arguments.items() if key != "num_classes"}
    if isinstance(stated, dict):
        translated["pretrained_cfg"] = {key: value for key, value in stated.items() if key not in TIMM_NOTES}
    texts = (stated if isinstance(stated, dict) else {}) | config
    names, descriptions = texts.get("label_names") or {}, texts.get("label_descriptions")
    if isinstance(names, dict):  # class -> name, with gaps
        names = [names.get(str(index), str(index)) for index in range(count)]
    if isinstance(descriptions, dict) and isinstance(names, list) and all(isinstance(name, str) for name in names):
        names = [descriptions.get(name, name) for name in names]
    return translated | dict(label_names=names)


def check_labels(names: list, file: Path) -> None:
    """Refuses names of classes that are no texts of 1 to `LONGEST_LABEL` characters."""
    if not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{file}: label_names must be texts.")
    if not all(name.strip() and len(name) <= LONGEST_LABEL for name in names):
        raise CheckpointError(f"{file}: label_names must have from 1 to {LONGEST_LABEL} characters each.")


def check_sampling(fields: dict[str, Any], file: Path) -> None:
    """Refuses settings of a generator's sampling that it does not have or that take for ever."""
    interval: Any = fields.get("guidance_interval", [0, 1])
    listed = isinstance(interval, list) and len(interval) == 2 and all(map(_is_number, interval))
    steps, scale, shift = (fields.get(name, 1) for name in ("steps", "guidance_scale", "time_shift"))
    for field, fits, wanted in (
        ("steps", type(steps) is int and 1 <= steps <= MOST_STEPS, f"a whole number from 1 to {MOST_STEPS}"),
        ("guidance_scale", _is_number(scale) and 0 <= scale <= LARGEST_GUIDANCE, f"from 0 to {LARGEST_GUIDANCE}"),
        ("guidance_interval", listed and 0 <= interval[0] <= interval[1] <= 1, "two rising numbers from 0 to 1"),
        (
            "time_shift",
            _is_number(shift) and 1 / LARGEST_SHIFT <= shift <= LARGEST_SHIFT,
            f"near 1, to {LARGEST_SHIFT}",
        ),
    ):
        if not fits:
            raise CheckpointError(f"{file}: sampling.{field} = {repr(fields[field])[:100]} must be {wanted}.")
    if unknown := sorted(set(fields) - SAMPLING_FIELDS):
        raise CheckpointError(f"{file}: unknown field sampling.{unknown[0][:100]}.")


def check_preprocessing(fields: dict[str, Any], file: Path) -> None:
    """Refuses a preprocessing that fails, or takes much memory, for some image."""

    def refuse(field: str, wanted: str) -> None:
        shown = repr(fields.get(field))
        raise CheckpointError(f"{file}: pretrained_cfg.{field} = {shown[:100]} must be {wanted}.")

    size: Any = fields.get("input_size")
    whole = isinstance(size, list | tuple) and len(size) == 3 and all(type(side) is int for side in size)
    if not whole or not all(1 <= side <= LARGEST_SIDE for side in size):
        refuse("input_size", f"a list of fitting numbers: channels, height and width, from 1 to {LARGEST_SIDE}")
    for field, low, high in (("mean", -LARGEST_MEAN, LARGEST_MEAN), ("std", SMALLEST_STD, LARGEST_STD)):
        values: Any = fields.get(field)
        listed = isinstance(values, list | tuple) and len(values) in (3, size[0])
        if not listed or not all(_is_number(value) and low <= value <= high for value in values):
            refuse(field, f"a list of fitting numbers: one for each channel, from {low:g} to {high:g}")
    crop = fields.get("crop_pct")
    if crop is not None and not (_is_number(crop) and SMALLEST_CROP <= crop <= LARGEST_CROP):
        refuse("crop_pct", f"a number from {SMALLEST_CROP} to {LARGEST_CROP}")
    if crop is not None and floor(max(size[1:]) / crop) > LARGEST_SIDE:
        refuse("crop_pct", f"larger: images would be resized to more than {LARGEST_SIDE} px")
    for field, known in (("interpolation", INTERPOLATIONS), ("crop_mode", CROP_MODES)):
        if fields.get(field) is not None and fields[field] not in known:
            refuse(field, f"one of: {', '.join(known)}")
    for field in ("fixed_input_size", "custom_load"):
        if not isinstance(fields.get(field), bool | None):
            refuse(field, "true or false")
    for field in ("first_conv", "classifier", "pool_size"):
        if not isinstance(fields.get(field), str | list | tuple | None):
            refuse(field, "a text or a list")


def check_arguments(arguments: dict, file: Path) -> None:
    """Refuses arguments of a model that load weights from elsewhere, or build more than any model needs."""
    if loading := sorted(LOADING_ARGS.intersection(arguments)):
        raise CheckpointError(f"{file}: model_args.{loading[0]} would load weights from elsewhere.")
    for name, value in arguments.items():
        shown, values = f"model_args.{name[:100]}", list(_leaves(value)) if name != "num_classes" else []
        if len(values) > MOST_ARGUMENTS:
            raise CheckpointError(f"{file}: {shown} holds more than {MOST_ARGUMENTS} values.")
        numbers = [value for value in values if isinstance(value, int | float)]
        if not all(-LARGEST_ARGUMENT <= number <= LARGEST_ARGUMENT for number in numbers):
            raise CheckpointError(f"{file}: {shown} is larger than {LARGEST_ARGUMENT}.")
        if name in DEPTHS and sum(numbers) > MOST_BLOCKS:
            raise CheckpointError(f"{file}: {shown} asks for more than {MOST_BLOCKS} blocks.")


def _parts(value) -> list:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


def _leaves(value) -> Iterator:
    left = [value]
    while left:
        value = left.pop()
        left += _parts(value)
        if not isinstance(value, list | dict):
            yield value


def _is_deep(value) -> bool:
    level = [value]
    for _ in range(MOST_LEVELS):
        level = [part for value in level for part in _parts(value)]
    return bool(level)


def _is_number(value) -> bool:
    return type(value) in (int, float)


def sealed(config: dict) -> bytes:
    """The text of a `config.json`, with the checksum of its own fields as the last of them."""
    config = {key: value for key, value in config.items() if key != "config_sha256"}
    return json.dumps(config | dict(config_sha256=fields_sha256(config)), indent=2).encode()


def fields_sha256(config: dict) -> str:
    """sha256 of the fields of a config but for `config_sha256`, whatever their order and the space between them."""
    fields = {key: value for key, value in config.items() if key != "config_sha256"}
    return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
