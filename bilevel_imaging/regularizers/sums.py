"""Sums and multiples of regularizers, with everything that can be said of them from their parts."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from bilevel_imaging.checks import argument_names
from bilevel_imaging.derivatives import Constants, Linearization
from bilevel_imaging.regularizers.base import Regularizer, positive_parameter
from bilevel_imaging.regularizers.sums_linearization import SumLinearization
from bilevel_imaging.regularizers.sums_scaled_linearization import ScaledLinearization

Part = Regularizer | Mapping[str, Any]


class Sum(Regularizer):
    """R(x) = R_0(x) + R_1(x) + ...; its parameters are those of the parts, named "parts.0.log_weight" and so on.

    ``Sum(TotalVariation(), SecondOrderTotalVariation())`` or, from plain values,
    ``Sum(parts=[{"kind": "total_variation"}, {"kind": "tikhonov", "operator": "gradient"}])``.

    Args:
        *regularizers: the parts, each a regularizer or a dict of its kind (a name in ``REGULARIZERS``) and arguments.
        parts: further ones.

    Raises:
        ValueError: no parts, something that is no regularizer, or parts that share a parameter.
    """

    known_parameters = ("parts",)

    def __init__(self, *regularizers: Part, parts: Sequence[Part] = ()):
        super().__init__()
        built = [build_part(part) for part in (*regularizers, *parts)]
        if not built:
            raise ValueError("Expected at least one regularizer. Got none; e.g. Sum(TotalVariation(), Tikhonov()).")
        owners = [parameter for part in built for parameter in part.parameters()]
        if len({id(parameter) for parameter in owners}) < len(owners):
            raise ValueError("Expected parts with parameters of their own. Got shared ones; use Scaled for a multiple.")
        self.parts = nn.ModuleList(built)

    @property
    def regularizers(self) -> list[Regularizer]:
        """The parts."""
        return cast("list[Regularizer]", list(self.parts))

    def arguments(self) -> dict[str, Any]:
        """Constructor arguments that rebuild this regularizer (parameters are stored separately)."""
        return {"parts": [describe_part(part) for part in self.regularizers]}

    def check_shape(self, shape: torch.Size) -> None:
        for part in self.regularizers:
            part.check_shape(shape)

    def fn(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return torch.stack([part.value(x) for part in self.regularizers]).sum(0)

    def grad(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return torch.stack([part.grad(x) for part in self.regularizers]).sum(0)

    def linearize(self, x: Tensor) -> Linearization:
        return SumLinearization(self, [part.linearize(x) for part in self.regularizers], x.shape)

    def constants(self, shape: torch.Size | tuple[int, ...]) -> Constants:
        return self.total([part.constants(shape) for part in self.regularizers], shape[0])

    def total(self, constants: Sequence[Constants], batch: int) -> Constants:
        """Constants of the sum from those of its parts; ``None`` where one that matters is."""
        learned = [c for part, c in zip(self.regularizers, constants, strict=True) if part.trainable()]
        device = next((p.device for p in self.parameters()), None)
        zero = torch.zeros(batch, dtype=torch.float64, device=device)

        def added(name: str) -> Tensor | None:
            values = [getattr(c, name) for c in constants]
            return None if any(v is None for v in values) else torch.stack(values).sum(0)

        def side_by_side(name: str) -> Tensor | None:
            # J = [J_0, J_1, ...], a part without parameters has no columns
            values = [getattr(c, name) for c in learned]
            return None if any(v is None for v in values) else torch.stack([zero, *values]).norm(dim=0)

        reasons = [
            f"{type(p).__name__}: {c.reason}" for p, c in zip(self.regularizers, constants, strict=True) if c.reason
        ]
        return Constants(
            added("strong_convexity"),
            added("smoothness"),
            added("hessian_lipschitz"),
            side_by_side("mixed_norm"),
            side_by_side("mixed_lipschitz"),
            "; ".join(reasons),
        )

    def coarse_gradient_scale(self, x: Tensor) -> Tensor | None:
        parts = [part.coarse_gradient_scale(x) for part in self.regularizers]
        return None if any(part is None for part in parts) else torch.stack(parts).sum(0)

    def gradient_scale(self, x: Tensor) -> Tensor:
        return torch.stack([part.gradient_scale(x) for part in self.regularizers]).sum(0)


class Scaled(Regularizer):
    """R(x) = weight * R_0(x), for regularizers without a weight of their own, or one weight for a whole sum.

    Args:
        regularizer: R_0, or a dict of its kind (a name in ``REGULARIZERS``) and arguments.
        weight: positive; stored as ``log_weight``.
        learn_weight: whether ``log_weight`` is learned.

    Raises:
        ValueError: something that is no regularizer, or a weight that is not positive.
    """

    known_parameters = ("log_weight", "regularizer")

    def __init__(self, regularizer: Part, weight: float = 1.0, *, learn_weight: bool = True):
        super().__init__()
        self.log_weight = positive_parameter(weight, "weight", learn_weight)
        self.regularizer = build_part(regularizer)

    def arguments(self) -> dict[str, Any]:
        """Constructor arguments that rebuild this regularizer (parameters are stored separately)."""
        return {"regularizer": describe_part(self.regularizer), "learn_weight": self.log_weight.requires_grad}

    def check_shape(self, shape: torch.Size) -> None:
        self.regularizer.check_shape(shape)

    def _weight(self, x: Tensor) -> Tensor:
        # exponentiated in float64: the stored number is what defines R
        return self.log_weight.double().exp().to(x.dtype)

    def fn(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self._weight(x) * self.regularizer.value(x)

    def grad(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self._weight(x) * self.regularizer.grad(x)

    def linearize(self, x: Tensor) -> Linearization:
        inside = self.regularizer.linearize(x)
        with torch.no_grad():
            return ScaledLinearization(self, inside, x.shape)

    def constants(self, shape: torch.Size | tuple[int, ...]) -> Constants:
        return self.multiple(self.regularizer.constants(shape))

    def multiple(self, constants: Constants) -> Constants:
        """Constants of weight * R_0 from those of R_0."""
        weight = self.log_weight.detach().double().exp()

        def scaled(value: Tensor | None) -> Tensor | None:
            return None if value is None else weight * value

        result = Constants(
            *(scaled(c) for c in (constants.strong_convexity, constants.smoothness, constants.hessian_lipschitz)),
            *(scaled(c) for c in (constants.mixed_norm, constants.mixed_lipschitz)),
            reason=constants.reason,
        )
        if not self.log_weight.requires_grad:
            return result
        # the column of the weight is the gradient: its norm has no bound for all x, its slope is the Hessian
        mixed = None
        if result.smoothness is not None:
            inside = result.mixed_lipschitz if self.regularizer.trainable() else torch.zeros_like(result.smoothness)
            mixed = None if inside is None else torch.hypot(result.smoothness, inside)
        return replace(result, mixed_norm=None, mixed_lipschitz=mixed)

    def coarse_gradient_scale(self, x: Tensor) -> Tensor | None:
        inside = self.regularizer.coarse_gradient_scale(x)
        return None if inside is None else self.log_weight.detach().double().exp() * inside

    def gradient_scale(self, x: Tensor) -> Tensor:
        return self.log_weight.detach().double().exp() * self.regularizer.gradient_scale(x)


def build_part(part: Part) -> Regularizer:
    """A regularizer from what describes it."""
    from bilevel_imaging.regularizers import REGULARIZERS

    if isinstance(part, Regularizer):
        return part
    if not isinstance(part, Mapping) or part.get("kind") not in REGULARIZERS:
        raise ValueError(
            f"Expected a Regularizer, or a dict with its arguments and its kind, one of {list(REGULARIZERS)}. "
            f"Got {part!r}."
        )
    kind = REGULARIZERS[part["kind"]]
    arguments = {name: value for name, value in part.items() if name != "kind"}
    allowed = argument_names(kind)
    if unknown := [name for name in arguments if name not in allowed]:
        raise ValueError(
            f"Expected arguments of {part['kind']}, some of {', '.join(allowed)}. Got {', '.join(map(str, unknown))}."
        )
    try:
        inspect.signature(kind).bind(**arguments)
    except TypeError as error:
        raise ValueError(f"Expected arguments of {part['kind']}. Got {arguments}: {error}.") from error
    return kind(**arguments)


def describe_part(part: Any) -> dict[str, Any]:
    """The dict from which :func:`build_part` makes the same, but for its parameters."""
    from bilevel_imaging.regularizers import REGULARIZERS

    kind = next((name for name, registered in REGULARIZERS.items() if registered is type(part)), None)
    if kind is None:
        raise ValueError(
            f"Expected parts of classes in REGULARIZERS, so that they can be rebuilt. Got {type(part).__name__}; add "
            "it there."
        )
    return {"kind": kind, **part.arguments()}
