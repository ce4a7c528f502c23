"""The expected upper-level loss over random patches: every hypergradient sees images of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from bilevel_imaging.data import RandomPatches
from bilevel_imaging.derivatives import Constants
from bilevel_imaging.energies import VariationalEnergy
from bilevel_imaging.linear_solvers import LinearSolver
from bilevel_imaging.lower_solvers import LowerSolver
from bilevel_imaging.training.mean import Chunk, MeanObjective
from bilevel_imaging.training.warm_starts import NoWarmStarts
from bilevel_imaging.upper_level import CertifiedValue, SamplingPenalty


class RandomPatchObjective(MeanObjective):
    """F(theta) = expectation over patches of loss(x*(theta), x), estimated from a fresh minibatch at every step.

    The only state is the number of minibatches taken: minibatches are functions of it, and images seen once leave no
    warm starts. For first-order methods; there is no loss of all images that a line search could compare.

    Args:
        energy: the lower-level energy; its trainable parameters are theta, changed in place by a method.
        patches: the minibatches.
        loss: upper-level loss, ``None`` for :class:`SquaredError`.
        lower: lower-level solver, ``None`` for Newton-CG.
        linear: adjoint solver, ``None`` for conjugate gradients.
        batch_size: most images solved together; changes results within their certificates only.
        certificate: passed to :func:`bilevel_imaging.hypergradient`.
        penalty: of theta, added to F; ``None`` for none.

    Raises:
        ValueError: from binding the energy (not strongly convex, wrong data).
    """

    def __init__(
        self,
        energy: VariationalEnergy,
        patches: RandomPatches,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        lower: LowerSolver | None = None,
        linear: LinearSolver | None = None,
        batch_size: int | None = None,
        certificate: str = "auto",
        penalty: SamplingPenalty | None = None,
    ):
        super().__init__(
            energy,
            loss,
            lower=lower,
            linear=linear,
            batch_size=batch_size,
            certificate=certificate,
            warm=NoWarmStarts(),
            penalty=penalty,
        )
        self.patches = patches
        self.taken = 0
        self.constants()  # what can not be bound is refused now

    @property
    def minibatch(self) -> int:
        """Patches of one hypergradient."""
        return self.patches.count

    def _next_chunks(self) -> list[Chunk]:
        batch = self.patches.batch(self.taken)
        self.taken += 1
        parts = batch.split(self.batch_size)
        return [self._chunk(parts[n], n) for n in self.processes.share([len(part.indices) for part in parts])]

    def constants(self) -> Constants:
        return self._chunk(self.patches.batch(0).split(1)[0]).problem.constants()

    def _all_chunks(self) -> Iterable[Chunk]:
        raise ValueError("Expected a finite set of images to go through. Got random patches: use ImagePairs.")

    def value(self, error_tol: float) -> CertifiedValue:
        """Not available.

        Raises:
            ValueError: always.
        """
        raise ValueError("Expected a finite set of images for a loss of all. Got random patches: use ImagePairs.")

    def state_dict(self) -> dict[str, Any]:
        """The number of minibatches taken."""
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            ValueError: if it is not there.
        """
        if "taken" not in state:
            raise ValueError(f"Expected a state of the objective with 'taken'. Got {sorted(state)}.")
        self.taken = int(state["taken"])
