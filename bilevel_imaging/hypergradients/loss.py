"""What a hypergradient needs of an upper-level loss: values, gradients in x, and what is known of its smoothness."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bilevel_imaging.tensors import all_finite


class LossOracle:
    """Wraps a loss ``loss(x, x_true) -> (B,)`` with its ground truth.

    ``loss.grad(x, x_true)``, ``loss.hvp(x, x_true, v)``, ``loss.smoothness`` (Lipschitz constant of the gradient in x),
    ``loss.convex`` and ``loss.nonnegative`` are used where the loss has them; otherwise derivatives come from autograd
    and nothing is certified.

    Raises:
        ValueError: if the ground truth does not fit the problem, or the loss does not return one value per sample.
    """

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor], x_true: Tensor, shape: torch.Size):
        if not isinstance(x_true, Tensor) or x_true.shape != shape:
            got = tuple(x_true.shape) if isinstance(x_true, Tensor) else type(x_true).__name__
            raise ValueError(f"Expected x_true of the shape of the images, {tuple(shape)}. Got {got}.")
        if x_true.is_complex():
            raise ValueError(
                f"Expected a real x_true, complex images as two channels (torch.view_as_real). Got {x_true.dtype}."
            )
        if not callable(loss):
            raise ValueError(f"Expected a loss(x, x_true) -> (B,), e.g. SquaredError(). Got {loss!r}.")
        if not all_finite(x_true):
            raise ValueError("Expected a finite ground truth. Got NaN or inf in x_true.")
        self.loss, self.x_true = loss, x_true.detach()
        self._in = {x_true.dtype: self.x_true}
        self.smoothness: float | None = getattr(loss, "smoothness", None)
        self.convex: bool = bool(getattr(loss, "convex", False))
        self.nonnegative: bool = bool(getattr(loss, "nonnegative", False))
        # whether it is 1/2 ||x - x_true||^2
        self.squared_error = bool(getattr(loss, "squared_error", False)) and _is_meant(loss, "squared_error")

    def value(self, x: Tensor) -> Tensor:
        """f_i(x_i), ``(B,)``."""
        with torch.no_grad():
            value = self.loss(x, self._truth(x))
        if value.shape != x.shape[:1]:
            raise ValueError(f"Expected a loss with one value per sample, ({x.shape[0]},). Got {tuple(value.shape)}.")
        return value

    def grad(self, x: Tensor) -> Tensor:
        """Gradient of f_i in x_i, ``(B, *image)``."""
        x_true = self._truth(x)
        if hasattr(self.loss, "grad"):
            with torch.no_grad():
                return self.loss.grad(x, x_true)
        with torch.enable_grad():
            leaf = x.detach().requires_grad_(True)
            return torch.autograd.grad(self.loss(leaf, x_true).sum(), leaf)[0]

    def hvp(self, x: Tensor, v: Tensor) -> Tensor:
        """f_i''(x_i) v_i for v ``(B, *image)``."""
        x_true = self._truth(x)
        if hasattr(self.loss, "hvp") and _is_meant(self.loss, "hvp"):
            with torch.no_grad():
                return self.loss.hvp(x, x_true, v)
        with torch.enable_grad():
            leaf = x.detach().requires_grad_(True)
            slope = torch.autograd.grad(self.loss(leaf, x_true).sum(), leaf, create_graph=True)[0]
            return torch.autograd.grad(slope, leaf, v)[0] if slope.requires_grad else torch.zeros_like(v)

    def _truth(self, x: Tensor) -> Tensor:
        """The ground truth in the dtype of x."""
        if x.dtype not in self._in:
            self._in[x.dtype] = self.x_true.to(x.dtype)
        return self._in[x.dtype]


def _is_meant(loss: object, name: str) -> bool:
    """Whether what the loss says under this name is said of its own values and gradients, not of those of a class that
    it inherits from."""
    kind = type(loss)
    own, *others = (next((c for c in kind.__mro__ if n in vars(c)), object) for n in (name, "__call__", "grad"))
    return name in getattr(loss, "__dict__", {}) or all(issubclass(own, other) for other in others)
