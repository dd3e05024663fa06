"""`python -m vca` is the command `vca`."""

import sys

from vca.cli import main

if __name__ == "__main__":
    sys.exit(main())
