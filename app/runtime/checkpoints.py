"""The models that the app serves."""

import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from threading import Lock, Thread

from torch import nn

import vca
from app.runtime import loading, names
from app.runtime.store import Store
from app.runtime.validation import refused
from vca.checkpoint import read_config
from vca.hub import fetch
from vca.models import task_of
from vca.models.common import resized
from vca.models.dit import DiffusionTransformer

CACHE_BYTES = 2 * 2**30
PATIENCE = 60  # seconds that a visitor waits for a model of the Hub, before it is opened without them
FINER = (336, 518)  # image sizes, in pixels, at which a model for 224 px shows finer maps
MOST_LOST = 10  # points of accuracy, measured, that a larger image size may cost
NO_ATTENTION = "{} is a CNN and has no attention to show: it can be the second model of Compare, and is loaded there."
AT_SIZE = re.compile(r"(.+) @ (\d+) px")


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
        titles: what each is called on the page.
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
                self.problems.append(str(error).replace(str(checkpoint), name))
        self.classifiers = self._names_of("classification")
        self.generators = self._names_of("generation")
        self.finer = [f"{name} @ {side} px" for name in self.classifiers for side in self._finer_sizes(name)]
        self.titles = names.titles(self.configs)
        for finer in self.finer:
            own_size, side = AT_SIZE.fullmatch(finer).groups()
            self.titles[finer] = f"{self.titles[own_size]}, {side} px"
        self._models: Store[nn.Module] = Store(limit, loading.bytes_of, "This model is too large to be kept here.")
        self._opening: dict[str, Future] = {}
        self._lock = Lock()

    def title(self, name: str) -> str:
        """What a model is called on the page: one that is not served here, by its name."""
        return self.titles.get(name, name)

    def choices(self, names: Sequence[str]) -> list[tuple[str, str]]:
        """Models as a dropdown takes them: their titles, and their names as values."""
        return [(self.title(name), name) for name in names]

    def _names_of(self, task: str) -> list[str]:
        names = [name for name, config in self.configs.items() if task_of(config["architecture"]) == task]

        def rank(name: str) -> tuple:
            return not name.split("/")[-1].startswith("vca"), -self.configs[name]["num_classes"], name

        return sorted(names, key=rank)

    def _finer_sizes(self, name: str) -> list[int]:
        """The sizes of FINER at which this ViT for 224 px was measured to be nearly as accurate."""
        config = self.configs[name]
        patch = re.search(r"(?:vit|deit).*_patch(\d+)_224$", config["architecture"])
        if not patch or config["pretrained_cfg"]["input_size"][-1] != 224:
            return []
        try:
            measured = json.loads((self.folders[name] / "results.json").read_text(encoding="utf-8"))
            least = measured["results"]["val"]["top1"] - MOST_LOST
            reached = {int(side): result["top1"] for side, result in measured["by_size"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return []  # not measured
        sizes = (side // int(patch[1]) * int(patch[1]) for side in FINER)
        return [side for side in sizes if reached.get(side, 0) >= least]

    def load(self, name: str, *, cnn: bool = False) -> nn.Module:
        """A classifier in evaluation mode: by its name here, by a folder or Hub id, or by what `keep` returned.

        A name of `finer` gives a copy of the classifier for that image size, with as many contrast tokens.

        Args:
            name: the classifier.
            cnn: whether it may be a CNN.

        Raises:
            gr.Error: there is none, or it is damaged or a CNN, or the Hub takes long; the message says which there are,
                or what is wrong.
        """
        if name in self.classifiers:
            folder = self.folders[name]
            return self._get(name, lambda: loading.open_folder(folder, name))
        if name in self.finer:
            own_size, side = AT_SIZE.fullmatch(name).groups()
            return self._get(name, lambda: resized(self.load(own_size), int(side)))
        for waited in self.opening(name):
            if waited > PATIENCE:
                raise refused(f"{name}: the Hub takes long. It is still being loaded; please ask again in a minute.")
        model = self._get(name, lambda: loading.open_model(name))
        if not cnn and loading.is_cnn(model):
            uploaded = name.startswith(loading.UPLOADED)
            raise refused(NO_ATTENTION.format(model.pretrained_cfg["architecture"] if uploaded else name))
        return model

    def opening(self, name: str) -> Iterator[float]:
        """Opens a model that is not served here, beside whoever iterates: yields the seconds so far until it is done.

        Nobody else waits for it. Who stops iterating waits no longer; the model is still opened.

        Raises:
            gr.Error: as `load`.
        """
        if name in (*self.classifiers, *self.finer):
            self.load(name)
            return
        if not isinstance(name, str) or "/" not in name:
            known = ", ".join(self.classifiers) or "none yet"
            raise refused(f"model must be one of: {known}; or a Hub id such as user/name.")
        if name in self._models:
            return
        start = time.monotonic()
        future = self._start_opening(name)
        while not future.done():
            yield time.monotonic() - start
            time.sleep(0.1)
        try:
            future.result()
        except vca.CheckpointError as error:
            raise refused(str(error)) from error

    def _start_opening(self, name: str) -> Future:
        def work() -> None:
            try:
                self._models.get_or_make(name, lambda: loading.open_model(name))
                future.set_result(None)
            except Exception as error:  # raised again where the model was asked for
                future.set_exception(error)
            with self._lock:
                del self._opening[name]

        with self._lock:
            if name in self._opening:
                return self._opening[name]
            if len(self._opening) >= loading.OPENED_AT_ONCE:
                raise refused("Too many models are being loaded. Please try again in a minute.")
            future = self._opening[name] = Future()
        Thread(target=work, daemon=True).start()
        return future

    def load_generator(self, name: str) -> DiffusionTransformer:
        """The generator of a checkpoint, in evaluation mode.

        Raises:
            gr.Error: as `load`.
        """
        if name not in self.generators:
            raise refused(f"model must be one of: {', '.join(self.generators) or 'none yet'}.")
        return self._get(name, lambda: loading.open_generator(self.folders[name], name))

    def keep(self, model: nn.Module) -> str:
        """Keeps a visitor's own model for a while; `load` finds it by what this returns, which nobody can guess."""
        return self._models.put(model, loading.UPLOADED)

    def _get(self, name: str, open_model: Callable[[], nn.Module]) -> nn.Module:
        try:
            return self._models.get_or_make(name, open_model)
        except vca.CheckpointError as error:
            raise refused(str(error)) from error
