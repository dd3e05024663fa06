"""Recipes: TOML files of flat keys, checked against a dataclass and overridden on the command line.

`base = "NAME"` takes over the keys of another recipe, so that a file states only what differs. NAME is a file beside it
or a recipe that ships, without `.toml`. Recipes ship in `training/recipes/ROOM/NAME.toml` and are called by NAME alone;
those of `training/recipes/base/` are no recipes of their own and are called `base/NAME`.
"""

import argparse
import dataclasses
import difflib
import tomllib
from dataclasses import MISSING
from pathlib import Path
from typing import ClassVar

from vca.layers.factory import AttentionConfig
from vca.models import GENERATORS, task_of

FOLDER = Path(__file__).parents[1] / "recipes"
AUTOENCODER = "AutoencoderKL"  # the class of diffusers that training.autoencoder trains
OPTIONS = (  # the keys that are options of an attention kind
    *(field.name for field in dataclasses.fields(AttentionConfig) if field.name not in ("attention", "token_grid")),
    "blocks",
)


class RecipeError(ValueError):
    """A recipe or an override that cannot be used; the message names the key and what is wrong."""


def key(default, text: str):
    """A recipe key with its default and a line of help."""
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata={"help": text})
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunRecipe:
    """The keys that every recipe has: how a run computes, saves and logs.

    Attributes:
        may_grow: keys of which a resumed run may have more, because no earlier step depends on them.
    """

    may_grow: ClassVar[frozenset] = frozenset()

    dataset: str = key("", "name of the data set, for the card")
    license: str = key("", "licence of the data set, for the card")
    clip_grad: float = key(0.0, "largest gradient norm; 0 for none")
    micro_batch: int = key(0, "samples in one forward pass of a process, accumulated to batch_size; 0 for all")
    precision: str = key("bf16", "bf16 or fp32")
    tf32: bool = key(True, "on NVIDIA GPUs: float32 products with inputs rounded to TF32")
    compile: bool = key(False, "torch.compile the model")
    stored_as: str = key("fp32", "fp32 or fp16: how the checkpoint stores the weights; results are of the stored ones")
    workers: int = key(2, "processes that read the images")
    seed: int = key(0, "seed of everything random")
    log_every: int = key(20, "steps between lines of the log")
    save_every: int = key(200, "steps between saved states")

    def check_shared(self) -> None:
        """Raises a ValueError if one of these keys is out of range."""
        check_ranges(
            self,
            positive=("batch_size", "lr", "log_every", "save_every"),
            not_negative=("clip_grad", "micro_batch", "workers", "seed"),
            shares=("ema_decay",),
        )
        if self.precision not in ("bf16", "fp32"):
            raise ValueError(f"precision = {self.precision!r} must be bf16 or fp32.")
        if self.stored_as not in ("fp32", "fp16"):
            raise ValueError(f"stored_as = {self.stored_as!r} must be fp32 or fp16.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseRecipe(RunRecipe):
    """The keys that the recipes of classifiers and generators have in common: what their attention is."""

    labeled: ClassVar[bool] = True  # whether its images have classes

    attention: str = key("", "attention kind, if not the model's own")
    tokens: str = key("", "contrast tokens: pool+emb, emb or pool; if not the model's own")
    num_tokens: int = key(0, "contrast tokens of a layer, a square; 0 for the model's own")
    dwc: bool = key(True, "the depthwise convolution beside the attention")
    stage2_softmax: str = key("", "separate or joint; if not the model's own")
    pooling: str = key("", "avg or learned; if not the model's own")
    blocks: list = key([], "of a ViT: blocks that have this attention, the others self-attention; empty for all")
    checkpointing: bool = key(False, "compute activations again in the backward pass instead of keeping them")
    origin: str = key("", "where the weights that it starts from come from, for the card")

    def model_args(self) -> dict:
        """The arguments of `vca.create_model` that this recipe sets."""
        names = [name for name in OPTIONS if name != "dwc"]
        chosen = {name: value for name in ("attention", *names) if (value := getattr(self, name))}
        return chosen | ({} if self.dwc else dict(dwc=False))

    @property
    def task(self) -> str:
        """What its model does: "classification" or "generation"."""
        return task_of(self.model)

    @property
    def latent(self) -> bool:
        """Whether its model works on the latents of an autoencoder."""
        return GENERATORS.get(self.model, {}).get("vae") is not None

    @property
    def passes(self) -> float:
        """What a step costs, in forward passes of the model."""
        return 4 if self.checkpointing else 3

    def relative_area(self, side: int) -> float:
        """Pixels of an image, on average over the steps, relative to a square of `side` pixels."""
        return 1.0

    def check_shared(self) -> None:
        super().check_shared()
        check_ranges(self, not_negative=("num_tokens",))


def defaults(kind: type) -> dict:
    """The default of every key that has one."""
    values = {field.name: field.default for field in dataclasses.fields(kind)}
    made = {f.name: f.default_factory() for f in dataclasses.fields(kind) if f.default_factory is not MISSING}
    return {name: value for name, value in values.items() if value is not MISSING} | made


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


def add_arguments(parser: argparse.ArgumentParser, *kinds: type) -> None:
    """Adds one option per recipe key of these kinds, so that `--batch-size 64` overrides `batch_size`."""
    group = parser.add_argument_group("recipe overrides")
    meanings = {}
    for field in (field for kind in kinds for field in dataclasses.fields(kind)):
        meanings.setdefault(field.name, {})[field.metadata.get("help") or ""] = None
    for name, texts in meanings.items():
        group.add_argument(f"--{name.replace('_', '-')}", metavar="VALUE", help="; or ".join(texts))


def read(name: str, kind: type, overrides: dict[str, str | None]):
    """The recipe `name` (one that ships, or a path to a TOML file) as an instance of `kind`.

    Args:
        name: for example "cifar10_vca" or "my/recipe.toml".
        kind: dataclass with the known keys, their types and defaults.
        overrides: texts from the command line by key; None means not given.

    Raises:
        RecipeError: the file does not exist or is not TOML, a key is unknown, or a value has the wrong type or range.
    """
    path = _file(name)
    values = _values(path, kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key, text in overrides.items():
        if key in fields and text is not None:
            values[key] = _parse(key, text, fields[key].type)
    for key, value in values.items():
        values[key] = _check(path, key, value, fields[key].type)
    for key, field in fields.items():
        if key not in values and field.default is field.default_factory is MISSING:
            raise RecipeError(f"{path}: key {key!r} is missing.")
    try:
        return kind(**values)
    except ValueError as error:
        raise RecipeError(f"{path}: {error}") from None


def _file(name: str) -> Path:
    return Path(name) if name.endswith(".toml") else shipped(name)


def _values(path: Path, kind: type | None = None, above: tuple[Path, ...] = ()) -> dict:
    """The keys of a file on top of those of its base; checked against those of `kind`, if it is given."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError:
        known = ", ".join(names())
        raise RecipeError(f"no recipe {path.stem!r}; there are {known}, or give a path ending in .toml.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not valid TOML: {error}.") from None
    base = values.pop("base", None)
    fields = [field.name for field in dataclasses.fields(kind)] if kind else list(values)
    for key in values:
        if key not in fields:
            similar = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {similar[0]}?" if similar else f"known keys: base, {', '.join(fields)}."
            raise RecipeError(f"{path}: unknown key {key!r}; {hint}")
    if base is None:
        return values
    candidates = [path.parent / f"{base}.toml", shipped(base)]
    file = next((file for file in candidates if file.is_file()), None)
    if file is None or file in (path, *above):
        raise RecipeError(f"{path}: base = {base!r} is no other recipe.")
    return _values(file, kind, (path, *above)) | values


def names() -> list[str]:
    """The names of the recipes that ship, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*/*.toml") if path.parent.name != "base")


def shipped(name: str) -> Path:
    """The file of a recipe that ships, in whatever room it is; of another name a file that does not exist."""
    path = FOLDER / f"{name}.toml"
    if "/" in name:
        return path
    return next((file for file in FOLDER.glob(f"*/{path.name}") if file.parent.name != "base"), path)


def task(name: str) -> str:
    """The command of a recipe, called as by `read`: "classify", "transfer", "generate" or "autoencoder".

    Raises:
        RecipeError: the file does not exist, is not TOML or names no model.
    """
    values = _values(_file(name))
    if values.get("model") == AUTOENCODER:
        return "autoencoder"
    try:
        if task_of(values.get("model")) == "generation":
            return "generate"
    except (TypeError, ValueError):  # also of what is no name at all
        raise RecipeError(f"{_file(name)}: model = {values.get('model')!r} is no model of vca.list_models().") from None
    return "transfer" if "img_sizes" in values and "steps" in values else "classify"


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
