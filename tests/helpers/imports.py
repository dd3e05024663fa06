"""Which modules of the project import which."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("vca", "training", "app", "benchmarks", "scripts", "tests")


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(file): file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))}


def imports_of(file: Path) -> set[str]:
    """The modules of the project that a file imports, wherever in it; of `from package import name` the module name.

    A module's own packages are not counted, although Python runs their `__init__` first.
    """
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name for alias in node.names if (name := alias.name) in MODULES}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found |= {inner} if inner in MODULES else {node.module} & MODULES.keys()
    return found
