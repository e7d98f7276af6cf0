"""``python -m nearplane``."""

import sys

from nearplane.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
