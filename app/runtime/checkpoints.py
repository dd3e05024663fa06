"""The models that the app serves."""

import copy
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import gradio as gr
from torch import nn

import vca
from app.runtime import loading
from app.runtime.store import Store
from vca.checkpoint import read_config
from vca.hub import fetch
from vca.models import task_of
from vca.models.dit import DiffusionTransformer

CACHE_BYTES = 4 * 2**30
FINER = (336, 518)  # image sizes, in pixels, at which a model for 224 px shows finer maps
AT_SIZE = re.compile(r"(.+) @ (\d+) px")


def model_bytes(model: nn.Module) -> int:
    """Bytes of the parameters of a model."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


class Checkpoints:
    """The models in `folder`, those of Hub repositories, and whatever else a visitor asks for.

    Each is loaded when it is first asked for.

    Args:
        repositories: Hub ids; downloaded now, unless the cache has them.
        limit: bytes of models that are kept loaded.

    Attributes:
        classifiers, generators: their names, those with VCA first, then by number of classes; the first is the default.
        finer: names of classifiers at a larger image size, such as "NAME @ 336 px".
        configs: the `config.json` of each.
        problems: what is wrong with each checkpoint that cannot be used.
    """

    def __init__(self, folder: Path, repositories: Sequence[str] = (), limit: int = CACHE_BYTES):
        self.folders = {file.parent.name: file.parent for file in folder.glob("*/config.json")}
        self.configs: dict[str, dict] = {}
        self.problems: list[str] = []
        for repository in repositories:
            try:
                self.folders[repository] = fetch(f"hf-hub:{repository}")
            except vca.CheckpointError as error:
                self.problems.append(str(error))
        for name, checkpoint in self.folders.items():
            try:
                self.configs[name] = read_config(checkpoint)
            except vca.CheckpointError as error:
                self.problems.append(str(error))
        self.classifiers = self._names_of("classification")
        self.generators = self._names_of("generation")
        self.finer = [f"{name} @ {side} px" for name in self.classifiers for side in self._finer_sizes(name)]
        self._models: Store[nn.Module] = Store(limit, model_bytes, "This model is too large to be kept here.")

    def _names_of(self, task: str) -> list[str]:
        names = [name for name, config in self.configs.items() if task_of(config["architecture"]) == task]

        def rank(name: str) -> tuple:
            return not name.split("/")[-1].startswith("vca"), -self.configs[name]["num_classes"], name

        return sorted(names, key=rank)

    def _finer_sizes(self, name: str) -> list[int]:
        """The sizes of FINER that a ViT for 224 px takes, in whole patches."""
        config = self.configs[name]
        patch = re.search(r"(?:vit|deit).*_patch(\d+)_224$", config["architecture"])
        fits = patch and config["pretrained_cfg"]["input_size"][-1] == 224
        return [side // int(patch[1]) * int(patch[1]) for side in FINER] if fits else []

    def load(self, name: str) -> nn.Module:
        """A classifier in evaluation mode: by its name here, by a folder or Hub id, or by what `keep` returned.

        A name of `finer` gives a copy of the classifier for that image size, with as many contrast tokens.

        Raises:
            gr.Error: there is none, or it is damaged; the message says which there are, or what is wrong.
        """
        if name in self.classifiers:
            folder = self.folders[name]
            return self._get(name, lambda: loading.open_folder(folder, str(folder)))
        if name in self.finer:
            own_size, side = AT_SIZE.fullmatch(name).groups()
            return self._get(name, lambda: _resized(self.load(own_size), int(side)))
        if not isinstance(name, str) or "/" not in name:
            known = ", ".join(self.classifiers) or "none yet"
            raise gr.Error(f"model must be one of: {known}; or a Hub id such as user/name.", print_exception=False)
        return self._get(name, lambda: loading.open_model(name))

    def load_generator(self, name: str) -> DiffusionTransformer:
        """The generator of a checkpoint, in evaluation mode.

        Raises:
            gr.Error: as `load`.
        """
        if name not in self.generators:
            known = ", ".join(self.generators) or "none yet"
            raise gr.Error(f"model must be one of: {known}.", print_exception=False)
        return self._get(name, lambda: vca.load(self.folders[name]))

    def keep(self, model: nn.Module) -> str:
        """Keeps a visitor's own model for a while; `load` finds it by what this returns, which nobody can guess."""
        return self._models.put(model, loading.UPLOADED)

    def _get(self, name: str, open_model: Callable[[], nn.Module]) -> nn.Module:
        try:
            return self._models.get_or_make(name, open_model)
        except vca.CheckpointError as error:
            raise gr.Error(str(error), print_exception=False) from error


def _resized(model: nn.Module, side: int) -> nn.Module:
    """A copy of a ViT for square images of that side."""
    resized = copy.deepcopy(model)
    resized.set_input_size(img_size=(side, side))
    resized.pretrained_cfg = resized.pretrained_cfg | dict(input_size=(3, side, side))
    return resized
