"""A batch of lower-level problems: all that a solver sees."""

from __future__ import annotations

import abc
from typing import Any

import torch
from torch import Tensor

from bilevel_imaging.cost import Cost
from bilevel_imaging.derivatives import (
    Constants,
    Directional,
    Linearization,
    LocalChange,
    Metric,
    NewtonModel,
    Preconditioner,
)
from bilevel_imaging.native import Descent, Measured, Stencil
from bilevel_imaging.tensors import all_finite

__all__ = ["Constants", "CountedLinearization", "Directional", "Linearization", "LowerLevelProblem", "Metric"]


# part of a gradient norm or of a tolerance in which nobody notices a rounding error
NEGLIGIBLE = 1e-3


class LowerLevelProblem(abc.ABC):
    """B strongly convex problems ``min_x g_i(x; theta)``, solved together and independently of each other.

    A subclass implements ``_value``, ``_grad``, ``_linearize``, ``constants`` and ``initial``; counting is done here.
    ``value`` is the definition: plain differentiable PyTorch in x and theta. ``grad`` is differentiable too when
    grad mode is on (unrolling needs it).

    Attributes:
        theta: parameters by name; the tensors themselves, read afresh at every evaluation.
        shape: ``(B, *image)``.
        dtype: dtype of the data; x must have it too.
        device: device of the data.
        cost: work counters, shared with every subset and copy of this problem.
    """

    theta: dict[str, Tensor]
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    cost: Cost

    @abc.abstractmethod
    def _value(self, x: Tensor) -> Tensor: ...

    @abc.abstractmethod
    def _grad(self, x: Tensor) -> Tensor: ...

    @abc.abstractmethod
    def _linearize(self, x: Tensor) -> Linearization: ...

    @abc.abstractmethod
    def constants(self) -> Constants:
        """True bounds of the constants at the current theta, per sample."""

    @abc.abstractmethod
    def initial(self) -> Tensor:
        """A sensible cold start, ``(B, *image)``."""

    def value(self, x: Tensor) -> Tensor:
        """Energies g_i(x_i), ``(B,)``."""
        self.cost.values += x.shape[0]
        return self._value(x)

    def grad(self, x: Tensor) -> Tensor:
        """Gradients in x, ``(B, *image)``."""
        self.cost.gradients += x.shape[0]
        return self._grad(x)

    def linearize(self, x: Tensor) -> Linearization:
        """Gradient and products at x (counts as one gradient); products are counted as they are made."""
        self.cost.gradients += x.shape[0]
        with torch.no_grad():
            return CountedLinearization(self._linearize(x.detach()), self.cost)

    def subset(self, index: Tensor) -> LowerLevelProblem | None:
        """The problems ``index`` (int64) alone, sharing theta and counters; ``None`` if not supported."""
        return None

    def double(self) -> LowerLevelProblem | None:
        """The same problems evaluated in float64 (exactly the numbers stored, cast up); ``None`` if impossible."""
        return self if self.dtype == torch.float64 else None

    def all_parameters(self) -> dict[str, Tensor]:
        """All parameters by name, frozen ones too."""
        return self.theta

    def not_finite(self) -> str:
        """Parameters that have become NaN or infinite, in words; "" if none has."""
        names = [name for name, parameter in self.all_parameters().items() if not all_finite(parameter.detach())]
        return f"NaN or inf in {', '.join(names)}" if names else ""

    def gradient_rounding(self, x: Tensor) -> Tensor:
        """Bound of the rounding error in ``grad(x)`` in this problem's dtype, ``(B,)``: a few units of the last place
        of the largest terms that are added up. Subclasses sharpen it."""
        unit = torch.finfo(self.dtype).eps
        return 8 * unit * x.flatten(1).norm(dim=1)

    def coarse_gradient_rounding(self, x: Tensor) -> Tensor | None:
        """A larger bound that costs much less, ``(B,)``, or ``None``."""
        return None

    def gradient_rounding_beside(self, x: Tensor, size: Tensor, part: float = NEGLIGIBLE) -> Tensor:
        """A bound of the rounding error in ``grad(x)``, ``(B,)``: the coarse one where that is at most this part of
        ``size`` ``(B,)``."""
        coarse = self.coarse_gradient_rounding(x)
        if coarse is None:
            return self.gradient_rounding(x)
        enough = coarse <= part * size
        return coarse if bool(enough.all()) else torch.where(enough, coarse, self.gradient_rounding(x))

    @property
    def has_whole_runs(self) -> bool:
        """Whether whole solves of such problems have been written as compiled code, used on this machine or not."""
        return False

    @property
    def measures(self) -> bool:
        """Whether there is a ``measure``."""
        return False

    def measure(
        self,
        x: Tensor,
        q: Tensor,
        loss_grad: Tensor,
        *,
        residual: Tensor | None = None,
        difference: bool = False,
        local: bool = False,
    ) -> tuple[Measured, Tensor]:
        """What the classical certificate asks of x and the adjoint q, all ``(B, *image)`` in the dtype of the data,
        evaluated in float64 in one pass, and a bound of the rounding of the gradient, ``(B,)`` float64. Counts as a
        gradient, a product and the columns of J. ``local``: also what the certificate in the norm of the Hessian asks,
        and how far the residual is from the given one; ``energies.columns`` are then the best bounds of
        ||J_j||_{H^-1} that are known without solving anything; and with ``difference`` the gradient of the loss is
        x - ``loss_grad``."""
        raise NotImplementedError

    def metric(self) -> Metric | None:
        """A matrix below every Hessian that is cheap to invert, or ``None``."""
        return None

    def descent(self) -> Descent | None:
        """Newton's method for these problems in compiled code, the work counted here; ``None`` where there is none."""
        return None

    @property
    def batch_size(self) -> int:
        """B."""
        return self.shape[0]


class CountedLinearization(Linearization):
    """A linearization whose products are counted in the problem's ``Cost``."""

    def __init__(self, inside: Linearization, cost: Cost):
        self.inside = inside
        self.cost = cost
        self.grad = inside.grad
        self.constants = inside.constants

    def hvp(self, v: Tensor) -> Tensor:
        self.cost.hvps += v.shape[0]
        with torch.no_grad():
            return self.inside.hvp(v)

    def mixed_vjp(self, q: Tensor) -> dict[str, Tensor]:
        self.cost.mixed_products += q.shape[0]
        with torch.no_grad():
            return self.inside.mixed_vjp(q)

    def mixed_columns(self) -> Tensor | None:
        with torch.no_grad():
            columns = self.inside.mixed_columns()
        if columns is not None:
            self.cost.mixed_products += columns.shape[0] * columns.shape[1]
        return columns

    def directional(self, q: Tensor, radius: Tensor) -> Directional | None:
        with torch.no_grad():
            return self.inside.directional(q, radius)

    def constants_on_ball(self, radius: Tensor) -> Constants | None:
        with torch.no_grad():
            return self.inside.constants_on_ball(radius)

    @property
    def length_scale(self) -> float:
        return self.inside.length_scale

    def relative_curvature(self, radius: Tensor, strong_convexity: Tensor) -> Tensor | None:
        with torch.no_grad():
            return self.inside.relative_curvature(radius, strong_convexity)

    def local_change(self, q: Tensor, radius: Tensor, strong_convexity: Tensor) -> LocalChange | None:
        with torch.no_grad():
            return self.inside.local_change(q, radius, strong_convexity)

    def mixed_norm_bound(self) -> Tensor | None:
        with torch.no_grad():
            return self.inside.mixed_norm_bound()

    def mixed_block_norms(self, strong_convexity: Tensor) -> Tensor | None:
        with torch.no_grad():
            return self.inside.mixed_block_norms(strong_convexity)

    def mixed_energy_norms(self) -> Tensor | None:
        with torch.no_grad():
            return self.inside.mixed_energy_norms()

    def split_energy_norms(self, strong_convexity: Tensor) -> Tensor | None:
        with torch.no_grad():
            return self.inside.split_energy_norms(strong_convexity)

    def newton_model(self, memory: Tensor) -> NewtonModel | None:
        with torch.no_grad():
            inside = self.inside.newton_model(memory)
        return None if inside is None else _CountedModel(inside, self.cost)

    def newton_memory(self, *, cold: bool) -> Tensor | None:
        with torch.no_grad():
            return self.inside.newton_memory(cold=cold)

    def stencil(self) -> Stencil | None:
        return _counted(self.inside.stencil(), self.cost)

    def preconditioner(self) -> Preconditioner | None:
        with torch.no_grad():
            return self.inside.preconditioner()

    def subset(self, index: Tensor) -> Linearization | None:
        inside = self.inside.subset(index)
        return None if inside is None else CountedLinearization(inside, self.cost)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inside, name)


class _CountedModel(NewtonModel):
    """A model whose products count as Hessian-vector products: they cost the same."""

    def __init__(self, inside: NewtonModel, cost: Cost):
        self.inside, self.cost = inside, cost

    def hvp(self, v: Tensor) -> Tensor:
        self.cost.hvps += v.shape[0]
        with torch.no_grad():
            return self.inside.hvp(v)

    def stencil(self) -> Stencil | None:
        return _counted(self.inside.stencil(), self.cost)

    def preconditioner(self) -> Preconditioner | None:
        with torch.no_grad():
            return self.inside.preconditioner()

    def advance(self, d: Tensor, step: Tensor) -> Tensor:
        with torch.no_grad():
            return self.inside.advance(d, step)


def _counted(stencil: Stencil | None, cost: Cost) -> Stencil | None:
    def count(products: int) -> None:
        cost.hvps += products

    return None if stencil is None else stencil.counted(count)
