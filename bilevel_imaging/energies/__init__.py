"""What the lower level minimizes."""

from bilevel_imaging.energies.data_weights import (
    DATA_WEIGHTS,
    DataWeight,
    FrequencyWeights,
    NoiseWeight,
    SamplingMask,
)
from bilevel_imaging.energies.labeled_features import LabeledFeatures
from bilevel_imaging.energies.logistic import WeightedLogisticProblem
from bilevel_imaging.energies.problem import Constants, Directional, Linearization, LowerLevelProblem
from bilevel_imaging.energies.quadratic import QuadraticProblem
from bilevel_imaging.energies.variational import VariationalEnergy, VariationalProblem

__all__ = [
    "DATA_WEIGHTS",
    "Constants",
    "DataWeight",
    "Directional",
    "FrequencyWeights",
    "LabeledFeatures",
    "Linearization",
    "LowerLevelProblem",
    "NoiseWeight",
    "QuadraticProblem",
    "SamplingMask",
    "VariationalEnergy",
    "VariationalProblem",
    "WeightedLogisticProblem",
]
