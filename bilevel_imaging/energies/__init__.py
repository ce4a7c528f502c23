"""What the lower level minimizes."""

from bilevel_imaging.energies.problem import Constants, Directional, Linearization, LowerLevelProblem
from bilevel_imaging.energies.quadratic import QuadraticProblem
from bilevel_imaging.energies.variational import VariationalEnergy, VariationalProblem

__all__ = [
    "Constants",
    "Directional",
    "Linearization",
    "LowerLevelProblem",
    "QuadraticProblem",
    "VariationalEnergy",
    "VariationalProblem",
]
