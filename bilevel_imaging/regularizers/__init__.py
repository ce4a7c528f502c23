"""Smooth convex regularizers R(x; theta) with closed-form derivatives and true constants."""

from bilevel_imaging.regularizers.base import Regularizer
from bilevel_imaging.regularizers.convex_ridge import ConvexRidge
from bilevel_imaging.regularizers.fields_of_experts import FieldsOfExperts
from bilevel_imaging.regularizers.huber import HuberTotalVariation
from bilevel_imaging.regularizers.input_convex import InputConvex
from bilevel_imaging.regularizers.linear_spline import LinearSpline
from bilevel_imaging.regularizers.noise_conditional import NoiseConditional
from bilevel_imaging.regularizers.second_order_total_variation import SecondOrderTotalVariation
from bilevel_imaging.regularizers.sums import Scaled, Sum
from bilevel_imaging.regularizers.tikhonov import Tikhonov
from bilevel_imaging.regularizers.total_variation import TotalVariation

REGULARIZERS: dict[str, type[Regularizer]] = {
    "total_variation": TotalVariation,
    "tikhonov": Tikhonov,
    "huber_total_variation": HuberTotalVariation,
    "linear_spline": LinearSpline,
    "fields_of_experts": FieldsOfExperts,
    "convex_ridge": ConvexRidge,
    "second_order_total_variation": SecondOrderTotalVariation,
    "input_convex": InputConvex,
    "sum": Sum,
    "scaled": Scaled,
    "noise_conditional": NoiseConditional,
}

__all__ = [
    "REGULARIZERS",
    "ConvexRidge",
    "FieldsOfExperts",
    "HuberTotalVariation",
    "InputConvex",
    "LinearSpline",
    "NoiseConditional",
    "Regularizer",
    "Scaled",
    "SecondOrderTotalVariation",
    "Sum",
    "Tikhonov",
    "TotalVariation",
]
