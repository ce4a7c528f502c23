"""Methods that change theta, from values and hypergradients of known accuracy."""

from collections.abc import Callable
from functools import partial

from bilevel_imaging.upper_level.base import CertifiedValue, Objective, StepReport, UpperLevelMethod
from bilevel_imaging.upper_level.conditions import (
    AbsoluteError,
    AccuracyCondition,
    RelativeError,
    SummableTolerances,
    descent_direction_certified,
    gradient_norm_interval,
)
from bilevel_imaging.upper_level.first_order import FirstOrder
from bilevel_imaging.upper_level.losses import LOSSES, SquaredError
from bilevel_imaging.upper_level.maid import MAID
from bilevel_imaging.upper_level.penalties import SamplingPenalty

UPPER_LEVEL_METHODS: dict[str, Callable[..., UpperLevelMethod]] = {
    "maid": MAID,
    "adam": partial(FirstOrder, "Adam"),
    "adamw": partial(FirstOrder, "AdamW"),
    "sgd": partial(FirstOrder, "SGD"),
    "rmsprop": partial(FirstOrder, "RMSprop"),
}

__all__ = [
    "LOSSES",
    "MAID",
    "UPPER_LEVEL_METHODS",
    "AbsoluteError",
    "AccuracyCondition",
    "CertifiedValue",
    "FirstOrder",
    "Objective",
    "RelativeError",
    "SamplingPenalty",
    "SquaredError",
    "StepReport",
    "SummableTolerances",
    "UpperLevelMethod",
    "descent_direction_certified",
    "gradient_norm_interval",
]
