"""The variational energy 1/2 ||Ax - y||^2 + R(x; theta) + ridge/2 ||x||^2, and its batch of lower-level problems."""

from __future__ import annotations

from dataclasses import replace

import deepinv
import torch
from torch import Tensor, nn

from bilevel_imaging import native
from bilevel_imaging.checks import not_negative
from bilevel_imaging.cost import Cost
from bilevel_imaging.derivatives import Constants, Linearization, Metric
from bilevel_imaging.energies.binding import data_term
from bilevel_imaging.energies.data_terms import DataTerm, IdentityTerm
from bilevel_imaging.energies.data_weights import DataWeight
from bilevel_imaging.energies.preconditioning import pays
from bilevel_imaging.energies.problem import LowerLevelProblem
from bilevel_imaging.energies.variational_linearization import VariationalLinearization, with_misfit
from bilevel_imaging.energies.weighted_terms import WeightedTerm, weighted
from bilevel_imaging.errors import NotStronglyConvexError
from bilevel_imaging.native import Descent, Measured, Quadratic
from bilevel_imaging.regularizers.base import Regularizer
from bilevel_imaging.regularizers.parameters import check_known, check_values, ordered
from bilevel_imaging.tensors import all_finite, squared_norm

# below this fraction of ||A||^2, strong convexity exists on paper only
USABLE_STRONG_CONVEXITY = 1e-6


class VariationalEnergy(nn.Module):
    """g(x) = 1/2 ||W^(1/2) (Ax - y)||^2 + R(x; theta) + ridge/2 ||x||^2; sums over pixels and channels, not means.

    Args:
        regularizer: any :class:`Regularizer`; its trainable parameters belong to theta.
        ridge: coefficient of 1/2 ||x||^2, >= 0; needed when A has a (nearly) trivial null space direction.
        data_fidelity: "l2".
        data_weight: W, a :class:`DataWeight` whose parameter belongs to theta if it is learned; 1 by default.

    Raises:
        ValueError: unknown data fidelity, negative or non-finite ridge, something that is not a regularizer or weight.
    """

    DATA_FIDELITIES = ("l2",)

    def __init__(
        self,
        regularizer: Regularizer,
        *,
        ridge: float = 0.0,
        data_fidelity: str = "l2",
        data_weight: DataWeight | None = None,
    ):
        super().__init__()
        if not isinstance(regularizer, Regularizer):
            raise ValueError(
                f"Expected a bilevel_imaging Regularizer. Got {type(regularizer).__name__}; "
                "subclass Regularizer and define fn(x)."
            )
        if data_fidelity not in self.DATA_FIDELITIES:
            raise ValueError(f"Unknown data_fidelity {data_fidelity!r}. Choose from {list(self.DATA_FIDELITIES)}.")
        if not (data_weight is None or isinstance(data_weight, DataWeight)):
            raise ValueError(
                f"Expected data_weight as NoiseWeight, FrequencyWeights, SamplingMask or another DataWeight. "
                f"Got {type(data_weight).__name__}."
            )
        self.regularizer = regularizer
        self.ridge = not_negative("ridge", ridge)
        self.data_fidelity = data_fidelity
        self.data_weight = data_weight

    @property
    def theta(self) -> dict[str, Tensor]:
        """The learned parameters by name."""
        return {name: p for name, p in self._ordered() if p.requires_grad}

    def _ordered(self) -> list[tuple[str, nn.Parameter]]:
        """All parameters that there are derivatives in, in the order of the columns of J."""
        found = list(ordered(self.regularizer, "regularizer."))
        weight = self.data_weight
        if weight is not None and weight._parameters.get(weight.name) is not None:
            found.append((f"data_weight.{weight.name}", weight.parameter))
        return found

    def bind(self, y: Tensor, physics: deepinv.physics.Physics) -> VariationalProblem:
        """The batch of problems for measurements y.

        Args:
            y: measurements, ``(B, ...)``, float32 or float64, finite; what the physics maps to images ``(B, C, H, W)``.
            physics: a linear deepinv physics; a tensor in it (filter, mask, coil maps) may hold one entry per image.

        Raises:
            ValueError: wrong shape, dtype, device or non-finite values; an adjoint that is not the transpose; a data
                weight that does not fit the physics; parameters that there are no derivatives in, or with values out
                of range.
            NotStronglyConvexError: when data term, regularizer and ridge together have no strong convexity.
        """
        if not isinstance(y, Tensor) or y.dim() < 2 or y.numel() == 0:
            got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(f"Expected measurements y as a non-empty tensor (B, ...). Got {got}.")
        if y.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"Expected y in float32 or float64. Got {y.dtype}; convert with y.float().")
        if not all_finite(y):
            bad = torch.nonzero(~torch.isfinite(y).flatten(1).all(1)).flatten().tolist()
            raise ValueError(f"Expected finite measurements. Got NaN or inf in samples {bad} of y.")
        parameters = self._ordered()
        check_known(self, parameters)
        for name, parameter in parameters:
            if parameter.device != y.device:
                raise ValueError(f"Expected y on the device of {name}, {parameter.device}. Got {y.device}.")
            check_values(name, parameter, y.dtype)
        # compiled code takes the numbers in memory as they are
        y = y.detach().resolve_neg()
        data = weighted(data_term(y, physics), self.data_weight, type(physics).__name__)
        self.regularizer.check_shape(data.shape)
        return VariationalProblem(self, data, y.dtype, Cost())


class VariationalProblem(LowerLevelProblem):
    """B problems ``min_x 1/2 ||W^(1/2) (A_i x - y_i)||^2 + R(x; theta) + ridge/2 ||x||^2``; ``VariationalEnergy.bind``
    makes them."""

    def __init__(self, energy: VariationalEnergy, data: DataTerm, dtype: torch.dtype, cost: Cost):
        self.energy, self.data, self.cost = energy, data, cost
        self.regularizer, self.ridge = energy.regularizer, energy.ridge
        self.shape, self.dtype, self.device = data.shape, dtype, data.lowest.device
        self.theta = energy.theta
        self._known: tuple[Constants, Constants] | None = None
        constants = self.constants()
        base = data.lowest + self.ridge
        mu = base if constants.strong_convexity is None else constants.strong_convexity
        scale = torch.ones_like(base) if data.highest is None else data.highest.clamp(min=1e-30)
        weak = mu < USABLE_STRONG_CONVEXITY * scale
        if bool(weak.any()):
            raise NotStronglyConvexError(
                f"Expected a strongly convex energy. Got strong convexity {float(mu.min()):.3g} for samples "
                f"{torch.nonzero(weak).flatten().tolist()}: the forward operator has (nearly) a null space; "
                f"set ridge > 0, e.g. VariationalEnergy(regularizer, ridge={1e-3 * float(scale.max()):.1g})."
            )

    def _value(self, x: Tensor) -> Tensor:
        value = self.data.value(x) + self.regularizer.value(x)
        return value + 0.5 * self.ridge * squared_norm(x) if self.ridge else value

    def _grad(self, x: Tensor) -> Tensor:
        self.cost.forward_ops += self.data.applications * x.shape[0]
        grad = self.data.grad(x) + self.regularizer.grad(x)
        return grad + self.ridge * x if self.ridge else grad

    def _linearize(self, x: Tensor) -> Linearization:
        if (now := self.energy.theta.keys()) != self.theta.keys():
            raise ValueError(
                f"Expected the learned parameters {list(self.theta)} of bind(). Got {list(now)}; bind again."
            )
        return VariationalLinearization(self, x)

    def constants(self) -> Constants:
        try:
            regularizer = self.regularizer.constants(self.shape)
        except ArithmeticError as error:
            for name, parameter in self.theta.items():
                check_values(name, parameter, self.dtype)
            kind = type(self.regularizer).__name__
            raise ValueError(f"Expected constants of {kind} in the range of numbers. Got {error}.") from error
        if isinstance(self.data, WeightedTerm):  # whose bounds follow the weights
            return self._with_quadratic(regularizer)
        if self._known is None or self._known[0] is not regularizer:
            self._known = regularizer, self._with_quadratic(regularizer)
        return self._known[1]

    def _with_quadratic(self, regularizer: Constants) -> Constants:
        """Constants of the whole energy from those of the regularizer."""
        if regularizer.strong_convexity is None:
            return Constants(
                reason=f"the convexity of {type(self.regularizer).__name__} is not known: "
                + (regularizer.reason or "its constants() give no strong_convexity")
            )
        data, smoothness = self.data, None
        highest, mixed_norm, mixed_lipschitz = data.highest, regularizer.mixed_norm, regularizer.mixed_lipschitz
        if regularizer.smoothness is not None and highest is not None:
            smoothness = highest + self.ridge + regularizer.smoothness
        if self.learned_weight is not None:
            # the columns of the data term grow with x
            mixed_norm, own = None, self.learned_weight.mixed_lipschitz
            mixed_lipschitz = None if own is None or mixed_lipschitz is None else torch.hypot(mixed_lipschitz, own)
        return Constants(
            strong_convexity=data.lowest + self.ridge + regularizer.strong_convexity,
            smoothness=smoothness,
            hessian_lipschitz=regularizer.hessian_lipschitz,
            mixed_norm=mixed_norm,
            mixed_lipschitz=mixed_lipschitz,
            reason="; ".join(filter(None, (regularizer.reason, data.reason))),
        )

    @property
    def learned_weight(self) -> WeightedTerm | None:
        """The data term, if its weight belongs to theta."""
        data = self.data
        return data if isinstance(data, WeightedTerm) and data.weight.learned else None

    def initial(self) -> Tensor:
        return self.data.initial()

    def all_parameters(self) -> dict[str, Tensor]:
        return dict(self.energy.named_parameters())

    def subset(self, index: Tensor) -> VariationalProblem | None:
        data = self.data.subset(index)
        if data is None:
            return None
        other = self._with(data, self.dtype)
        other.regularizer = self.regularizer.subset(index)
        return other

    def double(self) -> VariationalProblem | None:
        if self.dtype == torch.float64:
            return self
        data = self.data.double()
        return None if data is None else self._with(data, torch.float64)

    def _with(self, data: DataTerm, dtype: torch.dtype) -> VariationalProblem:
        other = object.__new__(VariationalProblem)
        other.__dict__.update(self.__dict__)
        other.data, other.dtype, other.shape, other._known = data, dtype, data.shape, None
        return other

    def gradient_rounding(self, x: Tensor) -> Tensor:
        return self._gradient_rounding(x, self.data.gradient_scale(x.detach()) + self.regularizer.gradient_scale(x))

    def coarse_gradient_rounding(self, x: Tensor) -> Tensor | None:
        size = self.regularizer.coarse_gradient_scale(x)
        return None if size is None else self._gradient_rounding(x, self.data.coarse_gradient_scale(x.detach()) + size)

    def _gradient_rounding(self, x: Tensor, scale: Tensor) -> Tensor:
        if self.ridge:
            scale = scale + self.ridge * x.detach().double().flatten(1).norm(dim=1)
        return 4 * torch.finfo(self.dtype).eps * scale

    @property
    def has_whole_runs(self) -> bool:
        return self.regularizer.has_whole_runs and self.data.expanded() is not None

    @property
    def measures(self) -> bool:
        return isinstance(self.data, IdentityTerm) and self.regularizer.measures and native.serves(self.data.y)

    def measure(
        self,
        x: Tensor,
        q: Tensor,
        loss_grad: Tensor,
        *,
        residual: Tensor | None = None,
        difference: bool = False,
        local: bool = False,
    ) -> tuple[Measured, Tensor]:
        assert isinstance(self.data, IdentityTerm)
        data, mu = self.data, self.constants().strong_convexity
        # the same for all images: A is the identity
        own = {"strong_convexity": float(mu.amin()), "residual": residual, "difference": difference}
        options = own if local else {}
        found = self.regularizer.measure(x, q, data.y, loss_grad, 1 + self.ridge, **options)
        self.cost.gradients += len(x)
        self.cost.hvps += int((found.q_norm > 0).sum())  # a product with 0 is none
        self.cost.mixed_products += len(x) * found.products.shape[1]
        size = found.x_norm * (1 + self.ridge) + data.size_bound + self.regularizer.coarse_gradient_scale(x)
        return self._with_best_columns(found), 4 * torch.finfo(torch.float64).eps * size

    def _with_best_columns(self, found: Measured) -> Measured:
        """See :meth:`VariationalLinearization.mixed_energy_norms`."""
        if found.energies is None:
            return found
        own, mu = found.energies, self.constants().strong_convexity.double()
        misfit = torch.hypot(own.misfit, self.ridge**0.5 * found.x_norm)
        columns = with_misfit(torch.minimum(own.columns, own.split), 0, misfit, found.grad_norm, mu)
        return replace(found, energies=replace(own, columns=columns * (1 + 1e-9)))

    def descent(self) -> Descent | None:
        data, parts = self.data, self.data.expanded()
        if parts is None or pays(data) or not native.serves(parts[0]):
            return None

        def count(gradients: int, products: int) -> None:
            self.cost.gradients += gradients
            self.cost.hvps += products
            self.cost.forward_ops += data.applications * (gradients + products)

        diagonal, constant = data.diagonal(), self.ridge
        b, offset = parts[0].contiguous(), parts[1].double()
        if diagonal is not None and diagonal.dim() == 0:
            diagonal, constant = None, float(diagonal) + self.ridge
        elif diagonal is not None:
            diagonal = (diagonal + self.ridge).expand_as(b).contiguous()
        return self.regularizer.descent(Quadratic(b, constant, data.convolution(), offset, count, diagonal))

    def metric(self) -> Metric | None:
        """A^T W A + ridge I, where it is positive definite and diagonal in the pixel or the Fourier basis."""
        lowest, highest = self.data.lowest + self.ridge, self.data.highest
        if self.constants().strong_convexity is None or highest is None or bool((lowest <= 0).any()):
            return None
        whiten = self.data.whitening(self.ridge)
        diagonal = self.data.diagonal()
        multiple = diagonal is not None and diagonal.numel() == 1
        return None if whiten is None else Metric(whiten, lowest, highest + self.ridge, multiple)
