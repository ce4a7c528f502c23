"""Products with the mixed derivative J of one sample and with its transpose, and the norm of J from products alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bilevel_imaging.certificates import operator_norms
from bilevel_imaging.derivatives import Linearization
from bilevel_imaging.energies.problem import LowerLevelProblem
from bilevel_imaging.tensors import entries

Apply = Callable[[dict[str, Tensor]], Tensor]
ApplyAdjoint = Callable[[Tensor], dict[str, Tensor]]

# the probes of every sample are drawn from this seed: the same bound in every run, and for a sample in any batch
PROBE_SEED = 20210


def mixed_operators(problem: LowerLevelProblem, x: Tensor, sample: int = 0) -> tuple[Apply, ApplyAdjoint]:
    """(c -> J c, v -> J^T v) for J = d/dtheta grad_x g_i(x_i; theta) of the sample i, by autograd through ``grad``.

    J^T v is reverse mode. It is linear in v, so that differentiating it once more in v gives J c.

    Args:
        problem: a batch; its ``grad`` must be differentiable in theta.
        x: where, ``(B, *image)``.
        sample: which sample, 0 <= sample < B.

    Returns:
        two functions: c is a dict like theta, v and J c are ``image``-shaped. Each call counts as one mixed product.

    Raises:
        ValueError: if the gradient can't be differentiated in theta.
    """
    single = problem.subset(torch.tensor([sample], device=x.device))
    row, point = (sample, x) if single is None else (0, x[sample : sample + 1])
    theta = problem.theta
    if not all(p.requires_grad for p in theta.values()):
        frozen = [name for name, p in theta.items() if not p.requires_grad]
        raise ValueError(f"Expected parameters with requires_grad=True. Got {frozen} without.")
    with torch.enable_grad():
        gradient = (problem if single is None else single).grad(point.detach())[row]
        if not gradient.requires_grad:
            raise ValueError("Expected problem.grad to be differentiable in theta. Got a gradient without a graph.")
        dual = torch.zeros_like(gradient, requires_grad=True)
        pulled = torch.autograd.grad(gradient, list(theta.values()), dual, create_graph=True, allow_unused=True)
    linear = {name: p for name, p in zip(theta, pulled, strict=True) if p is not None}

    def apply(c: dict[str, Tensor]) -> Tensor:
        problem.cost.mixed_products += 1
        if not linear:
            return torch.zeros_like(gradient.detach())
        directions = [c[name].to(p.dtype) for name, p in linear.items()]
        return torch.autograd.grad(list(linear.values()), dual, directions, retain_graph=True)[0]

    def apply_adjoint(v: Tensor) -> dict[str, Tensor]:
        problem.cost.mixed_products += 1
        products = torch.autograd.grad(gradient, list(theta.values()), v, retain_graph=True, materialize_grads=True)
        return dict(zip(theta, products, strict=True))

    return apply, apply_adjoint


def randomized_mixed_norms(
    problem: LowerLevelProblem, linearization: Linearization, x: Tensor, failure_probability: float = 1e-6
) -> tuple[Tensor, float]:
    """Bounds of ||J_i(x_i)||, ``(B,)`` float64, and the probability that one of them fails.

    A bound is inf where autograd through ``problem.grad`` can't be had or contradicts ``linearization.mixed_vjp``.

    Args:
        problem: the batch.
        linearization: its linearization at x.
        x: ``(B, *image)``.
        failure_probability: of each bound.
    """
    bounds, failures = [], 0.0
    unit = max(torch.finfo(dtype).eps for dtype in (x.dtype, *(p.dtype for p in problem.theta.values())))
    for sample in range(x.shape[0]):
        generator = torch.Generator(x.device).manual_seed(PROBE_SEED)
        try:
            apply, apply_adjoint = mixed_operators(problem, x, sample)
        except ValueError:
            bounds.append(torch.inf)
            continue
        probe = torch.zeros_like(x)
        probe[sample] = torch.randn(x.shape[1:], dtype=x.dtype, device=x.device, generator=generator)
        if not _agree(apply_adjoint(probe[sample]), linearization.mixed_vjp(probe), 10 * unit**0.5):
            bounds.append(torch.inf)
            continue
        found = operator_norms.randomized_norm(
            apply, apply_adjoint, x[sample], generator=generator, failure_probability=failure_probability, unit=unit
        )
        bounds.append(found.bound)
        failures += found.failure_probability
    return torch.tensor(bounds, dtype=torch.float64, device=x.device), failures


def _agree(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float) -> bool:
    """Whether two products J^T v are the same up to rounding: a closed form may be wrong, or not differentiable."""
    first, second = (entries({name: part[name] for name in a}) for part in (a, b))
    return bool((first - second).norm() <= tolerance * torch.maximum(first.norm(), second.norm()))
