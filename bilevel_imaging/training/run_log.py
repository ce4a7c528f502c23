"""All records of a run behind one object: metrics.jsonl, TensorBoard, progress, pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bilevel_imaging.cost import Cost
from bilevel_imaging.errors import CheckpointError
from bilevel_imaging.training import figures
from bilevel_imaging.training.metrics_log import MetricsLog, read_metrics
from bilevel_imaging.training.progress import Progress
from bilevel_imaging.training.tensorboard import TensorBoardLogger
from bilevel_imaging.upper_level.base import StepReport

METRICS_FILE = "metrics.jsonl"
PICTURES_FOLDER = "pictures"


def step_record(report: StepReport, step: int, cost: Cost, seconds: float, theta: Mapping[str, Tensor]) -> dict:
    """One line of ``metrics.jsonl``: the report, totals of the work, parameters with a single entry.

    ``trusted`` means that the certified error is smaller than the hypergradient, so that its negative is a descent
    direction for certain.
    """
    relative = report.error_bound / report.grad_norm if report.grad_norm > 0 else float("inf")
    return {
        "kind": "step",
        "step": step,
        "loss": report.loss,
        "loss_lower": report.loss_lower,
        "loss_upper": report.loss_upper,
        "grad_norm": report.grad_norm,
        "error_bound": report.error_bound,
        "relative_bound": relative,
        "certified": bool(report.certified),
        "trusted": bool(report.certified and relative < 1),
        "reason": report.reason,
        "eps": report.error_tol,
        "delta": report.residual_tol,
        "step_size": report.step_size,
        "accepted": bool(report.accepted),
        "refinements": report.refinements,
        "backtracks": report.backtracks,
        "param_change": report.param_change,
        "work": cost.work,
        "gradients": cost.gradients,
        "hvps": cost.hvps,
        "mixed_products": cost.mixed_products,
        "forward_ops": cost.forward_ops,
        "values": cost.values,
        "seconds": seconds,
        "stop": report.stop,
        "params": {name: float(t.detach()) for name, t in theta.items() if t.numel() == 1},
        "extra": dict(report.extra),
    }


def not_finite(report: StepReport, theta: Mapping[str, Tensor]) -> list[str]:
    """Names of what is not finite after a step."""
    values = (("loss", report.loss), ("hypergradient", report.grad_norm))
    bad = [name for name, value in values if not math.isfinite(value)]
    return bad + [name for name, tensor in theta.items() if not bool(torch.isfinite(tensor).all())]


class NoLog:
    """The log of the processes that write nothing."""

    def message(self, text: str) -> None:
        """One line on the terminal."""

    def step(self, record: Mapping[str, Any], theta: Mapping[str, Tensor]) -> None:
        """Log one finished step."""

    def validation(self, values: Mapping[str, float], step: int, theta: Mapping[str, Tensor]) -> None:
        """Log the values of one validation."""

    def images(self, images: Mapping[str, Tensor], step: int) -> None:
        """Log pictures; the last ones also become ``pictures/reconstructions.png`` at the end."""

    def flush(self) -> None:
        """Before a checkpoint: everything up to this step is on the disk."""

    def finish(self, loss: float, validation: Mapping[str, float], step: int) -> None:
        """At the end of ``fit``: hyperparameter metrics and the pictures; drawing them in between would cost time."""

    def close(self) -> None:
        """Close everything; safe after a failure."""


class RunLog(NoLog):
    """Logging that never ends a run: a sink that fails says so in one line.

    Args:
        folder: the run folder.
        config: nested settings, for TensorBoard.
        total: steps of the whole run.
        step: steps already done.
        resumed: whether the run goes on with what is in the folder.
        validation: values of the last validation.
        tensorboard: write events.
        progress: show progress.
    """

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        *,
        total: int,
        step: int,
        resumed: bool,
        validation: Mapping[str, float],
        tensorboard: bool,
        progress: bool,
    ) -> None:
        self.folder = folder
        self._metrics = MetricsLog(folder / METRICS_FILE)
        self._progress = Progress(total, step, enabled=progress)
        self._failed: set[str] = set()
        self._board: TensorBoardLogger | None = None
        self._validation = validation
        self._images: dict[str, Tensor] = {}
        if tensorboard:
            self._guard("TensorBoard events", lambda: self._open_board(config, step if resumed else None))

    def message(self, text: str) -> None:
        self._progress.message(text)

    def step(self, record: Mapping[str, Any], theta: Mapping[str, Tensor]) -> None:
        self._guard(METRICS_FILE, lambda: self._metrics.append(record))
        self._to_board(lambda board: board.log_step(record, theta))
        self._progress.update(record, self._validation)

    def validation(self, values: Mapping[str, float], step: int, theta: Mapping[str, Tensor]) -> None:
        self._validation = {**values, "step": step}
        self._guard(METRICS_FILE, lambda: self._metrics.append({"kind": "validation", "step": step, **values}))
        self._to_board(lambda board: board.log_validation(values, step, theta))

    def images(self, images: Mapping[str, Tensor], step: int) -> None:
        self._to_board(lambda board: board.log_images(images, step))
        self._images = {name: picture.detach().cpu() for name, picture in images.items()}

    def flush(self) -> None:
        self._guard(f"{METRICS_FILE} to the disk", self._metrics.sync)
        self._to_board(lambda board: board.flush())

    def finish(self, loss: float, validation: Mapping[str, float], step: int) -> None:
        self._progress.close()
        self._to_board(lambda board: board.log_result(loss, validation, step))
        folder = self.folder / PICTURES_FOLDER
        records = read_metrics(self.folder / METRICS_FILE)
        if any(record.get("kind") == "step" for record in records):
            curves = figures.training_figure(records)
            self._guard("training_curves.png", lambda: figures.save_figure(curves, folder / "training_curves.png"))
        if self._images:
            pictures = figures.reconstruction_figure(self._images)
            self._guard("reconstructions.png", lambda: figures.save_figure(pictures, folder / "reconstructions.png"))

    def close(self) -> None:
        self._progress.close()
        self._guard(METRICS_FILE, self._metrics.close)
        self._to_board(lambda board: board.close())
        self._board = None

    def _open_board(self, config: Mapping[str, Any], resumed_step: int | None) -> None:
        """Open the events; on resume, points after the checkpoint are purged and those over work written again."""
        self._board = TensorBoardLogger(self.folder, None if resumed_step is None else resumed_step + 1)
        if resumed_step is None:
            self._board.log_config(config)
        else:
            self._board.log_work(r for r in read_metrics(self.folder / METRICS_FILE) if r.get("kind") == "step")

    def _to_board(self, action: Callable[[TensorBoardLogger], None]) -> None:
        """TensorBoard's writer thread does not recover from an error, so that the first one ends it."""
        board = self._board
        if board is not None and not self._guard("TensorBoard events", lambda: action(board)):
            self._board = None
            board.abandon()

    def _guard(self, what: str, action: Callable[[], Any]) -> bool:
        """Do it; a failure to write is reported once until it works again."""
        try:
            action()
        except (OSError, ImportError) as error:
            if what not in self._failed:
                self._failed.add(what)
                reason = getattr(error, "strerror", None) or str(error)
                self.message(f"{what} not written: {reason}; the training goes on.")
            return False
        self._failed.discard(what)
        return True


def open_log(writes: bool, folder: Path, config: Mapping[str, Any], **options: Any) -> NoLog:
    """The log of a run in its folder, which is made if needed; one that keeps nothing if not ``writes``.

    Args:
        writes: whether this process does.
        folder: the run folder.
        config: nested settings.
        **options: of :class:`RunLog`.

    Raises:
        CheckpointError: the folder is not writable.
    """
    if not writes:
        return NoLog()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return RunLog(folder, config, **options)
    except OSError as error:
        raise CheckpointError(f"Cannot write to the run folder {folder}: {error.strerror}") from error
