"""What an energy says about itself at one point: derivatives (``Linearization``) and upper bounds (``Constants``)."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Constants:
    """Per-sample constants, each ``(B,)``, or ``None`` where nothing is known.

    All are true upper bounds except ``strong_convexity``, a true lower bound. They hold for all x at the current theta.

    Attributes:
        strong_convexity: mu with H(x) >= mu I.
        smoothness: L with H(x) <= L I.
        hessian_lipschitz: L_H with ||H(x) - H(x')|| <= L_H ||x - x'||.
        mixed_norm: bound of ||J(x)|| for all x, where it exists (the value at one x comes from the linearization).
        mixed_lipschitz: L_J with ||J(x) - J(x')|| <= L_J ||x - x'||.
        reason: why something is ``None``, in words; empty if all is known.
    """

    strong_convexity: Tensor | None = None
    smoothness: Tensor | None = None
    hessian_lipschitz: Tensor | None = None
    mixed_norm: Tensor | None = None
    mixed_lipschitz: Tensor | None = None
    reason: str = ""

    def to(self, dtype: torch.dtype) -> Constants:
        """The same constants in another dtype."""
        return self._map(lambda t: t.to(dtype))

    def subset(self, index: Tensor) -> Constants:
        """The constants of the samples ``index``."""
        return self._map(lambda t: t[index])

    def _map(self, function: Callable[[Tensor], Tensor]) -> Constants:
        def apply(t: Tensor | None) -> Tensor | None:
            return None if t is None else function(t)

        return Constants(
            apply(self.strong_convexity),
            apply(self.smoothness),
            apply(self.hessian_lipschitz),
            apply(self.mixed_norm),
            apply(self.mixed_lipschitz),
            self.reason,
        )


@dataclass(frozen=True)
class Directional:
    """Lipschitz constants along one q, valid on a ball around the linearization point (theory: bound (A)).

    With e = x - x_eps in the ball: ||(H(x) - H_eps) q|| <= hessian ||e|| and, for every scalar parameter j,
    |(J_j(x) - J_{eps,j})^T q| <= mixed_components[:, j] ||e||, together ||(J(x) - J_eps)^T q|| <= mixed ||e||.

    Attributes:
        hessian: ``(B,)``.
        mixed: ``(B,)``.
        mixed_components: ``(B, n)`` in the order of ``theta`` (flattened), or ``None`` if not separated.
    """

    hessian: Tensor
    mixed: Tensor
    mixed_components: Tensor | None = None


class NewtonModel(abc.ABC):
    """A symmetric positive definite stand-in for the Hessian, better than it far from the minimizer.

    It carries a memory from step to step (for example dual variables) and tends to the Hessian at the minimizer.
    """

    @abc.abstractmethod
    def hvp(self, v: Tensor) -> Tensor:
        """Products with the model, ``(B, *image)``."""

    @abc.abstractmethod
    def advance(self, d: Tensor, step: Tensor) -> Tensor:
        """The memory after a step of length ``step`` ``(B,)`` along d; first dimension B."""


@dataclass(frozen=True)
class Metric:
    """A symmetric positive definite M with H(x) >= M for every x, that is cheap to invert.

    Attributes:
        inverse: v -> M^{-1} v, ``(B, *image)`` to the same.
        lowest: lambda_min(M), ``(B,)`` float64.
    """

    inverse: Callable[[Tensor], Tensor]
    lowest: Tensor


class Linearization(abc.ABC):
    """Derivatives of B energies frozen at one x; caches what products share.

    Attributes:
        grad: gradient at x, ``(B, *image)``.
        constants: the constants of the energies, per sample.
    """

    grad: Tensor
    constants: Constants

    @abc.abstractmethod
    def hvp(self, v: Tensor) -> Tensor:
        """Hessian-vector products H_i v_i, ``(B, *image)``."""

    @abc.abstractmethod
    def mixed_vjp(self, q: Tensor) -> dict[str, Tensor]:
        """J^T q summed over the batch, by parameter name: d/dtheta sum_i <q_i, grad_x g_i(x_i; theta)>."""

    def mixed_columns(self) -> Tensor | None:
        """The columns of J, ``(B, n, *image)`` in the order of ``theta``; ``None`` when there are too many."""
        return None

    def directional(self, q: Tensor, radius: Tensor) -> Directional | None:
        """Constants along q on the ball of the given radius ``(B,)``; ``None`` when not known."""
        return None

    def newton_model(self, memory: Tensor) -> NewtonModel | None:
        """The model that Newton's method should use here, given its memory; ``None`` to use the Hessian."""
        return None

    def newton_memory(self, *, cold: bool) -> Tensor | None:
        """The memory to start with, far from (cold) or near the minimizer; ``None`` if there is no model."""
        return None

    def preconditioner(self) -> Callable[[Tensor], Tensor] | None:
        """A symmetric positive definite approximation of the inverse Hessian, or ``None``."""
        return None

    def subset(self, index: Tensor) -> Linearization | None:
        """The linearization of the samples ``index`` (int64), or ``None`` if it can't be restricted."""
        return None
