"""The accuracy conditions of the convergence theories, verified against the true hypergradient."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import build, reference
from sweep import flat

import bilevel_imaging as bi
from bilevel_imaging.upper_level import (
    AbsoluteError,
    RelativeError,
    SummableTolerances,
    descent_direction_certified,
    gradient_norm_interval,
)

F64 = torch.float64
PHYSICS = ["denoising", "inpainting", "blur_fft"]


@pytest.fixture(scope="module", params=PHYSICS)
def solved(request):
    case = build("tv_isotropic", request.param, size=(6, 7), weight=0.3)
    true, slack, _, _, samples = reference(case)
    return case, true.astype(float), slack, samples


def enforce(condition, case, k, **settings):
    return condition.enforce(case.problem, bi.SquaredError(), case.x_true, k, **settings)


def spoiled(h, true, size):
    """h moved by ``size`` from what it was, away from the truth, with a bound that is still one."""
    values = flat(h.grad).astype(float)
    away = (values - true) / np.linalg.norm(values - true)
    moved = values + size * away
    grad = {n: torch.tensor(v, dtype=F64) for n, v in zip(h.grad, moved, strict=True)}
    return replace(h, grad=grad, bound=h.bound + size, relative_bound=(h.bound + size) / np.linalg.norm(moved))


# --- the relative condition


@pytest.mark.parametrize("factor", [0.9, 0.1, 1e-3])
def test_the_relative_condition_holds_for_the_true_error(solved, factor):
    case, true, slack, _ = solved
    condition = RelativeError(factor)
    h = enforce(condition, case, 0)
    error = np.linalg.norm(flat(h.grad).astype(float) - true)
    assert condition.holds(h, 0) is True and h.reason == "" and h.cost.work > 0
    assert error <= h.bound + slack <= factor * h.norm + 2 * slack
    # a descent direction, as certain as the theory says
    inner = float(flat(h.grad).astype(float) @ true)
    assert descent_direction_certified(h, 1 - factor) is True
    assert inner >= (1 - factor) * h.norm**2 - slack * h.norm
    bad = spoiled(h, true, 2 * factor * h.norm / (1 - factor) if factor < 0.5 else 20 * h.norm)
    assert condition.holds(bad, 0) is False and descent_direction_certified(bad, 1 - factor) is False
    assert np.linalg.norm(flat(bad.grad).astype(float) - true) > factor * bad.norm or factor > 0.5


def test_a_direction_that_does_not_descend_is_never_certified(solved):
    case, true, _, _ = solved
    h = enforce(RelativeError(0.01), case, 0)
    values = {n: -g for n, g in h.grad.items()}
    turned = replace(h, grad=values, bound=h.bound + 2 * h.norm)
    assert float(flat(turned.grad).astype(float) @ true) < 0
    assert all(descent_direction_certified(turned, eta) is False for eta in (1e-6, 0.1, 0.9))
    zero = replace(h, grad={n: torch.zeros_like(g) for n, g in h.grad.items()}, bound=0.0)
    assert descent_direction_certified(zero, 0.5) is False


def test_the_interval_of_the_gradient_norm_holds_the_truth(solved):
    case, true, slack, _ = solved
    for error_tol in (1e-1, 1e-3, 1e-6):
        h = bi.hypergradient(case.problem, bi.SquaredError(), case.x_true, error_tol=error_tol)
        low, high = gradient_norm_interval(h)
        assert 0 <= low <= np.linalg.norm(true) + slack and np.linalg.norm(true) <= high + slack
    assert high - low <= 1e-3 * np.linalg.norm(true)
    assert gradient_norm_interval(replace(h, bound=math.inf, certified=False)) == (0.0, math.inf)
    assert gradient_norm_interval(replace(h, bound=3 * h.norm))[0] == 0.0


# --- the absolute condition


@pytest.mark.parametrize("share", [0.5, 1e-3])
def test_the_absolute_condition_holds_for_the_true_error(solved, share):
    case, true, slack, _ = solved
    goal = share * float(np.linalg.norm(true))
    condition = AbsoluteError(goal)
    h = enforce(condition, case, 3)
    assert condition.holds(h, 3) is True and h.reason == ""
    assert np.linalg.norm(flat(h.grad).astype(float) - true) <= goal + slack
    bad = spoiled(h, true, 2.5 * goal)
    assert condition.holds(bad, 3) is False
    assert np.linalg.norm(flat(bad.grad).astype(float) - true) > goal


def test_absolute_values_may_be_a_function_or_a_growing_list():
    values = [1.0]
    condition = AbsoluteError(values)
    assert condition.accuracy(0)["bound_tol"] == pytest.approx(1.0, rel=1e-5)
    with pytest.raises(ValueError, match="append it first"):
        condition.accuracy(1)
    values.append(0.25)
    assert condition.value(1) == 0.25
    assert AbsoluteError(lambda k: 2.0**-k).value(5) == 2.0**-5
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="positive number"):
            AbsoluteError(bad).accuracy(0)


# --- summable tolerances


@pytest.mark.parametrize("schedule", SummableTolerances.SCHEDULES)
def test_tolerances_add_up_to_the_total(schedule):
    condition = SummableTolerances(0.3, schedule, ratio=0.8)
    tolerances = [condition.tolerance(k) for k in range(20000)]
    assert tolerances[0] == 0.3 and all(b < a for a, b in zip(tolerances[:200], tolerances[1:201], strict=True))
    assert sum(tolerances) * (1 - 1e-12) <= condition.total <= sum(tolerances) * (1 + 1e-4)


@pytest.mark.parametrize("schedule", SummableTolerances.SCHEDULES)
@pytest.mark.parametrize("k", [0, 3, 12])
def test_summable_tolerances_hold_for_the_true_errors(solved, schedule, k):
    case, _, _, samples = solved
    condition = SummableTolerances(0.1, schedule, ratio=0.5)
    h = enforce(condition, case, k)
    assert condition.holds(h, k) is True and h.reason == ""
    for i, sample in enumerate(samples):
        moved = (h.x[i].numpy().ravel() - sample.x).astype(float)
        assert np.linalg.norm(moved) <= condition.tolerance(k) + sample.x_uncertainty
        x = h.x[i].numpy().ravel().astype(np.longdouble)
        residual = x - sample.x_true - sample.product(x, h.q[i].numpy().ravel().astype(np.longdouble))
        assert np.linalg.norm(residual.astype(float)) <= condition.tolerance(k)
    far = replace(h.lower, distance_bound=h.lower.distance_bound + condition.tolerance(k))
    rough = replace(h.linear, residual_norm=h.linear.residual_norm + condition.tolerance(k))
    assert condition.holds(replace(h, lower=far), k) is False
    assert condition.holds(replace(h, linear=rough), k) is False


# --- what can't be met says so


def test_a_condition_that_cannot_be_met_says_why():
    case = build("tv_isotropic", "denoising", size=(5, 5))
    weak = {"lower": bi.lower_solvers.GradientDescent(max_iter=2)}
    for condition, words in (
        (RelativeError(1e-9), "relative error bounded by"),
        (AbsoluteError(1e-12), "error bounded by"),
        (SummableTolerances(1e-6), "distance"),
    ):
        h = enforce(condition, case, 0, **weak, **({} if words == "distance" else {"max_rounds": 1}))
        assert condition.holds(h, 0) is False
        assert h.reason.startswith(words) and "instead of" in h.reason and h.cost.work > 0


def test_what_is_not_certified_is_neither_true_nor_false():
    case = build("user", "denoising", size=(4, 4))
    for condition in (RelativeError(0.5), AbsoluteError(1.0), SummableTolerances(0.1)):
        h = enforce(condition, case, 0)
        assert condition.holds(h, 0) is None and "not certified" in h.reason
        assert descent_direction_certified(h, 0.5) is None


def test_summable_tolerances_need_no_certificate_of_the_hypergradient():
    """x and q can be certified where the error of h is not: a loss that declares no smoothness."""
    case = build("tv_isotropic", "denoising", size=(5, 5))
    condition = SummableTolerances(1e-3)
    h = condition.enforce(case.problem, lambda x, x_true: (x - x_true).square().flatten(1).sum(1), case.x_true, 0)
    assert not h.certified and condition.holds(h, 0) is True and "smoothness" in h.reason
    assert RelativeError(0.1).holds(h, 0) is None


def test_float32_images_and_parameters():
    case = build("tv_isotropic", "denoising", size=(8, 8), dtype=torch.float32)
    case.energy.float()
    for condition in (RelativeError(0.05), AbsoluteError(0.05), SummableTolerances(1e-3)):
        h = enforce(condition, case, 0)
        assert condition.holds(h, 0) is True and h.reason == ""


def test_an_objective_takes_the_same_accuracies():
    case = build("tv_isotropic", "denoising", size=(8, 8), batch=3)
    pairs = bi.data.ImagePairs(["a", "b", "c"], list(case.x_true), list(case.y), lambda shape: case.physics)
    objective = bi.BilevelObjective(case.energy, pairs, batch_size=2)
    for condition in (RelativeError(0.1), SummableTolerances(1e-2, "cubic")):
        h = objective.hypergradient(**condition.accuracy(1))
        assert condition.holds(h, 1) is True


def test_enforcing_tighter_costs_more():
    case = build("tv_isotropic", "denoising", size=(10, 10))
    coarse, fine = (enforce(RelativeError(c), case, 0) for c in (0.5, 1e-4))
    assert fine.cost.work > coarse.cost.work and fine.bound < coarse.bound


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: RelativeError(1.0), "factor in"),
        (lambda: RelativeError(0.0), "factor in"),
        (lambda: SummableTolerances(0.0), "first > 0"),
        (lambda: SummableTolerances(1.0, ratio=1.0), "ratio in"),
        (lambda: SummableTolerances(1.0, "linear"), "Unknown schedule"),
    ],
)
def test_misuse(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_eta_is_checked():
    case = build("tv_isotropic", "denoising", size=(4, 4))
    h = bi.hypergradient(case.problem, bi.SquaredError(), case.x_true, relative=0.5)
    with pytest.raises(ValueError, match="eta in"):
        descent_direction_certified(h, 1.0)
