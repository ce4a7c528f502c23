"""PSNR and SSIM on validation images while training: quick enough to look often."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import fmean

import torch
from torch import Tensor

from bilevel_imaging.data import ImagePairs
from bilevel_imaging.energies import VariationalEnergy
from bilevel_imaging.lower_solvers import LowerSolver, NewtonCG
from bilevel_imaging.training.evaluation import MAX_BATCH, pair_metrics, viewable, viewable_pairs
from bilevel_imaging.training.mean import bind_batch

# distance to the minimizer asked for: root mean square of the error of a pixel
PIXEL_ACCURACY = 1e-3


@dataclass
class Validator:
    """PSNR and SSIM on validation images, for ``Trainer(validate=v.validate, log_images=v.images)``.

    Reconstructs in the dtype of the pairs to a root mean square error of 1e-3 per pixel, images of one shape together,
    starting from the reconstructions of the last validation. Checkpoints do not hold these: after a resume the scores
    agree with those of an uninterrupted run to that accuracy, while theta agrees bit for bit.

    Attributes:
        energy: the energy that is trained.
        pairs: validation images.
        solver: lower-level solver, ``None`` for Newton-CG.
        max_images: how many pictures are shown.
    """

    energy: VariationalEnergy
    pairs: ImagePairs
    solver: LowerSolver | None = None
    max_images: int = 4
    _points: dict[int, Tensor] = field(default_factory=dict, repr=False)
    _measured: dict[str, float] = field(default_factory=dict, repr=False)

    def validate(self) -> dict[str, float]:
        """Means over the images: ``psnr``, ``ssim``, and ``psnr_noisy`` of the measurements (see :func:`viewable`)."""
        self._update()
        if not self._measured:
            self._measured = {"psnr_noisy": self._means(viewable_pairs(self.pairs))["psnr"]}
        return self._means(self._points) | self._measured

    def images(self) -> dict[str, Tensor]:
        """Pictures of the first images of one shape; call :meth:`validate` before for those of the current theta."""
        if not self._points:
            self._update()
        batch = self.pairs.batch(self.pairs.order(self.max_images)[0])
        shown = torch.stack([self._points[i] for i in batch.indices.tolist()])
        return {"gt": batch.x, "measurement": viewable(batch), "reconstruction": shown}

    def _update(self) -> None:
        solver = NewtonCG() if self.solver is None else self.solver
        for batch in self.pairs.batches(MAX_BATCH):
            indices = batch.indices.tolist()
            known = all(i in self._points for i in indices)
            start = torch.stack([self._points[i] for i in indices]) if known else None
            error_tol = PIXEL_ACCURACY * batch.x[0].numel() ** 0.5
            x = solver.solve(bind_batch(self.energy, batch), start, error_tol).x
            self._points.update(zip(indices, x.unbind(0), strict=True))

    def _means(self, images: dict[int, Tensor]) -> dict[str, float]:
        return {name: fmean(values) for name, values in pair_metrics(self.pairs, images).items()}
