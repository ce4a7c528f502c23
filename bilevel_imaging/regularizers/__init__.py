"""Smooth convex regularizers R(x; theta) with closed-form derivatives and true constants."""

from bilevel_imaging.regularizers.base import Regularizer
from bilevel_imaging.regularizers.huber import HuberTotalVariation
from bilevel_imaging.regularizers.linear_spline import LinearSpline
from bilevel_imaging.regularizers.tikhonov import Tikhonov
from bilevel_imaging.regularizers.total_variation import TotalVariation

REGULARIZERS: dict[str, type[Regularizer]] = {
    "total_variation": TotalVariation,
    "tikhonov": Tikhonov,
    "huber_total_variation": HuberTotalVariation,
    "linear_spline": LinearSpline,
}

__all__ = ["REGULARIZERS", "HuberTotalVariation", "LinearSpline", "Regularizer", "Tikhonov", "TotalVariation"]
