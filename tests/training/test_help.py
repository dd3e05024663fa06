"""Every command explains itself."""

import importlib
import sys

import pytest

from tests.helpers.imports import MODULES

COMMANDS = [
    name
    for name, file in MODULES.items()
    if name.split(".")[0] == "training" and '__name__ == "__main__"' in file.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("name", COMMANDS)
def test_help(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as end:
        importlib.import_module(name).main()
    assert end.value.code == 0
    assert "usage: " in capsys.readouterr().out


def test_commands_are_found():
    assert {"training.classify", "training.card", "training.transfer"} <= set(COMMANDS)
