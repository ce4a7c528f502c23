"""Derivatives of the variational energy at one point: those of the regularizer, the data term and its weights."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bilevel_imaging.derivatives import (
    Constants,
    Directional,
    Linearization,
    LocalChange,
    NewtonModel,
    Preconditioner,
)
from bilevel_imaging.energies.preconditioning import (
    cosine_convolution,
    local_convolution,
    pays,
    scaled_convolution,
)
from bilevel_imaging.energies.weighted_terms import DataMixed
from bilevel_imaging.native import Stencil
from bilevel_imaging.tensors import column_norms, norm, squared_norm

if TYPE_CHECKING:
    from bilevel_imaging.energies.variational import VariationalProblem


# as long as ||J|| / sqrt(mu) is no larger multiple of what is known of ||J||_{H^-1}, mu can help to bound that
WORTH = 3.0


class VariationalLinearization(Linearization):
    """Data term, regularizer and ridge, each with what it caches at x."""

    def __init__(self, problem: VariationalProblem, x: Tensor, inside: Linearization | None = None):
        self.problem = problem
        self.x = x
        self.inside = problem.regularizer.linearize(x) if inside is None else inside
        self.constants = problem.constants()
        if inside is None:
            self.problem.cost.forward_ops += problem.data.applications * x.shape[0]
            self.grad = problem.data.grad(x) + self.inside.grad
            if problem.ridge:
                self.grad = self.grad + problem.ridge * x

    def hvp(self, v: Tensor) -> Tensor:
        return _with_data_term(self.problem, self.inside.hvp(v), v)

    def stencil(self) -> Stencil | None:
        return _whole_stencil(self.problem, self.inside)

    @cached_property
    def data_mixed(self) -> DataMixed | None:
        """The mixed derivative of the data term, if its weight belongs to theta."""
        term = self.problem.learned_weight
        if term is None:
            return None
        self.problem.cost.forward_ops += term.applications * self.x.shape[0]
        return term.mixed(self.x)

    def mixed_vjp(self, q: Tensor) -> dict[str, Tensor]:
        products = {f"regularizer.{name}": g for name, g in self.inside.mixed_vjp(q).items()}
        if self.data_mixed is not None:
            self.problem.cost.forward_ops += q.shape[0]
            products[f"data_weight.{self.problem.learned_weight.weight.name}"] = self.data_mixed.vjp(q)
        return products

    @cached_property
    def _regularizer_columns(self) -> Tensor | None:
        return self.inside.mixed_columns()

    @cached_property
    def _data_columns(self) -> Tensor | None:
        return None if self.data_mixed is None else self.data_mixed.columns()

    @property
    def _in_blocks(self) -> bool:
        """Whether there is a learned weight and no columns: its parameters are one block then."""
        return self.data_mixed is not None and (self._regularizer_columns is None or self._data_columns is None)

    def mixed_columns(self) -> Tensor | None:
        if self.data_mixed is None:
            return self.inside.mixed_columns()
        return None if self._in_blocks else torch.cat([self._regularizer_columns, self._data_columns], 1)

    def mixed_norm_bound(self) -> Tensor | None:
        if self.data_mixed is None:
            return self.inside.mixed_norm_bound()
        size = self.inside.mixed_norm_bound()
        if size is None and self._regularizer_columns is not None:
            size = self._regularizer_columns.flatten(1).double().norm(dim=1)
        return None if size is None else torch.hypot(size, self.data_mixed.norm())

    def directional(self, q: Tensor, radius: Tensor) -> Directional | None:
        """The data term and the ridge are quadratic: their Hessians do not change, and J of the data term is affine."""
        inside = self.inside.directional(q, radius)
        if inside is None or self.data_mixed is None:
            return inside
        own = self.data_mixed.change(q).to(inside.mixed.dtype)
        components = inside.mixed_components
        return Directional(
            inside.hessian,
            torch.hypot(inside.mixed, own.amax(1)),
            None if components is None else torch.cat([components, own], 1),
        )

    def constants_on_ball(self, radius: Tensor) -> Constants | None:
        regularizer = self.inside.constants_on_ball(radius)
        return None if regularizer is None else self.problem._with_quadratic(regularizer)

    @property
    def length_scale(self) -> float:
        return self.inside.length_scale

    def relative_curvature(self, radius: Tensor, strong_convexity: Tensor) -> Tensor | None:
        return self.inside.relative_curvature(radius, strong_convexity)

    def local_change(self, q: Tensor, radius: Tensor, strong_convexity: Tensor) -> LocalChange | None:
        """That of the regularizer, R being its Hessian; with a learned weight W, R is its Hessian plus A^T W A, and
        <DJ_k[e], u> = W'_k <P_k A e, P_k A u>."""
        inside = self.inside.local_change(q, radius, strong_convexity)
        if inside is None or self.data_mixed is None:
            return inside
        slopes, own = inside.slopes, self.problem.learned_weight.weight.slopes().detach().double().flatten()
        if self._in_blocks:
            own = own.amax().reshape(1)
        if self._in_blocks or slopes.dim() == 2:
            slopes, own = slopes.expand(q.shape[0], -1), own.expand(q.shape[0], -1)
        energy = (inside.energy.square() + self.data_mixed.energy(q)).sqrt()
        return LocalChange(inside.hessian, torch.cat([slopes, own], -1), energy)

    def mixed_block_norms(self, strong_convexity: Tensor) -> Tensor | None:
        norms = self.inside.mixed_block_norms(strong_convexity)
        if self.data_mixed is None:
            return norms
        if self._regularizer_columns is not None:  # blocks of one column each
            norms = self._regularizer_columns.flatten(2).double().norm(dim=2) / strong_convexity.sqrt().unsqueeze(1)
            own = self._regularizer_energy_norms()
            norms = norms if own is None else torch.minimum(norms, own)
        if norms is None:
            return None
        return torch.cat([norms, self.data_mixed.energy_norms().amax(1, keepdim=True)], 1)

    def mixed_energy_norms(self) -> Tensor | None:
        norms = self._regularizer_energy_norms()
        if norms is None or self.data_mixed is None:
            return norms
        return torch.cat([norms, self.data_mixed.energy_norms()], 1)

    def _regularizer_energy_norms(self) -> Tensor | None:
        """The regularizer's own, or :func:`with_misfit`. Where mu helps, a part is measured by that."""
        norms, columns = self.inside.mixed_energy_norms(), self._regularizer_columns
        if norms is None or columns is None or norms.shape[1] == 0:
            return norms
        problem, weight = self.problem, self.inside.weight_column
        mu = self.constants.strong_convexity.double()
        if weight is not None:
            misfit = (2 * problem.data.value(self.x).double() + problem.ridge * squared_norm(self.x).double()).sqrt()
            # one part in a thousand covers the rounding of a sum of squares in float32
            norms = with_misfit(norms, weight, 1.001 * misfit, norm(self.grad).double(), mu)
        worth = (column_norms(columns) <= WORTH * mu.sqrt().unsqueeze(1) * norms).any(1, keepdim=True)
        others = self.inside.split_energy_norms(mu) if bool(worth.any()) else None
        return norms if others is None else torch.where(worth, torch.minimum(norms, others), norms)

    def subset(self, index: Tensor) -> Linearization | None:
        inside, problem = self.inside.subset(index), self.problem.subset(index)
        if inside is None or problem is None:
            return None
        other = VariationalLinearization(problem, self.x[index], inside)
        other.grad = self.grad[index]
        return other

    def newton_model(self, memory: Tensor) -> NewtonModel | None:
        inside = self.inside.newton_model(memory)
        return None if inside is None else _VariationalModel(self.problem, inside)

    def newton_memory(self, *, cold: bool) -> Tensor | None:
        return self.inside.newton_memory(cold=cold)

    def preconditioner(self) -> Preconditioner | None:
        """A convolution (see ``_convolution``), or the diagonal where that is the whole Hessian's; none where compiled
        code makes so many products in the same time that it takes fewer seconds without."""
        data, ridge = self.problem.data, self.problem.ridge
        convolution = _convolution(self.problem, self.inside)
        if convolution is not None:
            return convolution
        if self.stencil() is not None:
            return None
        diagonal = data.diagonal()
        if diagonal is not None and diagonal.dim() > 0 and hasattr(self.inside, "hessian_diagonal"):
            jacobi = diagonal + ridge + self.inside.hessian_diagonal()
            return Preconditioner(lambda v: v / jacobi)
        return None


def with_misfit(norms: Tensor, weight: int, misfit: Tensor, grad_norm: Tensor, mu: Tensor) -> Tensor:
    """Bounds of ||J_j||_{H^-1} ``(B, n)`` with a better one, if it is, for the weight of the regularizer R.

    Its column is grad R = grad g - (A^T W (Ax - y) + ridge x): the second term is B^T u with B^T B <= H, and
    ||B^T u||_{H^-1} <= ||u||.

    Args:
        norms: the bounds.
        weight: which column.
        misfit: ||u||, ``(B,)``.
        grad_norm: ||grad g||, likewise.
        mu: strong convexity of g, likewise.
    """
    norms = norms.clone()
    norms[:, weight] = torch.minimum(norms[:, weight], misfit + grad_norm / mu.sqrt())
    return norms


def _convolution(problem: VariationalProblem, inside: Linearization | NewtonModel) -> Preconditioner | None:
    """In the cosine basis, or a scaled one in the Fourier basis: what the regularizer's part is close to."""
    spectrum = inside.cosine_spectrum()
    if spectrum is not None:
        constants, data = problem.constants(), problem.data
        if data.diagonal() is None and data.spectrum() is None:
            local = inside.local_curvature()
            return local_convolution(spectrum, local, data, problem.ridge, constants.strong_convexity)
        return cosine_convolution(spectrum, data, problem.ridge, constants.strong_convexity)
    coefficient = inside.diffusion() if pays(problem.data) else None
    return None if coefficient is None else scaled_convolution(coefficient, problem.data, problem.ridge)


def _with_data_term(problem: VariationalProblem, product: Tensor, v: Tensor) -> Tensor:
    """product + (A^T W A + ridge I) v, in place."""
    problem.cost.forward_ops += problem.data.applications * v.shape[0]
    product.add_(problem.data.hvp(v))
    return product.add_(v, alpha=problem.ridge) if problem.ridge else product


def _whole_stencil(problem: VariationalProblem, inside: Linearization | NewtonModel) -> Stencil | None:
    """The regularizer's stencil with the Hessian of the data term and the ridge, where compiled code knows both."""
    data = problem.data
    diagonal, convolution = data.diagonal(), data.convolution()
    stencil = None if diagonal is None and convolution is None else inside.stencil()
    if stencil is None:
        return None
    if diagonal is not None:
        return stencil.plus(diagonal + problem.ridge)

    def count(products: int) -> None:
        problem.cost.forward_ops += data.applications * products

    return stencil.plus(torch.tensor(problem.ridge, dtype=torch.float64)).convolved(convolution).counted(count)


class _VariationalModel(NewtonModel):
    """The regularizer's model with the exact Hessian of everything else."""

    def __init__(self, problem: VariationalProblem, inside: NewtonModel):
        self.problem, self.inside = problem, inside

    def hvp(self, v: Tensor) -> Tensor:
        return _with_data_term(self.problem, self.inside.hvp(v), v)

    def stencil(self) -> Stencil | None:
        return _whole_stencil(self.problem, self.inside)

    def preconditioner(self) -> Preconditioner | None:
        return _convolution(self.problem, self.inside)

    def advance(self, d: Tensor, step: Tensor) -> Tensor:
        return self.inside.advance(d, step)
