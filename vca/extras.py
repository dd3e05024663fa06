"""Optional dependencies: imported where they are used, and named with their extra if they are missing."""

import importlib
from types import ModuleType


def import_extra(module: str, extra: str) -> ModuleType:
    """Imports a module of an optional dependency.

    Args:
        module: its full name, such as "captum.attr".
        extra: the extra of this package that installs it, such as "explain".

    Raises:
        ImportError: it is not installed; the message names the package and the extra.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:  # it is there, and lacks something itself
            raise
        message = f"this needs the package {package}, of the extra [{extra}] of vca: pip install {package}."
        raise ImportError(message, name=package) from error
