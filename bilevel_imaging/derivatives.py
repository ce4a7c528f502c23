"""What an energy says about itself at one point: derivatives (``Linearization``) and upper bounds (``Constants``)."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel_imaging.native import Stencil
from bilevel_imaging.tensors import norm


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


@dataclass(frozen=True)
class LocalChange:
    """How the derivatives change near x, measured by the Hessian H(x) itself instead of by the identity.

    With ``||e||_H <= radius`` and x_t = x + t e, 0 <= t <= 1, and any u:
    ``|D^3 g(x_t)[e, q, u]| <= hessian ||e||_{H(x_t)} ||u||_{H(x_t)}`` and
    ``|<DJ_j(x_t)[e], u>| <= slopes[j] ||e||_{H(x_t)} ||u||_{R(x_t)}``, where R is a part of H (that of the regularizer)
    and ``||q||_{R(x)} <= energy``.

    Attributes:
        hessian: ``(B,)``.
        slopes: ``(n,)`` in the order of ``theta`` (flattened), or ``(B, blocks)`` for blocks of parameters: then for
            combinations of their columns with coefficients of norm 1.
        energy: ``(B,)``.
        curvature: what :meth:`Linearization.relative_curvature` says of the same ball, where that came along.
    """

    hessian: Tensor
    slopes: Tensor
    energy: Tensor
    curvature: Tensor | None = None


class NewtonModel(abc.ABC):
    """A symmetric positive definite stand-in for the Hessian, better than it far from the minimizer.

    It carries a memory from step to step (for example dual variables) and tends to the Hessian at the minimizer.
    """

    @abc.abstractmethod
    def hvp(self, v: Tensor) -> Tensor:
        """Products with the model, ``(B, *image)``."""

    def stencil(self) -> Stencil | None:
        """As in ``Linearization``."""
        return None

    def diffusion(self) -> Tensor | None:
        """As in ``Linearization``."""
        return None

    def cosine_spectrum(self) -> Tensor | None:
        """As in ``Linearization``."""
        return None

    def local_curvature(self) -> Tensor | None:
        """As in ``Linearization``."""
        return None

    def preconditioner(self) -> Preconditioner | None:
        """As in ``Linearization``."""
        return None

    @abc.abstractmethod
    def advance(self, d: Tensor, step: Tensor) -> Tensor:
        """The memory after a step of length ``step`` ``(B,)`` along d; first dimension B."""


@dataclass(frozen=True)
class Preconditioner:
    """v -> P^{-1} v for a symmetric positive definite P close to the Hessian.

    Attributes:
        inverse: ``(B, *image)`` to the same.
        lowest: lower bound of lambda_min(P^{-1} H), ``(B,)`` float64, or ``None``; with it conjugate gradients bound
            the energy norm of their error.
    """

    inverse: Callable[[Tensor], Tensor]
    lowest: Tensor | None = None

    def __call__(self, v: Tensor) -> Tensor:
        """P^{-1} v."""
        return self.inverse(v)


@dataclass(frozen=True)
class Metric:
    """A symmetric positive definite M with H(x) >= M for every x, that is cheap to invert.

    Attributes:
        whiten: v -> w with ||w||^2 = <v, M^{-1} v>, linear, ``(B, *image)`` to ``(B, ...)``.
        lowest: lambda_min(M), ``(B,)`` float64.
        highest: lambda_max(M) or a bound of it, likewise.
        multiple: whether M is lowest times the identity.
    """

    whiten: Callable[[Tensor], Tensor]
    lowest: Tensor
    highest: Tensor
    multiple: bool = False

    def squared_norm(self, v: Tensor) -> Tensor:
        """<v, M^{-1} v> for v ``(B, *image)``, ``(B,)`` float64."""
        if self.multiple:
            return norm(v).double().square() / self.lowest
        return norm(self.whiten(v)).double().square()


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

    def constants_on_ball(self, radius: Tensor) -> Constants | None:
        """Constants valid on the ball of that radius ``(B,)`` around x, where they are better than the global ones;
        ``None`` to use those."""
        return None

    @property
    def length_scale(self) -> float:
        """Change of x over which second derivatives change by their own size; inf if they don't."""
        return float("inf")

    def relative_curvature(self, radius: Tensor, strong_convexity: Tensor) -> Tensor | None:
        """K ``(B,)`` with ``|D^3 g(x_t)[e, v, v]| <= K ||e||_H <v, H(x_t) v>`` for ``||e||_H <= radius``, all v and all
        x_t = x + t e; ``strong_convexity`` ``(B,)`` is that of the whole energy. ``None`` when not known."""
        return None

    def local_change(self, q: Tensor, radius: Tensor, strong_convexity: Tensor) -> LocalChange | None:
        """Changes along q inside ``||e||_H <= radius`` ``(B,)``; ``None`` when not known."""
        return None

    @property
    def weight_column(self) -> int | None:
        """Which column of J equals the gradient of the regularizer (that of its log-weight), if one does."""
        return None

    def mixed_energy_norms(self) -> Tensor | None:
        """Upper bounds of ||J_j||_{H^-1}, ``(B, n)``, that need no solve; ``None`` when not known."""
        return None

    def split_energy_norms(self, strong_convexity: Tensor) -> Tensor | None:
        """The same for an energy whose other terms have this strong convexity ``(B,)``; ``None`` when not known."""
        return None

    def mixed_norm_bound(self) -> Tensor | None:
        """Upper bound of ||J||, ``(B,)`` float64, that needs no columns; ``None`` when not known."""
        return None

    def mixed_block_norms(self, strong_convexity: Tensor) -> Tensor | None:
        """Upper bounds of ||J_b||_{H^-1}, ``(B, blocks)`` float64, for the blocks of columns that ``local_change`` has
        slopes of, where the columns are too many; ``None`` when not known."""
        return None

    def stencil(self) -> Stencil | None:
        """The Hessian as an operator of compiled code; ``None`` if it is not of that kind, or there is no such code."""
        return None

    def diffusion(self) -> Tensor | None:
        """c ``(B, *image)`` if the Hessian is close to D^T diag(c) D with D the differences of neighbors, else
        ``None``."""
        return None

    def cosine_spectrum(self) -> Tensor | None:
        """Response ``(B, *image)`` >= 0 in the basis of ``transforms.dct2`` if the Hessian is close to such a filter;
        else ``None``."""
        return None

    def local_curvature(self) -> Tensor | None:
        """About the diagonal of the Hessian, ``(B, *image)`` > 0, where that filter is a mean over the image; else
        ``None``."""
        return None

    def newton_model(self, memory: Tensor) -> NewtonModel | None:
        """The model that Newton's method should use here, given its memory; ``None`` to use the Hessian."""
        return None

    def newton_memory(self, *, cold: bool) -> Tensor | None:
        """The memory to start with, far from (cold) or near the minimizer; ``None`` if there is no model."""
        return None

    def preconditioner(self) -> Preconditioner | None:
        """A symmetric positive definite approximation of the inverse Hessian, or ``None``."""
        return None

    def subset(self, index: Tensor) -> Linearization | None:
        """The linearization of the samples ``index`` (int64), or ``None`` if it can't be restricted."""
        return None
