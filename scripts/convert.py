"""Import a published convex ridge regularizer: ``python scripts/convert.py --help``."""

import sys

from bilevel_imaging.import_checkpoints import convert_main

if __name__ == "__main__":
    sys.exit(convert_main())
