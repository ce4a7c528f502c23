"""How minimizers move with theta, and second derivatives of the loss made of it: for few parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel_imaging.cost import Cost
from bilevel_imaging.derivatives import Linearization
from bilevel_imaging.energies.problem import LowerLevelProblem
from bilevel_imaging.hypergradients.mixed_operators import mixed_operators
from bilevel_imaging.linear_solvers import BlockConjugateGradient, ConjugateGradient
from bilevel_imaging.tensors import norm, products
from bilevel_imaging.upper_level.base import Objective, SampledObjective, Samples

# one linear system per parameter and image: more than this many are not solved; up to so many one after another
MOST_PARAMETERS, FEW_PARAMETERS = 100, 4


@dataclass(frozen=True)
class Sensitivity:
    """dx*/dtheta for images of one shape.

    Attributes:
        samples: the images, with the points where their last hypergradient was computed and adjoints there.
        derivative: ``(B, n, *image)``, column by column in the order of theta.
    """

    samples: Samples
    derivative: Tensor


def in_one_process(objective: Objective) -> bool:
    """Whether this process has all images."""
    return getattr(getattr(objective, "processes", None), "size", 1) == 1


def sensitivities(
    objective: SampledObjective, relative: float, before: Sequence[Tensor] = ()
) -> tuple[list[Sensitivity], Cost]:
    """Solve H w_j = -J_j for all images and parameters j, at the points of the last hypergradient.

    Args:
        objective: whose hypergradient at this theta was just computed.
        relative: residuals are at most this part of ||J_j||.
        before: derivatives at a theta near by, where the solver starts; nothing for 0.

    Returns:
        batches of images, and the work: one gradient per image, the columns of J, and products, which many columns and
        preconditioned ones share (see :class:`BlockConjugateGradient`).

    Raises:
        ValueError: several processes share the images.
    """
    if not in_one_process(objective):
        raise ValueError("Expected all images in one process for dx*/dtheta. Got several; run without torchrun.")
    found, total = [], Cost()
    for number, samples in enumerate(objective.draw(everything=True)):
        spent = samples.problem.cost.copy()
        start = before[number] if number < len(before) else None
        found.append(Sensitivity(samples, derivative(samples, relative, start)))
        total = total + (samples.problem.cost - spent)
    return found, total


@torch.no_grad()
def derivative(samples: Samples, relative: float, start: Tensor | None = None) -> Tensor:
    """dx*/dtheta at the points of the samples, ``(B, n, *image)``: see :func:`sensitivities`."""
    assert samples.x is not None, "no hypergradient was computed yet"
    linearization = samples.problem.linearize(samples.x)
    rhs = -_mixed_columns(samples.problem, linearization, samples.x)
    tolerance = relative * norm(rhs.flatten(0, 1)).reshape(rhs.shape[:2])
    if rhs.shape[1] <= FEW_PARAMETERS and linearization.preconditioner() is None:
        # whole runs, in compiled code where there is some, cost less than what sharing products saves
        solver, starts = ConjugateGradient(), [None] * rhs.shape[1] if start is None else start.unbind(1)
        systems = zip(rhs.unbind(1), tolerance.unbind(1), starts, strict=True)
        return torch.stack([solver.begin(linearization, b.contiguous(), tol, q0=q0).q for b, tol, q0 in systems], 1)
    if start is None or not bool(start.any()):
        return BlockConjugateGradient().solve(linearization, rhs, tolerance).q
    rhs = rhs - torch.stack([linearization.hvp(column.contiguous()) for column in start.unbind(1)], 1)
    return start + BlockConjugateGradient().solve(linearization, rhs, tolerance).q


def gauss_newton(parts: Sequence[Sensitivity]) -> Tensor:
    """Mean over the images of W^T f'' W with W = dx*/dtheta, ``(n, n)`` float64 on the CPU; no work.

    It is F'' without what comes from the curvature of the x*, and positive semidefinite where f is convex.
    """
    return torch.stack([loss_curvature(part) for part in parts]).sum(0) / _count(parts)


@torch.no_grad()
def loss_curvature(part: Sensitivity) -> Tensor:
    """The sum over these images of W^T f'' W, ``(n, n)`` float64 on the CPU."""
    loss, x, w = part.samples.loss, part.samples.x, part.derivative
    assert x is not None
    return torch.stack([products(w, loss.hvp(x, v.contiguous())).sum(0) for v in w.unbind(1)], 1).cpu()


def second_derivative(parts: Sequence[Sensitivity], first: Tensor) -> tuple[Tensor, Cost]:
    """F'' at theta, ``(n, n)`` float64 on the CPU, without the second derivative of the exact term, and the work.

    With p the adjoint and G the gradient of the lower level, F'' = W^T f'' W - D^2 <p, G> [(W, I), (W, I)], where D is
    the derivative in (x, theta) together and p is fixed: everything else is 0 at a minimizer with its adjoint. The
    second part is differentiated by autograd through the energy, one Hessian and one mixed product per parameter and
    image.

    Args:
        parts: all images.
        first: their :func:`gauss_newton`, the first part.
    """
    spent = sum((part.samples.problem.cost for part in parts), Cost())
    matrix = first - torch.stack([_along_the_path(part) for part in parts]).sum(0) / _count(parts)
    work = sum((part.samples.problem.cost for part in parts), Cost()) - spent
    return 0.5 * (matrix + matrix.T), work


def _mixed_columns(problem: LowerLevelProblem, linearization: Linearization, x: Tensor) -> Tensor:
    """The columns of J, ``(B, n, *image)``: in closed form, or from products with J of all unit vectors."""
    columns = linearization.mixed_columns()
    if columns is not None:
        return columns
    sizes = [t.numel() for t in problem.theta.values()]
    units = torch.eye(sum(sizes), dtype=torch.float64, device=x.device)
    result = []
    for sample in range(x.shape[0]):
        product, _ = mixed_operators(problem, x, sample)
        for unit in units:
            pieces = zip(problem.theta.items(), unit.split(sizes), strict=True)
            result.append(product({name: piece.reshape(t.shape).to(t) for (name, t), piece in pieces}))
    return torch.stack(result).reshape(x.shape[0], len(units), *x.shape[1:])


def _along_the_path(part: Sensitivity) -> Tensor:
    """The sum over the images of D^2 <p, G> in the directions (w_i, e_i) and (w_j, e_j), ``(n, n)``."""
    samples, w = part.samples, part.derivative
    problem, x, p = samples.problem, samples.x, samples.q
    assert x is not None and p is not None
    theta = list(problem.theta.values())
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        gradient = torch.autograd.grad(problem.value(leaf).sum(), leaf, create_graph=True)[0]
        first = torch.autograd.grad((gradient * p).sum(), [leaf, *theta], create_graph=True, materialize_grads=True)
        entries, rows = _flat(first[1:]), []
        for j, column in enumerate(w.unbind(1)):
            slope = (first[0] * column).sum().double() + entries[j]
            if not slope.requires_grad:  # a quadratic energy
                return torch.zeros(w.shape[1], w.shape[1], dtype=torch.float64)
            second = torch.autograd.grad(slope, [leaf, *theta], retain_graph=True, materialize_grads=True)
            rows.append(_inner(w, second[0].unsqueeze(1))[:, 0] + _flat(second[1:]).cpu())
    size = x.shape[0]
    problem.cost.gradients += size
    problem.cost.hvps += size * (w.shape[1] + 1)
    problem.cost.mixed_products += size * (w.shape[1] + 1)
    return torch.stack(rows)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.flatten().double() for t in tensors])


def _inner(v: Tensor, w: Tensor) -> Tensor:
    """Sum over the images of <v_i, w_j>, ``(n, m)``."""
    return torch.einsum("bid,bjd->ij", v.flatten(2).double(), w.flatten(2).double()).cpu()


def _count(parts: Sequence[Sensitivity]) -> int:
    return sum(part.derivative.shape[0] for part in parts)
