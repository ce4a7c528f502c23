"""Learn the regularization of imaging inverse problems, with a certified error of every learning step."""

from bilevel_imaging import (
    certificates,
    data,
    energies,
    errors,
    hypergradients,
    linear_solvers,
    lower_solvers,
    regularizers,
    training,
    upper_level,
)
from bilevel_imaging._version import __version__
from bilevel_imaging.cost import Cost
from bilevel_imaging.energies import Constants, Linearization, LowerLevelProblem, QuadraticProblem, VariationalEnergy
from bilevel_imaging.export import load_regularizer, reconstruct, save_regularizer
from bilevel_imaging.hypergradients import (
    BilevelReconstructor,
    Hypergradient,
    distance_certificates,
    hypergradient,
    inexact_ad,
    unrolled,
)
from bilevel_imaging.kernels import compile_kernels
from bilevel_imaging.native import native_kernels
from bilevel_imaging.regularizers import (
    ConvexRidge,
    FieldsOfExperts,
    InputConvex,
    NoiseConditional,
    Regularizer,
    Scaled,
    SecondOrderTotalVariation,
    Sum,
    Tikhonov,
    TotalVariation,
)
from bilevel_imaging.training import BilevelObjective, Trainer
from bilevel_imaging.upper_level import MAID, FirstOrder, SquaredError, UpperLevelMethod

__all__ = [
    "MAID",
    "BilevelObjective",
    "BilevelReconstructor",
    "Constants",
    "ConvexRidge",
    "Cost",
    "FieldsOfExperts",
    "FirstOrder",
    "Hypergradient",
    "InputConvex",
    "Linearization",
    "LowerLevelProblem",
    "NoiseConditional",
    "QuadraticProblem",
    "Regularizer",
    "Scaled",
    "SecondOrderTotalVariation",
    "SquaredError",
    "Sum",
    "Tikhonov",
    "TotalVariation",
    "Trainer",
    "UpperLevelMethod",
    "VariationalEnergy",
    "__version__",
    "certificates",
    "compile_kernels",
    "data",
    "distance_certificates",
    "energies",
    "errors",
    "hypergradient",
    "hypergradients",
    "inexact_ad",
    "linear_solvers",
    "load_regularizer",
    "lower_solvers",
    "native_kernels",
    "reconstruct",
    "regularizers",
    "save_regularizer",
    "training",
    "unrolled",
    "upper_level",
]
