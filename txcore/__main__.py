"""`python -m txcore`, where the script `txcore` is not on the path."""

import sys

from txcore.cli import main

if __name__ == "__main__":
    sys.exit(main())
