"""Residuals and constants to bounds; nothing here evaluates an energy."""

from bilevel_imaging.certificates import a_priori as a_priori
from bilevel_imaging.certificates import distances as distances
from bilevel_imaging.certificates import operator_norms as operator_norms
from bilevel_imaging.certificates.a_posteriori import (
    Bound,
    Measurements,
    classical,
    corrected_value_interval,
    directional,
    distance,
    metric,
)
from bilevel_imaging.certificates.local_norm import (
    TRIAL_FACTOR,
    LocalMeasurements,
    energy_distance,
    local,
    local_value_interval,
)

__all__ = [
    "TRIAL_FACTOR",
    "Bound",
    "LocalMeasurements",
    "Measurements",
    "classical",
    "corrected_value_interval",
    "directional",
    "distance",
    "energy_distance",
    "local",
    "local_value_interval",
    "metric",
]
