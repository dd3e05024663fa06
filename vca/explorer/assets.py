"""The text of scripts, styles and templates of a page, and ES modules with all that they import."""

import json
import re
from collections.abc import Sequence
from graphlib import TopologicalSorter
from pathlib import Path

IMPORT = re.compile(r'^import .* from "\./([\w.]+)";$', re.MULTILINE)
STATIC = Path(__file__).parent / "static"


def text(*names: str, folders: Sequence[Path] = (STATIC,)) -> str:
    """The text of files, one after another, each from the first of the folders that has it."""
    files = [next((folder / name for folder in folders if (folder / name).is_file()), STATIC / name) for name in names]
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


def modules(entry: str, folders: Sequence[Path] = (STATIC,)) -> list[tuple[str, str]]:
    """Name and source of an ES module and of all that it imports; imported ones come first.

    Raises:
        graphlib.CycleError: modules import each other in a circle.
    """
    sources: dict[str, str] = {}
    waiting = [entry]
    while waiting:
        if (name := waiting.pop()) not in sources:
            sources[name] = text(name, folders=folders)
            waiting += IMPORT.findall(sources[name])
    order = TopologicalSorter({name: IMPORT.findall(source) for name, source in sources.items()}).static_order()
    return [(name, sources[name]) for name in order]


def script(entry: str, folders: Sequence[Path] = (STATIC,)) -> str:
    """JavaScript that mounts an ES module: the body of a function (element, props, server, trigger, watch)."""
    sources = json.dumps(modules(entry, folders)).replace("<", "\\u003c")  # it may stand in a <script> of a page
    return f"const MODULES = {sources};\n{text('load.js')}"
