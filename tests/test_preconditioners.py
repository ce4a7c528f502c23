"""Fourier and cosine transforms against scipy, preconditioners against the matrices that they invert."""

from __future__ import annotations

import math

import deepinv
import pytest
import scipy.fft
import torch
from torch import Tensor

import bilevel_imaging as bi
from bilevel_imaging import transforms
from bilevel_imaging.linear_solvers import ConjugateGradient, assemble_hessian, preconditioners
from bilevel_imaging.native import library
from bilevel_imaging.regularizers.differences import divergence, forward_differences

F32, F64 = torch.float32, torch.float64
SIZES = [(1, 1), (1, 7), (6, 1), (2, 3), (8, 9), (5, 4), (16, 16), (31, 64)]


def draw(*shape: int, dtype: torch.dtype = F64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def normal_operator(v: Tensor, boundary: str) -> Tensor:
    """D^T D v, D the differences of the regularizers (Neumann) or the cyclic ones."""
    if boundary == "neumann":
        return -divergence(forward_differences(v))
    return sum(2 * v - v.roll(1, axis) - v.roll(-1, axis) for axis in (-1, -2))


def matrix_of(function, shape: tuple[int, ...]) -> Tensor:
    columns = [function(unit.reshape(1, *shape)).flatten() for unit in torch.eye(math.prod(shape), dtype=F64)]
    return torch.stack(columns, 1)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [F32, F64])
def test_cosine_transform_equals_scipy(size, dtype):
    x = draw(3, 2, *size, dtype=dtype)
    accuracy = 1e-5 if dtype == F32 else 1e-13
    expected = torch.from_numpy(scipy.fft.dctn(x.double().numpy(), axes=(-2, -1), norm="ortho"))
    spectrum = transforms.dct2(x)
    assert spectrum.dtype == dtype
    torch.testing.assert_close(spectrum.double(), expected, atol=accuracy, rtol=0)
    torch.testing.assert_close(transforms.inverse_dct2(spectrum), x, atol=accuracy, rtol=0)
    expected = torch.from_numpy(scipy.fft.idctn(x.double().numpy(), axes=(-2, -1), norm="ortho"))
    torch.testing.assert_close(transforms.inverse_dct2(x).double(), expected, atol=accuracy, rtol=0)


def test_transforms_are_differentiable_in_every_mode():
    with torch.inference_mode():
        transforms.dct2(draw(1, 1, 10, 23))
    x = draw(2, 1, 10, 23).requires_grad_()
    assert torch.autograd.gradcheck(transforms.dct2, x) and torch.autograd.gradcheck(transforms.inverse_dct2, x)


@pytest.mark.parametrize("size", SIZES)
def test_fourier_transform_equals_torch(size):
    x = draw(3, 2, *size)
    torch.testing.assert_close(transforms.rfft2(x), torch.fft.rfft2(x), atol=1e-12, rtol=0)
    torch.testing.assert_close(transforms.inverse_rfft2(transforms.rfft2(x), size[1]), x, atol=1e-13, rtol=0)


@pytest.mark.parametrize("size", SIZES)
def test_fourier_coordinates_are_an_isometry_times_a_response(size):
    u, v, response = draw(2, 1, *size), draw(2, 1, *size, seed=1), draw(1, 1, size[0], size[1] // 2 + 1, seed=2)
    found = (
        (transforms.fourier_coordinates(u, response) * transforms.fourier_coordinates(v, response)).flatten(1).sum(1)
    )
    expected = (u * filtered_by_all_frequencies(v, response.square())).flatten(1).sum(1)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


def filtered_by_all_frequencies(v: Tensor, response: Tensor) -> Tensor:
    """With ``fft2``: a frequency that the real transform leaves out has the response of its mirror image."""
    height, width = v.shape[-2:]
    rows, columns = torch.arange(height)[:, None], torch.arange(width)[None, :]
    mirrored = columns > width // 2
    whole = response[..., torch.where(mirrored, -rows % height, rows), torch.where(mirrored, width - columns, columns)]
    # a frequency whose mirror image is in the same column of the real transform counts with the mean of both
    mirror = whole[..., -rows % height, -columns % width]
    return torch.fft.ifft2(0.5 * (whole + mirror) * torch.fft.fft2(v)).real


@pytest.mark.parametrize("size", SIZES)
def test_laplacians_are_diagonal(size):
    v = draw(2, 1, *size)
    neumann = transforms.cosine_filter(v, transforms.neumann_laplacian(v))
    torch.testing.assert_close(neumann, normal_operator(v, "neumann"), atol=1e-12, rtol=0)
    periodic = transforms.fourier_filter(v, transforms.periodic_laplacian(v))
    torch.testing.assert_close(periodic, normal_operator(v, "periodic"), atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("size", [(5, 4), (7, 11), (8, 9), (31, 64), (64, 64), (48, 50)])
@pytest.mark.parametrize("channels", [1, 3])
def test_same_bits_alone_and_in_a_batch(dtype, size, channels):
    x = draw(5, channels, *size, dtype=dtype)
    cosine = preconditioners.cosine(1 + transforms.neumann_laplacian(x))
    fourier = preconditioners.fourier(1 + transforms.periodic_laplacian(x))
    for function in (transforms.rfft2, transforms.dct2, transforms.inverse_dct2, cosine, fourier):
        together = function(x)
        for i in range(5):
            assert torch.equal(function(x[i : i + 1].clone())[0], together[i])


@pytest.mark.parametrize("kind", ["cosine", "fourier"])
def test_models_are_inverse_matrices(kind):
    shape = (1, 5, 6)
    v = draw(1, *shape)
    if kind == "cosine":
        operator = lambda u: 1.5 * u + 0.7 * normal_operator(u, "neumann")  # noqa: E731
        precondition = preconditioners.cosine(1.5 + 0.7 * transforms.neumann_laplacian(v))
    else:
        operator = lambda u: 1.5 * u + 0.7 * normal_operator(u, "periodic")  # noqa: E731
        precondition = preconditioners.fourier(1.5 + 0.7 * transforms.periodic_laplacian(v))
    inverse = matrix_of(precondition, shape)
    torch.testing.assert_close(inverse, torch.linalg.inv(matrix_of(operator, shape)), atol=1e-13, rtol=0)
    torch.testing.assert_close(inverse, inverse.T, atol=1e-14, rtol=0)


def test_jacobi():
    diagonal, v = draw(2, 1, 3, 4).exp(), draw(2, 1, 3, 4, seed=1)
    torch.testing.assert_close(preconditioners.jacobi(diagonal)(v), v / diagonal, atol=0, rtol=1e-15)


@pytest.mark.parametrize("build", [preconditioners.jacobi, preconditioners.fourier, preconditioners.cosine])
@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan])
def test_models_that_are_not_positive_definite_are_refused(build, bad):
    values = torch.ones(4, 4)
    values[1, 2] = bad
    with pytest.raises(ValueError, match="positive"):
        build(values)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_an_exact_model_needs_one_iteration(dtype):
    """Tikhonov denoising has constant coefficients: the cosine model is its Hessian."""
    y = draw(2, 1, 12, 17, dtype=dtype)
    energy = bi.VariationalEnergy(bi.Tikhonov(2.0, operator="gradient"), ridge=0.1)
    linearization = energy.bind(y, deepinv.physics.Denoising()).linearize(y)
    tol = 1e-4 if dtype == F32 else 1e-10
    plain = ConjugateGradient().solve(linearization, y, tol)
    precondition = preconditioners.cosine(1.1 + 2.0 * transforms.neumann_laplacian(y))
    solution = ConjugateGradient(preconditioner=precondition).solve(linearization, y, tol)
    assert solution.converged.all() and solution.iterations.tolist() == [1, 1] and (plain.iterations > 5).all()
    torch.testing.assert_close(solution.q, plain.q, atol=2 * tol, rtol=0)


def test_cosine_model_saves_iterations_on_total_variation():
    rows = torch.arange(24, dtype=F64)
    clean = ((rows[:, None] > 9) & (rows[None, :] > 7)).double().expand(2, 1, 24, 24)
    y = clean + 0.05 * draw(2, 1, 24, 24)
    problem = bi.VariationalEnergy(bi.TotalVariation(0.1, 0.01)).bind(y, deepinv.physics.Denoising())
    x = bi.lower_solvers.NewtonCG().solve(problem, None, 1e-6).x
    linearization = problem.linearize(x)
    # the constant coefficient with the same mean diagonal; that of D^T D is about 4
    diagonal = assemble_hessian(linearization).diagonal(dim1=1, dim2=2).mean(1)
    curvature = ((diagonal - 1) / 4)[:, None, None, None]
    precondition = preconditioners.cosine(1 + curvature * transforms.neumann_laplacian(x))
    plain = ConjugateGradient().solve(linearization, x - clean, 1e-8)
    solution = ConjugateGradient(preconditioner=precondition).solve(linearization, x - clean, 1e-8)
    assert solution.converged.all() and (1.3 * solution.iterations < plain.iterations).all()


def problem_of(kind: str) -> tuple[bi.energies.LowerLevelProblem, Tensor]:
    """A square in noise, of which half the pixels are missing or which a random filter has blurred."""
    n = torch.arange(32, dtype=F64)
    clean = ((n[:, None] > 12) & (n[None, :] > 9)).double()[None, None]
    if kind == "inpainting":
        mask = (torch.rand(clean.shape[1:], generator=torch.Generator().manual_seed(0), dtype=F64) > 0.5).double()
        physics = deepinv.physics.Inpainting(img_size=clean.shape[1:], mask=mask)
    else:
        physics = deepinv.physics.BlurFFT(clean.shape[1:], filter=torch.rand(1, 1, 9, 9, dtype=F64) / 81)
    y = physics.A(clean) + 0.02 * draw(*clean.shape)
    return bi.VariationalEnergy(bi.TotalVariation(0.05, 0.01), ridge=1e-3).bind(y, physics), clean


@pytest.mark.parametrize(("kind", "gain"), [("inpainting", 4), ("deblurring", 4)])
def test_scaled_convolutions_save_most_iterations(kind, gain, monkeypatch):
    """Without compiled code, whose products of masks cost less than the transforms."""
    monkeypatch.setattr(library, "_load", lambda: (None, "off"))
    torch.manual_seed(0)
    problem, clean = problem_of(kind)
    x = bi.lower_solvers.NewtonCG().solve(problem, None, 1e-4).x
    linearization = problem.linearize(x)
    assert linearization.preconditioner() is not None
    plain = ConjugateGradient().solve(linearization, x - clean, 1e-6)
    solution = ConjugateGradient(preconditioner="auto").solve(linearization, x - clean, 1e-6)
    assert solution.converged.all() and (gain * solution.iterations < plain.iterations).all()
    torch.testing.assert_close(solution.q, plain.q, rtol=0, atol=2e-3)  # 1e-6 over the ridge, twice
