"""A priori bounds against the iterations themselves, and against formulas worked out by hand."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch

from bilevel_imaging import certificates, linear_solvers, lower_solvers
from bilevel_imaging.certificates import a_priori
from bilevel_imaging.energies import QuadraticProblem

F64 = torch.float64
STEPS = 200
MU = 0.7
CONDITIONS = (1.0, 3.0, 40.0, 1e3, 1e5)
# what rounding leaves of a norm that was 1 at the start, times the condition number
FLOOR = 1e-14
conditions = pytest.mark.parametrize("condition", CONDITIONS)


def spectrum(condition: float, size: int = 12, seed: int = 0) -> np.ndarray:
    """Eigenvalues with the extreme ones exactly MU and MU * condition."""
    inside = np.random.default_rng(seed).uniform(0, 1, size - 2)
    return MU * condition ** np.concatenate([[0.0], np.sort(inside), [1.0]])


def starts(size: int, seed: int = 0) -> np.ndarray:
    """Unit vectors to start from, in the eigenbasis: every eigenvector, and some of all directions."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((8, size)) * 10.0 ** rng.uniform(-3, 3, (8, size))
    vectors = np.concatenate([np.eye(size), mixed])
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def bounds(function, condition: float) -> np.ndarray:
    return np.array([function(k, MU, MU * condition) for k in range(STEPS + 1)])


def one_step(condition: float) -> float:
    """What rounding leaves where one step solves the problem and the bound is exactly 0."""
    return 1e-15 if condition == 1 else 0.0


def worst(history: np.ndarray) -> np.ndarray:
    """(K + 1, starts, d) vectors to the largest norm at every iteration."""
    return np.linalg.norm(history, axis=2).max(1)


def gradient_descent(eigenvalues, e):
    alpha, history = 2 / (eigenvalues[0] + eigenvalues[-1]), [e]
    for _ in range(STEPS):
        history.append(history[-1] - alpha * eigenvalues * history[-1])
    return np.array(history)


def heavy_ball(eigenvalues, e):
    small, large = math.sqrt(eigenvalues[0]), math.sqrt(eigenvalues[-1])
    alpha, beta = 4 / (small + large) ** 2, ((large - small) / (large + small)) ** 2
    history, previous = [e], e
    for _ in range(STEPS):
        history.append(history[-1] - alpha * eigenvalues * history[-1] + beta * (history[-1] - previous))
        previous = history[-2]
    return np.array(history)


def chebyshev(eigenvalues, r):
    """The optimal polynomials by their recursion; a spectrum of one point needs one step."""
    low, high = eigenvalues[0], eigenvalues[-1]
    if low == high:
        return np.array([r] + [0 * r] * STEPS)
    t, center = (high + low - 2 * eigenvalues) / (high - low), (high + low) / (high - low)
    # scaled by powers of the growth at the center, so that nothing overflows
    growth = center + math.sqrt(center**2 - 1)
    above, below = [np.ones_like(t), t / growth], [1.0, center / growth]
    for _ in range(STEPS - 1):
        above.append((2 * t * above[-1] - above[-2] / growth) / growth)
        below.append((2 * center * below[-1] - below[-2] / growth) / growth)
    return np.array([a / b * r for a, b in zip(above, below, strict=True)])


def conjugate_gradients(eigenvalues, b):
    """Iterates for one right-hand side each, with the residual recomputed at the end."""
    q, r = np.zeros_like(b), b.copy()
    p, history = r.copy(), [q.copy()]
    for _ in range(STEPS):
        rr, curvature = (r * r).sum(1, keepdims=True), (eigenvalues * p * p).sum(1, keepdims=True)
        alpha = np.divide(rr, curvature, out=np.zeros_like(rr), where=curvature > 1e-300)
        q, r = q + alpha * p, r - alpha * eigenvalues * p
        new = (r * r).sum(1, keepdims=True)
        p = r + np.divide(new, rr, out=np.zeros_like(rr), where=rr > 1e-300) * p
        history.append(q.copy())
    return np.array(history)


def accelerated_gradient(gradient, x, mu, smoothness, momentum_kind="varying"):
    """Nesterov's method written from its recursion; returns the x_k and the extrapolated z_k."""
    q, t, previous = mu / smoothness, 0.0, x
    xs, zs = [x], []
    for _ in range(STEPS + 1):
        following = (1 - q * t * t + math.sqrt((1 - q * t * t) ** 2 + 4 * t * t)) / 2
        momentum = 0.0 if q == 1 else (t - 1) / following * (1 - q * following) / (1 - q)
        if momentum_kind == "constant":
            momentum = (math.sqrt(smoothness) - math.sqrt(mu)) / (math.sqrt(smoothness) + math.sqrt(mu))
        z = x + momentum * (x - previous)
        zs.append(z)
        previous, x, t = x, z - gradient(z) / smoothness, following
        xs.append(x)
    return np.array(xs[: STEPS + 1]), np.array(zs)


# --- the factors against the iterations


@conditions
def test_gradient_descent(condition):
    eigenvalues = spectrum(condition)
    true = worst(gradient_descent(eigenvalues, starts(12)))
    for function in (a_priori.gradient_descent_residual, a_priori.gradient_descent_distance):
        # attained at both ends of the spectrum
        np.testing.assert_allclose(true, bounds(function, condition), rtol=1e-10, atol=one_step(condition))


@conditions
def test_heavy_ball(condition):
    eigenvalues = spectrum(condition)
    vectors = starts(12)
    history = heavy_ball(eigenvalues, vectors)
    for function in (a_priori.heavy_ball_residual, a_priori.heavy_ball_distance):
        assert (worst(history) <= bounds(function, condition) * (1 + 1e-9) + one_step(condition)).all()


@pytest.mark.parametrize("condition", CONDITIONS[1:])
def test_heavy_ball_constant_is_attained_and_needed(condition):
    eigenvalues = spectrum(condition)
    k = np.arange(STEPS + 1)
    rate = a_priori.heavy_ball_rate(MU, MU * condition)
    # c = -1 at the largest eigenvalue: equality
    largest = np.abs(heavy_ball(eigenvalues, np.eye(12)[[-1]])[:, 0, -1])
    np.testing.assert_allclose(largest, bounds(a_priori.heavy_ball_residual, condition), rtol=1e-7, atol=0)
    # c = 1 at the smallest
    smallest = np.abs(heavy_ball(eigenvalues, np.eye(12)[[0]])[:, 0, 0])
    np.testing.assert_allclose(smallest, (1 + k * (1 - rate)) * rate**k, rtol=1e-7, atol=0)
    # rate^k without a constant is exceeded at every iteration, at last by far
    assert (largest[1:] > 1.5 * rate ** k[1:]).all() and (smallest[1:] > rate ** k[1:]).all()
    assert largest[-1] > 100 * rate**STEPS


@conditions
def test_chebyshev_is_attained(condition):
    bound = bounds(a_priori.chebyshev_residual, condition)
    true = worst(chebyshev(spectrum(condition), starts(12)))
    assert (true <= bound * (1 + 1e-9)).all()
    np.testing.assert_allclose(true[bound > 1e-13], bound[bound > 1e-13], rtol=1e-9)


@conditions
def test_conjugate_gradients(condition):
    for seed in range(3):
        eigenvalues, b = spectrum(condition, seed=seed), starts(12, seed)
        q = conjugate_gradients(eigenvalues, b)
        residual, error = worst(b - eigenvalues * q), worst(q - b / eigenvalues)
        floor = FLOOR * condition
        assert (residual <= bounds(a_priori.conjugate_gradient_residual, condition) * (1 + 1e-9) + floor).all()
        assert (error <= bounds(a_priori.conjugate_gradient_error, condition) * (1 + 1e-9) + floor / MU).all()


def test_conjugate_gradient_residuals_grow_first():
    """After one step (kappa - 1) / (2 sqrt(kappa)) times the first residual (Kantorovich): no bound without kappa."""
    condition = 1e3
    eigenvalues = np.array([MU, MU * condition])
    b = np.sqrt([condition, 1.0] / (1 + np.array(condition)))[None]
    grown = np.linalg.norm(b - eigenvalues * conjugate_gradients(eigenvalues, b)[1])
    assert grown == pytest.approx((condition - 1) / (2 * math.sqrt(condition)), rel=1e-10)
    bound = a_priori.conjugate_gradient_residual(1, MU, MU * condition)
    assert a_priori.chebyshev_residual(1, MU, MU * condition) < 1 < grown <= bound < 2.1 * grown
    assert a_priori.conjugate_gradient_residual(0, MU, MU * condition) == 1
    rate = a_priori.heavy_ball_rate(MU, MU * condition)
    for k in range(1, 200):
        assert a_priori.conjugate_gradient_residual(k, MU, MU * condition) <= 2 * math.sqrt(condition) * rate**k
        assert a_priori.conjugate_gradient_error(k, MU, MU * condition) <= 2 * rate**k / MU


@conditions
@pytest.mark.parametrize("momentum", ["varying", "constant"])
def test_accelerated_gradient(condition, momentum):
    eigenvalues, floor = spectrum(condition), one_step(condition)
    x, z = accelerated_gradient(lambda v: eigenvalues * v, starts(12), MU, MU * condition, momentum)
    for function in (a_priori.accelerated_gradient_distance, a_priori.accelerated_gradient_residual):
        bound = bounds(partial(function, momentum=momentum), condition)
        assert (worst(x) <= bound * (1 + 1e-9) + floor).all()
        assert (worst(z)[1:] <= 3 * bound[:-1] * (1 + 1e-9) + floor).all()
    if momentum == "constant":  # attained at the smallest eigenvalue
        np.testing.assert_allclose(worst(x), bound, rtol=1e-9, atol=floor)


@pytest.mark.parametrize("condition", [3.0, 40.0, 1e3])
def test_distances_hold_on_an_energy_that_is_not_quadratic(condition):
    """mu/2 |x|^2 + (L - mu) sum log cosh (K x) - <c, x>, K orthogonal: curvature anywhere between mu and L."""
    rng = np.random.default_rng(1)
    smoothness, matrix = MU * condition, np.linalg.qr(rng.standard_normal((6, 6)))[0]

    def without_c(x):
        return MU * x + (smoothness - MU) * np.tanh(x @ matrix.T) @ matrix

    solution = rng.standard_normal(6)

    def gradient(x):
        return without_c(x) - without_c(solution)

    x0 = solution + rng.standard_normal((10, 6)) * 10.0 ** rng.uniform(-1, 2, (10, 1))
    first = np.linalg.norm(x0 - solution, axis=1)
    descent = [x0]
    for _ in range(STEPS):
        descent.append(descent[-1] - 2 / (MU + smoothness) * gradient(descent[-1]))
    pairs = [(a_priori.gradient_descent_distance, np.array(descent))]
    for momentum in ("varying", "constant"):
        x, _ = accelerated_gradient(gradient, x0, MU, smoothness, momentum)
        pairs.append((partial(a_priori.accelerated_gradient_distance, momentum=momentum), x))
    for function, history in pairs:
        bound = bounds(function, condition)
        assert (np.linalg.norm(history - solution, axis=2) <= bound[:, None] * first * (1 + 1e-9) + 1e-11).all()


@pytest.mark.parametrize("k", [0, 1, 2, 7, 30, 90])
def test_the_solvers_of_the_package_obey_their_bounds(k):
    eigenvalues = torch.stack([torch.from_numpy(spectrum(c)) for c in (3.0, 40.0, 1e3)])
    basis = torch.linalg.qr(torch.randn(12, 12, dtype=F64)).Q
    hessian = torch.einsum("ij,bj,kj->bik", basis, eigenvalues, basis)
    rhs = torch.randn(3, 12, dtype=F64) @ torch.diag(10 ** torch.linspace(-2, 2, 12, dtype=F64)) @ basis.T
    problem = QuadraticProblem(hessian, rhs, torch.ones(3, 12, 1, dtype=F64), torch.zeros(1, dtype=F64))
    mu, smoothness, exact = eigenvalues[:, 0], eigenvalues[:, -1], problem.minimizer()
    floor = 1e-12 * smoothness / mu
    linearization = problem.linearize(torch.zeros_like(rhs))
    cases = [
        (s(), getattr(a_priori, f"{n}_residual")) for n, s in linear_solvers.LINEAR_SOLVERS.items() if n != "minres"
    ]
    constant = partial(a_priori.accelerated_gradient_residual, momentum="constant")
    cases += [(linear_solvers.AcceleratedGradient(momentum="constant"), constant)]
    cases += [(linear_solvers.MINRES(), a_priori.chebyshev_residual)]
    for solver, function in cases:
        q = solver.solve(linearization, rhs, 0.0, max_iter=k).q
        residual = (rhs - linearization.hvp(q)).norm(dim=1)
        assert (residual <= (function(k, mu, smoothness) + floor) * rhs.norm(dim=1)).all(), type(solver)
    for name in ("gradient_descent", "heavy_ball"):
        # what is returned has the smallest gradient so far, so the factor bounds its gradient
        x = lower_solvers.LOWER_SOLVERS[name]().solve(problem, None, 0.0, max_iter=k).x
        factor = getattr(a_priori, f"{name}_distance")(k, mu, smoothness)
        assert (problem.grad(x).norm(dim=1) <= (factor + floor) * rhs.norm(dim=1)).all()
        assert ((x - exact).norm(dim=1) <= (factor * smoothness / mu + floor) * exact.norm(dim=1)).all()


# --- the bound of the hypergradient


class Separable:
    """g = mu/2 |x|^2 + exp(theta) sum log cosh x_i - <y, x> and f = 1/2 |x - t|^2: everything known in closed form."""

    def __init__(self, seed: int, mu: float, theta: float, size: int = 5):
        rng = np.random.default_rng(seed)
        self.mu, self.weight = mu, math.exp(theta)
        # the minimizer is chosen; y = mu x + exp(theta) tanh(x) would make it one
        self.x, self.t = 2 * rng.standard_normal((2, size))
        x = self.x
        self.gradient = -self.mixed(x) @ ((x - self.t) / self.hessian(x))
        self.constants = {
            "strong_convexity": mu,
            "mixed_norm": np.linalg.norm(self.mixed(x)),
            "loss_grad_norm": np.linalg.norm(x - self.t),
            "loss_smoothness": 1.0,
            "mixed_lipschitz": self.weight,
            "hessian_lipschitz": self.weight * 4 / (3 * math.sqrt(3)),
        }

    def hessian(self, x):
        return self.mu + self.weight / np.cosh(x) ** 2

    def mixed(self, x):
        return self.weight * np.tanh(x)


@pytest.mark.parametrize("seed", range(6))
def test_hypergradient_bound_holds_with_every_term(seed):
    rng = np.random.default_rng(100 + seed)
    case = Separable(seed, mu=10 ** rng.uniform(-1, 0), theta=rng.uniform(-1, 1))
    for _ in range(400):
        e = rng.standard_normal(5)
        x = case.x + 10 ** rng.uniform(-4, 1) * e / np.linalg.norm(e)
        r = rng.standard_normal(5) * 10 ** rng.uniform(-4, 1)
        q = (x - case.t - r) / case.hessian(x)
        error = abs(-case.mixed(x) @ q - case.gradient)
        bound = a_priori.hypergradient(
            float(np.linalg.norm(x - case.x)), float(np.linalg.norm(r)), **case.constants
        )  # fmt: skip
        assert error <= bound * (1 + 1e-12) + 1e-12


def test_hypergradient_bound_by_hand():
    numbers = dict(
        strong_convexity=2.0, mixed_norm=3.0, loss_grad_norm=5.0, loss_smoothness=7.0,
        mixed_lipschitz=11.0, hessian_lipschitz=13.0,
    )  # fmt: skip
    # mixed norm 25.5, its change 9.35; times the distance: L_J 2.75, L_f 1.05, L_H 4.875; second order 0.385
    assert a_priori.hypergradient(0.1, 17.0, **numbers) == pytest.approx(25.5 + 9.35 + 2.75 + 1.05 + 4.875 + 0.385)
    quadratic = {name: value for name, value in numbers.items() if not name.endswith("_lipschitz")}
    assert a_priori.hypergradient(0.1, 17.0, **quadratic) == pytest.approx(25.5 + 1.05)
    tensors = a_priori.hypergradient(torch.tensor([0.1, 0.0]), torch.tensor([17.0, 2.0]), **quadratic)
    assert tensors.tolist() == pytest.approx([26.55, 3.0])


# --- types and misuse


FACTORS = [
    a_priori.gradient_descent_residual,
    a_priori.heavy_ball_residual,
    a_priori.chebyshev_residual,
    a_priori.conjugate_gradient_residual,
    a_priori.conjugate_gradient_error,
    a_priori.gradient_descent_distance,
    a_priori.heavy_ball_distance,
    a_priori.accelerated_gradient_distance,
    a_priori.accelerated_gradient_residual,
    partial(a_priori.accelerated_gradient_distance, momentum="constant"),
    partial(a_priori.accelerated_gradient_residual, momentum="constant"),
]


@pytest.mark.parametrize("function", FACTORS)
def test_numbers_and_tensors_agree(function):
    k = torch.arange(50)
    alone = [function(i, 0.5, 80.0) for i in range(50)]
    assert all(isinstance(value, float) for value in alone)
    together = function(k, 0.5, 80.0)
    assert together.dtype == F64
    torch.testing.assert_close(together, torch.tensor(alone, dtype=F64), rtol=1e-12, atol=0)
    batch = function(k.unsqueeze(1), torch.tensor([0.5, 2.0], dtype=F64), torch.tensor([80.0, 2.0], dtype=F64))
    torch.testing.assert_close(batch[:, 0], together, rtol=1e-12, atol=0)
    assert batch.isfinite().all()
    for mu, smoothness in (
        (0.0, 1.0),
        (2.0, 1.0),
        (math.nan, 1.0),
        (torch.tensor([0.5, 3.0]), torch.tensor([1.0, 2.0])),
    ):
        with pytest.raises(ValueError, match="Expected 0 < mu <= L"):
            function(3, mu, smoothness)


def test_another_momentum_is_refused():
    for function in (a_priori.accelerated_gradient_distance, a_priori.accelerated_gradient_residual):
        with pytest.raises(ValueError, match="Expected momentum"):
            function(3, 1.0, 2.0, momentum="none")


def test_the_namespace_is_public():
    assert certificates.a_priori is a_priori
