"""How accuracy is spent: one evaluation where the lower level dominates, residuals of the solver, goals of batches."""

from __future__ import annotations

import copy

import deepinv
import pytest
import torch

import bilevel_imaging as bi
from bilevel_imaging.data import ImagePairs
from bilevel_imaging.energies.problem import CountedLinearization
from bilevel_imaging.hypergradients import refinement
from bilevel_imaging.hypergradients.loss import LossOracle
from bilevel_imaging.linear_solvers import ConjugateGradient
from bilevel_imaging.lower_solvers import NewtonCG
from bilevel_imaging.tensors import length, norm
from bilevel_imaging.upper_level import MAID, ProblemObjective

F32, F64 = torch.float32, torch.float64


def photographs(dtype: torch.dtype, size: int = 40) -> torch.Tensor:
    images = bi.data.photographs(part="train").values()
    return torch.stack([image[:1, 60 : 60 + size, 60 : 60 + size] for image in images][:3]).to(dtype)


def deblurring(dtype: torch.dtype) -> tuple[bi.VariationalEnergy, torch.Tensor, torch.Tensor, deepinv.physics.Physics]:
    x_true = photographs(dtype)
    kernel = deepinv.physics.functional.gaussian_blur(sigma=1.0).to(dtype)
    physics = deepinv.physics.BlurFFT(img_size=x_true.shape[1:], filter=kernel)
    y = physics.A(x_true) + 0.02 * torch.randn(x_true.shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    energy = bi.VariationalEnergy(bi.TotalVariation(weight=3e-3, smoothing=0.01), ridge=1e-3)
    return energy, x_true, y, physics


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("relative", [0.3, 0.1, 0.01])
def test_one_evaluation_is_enough_where_the_lower_level_dominates(dtype, relative, monkeypatch):
    energy, x_true, y, physics = deblurring(dtype)
    evaluations = []

    def counted(*args, **kwargs):
        evaluations.append(refined(*args, **kwargs))
        return evaluations[-1]

    refined = refinement.estimate
    monkeypatch.setattr(refinement, "estimate", counted)
    h = bi.hypergradient(energy.bind(y, physics), bi.SquaredError(), x_true, relative=relative)
    assert h.certified and h.bound <= relative * h.norm
    # preconditioned solves, where there are no compiled kernels, do not know the energy norm of their residual
    assert len(evaluations) <= (1 if bi.native_kernels() == "native" or relative > 0.05 else 2)


@pytest.mark.parametrize(("residual_tol", "needed", "slack"), [(0.3, 0, 1.02), (1e-4, 1, 4)])
def test_residuals_of_the_solver_are_bounded_with_their_rounding(residual_tol, needed, slack, monkeypatch):
    """Float32 solves far above their rounding need no product in float64, and still say what H q leaves."""
    energy, x_true, y, physics = deblurring(F32)
    problem, dtypes = energy.bind(y, physics), []

    def watched(self, v):
        dtypes.append(v.dtype)
        return product(self, v)

    product = CountedLinearization.hvp
    monkeypatch.setattr(CountedLinearization, "hvp", watched)
    oracle = LossOracle(bi.SquaredError(), x_true, y.shape)
    result = refinement.Refiner(problem, oracle, NewtonCG(), ConjugateGradient()).solve(None, None, 1e-2, residual_tol)
    assert dtypes.count(F64) == needed
    true = norm(result.point.loss_grad - result.point.linearization.hvp(result.q))
    assert bool((true <= result.residual_norm).all()) and bool((result.residual_norm <= slack * true).all())


def two_batches() -> bi.BilevelObjective:
    """Of two images each, the gradients of which differ a lot."""
    x = photographs(F64, 24)[:2].repeat(2, 1, 1, 1)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=F64)
    y = x + noise * torch.tensor([0.1, 0.1, 0.01, 0.01], dtype=F64).reshape(4, 1, 1, 1)
    energy = bi.VariationalEnergy(bi.TotalVariation(weight=0.05, smoothing=0.02))
    pairs = ImagePairs(list("abcd"), list(x), list(y), lambda shape: deepinv.physics.Denoising())
    return bi.BilevelObjective(energy, pairs, batch_size=2)


def test_batches_share_the_goal_of_their_mean(monkeypatch):
    objective = two_batches()
    asked = []

    def watched(self, chunk, accuracy):
        asked.append(accuracy)
        return solved(self, chunk, accuracy)

    solved = bi.BilevelObjective._solved
    monkeypatch.setattr(bi.BilevelObjective, "_solved", watched)
    first = objective.hypergradient(relative=0.1)
    assert asked[0] == {"relative": 0.1}
    state, known = copy.deepcopy(objective.state_dict()), len(asked)
    second = objective.hypergradient(relative=0.1)
    assert asked[known:] == 2 * [{"bound_tol": pytest.approx(0.1 * 0.5 * first.norm)}]
    assert second.certified and second.bound <= 0.1 * second.norm
    # a continued run asks for the same
    again = two_batches()
    again.load_state_dict(state)
    known = len(asked)
    third = again.hypergradient(relative=0.1)
    assert asked[known:] == asked[known - 2 : known]
    assert all(torch.equal(third.grad[name], g) for name, g in second.grad.items())


def test_lengths_of_vectors_whose_squares_can_not_be_represented():
    for scale in (1e-300, 1e-170, 1.0, 1e170, 1e300):
        assert length(scale * torch.tensor([3.0, -4.0], dtype=F64)) == pytest.approx(5 * scale, rel=1e-12)
    assert length(torch.zeros(0)) == length(torch.zeros(3)) == 0.0
    assert length(torch.tensor([1.0, float("inf")])) == float("inf")
    assert length(torch.tensor([1.0, float("nan")])) != length(torch.tensor([1.0, float("nan")]))


@pytest.mark.parametrize("power", [-160, 0, 160])
def test_tiny_and_huge_scales(power):
    scale, x_true = 2.0**power, photographs(F64, 16)
    y = x_true + 0.1 * torch.randn(x_true.shape, generator=torch.Generator().manual_seed(1), dtype=F64)

    def solved(s: float, relative: float) -> bi.Hypergradient:
        problem = bi.VariationalEnergy(bi.TotalVariation(0.1 * s, 0.1 * s)).bind(s * y, deepinv.physics.Denoising())
        return bi.hypergradient(problem, bi.SquaredError(), s * x_true, relative=relative)

    h, reference = solved(scale, 0.1), solved(1.0, 1e-6)
    assert h.cost.work == solved(1.0, 0.1).cost.work  # a power of two changes no decision
    assert h.certified and 0 < h.bound <= 0.1 * h.norm
    error = sum((g / scale / scale - reference.grad[n]).square() for n, g in h.grad.items()) ** 0.5
    assert error <= h.bound / scale / scale + reference.bound


def test_polished_certificates_of_relative_goals():
    energy, x_true, y, physics = deblurring(F64)
    h = bi.hypergradient(energy.bind(y, physics), bi.SquaredError(), x_true, relative=0.1, certificate="polished")
    truth = bi.hypergradient(energy.bind(y, physics), bi.SquaredError(), x_true, relative=1e-6).grad
    assert h.certificate == "polished" and h.relative_bound <= 0.01
    grad, bound = h.before_polish
    error = float(sum((grad[n] - g).square() for n, g in truth.items()) ** 0.5)
    assert error <= bound <= 1.5 * error + 1e-5 * h.norm and bound <= 0.1 * h.norm


def test_the_metric_certificate_needs_no_columns():
    x_true, physics = photographs(F64, 16), deepinv.physics.Denoising()
    y = x_true + 0.1 * torch.randn(x_true.shape, generator=torch.Generator().manual_seed(1), dtype=F64)
    problem = bi.VariationalEnergy(bi.FieldsOfExperts(3, 3, learn_filters=False)).bind(y, physics)
    h = bi.hypergradient(problem, bi.SquaredError(), x_true, error_tol=1e-4, residual_tol=1e-4, certificate="metric")
    truth = bi.hypergradient(problem, bi.SquaredError(), x_true, relative=1e-5)
    error = float(sum((h.grad[n] - g).square().sum() for n, g in truth.grad.items()) ** 0.5)
    assert h.certified and h.certificate == "metric" and error <= h.bound + truth.bound
    assert h.bound <= h.bounds["classical"]


def test_starts_have_to_be_finite():
    energy, x_true, y, physics = deblurring(F32)
    for name in ("x0", "q0"):
        with pytest.raises(ValueError, match=f"Expected {name} with finite entries"):
            bi.hypergradient(
                energy.bind(y, physics), bi.SquaredError(), x_true, relative=0.1, **{name: x_true * float("nan")}
            )


@pytest.mark.parametrize("dtype", [F32, F64])
def test_many_parameters_and_sharp_potentials_need_no_euclidean_bounds(dtype, monkeypatch):
    """Where curvature times distance is a little too large for the local certificate, Newton steps come first."""
    x_true, physics = photographs(dtype, 24), deepinv.physics.Denoising()
    y = x_true + 0.1 * torch.randn(x_true.shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    regularizer = bi.FieldsOfExperts(8, 5, start="dct")
    with torch.no_grad():
        regularizer.log_smoothings -= 6.0
    evaluations, refined = [], refinement.estimate

    def counted(*args, **kwargs):
        evaluations.append(refined(*args, **kwargs))
        return evaluations[-1]

    monkeypatch.setattr(refinement, "estimate", counted)
    problem = bi.VariationalEnergy(regularizer).bind(y, physics)
    h = bi.hypergradient(problem, bi.SquaredError(), x_true, relative=0.5)
    assert h.certified and h.bound <= 0.5 * h.norm
    assert all(list(e.bounds) == ["local"] for e in evaluations)


@pytest.mark.parametrize("smoothing", [0.1, 0.01])
@pytest.mark.parametrize("error_tol", [1.0, 0.03, 1e-5])
def test_classical_certificates_of_float32_data(error_tol, smoothing):
    """Evaluated in float32 where rounding is not noticed, else in float64; the bounds hold either way."""
    x_true = photographs(F32)
    y = x_true + 0.1 * torch.randn(x_true.shape, generator=torch.Generator().manual_seed(0))
    problem = bi.VariationalEnergy(bi.TotalVariation(0.1, smoothing)).bind(y, deepinv.physics.Denoising())
    truth = bi.hypergradient(problem, bi.SquaredError(), x_true, relative=1e-6)
    h = bi.hypergradient(problem, bi.SquaredError(), x_true, error_tol=error_tol, certificate="classical")
    error = sum((g.double() - truth.grad[name]).square() for name, g in h.grad.items()) ** 0.5
    assert h.certified and float(error) <= h.bound + truth.bound
    assert h.terms["rounding"] <= 0.1 * h.bound or error_tol == 1e-5
    low, high = h.loss_interval
    assert low <= truth.loss_interval[1] and truth.loss_interval[0] <= high
    # the same from an evaluation in float64 of the same solves
    exact = bi.hypergradient(problem, bi.SquaredError(), x_true, error_tol=error_tol, certificate="directional")
    assert all(torch.allclose(h.grad[name], g, rtol=1e-4) for name, g in exact.grad.items())
    assert torch.equal(h.x, exact.x) and h.cost.work <= exact.cost.work


@pytest.mark.parametrize("regularizer", [lambda: bi.FieldsOfExperts(4, 3), lambda: bi.ConvexRidge((2,), 3)])
def test_images_beyond_the_squares_of_float32_are_answered_in_words(regularizer):
    generator = torch.Generator().manual_seed(0)
    x = 1e20 * torch.rand(2, 1, 8, 8, generator=generator)
    problem = bi.VariationalEnergy(regularizer()).bind(1.1 * x, deepinv.physics.Denoising())
    h = bi.hypergradient(problem, bi.SquaredError(), x, relative=0.1)
    assert h.bound > 0.1 * h.norm and h.reason


def test_classical_certificates_of_many_parameters():
    """In float32 where the rounding of their sums is beside the bound; without a bound, in float64 and in words."""
    x_true = photographs(F32)
    y = x_true + 0.1 * torch.randn(x_true.shape, generator=torch.Generator().manual_seed(0))
    problem = bi.VariationalEnergy(bi.FieldsOfExperts(12, 5, start="dct")).bind(y, deepinv.physics.Denoising())

    def plain_loss(x, truth):
        return 0.5 * (x - truth).square().flatten(1).sum(1)

    truth = bi.hypergradient(problem, bi.SquaredError(), x_true, relative=1e-4)
    h = bi.hypergradient(problem, bi.SquaredError(), x_true, error_tol=1.0, certificate="classical")
    error = sum(float((g - truth.grad[name]).double().square().sum()) for name, g in h.grad.items()) ** 0.5
    assert h.certified and error <= h.bound + truth.bound
    unknown = bi.hypergradient(problem, plain_loss, x_true, error_tol=1.0, certificate="classical")
    assert not unknown.certified and "smoothness" in unknown.reason
    assert all(torch.allclose(g, h.grad[name], rtol=1e-3, atol=1e-3 * h.norm) for name, g in unknown.grad.items())


def denoising(scale: float = 1.0) -> tuple[bi.LowerLevelProblem, torch.Tensor]:
    x_true = photographs(F32)
    noise = torch.randn(x_true.shape, generator=torch.Generator().manual_seed(1))
    energy = bi.VariationalEnergy(bi.TotalVariation(0.1 * scale, 0.01 * scale), ridge=1e-3)
    return energy.bind(scale * (x_true + 0.1 * noise), deepinv.physics.Denoising()), scale * x_true


@pytest.mark.skipif(bi.native_kernels() != "native", reason="no compiled kernels on this machine")
@pytest.mark.parametrize("loss", ["squared error", "another"])
@pytest.mark.parametrize("error_tol", [1e-1, 1e-3])
def test_one_pass_measures_what_an_evaluation_finds(loss, error_tol, monkeypatch):
    class Another(bi.SquaredError):
        smoothness = 3.0

        def __call__(self, x, x_true):
            return 3 * super().__call__(x, x_true)

        def grad(self, x, x_true):
            return 3 * super().grad(x, x_true)

    problem, x_true = denoising()
    loss = bi.SquaredError() if loss == "squared error" else Another()
    options = {"error_tol": error_tol, "residual_tol": error_tol, "certificate": "auto"}
    passes, measure = [], type(problem).measure
    monkeypatch.setattr(type(problem), "measure", lambda *a, **k: passes.append(1) or measure(*a, **k))
    fast = bi.hypergradient(problem, loss, x_true, **options)
    assert len(passes) == 1
    monkeypatch.setattr(type(problem), "measures", False)
    slow = bi.hypergradient(problem, loss, x_true, **options)
    assert len(passes) == 1 and torch.equal(fast.x, slow.x) and torch.equal(fast.q, slow.q)
    for name, g in fast.grad.items():
        assert float(g) == pytest.approx(float(slow.grad[name]), rel=1e-6)
    assert fast.bounds.keys() == slow.bounds.keys() and fast.certificate == slow.certificate
    for name, bound in fast.bounds.items():  # the balls on which derivatives change differ a little
        assert bound == pytest.approx(slow.bounds[name], rel=0.02), name
    assert fast.loss == pytest.approx(slow.loss, rel=1e-9)
    width = slow.loss_interval[1] - slow.loss_interval[0]
    assert fast.loss_interval == pytest.approx(slow.loss_interval, abs=0.02 * width)
    assert torch.allclose(fast.lower.distance_bound, slow.lower.distance_bound, rtol=1e-2)


@pytest.mark.skipif(bi.native_kernels() != "native", reason="no compiled kernels on this machine")
def test_numbers_out_of_the_range_of_one_pass_are_evaluated_otherwise():
    """Inner products of columns of J would be 1e-28 there."""
    scale = 2.0**-50
    (problem, x_true), (usual, x_usual) = denoising(scale), denoising()
    h = bi.hypergradient(problem, bi.SquaredError(), x_true, relative=0.01)
    reference = bi.hypergradient(usual, bi.SquaredError(), x_usual, relative=1e-6)
    assert h.certified and 0 < h.bound <= 0.01 * h.norm
    error = sum((g.double() / scale**2 - reference.grad[n]).square() for n, g in h.grad.items()) ** 0.5
    assert float(error) <= h.bound / scale**2 + reference.bound


@pytest.mark.skipif(bi.native_kernels() != "native", reason="no compiled kernels on this machine")
def test_the_aim_follows_the_estimate_near_stationary_points(monkeypatch):
    """A rough adjoint makes the norm of a small hypergradient many times too large; the evaluation comes after that."""
    energy, x_true, y, physics = deblurring(F64)
    problem, method = energy.bind(y, physics), MAID()
    objective, first = ProblemObjective(problem, bi.SquaredError(), x_true), None
    for _ in range(5):
        first = first or bi.hypergradient(problem, bi.SquaredError(), x_true, relative=0.01)
        method.step(objective)
    evaluations, refined = [], refinement.estimate
    monkeypatch.setattr(refinement, "estimate", lambda *a, **k: evaluations.append(refined(*a, **k)) or evaluations[-1])
    h = bi.hypergradient(problem, bi.SquaredError(), x_true, relative=0.3)
    assert h.bound <= 0.3 * h.norm and h.norm < 0.05 * first.norm and len(evaluations) == 1


class _Doubled(bi.SquaredError):
    def __call__(self, x, x_true):
        return 2 * super().__call__(x, x_true)

    def grad(self, x, x_true):
        return 2 * super().grad(x, x_true)


class _DoubledWithHVP(_Doubled):
    def hvp(self, x, x_true, v):
        return 2 * v


def test_what_a_loss_inherits_is_not_said_of_its_own_values():
    x, x_true, v = (torch.rand(2, 1, 3, 4, generator=torch.Generator().manual_seed(k), dtype=F64) for k in range(3))
    assert LossOracle(bi.SquaredError(), x_true, x.shape).squared_error
    for loss, factor in ((bi.SquaredError(), 1), (_Doubled(), 2), (_DoubledWithHVP(), 2)):
        oracle = LossOracle(loss, x_true, x.shape)
        assert oracle.squared_error == (factor == 1)
        assert torch.allclose(oracle.hvp(x, v), factor * v, rtol=1e-12)
    linear = LossOracle(lambda x, x_true: (x - x_true).flatten(1).sum(1), x_true, x.shape)
    quartic = LossOracle(lambda x, x_true: (x - x_true).pow(4).flatten(1).sum(1), x_true, x.shape)
    assert torch.equal(linear.hvp(x, v), torch.zeros_like(v))
    assert torch.allclose(quartic.hvp(x, v), 12 * (x - x_true).square() * v, rtol=1e-12)
