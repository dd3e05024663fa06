"""The scripts of the page: ES modules, each after those that it imports."""

from graphlib import CycleError

import pytest

from app.runtime.assets import FOLDERS
from vca.explorer import assets

ENTRIES = ("think.js", "explorer.js", "compare.js", "generate.js", "examples.js", "crop.js")


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_module_comes_after_those_that_it_imports(entry):
    modules = assets.modules(entry, FOLDERS)
    names = [name for name, _ in modules]
    assert names[-1] == entry and {"panel.js", "maps.js"} & {*names} and len(names) == len(set(names))
    for at, (_, source) in enumerate(modules):
        assert source.count("\nimport ") + source.startswith("import ") == len(assets.IMPORT.findall(source))
        assert set(assets.IMPORT.findall(source)) <= set(names[:at])
    assert "export function mount(host)" in modules[-1][1]


def test_every_script_is_of_a_page():
    used = {name for entry in ENTRIES for name, _ in assets.modules(entry, FOLDERS)}
    assert {file.name for folder in FOLDERS for file in folder.glob("*.js")} - used == {"load.js"}


def test_a_file_of_the_app_has_a_name_of_its_own():
    names = [file.name for folder in FOLDERS for file in folder.iterdir()]
    assert len(names) == len(set(names))


def test_a_script_may_stand_in_a_page():
    script = assets.script("explorer.js")
    assert "<" not in script.splitlines()[0] and script.startswith("const MODULES = [[")


def test_modules_in_a_circle_are_refused(tmp_path):
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / f"{name}.js").write_text(f'import {{ x }} from "./{other}.js";\n')
    with pytest.raises(CycleError):
        assets.modules("a.js", [tmp_path])
