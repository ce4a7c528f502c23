"""Compare upper-level methods on a problem of your own: ``python scripts/compare.py --help``."""

import sys

if __name__ == "__main__":
    try:
        from bilevel_imaging.comparison_cli import compare_main
        from bilevel_imaging.native.memory import keep_freed

        keep_freed()  # large images spend up to a third of the time on page faults otherwise
        sys.exit(compare_main())
    except KeyboardInterrupt:  # while the libraries are being loaded
        print("Stopped before anything was done.", file=sys.stderr)
        sys.exit(130)
