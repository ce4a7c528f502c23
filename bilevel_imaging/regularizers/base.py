"""The regularizer contract: a deepinv ``Prior`` that also knows its derivatives and constants."""

from __future__ import annotations

import abc
from typing import Any

import deepinv
import torch
from torch import Tensor, nn

from bilevel_imaging import native
from bilevel_imaging.derivatives import Constants, Linearization


class Regularizer(deepinv.optim.Prior, abc.ABC):
    """R(x; theta), smooth and convex in x, one value per image.

    theta are the ``nn.Parameter``s with ``requires_grad``. A subclass needs only ``fn``: ``grad``, ``hvp`` and
    ``mixed_vjp`` then come from autograd, ``constants`` are unknown, and results are "not certified", with the reason.
    The regularizers of this package override ``grad``, ``linearize`` and ``constants`` with closed forms.

    All methods compute in the dtype of x (float32 or float64), whatever the dtype of the parameters, and change
    neither the caller's tensors nor their ``requires_grad`` (deepinv's own ``Potential.grad`` does).
    """

    def __init__(self) -> None:
        super().__init__()
        self.explicit_prior = True

    @abc.abstractmethod
    def fn(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """R(x), ``(B, C, H, W)`` to ``(B,)``; plain differentiable PyTorch in x and theta."""

    def grad(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Gradient in x, ``(B, C, H, W)``; differentiable in x and theta when grad mode is on."""
        keep_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            leaf = x if x.requires_grad and keep_graph else x.detach().requires_grad_(True)
            return torch.autograd.grad(self.fn(leaf).sum(), leaf, create_graph=keep_graph)[0]

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
        """The parameters that are learned, by name, in the order of theta."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}


def positive_parameter(value: float, name: str, learn: bool) -> nn.Parameter:
    """The logarithm of a positive number as a float64 parameter (kept exact even when images are float32).

    Raises:
        ValueError: if the value is not a positive finite number.
    """
    tensor = torch.as_tensor(value, dtype=torch.float64)
    if tensor.dim() != 0 or not bool(torch.isfinite(tensor)) or float(tensor) <= 0:
        raise ValueError(f"Expected {name} as a positive finite number. Got {value!r}.")
    return nn.Parameter(tensor.log(), requires_grad=learn)


class AutogradLinearization(Linearization):
    """Derivatives of any regularizer by reverse mode; the graph of the gradient is built once and kept."""

    def __init__(self, regularizer: Regularizer, x: Tensor):
        self.parameters = regularizer.trainable()
        self.constants = Constants(reason=f"{type(regularizer).__name__} is differentiated by autograd")
        with torch.enable_grad():
            self.x = x.detach().requires_grad_(True)
            self.graph = regularizer.grad(self.x)
        self.grad = self.graph.detach()

    def hvp(self, v: Tensor) -> Tensor:
        if not self.graph.requires_grad:  # gradient constant in x and theta: a linear regularizer
            return torch.zeros_like(v)
        (product,) = torch.autograd.grad(self.graph, self.x, v, retain_graph=True, allow_unused=True)
        return torch.zeros_like(v) if product is None else product

    def mixed_vjp(self, q: Tensor) -> dict[str, Tensor]:
        names, tensors = list(self.parameters), list(self.parameters.values())
        if not tensors:
            return {}
        if not self.graph.requires_grad:
            return {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        products = torch.autograd.grad(self.graph, tensors, q, retain_graph=True, allow_unused=True)
        return {
            name: torch.zeros_like(p) if g is None else g for name, p, g in zip(names, tensors, products, strict=True)
        }
