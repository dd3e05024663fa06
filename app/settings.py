"""What a public page needs beyond the app on one's own machine: limits, and a say in what visitors may load.

Environment variables:
    VCA_MODELS       Hub ids of checkpoints to serve beside those in weights/, separated by commas; user/repo@revision
                     pins one
    VCA_ALLOWED      Hub ids that a visitor may load as well, separated by commas; user/* allows all of a user's.
                     Without it a public page allows none, any other page all
    SPACE_ID         set on a Space: the page is public. So it is where GRADIO_SERVER_NAME is another address than this
                     machine's own, and with a link of GRADIO_SHARE
    SPACES_ZERO_GPU  set on a Space that is lent a GPU for each call of a function, instead of having one
"""

import os
from collections.abc import Callable
from fnmatch import fnmatchcase

from vca.hub import REPO_ID

try:
    import spaces
except ImportError:  # installed on Spaces alone
    spaces = None

LOCAL = ("127.0.0.1", "localhost", "::1")
QUEUE = 24  # visitors who may wait for one kind of work, before the next is told to come back later
UPLOADS = {True: "16mb", False: "64mb"}  # the largest file, on a public page and elsewhere
SESSIONS = 500  # visitors whose loaded models gradio remembers
CACHE = (600, 3600)  # how often, in seconds, files of visitors are looked through, and how old they may get


def is_public() -> bool:
    """Whether others than the user of this machine can reach the app: a Space, a share link, or the network."""
    shared = os.environ.get("GRADIO_SHARE", "").lower() not in ("", "0", "false")
    return "SPACE_ID" in os.environ or shared or os.environ.get("GRADIO_SERVER_NAME", LOCAL[0]) not in LOCAL


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


def lends_gpu() -> bool:
    """Whether this is a Space with ZeroGPU."""
    return spaces is not None and "SPACES_ZERO_GPU" in os.environ


def on_lent_gpu(seconds: Callable[..., int]) -> Callable:
    """Decorates a function that a ZeroGPU Space runs in a process with a GPU; elsewhere it stays as it is.

    Arguments and result are pickled on their way. `seconds` takes the same arguments: how long the call may last.
    """
    return spaces.GPU(duration=seconds) if spaces else lambda function: function


def _ids(variable: str) -> list[str]:
    return [name.strip() for name in os.environ.get(variable, "").split(",") if name.strip()]
