"""Solvers for the adjoint system H q = b, batched and per sample."""

from bilevel_imaging.linear_solvers import preconditioners
from bilevel_imaging.linear_solvers.accelerated_gradient import AcceleratedGradient
from bilevel_imaging.linear_solvers.base import LinearSolution, LinearSolver
from bilevel_imaging.linear_solvers.block_conjugate_gradient import BlockConjugateGradient, BlockSolution
from bilevel_imaging.linear_solvers.chebyshev import Chebyshev
from bilevel_imaging.linear_solvers.conjugate_gradient import ConjugateGradient
from bilevel_imaging.linear_solvers.dense import DenseSolver, assemble_hessian
from bilevel_imaging.linear_solvers.gradient_descent import GradientDescent
from bilevel_imaging.linear_solvers.heavy_ball import HeavyBall
from bilevel_imaging.linear_solvers.minres import MINRES
from bilevel_imaging.linear_solvers.truncated import JacobianFree, Neumann, Recycled

LINEAR_SOLVERS: dict[str, type[LinearSolver]] = {
    "conjugate_gradient": ConjugateGradient,
    "gradient_descent": GradientDescent,
    "heavy_ball": HeavyBall,
    "accelerated_gradient": AcceleratedGradient,
    "minres": MINRES,
    "chebyshev": Chebyshev,
}

__all__ = [
    "LINEAR_SOLVERS",
    "MINRES",
    "AcceleratedGradient",
    "BlockConjugateGradient",
    "BlockSolution",
    "Chebyshev",
    "ConjugateGradient",
    "DenseSolver",
    "GradientDescent",
    "HeavyBall",
    "JacobianFree",
    "LinearSolution",
    "LinearSolver",
    "Neumann",
    "Recycled",
    "assemble_hessian",
    "preconditioners",
]
