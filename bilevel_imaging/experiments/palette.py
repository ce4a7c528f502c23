"""Colors and lines of the figures: readable without color vision (Okabe & Ito 2008)."""

from __future__ import annotations

from collections.abc import Sequence

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LINES = ("-", "--", ":", "-.")
# a color and a marker for every method that is drawn as dots
DOTS = tuple(zip(COLORS, "os^Dv<", strict=True))


def line_style(number: int, colors: Sequence[str] = COLORS) -> dict[str, str]:
    """Color and line of the curve with that number; the line changes once all colors are used."""
    return {"color": colors[number % len(colors)], "linestyle": LINES[number // len(colors) % len(LINES)]}
