"""Linear operators without an exact spectrum: true bounds of their norm, adjoints, parts, and certified results."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import deepinv
import pytest
import torch
from deepinv.physics import Blur, BlurFFT, Downsampling, Inpainting, LinearPhysics, MultiCoilMRI, Tomography
from dense import dense, drawn, kernel, maps, smoothed_tv, tomography, true_hypergradient
from torch import Tensor

import bilevel_imaging as bi
from bilevel_imaging.errors import NotStronglyConvexError
from bilevel_imaging.tensors import norm

F32, F64 = torch.float32, torch.float64


# the largest factor between the bound and ||A||^2 that is accepted
TIGHT, SIGNED, SIGNED_PADDED, COILS = 1.05, 1.5, 3.0, 4.0
Entry = tuple[Callable[[], LinearPhysics], tuple[int, ...], float]
OPERATORS: dict[str, Entry] = {
    **{
        f"blur_{padding}_{name}": (
            lambda p=padding, k=k, fft=fft: Blur(k, padding=p, use_fft=fft),
            (2, k.shape[1], 6, 7),
            TIGHT if name != "signed" else SIGNED_PADDED if padding in ("replicate", "reflect") else SIGNED,
        )
        for padding in ("valid", "constant", "replicate", "reflect")
        for name, k, fft in (
            ("positive", kernel(), False),
            ("even_color", kernel(1, 2, 4), False),
            ("even_fft", kernel(1, 1, 4), True),
            ("signed", kernel(signed=True), False),
        )
    },
    **{
        f"downsampling_{padding}_{name}": (
            lambda p=padding, f=f: Downsampling((1, 8, 8), filter=f, factor=2, padding=p).double(),
            (2, 1, 8, 8),
            TIGHT if padding == "circular" or name != "bicubic" else SIGNED_PADDED,
        )
        for padding in ("circular", "constant", "reflect")
        for name, f in (("none", None), ("bilinear", "bilinear"), ("bicubic", "bicubic"), ("own", kernel(size=3)))
    },
    "downsampling_odd": (
        lambda: Downsampling((1, 7, 9), filter=kernel(signed=True), factor=2),
        (2, 1, 7, 9),
        SIGNED_PADDED,
    ),
    "downsampling_valid": (
        lambda: Downsampling((1, 8, 9), filter=kernel(), factor=3, padding="valid"),
        (2, 1, 8, 9),
        TIGHT,
    ),
    "downsampling_wrapped": (  # deepinv's filter is larger than the image
        lambda: Downsampling((1, 8, 8), filter="gaussian", factor=2, padding="circular").double(),
        (2, 1, 8, 8),
        TIGHT,
    ),
    "downsampling_no_size": (lambda: Downsampling(filter=kernel(), factor=3), (2, 1, 6, 9), TIGHT),
    "tomography": (tomography, (2, 1, 7, 7), TIGHT),
    "tomography_circle": (lambda: tomography(circle=True), (2, 1, 7, 7), TIGHT),
    "tomography_sequential": (lambda: tomography(angles=2, parallel_computation=False), (2, 1, 7, 7), TIGHT),
    "tomography_fan": (lambda: tomography(fan_beam=True, fan_parameters={"n_detector_pixels": 9}), (2, 2, 7, 7), TIGHT),
    "coils_full": (lambda: MultiCoilMRI(torch.ones(5, 6), maps(1, 3, 5, 6)), (2, 2, 5, 6), 1.0 + 1e-8),
    "coils_masked": (lambda: MultiCoilMRI((drawn(5, 6) > 0.4).float(), maps(1, 3, 5, 6)), (2, 2, 5, 6), COILS),
    "coils_weighted": (lambda: MultiCoilMRI(drawn(1, 2, 5, 6), maps(2, 3, 5, 6)), (2, 2, 5, 6), COILS),
}
operators = pytest.mark.parametrize("name", OPERATORS)
# one of every kind, for what is slower
KINDS = (
    "blur_valid_positive", "blur_reflect_signed", "downsampling_circular_bicubic", "tomography", "coils_masked",
)  # fmt: skip
kinds = pytest.mark.parametrize("name", KINDS)

# filters, masks and coil maps of one image each
PER_IMAGE: dict[str, tuple[Callable[[], LinearPhysics], tuple[int, ...]]] = {
    "inpainting": (lambda: Inpainting((1, 6, 6), mask=(drawn(3, 1, 6, 6) > 0.4).double()), (3, 2, 6, 6)),
    "blur_fft": (lambda: BlurFFT((2, 6, 7), filter=kernel(3)), (3, 2, 6, 7)),
    "blur_circular": (lambda: Blur(kernel(3), padding="circular"), (3, 2, 6, 7)),
    "blur_valid": (lambda: Blur(kernel(3, signed=True), padding="valid"), (3, 2, 6, 7)),
    "blur_reflect": (lambda: Blur(kernel(3), padding="reflect"), (3, 2, 6, 7)),
    "downsampling": (lambda: Downsampling((1, 6, 8), filter=kernel(3), factor=2), (3, 1, 6, 8)),
    "mri": (lambda: deepinv.physics.MRI(mask=(drawn(3, 1, 6, 6) > 0.4).double()), (3, 2, 6, 6)),
    "coils": (
        lambda: MultiCoilMRI((drawn(3, 1, 6, 5) > 0.4).double(), maps(3, 2, 6, 5)),
        (3, 2, 6, 5),
    ),
    "user": (lambda: _Weighting(drawn(3, 1, 6, 6, low=0.5)), (3, 1, 6, 6)),
}
per_image = pytest.mark.parametrize("name", PER_IMAGE)


class _Weighting(LinearPhysics):
    """What a user writes: pixels scaled, then neighbors subtracted."""

    def __init__(self, scale: Tensor, shared: Tensor | None = None):
        super().__init__()
        self.register_buffer("scale", scale)
        if shared is not None:
            self.register_buffer("shared", shared)

    def A(self, x: Tensor, **kwargs) -> Tensor:
        z = self.scale * x
        z = z - z.roll(1, -1)
        return torch.einsum("bchw,kh->bckw", z, self.shared.to(z.dtype)) if hasattr(self, "shared") else z

    def A_adjoint(self, y: Tensor, **kwargs) -> Tensor:
        z = torch.einsum("bckw,kh->bchw", y, self.shared.to(y.dtype)) if hasattr(self, "shared") else y
        return self.scale * (z - z.roll(-1, -1))


def made(name: str) -> tuple[LinearPhysics, Tensor, Tensor]:
    """(physics, images, noisy measurements) in float64."""
    build, shape = (OPERATORS.get(name) or PER_IMAGE[name])[:2]
    physics, x = build(), drawn(*shape, seed=1)
    y = physics.A(x)
    return physics, x, y + 0.02 * torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype)


def bound_to(physics: LinearPhysics, y: Tensor, ridge: float = 0.05) -> bi.energies.VariationalProblem:
    return bi.VariationalEnergy(bi.TotalVariation(0.05, 0.1), ridge=ridge).bind(y, physics)


# --- constants


@operators
def test_bounds_enclose_the_spectrum_and_are_not_loose(name):
    physics, x, y = made(name)
    data = bound_to(physics, y, ridge=10.0).data
    for sample in range(2):
        singular = torch.linalg.svdvals(dense(physics, x, sample))
        largest = float(singular[0]) ** 2
        smallest = float(singular[-1]) ** 2 if len(singular) == x[0].numel() else 0.0
        assert float(data.highest[sample]) >= largest * (1 - 1e-13)
        assert float(data.highest[sample]) <= largest * OPERATORS[name][2]
        assert float(data.lowest[sample]) <= smallest + 1e-13 * largest


def test_coil_maps_without_a_mask_are_known_exactly():
    physics, x, y = made("coils_full")
    singular = torch.linalg.svdvals(dense(physics, x))
    data = bound_to(physics, y).data
    assert float(data.lowest[0]) == pytest.approx(float(singular[-1]) ** 2, rel=1e-8)
    assert float(data.highest[0]) == pytest.approx(float(singular[0]) ** 2, rel=1e-8)


def test_a_filter_of_both_signs_is_not_taken_for_a_positive_one():
    # its entries add up to 0: a bound from A itself, applied to ones, would be 0
    k = torch.tensor([[0.0, -1, 0], [-1, 4, -1], [0, -1, 0]], dtype=F64).reshape(1, 1, 3, 3)
    for padding in ("valid", "reflect", "replicate", "constant"):
        physics = Blur(k, padding=padding)
        x = drawn(1, 1, 6, 6)
        largest = float(torch.linalg.svdvals(dense(physics, x))[0]) ** 2
        assert largest <= float(bound_to(physics, physics.A(x), ridge=1.0).data.highest) <= 2 * largest


@pytest.mark.parametrize("normalize", [True, False])
def test_float32_tomography_is_bounded_too(normalize):
    physics = tomography(normalize=normalize, dtype=F32)
    x = drawn(1, 1, 7, 7).float()
    largest = float(torch.linalg.svdvals(dense(physics, x).double())[0]) ** 2
    assert largest <= float(bound_to(physics, physics.A(x)).data.highest) <= TIGHT * largest


@pytest.mark.parametrize("physics", [_Weighting(drawn(1, 1, 8, 8)), deepinv.physics.SinglePixelCamera(9, (1, 8, 8))])
def test_unknown_norms_are_named_and_do_not_stop_a_certificate(physics):
    x = drawn(2, 1, 8, 8)
    problem = bound_to(physics.double(), physics.double().A(x))
    constants = problem.constants()
    assert constants.smoothness is None and type(physics).__name__ in constants.reason
    h = bi.hypergradient(problem, bi.SquaredError(), x, relative=0.1)
    assert h.certified and math.isfinite(h.bound)


def test_a_subclass_is_not_trusted_to_be_what_it_inherits():
    class Twice(Blur):
        def A(self, x, **kwargs):
            return 2 * super().A(x, **kwargs)

        def A_adjoint(self, y, **kwargs):
            return 2 * super().A_adjoint(y, **kwargs)

    physics = Twice(kernel(), padding="reflect")
    assert bound_to(physics, physics.A(drawn(1, 1, 6, 6))).constants().smoothness is None


# --- adjoints, shapes, dtypes


def test_an_adjoint_that_is_not_the_transpose_is_refused():
    for physics in (
        tomography(width=9, adjoint_via_backprop=False),
        LinearPhysics(A=lambda x, **k: x.roll(1, -1), A_adjoint=lambda y, **k: y.roll(1, -1)),
        LinearPhysics(A=lambda x, **k: x, A_adjoint=lambda y, **k: y * (1 + 1e-8)),
    ):
        x = drawn(2, 1, 9, 9)
        with pytest.raises(ValueError, match="transpose of A"):
            bound_to(physics, physics.A(x))


def test_misfits_are_one_sentence():
    energy = bi.VariationalEnergy(bi.TotalVariation(), ridge=0.1)
    with pytest.raises(ValueError, match="Tomography, its argument dtype"):
        energy.bind(drawn(1, 1, 10, 5), tomography(dtype=F32))
    with pytest.raises(ValueError, match="Blur can be applied to.*b=2 and B=3"):
        energy.bind(drawn(3, 1, 6, 6), Blur(kernel(2), padding="reflect"))
    with pytest.raises(ValueError, match="Downsampling can be applied to"):
        energy.bind(drawn(1, 1, 3, 3), Downsampling((1, 8, 8), filter=kernel(), factor=2))
    with pytest.raises(ValueError, match="filter is None"):
        energy.bind(drawn(1, 1, 6, 6), Blur(padding="reflect"))
    with pytest.raises(ValueError, match="MultiCoilMRI can be applied to"):
        energy.bind(drawn(1, 2, 5, 6), MultiCoilMRI(torch.ones(5, 6), maps(1, 3, 5, 6)))
    with pytest.raises(ValueError, match="images .B, C, H, W."):
        energy.bind(drawn(2, 5), LinearPhysics(A=lambda x, **k: x, A_adjoint=lambda y, **k: y))
    with pytest.raises(ValueError, match="finite entries"):
        energy.bind(drawn(1, 1, 6, 6), Blur(torch.full((1, 1, 3, 3), math.nan, dtype=F64), padding="reflect"))


def test_the_ridge_that_is_asked_for_fits_the_operator():
    physics = tomography(width=16, angles=30)
    y = physics.A(drawn(1, 1, 16, 16))
    with pytest.raises(NotStronglyConvexError) as caught:
        bound_to(physics, y, ridge=0.0)
    bound_to(physics, y, ridge=float(str(caught.value).split("ridge=")[1].split(")")[0]))


@operators
def test_double_is_the_same_operator(name):
    physics, x, y = made(name)
    if isinstance(physics, Tomography):
        physics = tomography(fan_beam=physics.fan_beam, dtype=F32, fan_parameters={"n_detector_pixels": 9})
        y = physics.A(x.float())
    problem = bound_to(physics.float() if not isinstance(physics, MultiCoilMRI) else _single(physics), y.float())
    exact = problem.double()
    assert exact is not None and exact.dtype == F64 and exact.cost is problem.cost
    z = drawn(*x.shape, seed=4).float()
    error = norm(problem.grad(z).double() - exact.grad(z.double()))
    assert bool((error <= problem.gradient_rounding(z)).all())
    assert float(error.detach().max()) > 0 and problem.grad(z).dtype == F32
    assert exact.data.highest is not None and bool((exact.data.highest == problem.data.highest).all())


def _single(physics: MultiCoilMRI) -> MultiCoilMRI:
    return MultiCoilMRI(physics.mask.float(), physics.coil_maps.to(torch.complex64))


def test_double_is_not_claimed_of_numbers_kept_elsewhere():
    matrix = torch.eye(6)  # in a closure, where nothing can convert it
    physics = LinearPhysics(A=lambda x, **k: x @ matrix, A_adjoint=lambda y, **k: y @ matrix.T)
    problem = bound_to(physics, drawn(2, 1, 6, 6).float())
    assert problem.double() is None


@operators
def test_start_is_the_best_multiple_of_the_back_projection(name):
    physics, x, y = made(name)
    problem = bound_to(physics, y, ridge=10.0)
    start, back = problem.initial(), physics.A_adjoint(y)
    for i in range(2):
        ratio = float((start[i] * back[i]).sum() / back[i].square().sum())
        assert torch.allclose(start[i], ratio * back[i])
    misfit = problem.data.value(start)
    for factor in (0.99, 1.01):
        assert bool((problem.data.value(factor * start) > misfit).all())
    zero = bound_to(physics, 0 * y, ridge=10.0).initial()
    assert bool((zero == 0).all())


# --- one by one


@pytest.mark.slow
@per_image
def test_parameters_of_one_image_each(name):
    physics, x, y = made(name)
    problem = bound_to(physics, y)
    v = drawn(*x.shape, seed=5)
    index = torch.tensor([2, 0])
    part = problem.subset(index)
    for i in range(3):
        matrix = dense(physics, x, i)
        gradient = (matrix.T @ (matrix @ x[i].flatten() - y[i].flatten())).reshape(x[i].shape)
        assert torch.allclose(problem.data.grad(x)[i], gradient, atol=1e-12)
    assert torch.allclose(part.grad(x[index]), problem.grad(x)[index], atol=1e-13)
    assert torch.allclose(part.linearize(x[index]).hvp(v[index]), problem.linearize(x).hvp(v)[index], atol=1e-13)
    assert torch.allclose(part.initial(), problem.initial()[index], atol=1e-13)
    again = part.subset(torch.tensor([1]))
    assert torch.allclose(again.grad(x[:1]), problem.grad(x)[:1], atol=1e-13)
    if problem.data.highest is not None:
        assert torch.equal(part.data.highest, problem.data.highest[index])
    # tolerances so different that samples finish one after the other
    tol = torch.tensor([1e-2, 1e-10, 1e-6], dtype=F64)
    for solver in bi.lower_solvers.LOWER_SOLVERS.values():
        solution = solver(max_iter=4000).solve(problem, None, tol)
        assert bool(solution.converged.all())
        assert bool((norm(problem.grad(solution.x)) <= 0.05 * tol * (1 + 1e-6)).all())


def test_a_shared_tensor_that_happens_to_have_the_size_of_the_batch():
    x = drawn(3, 1, 3, 6)
    physics = _Weighting(drawn(1, 1, 3, 6, low=0.5), drawn(3, 3, seed=7))
    problem = bound_to(physics, physics.A(x))
    part = problem.subset(torch.tensor([1]))
    assert torch.allclose(part.grad(x[1:2]), problem.grad(x)[1:2], atol=1e-13)
    # so that its parts look like the whole
    physics = _Weighting(torch.ones(3, 6, dtype=F64))
    problem = bound_to(physics, physics.A(x))
    for index in (torch.tensor([2, 0]), torch.tensor([1])):
        assert torch.allclose(problem.subset(index).grad(x[index]), problem.grad(x)[index], atol=1e-13)
    # and one that is not, next to it: what can't be told apart is not taken apart
    physics = _Weighting(drawn(3, 1, 3, 6, low=0.5), drawn(3, 3, seed=7))
    assert bound_to(physics, physics.A(x)).subset(torch.tensor([1])) is None


def test_the_physics_of_the_caller_is_left_alone():
    physics = MultiCoilMRI((drawn(2, 1, 5, 6) > 0.4).float(), maps(2, 3, 5, 6).to(torch.complex64))
    physics.noise_model = deepinv.physics.GaussianNoise(0.1, rng=torch.Generator())
    before = {n: b.clone() for n, b in physics.named_buffers()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        problem = bound_to(physics, physics.A(drawn(2, 2, 5, 6).float()))
        problem.double().subset(torch.tensor([1]))
        problem.subset(torch.tensor([0]))
    for name, b in physics.named_buffers():
        assert torch.equal(b, before[name]) and b.dtype == before[name].dtype


# --- certified hypergradients


@kinds
def test_certified_hypergradients(name):
    physics, x, y = made(name)
    regularizer = bi.TotalVariation(0.05, 0.1)
    problem = bi.VariationalEnergy(regularizer, ridge=0.05).bind(y, physics)
    theta = torch.stack([regularizer.log_weight, regularizer.log_smoothing]).detach()
    expected = []
    for i in range(2):
        matrix = dense(physics, x, i)

        def energy(z: Tensor, p: Tensor, i=i, matrix=matrix) -> Tensor:
            misfit = matrix @ z.flatten() - y[i].flatten()
            return misfit.square().sum() / 2 + smoothed_tv(z, *p.exp()) + 0.025 * z.square().sum()

        expected.append(true_hypergradient(energy, theta, x[i]))
    expected = sum(expected) / 2
    for accuracy in ({"relative": 0.1}, {"relative": 1e-4}, {"error_tol": 1e-2, "residual_tol": 1e-2}):
        h = bi.hypergradient(problem, bi.SquaredError(), x, **accuracy)
        found = torch.stack(list(h.grad.values()))
        assert h.certified, h.reason
        assert float((found - expected).norm()) <= h.bound * (1 + 1e-9) + 1e-12
        if "relative" in accuracy:
            assert h.bound <= accuracy["relative"] * float(found.norm())


@pytest.mark.parametrize(
    "build",
    [
        lambda: (tomography(dtype=F32, normalize=True), (2, 1, 7, 7)),
        lambda: (Downsampling((1, 8, 8), filter="bicubic", factor=2, padding="reflect"), (2, 1, 8, 8)),
        lambda: (_single(MultiCoilMRI((drawn(5, 6) > 0.4).double(), maps(2, 3, 5, 6))), (2, 2, 5, 6)),
    ],
    ids=["tomography", "downsampling", "coils"],
)
def test_float32_hypergradients_are_certified_for_the_stored_numbers(build):
    physics, shape = build()
    x = drawn(*shape, seed=1).float()
    problem = bound_to(physics, physics.A(x) + 0.02)
    truth = bi.hypergradient(problem.double(), bi.SquaredError(), x.double(), error_tol=1e-11, residual_tol=1e-11)
    assert truth.certified and truth.relative_bound < 1e-7
    h = bi.hypergradient(problem, bi.SquaredError(), x, relative=0.1)
    error = torch.stack([h.grad[name] - truth.grad[name] for name in h.grad]).norm()
    assert h.certified and h.relative_bound <= 0.1
    assert float(error) <= h.bound + truth.bound
