"""The training loop: steps of an upper-level method, logged, saved, and resumed bit for bit.

What a step computes never depends on time, on validation or on the schedule of checkpoints. Validations are no steps:
one that starts from what the last one has found (``Validator``) may differ after a resume, within its accuracy.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bilevel_imaging.cost import Cost
from bilevel_imaging.errors import BilevelError, CheckpointError, NotStronglyConvexError
from bilevel_imaging.training.checkpoints import CheckpointStore
from bilevel_imaging.training.distributed import ALONE, Processes
from bilevel_imaging.training.interrupts import SignalGuard
from bilevel_imaging.training.metrics_log import read_metrics, truncate_metrics
from bilevel_imaging.training.result import TrainingResult
from bilevel_imaging.training.run_log import METRICS_FILE, NoLog, not_finite, open_log, step_record
from bilevel_imaging.training.state import (
    TrainableObjective,
    digest,
    full_state,
    preserved,
    restore_state,
    restore_theta,
)
from bilevel_imaging.upper_level.base import StepReport, UpperLevelMethod

CHECKPOINT_FOLDER = "checkpoints"


class Trainer:
    """Runs an upper-level method on an objective and keeps a run folder.

    The folder holds ``checkpoints/step-*.pt``, ``metrics.jsonl``, TensorBoard events and ``pictures/*.png``.

    Several processes that share an objective each have a trainer, on one folder: the first one alone validates, writes
    and shows; a signal to any of them stops all after the same step; and what fails in one of them ends all.

    Args:
        objective: gives values and hypergradients; ``theta`` is changed in place.
        method: one call of ``step`` is one step.
        run_dir: the run folder, made if needed.
        max_steps: steps of the whole run, >= 0, those before a resume included.
        validate: returns numbers by name, e.g. ``psnr``, ``ssim``, ``psnr_noisy``. Called before the first step,
            every ``validate_every`` steps and at the end, with what the method has :meth:`learned`; what it does to
            random numbers, theta and warm starts is undone.
        validate_every: steps; 0 for only at the end.
        checkpoint_every: steps, >= 1. A checkpoint is also saved before the first step, at the end and on Ctrl-C.
        log_images: called with every validation, returns ``gt``, ``measurement`` and ``reconstruction``, each
            ``(B, C, H, W)``, and any further picture ``(C, H, W)`` under a TensorBoard tag with a slash.
        config: nested settings, shown by TensorBoard and kept in every checkpoint.
        generators: further generators on which the steps depend (data order), by name; saved and restored.
        tensorboard: write events.
        progress: show a bar, or lines where there is no terminal.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(
        self,
        objective: TrainableObjective,
        method: UpperLevelMethod,
        run_dir: str | Path,
        *,
        max_steps: int,
        validate: Callable[[], Mapping[str, float]] | None = None,
        validate_every: int = 10,
        checkpoint_every: int = 10,
        log_images: Callable[[], Mapping[str, Tensor]] | None = None,
        config: Mapping[str, Any] | None = None,
        generators: Mapping[str, torch.Generator] | None = None,
        tensorboard: bool = True,
        progress: bool = True,
    ) -> None:
        for name, value, least in (
            ("max_steps", max_steps, 0),
            ("validate_every", validate_every, 0),
            ("checkpoint_every", checkpoint_every, 1),
        ):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"Expected {name} as an integer >= {least}. Got {value!r}.")
        self.objective, self.method, self.run_dir = objective, method, Path(run_dir)
        self.processes: Processes = getattr(objective, "processes", ALONE)
        self.max_steps = max_steps
        self.validate, self.validate_every, self.log_images = validate, validate_every, log_images
        self.checkpoint_every = checkpoint_every
        self.config = dict(config or {})
        self.generators = dict(generators or {})
        self.tensorboard, self.progress = tensorboard, progress
        self.store = CheckpointStore(self.run_dir / CHECKPOINT_FOLDER)
        self.step, self.cost, self.seconds = 0, Cost(), 0.0
        self._run: dict[str, Any] = {
            "validation": {},
            "validated": -1,
            "stop": "",
            "loss": [math.nan, -math.inf, math.inf],
            "summary": {},
        }
        self._saved: int | None = None  # step of the newest checkpoint of this run
        self._consistent = True  # False from the start of a step until its state can be trusted
        self._started = False
        self._clock = 0.0

    def resume(self, *, missing_ok: bool = False, check: Callable[[Mapping[str, Any]], None] | None = None) -> int:
        """Load the newest readable checkpoint of the run folder.

        Args:
            missing_ok: start from the first step, without an error, if no checkpoint was ever saved there, as after a
                kill within the first moments.
            check: called with the ``config`` of the checkpoint before anything changes; raises if it does not fit.

        Returns:
            The finished steps.

        Raises:
            CheckpointError: there is no readable checkpoint, or it does not fit objective or method.
        """
        path = self.processes.everywhere(lambda: self._restore(missing_ok, check))
        self.processes.check_same("checkpoint", lambda: self.step)
        self.processes.first(lambda: self._cut_back(path))
        return self.step

    def _restore(self, missing_ok: bool, check: Callable[[Mapping[str, Any]], None] | None) -> Path | None:
        """Read the newest checkpoint; its file, ``None`` where there is none."""
        if missing_ok and not self.store.paths():
            steps = sum(record.get("kind") == "step" for record in read_metrics(self.run_dir / METRICS_FILE))
            if steps:
                raise CheckpointError(
                    f"{self.store.folder}: no checkpoint, but {METRICS_FILE} has {steps} steps. Put the checkpoints "
                    "back, or start a new run."
                )
            return None
        state, path = self.store.load()
        if check is not None and "config" in state:  # older checkpoints have none
            check(state["config"])
        restore_state(state, self.objective, self.method, self.generators, str(path))
        self.step, self.cost, self.seconds = state["step"], Cost(**state["cost"]), state["seconds"]
        self._run = dict(state["run"])
        self._saved, self._consistent, self._started = self.step, True, True
        return path

    def _cut_back(self, path: Path | None) -> None:
        """Drop what was written after the checkpoint."""
        if path is None:
            truncate_metrics(self.run_dir / METRICS_FILE, -1, -1)
        else:
            self.store.set_aside_after(path)
            truncate_metrics(self.run_dir / METRICS_FILE, self.step, self._run["validated"])

    def fit(self) -> TrainingResult:
        """Train until ``max_steps``, until the method stops, or until Ctrl-C.

        The first Ctrl-C (or SIGTERM) lets the step finish and saves; the second raises KeyboardInterrupt at once and
        leaves the last checkpoint as it is.

        Raises:
            ValueError: the folder holds another run, or the last ``fit`` was broken off within a step.
            CheckpointError: the folder is not writable.
            KeyboardInterrupt: second Ctrl-C.
        """
        self.processes.first(self._check_start)
        self._clock = time.perf_counter() - self.seconds  # now - clock is the time of the whole run
        quiet = self.processes.rank > 0
        with SignalGuard(quiet=quiet) as guard, closing(self.processes.everywhere(self._open_log)) as log:
            status, reason = self._loop(log, guard)
            log.finish(self._run["loss"][0], self._run["validation"], self.step)
        return self._result(status, reason)

    @contextmanager
    def learned(self) -> Iterator[None]:
        """Inside, theta is what to validate, export and evaluate: the average, where the method keeps one.

        Whatever the body does to theta, random numbers and warm starts is undone: the run can go on.
        """
        with preserved(self.objective, self.generators):
            theta = self.method.learned()
            if theta is not None:
                restore_theta(self.objective.theta, theta, "memory")
            yield

    def _open_log(self) -> NoLog:
        options = {"validation": self._run["validation"], "tensorboard": self.tensorboard, "progress": self.progress}
        steps = {"total": self.max_steps, "step": self.step, "resumed": self._started}
        log = open_log(self.processes.rank == 0, self.run_dir, self.config, **steps, **options)
        self._started = True
        return log

    def _check_start(self) -> None:
        metrics = self.run_dir / METRICS_FILE
        if not self._started and (self.store.paths() or (metrics.exists() and metrics.stat().st_size > 0)):
            raise ValueError(f"{self.run_dir} already holds a run. Call resume() first, or choose another folder.")
        if not self._consistent:
            raise ValueError("The last fit was broken off within a step. Call resume() to go back to its checkpoint.")

    def _loop(self, log: NoLog, guard: SignalGuard) -> tuple[str, str]:
        """Steps with what is due between them; returns status and reason."""
        if self._saved is None:
            self._save(log)
        while True:
            done = self.step >= self.max_steps or bool(self._run["stop"])
            asked = self.processes.any(guard.requested)
            if not asked and (problem := self._watched(partial(self._validate, log, done), log)):
                return "diverged", problem
            self.seconds = time.perf_counter() - self._clock
            stop_asked = self.processes.any(guard.requested)
            due = done or stop_asked or self.step % self.checkpoint_every == 0
            if due and self._saved != self.step:
                self._save(log)
            if stop_asked:
                reason = f"Interrupted after step {self.step}. Continue with: --resume {self.run_dir}"
                log.message(reason)
                return "interrupted", reason
            if done:
                stop = self._run["stop"]
                return ("stopped", stop) if stop else ("completed", f"{self.step} steps done")
            if problem := self._watched(partial(self._advance, log), log):
                return "diverged", problem

    def _watched(self, action: Callable[[], str], log: NoLog) -> str:
        """Do what returns a problem of theta in words, or ""; says where to go on from."""
        try:
            problem = action()
        except (ValueError, ArithmeticError) as error:
            # With the same settings the first step went well: only theta has changed. Several processes just end.
            known = isinstance(error, BilevelError) and not isinstance(error, NotStronglyConvexError)
            if self.step == 0 or known or self.processes.size > 1:
                raise
            self._consistent = False
            problem = str(error)
        if problem:
            kept = f"step {self._saved} in {self.store.folder}" if self._saved is not None else "none"
            problem = (
                f"Stopped at step {self.step}: {problem.rstrip('.')}. Last good checkpoint: {kept}. Try a smaller step "
                "size, tighter accuracy or float64."
            )
            log.message(problem)
        return problem

    def _advance(self, log: NoLog) -> str:
        """One step; returns what is not finite, in words, or ""."""
        self._consistent = False
        penalty = getattr(self.objective, "penalty", None)
        if penalty is not None:
            penalty.advance(self.step / self.max_steps)
        report = self.method.step(self.objective)
        if penalty is not None:  # what is measured at the end is the loss at the end
            penalty.advance((self.step + 1) / self.max_steps)
        # on machines that round differently the processes could go apart
        self.processes.check_same("parameters", lambda: digest(dict(self.objective.theta)))
        self.step += 1
        self.cost = self.cost + report.cost
        self.seconds = time.perf_counter() - self._clock
        record = step_record(report, self.step, self.cost, self.seconds, self.objective.theta)
        self._note(report, record)
        log.step(record, self.objective.theta)
        if bad := not_finite(report, self.objective.theta):
            return f"not finite: {', '.join(bad)}"
        self._consistent = True
        return ""

    def _note(self, report: StepReport, record: Mapping[str, Any]) -> None:
        """Keep the sums that the result reports, across resumes."""
        old = self._run["summary"]
        self._run["summary"] = {
            "first_loss": old.get("first_loss", report.loss),
            **{k: old.get(k, 0) + int(record[k]) for k in ("accepted", "trusted", "refinements", "backtracks")},
        }
        self._run["loss"] = [report.loss, report.loss_lower, report.loss_upper]
        self._run["stop"] = report.stop

    def _validate(self, log: NoLog, done: bool) -> str:
        """Validate and draw if this step is due and was not validated yet; changes nothing the next step sees."""
        due = done or (self.validate_every > 0 and self.step % self.validate_every == 0)
        if not due or self._run["validated"] == self.step or (self.validate is None and self.log_images is None):
            return ""
        with self.learned():
            self._run["validation"] = self.processes.first(lambda: self._look(log))
        self._run["validated"] = self.step
        return ""

    def _look(self, log: NoLog) -> dict[str, float]:
        """Validate and draw; the values of the last validation."""
        values = self._run["validation"]
        if self.validate is not None:
            values = {name: float(value) for name, value in self.validate().items()}
            log.validation(values, self.step, self.objective.theta)
        if self.log_images is not None:
            log.images(self.log_images(), self.step)
        return values

    def _save(self, log: NoLog) -> None:
        """Checkpoint; a full disk is reported once, and the next one is tried when it is due."""
        log.flush()
        state = full_state(
            self.objective,
            self.method,
            step=self.step,
            cost=self.cost,
            seconds=self.seconds,
            generators=self.generators,
            run=self._run,
            config=self.config,
        )
        if self.processes.first(lambda: self.store.try_save(state, self.step, log.message)):
            self._saved = self.step

    def _result(self, status: str, reason: str) -> TrainingResult:
        loss, lower, upper = self._run["loss"]
        return TrainingResult(
            status=status,
            reason=reason,
            steps=self.step,
            loss=loss,
            loss_interval=(lower, upper),
            summary=dict(self._run["summary"]),
            validation=dict(self._run["validation"]),
            cost=self.cost,
            seconds=self.seconds,
            run_dir=self.run_dir,
            checkpoint=self.store.last_valid,
        )
