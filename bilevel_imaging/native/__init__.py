"""Fused CPU kernels in C, compiled on first use by the machine's own C compiler; without one, PyTorch does the same."""

from bilevel_imaging.native.convolutions import SeparableConvolution, separable
from bilevel_imaging.native.filters import Bank
from bilevel_imaging.native.library import native_kernels, serves
from bilevel_imaging.native.measure import Measured, measure
from bilevel_imaging.native.newton import Descent, DescentStates, Quadratic
from bilevel_imaging.native.potentials import (
    AbsolutePotentials,
    Potentials,
    SplinePotentials,
    change,
    derivatives,
    primal_dual,
    slope,
    spline_sums,
    total,
)
from bilevel_imaging.native.sparse_features import MOST_CLASSES, MOST_FEATURES, SparseExamples
from bilevel_imaging.native.stencils import Stencil, SystemStates
from bilevel_imaging.native.total_variation import (
    advance_dual,
    curvature_product,
    gradient,
    linearize,
    model_field,
    relative_change,
    slopes,
    smoothing_column,
    split_energies,
    unit_squares,
)
from bilevel_imaging.native.updates import advance, inner, largest, products

__all__ = [
    "MOST_CLASSES",
    "MOST_FEATURES",
    "AbsolutePotentials",
    "Bank",
    "Descent",
    "DescentStates",
    "Measured",
    "Potentials",
    "Quadratic",
    "SeparableConvolution",
    "SparseExamples",
    "SplinePotentials",
    "Stencil",
    "SystemStates",
    "advance",
    "advance_dual",
    "change",
    "curvature_product",
    "derivatives",
    "gradient",
    "inner",
    "largest",
    "linearize",
    "measure",
    "model_field",
    "native_kernels",
    "primal_dual",
    "products",
    "relative_change",
    "separable",
    "serves",
    "slope",
    "slopes",
    "smoothing_column",
    "split_energies",
    "spline_sums",
    "total",
    "unit_squares",
]
