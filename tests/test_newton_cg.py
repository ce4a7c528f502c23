"""Newton-CG on smoothed total variation: far starts, tiny smoothing, float32, batches."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import deepinv
import pytest
import torch
from torch import Tensor

import bilevel_imaging as bi
from bilevel_imaging.cost import Cost
from bilevel_imaging.derivatives import Constants, Linearization
from bilevel_imaging.energies.problem import LowerLevelProblem
from bilevel_imaging.energies.quadratic import QuadraticProblem
from bilevel_imaging.lower_solvers import newton_cg
from bilevel_imaging.lower_solvers.newton_cg import NewtonCG
from bilevel_imaging.tensors import norm
from bilevel_imaging.training.reconstruction import minimize

F32, F64 = torch.float32, torch.float64
WEIGHT = 0.1


def difference(x: Tensor) -> Tensor:
    """Forward differences ``(B, 2, C, H, W)``, zero at the last row and column."""
    result = torch.zeros(x.shape[0], 2, *x.shape[1:], dtype=x.dtype)
    result[:, 0, ..., :-1] = x[..., 1:] - x[..., :-1]
    result[:, 1, ..., :-1, :] = x[..., 1:, :] - x[..., :-1, :]
    return result


def adjoint(z: Tensor) -> Tensor:
    dx, dy = z[:, 0, ..., :-1], z[:, 1, ..., :-1, :]
    result = torch.zeros_like(z[:, 0])
    result[..., 1:] += dx
    result[..., :-1] -= dx
    result[..., 1:, :] += dy
    result[..., :-1, :] -= dy
    return result


class SmoothedTV(LowerLevelProblem):
    """1/2 ||x - y||^2 + WEIGHT sum (sqrt(|Dx|^2 + smoothing^2) - smoothing)."""

    def __init__(self, y: Tensor, smoothing: float, *, can_subset=True, known=True, cost: Cost | None = None):
        self.y, self.smoothing, self.can_subset, self.known = y, smoothing, can_subset, known
        self.theta: dict[str, Tensor] = {}
        self.shape, self.dtype, self.device = y.shape, y.dtype, y.device
        self.cost = Cost() if cost is None else cost

    def magnitude(self, z: Tensor) -> Tensor:
        return (z.square().sum(1, keepdim=True) + self.smoothing**2).sqrt()

    def _value(self, x):
        prior = (self.magnitude(difference(x)) - self.smoothing).flatten(1).sum(1)
        return (x - self.y).square().flatten(1).sum(1) / 2 + WEIGHT * prior

    def _grad(self, x):
        z = difference(x)
        return x - self.y + WEIGHT * adjoint(z / self.magnitude(z))

    def _linearize(self, x):
        return _Linearization(self, x)

    def constants(self):
        one = torch.ones(self.shape[0], dtype=self.dtype)
        return Constants(one if self.known else None, one * (1 + 8 * WEIGHT / self.smoothing))

    def initial(self):
        return self.y.clone()

    def subset(self, index):
        if not self.can_subset:
            return None
        return SmoothedTV(self.y[index], self.smoothing, known=self.known, cost=self.cost)

    def gradient_rounding(self, x):
        return torch.finfo(self.dtype).eps * (1 + WEIGHT / self.smoothing) * norm(x)


class _Linearization(Linearization):
    def __init__(self, problem: SmoothedTV, x: Tensor):
        self.problem, self.x, self.constants = problem, x, problem.constants()
        self.grad = problem._grad(x)
        z = difference(x)
        self.size = problem.magnitude(z)
        self.direction = z / self.size

    def hvp(self, v):
        z = difference(v)
        along = (self.direction * z).sum(1, keepdim=True)
        return v + WEIGHT * adjoint((z - self.direction * along) / self.size)

    def mixed_vjp(self, q):
        return {}

    def subset(self, index):
        problem = self.problem.subset(index)
        return None if problem is None else _Linearization(problem, self.x[index])


def noisy_blocks(batch=2, size=32, dtype=F64):
    generator = torch.Generator().manual_seed(0)
    clean = torch.zeros(batch, 1, size, size, dtype=F64)
    for i in range(batch):
        clean[i, :, size // 4 : size // 2 + 3 * i, 5 : size - 7] = 0.8
        clean[i, :, size // 2 :, size // 3 : size // 2] += 0.3 * (i + 1)
    return (clean + 0.1 * torch.randn(clean.shape, generator=generator, dtype=F64)).to(dtype)


def check(problem, solution, tol):
    """Every statement of the solution, measured again."""
    grad_norm = norm(problem._grad(solution.x))
    assert solution.converged.all() and set(solution.reason) == {"converged"}
    assert (grad_norm <= tol * (1 + 1e-12)).all()
    torch.testing.assert_close(solution.grad_norm, grad_norm)
    torch.testing.assert_close(solution.distance_bound, grad_norm + problem.gradient_rounding(solution.x))


def test_problem_is_what_it_says():
    problem = SmoothedTV(noisy_blocks(), 1e-2)
    x = problem.y.clone().requires_grad_()
    (grad,) = torch.autograd.grad(problem._value(x).sum(), x)
    torch.testing.assert_close(problem._grad(x.detach()), grad)
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=F64)
    _, product = torch.autograd.functional.hvp(lambda u: problem._value(u).sum(), x.detach(), v)
    torch.testing.assert_close(problem._linearize(x.detach()).hvp(v), product)


@pytest.mark.parametrize(
    ("smoothing", "tol", "gradients", "hvps"),
    [(1e-2, 1e-2, 60, 150), (1e-2, 1e-6, 60, 250), (1e-3, 1e-2, 170, 800), (1e-3, 1e-6, 180, 1100)],
)
@pytest.mark.parametrize("start", ["data", "zero", "far"])
def test_converges_cheaply(smoothing, tol, gradients, hvps, start):
    y = noisy_blocks()
    problem = SmoothedTV(y, smoothing)
    far = 50 * torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=F64)
    x0 = {"data": None, "zero": torch.zeros_like(y), "far": far}[start]
    solution = NewtonCG().solve(problem, x0, tol)
    check(problem, solution, tol)
    if start == "data":
        assert problem.cost.gradients <= gradients * len(y) and problem.cost.hvps <= hvps * len(y)


def test_distance_bound_holds():
    problem = SmoothedTV(noisy_blocks(), 1e-2)
    reference = NewtonCG().solve(problem, None, 1e-11)
    for tol in (1e-1, 1e-3):
        solution = NewtonCG().solve(problem, None, tol)
        distance = norm(solution.x - reference.x)
        assert (distance <= solution.distance_bound + 1e-11).all() and (solution.distance_bound <= tol).all()


@pytest.mark.slow
def test_very_small_smoothing():
    problem = SmoothedTV(noisy_blocks(size=16), 1e-5)
    check(problem, NewtonCG(max_iter=500).solve(problem, None, 1e-4), 1e-4)


def test_good_start_is_returned_unchanged():
    problem = SmoothedTV(noisy_blocks(), 1e-2)
    x0 = NewtonCG().solve(problem, None, 1e-6).x
    problem.cost.gradients = problem.cost.hvps = 0
    solution = NewtonCG().solve(problem, x0, 1e-5)
    assert torch.equal(solution.x, x0) and solution.iterations.tolist() == [0, 0]
    assert problem.cost.gradients == 2 and problem.cost.hvps == 0
    check(problem, solution, 1e-5)


@pytest.mark.parametrize("smoothing", [1e-2, 1e-3])
def test_float32_reaches_its_floor_and_says_so(smoothing):
    y = noisy_blocks(dtype=F32)
    problem = SmoothedTV(y, smoothing)
    check(problem, NewtonCG().solve(problem, None, 1e-3), 1e-3)
    solution = NewtonCG().solve(problem, None, 0.0)
    assert set(solution.reason) == {"stagnated"} and not solution.converged.any()
    assert (solution.iterations < 50).all()
    exact = SmoothedTV(y.double(), smoothing)
    true = norm(exact._grad(solution.x.double()))
    floor = problem.gradient_rounding(solution.x).double()
    assert (true <= 3 * floor).all(), "stopped above the rounding floor"
    assert ((solution.grad_norm.double() - true).abs() <= 3 * floor).all()


def test_float64_floor():
    problem = SmoothedTV(noisy_blocks(), 1e-2)
    solution = NewtonCG().solve(problem, None, 0.0)
    assert set(solution.reason) == {"stagnated"}
    assert (solution.grad_norm <= 3 * problem.gradient_rounding(solution.x)).all()


@pytest.mark.parametrize("can_subset", [True, False])
def test_batch_is_one_by_one(can_subset):
    y = noisy_blocks(batch=4)
    y[3] = 0.25  # constant image: already the minimizer
    tol = torch.tensor([1e-1, 1e-6, 1e-1, 1e-3], dtype=F64)
    solution = NewtonCG().solve(SmoothedTV(y, 1e-2, can_subset=can_subset), None, tol)
    assert solution.converged.all() and int(solution.iterations[3]) == 0
    assert (norm(SmoothedTV(y, 1e-2)._grad(solution.x)) <= tol).all()
    for i in range(4):
        single = NewtonCG().solve(SmoothedTV(y[i : i + 1], 1e-2), None, float(tol[i]))
        assert int(single.iterations) == int(solution.iterations[i])
        torch.testing.assert_close(single.x[0], solution.x[i], atol=1e-12, rtol=0)


def test_finished_samples_cost_nothing():
    y = noisy_blocks(batch=8)
    tol = torch.full((8,), 1e6, dtype=F64)
    tol[5] = 1e-6
    batch, single = SmoothedTV(y, 1e-2), SmoothedTV(y[5:6], 1e-2)
    NewtonCG().solve(batch, None, tol)
    NewtonCG().solve(single, None, 1e-6)
    assert batch.cost.hvps == single.cost.hvps and batch.cost.gradients == single.cost.gradients + 7


def test_broken_sample_does_not_harm_the_others():
    y = noisy_blocks(batch=3)
    expected = NewtonCG().solve(SmoothedTV(y, 1e-2), None, 1e-8).x
    y[1, 0, 3, 3] = math.nan
    solution = NewtonCG().solve(SmoothedTV(y, 1e-2), torch.zeros_like(y), 1e-8)
    assert solution.reason == ("converged", "not finite", "converged")
    assert solution.grad_norm[1].isinf() and solution.distance_bound[1].isinf() and solution.x[1].isfinite().all()
    torch.testing.assert_close(solution.x[[0, 2]], expected[[0, 2]], atol=2e-8, rtol=0)


def test_iteration_limit_is_reported():
    problem = SmoothedTV(noisy_blocks(), 1e-3)
    solution = NewtonCG().solve(problem, None, 1e-6, max_iter=3)
    assert set(solution.reason) == {"max_iter"} and solution.iterations.tolist() == [3, 3]
    torch.testing.assert_close(solution.grad_norm, norm(problem._grad(solution.x)))
    start = norm(problem._grad(problem.initial()))
    assert (solution.grad_norm <= start).all()


def test_unknown_strong_convexity():
    """The stopping rule falls back to the curvature met on the way; nothing is certified."""
    y = noisy_blocks()
    reference = NewtonCG().solve(SmoothedTV(y, 1e-2), None, 1e-10).x
    solution = NewtonCG().solve(SmoothedTV(y, 1e-2, known=False), None, 1e-5)
    assert solution.converged.all() and solution.distance_bound.isinf().all()
    assert (norm(solution.x - reference) <= 1e-4).all()


def test_overflowing_trial_steps_are_shortened():
    """log cosh is nearly linear far out: the first Newton steps overshoot by orders of magnitude."""

    class LogCosh(SmoothedTV):
        def _value(self, x):
            return (x.abs() + torch.log1p(torch.exp(-2 * x.abs()))).flatten(1).sum(1) + 5e-4 * x.square().flatten(
                1
            ).sum(1)

        def _grad(self, x):
            return torch.tanh(x) + 1e-3 * x

        def _linearize(self, x):
            outer = self

            class Diagonal(_Linearization):
                def __init__(self):
                    self.problem, self.x, self.grad = outer, x, outer._grad(x)
                    self.constants = outer.constants()

                def hvp(self, v):
                    return (1 / torch.cosh(self.x) ** 2 + 1e-3) * v

                def subset(self, index):
                    return None

            return Diagonal()

        def constants(self):
            one = torch.ones(self.shape[0], dtype=self.dtype)
            return Constants(1e-3 * one, 2 * one)

    problem = LogCosh(noisy_blocks(), 1.0, can_subset=False)
    x0 = 8 * torch.ones_like(problem.y)
    solution = NewtonCG().solve(problem, x0, 1e-4)
    assert solution.converged.all()
    assert (norm(solution.x) <= 1e-4).all()


def test_inputs_are_left_alone():
    problem = SmoothedTV(noisy_blocks(), 1e-2)
    x0 = torch.zeros_like(problem.y).requires_grad_()
    solution = NewtonCG().solve(problem, x0, 1e-3)
    assert torch.equal(x0, torch.zeros_like(x0)) and x0.grad is None and not solution.x.requires_grad
    assert dataclasses.is_dataclass(solution) and torch.is_grad_enabled()


def test_misuse():
    problem = SmoothedTV(noisy_blocks(), 1e-2)
    with pytest.raises(ValueError, match="x0"):
        NewtonCG().solve(problem, problem.y[:1], 1e-3)
    with pytest.raises(ValueError, match="error_tol"):
        NewtonCG().solve(problem, None, -1.0)


@torch.no_grad()
def test_steps_far_past_the_minimum_count_if_they_lower_the_energy() -> None:
    """x^2 / 2 from x = 1: to -0.8, far past the minimum but lower, is taken; to -1.1, higher, is cut back; NaN too."""
    one = torch.ones(3, 1, dtype=F64)
    problem = QuadraticProblem(one.unsqueeze(2), 0 * one, one.unsqueeze(2), torch.zeros(1, dtype=F64))
    state, _ = newton_cg._start(problem, one, torch.zeros(3, dtype=F64), cold=True)
    d = torch.tensor([[-1.8], [-2.1], [torch.nan]], dtype=F64)
    running = torch.ones(3, dtype=torch.bool)
    newton_cg._line_search(problem, state, d, -d[:, 0].abs(), running, None)
    assert float(state.x[0]) == pytest.approx(-0.8)
    assert abs(float(state.x[1])) < 0.9
    assert state.status.tolist()[:2] == [newton_cg.RUNNING] * 2 and state.status[2] == newton_cg.STAGNATED


def test_a_cold_reconstruction_starts_from_the_majorizer() -> None:
    """Learned filters on a noisy image: Newton's method proper would overshoot again and again."""
    folder = Path(__file__).parents[1] / "data" / "pretrained"
    energy = bi.VariationalEnergy(bi.load_regularizer(folder / "convex_ridge_sigma25.safetensors"))
    photograph = next(iter(bi.data.photographs().values()))[:, 100:148, 100:148][None]
    noise = torch.randn(photograph.shape, generator=torch.Generator().manual_seed(0))
    problem = energy.bind(photograph + 25 / 255 * noise, deepinv.physics.Denoising())
    _, info = minimize(problem, error_tol=1e-3 * float(photograph.norm()))
    assert bool(info.converged.all())
    # one gradient per step, one at the start, and that of the certificate
    assert problem.cost.gradients == int(info.iterations[0]) + 2
