"""Stochastic and single-loop methods: against dense matrices step by step, to known solutions, resumed, counted."""

from __future__ import annotations

import functools
import io
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cases import UserRegularizer
from torch import Tensor

import bilevel_imaging as bi
from bilevel_imaging import assembly
from bilevel_imaging.config import DataConfig, RunConfig, UpperConfig
from bilevel_imaging.data import Degradation, ImagePairs, RandomPatches, extract_patches, photographs
from bilevel_imaging.energies.quadratic import QuadraticProblem
from bilevel_imaging.training import RandomPatchObjective
from bilevel_imaging.training.mean import Chunk, MeanObjective
from bilevel_imaging.training.warm_starts import NoWarmStarts, WarmStarts
from bilevel_imaging.upper_level import MRBO, VRBO, Decay, DecayingTolerances, InexactFirstOrder, SingleLoop
from bilevel_imaging.upper_level.quasi_newton import assign, flatten

D, N, IMAGES = 4, 3, 6  # pixels, parameters, images


class Family:
    """Images i with g_i = 1/2 <x, H_i x> - <x, b_i - M_i theta> and f_i = 1/2 ||x - t_i||^2: F is a quadratic.

    x_i* = x_i(0) - W_i theta with W_i = H_i^-1 M_i, so that grad F = mean W_i^T (W_i theta + t_i - x_i(0)).
    """

    def __init__(self, seed: int = 0) -> None:
        draw = np.random.default_rng(seed)
        basis = [np.linalg.qr(draw.standard_normal((D, D)))[0] for _ in range(IMAGES)]
        self.H = np.stack([q @ np.diag(draw.uniform(1, 4, D)) @ q.T for q in basis])
        self.H = (self.H + self.H.transpose(0, 2, 1)) / 2
        self.b = draw.standard_normal((IMAGES, D))
        # nearly orthogonal columns: gradient descent needs few steps, so that the tests are fast
        self.W = np.eye(D, N) + 0.15 * draw.standard_normal((IMAGES, D, N))
        self.M = self.H @ self.W
        self.t = draw.standard_normal((IMAGES, D))
        self.slope = (self.W.transpose(0, 2, 1) @ self.W).mean(0)
        self.solution = np.linalg.solve(self.slope, -self.gradient(np.zeros(N)))

    def minimizers(self, theta: np.ndarray) -> np.ndarray:
        return np.linalg.solve(self.H, (self.b - self.M @ theta)[..., None])[..., 0]

    def gradient(self, theta: np.ndarray, images: list[int] | None = None) -> np.ndarray:
        chosen = range(IMAGES) if images is None else images
        x = self.minimizers(theta)
        return np.mean([-self.W[i].T @ (x[i] - self.t[i]) for i in chosen], 0)

    def loss(self, theta: np.ndarray, images: list[int] | None = None) -> float:
        chosen = list(range(IMAGES)) if images is None else images
        return float(0.5 * ((self.minimizers(theta) - self.t)[chosen] ** 2).sum(1).mean())

    @property
    def stable_lr(self) -> float:
        """The inverse of the largest curvature of a single image: no minibatch makes gradient descent unstable."""
        return 1 / max(np.linalg.norm(w, 2) ** 2 for w in self.W)


@functools.cache
def family() -> Family:
    return Family()


class QuadraticObjective(MeanObjective):
    """The family above through ``QuadraticProblem`` and all of ``MeanObjective``."""

    def __init__(self, start=None, minibatch: int | None = None, seed: int = 0, penalty=None, warm=None) -> None:
        theta = torch.as_tensor(np.zeros(N) if start is None else start, dtype=torch.float64).clone().requires_grad_()
        options = {"lower": None, "linear": None, "batch_size": None, "certificate": "auto", "penalty": penalty}
        super().__init__(SimpleNamespace(theta={"theta": theta}), None, warm=warm or WarmStarts(), **options)
        self.minibatch, self.generator = minibatch, torch.Generator().manual_seed(seed)
        self.queue: list[int] = []
        self.taken: list[list[int]] = []
        self.problems: list[QuadraticProblem] = []

    def _bind(self, images: list[int]) -> Chunk:
        f = family()
        H, b, M = (torch.as_tensor(a[images]) for a in (f.H, f.b, f.M))
        problem = QuadraticProblem(H, b, M, self.theta["theta"])
        self.problems.append(problem)
        return Chunk(tuple(images), problem, torch.as_tensor(f.t[images]))

    def _next_chunks(self) -> list[Chunk]:
        if self.minibatch is None:
            return self._all_chunks()
        if not self.queue:
            self.queue = torch.randperm(IMAGES, generator=self.generator).tolist()
        images, self.queue = self.queue[: self.minibatch], self.queue[self.minibatch :]
        self.taken.append(images)
        return [self._bind(images)]

    def _all_chunks(self) -> list[Chunk]:
        return [self._bind(list(range(IMAGES)))]

    def constants(self):
        return self._bind([0]).problem.constants()

    def value(self, error_tol: float):
        raise NotImplementedError("no method here compares losses of all images")

    def point(self) -> np.ndarray:
        return self.theta["theta"].detach().numpy().copy()

    def error(self) -> float:
        solution = family().solution
        return float(np.linalg.norm(self.point() - solution) / np.linalg.norm(solution))


def starts(count: int = 10) -> np.ndarray:
    return np.random.default_rng(7).uniform(-3, 3, (count, N))


def known(objective: QuadraticObjective, seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Gives every image a point and an adjoint, so that nothing is solved first; returns them."""
    f, draw = family(), np.random.default_rng(seed)
    x = f.minimizers(objective.point()) + 0.2 * draw.standard_normal((IMAGES, D))
    # near the adjoints: conjugate gradients start from 0 where that is nearer
    q = np.linalg.solve(f.H, (x - f.t)[..., None])[..., 0] + 0.05 * draw.standard_normal((IMAGES, D))
    objective.warm.put(range(IMAGES), torch.as_tensor(x), torch.as_tensor(q))
    return x.copy(), q.copy()


def steps(method, objective, count: int) -> list:
    return [method.step(objective) for _ in range(count)]


def momentum_of(image: int) -> tuple[float, float]:
    values = np.linalg.eigvalsh(family().H[image])
    root = math.sqrt(values[0] / values[-1])
    return 1 / values[-1], (1 - root) / (1 + root)


# ---------------------------------------------------------------------------------------------- schedules


def test_decays():
    assert [Decay("power", 0.5).factor(k) for k in (0, 3, 8)] == pytest.approx([1, 1 / 2, 1 / 3], rel=1e-14)
    assert Decay("power", 1 / 3, offset=10).factor(70) == pytest.approx(0.5, rel=1e-14)
    assert Decay("log").factor(0) == 1 and Decay("log").factor(9) == pytest.approx(1 / (1 + math.log(10)), rel=1e-14)
    assert [Decay("constant").factor(k) for k in (0, 100)] == [1, 1]
    for wrong in ({"kind": "cosine"}, {"power": -1.0}, {"power": math.nan}, {"offset": 0.0}):
        with pytest.raises(ValueError, match="Expected a"):
            Decay(**wrong)
    with pytest.raises(ValueError, match="residual_tol"):
        DecayingTolerances(1.0, 0.0, Decay())


@pytest.mark.parametrize(("kind", "power"), [("power", 0.7), ("log", 0.0), ("constant", 0.0)])
def test_hypergradients_get_more_accurate_by_the_schedule(kind, power):
    objective = QuadraticObjective(starts()[0], minibatch=2)
    asked, reached = [], []
    plain = objective.hypergradient

    def spy(**accuracy):
        asked.append((accuracy["error_tol"], accuracy["residual_tol"]))
        reached.append(plain(**accuracy))
        return reached[-1]

    objective.hypergradient = spy
    method = InexactFirstOrder(lr=0.1, error_tol=2.0, residual_tol=0.5, error_schedule=kind, error_power=power)
    reports = steps(method, objective, 12)
    for k, (pair, h, report) in enumerate(zip(asked, reached, reports, strict=True)):
        factor = {"power": (k + 1) ** -power, "log": 1 / (1 + math.log(k + 1)), "constant": 1.0}[kind]
        assert pair == pytest.approx((0.9 * 2.0 * factor, 0.9 * 0.5 * factor), rel=1e-12)
        assert h.distance <= 2.0 * factor and h.residual <= 0.5 * factor
        assert report.reason == "" and report.certified


def test_missed_accuracy_is_reported():
    objective = QuadraticObjective(starts()[0])
    objective.lower = bi.lower_solvers.GradientDescent(max_iter=1)
    report = InexactFirstOrder(lr=0.1, error_tol=1e-6).step(objective)
    assert report.reason.startswith("distance") and "instead of 1e-06" in report.reason


def test_inexact_sgd_and_adam_follow_dense_gradients():
    f, lr, power = family(), 0.05, 0.6
    accuracy = {"error_tol": 1e-11, "error_schedule": "constant", "step_power": power}
    for name in ("SGD", "Adam"):
        objective = QuadraticObjective(starts()[1], minibatch=2)
        method = InexactFirstOrder(name, lr=lr, **accuracy)
        theta, m, v = objective.point(), 0.0, 0.0
        for k in range(8):
            report = method.step(objective)
            g = f.gradient(theta, objective.taken[-1])
            pace = lr * (k + 1) ** -power
            if name == "SGD":
                theta = theta - pace * g
            else:
                m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
                hat = (m / (1 - 0.9 ** (k + 1))) / (np.sqrt(v / (1 - 0.999 ** (k + 1))) + 1e-8)
                theta = theta - pace * hat
            assert report.step_size == pytest.approx(pace, rel=1e-14)
            assert objective.point() == pytest.approx(theta, rel=1e-8, abs=1e-9)


def test_open_settings_come_from_the_first_hypergradient():
    objective = QuadraticObjective(starts()[2])
    method = InexactFirstOrder()
    before, loss = objective.point(), family().loss(objective.point())
    method.step(objective)
    assert np.abs(objective.point() - before).max() == pytest.approx(0.1, rel=1e-12)
    assert method.condition.tolerances(0) == pytest.approx([0.3 * math.sqrt(2 * loss)] * 2, rel=0.05)
    assert method.lr == pytest.approx(0.1 / np.abs(family().gradient(before)).max(), rel=0.11)
    adam = InexactFirstOrder("Adam", error_tol=0.1, lr_scale={"theta": 0.5})
    adam.step(objective)
    assert adam.lr == 1e-3
    scaled = InexactFirstOrder(lr_scale={"theta": 0.5})
    before = objective.point()
    scaled.step(objective)
    assert np.abs(objective.point() - before).max() == pytest.approx(0.05, rel=1e-12)


# ---------------------------------------------------------------------------------------------- step by step


@pytest.mark.parametrize("accelerated", [True, False])
@pytest.mark.parametrize("minibatch", [None, 2])
def test_single_loop_equals_dense_matrices(accelerated, minibatch):
    f, lr, renewal = family(), 0.07, 0.4
    objective = QuadraticObjective(starts()[3], minibatch=minibatch)
    x, q = known(objective)
    method = SingleLoop(lr=lr, renewal=renewal, step_power=0.5, decay_steps=3, accelerated=accelerated)
    theta, old_theta, d = objective.point(), None, None
    moves = np.zeros((2, IMAGES, D))
    for k in range(9):
        method.step(objective)
        images = objective.taken[-1] if minibatch else list(range(IMAGES))
        h = earlier = 0.0
        rates = []
        for i in images:
            step, m = momentum_of(i) if accelerated else (momentum_of(i)[0], 0.0)
            ratio = step * np.linalg.eigvalsh(f.H[i])[0]
            rates.append(math.sqrt(ratio) if accelerated else ratio)
            if old_theta is not None:
                earlier = earlier - f.M[i].T @ q[i] / len(images)
            z, w = x[i] + m * moves[0, i], q[i] + m * moves[1, i]
            new_x = z - step * (f.H[i] @ z - f.b[i] + f.M[i] @ theta)
            new_q = w - step * (f.H[i] @ w - (new_x - f.t[i]))
            moves[0, i], moves[1, i] = new_x - x[i], new_q - q[i]
            x[i], q[i] = new_x, new_q
            h = h - f.M[i].T @ q[i] / len(images)
        pace = (1 + k / 3) ** -0.5
        a = renewal * pace
        d = h if d is None or minibatch is None else h + (1 - a) * (d - earlier)
        old_theta, theta = theta, theta - lr * min(rates) * pace * d
        assert objective.point() == pytest.approx(theta, rel=1e-10)


def dense_adjoint(kind: str, H: np.ndarray, rhs: np.ndarray, q: np.ndarray, count: int) -> np.ndarray:
    residual = rhs - H @ q
    direction = residual
    for _ in range(count):
        if kind == "neumann":
            q = q + (rhs - H @ q) / np.linalg.eigvalsh(H)[-1]
            continue
        alpha = residual @ residual / (direction @ H @ direction)
        q, after = q + alpha * direction, residual - alpha * H @ direction
        direction = after + (after @ after) / (residual @ residual) * direction
        residual = after
    return q


def dense_follow(kind, x, q, theta, images, lower_steps, adjoint_steps):
    """(points, adjoints, mean hypergradient) of images after accelerated steps at theta; x and q are not changed."""
    f, x, q, h = family(), x.copy(), q.copy(), 0.0
    for i in images:
        step, m = momentum_of(i)
        before = x[i]
        for _ in range(lower_steps):
            z = x[i] + m * (x[i] - before)
            before, x[i] = x[i].copy(), z - step * (f.H[i] @ z - f.b[i] + f.M[i] @ theta)
        q[i] = dense_adjoint(kind, f.H[i], x[i] - f.t[i], q[i], adjoint_steps)
        h = h - f.M[i].T @ q[i] / len(images)
    return x, q, h


@pytest.mark.parametrize("adjoint", ["neumann", "conjugate_gradient"])
@pytest.mark.parametrize("kind", [MRBO, VRBO])
def test_variance_reduced_equal_dense_matrices(kind, adjoint):
    lr, inner = 0.06, {"lower_steps": 3, "adjoint_steps": 2}
    objective = QuadraticObjective(starts()[4], minibatch=2)
    x, q = known(objective)
    own = {"renewal": 0.4, "decay_steps": 3.0} if kind is MRBO else {"period": 4}
    method = kind(lr=lr, adjoint=adjoint, **inner, **own)
    theta, old_theta, d = objective.point(), None, None
    for k in range(10):
        taken = len(objective.taken)
        method.step(objective)
        everything = kind is VRBO and k % 4 == 0
        assert len(objective.taken) == taken + (0 if everything else 1)
        images = list(range(IMAGES)) if everything else objective.taken[-1]
        new_x, new_q, h = dense_follow(adjoint, x, q, theta, images, *inner.values())
        pace = (1 + k / 3) ** (-1 / 3) if kind is MRBO else 1.0
        a = 0.4 * pace**2 if kind is MRBO else 0.0
        if d is None or everything:
            d = h
        else:
            _, _, earlier = dense_follow(adjoint, x, q, old_theta, images, *inner.values())
            d = h + (1 - a) * (d - earlier)
        x, q = new_x, new_q
        old_theta, theta = theta, theta - lr * pace * d
        assert objective.point() == pytest.approx(theta, rel=1e-9)


# ---------------------------------------------------------------------------------------------- to the solution


class Slope:
    """The exact term <c, theta>."""

    NAME, c = "theta", torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)

    def __init__(self, objective_theta) -> None:
        self.theta = objective_theta

    def value(self) -> float:
        return float(self.c @ self.theta().detach())

    def grad(self) -> Tensor:
        return self.c

    def added_to(self, h):
        value = self.value()
        interval = (h.loss_interval[0] + value, h.loss_interval[1] + value)
        return replace(h, grad={"theta": h.grad["theta"] + self.c}, loss=h.loss + value, loss_interval=interval)


FULL = {
    "inexact_sgd": lambda lr: InexactFirstOrder(lr=lr, error_tol=1.0, error_power=4, step_power=0),
    "fsla": lambda lr: SingleLoop(lr=0.5 * lr, step_power=0, certify_every=0),
    "mrbo": lambda lr: MRBO(lr=lr, decay_steps=1e4, lower_steps=3, adjoint_steps=3, certify_every=0),
    "vrbo": lambda lr: VRBO(lr=lr, adjoint="neumann", lower_steps=3, adjoint_steps=3, certify_every=0),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_all_images_reach_the_solution(name):
    for start in starts():
        objective = QuadraticObjective(start)
        method = FULL[name](family().stable_lr)
        for _ in range(3000):
            method.step(objective)
            if objective.error() < 1e-6:
                break
        assert objective.error() < 1e-6


def test_vrbo_reaches_the_solution_with_minibatches():
    for i, start in enumerate(starts()):
        objective = QuadraticObjective(start, minibatch=2, seed=i)
        own = {"period": 6, "lower_steps": 2, "adjoint": "neumann", "adjoint_steps": 3, "certify_every": 0}
        steps(VRBO(lr=family().stable_lr / 2, **own), objective, 80)
        assert objective.error() < 1e-6


def noise_floor(step: float) -> float:
    """Root mean square error of theta, relative, that gradient descent with minibatches of 2 has with a fixed step.

    Its stationary covariance C solves slope C + C slope - step slope C slope = step * (covariance of the noise).
    """
    f = family()
    each = np.stack([f.gradient(f.solution, [i]) for i in range(IMAGES)])
    covariance = np.cov(each.T) / 2 * (1 - 2 / IMAGES)  # two of six, without replacement
    eye = np.eye(N)
    operator = np.kron(f.slope, eye) + np.kron(eye, f.slope) - step * np.kron(f.slope, f.slope)
    c = np.linalg.solve(operator, step * covariance.flatten()).reshape(N, N)
    return float(np.sqrt(np.trace(c)) / np.linalg.norm(f.solution))


FALLING = {
    "inexact_sgd": (lambda lr: InexactFirstOrder(lr=lr, error_tol=1.0, step_power=0.6, error_power=1.0), 25),
    "fsla": (lambda lr: SingleLoop(lr=lr / 2, decay_steps=5, certify_every=0), 120),
    "mrbo": (
        lambda lr: MRBO(lr=lr / 2, decay_steps=5, lower_steps=2, adjoint="neumann", adjoint_steps=2, certify_every=0),
        60,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FALLING)
def test_falling_steps_come_as_near_as_their_theory_says(name):
    make, count = FALLING[name]
    errors = []
    for i, start in enumerate(starts()):
        objective = QuadraticObjective(start, minibatch=2, seed=i)
        reports = steps(make(family().stable_lr), objective, count)
        errors.append(objective.error())
    # shuffled passes, averages and differences have less noise than independent minibatches: a bound for all three
    assert np.sqrt(np.mean(np.square(errors))) < noise_floor(reports[-1].step_size)
    assert reports[-1].step_size < 0.5 * reports[0].step_size


@pytest.mark.parametrize("kind", [SingleLoop, MRBO])
def test_recursion_reduces_the_noise_of_minibatches(kind):
    spread = {}
    for renewal in (0.2, 1.0):
        own = {} if kind is SingleLoop else {"lower_steps": 2, "adjoint_steps": 2}
        objective = QuadraticObjective(family().solution, minibatch=2)
        lr = 0.2 * family().stable_lr
        method = kind(lr=lr, renewal=renewal, decay_steps=1e6, certify_every=0, **own)
        steps(method, objective, 30)
        norms = [report.extra["direction_norm"] for report in steps(method, objective, 60)]
        spread[renewal] = float(np.mean(norms))
    assert spread[0.2] < 0.6 * spread[1.0]


@pytest.mark.parametrize("name", FULL)
def test_exact_terms_belong_to_the_objective(name):
    objective = QuadraticObjective(starts()[5])
    objective.penalty = Slope(lambda: objective.theta["theta"])
    f, method = family(), FULL[name](family().stable_lr)
    shifted = np.linalg.solve(f.slope, f.slope @ f.solution - Slope.c.numpy())
    method.certify_every = 50  # the first step is certified
    report = method.step(objective)
    expected = f.loss(starts()[5]) + float(Slope.c.numpy() @ starts()[5])
    assert report.certified and report.loss_lower <= expected <= report.loss_upper
    exact = np.linalg.norm(f.gradient(starts()[5]) + Slope.c.numpy())
    assert abs(report.grad_norm - exact) <= report.error_bound
    if name != "inexact_sgd":  # whose first tolerance is coarse: the bound tells the gradients with and without apart
        assert report.error_bound < 0.9 * abs(np.linalg.norm(f.gradient(starts()[5])) - exact)
    steps(method, objective, 120 if name == "fsla" else 30)
    assert objective.point() == pytest.approx(shifted, rel=1e-5)


# ---------------------------------------------------------------------------------------------- certificates, work

SAMPLED = {"fsla": SingleLoop, "mrbo": MRBO, "vrbo": VRBO}


@pytest.mark.parametrize("name", SAMPLED)
def test_certificates_hold_and_change_nothing(name):
    f, paths = family(), {}
    for every in (0, 1, 3):
        objective = QuadraticObjective(starts()[6], minibatch=2)
        method, path = SAMPLED[name](certify_every=every), []
        for k in range(9):
            theta = objective.point()
            drawn = len(objective.taken)
            report = method.step(objective)
            path.append(objective.point().tobytes())
            images = objective.taken[-1] if len(objective.taken) > drawn else None
            if every == 0 or k % every:
                assert not report.certified and "certificates are" in report.reason
                assert (report.loss_lower, report.loss_upper, report.error_bound) == (-math.inf, math.inf, math.inf)
                continue
            assert report.certified and report.reason == ""
            assert report.loss_lower <= f.loss(theta, images) <= report.loss_upper
            points = dict(zip(objective.warm.x, objective.warm.q, strict=True))
            chosen = list(range(IMAGES)) if images is None else images
            h = -np.mean([f.M[i].T @ objective.warm.q[i].numpy() for i in chosen], 0)
            assert len(points) >= len(chosen) and report.grad_norm == pytest.approx(np.linalg.norm(h), rel=1e-10)
            error = np.linalg.norm(h - f.gradient(theta, images))
            assert error <= report.error_bound < 100 * error + 1e-9
        paths[every] = path
    assert paths[0] == paths[1] == paths[3]


class Counted(QuadraticObjective):
    """Counts gradients, Hessian products and products with J sample by sample, without looking at ``Cost``."""

    def __init__(self, *args, **options) -> None:
        self.counts = {"gradients": 0, "hvps": 0, "mixed_products": 0}
        super().__init__(*args, **options)

    def _all_chunks(self) -> list[Chunk]:
        return [self._bind([i]) for i in range(IMAGES)]

    def _bind(self, images: list[int]) -> Chunk:
        chunk = super()._bind(images)
        problem, counts = chunk.problem, self.counts
        grad, linearize = problem._grad, problem._linearize

        def counted(name, function):
            def call(v):
                counts[name] += v.shape[0]
                return function(v)

            return call

        def counted_linearization(x):
            at = linearize(x)
            at.hvp, at.mixed_vjp = counted("hvps", at.hvp), counted("mixed_products", at.mixed_vjp)
            columns = at.mixed_columns

            def counted_columns():
                counts["mixed_products"] += x.shape[0] * N
                return columns()

            at.mixed_columns = counted_columns
            at.subset = lambda index: None
            return at

        problem._grad, problem._linearize = counted("gradients", grad), counted_linearization
        problem.subset = lambda index: None  # parts would escape the counters
        return chunk


@pytest.mark.parametrize("every", [0, 2])
@pytest.mark.parametrize("name", [*SAMPLED, "inexact_sgd"])
def test_work_is_counted_exactly(name, every):
    objective = Counted(starts()[7], minibatch=1)  # in a larger batch finished samples are computed, but cost nothing
    method = SAMPLED[name](certify_every=every) if name in SAMPLED else InexactFirstOrder()
    for _ in range(7):
        before = dict(objective.counts)
        cost = method.step(objective).cost
        assert {n: getattr(cost, n) for n in before} == {n: objective.counts[n] - before[n] for n in before}
        assert cost.seconds > 0


def test_work_of_a_single_loop_step():
    for minibatch, expected in ((None, (2, 1, 1)), (2, (3, 1, 2))):
        objective = QuadraticObjective(starts()[8], minibatch=minibatch)
        known(objective)
        reports = steps(SingleLoop(certify_every=0), objective, 3)
        count = minibatch or IMAGES
        cost = reports[-1].cost
        assert (cost.gradients, cost.hvps, cost.mixed_products) == tuple(count * n for n in expected)


# ---------------------------------------------------------------------------------------------- on images


@functools.cache
def pairs() -> ImagePairs:
    images = {n: i for n, i in photographs(part="train").items() if n in ("astronaut", "coffee", "coins", "motorcycle")}
    crops = extract_patches(images, 10, 1, seed=3)
    sizes = [(name, crop if i % 2 == 0 else crop[:, :8, :9].clone()) for i, (name, crop) in enumerate(crops)]
    return ImagePairs.build(sizes, Degradation(sigma=0.1))


def images_objective(minibatch: int | None, seed: int = 1, **options) -> bi.BilevelObjective:
    generator = None if minibatch is None else torch.Generator().manual_seed(seed)
    energy = bi.VariationalEnergy(bi.TotalVariation(0.1, 0.05))
    return bi.BilevelObjective(energy, pairs(), minibatch=minibatch, generator=generator, **options)


METHODS = {
    **SAMPLED,
    "inexact_sgd": InexactFirstOrder,
    "inexact_adam": functools.partial(InexactFirstOrder, "Adam", lr=0.05, average=0.5, total_steps=20),
}


def saved(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def trace(method, objective, count: int) -> list:
    """Everything that a step leaves behind but the time, bit for bit."""
    result = []
    for _ in range(count):
        report = method.step(objective)
        scalars = {n: v for n, v in vars(report).items() if n != "cost"}
        bits = [t.detach().numpy().tobytes() for t in objective.theta.values()]
        result.append((repr(scalars), report.cost.work, bits))
    return result


@pytest.mark.parametrize(("name", "minibatch"), [*((name, 1) for name in METHODS), ("fsla", None)])
def test_runs_continue_bit_for_bit(name, minibatch):
    objective, method = images_objective(minibatch), METHODS[name]()
    trace(method, objective, 3)
    state = saved({"method": method.state_dict(), "objective": objective.state_dict(), "theta": objective.theta})
    expected = trace(method, objective, 4)
    other, fresh = images_objective(minibatch, seed=9), METHODS[name]()
    fresh.load_state_dict(state["method"])
    other.load_state_dict(state["objective"])
    assign(other.theta, flatten(state["theta"]))
    assert trace(fresh, other, 4) == expected
    for key in state["method"]:
        with pytest.raises(ValueError, match="Expected a state"):
            METHODS[name]().load_state_dict({k: v for k, v in state["method"].items() if k != key})


def test_draws_come_in_the_order_of_hypergradients():
    drawing, again, other, solving = (images_objective(1, seed) for seed in (1, 1, 2, 1))
    orders = [[o.draw()[0].indices[0] for _ in range(12)] for o in (drawing, again, other)]
    assert orders[0] == orders[1] != orders[2]
    assert all(sorted(orders[0][k : k + 4]) == [0, 1, 2, 3] for k in (0, 4, 8))
    # all images in between do not disturb the order
    assert sorted(sum((s.indices for s in drawing.draw(everything=True)), ())) == [0, 1, 2, 3]
    assert drawing.draw()[0].indices == again.draw()[0].indices
    for index in orders[0][:4]:
        before = set(solving.warm.x)
        solving.hypergradient(relative=10.0)
        assert set(solving.warm.x) - before == {index}


@pytest.mark.parametrize("name", ["fsla", "vrbo", "inexact_sgd"])
def test_images_are_learned_from(name):
    objective = images_objective(None)
    first = objective.value(1e-3).value
    count = 30 if name == "fsla" else 5
    before = sum(chunk.problem.cost.work for chunk in objective._bound)
    reports = steps(METHODS[name](), objective, count)
    assert sum(r.cost.work for r in reports) == sum(chunk.problem.cost.work for chunk in objective._bound) - before
    final = objective.value(1e-3)
    assert final.upper < 0.99 * first
    certified = [r for r in reports if r.certified]
    assert certified and all(r.loss_lower <= r.loss <= r.loss_upper for r in certified)


def test_float32_parameters_come_back_from_the_other_theta():
    energy = bi.VariationalEnergy(bi.TotalVariation(0.1, 0.05)).float()
    single = ImagePairs.build(
        [(n, x) for n, x in zip(pairs().names, pairs().x, strict=True)], Degradation(), torch.float32
    )
    objective = bi.BilevelObjective(energy, single, minibatch=1, generator=torch.Generator().manual_seed(0))
    method = MRBO(lr=1e-30, certify_every=0)  # too small a step to change any parameter
    before = [t.detach().clone() for t in objective.theta.values()]
    steps(method, objective, 4)
    assert all(torch.equal(a, b) for a, b in zip(before, objective.theta.values(), strict=True))


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", SAMPLED)
def test_objectives_without_memory_and_energies_without_constants_are_refused(name):
    method = SAMPLED[name]()
    patches = RandomPatches([("a", pairs().x[0])], Degradation(), 8, 1, dtype=torch.float64, seed=0)
    endless = RandomPatchObjective(bi.VariationalEnergy(bi.TotalVariation()), patches)
    for objective in (endless, images_objective(1, warm=NoWarmStarts())):
        with pytest.raises(ValueError, match="keeps the points of its images"):
            method.step(objective)
    energy = bi.VariationalEnergy(UserRegularizer())
    unknown = bi.BilevelObjective(energy, pairs())
    with pytest.raises(ValueError, match="known constants mu and L"):
        method.step(unknown)
    for key in ("random_patches", "warm_starts"):
        data = DataConfig(random_patches=True) if key == "random_patches" else DataConfig(warm_starts="none")
        with pytest.raises(ValueError, match=f"data.{key}: {name} keeps a point"):
            RunConfig(data=data, upper=UpperConfig(method=name, minibatch=2))


def test_wrong_numbers_are_refused():
    for make in (
        lambda: SingleLoop(renewal=0.0),
        lambda: SingleLoop(lr=-1.0),
        lambda: MRBO(renewal=1.5),
        lambda: MRBO(adjoint="exact"),
        lambda: MRBO(lower_steps=0),
        lambda: VRBO(period=0),
        lambda: VRBO(adjoint_steps=0),
        lambda: VRBO(certify_every=-1),
        lambda: InexactFirstOrder(residual_tol=1.0),
        lambda: InexactFirstOrder(error_schedule="cosine"),
    ):
        with pytest.raises(ValueError, match="Expected"):
            make()


def test_settings_reach_the_methods():
    for name in METHODS:
        method = assembly.make_method(UpperConfig(method=name, lr=0.25))
        assert method.lr == 0.25
    method = assembly.make_method(UpperConfig(method="inexact_sgd", error_tol=2.0, options={"error_power": 1.0}))
    assert method.condition.tolerances(1) == (1.0, 1.0)
    assert assembly.make_method(UpperConfig(method="vrbo", options={"period": 3})).period == 3
    with pytest.raises(ValueError, match="upper.relative: fsla does not take it"):
        assembly.make_method(UpperConfig(method="fsla", relative=0.1))
