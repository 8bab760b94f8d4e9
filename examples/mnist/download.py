"""Download MNIST, once, whole and checked.

python examples/mnist/download.py --data-dir data/mnist
"""

import sys

from data.download import main

if __name__ == "__main__":
    sys.exit(main())
