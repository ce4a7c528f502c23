"""Learn a regularizer from images: ``python scripts/train.py --help``."""

import sys

from bilevel_imaging.cli import train_main

if __name__ == "__main__":
    sys.exit(train_main())
