"""The compiled passes over sparse examples against the formulas on dense matrices, in both dtypes, on any threads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bilevel_imaging.energies import LabeledFeatures, WeightedLogisticProblem
from bilevel_imaging.native import SparseExamples, native_kernels

F64 = torch.float64
compiled = pytest.mark.skipif(native_kernels() != "native", reason="no C compiler")


class Dense:
    """Every product by its formula in float64."""

    def __init__(self, features: Tensor, labels: Tensor, w: Tensor, v: Tensor, weights: Tensor):
        hot = torch.nn.functional.one_hot(labels, len(w)).double().T
        z, u = w @ features.T, v @ features.T
        p = torch.softmax(z, 0)
        self.p, self.logits = p, z
        self.cross_entropy = torch.logsumexp(z, 0) - (hot * z).sum(0)
        self.gradient = (weights * (p - hot)) @ features.clone()
        covariances = torch.diag_embed(p.T) - p.T.unsqueeze(2) * p.T.unsqueeze(1)
        self.hessian = (weights * (covariances @ u.T.unsqueeze(2))[:, :, 0].T) @ features
        self.mixed = weights * ((p - hot) * u).sum(0)
        self.gram = features.T @ (weights * (features @ v[0]))


def sample(count: int, width: int, classes: int, density: float, scale: float, dtype: torch.dtype):
    """Features with whole blocks, rows and columns of zeros; labels, two matrices and positive weights."""
    g = torch.Generator().manual_seed(count + width + classes)
    features = torch.randn(count, width, generator=g, dtype=F64)
    features *= torch.rand(count, width, generator=g) < density
    features[::7] = 0
    features[:, : width // 3] = 0
    labels = torch.randint(0, classes, (count,), generator=g)
    w, v = scale * torch.randn(2, classes, width, generator=g, dtype=F64)
    weights = torch.rand(count, generator=g, dtype=F64) / count
    return (features.to(dtype), labels, *(t.to(dtype) for t in (w, v, weights)))


def products(features: Tensor, labels: Tensor, w: Tensor, v: Tensor, weights: Tensor) -> dict[str, Tensor]:
    examples = SparseExamples(features, labels)
    with torch.no_grad():
        gradient, rows = examples.gradient(w, weights)
        return {
            "p": examples.planes(rows, len(w)),
            "logits": examples.logits(w),
            "cross_entropy": examples.cross_entropy(w),
            "gradient": gradient,
            "hessian": examples.hessian(v, weights, rows),
            "mixed": examples.mixed(v, weights, rows),
            "gram": examples.gram(v[0], weights),
        }


# less than a block, exactly one, several; one feature; as many classes as there is room for
SIZES = [(1, 1, 2, 1.0), (40, 7, 4, 0.3), (256, 30, 10, 0.2), (700, 41, 16, 0.5), (5000, 12, 3, 1.0)]


@compiled
@pytest.mark.parametrize(("count", "width", "classes", "density"), SIZES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-14), (torch.float32, 1e-6)])
def test_every_product_is_the_dense_one(count, width, classes, density, dtype, tolerance):
    given = sample(count, width, classes, density, 1.0, dtype)
    expected = vars(Dense(given[0].double(), given[1], *(t.double() for t in given[2:])))
    for name, found in products(*given).items():
        assert found.dtype == dtype
        size = float(expected[name].abs().max())
        assert float((found.double() - expected[name]).abs().max()) <= tolerance * max(size, 1e-30), name


@compiled
@pytest.mark.parametrize(("count", "width", "classes", "density"), SIZES[1:])
def test_pixels_of_8_bits_are_kept_as_bytes(count, width, classes, density):
    features, labels, *rest = sample(count, width, classes, density, 1.0, torch.float32)
    pixels = (255 * features).round().clamp(0, 255) / 255
    pixels[-1, -1] = 51 / 255
    expected = vars(Dense(pixels.double(), labels, *(t.double() for t in rest)))
    for name, found in products(pixels, labels, *rest).items():
        size = float(expected[name].abs().max())
        assert float((found.double() - expected[name]).abs().max()) <= 1e-6 * max(size, 1e-30), name
    for changed in (pixels + 1e-4 * (pixels > 0), -pixels, 2 * pixels):
        found = products(changed, labels, *rest)["logits"].double()
        assert float((found - rest[0].double() @ changed.T.double()).abs().max()) <= 1e-6 * float(found.abs().max())


@compiled
def test_bytes_are_the_very_numbers_that_were_given():
    pixels = torch.arange(256, dtype=torch.float32).unsqueeze(1) / 255
    w = torch.ones(2, 1)
    with torch.no_grad():
        assert torch.equal(SparseExamples(pixels, torch.zeros(256, dtype=torch.int64)).logits(w)[0], pixels[:, 0])


@compiled
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_logits_that_overflow_an_exponential(dtype):
    tolerance = 1e4 * torch.finfo(dtype).eps  # logits of some thousands are rounded
    given = sample(60, 9, 5, 0.7, 1000.0, dtype)
    expected = vars(Dense(given[0].double(), given[1], *(t.double() for t in given[2:])))
    for name, found in products(*given).items():
        assert bool(found.isfinite().all())
        size = float(expected[name].abs().max())
        assert float((found.double() - expected[name]).abs().max()) <= tolerance * size, name


@compiled
def test_not_a_number_is_passed_on():
    features, labels, w, v, weights = sample(40, 7, 4, 1.0, 1.0, torch.float32)
    w[1, 5] = torch.nan
    found = products(features, labels, w, v, weights)
    touched = features[:, 5] != 0
    assert bool(found["cross_entropy"][touched].isnan().all()) and bool(found["p"][:, touched].isnan().all())
    assert bool(found["gradient"].isnan().any())


@compiled
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_bits_do_not_depend_on_the_number_of_threads(dtype):
    given = sample(3000, 25, 10, 0.2, 1.0, dtype)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(products(*given))
    finally:
        torch.set_num_threads(before)
    for name, value in found[0].items():
        assert all(torch.equal(value, other[name]) for other in found[1:]), name


@pytest.mark.parametrize("classes", [4, 17])
def test_energy_is_the_same_with_and_without_compiled_code(monkeypatch, classes):
    """Beside the energy's own formulas in PyTorch; for more classes than there is room for these are used anyway."""
    features, labels, w, v, weights = sample(90, 12, classes, 0.3, 1.0, F64)
    theta = (90 * weights).logit().requires_grad_(True)

    def everything() -> list[Tensor]:
        problem = WeightedLogisticProblem(LabeledFeatures(features, labels, classes), theta, ridge=1e-2)
        linearization = problem.linearize(w[None])
        q, radius = v[None], torch.ones(1, dtype=F64)
        directional = linearization.directional(q, radius)
        with torch.no_grad():
            values = [problem.value(w[None]), problem.grad(w[None]), problem.constants().smoothness]
        return [
            *values,
            linearization.grad,
            linearization.hvp(q),
            linearization.mixed_vjp(q)["theta"],
            linearization.mixed_norm_bound(),
            directional.hessian,
            directional.mixed,
        ]

    fast = everything()
    monkeypatch.setattr("bilevel_imaging.native.serves", lambda *tensors: False)
    for a, b in zip(fast, everything(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)
