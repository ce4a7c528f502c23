"""Work counters. One unit = one evaluation for one sample, so frozen samples are not counted."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields


@dataclass
class Cost:
    """Work done for lower-level problems; adds up with ``+``, differences with ``-``.

    Attributes:
        gradients: gradients of the lower-level energy, one per sample evaluated.
        hvps: Hessian-vector products, one per sample evaluated.
        mixed_products: products with the mixed derivative J or its transpose, one per sample.
        forward_ops: applications of the forward operator or its adjoint inside the above.
        values: evaluations of the energy itself.
        seconds: wall-clock time.
    """

    gradients: int = 0
    hvps: int = 0
    mixed_products: int = 0
    forward_ops: int = 0
    values: int = 0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def __sub__(self, other: Cost) -> Cost:
        return Cost(**{f.name: getattr(self, f.name) - getattr(other, f.name) for f in fields(self)})

    def copy(self) -> Cost:
        """An independent snapshot, to take differences with."""
        return Cost(**asdict(self))

    @property
    def work(self) -> int:
        """Gradients plus HVPs plus mixed products: the unit of the paper ("1 lower iteration = 1 AD iteration")."""
        return self.gradients + self.hvps + self.mixed_products
