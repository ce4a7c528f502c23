"""PSNR and SSIM of a finished run: ``python scripts/evaluate.py --help``."""

import sys

from bilevel_imaging.cli import evaluate_main

if __name__ == "__main__":
    sys.exit(evaluate_main())
