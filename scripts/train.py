"""Learn a regularizer from images: ``python scripts/train.py --help``."""

import sys

from bilevel_imaging.cli import train_main
from bilevel_imaging.native.memory import keep_freed

if __name__ == "__main__":
    keep_freed()  # large images spend up to a third of the time on page faults otherwise
    sys.exit(train_main())
