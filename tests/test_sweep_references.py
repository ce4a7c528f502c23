"""The references that the sweep compares with: autograd's against extended precision, finite differences, itself."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from autograd_reference import AutogradReference
from cases import COMPOSED_REGULARIZERS, JOINT_REGULARIZERS, autograd_reference_of, build, reference_of
from sweep import DRAWN, Outcome, Setting, draw, make, run

import bilevel_imaging as bi

NEW = (*COMPOSED_REGULARIZERS, *JOINT_REGULARIZERS)
# what once broke a certificate: filters of float32 parameters were computed in float32, so that they had a mean
FOUND = Setting(
    regularizer="fields_of_experts", physics="denoising", lower="newton_cg", linear="conjugate_gradient",
    certificate="polished", mode="tolerances", error_tol=5.8e-5, residual_tol=0.05, relative=1.0, dtype="float64",
    parameters="float32", batch=2, channels=3, size=(5, 6), weight=2.9e-4, smoothing=0.0194, ridge=0.0, kind="ramp",
    max_iter=1, spread=0.5, seed=187536,
)  # fmt: skip

# polishing with a solver that is cut off ended with a larger bound than it had begun with, and missed the goal silently
WORSENED = Setting(
    regularizer="scaled_sum", physics="denoising", lower="newton_cg", linear="heavy_ball", certificate="polished",
    mode="relative", error_tol=6.4e-6, residual_tol=6.3e-8, relative=0.0066629584033309815, dtype="float64",
    parameters="float32", batch=1, channels=3, size=(5, 6), weight=71.51909194340863, smoothing=0.10189629488412953,
    ridge=0.0013623493717017405, kind="ramp", max_iter=150, spread=0.0, seed=204855,
)  # fmt: skip


def distance(a, b) -> float:
    return float(np.linalg.norm((a - b).astype(float)))


@pytest.mark.parametrize("regularizer", ["tv_isotropic", "tv_coupled", "tikhonov_gradient"])
@pytest.mark.parametrize(("physics", "kind"), [("denoising", "noisy"), ("blur_fft", "flat"), ("mri", "ramp")])
def test_autograd_agrees_with_extended_precision(regularizer, physics, kind):
    case = build(regularizer, physics, channels=3, size=(4, 6), kind=kind, dtype=torch.float32, smoothing=0.01)
    for sample in range(2):
        known, own = reference_of(case, sample), autograd_reference_of(case, sample)
        assert not isinstance(known, AutogradReference)
        assert distance(own.x, known.x) <= own.x_uncertainty + known.x_uncertainty
        assert distance(own.grad, known.grad) <= own.uncertainty + known.uncertainty
        assert abs(own.loss - known.loss) <= own.loss_uncertainty + known.loss_uncertainty
        assert own.x_uncertainty < 1e-11 and own.loss_uncertainty < 1e-12
        assert own.uncertainty <= 1e-10 * distance(known.grad, 0 * known.grad) + 1e-20


@pytest.mark.parametrize("regularizer", ["fields_of_experts", "convex_ridge", "sum_of_orders"])
def test_autograd_agrees_with_differences_of_the_loss(regularizer):
    case = build(regularizer, "blur_circular", batch=1, channels=2, size=(4, 5), weight=0.3, smoothing=0.1)
    found = reference_of(case)
    assert isinstance(found, AutogradReference)
    parameters = list(case.energy.theta.values())
    direction = torch.randn(found.grad.size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    pieces = [
        d.reshape(p.shape) for d, p in zip(direction.split([p.numel() for p in parameters]), parameters, strict=True)
    ]
    start = [p.detach().clone() for p in parameters]
    step, losses = 1e-4, {}
    for k in (1, -1, 2, -2):
        with torch.no_grad():
            for p, s, d in zip(parameters, start, pieces, strict=True):
                p.copy_(s + k * step * d)
        problem = case.energy.bind(case.y, case.physics)
        losses[k] = reference_of(replace(case, problem=problem)).loss
    expected = (8 * (losses[1] - losses[-1]) - (losses[2] - losses[-2])) / (12 * step)
    assert float(found.grad @ direction.numpy()) == pytest.approx(expected, rel=1e-7)


def test_second_derivatives_of_splines_at_flat_images():
    """Where filter responses are 0: by autograd at x itself, and beside it, as the reference does."""
    case = build("convex_ridge", "denoising", batch=1, size=(5, 6), kind="zero")
    found = reference_of(case)
    leaf = found._leaf(np.zeros(30))
    there = found._rows(leaf, [leaf], np.eye(30))
    rows = torch.eye(30, dtype=torch.float64).reshape(30, 1, 1, 5, 6)
    exact = torch.stack([case.energy.regularizer.hvp(torch.zeros(1, 1, 5, 6, dtype=torch.float64), r) for r in rows])
    exact = exact.reshape(30, 30).numpy()
    assert np.abs(there - exact).max() < 1e-12
    assert np.abs(found.hessian(np.zeros(30)) - np.eye(30) - exact).max() < 1e-12


def test_uncertainty_grows_with_the_conditioning():
    """Half of the digits can be lost; then the reference must say so."""
    mild, hard = (
        reference_of(build("fields_of_experts", "blur_circular", batch=1, size=(6, 7), **settings))
        for settings in ({"weight": 0.01, "smoothing": 0.3, "ridge": 0.1}, {"weight": 30, "smoothing": 2e-3})
    )
    size = distance(hard.grad, 0 * hard.grad)
    assert mild.uncertainty < 1e-13 and 1e-11 * size < hard.uncertainty < 1e-2 * size
    moved = np.random.default_rng(5).standard_normal(42)
    moved *= hard.x_uncertainty / np.linalg.norm(moved) / 3
    hard.generator = np.random.default_rng(6)
    first = hard.grad.copy()
    hard._solve((hard.x + moved).astype(float))
    assert 0 < distance(hard.grad, first) <= 2 * hard.uncertainty


def test_draws_cover_all_regularizers():
    rng = random.Random(0)
    settings = [draw(rng) for _ in range(1000)]
    assert {s.regularizer for s in settings} == set(DRAWN) >= set(NEW)
    assert {s.regularizer for s in (draw(rng, NEW[:2]) for _ in range(50))} == set(NEW[:2])
    changed = [s for s in settings if s.spread]
    assert {s.regularizer for s in changed} == set(JOINT_REGULARIZERS)
    setting = next(s for s in changed if s.regularizer == "fields_of_experts")
    plain = make(replace(setting, spread=0.0))
    theta, start = (list(c.energy.theta.values()) for c in (make(setting), plain))
    assert all(float((a - b).detach().abs().max()) > 0.01 for a, b in zip(theta, start, strict=True))


def test_sharp_checks():
    outcome = Outcome(FOUND)
    cases = [(1.0, 2.0, 0.1), (1.0, 2.0, 0.3), (1.0, math.inf, 0.1), (1.0, 2.0, 0.0)]
    for error, bound, slack in cases:
        outcome.check("", error, bound, slack)
    outcome.check("", 1.0, 2.0, 0.1, width=0.5)
    assert (outcome.checks, outcome.sharp, outcome.violations) == (5, 1, [])


def test_filters_of_float32_parameters():
    outcome = run(FOUND)
    assert outcome.violations == [] and outcome.sharp >= 8
    for kind in (bi.FieldsOfExperts, bi.ConvexRidge):
        low, high = (kind(size=3, seed=1, start="random").to(dtype) for dtype in (torch.float32, torch.float64))
        high.load_state_dict(low.state_dict())
        assert low.kernels().dtype == torch.float64
        assert torch.equal(low.kernels(), high.kernels())
        assert torch.equal(low.constants((1, 1, 8, 8)).smoothness, high.constants((1, 1, 8, 8)).smoothness)
        assert low.kernel_sensitivity() == high.kernel_sensitivity()


def test_polishing_never_ends_with_a_larger_bound():
    assert run(WORSENED).violations == []
