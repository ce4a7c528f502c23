"""Tomography and MRI of slices of one volume: total variation and learned regularizers on held-out slices.

All methods minimize 1/2 ||A x - y||^2 + R(x) + ridge/2 ||x||^2 and differ in R:

- total variation, weight and smoothing by grid search, and by MAID, on the training slices;
- regularizers learned for denoising, two numbers (or those of them that the class has) adapted by MAID on the training
  slices: weight and scale;
- the same, then all parameters trained for the task.

Neighboring slices are nearly equal, hence the split by position (see ``split_positions``). Every reconstruction has a
certified distance to the exact minimizer.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from bilevel_imaging._version import __version__
from bilevel_imaging.data import ImagePairs, magnitude
from bilevel_imaging.energies import VariationalEnergy
from bilevel_imaging.experiments.environment import environment
from bilevel_imaging.experiments.medical_data import Stack, load_stack, split_positions
from bilevel_imaging.experiments.medical_learning import learn_scalars, rescalable, search_tv, start_tv, train_all
from bilevel_imaging.experiments.medical_problems import Problem
from bilevel_imaging.experiments.medical_progress import Log
from bilevel_imaging.experiments.medical_report import figure, figures, headline, markdown, scores_line, table
from bilevel_imaging.regularizers import Regularizer
from bilevel_imaging.training.evaluation import image_metrics
from bilevel_imaging.training.mean import bind_batch
from bilevel_imaging.training.metrics_log import finite_or_none
from bilevel_imaging.training.reconstruction import PIXEL_ACCURACY, minimize

__all__ = ["MedicalRecord", "Problem", "figure", "figures", "load_stack", "markdown", "run", "table"]

SEARCHED, LEARNED_TV = "TV, grid search", "TV, MAID"
# what is added to the name of a regularizer
ADAPTED, TRAINED = "adapted", "trained"
# what is missing from MRI measurements looks like more noise; a start only
ARTIFACTS = {"ct": 1.0, "mri": 10.0}
Record = dict[str, Any]


class MedicalRecord(dict[str, Any]):
    """The record, plain JSON, with what does not belong into it.

    Attributes:
        pictures: magnitudes ``(1, H, W)`` of the test slices by method, ``gt`` first.
        learned: regularizers by method.
    """

    def __init__(self, record: Record):
        super().__init__(record)
        self.pictures: dict[str, list[Tensor]] = {}
        self.learned: dict[str, Regularizer] = {}

    def saved_with(self, name: str) -> Record:
        """What belongs into the file of a learned regularizer: arguments of ``save_regularizer``."""
        problem = self["settings"]["problem"]
        return {"ridge": problem["ridge"], "extra": {"problem": problem}}


def run(
    problem: Problem,
    stack: Stack | None = None,
    regularizers: Mapping[str, Regularizer] | None = None,
    *,
    size: int = 128,
    slices: tuple[int, int, int] = (4, 2, 6),
    train: int = 0,
    save: Callable[[MedicalRecord], None] | None = None,
    progress: bool = False,
    device: str = "cpu",
) -> MedicalRecord:
    """Learn and score; Ctrl-C ends early with the methods that are finished ("complete" is then false).

    Args:
        problem: what is measured.
        stack: slices; ``None`` for the phantom at ``size``.
        regularizers: learned for denoising, by the name to print; not changed.
        size: of the phantom.
        slices: numbers of training, validation and test slices.
        train: steps of training all parameters of every regularizer; 0 for none.
        save: called with the record after every method.
        progress: say on standard error what is done; see ``medical_progress``.
        device: where to compute.

    Returns:
        settings, what was learned, scores by slice and means.

    Raises:
        ValueError: too few slices, or a regularizer that cannot be adapted.
    """
    regularizers = dict(regularizers or {})
    taken = {problem.baseline, SEARCHED, LEARNED_TV} & set(regularizers)
    if taken or train < 0:
        raise ValueError(
            f"Expected train >= 0 and other names than those of the baselines. Got {train} and {sorted(taken)}."
        )
    stack = load_stack(None, size, square=problem.kind == "ct") if stack is None else stack
    parts = split_positions(len(stack.slices), *slices)
    pairs = {
        name: problem.measure(stack, getattr(parts, name), device=device) for name in ("train", "validation", "test")
    }
    record = MedicalRecord(
        {
            "settings": {
                "problem": asdict(problem),
                "images": stack.label,
                "shape": list(pairs["test"].x[0].shape[-2:]),
                "slices": {name: part.names for name, part in pairs.items()},
                "split": parts.rule,
                "accuracy_per_pixel": PIXEL_ACCURACY,
            },
            "environment": {"bilevel_imaging": __version__, **environment(device)},
            "complete": False,
            "methods": {},
        }
    )
    record.pictures["gt"] = [magnitude(x) for x in pairs["test"].x]
    log = Log(progress)
    log.line(headline(record))
    try:
        for name, regularizer, evidence in _methods(problem, pairs, regularizers, train, log):
            rows, points = _scores(problem, regularizer, pairs["test"])
            record["methods"][name] = finite_or_none({"learning": evidence, "slices": rows, "mean": _mean(rows)})
            record.pictures[name] = points
            if regularizer is not None:
                record.learned[name] = regularizer
            log.line(f"{name}: {scores_line(record['methods'][name])}")
            if save is not None:
                save(record)
        record["complete"] = True
    except KeyboardInterrupt:
        pass
    return record


def _methods(
    problem: Problem, pairs: Mapping[str, ImagePairs], regularizers: Mapping[str, Regularizer], train: int, log: Log
) -> Iterator[tuple[str, Regularizer | None, Record | None]]:
    """Name, regularizer (``None``: the linear reconstruction) and what was learned, one after the other."""
    learn_from, device = pairs["train"], pairs["train"].x[0].device
    variance, ridge = _start_variance(problem, learn_from), problem.ridge
    adaptable = {name: rescalable(regularizer, variance).to(device) for name, regularizer in regularizers.items()}
    yield problem.baseline, None, None
    log.line(f"{SEARCHED}: trying weights")
    searched, evidence = search_tv(learn_from, ridge=ridge)
    yield SEARCHED, searched.to(device), evidence
    tv = start_tv(variance).to(device)
    evidence = learn_scalars(tv, learn_from, ridge=ridge, name=LEARNED_TV, log=log)
    yield LEARNED_TV, tv, evidence
    for name, regularizer in adaptable.items():
        label = f"{name}, {ADAPTED}"
        evidence = learn_scalars(regularizer, learn_from, ridge=ridge, name=label, log=log)
        yield label, regularizer, evidence
        if train:
            label, trained = f"{name}, {TRAINED}", copy.deepcopy(regularizer)
            evidence = train_all(
                trained,
                learn_from,
                pairs["validation"],
                ridge=ridge,
                steps=train,
                seed=problem.seed,
                name=label,
                log=log,
            )
            yield label, trained, evidence


def _start_variance(problem: Problem, pairs: ImagePairs) -> float:
    """Where a learning starts: the mean variance of the noise, times what stands for the artifacts of undersampling."""
    physics = pairs.physics(pairs.x[0].shape)
    levels = [problem.noise_level(x, physics.A(x[None])[0]) for x in pairs.x]
    return ARTIFACTS[problem.kind] * fmean(level**2 for level in levels)


def _scores(
    problem: Problem, regularizer: Regularizer | None, pairs: ImagePairs
) -> tuple[dict[str, Record], list[Tensor]]:
    """Scores of every slice by name, and magnitudes of the reconstructions."""
    rows, points = {}, []
    for batch, name in zip(pairs.batches(1), pairs.names, strict=True):
        begin, extra = time.perf_counter(), {}
        with torch.no_grad():
            if regularizer is None:
                x = problem.linear(batch.y, batch.physics)
            else:
                x, info = minimize(bind_batch(VariationalEnergy(regularizer, ridge=problem.ridge), batch))
                extra = {"distance": float(info.distance_bound)}
        extra["seconds"] = time.perf_counter() - begin
        points.append(magnitude(x[0]))
        scores = image_metrics(points[-1][None], magnitude(batch.x))
        rows[name] = {key: values[0] for key, values in scores.items()} | extra
    return rows, points


def _mean(rows: Mapping[str, Record]) -> Record:
    """Of every number over the slices; a distance is the largest instead."""
    values = {key: [row[key] for row in rows.values()] for key in next(iter(rows.values()))}
    return {key: max(numbers) if key == "distance" else fmean(numbers) for key, numbers in values.items()}
