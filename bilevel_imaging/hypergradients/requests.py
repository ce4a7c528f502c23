"""What is asked of a hypergradient, refused where it makes no sense before anything is computed."""

from __future__ import annotations

from typing import Any

from bilevel_imaging.checks import instance, number
from bilevel_imaging.energies.problem import LowerLevelProblem
from bilevel_imaging.linear_solvers import LinearSolver
from bilevel_imaging.lower_solvers import LowerSolver

CERTIFICATES = ("auto", "classical", "directional", "metric", "local", "polished")


def check_certificate(certificate: str) -> None:
    """Refuse names that there are no certificates of.

    Raises:
        ValueError: not one of ``CERTIFICATES``.
    """
    if certificate not in CERTIFICATES:
        raise ValueError(f"Unknown certificate {certificate!r}. Choose from {list(CERTIFICATES)}.")


def check_solvers(lower: LowerSolver | None, linear: LinearSolver | None) -> None:
    """Refuse what is not a solver of its kind; ``None`` stands for the default.

    Raises:
        ValueError: naming the argument.
    """
    if lower is not None:
        instance("lower", lower, LowerSolver, "a lower-level solver, e.g. bi.lower_solvers.NewtonCG()")
    if linear is not None:
        instance("linear", linear, LinearSolver, "a linear solver, e.g. bi.linear_solvers.ConjugateGradient()")


def check_accuracy(
    problem: LowerLevelProblem,
    certificate: str,
    tolerances: tuple[Any, Any],
    relative: float | None,
    bound_tol: float | None,
) -> None:
    """Refuse a problem or an accuracy that no hypergradient can be computed for.

    Args:
        problem: of the hypergradient.
        certificate: by name.
        tolerances: error_tol and residual_tol.
        relative: as in :func:`bilevel_imaging.hypergradient`.
        bound_tol: likewise.

    Raises:
        ValueError: naming the argument.
    """
    instance("problem", problem, LowerLevelProblem, "a lower-level problem, e.g. energy.bind(y, physics)")
    check_certificate(certificate)
    if not problem.theta:
        raise ValueError("Expected at least one learnable parameter in the energy. Got none with requires_grad=True.")
    if sum((tolerances != (None, None), relative is not None, bound_tol is not None)) != 1:
        raise ValueError(
            "Expected exactly one of: error_tol and residual_tol, relative, bound_tol. Got "
            f"error_tol={tolerances[0]}, residual_tol={tolerances[1]}, relative={relative}, bound_tol={bound_tol}."
        )
    for name, value in (("relative", relative), ("bound_tol", bound_tol)):
        if value is not None and not 0 < number(name, value, "a positive number, e.g. 0.1") < float("inf"):
            raise ValueError(f"Expected {name} as a positive number, e.g. 0.1. Got {value!r}.")
    if certificate == "metric" and problem.metric() is None:
        raise ValueError(
            "The metric certificate needs a data term with a cheap inverse and A^T A + ridge I positive definite. "
            "Choose certificate='auto', 'classical', 'directional' or 'polished'."
        )
