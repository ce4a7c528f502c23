"""Convex potentials psi_k of filter responses: values, derivatives, and how fast the second derivative can change.

All are even up to a linear term, and work elementwise on responses ``(..., K)``, one potential per last index.
"""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bilevel_imaging import native

# responses of a block (see ``blockwise``)
BLOCK = 2**18


@dataclass(frozen=True)
class Block:
    """Parameters d that psi' depends on together, and what that says about J: with f = ``field``,

    |sum_j d_j dpsi_k'(t)/dtheta_j| <= ||d|| f_k(t). The derivative of the left side in t is at most ||d|| psi_k''(t),
    or, if the parameters stretch the potential, ||d|| |d/dt (t psi_k''(t))|.

    Attributes:
        name: for messages.
        shared: whether one d belongs to all filters, else every filter has its own.
        field: f, ``(..., K)``.
        stretches: see above; f is then |t| psi''.
    """

    name: str
    shared: bool
    field: Tensor
    stretches: bool = False


def blockwise(method: Callable[..., Any]) -> Callable[..., Any]:
    """Evaluate an elementwise method of many CPU responses ``(B, H, W, K)`` by rows, so that intermediates stay in a
    core's own cache: memory that is asked for and given back in every operation costs more than the arithmetic."""

    @functools.wraps(method)
    def call(self: Profile, z: Tensor, *others: Tensor) -> Any:
        if z.numel() <= BLOCK or z.dim() != 4 or z.device.type != "cpu" or torch.is_grad_enabled():
            return method(self, z, *others)
        others = tuple(other.expand_as(z) for other in others)
        rows = max(1, BLOCK // z[0, 0].numel())
        outputs: tuple[Tensor, ...] = ()
        for image in range(z.shape[0]):
            for row in range(0, z.shape[1], rows):
                part = (image, slice(row, row + rows))
                results = method(self, z[part], *(other[part] for other in others))
                results = results if isinstance(results, tuple) else (results,)
                outputs = outputs or tuple(torch.empty_like(z) for _ in results)
                for output, result in zip(outputs, results, strict=True):
                    output[part] = result
        return outputs if len(outputs) > 1 else outputs[0]

    return call


class Profile(abc.ABC):
    """K potentials with frozen parameters, in the dtype and on the device of the responses.

    Attributes:
        curvature_limit: sup psi'', ``(K,)``.
        third_limit: sup |psi'''|, ``(K,)``.
        slope_limit: sup |psi'|, ``(K,)``.
        even: whether psi(-t) = psi(t).
        compiled: the same potentials for compiled code, if it knows their kind.
    """

    curvature_limit: Tensor
    third_limit: Tensor
    slope_limit: Tensor
    even = True
    compiled: native.Potentials | None = None

    @abc.abstractmethod
    def value(self, z: Tensor) -> Tensor:
        """psi(z)."""

    def total(self, z: Tensor) -> Tensor:
        """Sums of psi(z) by sample, ``(B, ..., K)`` to ``(B,)``."""
        if self._is_compiled(z):
            return native.total(self.compiled, z).to(z.dtype)
        return self.value(z).flatten(1).sum(1)

    def slope_and_curvature(self, z: Tensor, curvature: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """psi'(z) and psi''(z), new tensors; the latter is written to ``curvature`` where that is given."""
        if self._is_compiled(z) and (curvature is None or curvature.is_contiguous()):
            return native.derivatives(self.compiled, z, curvature)
        slope, values = self._slope_and_curvature(z)
        return slope, values if curvature is None else curvature.copy_(values)

    def slope(self, z: Tensor) -> Tensor:
        """psi'(z)."""
        return native.slope(self.compiled, z) if self._is_compiled(z) else self._slope(z)

    def primal_dual(self, z: Tensor, u: Tensor, c: Tensor, slope: Tensor) -> None:
        """Write (psi'(z) / z) (1 - u (psi' - z psi'') / psi'^2), kept between psi'' and twice psi' / z, to ``c``, and
        psi'(z) to ``slope``."""
        if self._is_compiled(z) and c.is_contiguous() and slope.is_contiguous():
            native.primal_dual(self.compiled, z, u, c, slope)
            return
        values = self._primal_dual(z, u)
        c.copy_(values[0])
        slope.copy_(values[1])

    def _is_compiled(self, z: Tensor) -> bool:
        return self.compiled is not None and native.serves(z, *self.compiled.tensors)

    @abc.abstractmethod
    def _slope(self, z: Tensor) -> Tensor: ...

    @abc.abstractmethod
    def _slope_and_curvature(self, z: Tensor) -> tuple[Tensor, Tensor]: ...

    @blockwise
    def _primal_dual(self, z: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        slope, curvature = self.slope_and_curvature(z)
        reciprocal = z.reciprocal()
        c = (slope - u).mul_(reciprocal).addcdiv_(u * curvature, slope)
        most = torch.maximum(reciprocal.mul_(slope), curvature).mul_(2)
        # at z = 0, where this is 0 / 0, both are psi''
        c = torch.minimum(torch.maximum(c, curvature), most)
        return torch.where(c.isfinite(), c, curvature), slope

    def change(self, z: Tensor, reach: Tensor) -> tuple[Tensor, Tensor]:
        """sup |psi'''| and inf psi'' over [z - reach, z + reach]."""
        if self._is_compiled(z):
            return native.change(self.compiled, z, reach.expand_as(z), self._change_extra.to(z))
        return self._change(z, reach)

    @property
    def _change_extra(self) -> Tensor:
        """What ``native.change`` needs besides."""
        return self.third_limit

    @abc.abstractmethod
    def _change(self, z: Tensor, reach: Tensor) -> tuple[Tensor, Tensor]: ...

    @abc.abstractmethod
    def blocks(self, z: Tensor, slope: Tensor, curvature: Tensor) -> list[Block]:
        """The learned parameters by blocks, for responses z with psi'(z) and psi''(z)."""

    @abc.abstractmethod
    def mixed_vjp(self, z: Tensor, g: Tensor) -> dict[str, Tensor]:
        """d/dtheta sum psi'(z) g, by parameter name, in the stored parameters."""


def _smoothed_absolute(t: Tensor, nu: Tensor) -> Tensor:
    return 1 / (t * t + nu * nu).rsqrt() - nu


def _smoothed_absolute_derivatives(t: Tensor, nu: Tensor) -> tuple[Tensor, Tensor]:
    squared = nu * nu
    reciprocal = (t * t + squared).rsqrt()
    return t * reciprocal, squared * reciprocal**3


def _log_cosh(t: Tensor, nu: Tensor) -> Tensor:
    # no |t|, whose derivatives by autograd are 0 at 0; above the threshold softplus(v) is v to the last digit
    u = t / nu
    return nu * (u + functional.softplus(-2 * u, threshold=50) - math.log(2))


def _log_cosh_derivatives(t: Tensor, nu: Tensor) -> tuple[Tensor, Tensor]:
    slope = torch.tanh(t / nu)
    return slope, (1 - slope * slope) / nu


@dataclass(frozen=True)
class Family:
    """phi_nu(t) = nu phi_1(t / nu), even, convex, with phi'' falling in |t| and |phi'''| rising up to ``peak`` nu only.

    Attributes:
        value: (t, nu) to phi.
        derivatives: (t, nu) to phi', phi''.
        third: (|t|, nu) to |phi'''|.
        peak: where |phi'''| is largest, in units of nu.
        third_limit: sup |phi'''| nu^2.
    """

    value: Callable[[Tensor, Tensor], Tensor]
    derivatives: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    third: Callable[[Tensor, Tensor], Tensor]
    peak: float
    third_limit: float


def _smoothed_absolute_third(t: Tensor, nu: Tensor) -> Tensor:
    return 3 * nu**2 * t * (t * t + nu * nu).rsqrt() ** 5


def _log_cosh_third(t: Tensor, nu: Tensor) -> Tensor:
    slope = torch.tanh(t / nu)
    return 2 * slope * (1 - slope * slope) / nu**2


FAMILIES = {
    "smoothed_absolute": Family(
        _smoothed_absolute, _smoothed_absolute_derivatives, _smoothed_absolute_third, 0.5, 48 / (25 * math.sqrt(5))
    ),
    "log_cosh": Family(
        _log_cosh, _log_cosh_derivatives, _log_cosh_third, math.atanh(1 / math.sqrt(3)), 4 / (3 * math.sqrt(3))
    ),
}


class ScaledFamily(Profile):
    """psi_k(t) = weight_k phi(t; nu_k) + tilt_k t.

    Softplus is half of log cosh with a linear term: (1 / beta) log(1 + exp(beta t)) = (nu log cosh(t / nu) + t) / 2 up
    to a constant, with nu = 2 / beta.

    Args:
        family: a key of ``FAMILIES``.
        weight: ``(K,)``, positive.
        nu: ``(K,)``, positive.
        tilt: ``(K,)``, slope of a linear term proportional to the weight, or ``None``.
        learned: names among "log_weight" (common factor), "log_weights" and "log_smoothings" (one per filter).
    """

    def __init__(self, family: str, weight: Tensor, nu: Tensor, tilt: Tensor | None, learned: tuple[str, ...]):
        self.family, self.weight, self.nu, self.tilt, self.learned = FAMILIES[family], weight, nu, tilt, learned
        self.curvature_limit = weight / nu
        self.third_limit = weight * self.family.third_limit / nu**2
        self.slope_limit = weight
        self.even = tilt is None
        if family == "smoothed_absolute" and tilt is None:
            self.compiled = native.AbsolutePotentials(weight.contiguous(), nu.contiguous())

    @blockwise
    def value(self, z: Tensor) -> Tensor:
        value = self.weight * self.family.value(z, self.nu)
        return value if self.tilt is None else value + self.tilt * z

    @blockwise
    def _slope(self, z: Tensor) -> Tensor:
        slope = self.weight * self.family.derivatives(z, self.nu)[0]
        return slope if self.tilt is None else slope + self.tilt

    @blockwise
    def _slope_and_curvature(self, z: Tensor) -> tuple[Tensor, Tensor]:
        slope, curvature = self.family.derivatives(z, self.nu)
        slope, curvature = slope.mul_(self.weight), curvature.mul_(self.weight)
        return (slope if self.tilt is None else slope.add_(self.tilt)), curvature

    @property
    def _change_extra(self) -> Tensor:
        return torch.tensor(self.family.peak)

    @blockwise
    def _change(self, z: Tensor, reach: Tensor) -> tuple[Tensor, Tensor]:
        size = z.abs()
        low, high = (size - reach).clamp_(min=0), size + reach
        at = torch.minimum(torch.maximum(self.family.peak * self.nu, low), high)
        third = self.family.third(at, self.nu)
        return third.mul_(self.weight), self.family.derivatives(high, self.nu)[1].mul_(self.weight)

    def blocks(self, z: Tensor, slope: Tensor, curvature: Tensor) -> list[Block]:
        found = []
        if "log_weight" in self.learned:
            found.append(Block("log_weight", True, slope.abs()))
        if "log_weights" in self.learned:
            found.append(Block("log_weights", False, slope.abs()))
        if "log_smoothings" in self.learned:
            # d phi' / d log nu = -t phi'' for a family that is homogeneous in (t, nu)
            found.append(Block("log_smoothings", False, z.abs() * curvature, stretches=True))
        return found

    def mixed_vjp(self, z: Tensor, g: Tensor) -> dict[str, Tensor]:
        slope, curvature = self.slope_and_curvature(z)
        products: dict[str, Tensor] = {}
        by_filter = (slope * g).flatten(0, -2).double().sum(0)
        if "log_weight" in self.learned:
            products["log_weight"] = by_filter.sum()
        if "log_weights" in self.learned:
            products["log_weights"] = by_filter
        if "log_smoothings" in self.learned:
            products["log_smoothings"] = -(z * curvature * g).flatten(0, -2).double().sum(0)
        return products
