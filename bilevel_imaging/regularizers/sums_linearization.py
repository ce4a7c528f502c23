"""Derivatives of a sum of regularizers frozen at one x, from the linearizations of its parts."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bilevel_imaging.derivatives import Constants, Directional, Linearization, LocalChange, NewtonModel
from bilevel_imaging.tensors import norm

if TYPE_CHECKING:
    from bilevel_imaging.regularizers.sums import Sum


DIAGONAL = "hessian_diagonal"  # which not every linearization has


def _sum(values: list[Tensor]) -> Tensor:
    return sum(values[1:], start=values[0])


def _known(values: list[Tensor | None]) -> list[Tensor] | None:
    """The values if none is missing."""
    return None if any(v is None for v in values) else values


class SumLinearization(Linearization):
    """Products add up, columns of J stand side by side, and whatever one part does not know is not known."""

    def __init__(self, regularizer: Sum, parts: list[Linearization], shape: torch.Size):
        self.regularizer, self.parts, self.shape = regularizer, parts, shape
        self.constants_of_parts = [part.constants(shape) for part in regularizer.regularizers]
        self.constants = regularizer.total(self.constants_of_parts, shape[0])
        self.grad = _sum([part.grad for part in parts])

    def hvp(self, v: Tensor) -> Tensor:
        return _sum([part.hvp(v) for part in self.parts])

    def mixed_vjp(self, q: Tensor) -> dict[str, Tensor]:
        return {
            f"parts.{k}.{name}": product
            for k, part in enumerate(self.parts)
            for name, product in part.mixed_vjp(q).items()
        }

    @cached_property
    def _learned(self) -> list[tuple[Linearization, Constants]]:
        """The parts with columns in J, and their constants."""
        known = zip(self.regularizer.regularizers, self.parts, self.constants_of_parts, strict=True)
        return [(part, constants) for regularizer, part, constants in known if regularizer.trainable()]

    @cached_property
    def _columns(self) -> list[Tensor | None]:
        return [part.mixed_columns() for part, _ in self._learned]

    def mixed_columns(self) -> Tensor | None:
        columns = _known(self._columns)
        return None if columns is None else torch.cat([self.grad.unsqueeze(1)[:, :0], *columns], 1)

    def mixed_energy_norms(self) -> Tensor | None:
        # what bounds ||J_j||_{H^-1} with the Hessian of one part bounds it with that of the sum, which is no smaller
        norms = _known([part.mixed_energy_norms() for part, _ in self._learned])
        none = self.grad.new_zeros((self.shape[0], 0), dtype=torch.float64)
        return None if norms is None else torch.cat([none, *norms], 1)

    def mixed_norm_bound(self) -> Tensor | None:
        bounds = []
        for (part, constants), columns in zip(self._learned, self._columns, strict=True):
            bound = part.mixed_norm_bound() if columns is None else columns.flatten(1).double().norm(dim=1)
            bound = constants.mixed_norm if bound is None else bound
            if bound is None:
                return None
            bounds.append(bound)
        return torch.stack([torch.zeros_like(norm(self.grad).double()), *bounds]).norm(dim=0)

    def mixed_block_norms(self, strong_convexity: Tensor) -> Tensor | None:
        norms = [
            _block_norms(part, columns, strong_convexity)
            for (part, _), columns in zip(self._learned, self._columns, strict=True)
        ]
        known = _known(norms)
        return torch.cat(known, 1) if known else None

    def directional(self, q: Tensor, radius: Tensor) -> Directional | None:
        known = []
        for regularizer, part, constants in zip(
            self.regularizer.regularizers, self.parts, self.constants_of_parts, strict=True
        ):
            along = directional_of(part, constants, bool(regularizer.trainable()), q, radius)
            if along is None:
                return None
            known.append(along)
        components = _known([along.mixed_components for along in known])
        return Directional(
            _sum([along.hessian for along in known]),
            torch.stack([along.mixed for along in known]).norm(dim=0),
            None if components is None else torch.cat(components, 1),
        )

    def constants_on_ball(self, radius: Tensor) -> Constants | None:
        balls = [part.constants_on_ball(radius) for part in self.parts]
        if all(ball is None for ball in balls):
            return None
        known = [c if ball is None else ball for c, ball in zip(self.constants_of_parts, balls, strict=True)]
        return self.regularizer.total(known, self.shape[0])

    @property
    def length_scale(self) -> float:
        return min(part.length_scale for part in self.parts)

    def _shares(self, strong_convexity: Tensor, changing: list[bool]) -> list[Tensor]:
        """mu_k, one per part, such that the energies R_k + (mu_k - own) / 2 ||x||^2 add up to at most g."""
        own = [c.strong_convexity for c in self.constants_of_parts]
        lent = (strong_convexity.double() - _sum(own)) / max(1, sum(changing)) * (1 - 1e-6)
        return [(mu + lent).to(strong_convexity.dtype) for mu in own]

    def _combined(
        self, of_part: Callable[[Linearization, Tensor], Tensor | None], strong_convexity: Tensor
    ) -> Tensor | None:
        """K of the sum from those of its parts, of which each is K_k(strong convexity).

        Each is valid relative to the whole Hessian: their sum is too. It is also valid relative to the Hessian of
        R_k + m_k / 2 ||x||^2, and where these add up to no more than g the largest K_k is enough.
        """
        known = _known([of_part(part, strong_convexity) for part in self.parts])
        if known is None:
            return None
        total = _sum(known)
        changing = [bool((k > 0).any()) for k in known]
        if sum(changing) < 2 or any(c.strong_convexity is None for c in self.constants_of_parts):
            return total
        shares = self._shares(strong_convexity, changing)
        if not all(bool((share > 0).all()) for share in shares):
            return total
        active = [(part, share) for part, share, c in zip(self.parts, shares, changing, strict=True) if c]
        split = [of_part(part, share) for part, share in active]
        return torch.minimum(total, torch.stack(split).amax(0))

    def relative_curvature(self, radius: Tensor, strong_convexity: Tensor) -> Tensor | None:
        return self._combined(lambda part, mu: part.relative_curvature(radius, mu), strong_convexity)

    def local_change(self, q: Tensor, radius: Tensor, strong_convexity: Tensor) -> LocalChange | None:
        changes = [part.local_change(q, radius, strong_convexity) for part in self.parts]
        if any(change is None for change in changes):
            return None
        # |D^3 R_k[e, q, u]| <= hessian_k ||e||_H ||u||_H for every part; each is a part of H, and so is their sum R
        slopes = [
            change.slopes
            for change, part in zip(changes, self.regularizer.regularizers, strict=True)
            if part.trainable()
        ]
        if any(slope.dim() == 2 for slope in slopes):
            slopes = [_by_sample(slope, self.shape[0]) for slope in slopes]
        none = torch.zeros(0, dtype=torch.float64, device=self.grad.device)
        return LocalChange(
            _sum([change.hessian for change in changes]),
            torch.cat(slopes, -1) if slopes else none,
            torch.stack([change.energy for change in changes]).norm(dim=0),
        )

    @property
    def hessian_diagonal(self) -> Callable[[], Tensor]:
        """Diagonal of the Hessian, ``(B, C, H, W)``; no such attribute where a part has none."""
        diagonals = [getattr(part, DIAGONAL) for part in self.parts]
        return lambda: _sum([diagonal() for diagonal in diagonals])

    def diffusion(self) -> Tensor | None:
        return _total_diffusion(self.parts)

    def newton_memory(self, *, cold: bool) -> Tensor | None:
        """Those of the parts that have a model, one after the other in one row per sample."""
        memories = [part.newton_memory(cold=cold) for part in self.parts]
        kept = [memory.flatten(1) for memory in memories if memory is not None]
        return torch.cat(kept, 1) if kept else None

    def newton_model(self, memory: Tensor) -> NewtonModel | None:
        like = [part.newton_memory(cold=True) for part in self.parts]
        sizes = [0 if m is None else m[0].numel() for m in like]
        pieces = [
            None if m is None else piece.reshape(m.shape) for m, piece in zip(like, memory.split(sizes, 1), strict=True)
        ]
        models = [
            None if piece is None else part.newton_model(piece) for part, piece in zip(self.parts, pieces, strict=True)
        ]
        return None if all(m is None for m in models) else _SumModel(self.parts, models, memory.split(sizes, 1))

    def subset(self, index: Tensor) -> Linearization | None:
        parts = [part.subset(index) for part in self.parts]
        if any(part is None for part in parts):
            return None
        return SumLinearization(self.regularizer, parts, torch.Size((len(index), *self.shape[1:])))


def directional_of(
    part: Linearization, constants: Constants, learned: bool, q: Tensor, radius: Tensor
) -> Directional | None:
    """Constants along q of a part, from its constants on the ball if it has no better ones."""
    along = part.directional(q, radius)
    if along is not None:
        return along
    ball = part.constants_on_ball(radius)
    constants = constants if ball is None else ball
    if constants.hessian_lipschitz is None or (learned and constants.mixed_lipschitz is None):
        return None
    size = norm(q).double()
    hessian = (constants.hessian_lipschitz * size).to(q.dtype)
    if not learned:
        return Directional(hessian, torch.zeros_like(hessian), hessian.new_zeros((len(q), 0)))
    return Directional(hessian, (constants.mixed_lipschitz * size).to(q.dtype))


def _block_norms(part: Linearization, columns: Tensor | None, strong_convexity: Tensor) -> Tensor | None:
    """||J_b||_{H^-1} for the blocks of a part, which are its columns where it has them."""
    if columns is None:
        return part.mixed_block_norms(strong_convexity)
    norms = columns.flatten(2).double().norm(dim=2) / strong_convexity.double().sqrt().unsqueeze(1)
    own = part.mixed_energy_norms()
    return norms if own is None else torch.minimum(norms, own)


def _by_sample(slopes: Tensor, batch: int) -> Tensor:
    """Slopes of columns like those of blocks, ``(B, n)``."""
    return slopes if slopes.dim() == 2 else slopes.expand(batch, -1)


def _total_diffusion(parts: list[Linearization | NewtonModel]) -> Tensor | None:
    known = _known([part.diffusion() for part in parts])
    return None if known is None else _sum(known)


class _SumModel(NewtonModel):
    """The models of the parts, with the Hessians of those that have none."""

    def __init__(self, parts: list[Linearization], models: list[NewtonModel | None], memories: tuple[Tensor, ...]):
        self.models, self.memories = models, memories
        self.products = [part if model is None else model for part, model in zip(parts, models, strict=True)]

    def hvp(self, v: Tensor) -> Tensor:
        return _sum([product.hvp(v) for product in self.products])

    def diffusion(self) -> Tensor | None:
        return _total_diffusion(self.products)

    def advance(self, d: Tensor, step: Tensor) -> Tensor:
        return torch.cat(
            [
                memory if model is None else model.advance(d, step).flatten(1)
                for model, memory in zip(self.models, self.memories, strict=True)
            ],
            1,
        )
