"""Methods on any lower-level problem: certified values and hypergradients of ``ProblemObjective``."""

from __future__ import annotations

import deepinv as dinv
import pytest
import torch
from torch import Tensor

import bilevel_imaging as bi
from bilevel_imaging.data import ImagePairs
from bilevel_imaging.energies import LabeledFeatures, WeightedLogisticProblem
from bilevel_imaging.upper_level import MAID, ProblemObjective

F64 = torch.float64


def denoising() -> tuple[bi.VariationalEnergy, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x_true = torch.rand(3, 1, 9, 8, generator=g, dtype=F64)
    y = x_true + 0.1 * torch.randn(x_true.shape, generator=g, dtype=F64)
    return bi.VariationalEnergy(bi.TotalVariation(0.05, 0.05)), y, x_true


def test_the_mean_over_a_batch_is_that_of_the_images_one_by_one():
    energy, y, x_true = denoising()
    physics = dinv.physics.Denoising()
    whole = ProblemObjective(energy.bind(y, physics), bi.SquaredError(), x_true)
    pairs = ImagePairs(["a", "b", "c"], list(x_true), list(y), lambda shape: physics)
    images = bi.BilevelObjective(energy, pairs)
    h, expected = whole.hypergradient(1e-9, 1e-9), images.hypergradient(1e-9, 1e-9)
    for name, slope in expected.grad.items():
        torch.testing.assert_close(h.grad[name], slope, rtol=1e-6, atol=0)
    value, other = whole.value(1e-9), images.value(1e-9)
    assert value.lower <= other.upper and other.lower <= value.upper
    assert value.upper - value.lower < 1e-6 and value.cost.gradients > 0
    assert whole.hypergradient(relative=0.1).relative_bound <= 0.1


def test_a_user_says_which_solvers_and_where_to_start():
    energy, y, x_true = denoising()
    problem = energy.bind(y, dinv.physics.Denoising())
    solvers = {"lower": bi.lower_solvers.HeavyBall(), "linear": bi.linear_solvers.MINRES()}
    start = torch.full_like(y, 0.5)
    objective = ProblemObjective(problem, bi.SquaredError(), x_true, start=start, certificate="classical", **solvers)
    assert objective.x is start and objective.q is None
    h = objective.hypergradient(1e-4, 1e-4)
    assert h.certified and torch.equal(objective.x, h.x) and torch.equal(objective.q, h.q)


def test_a_method_learns_through_it():
    """Weights of examples, half of them labeled at random: the loss falls, and the slope is that of differences."""
    g = torch.Generator().manual_seed(1)
    features = torch.randn(40, 4, generator=g, dtype=F64)
    labels = (features[:, 0] > 0).long()
    wrong = labels.clone()
    wrong[::2] = torch.randint(0, 2, (20,), generator=g)
    examples, clean = LabeledFeatures(features, wrong, 2), LabeledFeatures(features, labels, 2)
    theta = torch.zeros(40, dtype=F64, requires_grad=True)

    def loss(x: Tensor, x_true: Tensor) -> Tensor:
        return clean.cross_entropy(x[0]).mean().unsqueeze(0)

    objective = ProblemObjective(WeightedLogisticProblem(examples, theta, ridge=0.05), loss)
    h, step = objective.hypergradient(1e-10, 1e-10), torch.zeros(40, dtype=F64)
    values = []
    for change in (1e-4, -2e-4, 1e-4):
        step[3] = change
        with torch.no_grad():
            theta += step
        values.append(objective.value(1e-10).value)
    assert float(h.grad["theta"][3]) == pytest.approx((values[0] - values[1]) / 2e-4, rel=1e-5)
    method, before = MAID(), values[2]
    for _ in range(8):
        report = method.step(objective)
    assert report.loss < 0.8 * before
