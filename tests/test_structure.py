"""The rooms of the project: who may import whom, and how large a file may be."""

import ast
import re

import pytest

from tests.helpers.imports import MODULES, ROOT, imports_of

FORBIDDEN = {
    "vca": ("training", "app", "benchmarks", "scripts", "tests"),
    "training": ("app", "benchmarks", "scripts", "tests"),
    "app": ("training", "benchmarks", "scripts", "tests"),
}
MOST_LINES = 400


IMPORTS = {module: imports_of(file) for module, file in MODULES.items()}


def circle_in(graph: dict[str, set[str]]) -> list[str]:
    """Some circle of a graph, or nothing."""
    done: set[str] = set()

    def walk(node: str, above: list[str]) -> list[str]:
        if node in above:
            return [*above[above.index(node) :], node]
        if node in done:
            return []
        for following in sorted(graph.get(node, ())):
            if circle := walk(following, [*above, node]):
                return circle
        done.add(node)
        return []

    return next((circle for node in graph if (circle := walk(node, []))), [])


def test_a_circle_is_found():
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle_in({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_no_imports_run_in_a_circle():
    assert {"training.core.trainer", "vca.functional", "app.ui"} <= IMPORTS.keys()
    assert "vca.layers.factory" in IMPORTS["vca.models.vit"] and "training.card" in IMPORTS["training.classify"]
    circle = circle_in(IMPORTS)
    assert not circle, " -> ".join(circle)


@pytest.mark.parametrize("package", FORBIDDEN)
def test_packages_keep_apart(package):
    wrong = {
        f"{module} -> {imported}"
        for module, found in IMPORTS.items()
        if module.split(".")[0] == package
        for imported in found
        if imported.split(".")[0] in FORBIDDEN[package]
    }
    assert not wrong


def test_no_test_module_is_imported():
    wrong = {
        f"{module} -> {imported}"
        for module, found in IMPORTS.items()
        for imported in found
        if imported.rpartition(".")[2].startswith(("test_", "conftest"))
    }
    assert not wrong


def test_no_file_is_long():
    files = [*MODULES.values(), *ROOT.glob("app/static/*.js"), *ROOT.glob("vca/explorer/static/*.js")]
    lengths = {file.relative_to(ROOT).as_posix(): len(file.read_text(encoding="utf-8").splitlines()) for file in files}
    assert not {name: length for name, length in lengths.items() if length > MOST_LINES}


def test_undocumented_parts_of_gradio_are_imported_in_one_file():
    found = {
        module
        for module, file in MODULES.items()
        if module.startswith("app.")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if (isinstance(node, ast.ImportFrom) and node.module.startswith("gradio."))
        or (isinstance(node, ast.Import) and any(alias.name.startswith("gradio.") for alias in node.names))
    }
    assert found == {"app.runtime.gradio_adapter"}


def test_tests_ask_apps_with_patience():
    """httpx, and gradio's client with it, waits five seconds, which an app on a busy machine may take."""
    asking = re.compile(r"httpx\.(get|post)\((?!.*timeout)|gradio_client import .*\bClient\b")
    found = {module for module, file in MODULES.items() if asking.search(file.read_text(encoding="utf-8"))}
    assert {module for module in found if module.startswith("tests.")} == {"tests.helpers.http"}
