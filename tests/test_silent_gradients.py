"""The comparison with other libraries: its truth, its certificates, and what it says when a library is missing."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bilevel_imaging.experiments import silent_gradients
from bilevel_imaging.experiments.peers import deepinv, hypertorch, jaxopt, torchdeq, torchopt, unrolled
from bilevel_imaging.hypergradients import hypergradient
from bilevel_imaging.upper_level import SquaredError

PEERS = {"JAXopt": "jaxopt", "TorchOpt": "torchopt", "TorchDEQ": "torchdeq"}


@pytest.fixture(scope="module")
def record():
    """As it is without any optional library, small."""

    def version(name: str) -> str:
        if name in PEERS.values():
            raise PackageNotFoundError(name)
        return "1.0"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(silent_gradients, "version", version)
        return silent_gradients.run(enough=300, size=16)


def differences(height: int, width: int) -> np.ndarray:
    """D as a dense matrix on images (height, width), horizontal differences first."""

    def line(n):
        d = np.eye(n, k=1) - np.eye(n)
        d[-1] = 0
        return d

    return np.concatenate([np.kron(np.eye(height), line(width)), np.kron(line(height), np.eye(width))])


@pytest.mark.slow
def test_quadratic_truth_in_numpy(record):
    task, _ = silent_gradients.signal_denoising()
    y, x_true, weight = task.y.numpy().ravel(), task.x_true.numpy().ravel(), silent_gradients.STIFFNESS
    curvature = weight * differences(1, y.size).T @ differences(1, y.size)
    hessian = np.eye(y.size) + curvature
    x = np.linalg.solve(hessian, y)
    expected = -(curvature @ x) @ np.linalg.solve(hessian, x - x_true)
    assert record["problems"][0]["true"] == pytest.approx([expected], rel=1e-9)
    assert expected > 0
    assert np.linalg.cond(hessian) == pytest.approx(1.4e3, rel=0.01)


class DenseDeblurring:
    """The photograph problem in numpy: Newton's method with dense matrices and step halving."""

    def __init__(self, task):
        self.d = differences(*task.y.shape)
        identity = torch.eye(task.y.numel(), dtype=torch.float64).view(-1, 1, *task.y.shape)
        blur = task.physics.A(identity).flatten(1).T.numpy()
        self.y, self.x_true = task.y.numpy().ravel(), task.x_true.numpy().ravel()
        self.fixed, self.rhs = blur.T @ blur + silent_gradients.RIDGE * np.eye(self.y.size), blur.T @ self.y

    def value(self, x, weight, smoothing):
        lengths = np.sqrt(((self.d @ x).reshape(2, -1) ** 2).sum(0) + smoothing**2)
        return 0.5 * x @ self.fixed @ x - x @ self.rhs + weight * lengths.sum()

    def derivatives(self, x, weight, smoothing):
        z = (self.d @ x).reshape(2, -1)
        length = np.sqrt((z**2).sum(0) + smoothing**2)
        dx, dy = np.split(self.d, 2)
        across = dx * z[0][:, None] + dy * z[1][:, None]
        curvature = self.d.T @ (self.d / np.tile(length, 2)[:, None]) - across.T @ (across / length[:, None] ** 3)
        gradient = self.fixed @ x - self.rhs + weight * self.d.T @ (z / length).ravel()
        return gradient, self.fixed + weight * curvature

    def loss(self, theta):
        weight, smoothing = np.exp(theta)
        x = self.y
        for _ in range(100):
            gradient, hessian = self.derivatives(x, weight, smoothing)
            if np.linalg.norm(gradient) < 1e-12:
                return 0.5 * np.sum((x - self.x_true) ** 2)
            direction, step = -np.linalg.solve(hessian, gradient), 1.0
            while (
                self.value(x + step * direction, weight, smoothing) > self.value(x, weight, smoothing) and step > 1e-3
            ):
                step /= 2
            x = x + step * direction
        raise AssertionError("Newton's method did not converge")


@pytest.mark.slow
def test_photograph_truth_by_finite_differences(record):
    task, _ = silent_gradients.photograph_deblurring(size=16)
    dense, theta, h = DenseDeblurring(task), task.theta.numpy(), 1e-4
    expected = [(dense.loss(theta + h * e) - dense.loss(theta - h * e)) / (2 * h) for e in np.eye(2)]
    assert record["problems"][1]["true"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("make", [silent_gradients.signal_denoising, silent_gradients.photograph_deblurring])
def test_others_and_we_solve_the_same_problem(make):
    task, problem = make()
    x = torch.rand(task.y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    batch = x.view(problem.shape)
    assert float(task.energy(torch, x, task.theta)) == pytest.approx(float(problem.value(batch).detach()), rel=1e-12)
    torch.testing.assert_close(
        task.gradient(x, task.theta).view(problem.shape), problem.grad(batch), rtol=1e-10, atol=1e-12
    )
    assert float(problem.constants().smoothness) <= task.smoothness * (1 + 1e-12)


def test_our_bounds_hold_and_the_early_ones_say_that_the_sign_is_open(record):
    for problem in record["problems"]:
        true = np.array(problem["true"])
        ours = [row for row in problem["rows"] if row["library"] == silent_gradients.OURS]
        assert len(ours) == 3
        for row in ours:
            assert row["covers"] is True
            assert np.linalg.norm(np.array(row["gradient"]) - true) <= row["bound"] < np.inf
        early, polished, relative = ours
        assert early["gradient"] == polished["gradient"]
        assert polished["bound"] <= 1.5 * polished["relative_error"] * np.linalg.norm(true)  # nearly exact
        assert polished["bound"] < early["bound"]
        assert relative["bound"] <= 0.01 * np.linalg.norm(relative["gradient"])
        same = next(
            r for r in problem["rows"] if r["setting"] == early["setting"]
        )  # of the same x and q, not certified
        assert same["library"] == hypertorch.NAME
        assert same["gradient"] == pytest.approx(early["gradient"], rel=1e-6)


def test_wrong_signs_come_without_a_warning(record):
    rows = [row for row in record["problems"][0]["rows"] if row["gradient"] and row["bound"] is None]
    early = [row for row in rows if row["setting"].startswith(("20 ", "100 ", "DEQ=True"))]
    assert len(early) >= 5
    assert all(row["wrong_sign"] and not row["warned"] for row in early)
    enough = hypertorch.methods(silent_gradients.signal_denoising(5000)[0])
    true = record["problems"][0]["true"]
    assert enough["5000 gradient steps, CG of 200 iterations"]() == pytest.approx(true, rel=1e-2)


def test_missing_libraries_are_named(record):
    text = silent_gradients.table(record)
    for name, package in PEERS.items():
        for problem in record["problems"]:
            (row,) = [row for row in problem["rows"] if row["library"] == name]
            assert row["note"] == f"not installed: pip install {package}"
        assert f"pip install {package}" in text


def test_table_and_figure(record):
    record = json.loads(json.dumps(record))
    text = silent_gradients.table(record)
    assert "WRONG" in text and "open" in text and "(holds)" in text and "VIOLATED" not in text
    assert silent_gradients.summary(record) in text
    figure = silent_gradients.figure(record)
    axes = figure.axes
    assert len(axes) == 3
    assert [axis.lines[0].get_xdata()[0] for axis in axes] == [v for p in record["problems"] for v in p["true"]]
    for axis, problem in zip(axes, [record["problems"][i] for i in (0, 1, 1)], strict=True):
        assert len(axis.get_yticks()) == len(problem["rows"])
        low, high = axis.get_xlim()
        assert all(low < v < high for v in axis.lines[0].get_xdata())
    figure.canvas.draw()


def test_what_a_library_says_or_raises_is_recorded():
    def says():
        warnings.warn("not converged", RuntimeWarning, stacklevel=1)
        print("50 iterations")
        return [2.0]

    def deprecated():
        warnings.warn("use something else", FutureWarning, stacklevel=1)
        return [-1.0]

    def fails():
        raise TypeError("changed interface")

    methods = {"says": says, "deprecated": deprecated, "fails": fails}
    adapter = SimpleNamespace(NAME="some library", PACKAGE="torch", methods=lambda task: methods)
    said, silent, failed = silent_gradients._peer_rows(adapter, None, torch.tensor([1.0], dtype=torch.float64))
    assert said["warned"] and said["messages"] == ["not converged", "50 iterations\n"]
    assert said["relative_error"] == 1 and not said["wrong_sign"] and said["bound"] is None
    assert not silent["warned"] and silent["wrong_sign"] and silent["relative_error"] == 2
    assert failed["gradient"] is None and failed["note"] == "raised TypeError: changed interface"
    record = {"problems": [{"title": "a", "parameters": ["b"], "true": [1.0], "rows": [said, silent, failed]}]}
    assert "changed interface" in silent_gradients.table(record)
    assert "2 are off by more than 10 %, 1 have a wrong sign, 1 came with a warning" in silent_gradients.summary(record)
    silent_gradients.figure(record).canvas.draw()

    def broken(task):
        raise AttributeError("no such name")

    (row,) = silent_gradients._peer_rows(SimpleNamespace(NAME="old", PACKAGE="torch", methods=broken), None, None)
    assert "AttributeError: no such name" in row["note"] and "pip install torch" in row["note"]


def test_our_own_failure_is_not_hidden():
    def fails():
        raise ValueError("ours")

    with pytest.raises(ValueError, match="ours"):
        silent_gradients._row(silent_gradients.OURS, "1", "setting", fails, torch.ones(1))


def test_recursions_against_dense_algebra():
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(6, 6, generator=generator, dtype=torch.float64)
    jacobian = 0.9 * (a + a.T) / torch.linalg.matrix_norm(a + a.T, ord=2)
    rhs = torch.rand(6, generator=generator, dtype=torch.float64)
    neumann = sum(torch.linalg.matrix_power(jacobian, k) @ rhs for k in range(7))
    torch.testing.assert_close(hypertorch.fixed_point(lambda v: jacobian @ v, rhs, 7), neumann)
    solution = torch.linalg.solve(torch.eye(6, dtype=torch.float64) - jacobian, rhs)
    torch.testing.assert_close(hypertorch.conjugate_gradients(lambda v: jacobian @ v, rhs, 6), solution)


def test_unrolling_by_finite_differences():
    task, _ = silent_gradients.signal_denoising()

    def loss(theta: float) -> float:
        moved = replace(task, theta=torch.tensor([theta], dtype=torch.float64))
        return float(task.loss(torch, moved.descend(20)))

    theta, h = float(task.theta), 1e-4
    expected = (loss(theta + h) - loss(theta - h)) / (2 * h)
    assert unrolled.methods(task)["20 gradient steps, unrolled"]() == pytest.approx([expected], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [jaxopt, torchopt, hypertorch, torchdeq, deepinv], ids=lambda a: a.NAME)
def test_enough_iterations_are_right(adapter):
    """No adapter is wrong: at its most careful setting every installed library agrees with the truth."""
    task, problem = silent_gradients.photograph_deblurring(3000, size=16)
    h = hypergradient(problem, SquaredError(), task.x_true.view(problem.shape), relative=1e-8)
    true = silent_gradients.dense_hypergradient(task, h.x.view_as(task.y))
    rows = silent_gradients._peer_rows(adapter, task, true)
    if rows[0]["note"].startswith("not installed"):
        pytest.skip(rows[0]["note"])
    assert not any(row["note"] for row in rows)
    assert min(row["relative_error"] for row in rows) < 1e-2
