"""A reference for every regularizer, from ``fn`` alone: float64 autograd, dense Newton steps, measured uncertainties.

``cases.Reference`` knows a few models in extended precision; this one takes any model and is as exact as float64 is.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor

import bilevel_imaging as bi

LONG = np.longdouble
SAFETY = 10
UNIT = float(np.finfo(np.float64).eps)
# a unit in the last place of float64, in those of float32
ROUNDING = 2.0**-29
# derivatives are taken this far from x: autograd's second derivative of |t| is wrong at t = 0, where flat images are
OFFSET = 1e-14


class AutogradReference:
    """x*, adjoint, F and dF/dtheta of one sample with f = 1/2 ||x - x_true||^2.

    g(x) = 1/2 ||A x - y||^2 + fn(x) + ridge / 2 ||x||^2, where the quadratic part is in extended precision. Rounding
    errors of autograd are measured: those of float32 at the same point, scaled to float64. ``uncertainty`` adds, each
    times ``SAFETY``, these errors and what the uncertainty of x changes, found by finite moves of that size.

    Args:
        energy: regularizer and ridge.
        A: dense matrix in extended precision; ``None`` for the identity.
        y: measurement, any shape.
        x_true: ground truth ``(C, H, W)``.
        start: where Newton's method starts, ``(C, H, W)``; it decides nothing but the time.

    Raises:
        RuntimeError: Newton's method did not get near the minimizer.
    """

    def __init__(self, energy: bi.VariationalEnergy, A: np.ndarray | None, y: Tensor, x_true: Tensor, start: Tensor):
        self.regularizer = copy.deepcopy(energy.regularizer).double()
        self.parameters = list(self.regularizer.trainable().values())
        self.shape = tuple(x_true.shape)
        self.ridge = LONG(energy.ridge)
        self.A = np.eye(x_true.numel(), dtype=LONG) if A is None else A
        self.AtA = self.A.T @ self.A + self.ridge * np.eye(x_true.numel(), dtype=LONG)
        self.y, self.x_true = (t.detach().double().numpy().ravel().astype(LONG) for t in (y, x_true))
        self.generator = np.random.default_rng(0)
        self._solve(self._newton(start.detach().double().numpy().ravel()))

    # --- derivatives, by autograd
    def _leaf(self, x: np.ndarray, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.from_numpy(x.astype(np.float64)).reshape(1, *self.shape).to(dtype).requires_grad_(True)

    def _slope(self, leaf: Tensor) -> Tensor:
        """Gradient of the regularizer, with its graph."""
        return torch.autograd.grad(self.regularizer.fn(leaf).sum(), leaf, create_graph=True)[0]

    def _quadratic_gradient(self, x: np.ndarray) -> np.ndarray:
        return self.A.T @ (self.A @ x - self.y) + self.ridge * x

    def value(self, x: np.ndarray) -> float:
        """g(x)."""
        misfit = self.A @ x - self.y
        own = float(self.regularizer.fn(self._leaf(x)).detach())
        return float((misfit @ misfit + self.ridge * (x @ x)) / 2) + own

    def gradient(self, x: np.ndarray) -> np.ndarray:
        """G(x), extended precision with the rounding errors of float64."""
        return self._quadratic_gradient(x) + self._slope(self._leaf(x)).detach().numpy().ravel()

    def _products(self, leaf: Tensor, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(Hessian of the regularizer times q, J^T q): derivatives of <q, gradient> in x and in the parameters."""
        vector = torch.from_numpy(q.astype(np.float64)).reshape(leaf.shape).to(leaf.dtype)
        inputs = [leaf, *self.parameters]
        products = torch.autograd.grad(self._slope(leaf), inputs, vector, materialize_grads=True)
        hessian, *mixed = (p.double().numpy().ravel() for p in products)
        return hessian, np.concatenate(mixed)

    def _rows(self, leaf: Tensor, inputs: list[Tensor], vectors: np.ndarray) -> np.ndarray:
        """The same for many vectors ``(n, pixels)`` at once, in x or in the parameters."""
        batch = torch.from_numpy(vectors).reshape(-1, *leaf.shape)
        products = torch.autograd.grad(self._slope(leaf), inputs, batch, is_grads_batched=True, materialize_grads=True)
        return torch.cat([p.reshape(len(vectors), -1) for p in products], 1).numpy()

    def hessian(self, x: np.ndarray) -> np.ndarray:
        """H, dense, float64, at x but for ``OFFSET``."""
        leaf = self._leaf(x + OFFSET * self.generator.standard_normal(x.size))
        H = self._rows(leaf, [leaf], np.eye(x.size)) + self.AtA.astype(np.float64)
        return (H + H.T) / 2

    # --- the lower level
    def _newton(self, x: np.ndarray, limit: int = 3000) -> np.ndarray:
        """The point with the smallest gradient that damped Newton steps find."""
        best, smallest, stalled, energy = x, np.inf, 0, float(self.y @ self.y)
        for _ in range(limit):
            G = self.gradient(x).astype(np.float64)
            size = float(np.linalg.norm(G))
            stalled = 0 if size < smallest / 2 else stalled + 1
            if size < smallest:
                best, smallest = x, size
            step = -np.linalg.solve(self.hessian(x), G)
            value, slope = self.value(x), float(G @ step)
            visible = -slope > 1e-13 * (abs(value) + energy)  # else energies say nothing any more
            if not visible and stalled > 1:
                break
            t = 1.0
            while visible and t > 1e-12 and self.value(x + t * step) > value + 1e-4 * t * slope:
                t /= 2
            x = x + t * step
        return best

    # --- the results and their uncertainties
    def _adjoint(self, x: np.ndarray, q: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(b - H(x) q, J(x)^T q)."""
        product, mixed = self._products(self._leaf(x), q)
        return (b - self.AtA @ q - product).astype(np.float64), mixed

    def _solve(self, x: np.ndarray) -> None:
        H = self.hessian(x)
        H_inv, lowest = np.linalg.inv(H), float(np.linalg.eigvalsh(H)[0])
        q = H_inv @ (x - self.x_true).astype(np.float64)
        rounding = self._rounding(x, q)
        newton_step = float(np.linalg.norm(H_inv @ self.gradient(x).astype(np.float64)))
        # E ||H^-1 r|| <= ||H^-1||_F ||r|| / sqrt(n) for errors r without direction
        spread = float(np.linalg.norm(H_inv)) / np.sqrt(x.size)
        self.x, self.x_uncertainty = x.astype(LONG), 2 * newton_step + SAFETY * spread * rounding[0]
        if not (lowest > 0 and self.x_uncertainty < 1e-5 * (1 + np.abs(x).max())):
            raise RuntimeError("the reference did not converge")
        b = self.x - self.x_true
        reach = max(self.x_uncertainty, OFFSET * (1 + float(np.abs(x).max())))
        noise = self.generator.standard_normal
        base = x + reach * _unit(noise(x.size))
        for _ in range(4):
            q = q + H_inv @ self._adjoint(base, q, b)[0]
        residual, mixed = self._adjoint(base, q, b)
        self.q, self.grad = q.astype(LONG), -mixed.astype(LONG)
        influence = self._rows(self._leaf(base), self.parameters, H_inv)  # H^-1 J: what a residual changes
        moved = []
        for smooth in (False, False, False, False, True, True):
            direction = noise(x.size)
            step = reach * _unit(H_inv @ direction if smooth else direction)
            left, other = self._adjoint(base + step, q, b)
            moved.append(float(np.linalg.norm(other - mixed + influence.T @ left)))
        self.uncertainty = float(
            SAFETY * (max(moved) + rounding[2])
            + np.linalg.norm(influence, 2) * (np.linalg.norm(residual) + SAFETY * rounding[1] + self.x_uncertainty)
        )
        self.loss = float(b @ b) / 2
        self.loss_uncertainty = (float(np.sqrt(b @ b)) + self.x_uncertainty) * self.x_uncertainty + 1e-15 * self.loss

    def _rounding(self, x: np.ndarray, q: np.ndarray) -> list[float]:
        """Norms of the rounding errors of the gradient, of H q and of J^T q in float64, as measured in float32."""
        # not at x: see OFFSET, which float32 does not resolve
        x = (x + 1e-6 * self.generator.standard_normal(x.size)).astype(np.float32)
        q = q.astype(np.float32)
        low, high = (
            (self._slope(leaf).detach().double().numpy(), *self._products(leaf, q))
            for leaf in (self._leaf(x, torch.float32), self._leaf(x))
        )
        return [
            float(ROUNDING * np.linalg.norm(a - b) + UNIT * np.linalg.norm(b)) for a, b in zip(low, high, strict=True)
        ]


def _unit(direction: np.ndarray) -> np.ndarray:
    return direction / np.linalg.norm(direction)
