"""What ``train.py`` does once its arguments are understood: a whole run."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from bilevel_imaging import assembly
from bilevel_imaging.config import RunConfig, UpperConfig
from bilevel_imaging.data import ImagePairs, RandomPatches
from bilevel_imaging.energies import DataWeight, VariationalEnergy
from bilevel_imaging.errors import CheckpointError, DataError
from bilevel_imaging.evaluation_run import REGULARIZER_FILE, named_parameters, report, score
from bilevel_imaging.export import save_regularizer, versions
from bilevel_imaging.lower_solvers import LOWER_SOLVERS
from bilevel_imaging.training import Trainer, TrainingResult
from bilevel_imaging.training.checkpoints import DISK_FULL, atomic_write, write_json
from bilevel_imaging.training.distributed import ALONE, Processes, shared_batch_size
from bilevel_imaging.training.figures import save_figure
from bilevel_imaging.training.filter_figures import regularizer_figures, regularizer_pictures
from bilevel_imaging.training.objective import BilevelObjective
from bilevel_imaging.training.random_objective import RandomPatchObjective
from bilevel_imaging.training.state import digest
from bilevel_imaging.training.validation import Validator
from bilevel_imaging.upper_level import FOLLOWING_METHODS, FirstOrder, UpperLevelMethod

CONFIG_FILE, DATA_FILE, SUMMARY_FILE = "config.yaml", "data.json", "summary.json"
# these make the steps of the lower level themselves, of all images of a step, or solve further systems there
ONE_PROCESS_METHODS = (*FOLLOWING_METHODS, "dfo_ls", "kunisch_pock")


def train(config: RunConfig, folder: Path, *, resume: bool = False, processes: Processes = ALONE) -> int:
    """Train, export, evaluate and report.

    Args:
        config: resolved settings.
        folder: the run folder.
        resume: continue with what is in it.
        processes: that share the training images, all of them in this function; the first one does the rest.

    Returns:
        exit code: 0; 1 if the training diverged; 130 if it was interrupted.
    """
    data, config = processes.everywhere(lambda: _shared_out(config, assembly.training_data(config), resume, processes))
    objective = processes.everywhere(
        lambda: assembly.make_objective(config, assembly.make_energy(config), data, folder)
    )
    objective.spread(processes)
    trainer = processes.everywhere(lambda: make_trainer(config, folder, objective))
    images = {"names": data.names, "digest": digest([x.cpu() for x in data.x])}
    processes.check_same("training images", lambda: images)
    processes.first(lambda: _check_data(config, folder, images, resume))
    if resume:
        trainer.resume(missing_ok=True, check=lambda saved: config.check_resumes(RunConfig.from_dict(saved).resolved()))
    before = trainer.step
    processes.first(lambda: write_config(folder, config))
    result = trainer.fit()
    if result.status == "diverged":
        return 1
    with trainer.learned():
        loss = None if result.status == "interrupted" else _final_loss(objective, result)
        processes.first(lambda: _finish(config, folder, objective, result, loss))
    if before >= config.upper.max_steps and processes.rank == 0:
        done = f"{before} of {config.upper.max_steps} steps were done already"
        print(f"Nothing was learned: {done}. Give a larger --upper.max_steps to go on.")
    return 130 if result.status == "interrupted" else 0


def _shared_out(
    config: RunConfig, data: ImagePairs | RandomPatches, resume: bool, processes: Processes
) -> tuple[ImagePairs | RandomPatches, RunConfig]:
    """The training images, and the settings with batches so small that every process has some."""
    if processes.size > 1 and config.upper.method in ONE_PROCESS_METHODS:
        raise ValueError(f"upper.method: {config.upper.method} runs in one process. Got {processes.size}.")
    given = config.data.batch_size
    size = shared_batch_size(data, config.upper.minibatch, given, processes, fixed=resume)
    if size < given and processes.rank == 0:
        print(
            f"data.batch_size: {size} instead of {given}, so that {processes.size} processes share them.",
            file=sys.stderr,
        )
    return data, replace(config, data=replace(config.data, batch_size=size))


@contextmanager
def _room_needed(folder: Path, checkpoint: Path | None) -> Iterator[None]:
    """Say of a full disk what to do: the training is not lost."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        then = "start again, as no checkpoint was saved" if checkpoint is None else f"then --resume {folder}"
        raise OSError(error.errno, f"{error.strerror}; free space, {then}", error.filename) from error


def _finish(
    config: RunConfig,
    folder: Path,
    objective: BilevelObjective | RandomPatchObjective,
    result: TrainingResult,
    loss: tuple[float, float, float] | None,
) -> None:
    """Export; after a run that was not interrupted also evaluate, and report."""
    with _room_needed(folder, result.checkpoint):
        export(config, folder, objective)
        if loss is None:
            return
        scores = score(config, folder, objective.energy)
        summary = scores | _summary(config, result, objective.energy, loss)
        write_json(folder / SUMMARY_FILE, summary)
    print(report(summary, folder, len(summary["images"])))


def make_method(config: UpperConfig) -> UpperLevelMethod:
    """The upper-level method. An optimizer checks its options when it is made, so one is made for that alone.

    Raises:
        ValueError: a setting that it does not take, or a value that it refuses.
    """
    method = assembly.make_method(config)
    if isinstance(method, FirstOrder):
        try:
            method.build([torch.zeros(1, requires_grad=True)], lr=method.lr, **method.options)
        except (ValueError, TypeError) as error:
            raise ValueError(f"upper.options: {config.method}: {error}") from error
    return method


def make_trainer(config: RunConfig, folder: Path, objective: BilevelObjective | RandomPatchObjective) -> Trainer:
    """The trainer of a run, with validation in float32 on crops of the validation images."""
    images = assembly.load_images(config, "val")[: config.logging.validate_images or None]
    validation = assembly.evaluation_pairs(config, "val", images, dtype=torch.float32)
    validator = Validator(objective.energy, validation, LOWER_SOLVERS[config.lower.solver]())
    method = make_method(config.upper)
    method.check_size(sum(p.numel() for p in objective.theta.values()))
    return Trainer(
        objective,
        method,
        folder,
        max_steps=config.upper.max_steps,
        validate=validator.validate,
        validate_every=config.logging.validate_every,
        checkpoint_every=config.logging.checkpoint_every,
        log_images=lambda: {
            **validator.images(),
            **regularizer_pictures(objective.energy.regularizer),
            **_weight_picture(objective.energy.data_weight),
        },
        config=asdict(config),
        tensorboard=config.logging.tensorboard,
        progress=config.logging.progress,
    )


def _weight_picture(weight: DataWeight | None) -> dict[str, Tensor]:
    """The weights of the data term on their grid as a picture ``(1, rows, columns)`` by tag, the largest one white."""
    if weight is None or weight.parameter.dim() != 2:
        return {}
    values = weight.weights().detach()
    return {"data_weight/weights": (values / values.max())[None]}


def write_config(folder: Path, config: RunConfig) -> None:
    """Write the settings as YAML, in one piece."""
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / CONFIG_FILE, yaml.safe_dump(asdict(config), sort_keys=False).encode())


def _check_data(config: RunConfig, folder: Path, images: dict[str, Any], resume: bool) -> None:
    """Remember the training images, and refuse to continue with others: that would not be bit for bit.

    The test images are looked at as well, as it would be too late for mistakes in them after the training.
    """
    assembly.evaluation_pairs(config, "test")
    path = folder / DATA_FILE
    if resume and path.exists():
        try:
            saved = json.loads(path.read_text())
        except ValueError as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error
        if saved != images:
            raise DataError(f"{path}: the training images have changed since the run began. Start a new run.")
    else:
        write_json(path, images)


def export(config: RunConfig, folder: Path, objective: BilevelObjective | RandomPatchObjective) -> None:
    """Write the learned regularizer, with its data weights if there are any and the constants of its energy."""
    energy, bounds = objective.energy, objective.constants()
    pairs = (("mu", bounds.strong_convexity), ("L", bounds.smoothness))
    constants = {name: float(value[0]) for name, value in pairs if value is not None}
    save_regularizer(
        folder / REGULARIZER_FILE,
        energy.regularizer,
        ridge=energy.ridge,
        noise_level=config.problem.sigma,
        constants=constants,
        data_weight=energy.data_weight,
        extra={"problem": asdict(config.problem), "color": config.data.color, "seed": config.seed},
    )
    for name, figure in regularizer_figures(energy.regularizer).items():
        save_figure(figure, folder / "pictures" / f"{name}.png")


def _final_loss(
    objective: BilevelObjective | RandomPatchObjective, result: TrainingResult
) -> tuple[float, float, float]:
    """Loss and its certified interval: of all training patches, or that of the last minibatch if they are endless."""
    if isinstance(objective, RandomPatchObjective):
        return (result.loss, *result.loss_interval)
    value = objective.value(1e-5 * objective.pairs.x[0].numel() ** 0.5)
    return value.value, value.lower, value.upper


def _summary(
    config: RunConfig, result: TrainingResult, energy: VariationalEnergy, value: tuple[float, float, float]
) -> dict[str, Any]:
    return {
        "loss": value[0],
        "loss_interval": [value[1], value[2]],
        "loss_images": "last minibatch" if config.data.random_patches else "all",
        "first_loss": result.summary.get("first_loss"),
        "parameters": named_parameters(energy),
        "status": result.status,
        "reason": result.reason,
        "steps": result.steps,
        "seconds": result.seconds,
        "cost": asdict(result.cost),
        "validation": result.validation,
        "method": config.upper.method,
        "seed": config.seed,
        "device": str(assembly.device_of(config)),
        "versions": versions(),
    }
