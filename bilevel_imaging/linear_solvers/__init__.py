"""Solvers for the adjoint system H q = b, batched and per sample."""

from bilevel_imaging.linear_solvers.base import LinearSolution, LinearSolver
from bilevel_imaging.linear_solvers.conjugate_gradient import ConjugateGradient
from bilevel_imaging.linear_solvers.dense import DenseSolver, assemble_hessian
from bilevel_imaging.linear_solvers.gradient_descent import GradientDescent
from bilevel_imaging.linear_solvers.heavy_ball import HeavyBall

LINEAR_SOLVERS: dict[str, type[LinearSolver]] = {
    "conjugate_gradient": ConjugateGradient,
    "gradient_descent": GradientDescent,
    "heavy_ball": HeavyBall,
}

__all__ = [
    "LINEAR_SOLVERS",
    "ConjugateGradient",
    "DenseSolver",
    "GradientDescent",
    "HeavyBall",
    "LinearSolution",
    "LinearSolver",
    "assemble_hessian",
]
