"""Learned weights of the data term: definition, derivatives, constants under attack, certified hypergradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from deepinv.physics import MRI, Blur, BlurFFT, Denoising, Inpainting, LinearPhysics
from dense import dense, drawn, kernel, smoothed_tv, tomography, true_hypergradient
from torch import Tensor

import bilevel_imaging as bi
from bilevel_imaging.data import ImagePairs
from bilevel_imaging.energies import DataWeight, FrequencyWeights, NoiseWeight, SamplingMask, VariationalProblem
from bilevel_imaging.energies.weighted_terms import MAX_COLUMNS
from bilevel_imaging.tensors import inner, norm
from bilevel_imaging.training import evaluation
from bilevel_imaging.training.sampling import compare_patterns, describe_patterns, losses_without, patterns

F32, F64 = torch.float32, torch.float64


def varied(weight: DataWeight) -> DataWeight:
    """Away from its constant start."""
    with torch.no_grad():
        p = weight.parameter
        p += 0.5 * torch.randn(p.shape, generator=torch.Generator().manual_seed(6), dtype=p.dtype)
    return weight


def mask(seed: int = 0) -> Tensor:
    return (drawn(1, 1, 5, 6, seed=seed) > 0.4).double()


Build = tuple[Callable[[], DataWeight], Callable[[], LinearPhysics], tuple[int, ...]]
MODELS: dict[str, Build] = {
    "noise_denoising": (NoiseWeight, Denoising, (2, 1, 5, 6)),
    "noise_inpainting": (NoiseWeight, lambda: Inpainting((2, 5, 6), mask=mask()[0]), (2, 2, 5, 6)),
    "noise_blur_fft": (NoiseWeight, lambda: BlurFFT((1, 5, 6), filter=kernel(2)), (2, 1, 5, 6)),
    "noise_blur_reflect": (NoiseWeight, lambda: Blur(kernel(), padding="reflect"), (2, 1, 5, 6)),
    "noise_tomography": (NoiseWeight, lambda: tomography(width=6), (2, 1, 6, 6)),
    "noise_mri": (NoiseWeight, lambda: MRI(mask=mask()), (2, 2, 5, 6)),
    "frequencies_denoising": (lambda: FrequencyWeights((5, 4)), Denoising, (2, 2, 5, 6)),
    "frequencies_denoising_odd": (lambda: FrequencyWeights((6, 3)), Denoising, (2, 1, 6, 5)),
    "frequencies_many": (lambda: FrequencyWeights((8, 5)), Denoising, (2, 1, 8, 8)),
    "frequencies_columns": (lambda: FrequencyWeights((1, 4)), Denoising, (2, 1, 5, 6)),
    "frequencies_blur": (lambda: FrequencyWeights((5, 4)), lambda: BlurFFT((1, 5, 6), filter=kernel(2)), (2, 1, 5, 6)),
    "frequencies_circular": (
        lambda: FrequencyWeights((5, 1)),
        lambda: Blur(kernel(1, 2), padding="circular"),
        (2, 2, 5, 6),
    ),
    "frequencies_mri": (lambda: FrequencyWeights((5, 6)), lambda: MRI(mask=mask()), (2, 2, 5, 6)),
    "mask": (lambda: SamplingMask((5, 6)), lambda: MRI(img_size=(5, 6)).double(), (2, 2, 5, 6)),
    "mask_many": (lambda: SamplingMask((7, 6)), lambda: MRI(img_size=(7, 6)).double(), (2, 2, 7, 6)),
    "mask_lines": (lambda: SamplingMask((1, 6), 0.5), lambda: MRI(mask=drawn(2, 2, 5, 6)), (2, 2, 5, 6)),
}
models = pytest.mark.parametrize("name", MODELS)


@dataclass
class Model:
    weight: DataWeight
    physics: LinearPhysics
    energy: bi.VariationalEnergy
    x: Tensor
    y: Tensor
    problem: VariationalProblem

    @property
    def here(self) -> Tensor:
        """A point that is not the truth."""
        return self.x + 0.1 * torch.randn(self.x.shape, generator=torch.Generator().manual_seed(8), dtype=F64)


def made(name: str, regularizer: bi.Regularizer | None = None, ridge: float = 0.05) -> Model:
    weight, physics, shape = MODELS[name]
    weight, physics, x = varied(weight()), physics(), drawn(*shape, seed=1)
    clean = physics.A(x)
    y = clean + 0.05 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(2), dtype=F64)
    energy = bi.VariationalEnergy(regularizer or bi.TotalVariation(0.05, 0.1), ridge=ridge, data_weight=weight)
    return Model(weight, physics, energy, x, y, energy.bind(y, physics))


def like(x: Tensor, seed: int) -> Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)


def weights(weight: DataWeight, parameter: Tensor) -> Tensor:
    """W of the parameter."""
    return parameter.sigmoid() ** 2 if isinstance(weight, SamplingMask) else parameter.exp()


def misfit(model: Model, residual: Tensor, parameter: Tensor) -> Tensor:
    """1/2 ||W^(1/2) r||^2 of one sample ``(K, ...)``, or in total of several, with full complex transforms."""
    w = weights(model.weight, parameter)
    if isinstance(model.weight, NoiseWeight):
        return 0.5 * w * residual.square().sum()
    if isinstance(model.physics, MRI):
        return 0.5 * (w * residual.square()).sum()
    height, width = residual.shape[-2:]
    spectrum = torch.fft.fft2(residual, norm="ortho")
    half = w.expand(height, width // 2 + 1)
    # every frequency and its mirror image have the weight of the one of them that is kept, their mean if both are
    full = torch.zeros(height, width, dtype=F64)
    for i in range(height):
        for j in range(width):
            kept = [(i, j)] if j <= width // 2 else []
            if (mirror := (-i % height, -j % width))[1] <= width // 2:
                kept.append(mirror)
            full[i, j] = sum(half[k] for k in kept) / len(kept)
    return 0.5 * (full * (spectrum.real.square() + spectrum.imag.square())).sum()


def data_hessian(model: Model, sample: int, parameter: Tensor) -> Tensor:
    """A^T W A of one sample, from the definition: the gradient of 1/2 <r, W r> at the columns of A is W A."""
    matrix = dense(model.physics, model.x, sample)
    leaf = matrix.clone().requires_grad_(True)
    total = misfit(model, leaf.T.reshape(-1, *model.y[sample].shape), parameter)
    (weighted,) = torch.autograd.grad(total, leaf)
    return 0.5 * (matrix.T @ weighted + weighted.T @ matrix)


def jacobian(model: Model, x: Tensor, sample: int) -> Tensor:
    """J of one sample by autograd, ``(pixels, n)``."""
    theta = list(model.problem.theta.values())
    with torch.enable_grad():
        gradient = model.problem.subset(torch.tensor([sample])).grad(x[sample : sample + 1]).flatten()
        rows = [torch.autograd.grad(g, theta, retain_graph=True, materialize_grads=True) for g in gradient]
    return torch.stack([torch.cat([p.flatten() for p in row]) for row in rows])


def pairing(model: Model, x: Tensor, q: Tensor, sample: int) -> Tensor:
    """J(x)^T q of one sample by autograd, ``(n,)``."""
    theta = list(model.problem.theta.values())
    with torch.enable_grad():
        gradient = model.problem.subset(torch.tensor([sample])).grad(x[sample : sample + 1])[0]
        product = torch.autograd.grad((gradient * q[sample]).sum(), theta, materialize_grads=True)
    return torch.cat([p.flatten() for p in product])


def hessian(model: Model, x: Tensor) -> Tensor:
    """``(B, pixels, pixels)``."""
    linearization, d = model.problem.linearize(x), x[0].numel()
    units = torch.eye(d, dtype=F64).reshape(d, 1, *x.shape[1:])
    return torch.stack([linearization.hvp(u.expand_as(x)).flatten(1) for u in units], 2)


# --- definition and derivatives


@models
def test_value_is_the_definition(name):
    model = made(name)
    plain = bi.VariationalEnergy(model.energy.regularizer, ridge=0.05).bind(model.y, model.physics)
    x = model.here
    residual = model.physics.A(x) - model.y
    for i in range(2):
        expected = misfit(model, residual[i], model.weight.parameter)
        difference = model.problem.value(x)[i] - plain.value(x)[i] + 0.5 * residual[i].square().sum()
        assert float(difference.detach()) == pytest.approx(float(expected.detach()), rel=1e-11)


@models
def test_derivatives_agree_with_autograd(name):
    model = made(name)
    problem, x = model.problem, model.here
    v, q = like(x, 3), like(x, 4)
    leaf = x.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(problem.value(leaf).sum(), leaf, create_graph=True)
    linearization = problem.linearize(x)
    torch.testing.assert_close(problem.grad(x), gradient)
    torch.testing.assert_close(linearization.grad, gradient.detach())
    (hvp,) = torch.autograd.grad(inner(v, gradient).sum(), leaf, retain_graph=True)
    torch.testing.assert_close(linearization.hvp(v), hvp)
    mixed = torch.autograd.grad(inner(q, gradient).sum(), list(problem.theta.values()))
    products = linearization.mixed_vjp(q)
    assert list(products) == list(problem.theta) and f"data_weight.{model.weight.name}" in products
    for (key, found), expected in zip(products.items(), mixed, strict=True):
        assert found.shape == problem.theta[key].shape
        torch.testing.assert_close(found, expected)
    columns = linearization.mixed_columns()
    assert (columns is None) == (model.weight.parameter.numel() > MAX_COLUMNS)
    if columns is not None:
        for i in range(2):
            torch.testing.assert_close(columns[i].flatten(1).T, jacobian(model, x, i), atol=1e-13, rtol=1e-9)


@models
def test_mixed_products_are_differences_in_the_parameters(name):
    model = made(name)
    x, q, t = model.here, like(model.x, 4), 1e-5
    product = model.problem.linearize(x).mixed_vjp(q)[f"data_weight.{model.weight.name}"]
    with torch.no_grad():
        p = model.weight.parameter
        direction = like(p, 5)
        ends = []
        for sign in (1, -1):
            p += sign * t * direction
            ends.append(inner(q, model.problem.grad(x)).sum())
            p -= sign * t * direction
        assert float((product * direction).sum()) == pytest.approx(float(ends[0] - ends[1]) / (2 * t), rel=1e-7)


# --- constants


@models
def test_the_spectrum_is_enclosed_at_every_parameter(name):
    model = made(name)
    for _ in range(2):
        constants = model.problem.constants()
        H = hessian(model, model.here)
        eigenvalues = torch.linalg.eigvalsh(0.5 * (H + H.transpose(1, 2)))
        assert bool((constants.strong_convexity <= eigenvalues[:, 0] * (1 + 1e-11)).all())
        assert bool((constants.smoothness >= eigenvalues[:, -1] * (1 - 1e-11)).all())
        # those of the data term alone
        for i in range(2):
            values = torch.linalg.eigvalsh(data_hessian(model, i, model.weight.parameter.detach()))
            assert float(model.problem.data.lowest[i]) <= float(values[0]) + 1e-12
            loose = 1.1 if "reflect" in name or "tomography" in name else 1 + 1e-9
            assert float(values[-1]) * (1 - 1e-12) <= float(model.problem.data.highest[i]) <= loose * float(values[-1])
            if loose < 1.1:
                assert float(model.problem.data.lowest[i]) == pytest.approx(float(values[0]), rel=1e-8, abs=1e-12)
        with torch.no_grad():
            model.weight.parameter.add_(1.0)


@models
def test_norm_of_the_mixed_derivative_is_bounded(name):
    model = made(name)
    linearization = model.problem.linearize(model.here)
    bound = linearization.mixed_norm_bound()
    for i in range(2):
        J = jacobian(model, model.here, i)
        true = float(torch.linalg.matrix_norm(J, ord=2))
        assert true <= float(bound[i]) * (1 + 1e-12) <= 2.5 * true
        own = float(torch.linalg.matrix_norm(J[:, 2:], ord=2))
        assert own <= float(linearization.data_mixed.norm()[i]) <= 1.5 * own


@models
def test_change_along_q_holds_for_the_worst_direction(name):
    model = made(name, bi.Tikhonov(0.1))
    x, q = model.here, like(model.x, 4)
    problem = model.problem
    radius = torch.full((2,), 0.3, dtype=F64)
    along = problem.linearize(x).directional(q, radius)
    together = torch.zeros(2, dtype=F64)
    worst = torch.zeros_like(along.mixed_components)
    for i in range(2):
        # J is affine in x here: (J(x + e) - J(x))^T q = M e exactly
        d = x[0].numel()
        base = pairing(model, x, q, i)
        moves = []
        for e in torch.eye(d, dtype=F64):
            moved = x.clone()
            moved[i] += e.reshape(x[i].shape)
            moves.append(pairing(model, moved, q, i) - base)
        M = torch.stack(moves, 1)
        together[i], worst[i] = torch.linalg.matrix_norm(M, ord=2), M.norm(dim=1)
    assert bool((worst <= along.mixed_components * (1 + 1e-9) + 1e-13).all())
    assert bool((together <= along.mixed * (1 + 1e-9)).all())
    assert bool((along.mixed <= 2 * together).all()) and bool((along.mixed_components <= 2 * worst + 1e-12).all())
    lipschitz = problem.constants().mixed_lipschitz
    assert bool((together <= lipschitz * norm(q) * (1 + 1e-9)).all())


@models
def test_lipschitz_constant_of_the_data_columns_is_attained(name):
    model = made(name)
    term, i = model.problem.data, 0
    # the largest ||(J(x + e) - J(x)) c|| over unit e for one parameter at a time: d/dp_k of the Hessian, differenced
    p, best, t = model.weight.parameter.detach(), 0.0, 1e-4
    for k in range(p.numel()):
        unit = torch.zeros(p.numel(), dtype=F64)
        unit[k] = t
        ends = [data_hessian(model, i, p + s * unit.reshape(p.shape)) for s in (1, -1)]
        best = max(best, float(torch.linalg.matrix_norm(ends[0] - ends[1], ord=2)) / (2 * t))
    assert best <= float(term.mixed_lipschitz[i]) * (1 + 1e-7) <= 2.1 * best


@models
def test_norms_in_the_hessian_hold(name):
    model = made(name)
    x = model.here
    linearization = model.problem.linearize(x)
    H = hessian(model, x)
    mu = model.problem.constants().strong_convexity
    exact = []
    for i in range(2):
        J = jacobian(model, x, i)
        exact.append(J.T @ torch.linalg.solve(H[i], J))
    if linearization.mixed_columns() is not None:
        bounds = linearization.mixed_energy_norms()
        for i in range(2):
            assert bool((exact[i].diagonal().sqrt() <= bounds[i] * (1 + 1e-10)).all())
        return
    blocks = linearization.mixed_block_norms(mu)
    for i in range(2):
        assert bool((exact[i].diagonal()[:2].sqrt() <= blocks[i, :2] * (1 + 1e-10)).all())
        whole = float(torch.linalg.matrix_norm(exact[i][2:, 2:], ord=2)) ** 0.5
        assert whole <= float(blocks[i, 2]) * (1 + 1e-10)


@models
def test_local_change_bounds_what_moves(name):
    model = made(name, bi.Tikhonov(0.1))  # H does not depend on x
    x, q = model.here, like(model.x, 4)
    linearization, H = model.problem.linearize(x), hessian(model, model.here)
    mu = model.problem.constants().strong_convexity
    change = linearization.local_change(q, torch.full((2,), 0.5, dtype=F64), mu)
    blocks = change.slopes.dim() == 2
    assert blocks == (model.weight.parameter.numel() > MAX_COLUMNS)
    for seed in range(5):
        e = like(x, 10 + seed) if seed < 4 else q  # along q itself
        for i in range(2):
            moved = x.clone()
            moved[i] += e[i]
            moved_product = pairing(model, moved, q, i) - pairing(model, x, q, i)
            parts = moved_product[:1], moved_product[1:]
            energy = float(e[i].flatten() @ H[i] @ e[i].flatten()) ** 0.5 * float(change.energy[i])
            sizes = torch.stack([part.norm() for part in parts]) if blocks else moved_product.abs()
            slopes = change.slopes[i] if blocks else change.slopes
            assert bool((sizes <= slopes * energy * (1 + 1e-10)).all())


@models
def test_metric_lies_below_the_hessian_and_is_inverted(name):
    model = made(name)
    metric = model.problem.metric()
    if metric is None:
        assert "reflect" in name or "tomography" in name
        return
    H, d = hessian(model, model.here), model.x[0].numel()
    units = torch.eye(d, dtype=F64).reshape(d, 1, *model.x.shape[1:])
    white = torch.stack([metric.whiten(u.expand_as(model.x)).flatten(1) for u in units], 2).detach()
    for i in range(2):
        M = torch.linalg.inv(white[i].T @ white[i])
        assert float(torch.linalg.eigvalsh(H[i] - M)[0]) >= -1e-11
        assert float(metric.lowest[i]) == pytest.approx(float(torch.linalg.eigvalsh(M)[0]), rel=1e-7)


# --- float32, parts, the caller


@models
def test_float32_is_within_its_rounding_bound(name):
    model = made(name)
    single = {"noise_tomography": lambda: tomography(width=6, dtype=F32)}.get(name, lambda: model.physics.float())()
    problem = model.energy.bind(model.y.float(), single)
    exact = problem.double()
    assert exact.dtype == F64 and list(exact.theta) == list(problem.theta)
    for x in (model.x.float(), model.here.float(), 10 * model.here.float(), problem.initial()):
        error = norm(problem.grad(x).double() - exact.grad(x.double()))
        assert bool((error <= problem.gradient_rounding(x)).all())
        assert problem.grad(x).dtype == F32
    x, q = model.here.float(), like(model.x, 4).float()
    for (key, a), b in zip(
        problem.linearize(x).mixed_vjp(q).items(),
        exact.linearize(x.double()).mixed_vjp(q.double()).values(),
        strict=True,
    ):
        assert a.dtype == problem.theta[key].dtype
        assert float((a - b).norm()) <= 1e-4 * float(b.norm())


@pytest.mark.slow
@models
def test_parts_and_solvers(name):
    model = made(name)
    problem, x, q = model.problem, model.here, like(model.x, 4)
    index = torch.tensor([1])
    part = problem.subset(index)
    torch.testing.assert_close(part.grad(x[index]), problem.grad(x)[index])
    whole, small = problem.linearize(x), problem.linearize(x).subset(index)
    torch.testing.assert_close(small.hvp(q[index]), whole.hvp(q)[index])
    torch.testing.assert_close(small.mixed_norm_bound(), whole.mixed_norm_bound()[index])
    assert torch.equal(part.constants().mixed_lipschitz, problem.constants().mixed_lipschitz[index])
    tol = torch.tensor([1e-2, 1e-9], dtype=F64)
    mu = problem.constants().strong_convexity
    for solver in bi.lower_solvers.LOWER_SOLVERS.values():
        solution = solver(max_iter=4000).solve(problem, None, tol)
        assert bool((norm(problem.grad(solution.x)) <= mu * tol * (1 + 1e-6)).all())


def test_weights_that_are_not_learned_are_no_parameters():
    x, y = drawn(2, 1, 5, 6), drawn(2, 1, 5, 6, seed=1)
    problems = [
        bi.VariationalEnergy(bi.TotalVariation(0.1, 0.1), data_weight=weight).bind(y, Denoising())
        for weight in (NoiseWeight(3.0), NoiseWeight(3.0, learn=False))
    ]
    assert "data_weight.log_weight" not in problems[1].theta
    torch.testing.assert_close(problems[0].grad(x), problems[1].grad(x))
    assert problems[1].linearize(x).mixed_columns().shape[1] == 2
    constants = problems[1].constants()
    assert torch.equal(constants.mixed_lipschitz, bi.TotalVariation(0.1, 0.1).constants(x.shape).mixed_lipschitz)
    h = bi.hypergradient(problems[1], bi.SquaredError(), x, relative=0.1)
    assert h.certified and list(h.grad) == ["regularizer.log_weight", "regularizer.log_smoothing"]


def test_misuse():
    y = drawn(1, 1, 5, 6)
    with pytest.raises(ValueError, match="data_weight as NoiseWeight"):
        bi.VariationalEnergy(bi.TotalVariation(), data_weight=2.0)
    with pytest.raises(ValueError, match="SamplingMask with MRI or MultiCoilMRI. Got Denoising"):
        bi.VariationalEnergy(bi.TotalVariation(), data_weight=SamplingMask((5, 4))).bind(y, Denoising())
    with pytest.raises(ValueError, match="FrequencyWeights with .* Got Inpainting; NoiseWeight fits"):
        physics = Inpainting((1, 5, 6), mask=mask()[0])
        bi.VariationalEnergy(bi.TotalVariation(), ridge=1.0, data_weight=FrequencyWeights((5, 4))).bind(y, physics)
    with pytest.raises(ValueError, match=r"log_weights of FrequencyWeights of shape \(5, 4\).*Got \(5, 6\)"):
        bi.VariationalEnergy(bi.TotalVariation(), data_weight=FrequencyWeights((5, 6))).bind(y, Denoising())
    for build, match in (
        (lambda: NoiseWeight(0.0), "positive"),
        (lambda: FrequencyWeights((5, 6), math.nan), "positive"),
        (lambda: FrequencyWeights((5,)), "two positive lengths"),
        (lambda: SamplingMask((0, 6)), "two positive lengths"),
        (lambda: SamplingMask((5, 6), 1.0), "inside"),
    ):
        with pytest.raises(ValueError, match=match):
            build()


def test_a_norm_that_is_not_known_is_said():
    physics = LinearPhysics(A=lambda x, **k: x - x.roll(1, -1), A_adjoint=lambda y, **k: y - y.roll(-1, -1))
    x = drawn(2, 1, 5, 6)
    problem = bi.VariationalEnergy(bi.TotalVariation(0.1, 0.1), ridge=0.1, data_weight=NoiseWeight()).bind(x, physics)
    h = bi.hypergradient(problem, bi.SquaredError(), x, error_tol=1e-6, residual_tol=1e-6)
    assert not h.certified and "norm of LinearPhysics" in h.reason
    assert "data_weight.log_weight" in h.grad


# --- certified hypergradients


def expected_hypergradient(model: Model) -> Tensor:
    regularizer = model.energy.regularizer
    theta = torch.cat(
        [p.detach().reshape(-1) for p in (regularizer.log_weight, regularizer.log_smoothing, model.weight.parameter)]
    )
    total = 0
    for i in range(2):
        matrix = dense(model.physics, model.x, i)

        def energy(z: Tensor, p: Tensor, i=i, matrix=matrix) -> Tensor:
            residual = (matrix @ z.flatten()).reshape(model.y[i].shape) - model.y[i]
            data = misfit(model, residual, p[2:].reshape(model.weight.parameter.shape))
            return data + smoothed_tv(z, *p[:2].exp()) + 0.025 * z.square().sum()

        total = total + true_hypergradient(energy, theta, model.x[i])
    return total / 2


CERTIFIED = (
    "noise_denoising", "noise_blur_reflect", "noise_tomography", "noise_mri", "frequencies_denoising",
    "frequencies_many", "frequencies_blur", "frequencies_columns", "frequencies_mri", "mask", "mask_many", "mask_lines",
)  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if i % 3 else []) for i, name in enumerate(CERTIFIED)]
)
def test_certified_hypergradients(name):
    model = made(name)
    expected = expected_hypergradient(model)

    def check(h: bi.Hypergradient) -> None:
        found = torch.cat([g.flatten() for g in h.grad.values()])
        assert h.certified, h.reason
        error = (found - expected).abs()
        assert float(error.norm()) <= h.bound * (1 + 1e-9) + 1e-12
        if h.component_bounds is not None:
            bounds = torch.cat([b.flatten() for b in h.component_bounds.values()])
            assert bool((error <= bounds * (1 + 1e-9) + 1e-12).all())

    for relative in (0.1, 1e-4):
        h = bi.hypergradient(model.problem, bi.SquaredError(), model.x, relative=relative)
        check(h)
        assert h.relative_bound <= relative
    for certificate in ("classical", "directional", "local", "polished"):
        check(
            bi.hypergradient(
                model.problem, bi.SquaredError(), model.x, error_tol=1e-3, residual_tol=1e-3, certificate=certificate
            )
        )


@pytest.mark.parametrize("name", ["noise_blur_reflect", "frequencies_blur", "frequencies_many", "mask_lines"])
def test_certified_next_to_a_regularizer_with_many_parameters(name):
    filters = bi.FieldsOfExperts(3, 3, MODELS[name][2][1], weight=0.1, smoothing=0.1)
    model = made(name, filters)
    truth = bi.hypergradient(model.problem, bi.SquaredError(), model.x, error_tol=1e-11, residual_tol=1e-11)
    assert truth.certified and truth.relative_bound < 1e-6
    for certificate in ("auto", "classical", "directional", "local"):
        h = bi.hypergradient(
            model.problem, bi.SquaredError(), model.x, error_tol=1e-2, residual_tol=1e-2, certificate=certificate
        )
        error = torch.cat([(h.grad[key] - truth.grad[key]).flatten() for key in h.grad]).norm()
        assert h.certified and float(error) <= h.bound + truth.bound
    h = bi.hypergradient(model.problem, bi.SquaredError(), model.x, relative=0.1)
    assert h.certified and h.relative_bound <= 0.1


@pytest.mark.parametrize("name", ["noise_blur_fft", "frequencies_blur", "mask_lines"])
def test_a_layer_differentiates_in_the_measurements(name):
    model = made(name)
    layer = bi.BilevelReconstructor(model.energy)
    y = model.y.clone().requires_grad_(True)
    layer(y, model.physics).square().sum().backward()
    direction, t = like(y, 9), 1e-5
    with torch.no_grad():
        ends = [layer(model.y + s * t * direction, model.physics).square().sum() for s in (1, -1)]
    assert float((y.grad * direction).sum()) == pytest.approx(float(ends[0] - ends[1]) / (2 * t), rel=1e-5)


def test_learning_the_weights_lowers_the_loss():
    # noise of another size in every column of k-space: the learned weights tell the noisy columns
    generator = torch.Generator().manual_seed(0)
    x = drawn(2, 2, 8, 6, seed=1)
    physics = MRI(img_size=(8, 6)).double()
    noise = torch.randn(x.shape, generator=generator, dtype=F64) * torch.tensor([0.01, 0.5] * 3, dtype=F64)
    weight = FrequencyWeights((1, 6))
    energy = bi.VariationalEnergy(bi.TotalVariation(0.02, 0.1), data_weight=weight)
    problem = energy.bind(physics.A(x) + noise, physics)
    losses = []
    for _ in range(15):
        h = bi.hypergradient(problem, bi.SquaredError(), x, relative=0.1)
        losses.append(h.loss)
        with torch.no_grad():
            for key, p in problem.theta.items():
                p -= 0.5 * h.grad[key]
    assert losses[-1] < 0.9 * losses[0]
    learned = weight.weights().detach().flatten()
    assert float(learned[::2].min()) > float(learned[1::2].max())


def test_patterns_have_the_same_number_of_columns():
    learned = varied(SamplingMask((1, 32), 0.3))
    losses = torch.rand(32, generator=torch.Generator().manual_seed(3), dtype=F64)
    found = patterns(learned, losses, seed=2)
    count = round(float(learned.mask.detach().sum()))
    assert {name: int(columns.sum()) for name, columns in found.items()} == dict.fromkeys(found, count)
    assert losses[found["learned"] == 1].min() >= losses[found["learned"] == 0].max()
    kept = found["low frequencies"].nonzero().flatten()
    assert kept.tolist() == list(range(int(kept[0]), int(kept[0]) + count)) and 16 in kept
    assert abs(float(kept.double().mean()) - 16) <= 0.5
    assert not torch.equal(found["variable density"], patterns(learned, losses, seed=3)["variable density"])
    with pytest.raises(ValueError, match=r"shape \(1, columns\)"):
        patterns(SamplingMask((32, 1)), losses)


def test_columns_are_ranked_by_what_the_loss_is_without_them():
    """Shrinkage of Fourier coefficients has a closed form; the largest S are not the columns that matter most."""
    alpha, weight = 0.1, varied(SamplingMask((1, 8), 0.5))
    with torch.no_grad():
        weight.logits[0, 4] = -4.0  # the zero frequency, in the middle
    physics = MRI(mask=torch.ones(1, 1, 8, 8, dtype=F64), img_size=(2, 8, 8))
    images = list(5 + like(torch.zeros(2, 2, 8, 8, dtype=F64), 7))
    spectra = [physics.A(x[None])[0] for x in images]
    measured = [y + 0.3 * like(y, 8 + i) for i, y in enumerate(spectra)]
    pairs = ImagePairs(["a", "b"], images, measured, lambda shape: physics)
    found = losses_without(weight, bi.Tikhonov(alpha), pairs)
    w = weight.mask.detach()[0].square()
    both = list(zip(measured, spectra, strict=True))
    kept = 0.5 * sum((w / (w + alpha) * y - z).square().sum((0, 1)) for y, z in both) / 2
    lost = 0.5 * sum(z.square().sum((0, 1)) for z in spectra) / 2
    torch.testing.assert_close(found, kept.sum() - kept + lost, rtol=1e-5, atol=0)
    assert int(found.argmax()) == 4 and int(weight.mask[0].argmin()) == 4
    assert patterns(weight, found)["learned"][4] == 1


def test_the_pattern_of_the_truth_wins(monkeypatch):
    """Images whose columns of k-space are all but 6 nearly zero: a mask that knows them beats the fixed patterns."""
    monkeypatch.setattr(evaluation, "BASELINE_SMOOTHINGS", (0.01,))
    monkeypatch.setattr(evaluation, "GRID", (1e-3,))
    monkeypatch.setattr(evaluation, "REFINEMENTS", 0)
    logits = torch.full((1, 16), -3.0, dtype=F64)
    logits[0, [8, 7, 9, 3, 13, 2]] = 3.0
    weight = SamplingMask((1, 16))
    with torch.no_grad():
        weight.logits.copy_(logits)
    chosen = (weight.mask.detach()[0] > 0.5).double()
    spectrum = like(torch.zeros(3, 16, 16, dtype=torch.complex128), 4) * chosen
    centered = torch.fft.ifft2(torch.fft.ifftshift(spectrum, dim=(-2, -1)), norm="ortho")
    images = [torch.stack([x.real, x.imag]) for x in torch.fft.fftshift(centered, dim=(-2, -1))]
    physics = MRI(mask=torch.ones(1, 1, 16, 16, dtype=F64), img_size=(2, 16, 16))
    names = ["a", "b", "c"]
    pairs = ImagePairs(names, images, [physics.A(x[None])[0] for x in images], lambda shape: physics)
    before = weight.logits.detach().clone()
    found = compare_patterns(weight, bi.TotalVariation(1e-3, 0.01), pairs, pairs.subset([1]), ridge=1e-3)
    assert torch.equal(weight.logits, before) and weight.learned
    best = found["learned"]["psnr"]
    assert found["learned"]["columns"] == chosen.nonzero().flatten().tolist()
    for name in ("low frequencies", "variable density"):
        assert best["zero_filled"] > found[name]["psnr"]["zero_filled"] + 3
        assert best["reconstructed"] > found[name]["psnr"]["reconstructed"] + 3
    assert len(describe_patterns(found)) == 3 and "6 columns" in describe_patterns(found)[0]
