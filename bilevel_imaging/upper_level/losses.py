"""Upper-level losses with what the certificates need to know of them."""

from __future__ import annotations

from torch import Tensor

from bilevel_imaging.tensors import squared_norm


class SquaredError:
    """f(x) = 1/2 ||x - x_true||^2 per sample, sums over pixels and channels.

    Attributes:
        smoothness: Lipschitz constant of the gradient in x, 1.
        convex: True.
        nonnegative: True, so that certified intervals end at 0.
        squared_error: True: compiled code may form it itself.
    """

    smoothness: float = 1.0
    convex: bool = True
    nonnegative: bool = True
    squared_error: bool = True

    def __call__(self, x: Tensor, x_true: Tensor) -> Tensor:
        """``(B, *image)`` twice to ``(B,)``."""
        return 0.5 * squared_norm(x - x_true)

    def grad(self, x: Tensor, x_true: Tensor) -> Tensor:
        """Gradient in x, ``(B, *image)``."""
        return x - x_true

    def hvp(self, x: Tensor, x_true: Tensor, v: Tensor) -> Tensor:
        """The second derivative in x times v, ``(B, *image)``."""
        return v


LOSSES: dict[str, type] = {"squared_error": SquaredError}
