"""Compare upper-level methods on a problem of your own: ``python scripts/compare.py --help``."""

import sys

from bilevel_imaging.comparison_cli import compare_main

if __name__ == "__main__":
    sys.exit(compare_main())
