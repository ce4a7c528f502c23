"""TensorBoard events of a comparison: the HParams page, and the measured losses over the work."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from bilevel_imaging.experiments.method_comparison_report import best_losses, excess, work_to_reach
from bilevel_imaging.training.interrupts import uninterrupted

Record = dict[str, Any]

LOSS_TAG = "comparison/loss_over_work"


def write_hparams(record: Record, folder: Path) -> list[Path]:
    """A run for every method, seed and setting: its settings, its numbers as metrics, and its curve.

    Args:
        record: of :func:`bilevel_imaging.experiments.method_comparison.run`.
        folder: for ``tensorboard --logdir``; every run gets a folder of its own in it.

    Returns:
        the folders of the runs.

    Raises:
        ImportError: TensorBoard is not installed.
        OSError: the folder is not writable.
    """
    with uninterrupted():
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

    best, written = best_losses(record), []
    for number, one in enumerate(record["runs"]):
        name = re.sub(r"[^\w.-]+", "_", f"{one['label']}_seed{one['seed']}").strip("_")
        path = folder / f"{number:02d}_{name}"
        metrics = _metrics(one, best.get(one["seed"], math.nan))
        with SummaryWriter(log_dir=str(path)) as writer:
            for summary in hparams(_plain(one), metrics):
                writer.file_writer.add_summary(summary)
            for tag, value in metrics.items():
                if math.isfinite(value):  # TensorBoard shows a run without a metric, but no infinite numbers
                    writer.add_scalar(tag, value, one["steps"])
            for point in one["curve"]:
                if point["measured"] is not None and point["measured"]["loss"] is not None:
                    writer.add_scalar(LOSS_TAG, point["measured"]["loss"], point["work"])
        written.append(path)
    return written


def _plain(one: Record) -> dict[str, bool | int | float | str]:
    """Settings as TensorBoard takes them."""
    given = {"label": one["label"], "seed": one["seed"], **one["settings"]}
    return {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in given.items()}


def _metrics(one: Record, best: float) -> dict[str, float]:
    final = one["final"]
    return {
        "hparam/loss": math.nan if final is None or final["loss"] is None else final["loss"],
        "hparam/excess": excess(final, best),
        "hparam/work": float(one["work"]),
        "hparam/seconds": one["seconds"],
        "hparam/work_to_half_percent": work_to_reach(one, best),
    }
