"""Adapting a regularizer to a measurement: a few numbers by MAID or by search, or all parameters by Adam."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bilevel_imaging.data import ImagePairs
from bilevel_imaging.energies import VariationalEnergy
from bilevel_imaging.experiments.denoising_tuning import total_variation
from bilevel_imaging.experiments.medical_progress import Log
from bilevel_imaging.regularizers import Regularizer, TotalVariation
from bilevel_imaging.training import BilevelObjective
from bilevel_imaging.training.evaluation import grid_search, mean_loss
from bilevel_imaging.upper_level import MAID, FirstOrder, StepReport

Record = dict[str, Any]

SCALARS = ("log_weight", "log_scale", "log_smoothing")
# Where total variation starts: its weight over the variance of the noise is what is best for denoising.
TV_WEIGHT, TV_SMOOTHING = 7.0, 0.005
MAID_STEPS, MAID_RELATIVE, MAID_TOLERANCE = 15, 0.8, 1e-4
LARGEST_MOVE = 1.0  # of the logarithm of a number in one step
# MAID ends when two steps lower the loss by less than this part, 0.04 dB: without noise in what is missing, ever
# smaller smoothings and sharper potentials are a little better and cost ever more
STALLED = 0.01
# of Adam: filters have norm 1 and move less; hypergradients need a direction only
LEARNING_RATE, FILTER_RATE, RELATIVE = 0.05, 0.1, 0.9
MINIBATCH, WARMUP, CLIP = 2, 5, 5.0
CHECKS = 10  # of the validation loss, in a training


def start_tv(variance: float) -> TotalVariation:
    """Where the learning of total variation starts, for noise of this variance."""
    return TotalVariation(TV_WEIGHT * variance, TV_SMOOTHING)


def rescalable(regularizer: Regularizer, variance: float) -> Regularizer:
    """A copy in which only its scalars are learned, started for noise of another variance.

    If R is the negative logarithm of a density times the variance of the noise that it was learned for, then it is
    multiplied by the quotient of the variances; where that noise is not known, R is taken as it is.

    Raises:
        ValueError: the regularizer has no scalar ``log_weight``.
    """
    result = copy.deepcopy(regularizer).requires_grad_(False)
    if "log_weight" not in dict(result.named_parameters()):
        raise ValueError(
            f"Expected a regularizer with a parameter log_weight to adapt it. Got {type(regularizer).__name__}."
        )
    for name, parameter in result.named_parameters():
        if name in SCALARS:
            parameter.requires_grad_(True)
    learned_for = getattr(regularizer, "noise_level", None)
    if learned_for:
        with torch.no_grad():
            result.log_weight += math.log(variance / learned_for**2)
    return result


def learn_scalars(regularizer: Regularizer, pairs: ImagePairs, *, ridge: float, name: str, log: Log) -> Record:
    """Learn what requires gradients, in place, by MAID on all pairs; returns what happened, which ``log`` hears of."""
    objective = BilevelObjective(VariationalEnergy(regularizer, ridge=ridge), pairs)
    method = MAID(relative=MAID_RELATIVE, tolerance=MAID_TOLERANCE, largest_move=LARGEST_MOVE)
    begin, reports = time.perf_counter(), []
    with log.steps(name, MAID_STEPS) as done:
        for _ in range(MAID_STEPS):
            reports.append(method.step(objective))
            values = ", ".join(f"{key} {value:.3g}" for key, value in _values(objective).items())
            done(f"loss {reports[-1].loss:.5g}, {values}")
            if reports[-1].stop or _stalled(reports):
                break
    last = reports[-1]
    return {
        "method": "MAID",
        "values": _values(objective),
        "loss": last.loss,
        "loss_interval": [last.loss_lower, last.loss_upper],
        "steps": len(reports),
        "certified_steps": sum(report.certified for report in reports),
        "stop": last.stop or f"{len(reports)} steps" + _stalled(reports) * ", the last two lowered the loss little",
        "seconds": time.perf_counter() - begin,
    }


def _stalled(reports: Sequence[StepReport]) -> bool:
    losses = [report.loss for report in reports[-3:]]
    return len(losses) == 3 and losses[0] - losses[2] < STALLED * losses[0]


def _values(objective: BilevelObjective) -> dict[str, float]:
    """The learned numbers, not their logarithms."""
    values = {name.rpartition(".")[2]: float(p.detach()) for name, p in objective.theta.items()}
    return {name.removeprefix("log_"): math.exp(value) for name, value in values.items()}


def search_tv(pairs: ImagePairs, *, ridge: float) -> tuple[TotalVariation, Record]:
    """Total variation with the weight and the usual small smoothing of least mean squared error on the pairs."""
    begin = time.perf_counter()
    best = grid_search(TotalVariation(), pairs, ridge=ridge)
    regularizer = total_variation(best.weight, best.smoothing)
    return regularizer, {
        "method": "grid search",
        "values": {"weight": best.weight, "smoothing": best.smoothing},
        "loss": best.loss,
        "tries": len(best.tried),
        "seconds": time.perf_counter() - begin,
    }


def train_all(
    regularizer: Regularizer,
    train: ImagePairs,
    validation: ImagePairs,
    *,
    ridge: float,
    steps: int,
    seed: int,
    name: str,
    log: Log,
) -> Record:
    """Train all parameters, in place, with Adam on certified hypergradients of small minibatches of whole slices.

    The parameters with the smallest validation loss are kept, the start among them.
    """
    begin = time.perf_counter()
    regularizer.requires_grad_(True)
    energy = VariationalEnergy(regularizer, ridge=ridge)
    generator = torch.Generator().manual_seed(seed)
    objective = BilevelObjective(energy, train, minibatch=min(MINIBATCH, len(train)), generator=generator)
    method = adam(objective.theta, steps)
    best, losses, points, certified = copy.deepcopy(regularizer.state_dict()), {}, dict[int, Tensor](), 0
    losses[0] = mean_loss(energy, validation, points)
    every = max(1, steps // CHECKS)
    with log.steps(name, steps) as done:
        for step in range(1, steps + 1):
            made = method.step(objective)
            certified += made.certified
            if step % every == 0 or step == steps:
                losses[step] = mean_loss(energy, validation, points)
                if losses[step] == min(losses.values()):
                    best = copy.deepcopy(regularizer.state_dict())
            done(f"loss {made.loss:.4g}, validation loss {list(losses.values())[-1]:.5g}")
    regularizer.load_state_dict(best)
    regularizer.requires_grad_(False)
    return {
        "method": "Adam",
        "parameters": sum(p.numel() for p in regularizer.parameters()),
        "steps": steps,
        "certified_steps": certified,
        "relative_accuracy": RELATIVE,
        "validation_loss": {str(step): loss for step, loss in losses.items()},
        "chosen_step": min(losses, key=lambda step: losses[step]),
        "seconds": time.perf_counter() - begin,
    }


def adam(theta: Mapping[str, Tensor], steps: int) -> FirstOrder:
    """The optimizer of a training."""
    filters = any("filter_layers" in name for name in theta)
    return FirstOrder(
        "Adam",
        lr=LEARNING_RATE,
        relative=RELATIVE,
        schedule="cosine",
        warmup=min(WARMUP, steps),
        total_steps=steps,
        clip=CLIP,
        lr_scale={"filter_layers": FILTER_RATE} if filters else None,
    )
