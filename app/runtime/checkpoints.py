"""The models that the app serves."""

import secrets
from collections import OrderedDict
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from threading import Lock

import gradio as gr
from torch import nn

import vca
from app.runtime import loading
from vca.checkpoint import read_config
from vca.hub import fetch
from vca.models import CLASSIFIERS, GENERATORS
from vca.models.dit import DiffusionTransformer

CACHE_BYTES = 4 * 2**30


class ModelCache:
    """The models used last, at most `limit` bytes of parameters in all; each is opened once, however many ask."""

    def __init__(self, limit: int):
        self.limit = limit
        self._models: OrderedDict[str, nn.Module] = OrderedDict()
        self._opening = Lock()
        self._lock = Lock()

    def get(self, key: str, open_model: Callable[[], nn.Module]) -> nn.Module:
        """The model under `key`; opened if it is not there."""
        if (model := self._find(key)) is None:
            with self._opening:
                if (model := self._find(key)) is None:
                    self.put(key, model := open_model())
        return model

    def put(self, key: str, model: nn.Module) -> None:
        """Keeps a model, and forgets the longest unused others as needed."""
        with self._lock:
            self._models[key] = model
            while self.size() > self.limit and len(self._models) > 1:
                self._models.popitem(last=False)

    def _find(self, key: str) -> nn.Module | None:
        with self._lock:
            if key in self._models:
                self._models.move_to_end(key)
            return self._models.get(key)

    def size(self) -> int:
        """Bytes held."""
        return sum(p.numel() * p.element_size() for model in self._models.values() for p in model.parameters())


class Checkpoints:
    """The models in `folder`, those of Hub repositories, and whatever else a visitor asks for.

    Each is loaded when it is first asked for.

    Args:
        repositories: Hub ids; downloaded now, unless the cache has them.
        limit: bytes of models that are kept loaded.

    Attributes:
        classifiers, generators: their names, those with VCA first, then by number of classes; the first is the default.
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
        for name, place in self.folders.items():
            try:
                self.configs[name] = read_config(place)
            except vca.CheckpointError as error:
                self.problems.append(str(error))
        self.classifiers = self._names_of(CLASSIFIERS)
        self.generators = self._names_of(GENERATORS)
        self._models = ModelCache(limit)

    def _names_of(self, architectures: Container[str]) -> list[str]:
        names = [name for name, config in self.configs.items() if config["architecture"] in architectures]

        def rank(name: str) -> tuple:
            return not name.split("/")[-1].startswith("vca"), -self.configs[name]["num_classes"], name

        return sorted(names, key=rank)

    def load(self, name: str) -> nn.Module:
        """A classifier in evaluation mode: by its name here, by a folder or Hub id, or by what `keep` returned.

        Raises:
            gr.Error: there is none, or it is damaged; the message says which there are, or what is wrong.
        """
        if name in self.classifiers:
            folder = self.folders[name]
            return self._get(name, lambda: loading.open_folder(folder, str(folder)))
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
        name = loading.UPLOADED + secrets.token_urlsafe(24)
        self._models.put(name, model)
        return name

    def _get(self, name: str, open_model: Callable[[], nn.Module]) -> nn.Module:
        try:
            return self._models.get(name, open_model)
        except vca.CheckpointError as error:
            raise gr.Error(str(error), print_exception=False) from error
