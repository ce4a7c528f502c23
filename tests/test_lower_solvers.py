"""First-order lower-level solvers and L-BFGS: textbook iterates, rates, certificates, and per-sample independence."""

from __future__ import annotations

import math

import deepinv
import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

import bilevel_imaging as bi
from bilevel_imaging.cost import Cost
from bilevel_imaging.data import gaussian_kernel
from bilevel_imaging.derivatives import Constants, Linearization
from bilevel_imaging.energies.problem import LowerLevelProblem
from bilevel_imaging.energies.quadratic import QuadraticProblem
from bilevel_imaging.lower_solvers import (
    LBFGS,
    LOWER_SOLVERS,
    AcceleratedGradient,
    GradientDescent,
    HeavyBall,
    LowerSolution,
    LowerSolver,
    NewtonCG,
    lbfgs,
)
from bilevel_imaging.lower_solvers.accelerated_gradient import momentum_step
from bilevel_imaging.tensors import norm, per_sample

FIRST_ORDER = [GradientDescent, HeavyBall, AcceleratedGradient]
SOLVERS = [*FIRST_ORDER, LBFGS]
CHECKPOINTS = (20, 40, 60, 80, 100)

solvers = pytest.mark.parametrize("solver", SOLVERS)
first_order = pytest.mark.parametrize("solver", FIRST_ORDER)


class SmoothedTV(LowerLevelProblem):
    """g_i(x) = fidelity/2 ||x - y_i||^2 + weight_i sum sqrt(dx^2 + dy^2 + smoothing^2); y ``(B, H, W)``.

    mu = fidelity, L = fidelity + 8 weight / smoothing. ``known`` False hides the constants, ``divisible`` False the
    subsets; ``evaluated`` collects the batch size of every gradient.
    """

    def __init__(self, y: Tensor, weight: Tensor, smoothing: float = 0.02, fidelity: float = 0.5):
        self.y, self.smoothing, self.fidelity = y, smoothing, fidelity
        self.theta = {"weight": weight}
        self.shape, self.dtype, self.device, self.cost = y.shape, y.dtype, y.device, Cost()
        self.known = self.divisible = True
        self.evaluated: list[int] = []

    def _field(self, x: Tensor) -> Tensor:
        d = x.new_zeros(2, *x.shape)
        d[0, :, :-1] = x[:, 1:] - x[:, :-1]
        d[1, :, :, :-1] = x[:, :, 1:] - x[:, :, :-1]
        return d

    def _adjoint(self, p: Tensor) -> Tensor:
        x = torch.zeros_like(p[0])
        x[:, 1:] += p[0, :, :-1]
        x[:, :-1] -= p[0, :, :-1]
        x[:, :, 1:] += p[1, :, :, :-1]
        x[:, :, :-1] -= p[1, :, :, :-1]
        return x

    def _root(self, d: Tensor) -> Tensor:
        return (d.square().sum(0) + self.smoothing**2).sqrt()

    def _value(self, x: Tensor) -> Tensor:
        tv = self._root(self._field(x)).flatten(1).sum(1)
        return 0.5 * self.fidelity * (x - self.y).square().flatten(1).sum(1) + self.theta["weight"] * tv

    def _grad(self, x: Tensor) -> Tensor:
        self.evaluated.append(x.shape[0])
        d = self._field(x)
        return self.fidelity * (x - self.y) + per_sample(self.theta["weight"], x) * self._adjoint(d / self._root(d))

    def _linearize(self, x: Tensor) -> Linearization:
        return _SmoothedTVLinearization(self, x)

    def constants(self) -> Constants:
        if not self.known:
            return Constants(reason="hidden")
        mu = torch.full_like(self.theta["weight"], self.fidelity)
        return Constants(strong_convexity=mu, smoothness=mu + 8 * self.theta["weight"] / self.smoothing)

    def initial(self) -> Tensor:
        return self.y

    def subset(self, index: Tensor) -> LowerLevelProblem | None:
        if not self.divisible:
            return None
        part = SmoothedTV(self.y[index], self.theta["weight"][index], self.smoothing, self.fidelity)
        part.cost, part.known, part.evaluated = self.cost, self.known, self.evaluated
        return part

    def gradient_rounding(self, x: Tensor) -> Tensor:
        size = self.fidelity * (norm(x) + norm(self.y)) + 4 * self.theta["weight"] * x[0].numel() ** 0.5
        return 4 * torch.finfo(self.dtype).eps * (size + self.constants_or_bound() * norm(x))

    def constants_or_bound(self) -> Tensor:
        return self.fidelity + 8 * self.theta["weight"] / self.smoothing


class _SmoothedTVLinearization(Linearization):
    def __init__(self, problem: SmoothedTV, x: Tensor):
        self.problem, self.grad, self.constants = problem, problem._grad(x), problem.constants()
        self.d = problem._field(x)
        self.root = problem._root(self.d)

    def hvp(self, v: Tensor) -> Tensor:
        e, d, p = self.problem._field(v), self.d, self.problem
        curved = e / self.root - d * (d * e).sum(0) / self.root**3
        return p.fidelity * v + per_sample(p.theta["weight"], v) * p._adjoint(curved)

    def mixed_vjp(self, q: Tensor) -> dict[str, Tensor]:
        return {"weight": (q * self.problem._adjoint(self.d / self.root)).flatten(1).sum(1)}


class Scalar(LowerLevelProblem):
    """One-dimensional energies given by their slope and value, ``(B, 1)``, with mu = 1 and L = 25."""

    def __init__(self, slope, value, batch: int = 1):
        self.slope, self.energy, self.theta, self.cost = slope, value, {}, Cost()
        self.shape, self.dtype, self.device = torch.Size([batch, 1]), torch.float64, torch.device("cpu")

    def _value(self, x: Tensor) -> Tensor:
        return self.energy(x).sum(1)

    def _grad(self, x: Tensor) -> Tensor:
        return self.slope(x)

    def _linearize(self, x: Tensor) -> Linearization:
        raise NotImplementedError

    def constants(self) -> Constants:
        one = torch.ones(self.shape[0], dtype=self.dtype)
        return Constants(strong_convexity=one, smoothness=25 * one)

    def initial(self) -> Tensor:
        return torch.zeros(self.shape, dtype=self.dtype)


def images(batch: int = 4, size: int = 10, dtype: torch.dtype = torch.float64) -> SmoothedTV:
    """Noisy squares; weights differ, so that the samples need different numbers of iterations."""
    generator = torch.Generator().manual_seed(1)
    y = torch.zeros(batch, size, size, dtype=torch.float64)
    y[:, 2:7, 3:8] = 1.0
    y += 0.1 * torch.randn(y.shape, generator=generator, dtype=torch.float64)
    weight = 0.02 * 2.0 ** torch.arange(batch, dtype=torch.float64)
    return SmoothedTV(y.to(dtype), weight.to(dtype))


def reference(problem: SmoothedTV) -> Tensor:
    """Minimizers by scipy, sample by sample, with dense Hessians."""
    result = []
    for i in range(problem.batch_size):
        one = problem.subset(torch.tensor([i]))
        shape, n = one.shape, one.y.numel()

        def point(z: np.ndarray, shape: torch.Size = shape) -> Tensor:
            return torch.from_numpy(z).reshape(shape)

        def hessian(z: np.ndarray, one: SmoothedTV = one, point=point, n: int = n) -> np.ndarray:
            everything = SmoothedTV(one.y.expand(n, -1, -1), one.theta["weight"].expand(n))
            x = point(z).expand(n, -1, -1)
            basis = torch.eye(n, dtype=torch.float64).reshape(x.shape)
            return everything.linearize(x).hvp(basis).reshape(n, n).numpy()

        found = minimize(
            lambda z, one=one, point=point: one.value(point(z)).item(),
            one.y.flatten().numpy(),
            jac=lambda z, one=one, point=point: one.grad(point(z)).flatten().numpy(),
            hess=hessian,
            method="trust-exact",
            options={"gtol": 1e-11},
        )
        result.append(point(found.x))
    return torch.cat(result)


@pytest.fixture(scope="module")
def tv() -> tuple[SmoothedTV, Tensor]:
    problem = images()
    return problem, reference(problem)


@pytest.fixture(scope="module")
def regression() -> QuadraticProblem:
    """Ehrhardt & Roberts (2023), Section 4.1: L = 5108.127832, mu = 145.602732, q_GD = 0.944572, q_HB = 0.711110."""
    random = np.random.RandomState(0)
    a = random.rand(1000, 10)
    a @ random.rand(10) + 0.01 * random.randn(1000)
    c, d = random.rand(1000, 10), random.rand(1000, 10)
    e = c @ random.rand(10) + d @ random.rand(10) + 0.01 * random.randn(1000)
    matrices = (2 * d.T @ d, 2 * d.T @ e, 2 * d.T @ c)
    hessian, b, mixed = (torch.from_numpy(m).unsqueeze(0) for m in matrices)
    return QuadraticProblem(hessian, b, mixed, torch.ones(10, dtype=torch.float64))


def schedule_iterates(solver: type, problem: LowerLevelProblem, num: int) -> tuple[list[Tensor], list[Tensor]]:
    """The iterates x_0, ..., x_num by the published schedule, and the points where gradients were taken."""
    c = problem.constants()
    previous = x = problem.initial()
    iterates, measured = [x], []
    for k in range(num):
        step, momentum = solver.schedule(c.strong_convexity, c.smoothness, k)
        step, push = per_sample(step, x), per_sample(momentum, x) * (x - previous)
        point = x + push if solver.extrapolates_gradient else x
        previous, x = x, x + push - step * problem.grad(point)
        iterates.append(x)
        measured.append(point)
    return iterates, measured


def spy(problem: LowerLevelProblem, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """All points at which gradients are taken from now on."""
    points, inside = [], problem._grad
    monkeypatch.setattr(problem, "_grad", lambda x: (points.append(x.clone()), inside(x))[1])
    return points


def check_evidence(problem: LowerLevelProblem, solution: LowerSolution) -> None:
    """What is reported is what is measured at the point returned."""
    measured = norm(problem.grad(solution.x))
    assert torch.allclose(solution.grad_norm, measured, rtol=1e-9, atol=1e-13)
    mu = problem.constants().strong_convexity
    rounding = problem.gradient_rounding(solution.x)
    torch.testing.assert_close(solution.distance_bound, (solution.grad_norm + rounding) / mu)


# --- the paper's quadratic


@pytest.mark.parametrize(
    ("solver", "expected"),
    [
        (GradientDescent, (2.520e-1, 7.201e-2, 2.105e-2, 6.266e-3, 1.891e-3)),
        (HeavyBall, (1.137e-2, 2.402e-5, 3.904e-8, 5.679e-11, 7.759e-14)),
        (AcceleratedGradient, (1.319e-1, 4.886e-3, 1.485e-4, 4.149e-6, 1.072e-7)),
    ],
)
def test_schedules_give_the_errors_of_the_paper(regression, solver, expected):
    iterates, _ = schedule_iterates(solver, regression, 100)
    errors = [norm(iterates[k] - regression.minimizer()).item() for k in CHECKPOINTS]
    for error, value in zip(errors, expected, strict=True):
        # the last digits of an error of 1e-13 are rounding
        assert error == pytest.approx(value, rel=1e-3, abs=1e-15)


@pytest.mark.parametrize(
    ("solver", "expected"),
    [(GradientDescent, (2.520e-1, 6.266e-3, 1.891e-3)), (HeavyBall, (1.137e-2, 5.679e-11, 7.759e-14))],
)
def test_solvers_reach_the_errors_of_the_paper(regression, solver, expected):
    for k, value in zip((20, 80, 100), expected, strict=True):
        solution = solver().solve(regression, None, 0.0, max_iter=k)
        assert norm(solution.x - regression.minimizer()).item() == pytest.approx(value, rel=1e-3, abs=1e-15)
        assert solution.iterations.tolist() == [k]
        assert solution.reason == ("max_iter",)


@first_order
def test_iterates_are_those_of_the_schedule(regression, solver, monkeypatch):
    _, expected = schedule_iterates(solver, regression, 81)
    points = spy(regression, monkeypatch)
    solver().solve(regression, None, 0.0, max_iter=80)
    assert len(points) == len(expected)
    for point, want in zip(points, expected, strict=True):
        assert (point - want).abs().max() < 1e-13


@first_order
def test_rates_on_the_quadratic(regression, solver):
    c = regression.constants()
    mu, L = c.strong_convexity.item(), c.smoothness.item()
    root = math.sqrt(mu / L)
    q_gd, q_hb = (L - mu) / (L + mu), (1 - root) / (1 + root)
    iterates, _ = schedule_iterates(solver, regression, 80)
    first = norm(iterates[0] - regression.minimizer()).item()
    bound = {
        GradientDescent: lambda k: q_gd**k,
        HeavyBall: lambda k: (1 + k * (1 + q_hb)) * q_hb**k,
        AcceleratedGradient: lambda k: math.sqrt(L / mu * min((1 + root) * (1 - root) ** k, 4 / (k + 1) ** 2)),
    }[solver]
    for k, x in enumerate(iterates):
        assert norm(x - regression.minimizer()).item() <= bound(k) * first * (1 + 1e-9)


def test_momentum_is_not_zero_and_tends_to_the_constant_one():
    q, t, momenta = 0.01, 0.0, []
    for _ in range(300):
        t, momentum = momentum_step(t, q)
        momenta.append(momentum)
    assert momenta[0] == -1.0 and momenta[1] == 0.0 and momenta[2] > 0.2
    assert momenta[-1] == pytest.approx((1 - 0.1) / (1 + 0.1), rel=1e-9)
    assert momentum_step(1.0, 1.0) == (1.0, 0.0)


# --- smoothed total variation


@solvers
@pytest.mark.parametrize("error_tol", [1e-2, 1e-6])
def test_certified_distance_on_tv(tv, solver, error_tol):
    problem, minimizer = tv
    solution = solver().solve(problem, None, error_tol)
    assert solution.converged.all() and solution.reason == ("converged",) * 4
    assert (solution.distance_bound <= error_tol).all()
    # the reference itself is known to about 1e-11
    distance = norm(solution.x - minimizer)
    assert (distance <= solution.distance_bound + 1e-10).all()
    # no solver is so far off that the certificate is loose by orders of magnitude
    assert (solution.distance_bound <= 100 * distance + 1e-10).all()
    check_evidence(problem, solution)


@pytest.mark.parametrize(
    ("solver", "limit"), [(GradientDescent, 1000), (HeavyBall, 110), (AcceleratedGradient, 215), (LBFGS, 95)]
)
def test_work_on_tv(tv, solver, limit):
    problem, _ = tv
    assert solver().solve(problem, None, 1e-6).iterations.max() <= limit


def test_gradient_norm_of_gradient_descent_shrinks_at_its_rate(tv, monkeypatch):
    problem, _ = tv
    points = spy(problem, monkeypatch)
    GradientDescent().solve(problem, None, 0.0, max_iter=50)
    sizes = torch.stack([norm(problem._grad(x)) for x in points[:51]])
    c = problem.constants()
    rate = (c.smoothness - c.strong_convexity) / (c.smoothness + c.strong_convexity)
    assert (sizes[1:] <= rate * sizes[:-1] * (1 + 1e-12)).all()


@solvers
@pytest.mark.parametrize("divisible", [True, False])
def test_batch_is_one_by_one(solver, divisible):
    problem = images()
    problem.divisible = divisible
    together = solver().solve(problem, None, 1e-7)
    for i in range(4):
        alone = solver().solve(images().subset(torch.tensor([i])), None, 1e-7)
        assert (together.x[i] - alone.x[0]).abs().max() < 1e-12
        assert together.iterations[i] == alone.iterations[0]
        assert together.grad_norm[i].item() == pytest.approx(alone.grad_norm.item(), rel=1e-4)
    assert len(set(together.iterations.tolist())) > 1


@solvers
def test_finished_samples_are_frozen_and_cost_nothing(solver):
    problem = images()
    problem.divisible = False
    tolerances = torch.tensor([1e-3, 1e9, 1e-7, 1e9], dtype=torch.float64)
    solution = solver().solve(problem, None, tolerances)
    assert torch.equal(solution.x[[1, 3]], problem.y[[1, 3]])
    assert solution.iterations[1] == 0 and 0 < solution.iterations[0] < solution.iterations[2]
    assert problem.cost.gradients == 4 + solution.iterations.sum()
    # bits kept: a sample is where it was when it stopped, whatever the others did afterwards
    early = solver().solve(problem, None, tolerances, max_iter=int(solution.iterations[0]))
    assert torch.equal(early.x[0], solution.x[0])


@solvers
def test_work_is_compacted(solver):
    problem = images()
    tolerances = torch.tensor([1e9, 1e9, 1e9, 1e-6], dtype=torch.float64)
    solution = solver().solve(problem, None, tolerances)
    assert solution.converged.all()
    assert problem.evaluated == [4] + [1] * int(solution.iterations[3])
    check_evidence(problem, solution)


@solvers
def test_not_finite_sample_harms_nobody(solver):
    clean = solver().solve(images(), None, 1e-6)
    problem = images()
    problem.y = problem.y.clone()
    problem.y[1, 0, 0] = math.nan
    solution = solver().solve(problem, None, 1e-6)
    assert solution.reason == ("converged", "not finite", "converged", "converged")
    assert not solution.converged[1] and solution.distance_bound[1] == math.inf
    for i in (0, 2, 3):
        assert (solution.x[i] - clean.x[i]).abs().max() < 1e-12


@first_order
def test_not_finite_on_the_way_returns_the_best_point(solver):
    # finite until the iterates pass 0.5 on their way from 0 to the minimizer 1
    problem = Scalar(lambda x: torch.where(x < 0.5, 2 * (x - 1), math.nan), lambda x: (x - 1).square())
    solution = solver().solve(problem, None, 1e-6)
    assert solution.reason == ("not finite",)
    assert 0 <= solution.x.item() < 0.5
    assert solution.grad_norm.item() == pytest.approx(2 * (1 - solution.x.item()))


@solvers
def test_float32_stops_at_its_floor(solver):
    problem = images(dtype=torch.float32)
    solution = solver().solve(problem, None, 1e-12)
    assert solution.reason == ("stagnated",) * 4
    assert (solution.iterations < solver().max_iter).all()
    assert (solution.grad_norm <= problem.gradient_rounding(solution.x)).all()
    assert solution.x.dtype == torch.float32
    check_evidence(problem, solution)
    # a tolerance above the floor is reached, far below what energy differences can resolve (1e-3 in x)
    reachable = 4 * problem.gradient_rounding(solution.x) / problem.fidelity
    assert (reachable < 3e-3).all()
    assert solver().solve(problem, None, reachable).converged.all()


@pytest.mark.parametrize("solver", [*SOLVERS, NewtonCG])
def test_converged_says_that_the_accuracy_is_certified(solver):
    # of a flat image the gradient is tiny at once, and its rounding, over a small mu, is not
    energy = bi.VariationalEnergy(bi.TotalVariation(0.1, 0.05), ridge=0.01)
    physics = deepinv.physics.BlurFFT((1, 12, 12), filter=gaussian_kernel(5, 1.0).float())
    problem = energy.bind(torch.full((1, 1, 12, 12), 0.5), physics)
    for tol in (1e-4, 1e-2):
        solution = solver().solve(problem, None, tol)
        assert bool(solution.converged) == bool(solution.distance_bound <= 1.01 * tol) == (tol == 1e-2)
        assert solution.reason == (("converged" if tol == 1e-2 else "stagnated"),)


@solvers
def test_zero_tolerance_in_float64_ends(solver):
    solution = solver().solve(images(batch=2), None, 0.0)
    assert all(reason == "stagnated" for reason in solution.reason)
    assert (solution.distance_bound < 1e-11).all()


@solvers
def test_warm_start_and_inputs_kept(solver):
    problem = images()
    rough = solver().solve(problem, None, 1e-3)
    x0 = rough.x.clone()
    again = solver().solve(problem, rough.x, 1e-3)
    assert again.iterations.tolist() == [0] * 4 and torch.equal(again.x, rough.x) and again.x is not rough.x
    before = problem.y.clone()
    warm, cold = solver().solve(problem, rough.x, 1e-6), solver().solve(problem, None, 1e-6)
    assert (warm.iterations < cold.iterations).all()
    assert torch.equal(rough.x, x0) and torch.equal(problem.y, before)
    assert not warm.x.requires_grad


@solvers
def test_max_iter_returns_the_best_point(solver, monkeypatch):
    problem = images()
    points = spy(problem, monkeypatch)
    solution = solver().solve(problem, None, 1e-9, max_iter=9)
    assert solution.reason == ("max_iter",) * 4 and solution.iterations.tolist() == [9] * 4
    assert not solution.converged.any()
    sizes = torch.stack([norm(problem._grad(x)) for x in points[:10]])
    assert torch.allclose(solution.grad_norm, sizes.amin(0), rtol=1e-12)
    check_evidence(problem, solution)
    assert solver().solve(problem, None, 1e-9, max_iter=0).iterations.tolist() == [0] * 4


@solvers
def test_without_constants_nothing_is_certified(tv, solver):
    _, minimizer = tv
    problem = images()
    problem.known = False
    solution = solver().solve(problem, None, 1e-6)
    assert solution.converged.all() and (solution.grad_norm <= 1e-6).all()
    assert (solution.distance_bound == math.inf).all()
    # mu = 0.5 of this problem, which the solver has not been told
    assert (norm(solution.x - minimizer) <= 2e-6).all()
    assert (solution.iterations <= 2500).all()


@solvers
def test_misuse_raises(solver):
    problem = images()
    with pytest.raises(ValueError, match="error_tol"):
        solver().solve(problem, None, -1.0)
    with pytest.raises(ValueError, match="error_tol"):
        solver().solve(problem, None, torch.ones(3))
    with pytest.raises(ValueError, match="x0"):
        solver().solve(problem, problem.y[:2], 1e-3)
    with pytest.raises(ValueError, match="dtype"):
        solver().solve(problem, problem.y.float(), 1e-3)
    with pytest.raises(ValueError, match="max_iter"):
        solver(max_iter=-1)


def test_registry():
    assert set(LOWER_SOLVERS) == {"gradient_descent", "heavy_ball", "accelerated_gradient", "lbfgs", "newton_cg"}
    assert all(issubclass(solver, LowerSolver) for solver in LOWER_SOLVERS.values())


# --- energies that are hard for one method


def lessard_slope(x: Tensor) -> Tensor:
    """Slope of the mu = 1, L = 25 energy on which heavy ball cycles (Lessard, Recht & Packard 2016, eq. 4.11)."""
    return torch.where(x < 1, 25 * x, torch.where(x < 2, x + 24, 25 * x - 24))


def lessard_energy(x: Tensor) -> Tensor:
    middle = 0.5 * x**2 + 24 * x - 12
    return torch.where(x < 1, 12.5 * x**2, torch.where(x < 2, middle, 12.5 * x**2 - 24 * x + 36))


def test_heavy_ball_survives_the_energy_on_which_it_cycles():
    start = torch.tensor([[3.3]], dtype=torch.float64)
    problem = Scalar(lessard_slope, lessard_energy)
    step, momentum = HeavyBall.schedule(1.0, 25.0, 0)
    previous = x = start
    for _ in range(1000):
        previous, x = x, x - step * problem.grad(x) + momentum * (x - previous)
    # without the safeguard: still far away after 1000 iterations
    assert x.abs().item() > 0.1
    solution = HeavyBall().solve(problem, start, 1e-8)
    assert solution.converged.all() and solution.x.abs().item() <= 1e-8
    assert solution.iterations.item() < 200


def test_lbfgs_does_not_accept_an_overshoot_that_increases_the_energy(monkeypatch):
    # slope about -1 left of -0.95 and about 0.85 right of it: |slope| shrinks although the energy rises
    def slope(x: Tensor) -> Tensor:
        return -1 + 1.85 * torch.sigmoid(400 * (x + 0.95)) + 0.01 * (x + 1)

    def value(x: Tensor) -> Tensor:
        rise = 1.85 / 400 * torch.nn.functional.softplus(400 * (x + 0.95))
        return -x + rise + 0.005 * (x + 1).square()

    problem = Scalar(slope, value)
    start = torch.tensor([[-1.0]], dtype=torch.float64)
    energies, inside = [problem._value(start).item()], lbfgs._turn

    def record(state, renewed):
        energies.append(problem._value(state["x"]).item())
        inside(state, renewed)

    monkeypatch.setattr(lbfgs, "_turn", record)
    points = spy(problem, monkeypatch)
    solution = LBFGS().solve(problem, start, 1e-9)
    assert solution.converged.all()
    # the trap has been sprung: some trial had a small slope and a higher energy than the start
    trials = torch.cat(points).unsqueeze(1)
    caught = (slope(trials).abs() <= 0.9 * slope(start).abs()) & (value(trials) > value(start) + 0.1)
    assert caught.any()
    assert len(energies) > 2 and all(b <= a + 1e-14 for a, b in zip(energies, energies[1:], strict=False))


def test_lbfgs_steps_back_from_where_the_energy_is_not_finite(monkeypatch):
    # x - log(x), minimizer 1, not finite for x <= 0; some samples step there while others accept a step
    def slope(x: Tensor) -> Tensor:
        return torch.where(x > 0, 1 - 1 / x, math.nan)

    def value(x: Tensor) -> Tensor:
        return x - x.log()

    start = torch.linspace(2, 40, 20, dtype=torch.float64).unsqueeze(1)
    problem = Scalar(slope, value, batch=20)
    points = spy(problem, monkeypatch)
    solution = LBFGS().solve(problem, start, 1e-9)
    assert any((x <= 0).any() for x in points)
    assert solution.converged.all() and (solution.x - 1).abs().max() < 1e-8
    for i in range(20):
        alone = LBFGS().solve(Scalar(slope, value), start[i : i + 1], 1e-9)
        assert alone.iterations.item() == solution.iterations[i] and torch.equal(alone.x[0], solution.x[i])


def test_heavy_ball_safeguard_leaves_quadratics_alone(monkeypatch):
    # the residual bound is attained by the mode at L, and the slowest mode is at mu: kappa = 1e4, 200 iterations
    eigenvalues = torch.logspace(0, 4, 12, dtype=torch.float64)
    zero = torch.zeros(1, 12, 1, dtype=torch.float64)
    for b in (torch.ones(1, 12).double(), 1e4 * torch.eye(12).double()[-1:], torch.eye(12).double()[:1]):
        problem = QuadraticProblem(torch.diag(eigenvalues)[None], b, zero, zero[0, 0])
        _, expected = schedule_iterates(HeavyBall, problem, 1201)
        with monkeypatch.context() as patch:
            points = spy(problem, patch)
            HeavyBall().solve(problem, None, 0.0, max_iter=1200)
        difference = max(norm(a - e).item() for a, e in zip(points, expected, strict=False))
        assert len(points) > 900 and difference <= 1e-9 * max(norm(e).item() for e in expected)


def test_adaptive_restart_helps_if_mu_is_far_below_the_curvature_met():
    eigenvalues = torch.tensor([1.0, 3.0, 20.0, 100.0], dtype=torch.float64)
    problem = QuadraticProblem(
        torch.diag(eigenvalues)[None], torch.ones(1, 4).double(), torch.zeros(1, 4, 1).double(), torch.zeros(1).double()
    )
    c = problem.constants()
    problem._constants = Constants(strong_convexity=1e-4 * c.strong_convexity, smoothness=c.smoothness)
    plain = AcceleratedGradient().solve(problem, None, 1e-2)
    restarted = AcceleratedGradient(restart=True).solve(problem, None, 1e-2)
    assert plain.converged.all() and restarted.converged.all()
    assert 2 * restarted.iterations.item() < plain.iterations.item()
