"""The variational energy 1/2 ||Ax - y||^2 + R(x; theta) + ridge/2 ||x||^2, and its batch of lower-level problems."""

from __future__ import annotations

import deepinv
import torch
from torch import Tensor, nn

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
from bilevel_imaging.energies.binding import data_term
from bilevel_imaging.energies.data_terms import DataTerm
from bilevel_imaging.energies.preconditioning import pays, scaled_convolution
from bilevel_imaging.energies.problem import LowerLevelProblem
from bilevel_imaging.errors import NotStronglyConvexError
from bilevel_imaging.regularizers.base import Regularizer
from bilevel_imaging.tensors import norm, squared_norm

# below this fraction of ||A||^2, strong convexity exists on paper only
USABLE_STRONG_CONVEXITY = 1e-6


class VariationalEnergy(nn.Module):
    """g(x) = 1/2 ||Ax - y||^2 + R(x; theta) + ridge/2 ||x||^2; sums over pixels and channels, not means.

    Args:
        regularizer: any :class:`Regularizer`; its trainable parameters are theta.
        ridge: coefficient of 1/2 ||x||^2, >= 0; needed when A has a (nearly) trivial null space direction.
        data_fidelity: "l2".

    Raises:
        ValueError: unknown data fidelity, negative or non-finite ridge, something that is not a regularizer.
    """

    DATA_FIDELITIES = ("l2",)

    def __init__(self, regularizer: Regularizer, *, ridge: float = 0.0, data_fidelity: str = "l2"):
        super().__init__()
        if not isinstance(regularizer, Regularizer):
            raise ValueError(
                f"Expected a bilevel_imaging Regularizer. Got {type(regularizer).__name__}; "
                "subclass Regularizer and define fn(x)."
            )
        if data_fidelity not in self.DATA_FIDELITIES:
            raise ValueError(f"Unknown data_fidelity {data_fidelity!r}. Choose from {list(self.DATA_FIDELITIES)}.")
        if not 0 <= ridge < float("inf"):
            raise ValueError(f"Expected ridge as a finite number >= 0. Got {ridge!r}.")
        self.regularizer = regularizer
        self.ridge = float(ridge)
        self.data_fidelity = data_fidelity

    @property
    def theta(self) -> dict[str, Tensor]:
        """The learned parameters by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def bind(self, y: Tensor, physics: deepinv.physics.Physics) -> VariationalProblem:
        """The batch of problems for measurements y.

        Args:
            y: measurements, ``(B, C, H, W)``, float32 or float64, finite.
            physics: a linear deepinv physics.

        Raises:
            ValueError: wrong shape, dtype, device or non-finite values.
            NotStronglyConvexError: when data term, regularizer and ridge together have no strong convexity.
        """
        if not isinstance(y, Tensor) or y.dim() != 4 or y.numel() == 0:
            got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(f"Expected measurements y as a non-empty tensor (B, C, H, W). Got {got}.")
        if y.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"Expected y in float32 or float64. Got {y.dtype}; convert with y.float().")
        if not bool(torch.isfinite(y).all()):
            bad = torch.nonzero(~torch.isfinite(y).flatten(1).all(1)).flatten().tolist()
            raise ValueError(f"Expected finite measurements. Got NaN or inf in samples {bad} of y.")
        for name, parameter in self.named_parameters():
            if parameter.device != y.device:
                raise ValueError(f"Expected y on the device of {name}, {parameter.device}. Got {y.device}.")
        return VariationalProblem(self, data_term(y.detach(), physics), y.dtype, Cost())


class VariationalProblem(LowerLevelProblem):
    """B problems ``min_x 1/2 ||A_i x - y_i||^2 + R(x; theta) + ridge/2 ||x||^2``, from ``VariationalEnergy.bind``."""

    def __init__(self, energy: VariationalEnergy, data: DataTerm, dtype: torch.dtype, cost: Cost):
        self.energy, self.data, self.cost = energy, data, cost
        self.regularizer, self.ridge = energy.regularizer, energy.ridge
        self.shape, self.dtype, self.device = data.shape, dtype, data.lowest.device
        self.theta = energy.theta
        constants = self.constants()
        base = data.lowest + self.ridge
        mu = base if constants.strong_convexity is None else constants.strong_convexity
        scale = torch.ones_like(base) if data.highest is None else data.highest.clamp(min=1e-30)
        weak = mu < USABLE_STRONG_CONVEXITY * scale
        if bool(weak.any()):
            raise NotStronglyConvexError(
                f"Expected a strongly convex energy. Got strong convexity {float(mu.min()):.3g} for samples "
                f"{torch.nonzero(weak).flatten().tolist()}: the forward operator has (nearly) a null space; "
                "set ridge > 0, e.g. VariationalEnergy(regularizer, ridge=1e-3)."
            )

    def _value(self, x: Tensor) -> Tensor:
        value = self.data.value(x) + self.regularizer.fn(x)
        return value + 0.5 * self.ridge * squared_norm(x) if self.ridge else value

    def _grad(self, x: Tensor) -> Tensor:
        self.cost.forward_ops += self.data.applications * x.shape[0]
        grad = self.data.grad(x) + self.regularizer.grad(x)
        return grad + self.ridge * x if self.ridge else grad

    def _linearize(self, x: Tensor) -> Linearization:
        return VariationalLinearization(self, x)

    def constants(self) -> Constants:
        return self._with_quadratic(self.regularizer.constants(self.shape))

    def _with_quadratic(self, regularizer: Constants) -> Constants:
        """Constants of the whole energy from those of the regularizer."""
        if regularizer.strong_convexity is None:
            return Constants(
                reason=f"the convexity of {type(self.regularizer).__name__} is not known: "
                + (regularizer.reason or "its constants() give no strong_convexity")
            )
        smoothness = None
        if regularizer.smoothness is not None and self.data.highest is not None:
            smoothness = self.data.highest + self.ridge + regularizer.smoothness
        return Constants(
            strong_convexity=self.data.lowest + self.ridge + regularizer.strong_convexity,
            smoothness=smoothness,
            hessian_lipschitz=regularizer.hessian_lipschitz,
            mixed_norm=regularizer.mixed_norm,
            mixed_lipschitz=regularizer.mixed_lipschitz,
            reason=regularizer.reason,
        )

    def initial(self) -> Tensor:
        return self.data.initial()

    def subset(self, index: Tensor) -> VariationalProblem | None:
        data = self.data.subset(index)
        return None if data is None else self._with(data, self.dtype)

    def double(self) -> VariationalProblem | None:
        if self.dtype == torch.float64:
            return self
        data = self.data.double()
        return None if data is None else self._with(data, torch.float64)

    def _with(self, data: DataTerm, dtype: torch.dtype) -> VariationalProblem:
        other = object.__new__(VariationalProblem)
        other.__dict__.update(self.__dict__)
        other.data, other.dtype, other.shape = data, dtype, data.shape
        return other

    def gradient_rounding(self, x: Tensor) -> Tensor:
        scale = self.data.gradient_scale(x.detach()) + self.regularizer.gradient_scale(x)
        if self.ridge:
            scale = scale + self.ridge * x.detach().double().flatten(1).norm(dim=1)
        return 4 * torch.finfo(self.dtype).eps * scale

    def metric(self) -> Metric | None:
        """A^T A + ridge I, where it is positive definite and diagonal in the pixel or the Fourier basis."""
        lowest = self.data.lowest + self.ridge
        if self.constants().strong_convexity is None or bool((lowest <= 0).any()):
            return None
        inverse = self.data.shifted_inverse(self.ridge)
        return None if inverse is None else Metric(inverse, lowest)


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

    def mixed_vjp(self, q: Tensor) -> dict[str, Tensor]:
        return {f"regularizer.{name}": g for name, g in self.inside.mixed_vjp(q).items()}

    def mixed_columns(self) -> Tensor | None:
        return self.inside.mixed_columns()

    def directional(self, q: Tensor, radius: Tensor) -> Directional | None:
        return self.inside.directional(q, radius)  # the data term and the ridge are quadratic and free of theta

    def constants_on_ball(self, radius: Tensor) -> Constants | None:
        regularizer = self.inside.constants_on_ball(radius)
        return None if regularizer is None else self.problem._with_quadratic(regularizer)

    @property
    def length_scale(self) -> float:
        return self.inside.length_scale

    def relative_curvature(self, radius: Tensor, strong_convexity: Tensor) -> Tensor | None:
        return self.inside.relative_curvature(radius, strong_convexity)

    def local_change(self, q: Tensor, radius: Tensor, strong_convexity: Tensor) -> LocalChange | None:
        return self.inside.local_change(q, radius, strong_convexity)

    def mixed_energy_norms(self) -> Tensor | None:
        """The regularizer's own, or for the weight, whose column is grad R = grad g - (A^T (Ax - y) + ridge x):
        the second term is B^T u with B^T B <= H, and ||B^T u||_{H^-1} <= ||u||."""
        norms = self.inside.mixed_energy_norms()
        weight = self.inside.weight_column
        if norms is None or weight is None:
            return norms
        problem = self.problem
        misfit = (2 * problem.data.value(self.x).double() + problem.ridge * squared_norm(self.x).double()).sqrt()
        mu = self.constants.strong_convexity.double()
        # one part in a thousand covers the rounding of a sum of squares in float32
        split = 1.001 * misfit + norm(self.grad).double() / mu.sqrt()
        norms = norms.clone()
        norms[:, weight] = torch.minimum(norms[:, weight], split)
        return norms

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
        """A scaled convolution (see ``scaled_convolution``), or the diagonal where that is the whole Hessian's."""
        data, ridge = self.problem.data, self.problem.ridge
        coefficient = self.inside.diffusion() if pays(data) else None
        if coefficient is not None:
            return scaled_convolution(coefficient, data, ridge)
        diagonal = data.diagonal()
        if diagonal is not None and diagonal.dim() > 0 and hasattr(self.inside, "hessian_diagonal"):
            jacobi = diagonal + ridge + self.inside.hessian_diagonal()
            return Preconditioner(lambda v: v / jacobi)
        return None


def _with_data_term(problem: VariationalProblem, product: Tensor, v: Tensor) -> Tensor:
    """product + (A^T A + ridge I) v, in place."""
    problem.cost.forward_ops += problem.data.applications * v.shape[0]
    product.add_(problem.data.hvp(v))
    return product.add_(v, alpha=problem.ridge) if problem.ridge else product


class _VariationalModel(NewtonModel):
    """The regularizer's model with the exact Hessian of everything else."""

    def __init__(self, problem: VariationalProblem, inside: NewtonModel):
        self.problem, self.inside = problem, inside

    def hvp(self, v: Tensor) -> Tensor:
        return _with_data_term(self.problem, self.inside.hvp(v), v)

    def preconditioner(self) -> Preconditioner | None:
        coefficient = self.inside.diffusion() if pays(self.problem.data) else None
        return None if coefficient is None else scaled_convolution(coefficient, self.problem.data, self.problem.ridge)

    def advance(self, d: Tensor, step: Tensor) -> Tensor:
        return self.inside.advance(d, step)
