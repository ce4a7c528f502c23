"""Lower-level solvers: minimize a batch of strongly convex energies to a certified distance."""

from bilevel_imaging.lower_solvers.accelerated_gradient import AcceleratedGradient
from bilevel_imaging.lower_solvers.base import LowerSolution, LowerSolver
from bilevel_imaging.lower_solvers.gradient_descent import GradientDescent
from bilevel_imaging.lower_solvers.heavy_ball import HeavyBall
from bilevel_imaging.lower_solvers.lbfgs import LBFGS
from bilevel_imaging.lower_solvers.newton_cg import NewtonCG

LOWER_SOLVERS: dict[str, type[LowerSolver]] = {
    "gradient_descent": GradientDescent,
    "heavy_ball": HeavyBall,
    "accelerated_gradient": AcceleratedGradient,
    "lbfgs": LBFGS,
    "newton_cg": NewtonCG,
}

__all__ = [
    "LBFGS",
    "LOWER_SOLVERS",
    "AcceleratedGradient",
    "GradientDescent",
    "HeavyBall",
    "LowerSolution",
    "LowerSolver",
    "NewtonCG",
]
