"""``python -m nearplane``."""

import sys

from nearplane.cli import main

if __name__ == "__main__":
    sys.exit(main())
