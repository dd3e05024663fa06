"""Recipes: TOML files of flat keys, checked against a dataclass and overridden on the command line."""

import argparse
import dataclasses
import difflib
import tomllib
from pathlib import Path

FOLDER = Path(__file__).parent / "recipes"


class RecipeError(ValueError):
    """A recipe or an override that cannot be used; the message names the key and what is wrong."""


def key(default, text: str):
    """A recipe key with its default and a line of help."""
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata={"help": text})
    return dataclasses.field(default=default, metadata={"help": text})


def check_ranges(recipe, positive: tuple = (), not_negative: tuple = (), shares: tuple = ()) -> None:
    """Checks the numbers of a recipe by key: above 0, from 0 up, or in [0, 1); none may be infinite or NaN.

    Raises:
        ValueError: the message names the key and its range.
    """
    ranges = ((positive, "be positive"), (not_negative, "not be negative"), (shares, "lie in [0, 1)"))
    for names, rule in ranges:
        for name in names:
            value = getattr(recipe, name)
            fits = 0 <= value < (1 if names is shares else float("inf")) and (value > 0 or names is not positive)
            if not fits:
                raise ValueError(f"{name} = {value} must {rule}.")


def add_arguments(parser: argparse.ArgumentParser, kind: type) -> None:
    """Adds one option per recipe key, so that `--batch-size 64` overrides `batch_size`."""
    group = parser.add_argument_group("recipe overrides")
    for field in dataclasses.fields(kind):
        group.add_argument(f"--{field.name.replace('_', '-')}", metavar="VALUE", help=field.metadata.get("help"))


def read(name: str, kind: type, overrides: dict[str, str | None]):
    """The recipe `name` (a file of `training/recipes/`, or a path to a TOML file) as an instance of `kind`.

    Args:
        name: for example "cifar10_vca" or "my/recipe.toml".
        kind: dataclass with the known keys, their types and defaults.
        overrides: texts from the command line by key; None means not given.

    Raises:
        RecipeError: the file does not exist or is not TOML, a key is unknown, or a value has the wrong type or range.
    """
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError:
        known = sorted(p.stem for p in FOLDER.glob("*.toml"))
        raise RecipeError(
            f"no recipe {name!r}; there are {', '.join(known)}, or give a path ending in .toml."
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not valid TOML: {error}.") from None

    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key in values:
        if key not in fields:
            similar = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {similar[0]}?" if similar else f"known keys: {', '.join(fields)}."
            raise RecipeError(f"{path}: unknown key {key!r}; {hint}")
    for key, text in overrides.items():
        if key in fields and text is not None:
            values[key] = _parse(key, text, fields[key].type)
    for key, value in values.items():
        values[key] = _check(path, key, value, fields[key].type)
    for key, field in fields.items():
        if key not in values and field.default is field.default_factory is dataclasses.MISSING:
            raise RecipeError(f"{path}: key {key!r} is missing.")
    try:
        return kind(**values)
    except ValueError as error:
        raise RecipeError(f"{path}: {error}") from None


def _parse(key: str, text: str, kind: type):
    """A command-line text as TOML; a bare word is a string."""
    if kind is str:
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        raise RecipeError(f"--{key.replace('_', '-')} {text}: not a {kind.__name__}.") from None


def _check(path: Path, key: str, value, kind: type):
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise RecipeError(f"{path}: {key} = {value!r} must be of type {kind.__name__}, not {type(value).__name__}.")
    return value
