"""TensorBoard events of a run: the tags, the table of the configuration, the layout with certified intervals."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bilevel_imaging.training.figures import image_grid
from bilevel_imaging.training.interrupts import uninterrupted

# Tag of every scalar and the name of the record entry that holds it.
STEP_TAGS = {
    "upper/loss": "loss",
    "upper/loss_lower_bound": "loss_lower",
    "upper/loss_upper_bound": "loss_upper",
    "upper/step_size": "step_size",
    "upper/grad_norm": "grad_norm",
    "upper/param_change": "param_change",
    "hypergrad/norm": "grad_norm",
    "hypergrad/error_bound": "error_bound",
    "hypergrad/relative_bound": "relative_bound",
    "hypergrad/trusted": "trusted",
    "accuracy/eps": "eps",
    "accuracy/delta": "delta",
    "accuracy/n_refinements": "refinements",
    "cost/lower_grads": "gradients",
    "cost/hvps": "hvps",
    "cost/jvps": "mixed_products",
    "cost/forward_ops": "forward_ops",
    "cost/seconds": "seconds",
}
# TensorBoard prints tiny values as 0 and has linear axes only, hence decimal logarithms beside the values.
LOG_TAGS = {
    "accuracy/log10_eps": "eps",
    "accuracy/log10_delta": "delta",
    "hypergrad/log10_error_bound": "error_bound",
    "hypergrad/log10_relative_bound": "relative_bound",
}
WORK_TAG = "cost/loss_over_work"
IMAGE_TAG = "val/gt_measurement_reconstruction_error"
LAYOUT = {
    "upper level": {
        "loss with certified bounds": ["Margin", ["upper/loss", "upper/loss_lower_bound", "upper/loss_upper_bound"]],
        "hypergradient and its error bound": ["Multiline", ["hypergrad/norm", "hypergrad/error_bound"]],
    },
    "accuracy": {"log10 of eps and delta": ["Multiline", ["accuracy/log10_eps", "accuracy/log10_delta"]]},
}


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested configuration as one level with dotted names."""
    result: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            result.update(flatten(value, f"{prefix}{key}."))
        else:
            result[f"{prefix}{key}"] = value
    return result


def markdown_table(config: Mapping[str, Any]) -> str:
    """The configuration as a Markdown table."""
    rows = [f"| {key} | {str(value).replace('|', chr(92) + '|')} |" for key, value in flatten(config).items()]
    return "\n".join(["| setting | value |", "| --- | --- |", *rows])


class TensorBoardLogger:
    """Writes the events of one run straight into its folder (no sub-runs).

    Args:
        folder: the run folder.
        purge_step: on resume the first step that will be written again; later points of the interrupted run vanish.
            ``None`` for a new run.

    Raises:
        ImportError: TensorBoard is not installed.
        OSError: the folder is not writable. Every method may raise this, too: the writing happens in a thread.
    """

    def __init__(self, folder: str | Path, purge_step: int | None = None) -> None:
        with uninterrupted():
            from torch.utils.tensorboard import SummaryWriter

        self.folder = Path(folder)
        if purge_step is not None:
            _wait_for_a_later_name(self.folder)
        self._hook_before = threading.excepthook
        self._hook = self._quiet_writer_thread
        threading.excepthook = self._hook
        self._writer = SummaryWriter(log_dir=str(self.folder), purge_step=purge_step)

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Once per run: configuration as text and as hyperparameters, and the layout of the custom charts."""
        from torch.utils.tensorboard.summary import hparams

        self._writer.add_text("config", markdown_table(config), 0)
        self._writer.add_custom_scalars(LAYOUT)
        plain = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in flatten(config).items()}
        # What SummaryWriter.add_hparams(..., run_name=".") would write, without its second event file.
        for summary in hparams(plain, {"hparam/loss": 0.0, "hparam/val_psnr": 0.0}):
            self._writer.file_writer.add_summary(summary)  # type: ignore[attr-defined]

    def log_step(self, record: Mapping[str, Any], theta: Mapping[str, Tensor]) -> None:
        """Scalars of one step and every parameter with a single entry; the names are the record's."""
        step = record["step"]
        for tag, name in STEP_TAGS.items():
            self._scalar(tag, record[name], step)
        for tag, name in LOG_TAGS.items():
            self._scalar(tag, math.log10(record[name]) if record[name] > 0 else math.nan, step)
        for name, value in record["extra"].items():
            self._scalar(name if "/" in name else f"upper/{name}", value, step)
        if torch.cuda.is_initialized():
            self._scalar("cost/gpu_mem", torch.cuda.max_memory_allocated() / 2**30, step)
        for name, tensor in theta.items():
            if tensor.numel() == 1:
                self._scalar(f"params/{name}", float(tensor.detach()), step)
        self.log_work([record])

    def log_work(self, records: Iterable[Mapping[str, Any]]) -> None:
        """The loss over work instead of steps. After a purge, which knows steps only, it is written again."""
        for record in records:
            self._scalar(WORK_TAG, record["loss"], record["work"])

    def log_validation(self, values: Mapping[str, float], step: int, theta: Mapping[str, Tensor]) -> None:
        """``val/<name>`` for every value, and histograms of the parameters with more than one entry."""
        for name, value in values.items():
            self._scalar(name if "/" in name else f"val/{name}", value, step)
        for name, tensor in theta.items():
            if tensor.numel() > 1 and bool(torch.isfinite(tensor).all()):
                self._writer.add_histogram(f"params/{name}", tensor.detach().cpu(), step)

    def log_images(self, images: Mapping[str, Tensor], step: int) -> None:
        """One grid of gt | measurement | reconstruction | error; keys with a slash are tags of further pictures.

        Args:
            images: ``(B, C, H, W)`` in [0, 1]; see ``figures.columns``. Further pictures ``(C, H, W)``.
            step: finished steps.
        """
        self._writer.add_image(IMAGE_TAG, image_grid(images), step)
        for tag, picture in images.items():
            if "/" in tag:
                self._writer.add_image(tag, picture.detach().cpu().clamp(0, 1), step)

    def log_result(self, loss: float, validation: Mapping[str, float], step: int) -> None:
        """The metrics of the hyperparameter page."""
        self._scalar("hparam/loss", loss, step)
        self._scalar("hparam/val_psnr", validation.get("psnr", math.nan), step)

    def flush(self) -> None:
        """Hand everything to the operating system, so that a killed run keeps what its checkpoint knows."""
        self._writer.flush()

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()
        self._restore_hook()

    def abandon(self) -> None:
        """Give up after an error, without raising another one."""
        with suppress(Exception):
            self._writer.close()
        self._restore_hook()

    def _quiet_writer_thread(self, args: threading.ExceptHookArgs) -> None:
        """A full disk is reported once, by the caller that sees it; the writer thread needs no traceback of its own."""
        ours = type(args.thread).__module__.startswith("tensorboard.")
        if not (ours and issubclass(args.exc_type, OSError)):
            self._hook_before(args)

    def _restore_hook(self) -> None:
        if threading.excepthook == self._hook:
            threading.excepthook = self._hook_before

    def _scalar(self, tag: str, value: float | None, step: int) -> None:
        """Write one number; what is not finite is left out, since it breaks the charts."""
        if value is not None and math.isfinite(value):
            self._writer.add_scalar(tag, float(value), step)


def _wait_for_a_later_name(folder: Path) -> None:
    """Event files are read in the order of the second in their names: never resume within that second."""
    stamps = [path.name.split(".")[3] for path in folder.glob("events.out.tfevents.*")]
    newest = max((int(stamp) for stamp in stamps if stamp.isdigit()), default=0)
    while newest <= time.time() < newest + 1:
        time.sleep(0.05)
