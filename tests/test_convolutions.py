"""Compiled separable convolutions against Fourier transforms, alone and inside the solvers of deblurring."""

import deepinv
import pytest
import torch

import bilevel_imaging as bi
from bilevel_imaging import native
from bilevel_imaging.linear_solvers import ConjugateGradient
from bilevel_imaging.native import convolutions, library
from bilevel_imaging.transforms import fourier_filter

pytestmark = pytest.mark.skipif(native.native_kernels() != "native", reason="no compiled kernels on this machine")
DTYPES = (torch.float32, torch.float64)


def random(shape, seed=0, dtype=torch.float64):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def transfer_of(kernels, shape):
    """rfft2 of kernels ``(B, C, k, l)`` in the corner of images of that shape."""
    padded = torch.zeros((*kernels.shape[:2], *shape), dtype=torch.float64)
    padded[..., : kernels.shape[-2], : kernels.shape[-1]] = kernels
    return torch.fft.rfft2(padded.roll((-1, -2), (-2, -1)))


def gaussian(size, std):
    t = torch.arange(size, dtype=torch.float64) - size // 2
    row = torch.exp(-(t**2) / (2 * std**2))
    return (row[:, None] * row[None, :] / row.sum() ** 2)[None, None]


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(19, 34), (16, 64), (23, 131)])
@pytest.mark.parametrize("kind", ["gaussian", "two terms", "by image and channel"])
def test_like_the_transform(kind, shape, dtype):
    kernels = {
        "gaussian": gaussian(5, 1.1).expand(2, 3, -1, -1),
        "two terms": random((1, 1, 4, 1)) * random((1, 1, 1, 3), 1) + random((1, 1, 4, 1), 2) * random((1, 1, 1, 3), 3),
        "by image and channel": random((2, 3, 5, 1)) * random((2, 3, 1, 3), 1),
    }[kind]
    transfer = transfer_of(kernels, shape).expand(2, 3, -1, -1)
    found = native.separable(transfer, shape[1], dtype)
    assert found.filters.shape[2] == (2 if kind == "two terms" else 1)
    v = random((2, 3, *shape), 5, dtype) - 0.5
    expected = torch.fft.irfft2(torch.fft.rfft2(v.double()) * transfer, s=shape)
    tolerance = 20 * torch.finfo(dtype).eps * float(transfer.abs().max())
    torch.testing.assert_close(found.product(v).double(), expected, rtol=0, atol=tolerance)
    one = found.of(torch.tensor([1])).product(v[1:])
    assert torch.equal(one, found.product(v)[1:])


def test_only_where_it_is_worth_it():
    many_terms = transfer_of(random((1, 1, 9, 9)), (32, 32))
    assert native.separable(many_terms, 32, torch.float32) is None
    power = transfer_of(gaussian(5, 2.0), (9, 40)).abs().square()  # of 9 x 9 taps
    assert native.separable(power, 40, torch.float32).filters.shape[2:] == (1, 2, 9)
    assert native.separable(transfer_of(gaussian(5, 2.0), (8, 40)).abs().square(), 40, torch.float32) is None
    assert native.separable(power, 40, torch.float16) is None


def test_rounded_filters_are_kept_to_their_last_bit():
    """A Gaussian rounded to float32 is a product to float32 accuracy only, which double precision must notice."""
    rounded = transfer_of(gaussian(5, 1.5).float().double(), (32, 32))
    assert native.separable(rounded, 32, torch.float32).filters.shape[2] == 1
    found, v = native.separable(rounded, 32, torch.float64), random((1, 1, 32, 32)) - 0.5
    assert found.filters.shape[2] > 1
    expected = torch.fft.irfft2(torch.fft.rfft2(v) * rounded, s=(32, 32))
    torch.testing.assert_close(found.product(v), expected, rtol=0, atol=2e-15)


def deblurring(dtype, batch=2, channels=1, size=24):
    x = random((batch, channels, size, size + 3), 1, dtype)
    physics = deepinv.physics.BlurFFT((channels, size, size + 3), filter=gaussian(5, 1.2).to(dtype))
    energy = bi.VariationalEnergy(bi.TotalVariation(0.02, 0.05), ridge=0.05)
    return energy.bind(physics.A(x) + 0.01 * random(x.shape, 2, dtype), physics), x


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_hypergradient(dtype, monkeypatch):
    def hypergradient():
        problem, x = deblurring(dtype)
        return problem, bi.hypergradient(problem, bi.SquaredError(), x, relative=1e-4)

    problem, fast = hypergradient()
    assert problem.data.convolution() is not None
    monkeypatch.setattr(library, "_load", lambda: (None, "off"))
    _, slow = hypergradient()
    difference = torch.stack([(fast.grad[n] - slow.grad[n]).double() for n in slow.grad]).norm()
    assert fast.certified and slow.certified
    assert float(difference) <= fast.bound + slow.bound
    assert abs(fast.loss - slow.loss) <= 1e-4 * slow.loss


@pytest.mark.parametrize("channels", [1, 3])
def test_whole_runs_of_conjugate_gradients(channels):
    """The residual that the solver reports is that of the Fourier transforms; threads and batches change nothing."""
    problem, x = deblurring(torch.float64, 3, channels)
    at = problem.linearize(x)
    rhs = random(x.shape, 4) - 0.5
    before, threads, results = problem.cost.copy(), torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            solution = ConjugateGradient(preconditioner="auto").solve(at, rhs, 1e-9)
            results.append(solution.q)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    spent = problem.cost - before
    assert spent.hvps > 3 * int(solution.iterations.sum()) and spent.forward_ops == 2 * spent.hvps
    with torch.no_grad():
        regularizer = at.inside.inside.hvp(solution.q)
        exact = fourier_filter(solution.q, problem.data.power) + 0.05 * solution.q + regularizer
    assert float((rhs - exact).flatten(1).norm(dim=1).max()) < 1.001e-9
    alone = ConjugateGradient(preconditioner="auto").solve(at.subset(torch.tensor([1])), rhs[1:2], 1e-9)
    assert torch.equal(alone.q, results[0][1:2])


def test_filters_are_taken_apart_once(monkeypatch):
    """A and A^T A in the dtype of the data and in that of the certificates, however many hypergradients there are."""
    calls, separable = [], native.separable

    def counted(*args):
        calls.append(args)
        return separable(*args)

    monkeypatch.setattr(native, "separable", counted)
    problem, x = deblurring(torch.float32)
    bi.hypergradient(problem, bi.SquaredError(), x, relative=0.1)
    first = len(calls)
    bi.hypergradient(problem, bi.SquaredError(), x, relative=0.1)
    assert 2 <= first <= 4 and len(calls) == first


def test_decompositions_are_kept_by_what_they_are_of():
    """The same filter again costs nothing; another one, or one changed in place, is decomposed anew."""
    convolutions._KNOWN.clear()
    kernel = torch.rand(1, 1, 3, 3, dtype=torch.float64)
    for count, factor in ((1, 1), (1, 1), (2, 2), (2, 0.5), (3, 4)):
        kernel.mul_(factor)
        transfer = torch.fft.rfft2(torch.nn.functional.pad(kernel, (0, 9, 0, 9)))
        found = native.separable(transfer.expand(2, 3, -1, -1), 12, torch.float64)
        assert len(convolutions._KNOWN) == count
        v = torch.rand(2, 3, 12, 12, dtype=torch.float64)
        exact = torch.fft.irfft2(torch.fft.rfft2(v) * transfer, s=(12, 12))
        torch.testing.assert_close(found.product(v), exact, atol=1e-12, rtol=0)
