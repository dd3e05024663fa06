"""The documents: their commands are understood, their links lead somewhere, and their trees of files are the code's."""

import argparse
import dataclasses
import importlib
import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

from tests.helpers.imports import MODULES, ROOT, imports_of, module_of
from training.core import recipe as recipes
from training.core.autoencoder_recipe import AutoencoderRecipe
from training.core.classifier_recipe import ClassifierRecipe
from training.core.generator_recipe import GeneratorRecipe
from training.core.transfer_recipe import TransferRecipe
from vca import cli

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "weights/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
PROGRAMS = ("python", "torchrun", "make", "pip", "hf", "pre-commit", "export", "vca")
INLINE = re.compile(r"`((?:python|torchrun|make|pip|vca) [^`]+)`")
RECIPES = dict(
    autoencoder=AutoencoderRecipe, classify=ClassifierRecipe, generate=GeneratorRecipe, transfer=TransferRecipe
)


def commands_of(text: str) -> list[str]:
    """The commands of a page: indented lines, continued over line ends, and code within a sentence."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S).replace("\\\n", " ")
    variables, found = {}, []
    for line in re.findall(r"^    (\S.*)$", text, re.M) + INLINE.findall(text):
        line = re.sub(r"\$(\w+)", lambda match: variables[match[1]], line)
        if assigned := re.fullmatch(r'(\w+)="(.*)"', line):
            variables[assigned[1]] = assigned[2]
        else:
            found += line.split(" && ")
    return found


COMMANDS = [
    pytest.param(command, id=f"{page.stem}: {command[:60]}")
    for page in PAGES
    for command in dict.fromkeys(commands_of(page.read_text(encoding="utf-8")))
]


class Parsed(Exception):
    """Takes the place of running a command whose arguments were understood."""


def check_module(name: str, arguments: list[str], monkeypatch) -> None:
    """Lets `python -m name` read its arguments, and stops it there; a recipe and its overrides are read, too."""
    assert name in MODULES, f"there is no module {name}"
    source = MODULES[name].read_text(encoding="utf-8")
    if "..." in arguments or not re.search(r"parse_args\(|cli\.main\(", source):
        return
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, args=None, namespace=None):
        raise Parsed(parse(self, args, namespace))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(Parsed) as stopped:
        importlib.import_module(name).main()
    given = vars(stopped.value.args[0])
    if "recipe" in given:
        kind = RECIPES[recipes.task(given["recipe"])]
        recipes.read(given["recipe"], kind, {f.name: given.get(f.name) for f in dataclasses.fields(kind)})


def check(command: str, monkeypatch) -> None:
    words = shlex.split(command, comments=True)
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]) or words[0] == "compute-sanitizer":
        words = words[1:]
    program, *arguments = words
    program = program.removeprefix(".venv/bin/")
    assert program in PROGRAMS, f"{program} is no command of the documents"
    if program == "torchrun":
        launched = get_args_parser().parse_args(arguments)
        assert launched.module
        check_module(launched.training_script, launched.training_script_args, monkeypatch)
    elif program == "python" and arguments[:2] == ["-m", "pytest"]:
        assert all((ROOT / name).exists() for name in arguments[2:])
    elif program == "python" and arguments[0] == "-m":
        check_module(arguments[1], arguments[2:], monkeypatch)
    elif program == "python":
        assert (ROOT / arguments[0]).is_file()
    elif program == "vca":
        cli.parser().parse_args(arguments)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
        assert arguments[0] in targets
    elif program == "pip":
        assert arguments[0] == "install"
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        for extras in re.findall(r"^\.\[(.*)\]$", arguments[1]):
            assert set(extras.split(",")) <= project["optional-dependencies"].keys()
        assert arguments[1] != "-r" or (ROOT / arguments[2]).is_file()
    elif program == "export":
        assert all(re.fullmatch(r"[A-Z_]+=\S+", word) for word in arguments)
    else:
        assert (program, *arguments) in {("hf", "auth", "login"), ("pre-commit", "install")}


def test_commands_are_found():
    page = 'Run `make app`.\n\n    A=1 python x.py  # why\n    B="make"\n    $B \\\n  lint\n\n```text\n    no\n```\n'
    assert commands_of(page) == ["A=1 python x.py  # why", "make    lint", "make app"]
    assert len(COMMANDS) > 50


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_understood(command, monkeypatch):
    check(command, monkeypatch)


@pytest.mark.parametrize(
    "command",
    [
        "python -m training.classify cifar10_vca --dta FOLDER",
        "python -m training.classify cifar10_none --data FOLDER",
        "python -m training.classify cifar10_vca --data FOLDER --epochs many",
        "python -m training.none",
        "torchrun --nproc-per-node 8 -m training.generate cifar10_sit_vca --data FOLDER --guidance 2",
        "make none",
        "vca explain --photo x.jpg",
        'pip install ".[none]"',
        "rm -r weights",
    ],
)
def test_a_wrong_command_is_not_understood(command, monkeypatch):
    with pytest.raises((AssertionError, SystemExit, recipes.RecipeError, FileNotFoundError)):
        check(command, monkeypatch)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_files(page):
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    missing = [t for t in targets if not t.startswith("https://") and not (page.parent / t).exists()]
    assert not missing


def test_no_document_is_left_out_of_the_readme_and_its_pages():
    linked = {
        (page.parent / target).resolve()
        for page in PAGES
        for target in re.findall(r"\]\(([^)#\s]+\.md)", page.read_text(encoding="utf-8"))
    }
    assert set(PAGES) - linked == {ROOT / "README.md"}


ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def edges_of(tree: str) -> list[tuple[str, str]]:
    """(file above, indented file) of a drawn tree, two blanks for each step down."""
    above, found = [], []
    for blanks, file in re.findall(r"^( *)(\S+)", tree, re.M):
        above[len(blanks) // 2 :] = [file]
        if len(above) > 1:
            found.append((above[-2], above[-1]))
    return found


def brings_in(file: str, other: str) -> bool:
    """Whether a Python file imports another, also through the names of `vca`, or names a file of the page."""
    if not other.endswith(".py"):
        return Path(other).name in (ROOT / file).read_text(encoding="utf-8")
    found = imports_of(ROOT / file)
    if "vca" in found:
        found |= imports_of(MODULES["vca"])
    return module_of(ROOT / other) in found


TREES = re.findall(r"^```text\n(.*?)^```$", ARCHITECTURE, re.M | re.S)


def test_edges_of_a_tree():
    assert edges_of("a.py   first\n  b.py\n    c.py  1 x -> y\n  d.py\n") == [
        ("a.py", "b.py"), ("b.py", "c.py"), ("a.py", "d.py"),
    ]  # fmt: skip
    assert brings_in("app/ui.py", "app/tabs/explore.py") and not brings_in("vca/maps.py", "vca/hub.py")


@pytest.mark.parametrize("tree", TREES, ids=["photo", "recipe"])
def test_the_drawn_ways_are_those_of_the_code(tree):
    edges = edges_of(tree)
    assert len(edges) > 10
    missing = [file for edge in edges for file in edge if not (ROOT / file).is_file()]
    assert not missing
    wrong = [f"{file} -> {other}" for file, other in edges if not brings_in(file, other)]
    assert not wrong
    steps = [int(number) for number in re.findall(r"^ *\S+ +(\d+)  ?\S", tree, re.M)]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > 7


@pytest.mark.parametrize("page", [ROOT / "docs" / "architecture.md", ROOT / "CONTRIBUTING.md"], ids=lambda p: p.stem)
def test_files_that_a_page_names_exist(page):
    names = re.findall(r"`((?:vca|training|app|tests|scripts|weights|docs)/[\w./]*)`", page.read_text(encoding="utf-8"))
    missing = [name for name in names if not re.search(r"[A-Z]{4}", name) and not (ROOT / name).exists()]
    assert len(names) > 5
    assert not missing


def test_the_workflow_runs_the_tests_and_the_hook_the_linters():
    steps = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())["jobs"]["test"]["steps"]
    assert "make test" in [step.get("run") for step in steps]
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [hook["entry"] for hook in repo["hooks"]] == ["make lint"]
