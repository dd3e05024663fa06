"""What a public page needs beyond the app on one's own machine: limits, and a say in what visitors may load.

Environment variables:
    VCA_MODELS   Hub ids of checkpoints to serve beside those in weights/, separated by commas; user/repo@revision pins
                 one
    VCA_ALLOWED  Hub ids that a visitor may load as well, separated by commas; user/* allows all of a user's. Without it
                 a public page allows none, any other page all
    SPACE_ID     set on a Space: the page is public
"""

import os
from fnmatch import fnmatchcase

from vca.hub import REPO_ID

QUEUE = 24  # visitors who may wait for one kind of work, before the next is told to come back later
UPLOADS = {True: "16mb", False: "64mb"}  # the largest file, on a public page and elsewhere
CACHE = (600, 3600)  # how often, in seconds, files of visitors are looked through, and how old they may get


def is_public() -> bool:
    """Whether the app runs as a Space, where anybody can reach it."""
    return "SPACE_ID" in os.environ


def upload_limit() -> str:
    """The largest file that a visitor may upload."""
    return UPLOADS[is_public()]


def served() -> list[str]:
    """The Hub ids to serve."""
    return _ids("VCA_MODELS")


def may_load(name: str) -> bool:
    """Whether a visitor may load a checkpoint by this name: a Hub id, or, on one's own machine, anything."""
    allowed = _ids("VCA_ALLOWED")
    if not is_public() and not allowed:
        return True
    match = REPO_ID.fullmatch(name.removeprefix("hf-hub:"))
    patterns = allowed + [model.split("@")[0] for model in served()]
    return match is not None and any(fnmatchcase(match["repo"], pattern) for pattern in patterns)


def _ids(variable: str) -> list[str]:
    return [name.strip() for name in os.environ.get(variable, "").split(",") if name.strip()]
