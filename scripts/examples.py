"""Asks the classifiers of a folder about the app's examples, and keeps their answers beside them for a fast start.

    python -m scripts.examples [WEIGHTS]

Needed after new weights or examples: until then the app asks them again at every start.
"""

import sys
from pathlib import Path

from app.runtime.checkpoints import Checkpoints
from app.runtime.examples import keep
from app.ui import WEIGHTS

if __name__ == "__main__":
    if len(sys.argv) > 2:
        sys.exit(__doc__)
    served = Checkpoints(Path(sys.argv[1]) if len(sys.argv) == 2 else WEIGHTS)
    for name in served.classifiers:
        keep(served.folders[name], served.load(name))
        print(name)
