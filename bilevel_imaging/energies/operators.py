"""Any deepinv ``LinearPhysics`` as an operator that can be restricted to samples and evaluated in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cached_property

import torch
from deepinv.physics import LinearPhysics
from torch import Tensor, nn

from bilevel_imaging.tensors import inner, norm

# what deepinv and torch raise when a tensor does not fit an operator
MISFITS = (RuntimeError, ValueError, AssertionError, IndexError, TypeError, AttributeError)
# relative error of <A u, w> = <u, A^T w> for random u and w, far above what rounding makes of it
ADJOINT_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}
# a product in float32 agrees with that in float64 to this, interpolation weights included
DOUBLE_TOLERANCE = 1e-3


class Operator:
    """A linear physics for images of one shape.

    Args:
        physics: linear.
        shape: of a batch of images, ``(B, C, H, W)``.
        like: a tensor with their dtype and device.
        per_image: names of the stored tensors that hold one entry for every image; found out when needed by default.
    """

    def __init__(
        self, physics: LinearPhysics, shape: torch.Size, like: Tensor, per_image: frozenset[str] | None = None
    ):
        self.physics, self.shape, self.like = physics, shape, like[:0].detach().flatten()
        self.dtype, self.device = like.dtype, like.device
        if per_image is not None:
            self.per_image = per_image

    def apply(self, x: Tensor) -> Tensor:
        """A x."""
        return self.physics.A(x)

    def adjoint(self, y: Tensor) -> Tensor:
        """A^T y."""
        return self.physics.A_adjoint(y)

    def normal(self, x: Tensor) -> Tensor:
        """A^T A x."""
        return self.adjoint(self.apply(x))

    @cached_property
    @torch.no_grad()
    def per_image(self) -> frozenset[str] | None:
        """Names of the stored tensors with one entry for every image; ``None`` if the operator can't be taken apart.

        A first dimension B says that a tensor may be one of them; products say whether it is one. That all are shared
        is tried first: an operator with entries for B images can't be applied to one.
        """
        batch = self.shape[0]
        stored = dict(_stored_tensors(self.physics))
        candidates = frozenset(name for name, t in stored.items() if t.dim() > 1 and t.shape[0] == batch > 1)
        parts = [torch.tensor([batch - 1])] + [torch.tensor([batch - 1, 0])] * (batch > 2)
        probe = self._probe(self.shape, seed=2)
        whole, tolerance = self.normal(probe), ADJOINT_TOLERANCE[self.dtype]
        for names in dict.fromkeys((frozenset(), candidates)):
            try:
                found = [self._restricted(index, names).normal(probe[index]) for index in parts]
            except MISFITS:
                continue
            if all(_same(part, whole[index], tolerance) for part, index in zip(found, parts, strict=True)):
                return names
        return None

    def subset(self, index: Tensor) -> Operator | None:
        """The operators of the samples ``index``; ``None`` if they can't be separated."""
        return None if self.per_image is None else self._restricted(index, self.per_image)

    def _restricted(self, index: Tensor, names: frozenset[str]) -> Operator:
        physics = self.physics
        if names:
            physics = _with_tensors(physics, lambda name, t: t[index.to(t.device)] if name in names else t)
        return Operator(physics, torch.Size((len(index), *self.shape[1:])), self.like, names)

    @torch.no_grad()
    def double(self) -> Operator | None:
        """The same stored numbers in float64; ``None`` if the physics does not follow, which one product tells."""
        try:
            physics = _with_tensors(self.physics, _cast_up)
            exact = Operator(physics, self.shape, self.like.double(), self.__dict__.get("per_image"))
            probe = self._probe(self.shape, seed=2)
            product, given = exact.normal(probe.double()), self.normal(probe)
        except (*MISFITS, copy.Error):
            return None
        return exact if product.dtype == torch.float64 and _same(product, given.double(), DOUBLE_TOLERANCE) else None

    @torch.no_grad()
    def check_adjoint(self, measured: torch.Size) -> None:
        """Compare <A u, w> with <u, A^T w> for random u and w.

        Raises:
            ValueError: if they differ by more than rounding explains.
        """
        u, w = self._probe(self.shape, seed=0), self._probe(measured, seed=1)
        forward, back = self.apply(u), self.adjoint(w)
        difference = (inner(forward.double(), w.double()) - inner(u.double(), back.double())).abs()
        error = float((difference / torch.maximum(norm(forward), norm(back)).double().clamp(min=1e-300)).max())
        if not error <= ADJOINT_TOLERANCE[self.dtype]:
            raise ValueError(
                f"Expected A_adjoint of {type(self.physics).__name__} to be the transpose of A. Got a relative "
                f"difference of {error:.1e} in <A u, w> = <u, A_adjoint w>; gradients would be wrong. Use an exact "
                "adjoint (Tomography: adjoint_via_backprop=True)."
            )

    def _probe(self, shape: torch.Size, seed: int) -> Tensor:
        """Standard normal numbers that depend on the seed alone: an image gets the same ones in every dtype."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device=self.device, dtype=self.dtype)


def _same(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return a.shape == b.shape and bool((norm(a - b) <= tolerance * norm(b)).all())


def _cast_up(name: str, t: Tensor) -> Tensor:
    # nn.Module.double() would drop the imaginary part of complex numbers
    if t.is_complex():
        return t.to(torch.complex128)
    return t.double() if t.is_floating_point() else t


def _stored_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, part in module.named_modules():
        for name, value in (*part._parameters.items(), *part._buffers.items(), *vars(part).items()):
            if isinstance(value, Tensor):
                yield f"{prefix}.{name}", value


@torch.no_grad()
def _with_tensors(physics: LinearPhysics, change: Callable[[str, Tensor], Tensor]) -> LinearPhysics:
    """A copy whose stored tensors are changed, and nothing else is copied that can be shared."""
    memo: dict[int, object] = {id(t): change(name, t) for name, t in _stored_tensors(physics)}
    for part in physics.modules():
        memo |= {id(value): value for value in vars(part).values() if isinstance(value, torch.Generator)}
    other = copy.deepcopy(physics, memo)
    for part in other.modules():
        if isinstance(getattr(part, "dtype", None), torch.dtype):
            stored = [t.dtype for _, t in _stored_tensors(part) if t.is_floating_point()]
            part.dtype = stored[0] if stored else part.dtype
        if hasattr(part, "_auto_grad_adjoint_fn"):  # deepinv's Tomography keeps the transpose of the original there
            part._auto_grad_adjoint_fn = None
    return other
