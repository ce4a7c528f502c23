"""Learned weights of the k-space of several coils: every derivative and constant against dense matrices, certificates
against closed forms and autograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from deepinv.physics import MultiCoilMRI
from dense import dense, drawn, maps, smoothed_tv, true_hypergradient
from torch import Tensor

import bilevel_imaging as bi
from bilevel_imaging.energies import DataWeight, FrequencyWeights, SamplingMask, VariationalProblem
from bilevel_imaging.energies.weighted_terms import MAX_COLUMNS, WeightedTerm
from bilevel_imaging.tensors import norm

F64 = torch.float64
RIDGE = 0.05


def binary(*shape: int) -> Tensor:
    return (drawn(*shape) > 0.4).double()


def signed(*shape: int) -> Tensor:
    """Of both signs, other for real and imaginary parts, with zeros."""
    return drawn(*shape, low=-1.0) * binary(*shape)


BUILDS: dict[str, tuple[Callable[[], DataWeight], Callable[[], MultiCoilMRI]]] = {
    "mask": (lambda: SamplingMask((5, 6), 0.6), lambda: MultiCoilMRI(torch.ones(5, 6).double(), maps(1, 3, 5, 6))),
    "mask_many": (lambda: SamplingMask((7, 6)), lambda: MultiCoilMRI(binary(2, 1, 7, 6), maps(1, 2, 7, 6))),
    "mask_columns": (lambda: SamplingMask((1, 6), 0.4), lambda: MultiCoilMRI(signed(2, 2, 5, 6), maps(2, 3, 5, 6))),
    "frequencies": (lambda: FrequencyWeights((5, 6)), lambda: MultiCoilMRI(binary(5, 6), maps(2, 1, 5, 6))),
    "frequencies_rows": (lambda: FrequencyWeights((5, 1)), lambda: MultiCoilMRI(signed(1, 2, 5, 6), maps(1, 4, 5, 6))),
    "frequencies_shared": (lambda: FrequencyWeights((1, 1)), lambda: MultiCoilMRI(binary(4, 6), maps(2, 2, 4, 6))),
}  # fmt: skip
builds = pytest.mark.parametrize("name", BUILDS)


def like(x: Tensor, seed: int) -> Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)


def weights(weight: DataWeight, parameter: Tensor) -> Tensor:
    return parameter.sigmoid() ** 2 if isinstance(weight, SamplingMask) else parameter.exp()


class Model:
    """Two noisy images under one weight, and the same in dense matrices."""

    def __init__(self, name: str, regularizer: bi.Regularizer | None = None):
        build, physics = BUILDS[name]
        self.weight, self.physics = build(), physics()
        with torch.no_grad():
            self.weight.parameter.add_(like(self.weight.parameter, 6))
        self.truth = drawn(2, 2, *self.physics.coil_maps.shape[-2:], seed=1)
        clean = self.physics.A(self.truth)
        self.y = clean + 0.05 * like(clean, 2)
        self.x, self.q = self.truth + 0.1 * like(self.truth, 8), like(self.truth, 4)
        self.energy = bi.VariationalEnergy(regularizer or bi.Tikhonov(0.02), ridge=RIDGE, data_weight=self.weight)
        self.matrices = [dense(self.physics, self.truth, i) for i in range(2)]

    @property
    def problem(self) -> VariationalProblem:
        return self.energy.bind(self.y, self.physics)

    @property
    def term(self) -> WeightedTerm:
        return self.problem.data

    def w(self, parameter: Tensor) -> Tensor:
        """W at every number that the measurements of one image consist of."""
        return weights(self.weight, parameter).expand(self.y.shape[1:]).flatten()

    def slopes(self) -> list[Tensor]:
        """Diagonals of dW / dp_k."""
        p = self.weight.parameter.detach()
        units = torch.eye(p.numel(), dtype=F64).reshape(-1, *p.shape)
        return [torch.autograd.functional.jvp(self.w, p, unit)[1] for unit in units]

    def normal(self, i: int, diagonal: Tensor) -> Tensor:
        return self.matrices[i].T @ (diagonal[:, None] * self.matrices[i])

    def hessian(self, i: int) -> Tensor:
        return self.normal(i, self.w(self.weight.parameter).detach())

    def jacobian(self, i: int) -> Tensor:
        """``(pixels, n)``."""
        residual = self.matrices[i] @ self.x[i].flatten() - self.y[i].flatten()
        return torch.stack([self.matrices[i].T @ (slope * residual) for slope in self.slopes()], 1)

    def changes(self, i: int) -> Tensor:
        """The derivative of J^T q in x, ``(n, pixels)``."""
        seen = self.matrices[i] @ self.q[i].flatten()
        return torch.stack([self.matrices[i].T @ (slope * seen) for slope in self.slopes()])


def two_norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, ord=2))


@builds
def test_products_are_those_of_the_dense_matrices(name):
    model = Model(name)
    term, mixed = model.term, model.term.mixed(model.x)
    w, count = model.w(model.weight.parameter).detach(), model.weight.parameter.numel()
    value, grad = term.value(model.x).detach(), term.grad(model.x).detach()
    hvp, applied = term.hvp(model.q).detach(), term.apply(model.q).detach()
    product, energy, columns = torch.zeros(count, dtype=F64), mixed.energy(model.q).detach(), mixed.columns()
    assert (columns is None) == (count > MAX_COLUMNS)
    for i, A in enumerate(model.matrices):
        residual, q = A @ model.x[i].flatten() - model.y[i].flatten(), model.q[i].flatten()
        J = model.jacobian(i)
        torch.testing.assert_close(value[i], 0.5 * (w * residual.square()).sum())
        torch.testing.assert_close(grad[i].flatten(), A.T @ (w * residual))
        torch.testing.assert_close(hvp[i].flatten(), model.hessian(i) @ q)
        torch.testing.assert_close(applied[i].flatten(), w * (A @ q))
        torch.testing.assert_close(energy[i], q @ model.hessian(i) @ q)
        if columns is not None:
            torch.testing.assert_close(columns[i].flatten(1).T, J)
        product += J.T @ q
    torch.testing.assert_close(mixed.vjp(model.q).flatten(), product)


@builds
def test_constants_hold_and_are_not_far_off(name):
    model = Model(name)
    term, mixed = model.term, model.term.mixed(model.x)
    change, norms, lipschitz = mixed.change(model.q), mixed.energy_norms(), term.mixed_lipschitz
    up = 1 + 1e-12
    for i in range(2):
        eigenvalues = torch.linalg.eigvalsh(model.hessian(i))
        assert float(term.lowest[i]) <= float(eigenvalues[0]) + 1e-13
        assert float(eigenvalues[-1]) <= float(term.highest[i]) * up <= 5 * float(eigenvalues[-1])
        J, M = model.jacobian(i), model.changes(i)
        assert two_norm(J) <= float(mixed.norm()[i]) * up <= 5 * two_norm(J)
        assert bool((M.norm(dim=1) <= change[i] * up).all())
        assert two_norm(M) <= float(change[i].amax()) * up <= 5 * two_norm(M)
        steepest = max(two_norm(model.normal(i, slope)) for slope in model.slopes())
        assert max(steepest, two_norm(M) / float(norm(model.q)[i])) <= float(lipschitz[i]) * up <= 8 * steepest
        H = model.hessian(i) + RIDGE * torch.eye(len(J), dtype=F64)
        inside = J.T @ torch.linalg.solve(H, J)
        assert bool((inside.diagonal().sqrt() <= norms[i] * up).all())
        assert float(torch.linalg.eigvalsh(inside)[-1]) ** 0.5 <= float(norms[i].amax()) * up


def test_without_undersampling_the_spectrum_is_that_of_the_maps():
    sensitivity, x = maps(2, 3, 5, 6), drawn(2, 2, 5, 6)
    physics = MultiCoilMRI(torch.ones(5, 6).double(), sensitivity)
    energy = bi.VariationalEnergy(bi.Tikhonov(), data_weight=FrequencyWeights((5, 6), 2.0))
    term, seen = energy.bind(physics.A(x), physics).data, 2 * sensitivity.abs().square().sum(1).flatten(1)
    torch.testing.assert_close(term.lowest, seen.amin(1))
    torch.testing.assert_close(term.highest, seen.amax(1))


def test_the_model_of_preconditioners_has_the_right_trace():
    for name in BUILDS:
        model = Model(name)
        power = model.term.fourier_model().power
        for i in range(2):
            torch.testing.assert_close(power.expand(model.x.shape)[i].sum(), model.hessian(i).trace())
        assert model.term.whitening(RIDGE) is None and model.problem.metric() is None


# --- certified hypergradients


def found(h: bi.Hypergradient) -> Tensor:
    return torch.cat([g.double().flatten() for g in h.grad.values()])


def check(h: bi.Hypergradient, expected: Tensor) -> None:
    error = (found(h) - expected).abs()
    assert float(error.norm()) <= h.bound * (1 + 1e-9) + 1e-12
    if h.component_bounds is not None:
        bounds = torch.cat([b.flatten() for b in h.component_bounds.values()])
        assert bool((error <= bounds * (1 + 1e-9) + 1e-12).all())


@builds
def test_hypergradients_are_differences_of_the_loss(name):
    model = Model(name)
    weight = float(model.energy.regularizer.log_weight.detach().exp())

    def loss(parameter: Tensor) -> float:
        total, w = 0.0, model.w(parameter)
        for i, A in enumerate(model.matrices):
            H = model.normal(i, w) + (RIDGE + weight) * torch.eye(A.shape[1], dtype=F64)
            x = torch.linalg.solve(H, A.T @ (w * model.y[i].flatten()))
            total += 0.25 * float((x - model.truth[i].flatten()).square().sum())
        return total

    p = model.weight.parameter.detach()
    direction, t = like(p, 5), 1e-4
    difference = (loss(p + t * direction) - loss(p - t * direction)) / (2 * t)
    h = bi.hypergradient(model.problem, bi.SquaredError(), model.truth, error_tol=1e-9, residual_tol=1e-9)
    product = float((h.grad[f"data_weight.{model.weight.name}"] * direction).sum())
    assert h.certified and product == pytest.approx(difference, rel=1e-6)


@pytest.mark.parametrize("seed", [1, 3, *(pytest.param(k, marks=pytest.mark.slow) for k in (0, 2, 4, 5))])
def test_random_certificates_hold(seed):
    generator = torch.Generator().manual_seed(seed)

    def pick(*values):
        return values[int(torch.randint(len(values), (), generator=generator))]

    def normal(*shape: int, dtype: torch.dtype = F64) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    shape, coils, batch = pick((3, 4), (4, 3)), pick(1, 2, 4), 2
    physics = MultiCoilMRI(
        normal(pick(1, batch), pick(1, 2), *shape) * (normal(*shape) > -0.5),
        normal(pick(1, batch), coils, *shape, dtype=torch.complex128),
    )
    weight = pick(SamplingMask, FrequencyWeights)((pick(1, shape[0]), pick(1, shape[1])))
    with torch.no_grad():
        weight.parameter.add_(normal(*weight.parameter.shape))
    x = normal(batch, 2, *shape)
    y = physics.A(x)
    y = y + 0.1 * normal(*y.shape)
    regularizer = bi.TotalVariation(0.1, 0.1)
    energy = bi.VariationalEnergy(regularizer, ridge=RIDGE, data_weight=weight)
    theta = torch.cat([p.detach().flatten() for p in energy.theta.values()])
    expected = torch.zeros_like(theta)
    for i in range(batch):
        A = dense(physics, x, i)

        def value(z: Tensor, parameters: Tensor, i=i, A=A) -> Tensor:
            w = weights(weight, parameters[2:].reshape(weight.parameter.shape))
            residual = (A @ z.flatten()).reshape(y[i].shape) - y[i]
            return (
                0.5 * (w * residual.square()).sum()
                + smoothed_tv(z, *parameters[:2].exp())
                + RIDGE / 2 * z.square().sum()
            )

        expected += true_hypergradient(value, theta, x[i]) / batch
    problem = energy.bind(y, physics)
    for certificate in ("classical", "directional", "local", "polished"):
        for tol in (1e-1, 1e-4):
            options = {"error_tol": tol, "residual_tol": tol, "certificate": certificate}
            h = bi.hypergradient(problem, bi.SquaredError(), x, **options)
            check(h, expected)
            assert h.certified or "too far from the minimizer" in h.reason and tol == 0.1
    h = bi.hypergradient(problem, bi.SquaredError(), x, relative=1e-4)
    check(h, expected)
    assert h.certified and h.relative_bound <= 1e-4


# --- parts, float32, misuse


def test_parts_are_the_images_one_by_one():
    for name in ("mask_many", "mask_columns", "frequencies_rows"):
        model = Model(name)
        for i in range(2):
            index = torch.tensor([i])
            mask, sensitivity = (t[index] if len(t) > 1 else t for t in (model.physics.mask, model.physics.coil_maps))
            alone = model.energy.bind(model.y[index], MultiCoilMRI(mask, sensitivity))
            part = model.problem.subset(index)
            x, q = model.x[index], model.q[index]
            torch.testing.assert_close(part.grad(x), alone.grad(x))
            torch.testing.assert_close(part.linearize(x).mixed_vjp(q), alone.linearize(x).mixed_vjp(q))
            torch.testing.assert_close(part.constants().smoothness, alone.constants().smoothness)


@pytest.mark.parametrize("name", ["mask", "mask_columns"])
def test_float32_is_within_its_rounding_bound(name):
    model = Model(name, bi.TotalVariation(0.05, 0.1))
    physics = MultiCoilMRI(model.physics.mask.float(), model.physics.coil_maps.to(torch.complex64))
    problem = model.energy.bind(model.y.float(), physics)
    exact = problem.double()
    for x in (model.truth.float(), model.x.float(), 100 * model.x.float()):
        assert problem.grad(x).dtype == torch.float32
        error = norm(problem.grad(x).double() - exact.grad(x.double()))
        assert bool((error <= problem.gradient_rounding(x)).all())
    truth = model.truth.float()
    reference = bi.hypergradient(exact, bi.SquaredError(), truth.double(), error_tol=1e-11, residual_tol=1e-11)
    h = bi.hypergradient(problem, bi.SquaredError(), truth, relative=0.1)
    assert reference.relative_bound < 1e-7 and h.certified and h.relative_bound <= 0.1
    assert float((found(h) - found(reference)).norm()) <= h.bound + reference.bound


def test_misuse():
    class Other(MultiCoilMRI):
        """May compute anything."""

    x = drawn(2, 2, 5, 6)
    for physics, weight, match in (
        (MultiCoilMRI(binary(5, 6), maps(1, 3, 5, 6)), SamplingMask((6, 5)), r"of shape \(5, 6\).*Got \(6, 5\)"),
        (Other(binary(5, 6), maps(1, 3, 5, 6)), SamplingMask((5, 6)), "MRI or MultiCoilMRI. Got Other; NoiseWeight"),
        (Other(binary(5, 6), maps(1, 3, 5, 6)), FrequencyWeights((5, 6)), "MRI, MultiCoilMRI, Denoising.* Got Other"),
    ):
        with pytest.raises(ValueError, match=match):
            bi.VariationalEnergy(bi.TotalVariation(), ridge=1.0, data_weight=weight).bind(physics.A(x), physics)
