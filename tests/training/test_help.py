"""Every command explains itself, and Ctrl-C ends it in a line."""

import argparse
import importlib
import runpy
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


@pytest.mark.filterwarnings("ignore:.*found in sys.modules.*:RuntimeWarning")
@pytest.mark.parametrize(
    "name",
    sorted(set(COMMANDS) - {"training.autoencoder", "training.classify", "training.generate", "training.transfer"}),
)
def test_ctrl_c(name, monkeypatch, capsys):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", interrupted)
    with pytest.raises(SystemExit) as end:
        runpy.run_module(name, run_name="__main__")
    assert end.value.code == 130 and capsys.readouterr().err == "stopped by Ctrl-C.\n"
