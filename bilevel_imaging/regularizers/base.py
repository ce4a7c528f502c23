"""The regularizer contract: a deepinv ``Prior`` that also knows its derivatives and constants."""

from __future__ import annotations

import abc
import copy
import itertools
from typing import Any, ClassVar

import deepinv
import torch
from torch import Tensor, nn

from bilevel_imaging import native
from bilevel_imaging.checks import boolean, number
from bilevel_imaging.derivatives import Constants, Linearization
from bilevel_imaging.regularizers.parameters import LARGEST, ordered

# what has to follow when a class with closed forms gets another fn
CLOSED_FORMS = ("grad", "linearize", "constants", "descent", "gradient_scale", "coarse_gradient_scale")


class Regularizer(deepinv.optim.Prior, abc.ABC):
    """R(x; theta), smooth and convex in x, one value per image.

    theta are the ``nn.Parameter``s with ``requires_grad``. A subclass needs only ``fn``: ``grad``, ``hvp`` and
    ``mixed_vjp`` then come from autograd, ``constants`` are unknown, and results are "not certified", with the reason.
    The regularizers of this package override ``grad``, ``linearize`` and ``constants`` with closed forms.

    All methods compute in the dtype of x (float32 or float64), whatever the dtype of the parameters, and change
    neither the caller's tensors nor their ``requires_grad`` (deepinv's own ``Potential.grad`` does).

    Attributes:
        known_parameters: parameters, and modules with parameters, that the closed forms of a class differentiate in;
            the order is that of the columns of J. ``None`` where derivatives come from autograd.

    Raises:
        TypeError: for a subclass of a regularizer with closed forms that replaces ``fn`` but not these.
    """

    known_parameters: ClassVar[tuple[str, ...] | None] = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        owner = _owner(cls, "fn")
        behind = cls.__mro__[cls.__mro__.index(owner) + 1 :]
        former = [c for c in behind if "fn" in vars(c) and not getattr(vars(c)["fn"], "__isabstractmethod__", False)]
        stale = [
            name
            for name in CLOSED_FORMS
            if (source := _owner(cls, name)) in behind
            and source is not Regularizer
            and any(issubclass(c, source) for c in former)
        ]
        if stale:
            raise TypeError(
                f"Expected {cls.__name__} to define {', '.join(stale)} along with fn: those of "
                f"{_owner(cls, stale[0]).__name__} do not know the new fn. Define them, or subclass Regularizer, which "
                "differentiates fn by autograd."
            )

    def __init__(self) -> None:
        super().__init__()
        self.explicit_prior = True

    @abc.abstractmethod
    def fn(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """R(x), ``(B, C, H, W)`` to ``(B,)``; plain differentiable PyTorch in x and theta."""

    def grad(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Gradient in x, ``(B, C, H, W)``; differentiable in x and theta when grad mode is on.

        Raises:
            ValueError: if ``fn`` can't be differentiated, or is not one value per image.
        """
        keep_graph = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.enable_grad():
            leaf = x if x.requires_grad and keep_graph else outside_inference(x.detach()).requires_grad_(True)
            value, result = _outside_inference_mode(self).value(leaf), None
            if value.requires_grad:
                result = torch.autograd.grad(value.sum(), leaf, create_graph=keep_graph, allow_unused=True)[0]
            if result is None:
                raise ValueError(
                    f"Expected {type(self).__name__}.fn to be differentiable in x. Got a value without a graph: does "
                    "it use NumPy, detach or no_grad?"
                )
            return result

    def value(self, x: Tensor) -> Tensor:
        """``fn(x)``, ``(B, C, H, W)`` to ``(B,)``. Parameters and buffers of another dtype are converted to that of x,
        differentiably, for regularizers without closed forms; those with closed forms do it themselves.

        Raises:
            ValueError: if ``fn`` is not one value per image.
        """
        tensors: dict[str, Tensor] = {}
        if self.known_parameters is None:
            named = itertools.chain(self.named_parameters(), self.named_buffers())
            tensors = {name: t.to(x.dtype) for name, t in named if t.is_floating_point() and t.dtype != x.dtype}
        value = torch.func.functional_call(self, tensors, (x,)) if tensors else self.fn(x)
        if not isinstance(value, Tensor) or value.shape != x.shape[:1]:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"Expected {type(self).__name__}.fn to give one value per image, a tensor of shape ({x.shape[0]},). "
                f"Got {got}."
            )
        return value

    def prox(
        self,
        x: Tensor,
        *args: Any,
        gamma: float | Tensor = 1.0,
        max_iter_inter: int = 1000,
        tol_inter: float = 1e-5,
        **kwargs: Any,
    ) -> Tensor:
        """argmin_z gamma R(z) + 1/2 ||z - x||^2, to ||z_i - z_i*|| <= tol_inter ||x_i||, ``(B, C, H, W)``.

        deepinv's own takes gradient steps of a fixed length, which diverge for small smoothing. Where the smoothness
        of R is not known it is used all the same: choose its ``stepsize_inter``.

        Args:
            x: where, ``(B, C, H, W)``.
            gamma: positive number, or a tensor that broadcasts against x.
            max_iter_inter: iteration limit.
            tol_inter: accuracy, relative to ||x||.
            *args: ignored, as in deepinv's calls.
            **kwargs: likewise, but for the ``stepsize_inter`` of deepinv's own.
        """
        smoothness = self.constants(x.shape).smoothness
        if smoothness is None:
            return super().prox(x, *args, gamma=gamma, max_iter_inter=max_iter_inter, tol_inter=tol_inter, **kwargs)
        step = 1 / (1 + float(torch.as_tensor(gamma).max()) * float(smoothness.max()))
        momentum = (1 - step**0.5) / (1 + step**0.5)  # Nesterov's constant one, the strong convexity is 1
        previous = point = x
        for _ in range(max_iter_inter):
            slope = gamma * self.grad(point) + point - x
            if bool((slope.flatten(1).norm(dim=1) <= tol_inter * x.flatten(1).norm(dim=1)).all()):
                return point
            current = point - step * slope
            previous, point = current, current + momentum * (current - previous)
        return previous

    def linearize(self, x: Tensor) -> Linearization:
        """Derivatives frozen at x, ``(B, C, H, W)``."""
        return AutogradLinearization(self, x)

    def descent(self, quadratic: native.Quadratic) -> native.Descent | None:
        """Newton's method in compiled code for a quadratic data term with this; ``None`` where there is none."""
        return None

    @property
    def has_whole_runs(self) -> bool:
        """Whether ``descent`` has been written for it, used on this machine or not."""
        return False

    @property
    def measures(self) -> bool:
        """Whether there is a ``measure``."""
        return False

    def measure(
        self, x: Tensor, q: Tensor, b: Tensor, loss_grad: Tensor, constant: float, **local: Any
    ) -> native.Measured:
        """What the classical certificate asks of x and q for this plus constant / 2 ||x||^2 - <b, x>, in compiled code
        and in float64; all ``(B, C, H, W)``. ``local``: see :func:`bilevel_imaging.native.measure`."""
        raise NotImplementedError

    def hvp(self, x: Tensor, v: Tensor) -> Tensor:
        """Hessian-vector products of every sample, ``(B, C, H, W)``."""
        linearization = self.linearize(x)
        with torch.no_grad():
            return linearization.hvp(v.detach())

    def mixed_vjp(self, x: Tensor, q: Tensor) -> dict[str, Tensor]:
        """d/dtheta <q, grad(x; theta)>, summed over the batch, by parameter name."""
        linearization = self.linearize(x)
        with torch.no_grad():
            return linearization.mixed_vjp(q.detach())

    def check_shape(self, shape: torch.Size) -> None:  # noqa: B027
        """Refuse images ``(B, C, H, W)`` of a shape that this can't be applied to; anything goes where it is not
        overridden.

        Raises:
            ValueError: naming the shape.
        """

    def constants(self, shape: torch.Size | tuple[int, ...]) -> Constants:
        """True bounds for images of this shape ``(B, C, H, W)``, each ``(B,)`` float64; ``None`` where unknown."""
        return Constants(reason=f"{type(self).__name__} declares no constants (override constants())")

    def gradient_scale(self, x: Tensor) -> Tensor:
        """Size of the terms that are added up in ``grad(x)``, ``(B,)`` float64: rounding errors are relative to it."""
        with torch.no_grad():
            return self.grad(x.detach()).double().flatten(1).norm(dim=1)

    def coarse_gradient_scale(self, x: Tensor) -> Tensor | None:
        """A bound of ``gradient_scale(x)`` that costs much less, ``(B,)`` float64, or ``None``."""
        return None

    def subset(self, index: Tensor) -> Regularizer:
        """The regularizer for the samples ``index`` (int64) of a batch: the same, unless it depends on the sample."""
        return self

    def trainable(self) -> dict[str, Tensor]:
        """The parameters that are learned, by name, in the order of theta: that of the columns of J."""
        return {name: p for name, p in ordered(self) if p.requires_grad}


def positive_parameter(value: float, name: str, learn: bool) -> nn.Parameter:
    """The logarithm of a positive number as a float64 parameter (kept exact even when images are float32).

    Raises:
        ValueError: if the value is not a positive finite number, or one that computations can't begin with, or
            ``learn`` is not a bool.
    """
    tensor = torch.tensor(number(name, value, "a positive finite number"), dtype=torch.float64)
    if not bool(torch.isfinite(tensor)) or float(tensor) <= 0:
        raise ValueError(f"Expected {name} as a positive finite number. Got {value!r}.")
    largest = LARGEST[torch.float64]
    if not 1 / largest <= float(tensor) <= largest:
        raise ValueError(f"Expected {name} from {1 / largest:.0e} to {largest:.0e}. Got {value!r}.")
    return nn.Parameter(tensor.log(), requires_grad=boolean(f"learn_{name}", learn))


def _owner(cls: type, name: str) -> type:
    """The class that defines the attribute."""
    return next(c for c in cls.__mro__ if name in vars(c))


def outside_inference(x: Tensor) -> Tensor:
    """x, or a copy that autograd can record where x was made in inference mode; call it outside of that mode."""
    return x.clone() if x.is_inference() else x


def _outside_inference_mode(regularizer: Regularizer) -> Regularizer:
    """The regularizer, or a copy with parameters that autograd can record; call it outside of inference mode."""
    tensors = itertools.chain(regularizer.parameters(), regularizer.buffers())
    return copy.deepcopy(regularizer) if any(t.is_inference() for t in tensors) else regularizer


class AutogradLinearization(Linearization):
    """Derivatives of any regularizer by reverse mode; the graph of the gradient is built once and kept."""

    def __init__(self, regularizer: Regularizer, x: Tensor):
        self.constants = Constants(reason=f"{type(regularizer).__name__} is differentiated by autograd")
        with torch.inference_mode(False), torch.enable_grad():
            regularizer = _outside_inference_mode(regularizer)
            self.parameters = regularizer.trainable()
            self.x = outside_inference(x.detach()).requires_grad_(True)
            self.graph = regularizer.grad(self.x)
        self.grad = self.graph.detach()

    def hvp(self, v: Tensor) -> Tensor:
        (product,) = self._products([self.x], v)
        return product

    def mixed_vjp(self, q: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.parameters, self._products(list(self.parameters.values()), q), strict=True))

    def _products(self, inputs: list[Tensor], v: Tensor) -> list[Tensor]:
        """The derivatives of <v, gradient>, in memory of their own: autograd may answer with v itself, with one number
        for many entries, or with zeros that have no memory."""
        results = [torch.zeros_like(t) for t in inputs]
        if inputs and self.graph.requires_grad:  # else constant in x and theta: a linear regularizer
            with torch.inference_mode(False):
                v = outside_inference(v.detach())
                found = torch.autograd.grad(self.graph, inputs, v, retain_graph=True, allow_unused=True)
            results = [r if g is None else r.add_(g) for r, g in zip(results, found, strict=True)]
        return results
