"""Energies and regularizers: derivatives against autograd and differences, and declared constants under attack."""

from __future__ import annotations

import copy
import itertools
import math

import deepinv
import numpy as np
import pytest
import torch
from cases import (
    CERTIFIED_REGULARIZERS,
    GENERIC_PHYSICS,
    KINKED_REGULARIZERS,
    PHYSICS,
    REGULARIZERS,
    Reference,
    build,
    difference_matrix,
    mostly_slow,
    product,
)
from torch import Tensor

import bilevel_imaging as bi
from bilevel_imaging.errors import NotStronglyConvexError
from bilevel_imaging.hypergradients.evaluation import COLUMN_UNITS
from bilevel_imaging.regularizers.differences import squared_operator_norm
from bilevel_imaging.tensors import inner, norm, per_sample

F32, F64 = torch.float32, torch.float64
ALL_PHYSICS = (*PHYSICS, *GENERIC_PHYSICS)
pairs = pytest.mark.parametrize(("regularizer", "physics"), mostly_slow(product(physics=ALL_PHYSICS, kinked=True)))
certified_pairs = pytest.mark.parametrize(("regularizer", "physics"), mostly_slow(product(user=False)))
regularizers = pytest.mark.parametrize("regularizer", REGULARIZERS)
certified = pytest.mark.parametrize("regularizer", CERTIFIED_REGULARIZERS)
DECLARED = (*CERTIFIED_REGULARIZERS, *KINKED_REGULARIZERS)
declared = pytest.mark.parametrize("regularizer", DECLARED)
declared_pairs = pytest.mark.parametrize(("regularizer", "physics"), mostly_slow(product(user=False, kinked=True)))


def draw(like: Tensor, seed: int) -> Tensor:
    return torch.randn(like.shape, dtype=like.dtype, generator=torch.Generator().manual_seed(seed))


def close(a: Tensor, b: Tensor, tolerance: float) -> None:
    assert float((a - b).detach().abs().max()) <= tolerance * max(1e-30, float(b.detach().abs().max())), (a, b)


def in_double(operator: deepinv.physics.Physics) -> deepinv.physics.Physics:
    """The operator with its stored numbers in float64; BlurFFT also transforms its filter in float64."""
    if isinstance(operator, deepinv.physics.BlurFFT):
        return deepinv.physics.BlurFFT(operator.img_size, filter=operator.filter.double())
    return copy.deepcopy(operator).double()


def dense(linearization, like: Tensor) -> Tensor:
    """H of the first sample, from products with the unit vectors one batch at a time."""
    d, batch = like[0].numel(), like.shape[0]
    columns = []
    for j in range(d):
        unit = torch.zeros(batch, d, dtype=like.dtype)
        unit[:, j] = 1
        columns.append(linearization.hvp(unit.reshape(like.shape))[0].flatten())
    return torch.stack(columns, 1)


# --- derivatives


@pairs
@pytest.mark.parametrize("channels", [1, 3])
def test_gradient_products_and_columns_agree_with_autograd(regularizer, physics, channels):
    case = build(regularizer, physics, channels=channels, size=(5, 6))
    problem = case.problem
    x, v, q = case.x_true + 0.05 * draw(case.x_true, 1), draw(case.x_true, 2), draw(case.x_true, 3)
    leaf = x.clone().requires_grad_(True)
    (grad,) = torch.autograd.grad(problem.value(leaf).sum(), leaf, create_graph=True)
    close(problem.grad(x), grad, 1e-12)
    linearization = problem.linearize(x)
    close(linearization.grad, grad, 1e-12)
    names = list(problem.theta)
    mixed = torch.autograd.grad(inner(q, grad).sum(), list(problem.theta.values()), retain_graph=True)
    product_q = linearization.mixed_vjp(q)
    assert list(product_q) == names
    for name, expected in zip(names, mixed, strict=True):
        close(product_q[name], expected, 1e-10)
    (hvp,) = torch.autograd.grad(inner(v, grad).sum(), leaf)
    close(linearization.hvp(v), hvp, 1e-10)
    columns = linearization.mixed_columns()
    if columns is not None:
        close(torch.einsum("bnchw,bchw->n", columns, q), torch.cat([m.reshape(-1) for m in mixed]), 1e-10)


@pairs
def test_central_differences(regularizer, physics):
    case = build(regularizer, physics, size=(5, 6), smoothing=0.3)
    problem = case.problem
    x, v, q = case.x_true + 0.05 * draw(case.x_true, 1), draw(case.x_true, 2), draw(case.x_true, 3)
    t = 1e-5
    slope = (problem.value(x + t * v) - problem.value(x - t * v)) / (2 * t)
    assert torch.allclose(inner(problem.grad(x), v), slope, rtol=1e-7, atol=1e-8)
    change = (problem.grad(x + t * v) - problem.grad(x - t * v)) / (2 * t)
    close(problem.linearize(x).hvp(v), change, 1e-6)
    products = problem.linearize(x).mixed_vjp(q)
    for name, p in problem.theta.items():
        for j in range(p.numel()):
            ends = []
            for sign in (1, -1):
                with torch.no_grad():
                    p.view(-1)[j] += sign * t
                    ends.append(inner(q, problem.grad(x)).sum())
                    p.view(-1)[j] -= sign * t
            expected = float(ends[0] - ends[1]) / (2 * t)
            assert float(products[name].reshape(-1)[j]) == pytest.approx(expected, rel=1e-6, abs=1e-8)


@certified_pairs
def test_against_the_independent_model(regularizer, physics):
    case = build(regularizer, physics, channels=3, size=(4, 5), smoothing=0.02)
    x = case.x_true + 0.05 * draw(case.x_true, 1)
    linearization = case.problem.linearize(x)
    v = draw(x, 2)
    reference = Reference(case, 1)
    xn, vn = (a[1].numpy().ravel().astype(np.longdouble) for a in (x, v))
    assert float(case.problem.value(x).detach()[1]) == pytest.approx(float(reference.value(xn)), rel=1e-12)
    for ours, theirs in (
        (linearization.grad[1], reference.gradient(xn)),
        (linearization.hvp(v)[1], reference.product(xn, vn)),
        (linearization.mixed_columns()[1].flatten(1), reference.columns(xn)),
    ):
        scale = float(np.abs(theirs).max())
        assert float(np.abs(ours.numpy().reshape(theirs.shape) - theirs).max()) <= 1e-12 * scale
    assert np.allclose(reference.hessian(xn) @ vn.astype(float), reference.product(xn, vn).astype(float), rtol=1e-9)


@declared
@pytest.mark.parametrize("size", [(1, 6), (5, 1), (1, 1), (2, 2), (4, 7)])
def test_thin_images_have_the_same_formulas(regularizer, size):
    case = build(regularizer, "denoising", channels=2, size=size)
    x, v = case.x_true + 0.1 * draw(case.x_true, 1), draw(case.x_true, 2)
    leaf = x.clone().requires_grad_(True)
    (grad,) = torch.autograd.grad(case.problem.value(leaf).sum(), leaf, create_graph=True)
    linearization = case.problem.linearize(x)
    close(linearization.grad, grad, 1e-12)
    (hvp,) = torch.autograd.grad(inner(v, grad).sum(), leaf)
    close(linearization.hvp(v), hvp, 1e-10)
    H = dense(linearization, x)
    weight_part = H - torch.eye(H.shape[0], dtype=F64)
    close(linearization.inside.inside.hessian_diagonal()[0].flatten(), weight_part.diagonal(), 1e-10)
    norm2 = np.linalg.norm(np.concatenate(difference_matrix(tuple(x.shape))), 2) ** 2
    assert squared_operator_norm(*size) == pytest.approx(norm2, rel=1e-12, abs=1e-12)


@declared
@pytest.mark.parametrize("channels", [1, 3])
def test_hessian_diagonal(regularizer, channels):
    case = build(regularizer, "denoising", channels=channels, size=(4, 5), smoothing=0.03)
    x = case.x_true + 0.02 * draw(case.x_true, 1)
    inside = case.energy.regularizer.linearize(x)
    H = dense(inside, x)
    close(inside.hessian_diagonal()[0].flatten(), H.diagonal(), 1e-11)


# --- data terms


@pytest.mark.parametrize("physics", ALL_PHYSICS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(6, 6), (5, 8), (7, 5)])
def test_data_term_is_the_operator_of_deepinv(physics, channels, size):
    case = build("tikhonov_identity", physics, channels=channels, size=size)
    data, operator = case.problem.data, in_double(case.physics)
    x, r = draw(case.x_true, 1), draw(case.y, 2)
    close(data.apply(x), operator.A(x), 1e-13)
    close(data.value(x), 0.5 * (operator.A(x) - case.y).square().flatten(1).sum(1), 1e-12)
    close(data.grad(x), operator.A_adjoint(operator.A(x) - case.y), 1e-12)
    close(data.hvp(x), operator.A_adjoint(operator.A(x)), 1e-12)
    # adjointness, through what the term itself gives: <A^T (A 0 - y), x> = -<y, A x>
    assert torch.allclose(inner(data.grad(torch.zeros_like(x)), x), -inner(case.y, data.apply(x)), rtol=1e-11)
    assert torch.allclose(inner(operator.A(x), r), inner(x, operator.A_adjoint(r)), rtol=1e-10)


@pytest.mark.parametrize("physics", ALL_PHYSICS)
@pytest.mark.parametrize("channels", [1, 3])
def test_extreme_eigenvalues_are_exact(physics, channels):
    case = build("tikhonov_identity", physics, channels=channels, size=(5, 6))
    data = case.problem.data
    eye = torch.eye(case.x_true[0].numel(), dtype=F64)
    columns = [data.hvp(e.reshape(1, *case.x_true.shape[1:]).expand_as(case.x_true))[0].flatten() for e in eye]
    eigenvalues = torch.linalg.eigvalsh(torch.stack(columns))
    lowest, highest = float(eigenvalues[0]), float(eigenvalues[-1])
    assert float(data.lowest[0]) <= lowest + 1e-14 * highest
    if physics in GENERIC_PHYSICS:
        assert float(data.lowest[0]) == 0
        assert highest <= float(data.highest[0]) <= 4 * highest  # how loose for which operator: test_operators.py
        return
    assert float(data.lowest[0]) == pytest.approx(lowest, rel=1e-9, abs=1e-14)
    assert float(data.highest[0]) == pytest.approx(highest, rel=1e-11)
    assert float(data.highest[0]) >= highest * (1 - 1e-14)
    whiten = data.whitening(0.1)
    u, v = draw(case.x_true, 3), draw(case.x_true, 4)
    shifted = data.hvp(v) + 0.1 * v
    close(inner(whiten(u), whiten(shifted)), inner(u, v), 1e-11)  # <u, (A^T A + I / 10)^-1 (A^T A + I / 10) v>


def test_filters_of_one_image_each():
    generator = torch.Generator().manual_seed(0)
    filters = torch.rand(2, 1, 3, 3, generator=generator, dtype=F64)
    x = torch.rand(2, 1, 6, 5, generator=generator, dtype=F64)
    for operator in (
        deepinv.physics.BlurFFT((1, 6, 5), filter=filters),
        deepinv.physics.Blur(filter=filters, padding="circular"),
        deepinv.physics.Blur(filter=filters, padding="reflect"),
    ):
        energy = bi.VariationalEnergy(bi.TotalVariation(0.1, 0.1), ridge=0.1)
        y = operator.A(x)
        problem = energy.bind(y, operator)
        close(problem.data.apply(x), y, 1e-12)
        index = torch.tensor([1])
        part = problem.subset(index)
        if part is not None:  # a part that can't be restricted is legitimate; a wrong one is not
            close(part.grad(x[index]), problem.grad(x)[index], 1e-12)
        # tolerances so different that the first sample is finished long before the second
        tol = torch.tensor([1.0, 1e-10], dtype=F64)
        for solver in bi.lower_solvers.LOWER_SOLVERS.values():
            solution = solver(max_iter=3000).solve(problem, None, tol)
            assert bool(solution.converged.all())
            assert bool((norm(problem.grad(solution.x)) <= 0.1 * tol * (1 + 1e-9)).all())


def test_even_kernels_shift_as_in_deepinv():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, 6, 7, generator=generator, dtype=F64)
    for shape in ((1, 1, 2, 2), (1, 3, 4, 3), (1, 1, 1, 4), (1, 1, 6, 7)):
        kernel = torch.rand(shape, generator=generator, dtype=F64)
        for operator in (
            deepinv.physics.BlurFFT((3, 6, 7), filter=kernel),
            deepinv.physics.Blur(filter=kernel, padding="circular"),
        ):
            y = operator.A(x)
            problem = bi.VariationalEnergy(bi.TotalVariation(), ridge=0.1).bind(y, operator)
            close(problem.data.apply(x), y, 1e-12)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_masks_of_one_complex_image_each(dtype):
    generator = torch.Generator().manual_seed(0)
    mask = torch.randn(3, 2, 7, 6, generator=generator)
    x = torch.rand(3, 2, 7, 6, generator=generator, dtype=F64).to(dtype)
    operator = deepinv.physics.MRI(mask=mask)
    y = operator.A(x)
    problem = bi.VariationalEnergy(bi.TotalVariation(0.1, 0.1), ridge=0.1).bind(y, operator)
    assert torch.equal(problem.data.lowest, mask.double().square().flatten(1).amin(1))
    assert torch.equal(problem.data.highest, mask.double().square().flatten(1).amax(1))
    for i in range(3):
        # the same bits in every batch
        part, one = problem.subset(torch.tensor([i])), slice(i, i + 1)
        close(part.data.apply(x[one]), y[one], 1e-5 if dtype == F32 else 1e-13)
        assert torch.equal(part.grad(x[one]), problem.grad(x)[one])
        assert torch.equal(part.linearize(x[one]).hvp(y[one]), problem.linearize(x).hvp(y)[one])
        assert torch.equal(part.initial(), problem.initial()[one])
    full = deepinv.physics.MRI(img_size=(7, 6)).to(dtype)
    start = bi.VariationalEnergy(bi.TotalVariation()).bind(full.A(x), full).initial()
    close(start * 1.05, x, 1e-5 if dtype == F32 else 1e-13)


# --- constants under attack


def ratio(problem, x: Tensor, e: Tensor, q: Tensor, what: str) -> Tensor:
    """||(H(x + e) - H(x)) q|| / ||e||, or |(J_j(x + e) - J_j(x))^T q| / ||e|| for a parameter j; ``(B,)``."""
    total = []
    for point in (x + e, x):
        point = point if point.requires_grad else point.requires_grad_(True)
        pairing = inner(problem._grad(point), q)
        if what == "hessian":
            total.append(torch.autograd.grad(pairing.sum(), point, create_graph=True)[0])
        else:
            total.append(_per_sample_parameter_derivative(problem, point, q, what))
    change = total[0] - total[1]
    return (norm(change) if change.dim() > 1 else change.abs()) / norm(e)


def _per_sample_parameter_derivative(problem, x: Tensor, q: Tensor, name: str) -> Tensor:
    """d/dtheta <q_i, G_i(x_i)> for every sample: reverse over a dummy cotangent gives the derivative of a vector."""
    cotangent = torch.ones(x.shape[0], dtype=x.dtype, requires_grad=True)
    pairing = (inner(problem._grad(x), q) * cotangent).sum()
    (derivative,) = torch.autograd.grad(pairing, problem.theta[name], create_graph=True)
    return torch.autograd.grad(derivative, cotangent, create_graph=True)[0]


def ascend(objective, variables: list[Tensor], project, steps: int = 40, rate: float = 0.2) -> Tensor:
    """Largest value met per sample, by sign-normalized gradient ascent with decreasing steps."""
    best = None
    for k in range(steps):
        leaves = [v.detach().requires_grad_(True) for v in variables]
        value = objective(*leaves)
        best = value.detach() if best is None else torch.maximum(best, value.detach())
        grads = torch.autograd.grad(value.sum(), leaves, allow_unused=True)
        step = rate * 0.93**k
        variables = project(
            *[
                v.detach()
                + step * per_sample(norm(v.detach()).clamp(min=1e-12), v) * g / per_sample(norm(g).clamp(min=1e-300), v)
                if g is not None
                else v.detach()
                for v, g in zip(leaves, grads, strict=True)
            ]
        )
    return best


def hostile_points(shape: tuple[int, ...], nu: float, copies: int) -> Tensor:
    """Flat, ramps with differences of nu/2 and nu, a checkerboard,
    an edge, noise at the scale of nu and of 1; ``(7 * copies, ...)``."""
    rows = torch.arange(shape[-2], dtype=F64)[:, None]
    columns = torch.arange(shape[-1], dtype=F64)[None, :]
    flat = torch.full(shape, 0.3, dtype=F64)
    noise = torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(5))
    points = [
        flat,
        flat + nu / 2 * (columns % 2) + 0 * rows,
        flat + nu / 2 * (rows + columns),
        flat + nu / 2 * ((rows + columns) % 2),
        flat + 0.5 * (columns >= shape[-1] // 2),
        flat + nu * noise,
        flat + noise,
    ]
    return torch.stack(points * copies)


class Alone:
    """A regularizer as a problem, so that the attack sees nothing but what the constants are about."""

    def __init__(self, regularizer):
        self.regularizer, self.theta = regularizer, regularizer.trainable()

    def _grad(self, x: Tensor) -> Tensor:
        return self.regularizer.grad(x)


@certified
@pytest.mark.parametrize("nu", [1e-3, 0.05, 1.0])
def test_directional_constants_survive_gradient_ascent(regularizer, nu):
    model = REGULARIZERS[regularizer](0.7, nu)
    channels = 2 if regularizer == "tv_coupled" else 1
    radii = (1e-6, 1e-2 * nu, nu / 2, 3 * nu, 0.3, 10.0)
    points = hostile_points((channels, 4, 4), nu, 1)
    x = points.repeat(2 * len(radii), 1, 1, 1)
    radius = torch.tensor(radii, dtype=F64).repeat_interleave(len(points)).repeat(2)
    q = draw(x, 1)
    # half of the adjoints sit on one pixel, where the bound by a maximum norm is tightest
    q[len(q) // 2 :] = 0
    q[len(q) // 2 :, :, 1, 1] = 1
    along = model.linearize(x).directional(q, radius)
    e = draw(x, 2)
    e = e * per_sample(radius / norm(e), e)

    def project(e: Tensor) -> list[Tensor]:
        return [e * per_sample((radius / norm(e)).clamp(max=1), e)]

    problem = Alone(model)
    targets = [("hessian", along.hessian)]
    targets += [(n, along.mixed_components[:, j]) for j, n in enumerate(problem.theta)]
    tight = {}
    # cancellation: H(x + e) q - H(x) q is known to a few units of the last place of its terms
    smooth = model.constants(x.shape).smoothness
    for what, bound in targets:
        found = ascend(lambda e, what=what: ratio(problem, x, e, q, what), [e], project)
        noise = 50 * torch.finfo(F64).eps * (smooth * norm(q) / 1e-1 + 0.7 * 4 * norm(q)) / radius.clamp(max=nu)
        excess = found - bound * (1 + 1e-9) - noise
        worst = int(excess.argmax())
        assert float(excess.max()) <= 0, (what, float(radius[worst]), float(found[worst]), float(bound[worst]))
        tight[what] = float((found / bound.clamp(min=1e-300)).max())
    if isinstance(model, bi.TotalVariation):
        # an attack that never comes near proves nothing
        assert all(t > 0.2 for t in tight.values()), tight
    together = along.mixed_components.norm(dim=1)
    assert bool((together <= along.mixed * (1 + 1e-12)).all())


@certified
@pytest.mark.parametrize("nu", [1e-3, 0.1])
def test_global_lipschitz_constants_survive_alternating_ascent(regularizer, nu):
    model = REGULARIZERS[regularizer](0.7, nu)
    channels = 2 if regularizer == "tv_coupled" else 1
    x = hostile_points((channels, 4, 4), nu, 3)
    constants = model.constants(x.shape)
    problem = Alone(model)
    best_hessian = torch.zeros(len(x), dtype=F64)
    best_mixed = torch.zeros(len(x), dtype=F64)
    d = x[0].numel()
    e = 0.05 * nu * draw(x, 1) / d**0.5
    for round_ in range(8):
        # the best q for this pair, exactly: the top singular vector of the difference of the Hessians
        ends = [torch.autograd.functional.jacobian(lambda p: problem._grad(p).sum(0), x + s * e) for s in (1, 0)]
        difference = (ends[0] - ends[1]).movedim(-4, 0).reshape(len(x), d, d)
        values, vectors = torch.linalg.eigh(0.5 * (difference + difference.transpose(1, 2)))
        top = values.abs().argmax(1)
        q = vectors[torch.arange(len(x)), :, top].reshape(x.shape)
        best_hessian = torch.maximum(best_hessian, values.abs().amax(1) / norm(e))
        columns = [model.linearize(x + s * e).mixed_columns().flatten(2) for s in (1, 0)]
        change = torch.linalg.matrix_norm(columns[0] - columns[1], ord=2)
        best_mixed = torch.maximum(best_mixed, change / norm(e))
        # the best direction for this q, to first order: the gradient of <q, H(x) q>
        leaf = x.clone().requires_grad_(True)
        (hq,) = torch.autograd.grad(inner(problem._grad(leaf), q).sum(), leaf, create_graph=True)
        if hq.requires_grad:
            (direction,) = torch.autograd.grad(inner(hq, q).sum(), leaf, materialize_grads=True, allow_unused=True)
            length = norm(direction)
            size = nu * (0.05, 0.2, 1.0, 3.0)[round_ % 4]
            e = torch.where(per_sample(length > 0, e), size * direction / per_sample(length.clamp(min=1e-300), e), e)
        found = ascend(
            lambda x, e, q=q: ratio(problem, x, e, q, "hessian"),
            [x, e],
            lambda x, e: [x, e],
            steps=10,
            rate=0.02,
        )
        best_hessian = torch.maximum(best_hessian, found)
    noise = 1e-12 * float(constants.smoothness[0]) / nu
    assert bool((best_hessian <= constants.hessian_lipschitz * (1 + 1e-9) + noise).all())
    assert bool((best_mixed <= constants.mixed_lipschitz * (1 + 1e-9) + noise).all())
    if isinstance(model, bi.TotalVariation):
        assert float((best_hessian / constants.hessian_lipschitz).max()) > 0.2
    if constants.mixed_norm is not None:
        sizes = torch.linalg.matrix_norm(model.linearize(x).mixed_columns().flatten(2), ord=2)
        assert bool((sizes <= constants.mixed_norm).all())


@declared_pairs
def test_strong_convexity_and_smoothness_enclose_the_spectrum(regularizer, physics):
    case = build(regularizer, physics, size=(4, 5), smoothing=0.01, ridge=0.03)
    constants = case.problem.constants()
    for x in (torch.zeros_like(case.x_true), case.x_true, case.x_true + draw(case.x_true, 1)):
        eigenvalues = torch.linalg.eigvalsh(dense(case.problem.linearize(x), x))
        assert float(constants.strong_convexity[0]) <= float(eigenvalues[0]) * (1 + 1e-11)
        assert float(constants.smoothness[0]) >= float(eigenvalues[-1]) * (1 - 1e-11)
    flat = torch.linalg.eigvalsh(dense(case.problem.linearize(torch.zeros_like(case.x_true)), case.x_true))
    if physics == "denoising" and regularizer != "linear_spline_slopes":  # both are attained at a flat image
        assert float(constants.strong_convexity[0]) == pytest.approx(float(flat[0]), rel=1e-9)
        assert float(constants.smoothness[0]) == pytest.approx(float(flat[-1]), rel=1e-9)


# --- float32


def float32_cases(regularizer, physics, kinds):
    """Cases in float32, the same problems in float64, a start and a point near the minimizer, and what was drawn."""
    for seed, kind in enumerate(kinds):
        for weight, smoothing in ((1e-4, 0.1), (0.1, 1e-3), (30.0, 1.0)):
            case = build(
                regularizer, physics, dtype=F32, kind=kind, seed=seed, weight=weight, smoothing=smoothing, ridge=1e-3,
                size=(9, 11),
            )  # fmt: skip
            exact = case.problem.double()
            if exact is None:
                exact = case.energy.bind(case.y.double(), in_double(case.physics))
            start = exact.initial().to(F32)
            near = bi.lower_solvers.NewtonCG(max_iter=3, max_inner=15).solve(case.problem, start, 1e-5).x
            yield case, exact, start, near, (kind, weight, smoothing)


@pytest.mark.parametrize(("regularizer", "physics"), mostly_slow(itertools.product(DECLARED, ALL_PHYSICS)))
def test_float32_gradients_are_within_their_rounding_bound(regularizer, physics):
    kinds = ("noisy", "flat", "ramp", "saturated")
    for case, exact, start, near, drawn in float32_cases(regularizer, physics, kinds):
        problem = case.problem
        for x in (case.x_true, case.y if case.y.shape == problem.shape else start, near):
            error = norm(problem.grad(x).double() - exact.grad(x.double()))
            allowed = problem.gradient_rounding(x).double()
            worst = float((error / allowed.clamp(min=1e-300)).detach().max())
            assert bool((error <= allowed).all()), (*drawn, worst)
            coarse = problem.coarse_gradient_rounding(x)
            if coarse is not None:  # taken where nobody notices
                assert bool((allowed <= coarse * (1 + 1e-6)).all()), drawn
                assert torch.equal(problem.gradient_rounding_beside(x, 2e3 * coarse), coarse)
                assert torch.equal(problem.gradient_rounding_beside(x, coarse), allowed)


@pytest.mark.parametrize(("regularizer", "physics"), mostly_slow(itertools.product(DECLARED, ALL_PHYSICS)))
def test_float32_columns_are_within_what_estimates_allow_for(regularizer, physics):
    for case, exact, _, x, drawn in float32_cases(regularizer, physics, ("noisy", "ramp", "saturated")):
        columns, wanted = case.problem.linearize(x).mixed_columns(), exact.linearize(x.double()).mixed_columns()
        if columns is None:
            return
        error, size = (v.flatten(1).norm(dim=1) for v in (columns.double() - wanted, wanted))
        allowed = COLUMN_UNITS * case.problem.gradient_rounding(x).double() + 8 * torch.finfo(F32).eps * size
        assert bool((error <= allowed).all()), (*drawn, float((error / allowed).max()))


@declared_pairs
def test_double_evaluates_the_same_numbers(regularizer, physics):
    case = build(regularizer, physics, dtype=F32)
    exact = case.problem.double()
    assert exact is not None and exact.dtype == F64 and exact.cost is case.problem.cost
    again = case.energy.bind(case.y.double(), in_double(case.physics))
    x = case.x_true.double()
    close(exact.value(x), again.value(x), 1e-13)
    close(exact.grad(x), again.grad(x), 1e-12)
    assert case.problem.dtype == F32
    assert build(regularizer, physics).problem.double().dtype == F64


# --- the contract


@pairs
def test_subset_is_the_same_samples(regularizer, physics):
    case = build(regularizer, physics, batch=3, size=(5, 6))
    index = torch.tensor([2, 0])
    x = case.x_true + 0.1 * draw(case.x_true, 1)
    part, v = case.problem.subset(index), draw(case.x_true, 2)
    linearization = case.problem.linearize(x)
    close(part.value(x[index]), case.problem.value(x)[index], 1e-13)
    close(part.grad(x[index]), linearization.grad[index], 1e-12)
    for name in ("strong_convexity", "smoothness"):
        whole, small = getattr(case.problem.constants(), name), getattr(part.constants(), name)
        assert (whole is None and small is None) or bool((whole[index] == small).all())
    restricted = linearization.subset(index)
    if restricted is None:
        assert regularizer == "user"
        return
    close(restricted.hvp(v[index]), linearization.hvp(v)[index], 1e-12)
    close(restricted.grad, linearization.grad[index], 1e-12)
    again, columns = part.linearize(x[index]).mixed_vjp(v[index]), linearization.mixed_columns()
    for name, pulled in restricted.mixed_vjp(v[index]).items():
        close(pulled, again[name], 1e-12)
    if columns is None:
        assert restricted.mixed_columns() is None
    else:
        close(restricted.mixed_columns(), columns[index], 1e-12)
    radius = torch.tensor([0.1, 0.3, 0.01], dtype=F64)
    along, small = linearization.directional(v, radius), restricted.directional(v[index], radius[index])
    assert (along is None) == (small is None)
    if along is not None:
        torch.testing.assert_close(small.hessian, along.hessian[index], rtol=1e-12, atol=0)


@pairs
@pytest.mark.parametrize("mode", ["plain", "no_grad", "inference"])
def test_caller_is_left_alone(regularizer, physics, mode):
    case = build(regularizer, physics, size=(5, 6))
    x, q = case.x_true.clone(), draw(case.x_true, 1)
    copies = [a.clone() for a in (x, q, case.y)]
    theta = {n: p.detach().clone() for n, p in case.problem.theta.items()}
    context = {"plain": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}[mode]
    with context():
        before = torch.is_grad_enabled()
        linearization = case.problem.linearize(x)
        linearization.hvp(q)
        linearization.mixed_vjp(q)
        linearization.directional(q, torch.full((2,), 0.1, dtype=F64))
        linearization.preconditioner()
        case.problem.grad(x)
        case.problem.gradient_rounding(x)
        case.problem.value(x)
        assert torch.is_grad_enabled() == before
    for a, b in zip((x, q, case.y), copies, strict=True):
        assert torch.equal(a, b) and not a.requires_grad and a.grad is None
    for name, p in case.problem.theta.items():
        assert torch.equal(p, theta[name]) and p.grad is None and p.requires_grad
    leaf = x.clone().requires_grad_(True)
    case.problem.linearize(leaf)
    assert leaf.requires_grad and leaf.grad is None


@pytest.mark.parametrize("physics", ["inpainting", "blur_fft", "blur_circular", "blur_reflect"])
def test_not_strongly_convex_is_refused_by_name(physics):
    with pytest.raises(NotStronglyConvexError, match="ridge"):
        case = build("tv_isotropic", "inpainting" if physics == "inpainting" else "denoising", ridge=1e-3)
        if physics == "inpainting":
            case.energy.ridge = 0.0
            case.energy.bind(case.y, case.physics)
        kernel = torch.ones(1, 1, 2, 2, dtype=F64) / 4  # a zero at the highest frequencies
        operator = {
            "blur_fft": lambda: deepinv.physics.BlurFFT((1, 8, 8), filter=kernel),
            "blur_circular": lambda: deepinv.physics.Blur(filter=kernel, padding="circular"),
            "blur_reflect": lambda: deepinv.physics.Blur(filter=torch.ones(1, 1, 3, 3, dtype=F64), padding="reflect"),
        }[physics]()
        bi.VariationalEnergy(bi.TotalVariation()).bind(torch.rand(1, 1, 8, 8, dtype=F64), operator)
    # Tikhonov is strongly convex by itself
    bi.VariationalEnergy(bi.Tikhonov(0.1)).bind(
        torch.rand(1, 1, 8, 8), deepinv.physics.Inpainting((1, 8, 8), mask=torch.zeros(1, 1, 8, 8))
    )


@pytest.mark.parametrize(
    ("y", "match"),
    [
        (torch.zeros(1, 1, 4), "non-empty tensor"),
        (torch.zeros(0, 1, 4, 4), "non-empty tensor"),
        (torch.zeros(1, 1, 0, 4), "non-empty tensor"),
        (np.zeros((1, 1, 4, 4)), "ndarray"),
        (torch.zeros(1, 1, 4, 4, dtype=torch.int64), "float32 or float64"),
        (torch.zeros(1, 1, 4, 4, dtype=torch.float16), "float32 or float64"),
        (torch.zeros(1, 1, 4, 4, dtype=torch.complex64), "float32 or float64"),
        (torch.tensor([0.0, math.nan]).reshape(2, 1, 1, 1).expand(2, 1, 4, 4), r"samples \[1\]"),
        (torch.full((1, 1, 4, 4), math.inf), "finite"),
    ],
)
def test_measurements_that_cannot_be_used(y, match):
    with pytest.raises(ValueError, match=match):
        bi.VariationalEnergy(bi.TotalVariation()).bind(y, deepinv.physics.Denoising())


def test_other_misuse():
    y = torch.zeros(2, 1, 4, 4)
    energy = bi.VariationalEnergy(bi.TotalVariation(), ridge=0.1)
    with pytest.raises(ValueError, match="mask"):
        energy.bind(y, deepinv.physics.Inpainting((1, 5, 5), mask=torch.ones(1, 1, 5, 5)))
    with pytest.raises(ValueError, match="img_size"):
        energy.bind(y, deepinv.physics.BlurFFT((1, 5, 5), filter=torch.ones(1, 1, 3, 3)))
    with pytest.raises(ValueError, match="filter"):
        energy.bind(y, deepinv.physics.Blur(filter=torch.ones(1, 3, 3, 3), padding="circular"))
    with pytest.raises(ValueError, match="linear"):
        energy.bind(y, deepinv.physics.Physics())
    with pytest.raises(ValueError, match="2 channels, real and imaginary"):
        energy.bind(y, deepinv.physics.MRI(mask=torch.ones(4, 4)))
    y = torch.zeros(2, 2, 4, 4)
    for mask, match in (
        (torch.ones(5, 4), "mask .* fits"),
        (torch.ones(3, 1, 4, 4), "mask .* fits"),
        (torch.ones(4, 4, dtype=torch.complex64), "real mask"),
        (torch.full((4, 4), math.nan), "finite"),
    ):
        with pytest.raises(ValueError, match=match):
            energy.bind(y, deepinv.physics.MRI(mask=mask))
    for build_bad, match in (
        (lambda: bi.VariationalEnergy(deepinv.optim.TVPrior()), "Regularizer"),
        (lambda: bi.VariationalEnergy(bi.TotalVariation(), ridge=-1), "ridge"),
        (lambda: bi.VariationalEnergy(bi.TotalVariation(), ridge=math.nan), "ridge"),
        (lambda: bi.VariationalEnergy(bi.TotalVariation(), data_fidelity="l1"), "data_fidelity"),
        (lambda: bi.TotalVariation(0.0), "weight"),
        (lambda: bi.TotalVariation(0.1, -1.0), "smoothing"),
        (lambda: bi.TotalVariation(math.nan), "weight"),
        (lambda: bi.TotalVariation(isotropic=False, couple_channels=True), "isotropic"),
        (lambda: bi.Tikhonov(operator="laplace"), "operator"),
    ):
        with pytest.raises(ValueError, match=match):
            build_bad()


def test_constants_follow_the_parameters():
    case = build("tv_isotropic", "denoising")
    before = case.problem.constants()
    with torch.no_grad():
        case.energy.regularizer.log_weight += math.log(2)
        case.energy.regularizer.log_smoothing -= math.log(2)
    after = case.problem.constants()
    assert float((after.smoothness[0] - 1) / (before.smoothness[0] - 1)) == pytest.approx(4)
    assert float(after.hessian_lipschitz[0] / before.hessian_lipschitz[0]) == pytest.approx(8)
    assert float(after.mixed_lipschitz[0] / before.mixed_lipschitz[0]) == pytest.approx(4)


@pytest.mark.parametrize("physics", ["denoising", "blur_circular"])
def test_user_regularizer_is_solved_and_says_that_it_is_not_certified(physics):
    case = build("user", physics)
    assert case.problem.constants().strong_convexity is None
    h = bi.hypergradient(case.problem, bi.SquaredError(), case.x_true, error_tol=1e-8, residual_tol=1e-8)
    assert not h.certified and math.isinf(h.bound) and "UserRegularizer" in h.reason and "constants" in h.reason
    assert h.reason.startswith("not certified")
    grads = []
    for sign in (1, -1):
        with torch.no_grad():
            case.energy.regularizer.log_weight += sign * 1e-4
        x = bi.lower_solvers.NewtonCG().solve(case.problem, None, 1e-12).x
        grads.append(0.5 * float((x - case.x_true).square().sum()) / 2)
        with torch.no_grad():
            case.energy.regularizer.log_weight -= sign * 1e-4
    expected = (grads[0] - grads[1]) / 2e-4
    assert float(h.grad["regularizer.log_weight"]) == pytest.approx(expected, rel=1e-5)


@certified
@pytest.mark.parametrize("algorithm", ["GD", "PGD"])
def test_deepinv_optimizers_reach_our_minimizer(regularizer, algorithm):
    case = build(regularizer, "denoising", smoothing=0.5, size=(6, 6))
    smoothness = float(case.problem.constants().smoothness[0])
    # PGD: explicit step on the regularizer, proximal step on the data term
    order = {"g_first": True} if algorithm == "PGD" else {}
    model = getattr(deepinv.optim, algorithm)(
        prior=case.energy.regularizer,
        data_fidelity=deepinv.optim.L2(),
        lambda_reg=1.0,
        stepsize=1.0 / smoothness,
        max_iter=400,
        **order,
    )
    x = model(case.y, case.physics).detach()
    ours = bi.lower_solvers.NewtonCG().solve(case.problem, None, 1e-12).x
    assert float(norm(x - ours).max()) <= 1e-7 * float(norm(ours).max())
    assert not case.y.requires_grad


def test_constants_follow_parameters_changed_in_any_way():
    regularizer = bi.TotalVariation(weight=0.1, smoothing=0.1)
    y = torch.rand(2, 1, 5, 6, dtype=F64)
    problem = bi.VariationalEnergy(regularizer).bind(y, deepinv.physics.Denoising())
    assert problem.constants() is problem.constants()
    for change in (
        lambda: regularizer.log_weight.data.fill_(1.0),
        lambda: regularizer.log_smoothing.detach().sub_(0.5),
        lambda: setattr(regularizer, "log_weight", torch.nn.Parameter(torch.tensor(2.0, dtype=F64))),
        lambda: regularizer.log_smoothing.requires_grad_(False),
    ):
        change()
        fresh = bi.TotalVariation(
            regularizer.log_weight.exp().item(), regularizer.log_smoothing.exp().item(),
            learn_smoothing=regularizer.log_smoothing.requires_grad,
        )  # fmt: skip
        expected = bi.VariationalEnergy(fresh).bind(y, deepinv.physics.Denoising()).constants()
        for name in ("strong_convexity", "smoothness", "hessian_lipschitz", "mixed_norm", "mixed_lipschitz"):
            torch.testing.assert_close(getattr(problem.constants(), name), getattr(expected, name), rtol=1e-12, atol=0)
