"""Residuals and constants to bounds; nothing here evaluates an energy."""

from bilevel_imaging.certificates.a_posteriori import (
    Bound,
    Measurements,
    classical,
    corrected_value_interval,
    directional,
    distance,
    metric,
)

__all__ = [
    "Bound",
    "Measurements",
    "classical",
    "corrected_value_interval",
    "directional",
    "distance",
    "metric",
]
