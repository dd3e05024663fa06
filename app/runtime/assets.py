"""Files that come with the app: scripts, styles and templates of its tabs."""

from functools import partial
from pathlib import Path

from vca.explorer import assets

STATIC = Path(__file__).parents[1] / "static"
FOLDERS = (STATIC, assets.STATIC)

text = partial(assets.text, folders=FOLDERS)
script = partial(assets.script, folders=FOLDERS)
