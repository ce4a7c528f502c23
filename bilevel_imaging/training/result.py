"""How a run ended."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bilevel_imaging.cost import Cost


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """How a run ended.

    Attributes:
        status: "completed" (all steps done), "stopped" (the method says that it is finished), "interrupted" (Ctrl-C
            or SIGTERM) or "diverged" (a loss, gradient or parameter is not finite).
        reason: in words.
        steps: finished steps, those before a resume included.
        loss: last loss; NaN if no step was made.
        loss_interval: its certified interval; (-inf, inf) if not certified.
        summary: ``first_loss`` and how many steps were ``accepted`` and ``trusted``, sums of ``refinements`` and
            ``backtracks``.
        validation: values of the last validation, by name.
        cost: total work.
        seconds: total wall-clock time.
        run_dir: the run folder.
        checkpoint: newest checkpoint, ``None`` if none could be saved.
    """

    status: str
    reason: str
    steps: int
    loss: float
    loss_interval: tuple[float, float]
    summary: dict[str, float]
    validation: dict[str, float]
    cost: Cost
    seconds: float
    run_dir: Path
    checkpoint: Path | None
