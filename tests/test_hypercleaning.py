"""Data hypercleaning: the weighted logistic energy against autograd, its constants against samples, the experiment."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
import struct
from io import StringIO
from pathlib import Path

import pytest
import torch
from torch import Tensor
from tqdm import tqdm

from bilevel_imaging import linear_solvers, lower_solvers
from bilevel_imaging.data import corrupt_labels, load_mnist
from bilevel_imaging.energies import LabeledFeatures, WeightedLogisticProblem
from bilevel_imaging.errors import DataError
from bilevel_imaging.experiments import hypercleaning
from bilevel_imaging.experiments.hypercleaning_problem import ValidationLoss, area_under_curve
from bilevel_imaging.experiments.hypercleaning_report import at_step
from bilevel_imaging.hypergradients import hypergradient, loss_interval
from bilevel_imaging.tensors import norm
from bilevel_imaging.upper_level import MAID

F64 = torch.float64
ROOT = Path(__file__).resolve().parent.parent


def examples(count: int = 40, features: int = 6, classes: int = 4, *, seed: int = 0, signed: bool = False):
    """Blobs around a center for every class, most features 0 unless signed, the last one a bias."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    centers = torch.rand(classes, features, generator=generator, dtype=F64)
    a = centers[labels] + 0.5 * torch.randn(count, features, generator=generator, dtype=F64)
    if not signed:
        a = a.clamp(0, 1) * (torch.rand(count, features, generator=generator, dtype=F64) < 0.2)
        a[:, 0] = 0
    return LabeledFeatures(torch.cat([a, torch.ones(count, 1, dtype=F64)], 1), labels, classes)


def problem(*, spread: float = 1.0, ridge: float = 1e-2, seed: int = 0, **options) -> WeightedLogisticProblem:
    data = examples(seed=seed, **options)
    theta = spread * torch.randn(data.count, generator=torch.Generator().manual_seed(seed + 1), dtype=F64)
    return WeightedLogisticProblem(data, theta.requires_grad_(True), ridge=ridge)


def point(p: WeightedLogisticProblem, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed + 7), dtype=F64)


def energy(p: WeightedLogisticProblem, x: Tensor, theta: Tensor) -> Tensor:
    """The definition, with PyTorch's own cross-entropy."""
    losses = torch.nn.functional.cross_entropy(p.examples.features @ x[0].T, p.examples.labels, reduction="none")
    return (torch.sigmoid(theta) * losses).mean() + p.ridge * x.square().sum()


def dense_hessian(p: WeightedLogisticProblem, x: Tensor) -> Tensor:
    return torch.autograd.functional.hessian(lambda z: energy(p, z, p.theta["theta"].detach()), x).reshape(
        x.numel(), x.numel()
    )


def dense_mixed(p: WeightedLogisticProblem, x: Tensor) -> Tensor:
    """J, ``(C d, N)``."""

    def gradient(theta: Tensor) -> Tensor:
        leaf = x.clone().requires_grad_(True)
        return torch.autograd.grad(energy(p, leaf, theta), leaf, create_graph=True)[0].flatten()

    return torch.autograd.functional.jacobian(gradient, p.theta["theta"].detach())


# the first and the last have products with sparse matrices
CASES = [{}, {"signed": True}, {"signed": True, "classes": 2}, {"spread": 4.0, "seed": 3}]


@pytest.mark.parametrize("case", CASES)
def test_derivatives_are_those_of_the_definition(case):
    p = problem(**case)
    x, v = point(p), point(p, 1)
    leaf = x.clone().requires_grad_(True)
    value = energy(p, leaf, p.theta["theta"])
    torch.testing.assert_close(p.value(x).sum(), value, rtol=1e-13, atol=0)
    (gradient,) = torch.autograd.grad(value, leaf)
    H, J = dense_hessian(p, x), dense_mixed(p, x)
    linearization = p.linearize(x)
    for found in (linearization.grad, p.grad(x).detach()):
        torch.testing.assert_close(found, gradient, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(linearization.hvp(v).flatten(), H @ v.flatten(), rtol=1e-11, atol=1e-13)
    product = linearization.mixed_vjp(v)["theta"]
    torch.testing.assert_close(product, J.T @ v.flatten(), rtol=1e-11, atol=1e-14)


def test_gradient_is_that_of_finite_differences_and_differentiable():
    p = problem()
    x, v, h = point(p), point(p, 1), 1e-5
    with torch.no_grad():
        slope = (p.value(x + h * v) - p.value(x - h * v)) / (2 * h)
        torch.testing.assert_close((p.grad(x) * v).sum(), slope.sum(), rtol=1e-8, atol=0)
        difference = (p.grad(x + h * v) - p.grad(x - h * v)) / (2 * h)
        torch.testing.assert_close(p.linearize(x).hvp(v), difference, rtol=1e-7, atol=1e-9)
    # with a graph: what unrolling needs
    q = point(p, 2)
    pairing = (p.grad(x) * q).sum()
    (found,) = torch.autograd.grad(pairing, p.theta["theta"])
    torch.testing.assert_close(found, p.linearize(x).mixed_vjp(q)["theta"], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("case", CASES)
def test_constants_are_never_below_sampled_values(case):
    p = problem(**case)
    known = p.constants()
    mu, L, L_H, J_max, L_J = (
        float(v)
        for v in (
            known.strong_convexity,
            known.smoothness,
            known.hessian_lipschitz,
            known.mixed_norm,
            known.mixed_lipschitz,
        )
    )
    assert mu == pytest.approx(2 * p.ridge, rel=1e-12) and mu <= 2 * p.ridge
    largest = 0.0
    for seed in range(6):
        scale = (0.0, 1.0, 0.3, 3.0, 10.0, 1.0)[seed]
        x, e = point(p, seed, scale), point(p, seed + 50, 0.1)
        spectrum = torch.linalg.eigvalsh(dense_hessian(p, x))
        assert mu <= float(spectrum[0]) * (1 + 1e-9) and float(spectrum[-1]) <= L
        largest = max(largest, float(spectrum[-1]))
        length = float(norm(e))
        change = dense_hessian(p, x + e) - dense_hessian(p, x)
        assert float(torch.linalg.matrix_norm(change, 2)) <= L_H * length
        J = dense_mixed(p, x)
        change = dense_mixed(p, x + e) - J
        assert float(torch.linalg.matrix_norm(change, 2)) <= L_J * length
        size = float(torch.linalg.matrix_norm(J, 2))
        assert size <= J_max and size <= float(p.linearize(x).mixed_norm_bound())
    # and of use: within a small factor for nonnegative features, at W = 0 with two classes even attained
    if not case.get("signed"):
        assert L <= 3 * largest
        assert float(p.linearize(point(p)).mixed_norm_bound()) <= 3 * float(
            torch.linalg.matrix_norm(dense_mixed(p, point(p)), 2)
        )


def test_smoothness_is_attained_for_two_classes():
    data = examples(classes=2)
    p = WeightedLogisticProblem(data, torch.zeros(data.count, dtype=F64, requires_grad=True), ridge=1e-2)
    top = float(torch.linalg.eigvalsh(dense_hessian(p, p.initial()))[-1])
    assert top <= float(p.constants().smoothness) <= top * 1.01


@pytest.mark.parametrize("case", CASES)
def test_directional_constants_are_never_below_sampled_values(case):
    p = problem(**case)
    x, q = point(p), point(p, 4)
    linearization = p.linearize(x)
    along = linearization.directional(q, torch.ones(1, dtype=F64))
    known = p.constants()
    assert float(along.hessian) <= float(known.hessian_lipschitz * norm(q))
    J, product = dense_mixed(p, x), linearization.hvp(q)
    for seed in range(20):
        for scale in (1e-3, 0.1, 1.0):
            e = point(p, seed + 90, scale)
            length = float(norm(e))
            change = p.linearize(x + e).hvp(q) - product
            assert float(norm(change)) <= float(along.hessian) * length
            change = (dense_mixed(p, x + e) - J).T @ q.flatten() if seed < 4 else torch.zeros(1, dtype=F64)
            assert float(change.norm()) <= float(along.mixed) * length


@pytest.mark.parametrize("case", CASES)
def test_local_constants_are_never_below_sampled_values(case):
    p = problem(**case)
    x, q = point(p), point(p, 4)
    mu = p.constants().strong_convexity
    linearization = p.linearize(x)
    H = dense_hessian(p, x)
    R = H - 2 * p.ridge * torch.eye(len(H), dtype=F64)
    change = linearization.local_change(q, torch.ones(1, dtype=F64), mu)
    K = float(linearization.relative_curvature(torch.ones(1, dtype=F64), mu))
    assert float(change.energy) == pytest.approx(float((q.flatten() @ R @ q.flatten()).sqrt()), rel=1e-9)
    inverse = torch.linalg.inv(H)
    J = dense_mixed(p, x)
    dual = float(torch.linalg.eigvalsh(J.T @ inverse @ J)[-1].sqrt())
    assert dual <= float(linearization.mixed_block_norms(mu))
    h = 1e-5
    for seed in range(8):
        e, u = point(p, seed + 20), point(p, seed + 40)
        third = (dense_hessian(p, x + h * e) - dense_hessian(p, x - h * e)) / (2 * h)
        flat_e, flat_u, flat_q = e.flatten(), u.flatten(), q.flatten()
        size_e, size_u = (float((f @ H @ f).sqrt()) for f in (flat_e, flat_u))
        assert abs(float(flat_u @ third @ flat_u)) <= K * size_e * size_u**2 * (1 + 1e-6)
        assert abs(float(flat_q @ third @ flat_u)) <= float(change.hessian) * size_e * size_u * (1 + 1e-6)
        moved = (dense_mixed(p, x + h * e) - dense_mixed(p, x - h * e)) / (2 * h)
        in_R = float((flat_u @ R @ flat_u).sqrt())
        assert float((moved.T @ flat_u).norm()) <= float(change.slopes) * size_e * in_R * (1 + 1e-6)


def test_local_constant_of_the_mixed_derivative_is_attained_by_a_single_example():
    data = LabeledFeatures(torch.rand(1, 5, dtype=F64), torch.tensor([1]), 3)
    p = WeightedLogisticProblem(data, torch.tensor([-1.0], dtype=F64, requires_grad=True), ridge=1e-9)
    x, u, h = point(p), point(p, 1), 1e-5
    linearization = p.linearize(x)
    change = linearization.local_change(u, torch.ones(1, dtype=F64), p.constants().strong_convexity)
    squared = float((u * linearization.hvp(u)).sum())
    moved = (dense_mixed(p, x + h * u) - dense_mixed(p, x - h * u)).T @ u.flatten() / (2 * h)
    assert 0.999 < float(moved.norm()) / (float(change.slopes) * squared) < 1 + 1e-6


@pytest.mark.parametrize("signed", [False, True])
def test_gram_bounds_are_bounds(signed):
    data = examples(signed=signed)
    for seed in range(5):
        weights = torch.rand(data.count, generator=torch.Generator().manual_seed(seed), dtype=F64) ** 4
        weights[: 10 * seed] = 0
        top = float(torch.linalg.eigvalsh(data.gram(weights))[-1])
        assert top <= float(data.gram_bound(weights)) <= (2.5 if signed else 1.5) * top
        torch.testing.assert_close(data.gram(weights), (data.features.T * weights) @ data.features)


def test_constants_follow_theta():
    p = problem()
    before = p.constants()
    with torch.no_grad():
        p.theta["theta"].add_(1.0)
    assert float(p.constants().smoothness) > float(before.smoothness)
    assert p.double() is p


def test_preconditioner_is_positive_definite_helps_and_is_kept():
    data = examples(200, features=20, signed=True)
    # of very different scales
    data = LabeledFeatures(data.features * torch.logspace(0, -2, 21, dtype=F64), data.labels, data.classes)
    p = WeightedLogisticProblem(data, torch.randn(200, dtype=F64), ridge=1e-5)
    x, v = point(p, scale=0.5), point(p, 1)
    linearization = p.linearize(x)
    inverse = linearization.preconditioner()
    units = torch.eye(x.numel(), dtype=F64).reshape(-1, *p.shape)
    matrix = torch.stack([inverse(u).flatten() for u in units])
    torch.testing.assert_close(matrix, matrix.T, rtol=1e-9, atol=1e-12)
    assert float(torch.linalg.eigvalsh(matrix)[0]) > 0
    plain, helped = (
        linear_solvers.ConjugateGradient(preconditioner=choice).solve(linearization, v, 1e-8)
        for choice in (None, "auto")
    )
    assert bool(helped.converged) and int(helped.iterations) < 0.6 * int(plain.iterations)
    assert p.factorizations == 1
    p.linearize(x + 1e-3 * v).preconditioner()
    assert p.factorizations == 1
    p.linearize(10 * x).preconditioner()
    assert p.factorizations == 2


def test_gradients_in_float32_are_as_accurate_as_they_say():
    for seed, scale in itertools.product(range(3), (0.0, 1.0, 10.0)):
        exact = problem(count=3000, features=30, seed=seed)
        data = exact.examples
        rounded = LabeledFeatures(data.features.float(), data.labels, data.classes)
        p = WeightedLogisticProblem(rounded, exact.theta["theta"].detach().float(), ridge=exact.ridge)
        x = point(p, seed, scale).float()
        error = norm(p.linearize(x).grad.double() - p.double().linearize(x.double()).grad)
        assert float(error) <= float(p.gradient_rounding(x)) < 1e-3


# --- hypergradients and their certificates


@functools.cache
def bilevel(seed: int = 0, *, spread: float = 1.0):
    """A problem, a validation loss, and the true loss and hypergradient by dense linear algebra."""
    p = problem(seed=seed, spread=spread, count=60)
    loss = ValidationLoss(examples(30, seed=seed + 5))
    x = p.initial()
    for _ in range(12):
        x = x - torch.linalg.solve(dense_hessian(p, x), p.grad(x).detach().flatten()).reshape(x.shape)
    assert float(norm(p.grad(x).detach())) < 1e-14
    q = torch.linalg.solve(dense_hessian(p, x), loss.grad(x).flatten())
    return p, loss, x, -dense_mixed(p, x).T @ q


def test_validation_loss_is_the_mean_cross_entropy():
    p, loss, x, _ = bilevel()
    data = loss.examples
    leaf = point(p).requires_grad_(True)
    expected = torch.nn.functional.cross_entropy(data.features @ leaf[0].T, data.labels)
    torch.testing.assert_close(loss(leaf.detach()), expected.detach().unsqueeze(0))
    torch.testing.assert_close(loss.grad(leaf.detach()), torch.autograd.grad(expected, leaf)[0])
    for seed in range(5):
        H = torch.autograd.functional.hessian(lambda z: loss(z).sum(), point(p, seed, 0.5 * seed))
        top = float(torch.linalg.eigvalsh(H.reshape(x.numel(), -1))[-1])
        assert top <= loss.smoothness <= 10 * top or seed > 0
        assert top <= loss.smoothness


def test_hypergradient_is_that_of_finite_differences():
    p, loss, x, true = bilevel()
    direction, h = torch.randn(len(true), dtype=F64), 1e-4
    values = []
    for sign in (1, -1):
        theta = (p.theta["theta"].detach() + sign * h * direction).requires_grad_(True)
        moved = WeightedLogisticProblem(p.examples, theta, ridge=p.ridge)
        values.append(float(loss(lower_solvers.NewtonCG().solve(moved, x, 1e-11).x)))
    assert float(true @ direction) == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-5)


@pytest.mark.parametrize("certificate", ["classical", "directional", "local", "auto", "polished"])
def test_certificates_are_never_below_the_true_error(certificate):
    finite = 0
    for seed, error_tol in itertools.product(range(2), (1e-1, 1e-3, 1e-5)):
        p, loss, x, true = bilevel(seed, spread=1.0 + 2 * seed)
        solvers = {"lower": lower_solvers.AcceleratedGradient(), "linear": linear_solvers.ConjugateGradient()}
        tolerances = {"error_tol": error_tol, "residual_tol": 10 * error_tol}
        h = hypergradient(p, loss, x, **solvers, **tolerances, certificate=certificate)
        error = float((h.grad["theta"] - true).norm())
        assert error <= h.bound
        assert h.loss_interval[0] <= float(loss(x)) <= h.loss_interval[1]
        finite += h.bound < 2e4 * error
    assert finite >= (1 if certificate == "local" else 4)


def test_relative_accuracy_by_default_solvers():
    p, loss, x, true = bilevel()
    h = hypergradient(p, loss, x, relative=1e-2)
    assert h.certified and h.relative_bound <= 1e-2
    assert float((h.grad["theta"] - true).norm()) <= h.bound <= 1e-2 * float(true.norm()) * 1.02


@pytest.mark.parametrize(
    ("lower", "linear"), [*itertools.product(("gd", "hb", "fista", "newton"), ("gd", "hb", "cg", "preconditioned"))]
)
def test_every_pair_of_solvers_finds_the_same(lower, linear):
    p, loss, x, true = bilevel()
    first = {**hypercleaning.LOWER, "newton": lower_solvers.NewtonCG}[lower](max_iter=50_000)
    if linear == "preconditioned":
        second = linear_solvers.ConjugateGradient(preconditioner="auto")
    else:
        second = hypercleaning.ADJOINT[linear](max_iter=50_000)
    h = hypergradient(p, loss, x, lower=first, linear=second, error_tol=1e-6, residual_tol=1e-7)
    assert bool(h.lower.converged) and bool(h.linear.converged)
    assert float((h.grad["theta"] - true).norm()) <= min(h.bound, 1e-4 * float(true.norm()))


def test_float32_data_are_certified_in_float64():
    exact, _, _, _ = bilevel()
    data = exact.examples
    rounded = LabeledFeatures(data.features.float(), data.labels, data.classes)
    theta = exact.theta["theta"].detach().float().requires_grad_(True)
    p = WeightedLogisticProblem(rounded, theta, ridge=exact.ridge)
    loss = ValidationLoss(LabeledFeatures(examples(30, seed=5).features.float(), examples(30, seed=5).labels, 4))
    h = hypergradient(p, loss, p.initial(), relative=1e-3)
    reference = hypergradient(p.double(), loss, p.double().initial(), error_tol=1e-10, residual_tol=1e-11)
    assert h.certified and h.relative_bound <= 1e-3
    assert float((h.grad["theta"].double() - reference.grad["theta"].double()).norm()) <= h.bound + reference.bound
    value, low, high = loss_interval(p, loss, h.x, h.x, h.q)
    assert float(low) <= reference.loss <= float(high) and float(low) <= float(value) <= float(high)


def test_what_does_not_fit_is_refused_in_one_line():
    a, y = torch.rand(5, 3, dtype=F64), torch.tensor([0, 1, 2, 1, 0])
    for arguments, text in (
        ((a[:4], y, 3), "features (N, d) and labels (N,)"),
        ((a * float("nan"), y, 3), "finite"),
        ((a, y, 2), "labels in [0, classes)"),
    ):
        with pytest.raises(ValueError, match="Expected") as caught:
            LabeledFeatures(*arguments)
        assert text in str(caught.value) and "\n" not in str(caught.value)
    data = LabeledFeatures(a, y, 3)
    with pytest.raises(ValueError, match=r"one theta per example, \(5,\)"):
        WeightedLogisticProblem(data, torch.zeros(4), ridge=0.1)
    with pytest.raises(ValueError, match="ridge > 0"):
        WeightedLogisticProblem(data, torch.zeros(5), ridge=0.0)


# --- data


def write_mnist(folder: Path, count: int = 80) -> Path:
    """Files like those of MNIST, every digit a bright bar at a place of its own."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, n in (("train", count), ("t10k", count // 2)):
        generator = torch.Generator().manual_seed(n)
        labels = torch.arange(n) % 10
        images = torch.randint(0, 60, (n, 28, 28), generator=generator, dtype=torch.uint8)
        images *= torch.rand(n, 28, 28, generator=generator) < 0.05
        for i, label in enumerate(labels.tolist()):
            images[i, 2 * label + 2 : 2 * label + 5, 8:20] = 200
        head = struct.pack(">IIII", 0x803, n, 28, 28)
        (raw / f"{name}-images-idx3-ubyte").write_bytes(head + images.numpy().tobytes())
        head = struct.pack(">II", 0x801, n)
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(head + labels.to(torch.uint8).numpy().tobytes())
    return folder


def test_digits_are_read_from_a_folder(tmp_path):
    images, labels = load_mnist(write_mnist(tmp_path))
    assert images.shape == (80, 28, 28) and images.dtype == torch.float32
    assert float(images.max()) == pytest.approx(200 / 255) and labels[:12].tolist() == [*range(10), 0, 1]
    assert len(load_mnist(tmp_path, train=False)[0]) == 40


def test_no_digits_and_no_download_are_said_in_one_line(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="MNIST/raw/train-images-idx3-ubyte") as caught:
        load_mnist(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    damaged = write_mnist(tmp_path) / "MNIST" / "raw" / "train-images-idx3-ubyte"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    with pytest.raises(DataError, match="expected MNIST in torchvision's layout"):
        load_mnist(tmp_path)

    def offline(self):
        raise RuntimeError("Error downloading:\nTried a mirror")

    monkeypatch.setattr("torchvision.datasets.MNIST.download", offline)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "cache"))
    with pytest.raises(DataError, match="could not be downloaded") as caught:
        load_mnist()
    assert "\n" not in str(caught.value)


def test_the_corruption_is_that_of_the_global_generator():
    labels = torch.randint(0, 10, (300,), generator=torch.Generator().manual_seed(4))
    changed, corrupted = corrupt_labels(labels, 30)
    torch.manual_seed(0)
    for _ in range(2):  # as data loaders do
        torch.empty((), dtype=torch.int64).random_()
    shifts, places = torch.randint(1, 10, (30,)), torch.randperm(300)[:30]
    expected = labels.clone()
    for shift, place in zip(shifts, places, strict=True):
        expected[place] = (labels[place] + shift) % 10
    assert torch.equal(changed, expected)
    assert torch.equal(corrupted, changed != labels) and int(corrupted.sum()) == 30
    with pytest.raises(ValueError, match="count <= 300"):
        corrupt_labels(labels, 301)


def test_the_first_draw_of_a_data_loader_is_one_number():
    """What the two numbers in ``corrupt_labels`` stand for."""
    torch.manual_seed(0)
    iter(torch.utils.data.DataLoader([1, 2], shuffle=False))
    after = torch.randint(1, 10, (5,))
    torch.manual_seed(0)
    torch.empty((), dtype=torch.int64).random_()
    assert torch.equal(after, torch.randint(1, 10, (5,)))


# --- the experiment


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return hypercleaning.load(write_mnist(tmp_path_factory.mktemp("digits")))


@pytest.fixture(scope="module")
def record(data):
    return hypercleaning.run(data, ["maid", "hb/cg/0.1/0.01", "hb/hb/0.1/0.1"], budget=500)


def test_data_of_the_experiment(data):
    assert data.training.count == 80 and int(data.corrupted.sum()) == 8 and data.validation.count == 40
    assert data.training.shape == (10, 785) and bool((data.training.features[:, -1] == 1).all())


def test_the_published_method_step_by_step(data):
    """Against plain loops with autograd: heavy ball for both levels, and steps of 10."""
    data = hypercleaning.Digits(data.training.double(), data.corrupted, data.validation.double())
    curve = hypercleaning.run(data, ["hb/hb/0.1/0.1"], budget=700)["runs"]["hb/hb/0.1/0.1"]["curve"]
    features, labels = data.training.features, data.training.labels
    theta = torch.zeros(80, dtype=F64, requires_grad=True)
    w = torch.zeros(10, 785, dtype=F64)
    expected, spent = [], 0
    mu = 2e-3

    def g(w, theta):
        losses = torch.nn.functional.cross_entropy(features @ w.T, labels, reduction="none")
        return (torch.sigmoid(theta) * losses).mean() + 1e-3 * w.square().sum()

    while spent < 700:
        weights = torch.sigmoid(theta.detach()) / 80
        L = float(weights @ features.square().sum(1)) + mu
        step, momentum = 4 / (L**0.5 + mu**0.5) ** 2, ((L**0.5 - mu**0.5) / (L**0.5 + mu**0.5)) ** 2
        last, first = w, True
        for _ in range(700 - spent):
            leaf = w.clone().requires_grad_(True)
            (gradient,) = torch.autograd.grad(g(leaf, theta), leaf)
            if float(gradient.norm()) <= 0.1 * mu and not first:
                break
            first = False
            w, last, spent = w - step * gradient + momentum * (w - last), w, spent + 1
        leaf = w.clone().requires_grad_(True)
        validation = data.validation
        f = torch.nn.functional.cross_entropy(validation.features @ leaf.T, validation.labels)
        (rhs,) = torch.autograd.grad(f, leaf)
        expected.append((spent, float(f.detach())))
        (gradient,) = torch.autograd.grad(g(leaf, theta), leaf, create_graph=True)
        q = last = torch.zeros_like(w)
        for _ in range(700 - spent):
            product = torch.autograd.grad(gradient, leaf, q, retain_graph=True)[0]
            if float((rhs - product).norm()) <= 0.1:
                break
            q, last, spent = q + step * (rhs - product) + momentum * (q - last), q, spent + 1
        (product,) = torch.autograd.grad(gradient, theta, q)
        theta = (theta.detach() + 10 * product).requires_grad_(True)
    assert len(expected) >= 8
    assert [entry["iterations"] for entry in curve] == [iterations for iterations, _ in expected]
    # the last solve ends early: a solver then returns its best point, not its last
    for entry, (_, objective) in zip(curve[:-1], expected[:-1], strict=True):
        assert entry["objective"] == pytest.approx(objective, rel=1e-9)


def test_record_and_budget(data, record):
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    for name, one in record["runs"].items():
        objectives = [entry["objective"] for entry in one["curve"]]
        assert objectives[-1] < objectives[0] and one["objective"] == objectives[-1], name
        assert one["iterations"] == one["lower"] + one["adjoint"] >= 500 and one["stopped"] == "budget"
        low, high = one["final_interval"]
        assert low <= high < low + 1e-3
        if name != "maid":
            assert one["iterations"] == 500
    maid = record["runs"]["maid"]
    assert maid["steps"] == len(maid["certified"]) >= 2
    for entry, point_ in zip(maid["certified"], maid["curve"][1:], strict=True):
        assert entry["relative_bound"] <= MAID().relative
        assert entry["loss"][0] <= point_["objective"] <= entry["loss"][1]
    # every accepted step has lowered the true loss for certain
    ends = [entry["loss"] for entry in maid["certified"]]
    assert ends[-1][1] < record["runs"]["hb/cg/0.1/0.01"]["final_interval"][0]
    assert maid["auc"] > 0.8 and maid["weight_corrupted"] < maid["weight_clean"]


def test_same_numbers_in_every_run_and_saved_after_every_setting(data, record):
    saved = []
    name = "hb/cg/0.1/0.01"
    again = hypercleaning.run(data, [name], budget=500, save=lambda r: saved.append(list(r["runs"])))
    without_time = [[{**p, "seconds": 0} for p in r["runs"][name]["curve"]] for r in (again, record)]
    assert without_time[0] == without_time[1] and saved == [[name]]
    one = again["runs"][name]
    assert one["ratio"] == one["objective"] / 0.44134
    short = hypercleaning.run(data, [name], minutes=1e-9)
    assert short["runs"][name]["stopped"] == "minutes" and short["runs"][name]["minutes"] == 1e-9


def test_a_record_is_completed(data, record):
    """What is there is kept, in the order of the settings; what time had stopped is run again."""
    saved = []
    options = {"budget": 500, "save": lambda r: saved.append(list(r["runs"]))}
    same = hypercleaning.run(data, list(record["runs"]), earlier=[record], **options)
    assert same == record and saved == []
    name = "fista/cg/0.1/0.01"
    cut = {**record, "runs": {**record["runs"], name: {"stopped": "minutes"}}}
    longer = hypercleaning.run(data, [name], earlier=[{**record, "runs": {}}, cut], **options)
    assert saved == [["maid", "hb/hb/0.1/0.1", "hb/cg/0.1/0.01", name]] and longer["runs"][name]["stopped"] == "budget"
    with pytest.raises(ValueError, match=r"with budget = 501\. Got 500\.$"):
        hypercleaning.run(data, [name], budget=501, earlier=[record])


@pytest.mark.parametrize("name", ["maid", "hb/cg/0.1/0.01"])
def test_bar_shows_what_is_spent_and_is_hidden_by_default(data, monkeypatch, name):
    shown = StringIO()
    settings = {"file": shown, "mininterval": 0, "miniters": 1, "ncols": 120}
    monkeypatch.setattr(hypercleaning, "tqdm", functools.partial(tqdm, **settings))
    monkeypatch.setattr(hypercleaning, "hidden", lambda progress: not progress)
    hypercleaning.run(data, [name], budget=500)
    assert shown.getvalue() == ""
    curve = hypercleaning.run(data, [name], budget=500, progress=True)["runs"][name]["curve"]
    lines = shown.getvalue().split("\r")
    assert len(curve) >= 3
    for entry in curve:
        expected = f"{min(entry['iterations'], 500)}/500", f"{name}, validation loss {entry['objective']:.4f}"
        assert any(all(part in line for part in expected) for line in lines), expected
    assert "500/500" in shown.getvalue()


def test_settings_and_published_numbers():
    assert len(hypercleaning.SETTINGS) == 1 + 36
    assert set(hypercleaning.SETTINGS) - set(hypercleaning.PUBLISHED) == {"maid", "hb/cg/0.1/0.1"}
    assert min(hypercleaning.PUBLISHED, key=lambda name: hypercleaning.PUBLISHED[name][0]) == hypercleaning.BEST


def test_unknown_settings_and_limits_are_refused(data):
    with pytest.raises(ValueError, match=r"Got hb/cg/0\.1\.$"):
        hypercleaning.run(data, ["maid", "hb/cg/0.1"])
    with pytest.raises(ValueError, match="budget >= 1"):
        hypercleaning.run(data, budget=0)


def test_area_under_curve_is_the_probability_of_the_right_order():
    generator = torch.Generator().manual_seed(2)
    scores = torch.randint(0, 6, (40,), generator=generator).double()
    positive = torch.rand(40, generator=generator) < 0.3
    pairs = [(float(a > b) + 0.5 * float(a == b)) for a in scores[positive] for b in scores[~positive]]
    assert area_under_curve(scores, positive) == pytest.approx(sum(pairs) / len(pairs), rel=1e-12)


def test_figures_and_table(record):
    (axes,) = [figure.axes for figure in hypercleaning.figures(record).values()]
    assert [axis.get_xlabel() for axis in axes] == ["lower-level + adjoint iterations", "upper-level iterations"]
    for axis, key in zip(axes, ("iterations", "step"), strict=True):
        curves = [line for line in axis.get_lines() if line.get_marker() != "o"]
        for line, one in zip(curves, record["runs"].values(), strict=True):
            assert list(line.get_xdata()) == [entry[key] for entry in one["curve"]]
        looks = {(line.get_color(), line.get_linestyle(), line.get_linewidth()) for line in curves}
        assert len(looks) == len(curves) == len(record["runs"])
        assert len(axis.get_lines()) == len(curves) + 2
    explained = [text.get_text() for text in axes[1].get_legend().get_texts()]
    used = [name.split("/") for name in record["runs"] if name != "maid"]
    assert explained[0] == "maid" and {f"adjoint: {parts[1]}" for parts in used} < set(explained)
    text = hypercleaning.table(record)
    rows = {
        line.split()[0]: line for line in text.splitlines() if line.split()[:1] and line.split()[0] in record["runs"]
    }
    assert rows.keys() == record["runs"].keys()
    assert "0.44134 (3523)" in rows["hb/cg/0.1/0.01"] and "not reached" in rows["hb/cg/0.1/0.01"]
    curve = [{"step": 0, "objective": 1.0}, {"step": 4, "objective": 0.0}]
    assert [at_step(curve, step) for step in (0, 1, 4, 5)] == [1.0, 0.75, 0.0, None]


def test_command(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("reproduce", ROOT / "scripts" / "reproduce.py")
    command = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(command)
    monkeypatch.chdir(tmp_path)
    write_mnist(tmp_path / "mnist")
    options = ["--settings", "fista/cg/0.1/0.1", "--budget", "60", "--json", "here.json"]
    assert command.main(["hypercleaning", "--mnist", "mnist", *options]) == 0
    saved = json.loads((tmp_path / "here.json").read_text())
    assert list(saved["runs"]) == ["fista/cg/0.1/0.1"] and saved["budget"] == 60
    assert (tmp_path / "runs/reproduce/hypercleaning/objective.png").read_bytes().startswith(b"\x89PNG")
    assert "fista/cg/0.1/0.1" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        command.main(["hypercleaning", "--mnist", "elsewhere"])
    assert stopped.value.code == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("error: elsewhere: expected MNIST") and "\n" not in message
