"""`python -m txcore.cli`, where the script `txcore` is not on the path."""

import sys

from txcore.cli import main

sys.exit(main())
