"""What is asked of a regularizer and its parameters before anything is computed, and of the ``fn`` of a user."""

from __future__ import annotations

import math

import deepinv
import pytest
import torch
from torch import Tensor, nn

import bilevel_imaging as bi
from bilevel_imaging.regularizers import HuberTotalVariation, LinearSpline
from bilevel_imaging.tensors import inner

F32, F64 = torch.float32, torch.float64
PHYSICS = deepinv.physics.Denoising()
GENERATOR = torch.Generator().manual_seed(0)
X = torch.rand(2, 1, 6, 7, dtype=F64, generator=GENERATOR)
Y = X + 0.1 * torch.randn(2, 1, 6, 7, dtype=F64, generator=GENERATOR)


def gradient(regularizer, dtype: torch.dtype = F64, relative: float = 1e-4) -> dict[str, Tensor]:
    problem = bi.VariationalEnergy(regularizer).bind(Y.to(dtype), PHYSICS)
    return bi.hypergradient(problem, bi.SquaredError(), X.to(dtype), relative=relative).grad


def bind(regularizer, dtype: torch.dtype = F64):
    return bi.VariationalEnergy(regularizer).bind(Y.to(dtype), PHYSICS)


def set_again(module: nn.Module, name: str) -> None:
    """As a user would exchange a parameter: it comes last in ``named_parameters`` then."""
    value = getattr(module, name).data.clone()
    delattr(module, name)
    setattr(module, name, nn.Parameter(value))


# --- names and order of parameters


@pytest.mark.parametrize(
    "build",
    [
        lambda: bi.TotalVariation(0.1, 0.1),
        lambda: bi.TotalVariation(0.1, 0.1, isotropic=False),
        lambda: HuberTotalVariation(0.1, 0.1),
        lambda: bi.SecondOrderTotalVariation(0.1, 0.1),
        lambda: LinearSpline(0.1, 0.1, learn_weight=True),
        lambda: bi.Sum(bi.Tikhonov(0.1), bi.TotalVariation(0.1, 0.1)),
    ],
    ids=["tv", "tv_anisotropic", "huber", "second_order", "linear_spline", "sum"],
)
def test_a_parameter_set_again_keeps_its_derivative(build):
    expected, regularizer = gradient(build()), build()
    set_again(regularizer.parts[1] if isinstance(regularizer, bi.Sum) else regularizer, "log_weight")
    found = gradient(regularizer)
    assert list(found) == list(expected) == list(bi.VariationalEnergy(regularizer).theta)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=0)


def test_the_weight_of_the_data_stays_behind_the_regularizer():
    def build() -> bi.VariationalEnergy:
        return bi.VariationalEnergy(bi.TotalVariation(0.1, 0.1), data_weight=bi.energies.NoiseWeight(1.3))

    def of(energy) -> dict[str, Tensor]:
        return bi.hypergradient(energy.bind(Y, PHYSICS), bi.SquaredError(), X, relative=1e-4).grad

    energy = build()
    regularizer = energy.regularizer
    del energy.regularizer
    energy.regularizer = regularizer
    assert next(energy.named_parameters())[0].startswith("data_weight")
    for (name, found), (wanted, value) in zip(of(energy).items(), of(build()).items(), strict=True):
        assert name == wanted
        torch.testing.assert_close(found, value, rtol=1e-10, atol=0)


class WithExtra(bi.TotalVariation):
    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Parameter(torch.ones(()))


def parametrized() -> bi.TotalVariation:
    regularizer = bi.TotalVariation()
    nn.utils.parametrize.register_parametrization(regularizer, "log_weight", nn.Identity())
    return regularizer


def tied(first: bool) -> bi.Regularizer:
    a, b = bi.TotalVariation(), bi.TotalVariation()
    regularizer = bi.Sum(a, b)
    if first:
        a.log_smoothing = a.log_weight
        return a
    b.log_weight = a.log_weight
    return regularizer


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (WithExtra, r"regularizer\.extra"),
        (parametrized, r"regularizer\.log_weight .* parametrized"),
        (lambda: bi.Sum(bi.Tikhonov(), parametrized()), r"regularizer\.parts\.1\.log_weight .* parametrized"),
        (lambda: tied(True), "one nn.Parameter as regularizer.log_weight and regularizer.log_smoothing"),
        (lambda: tied(False), "one nn.Parameter as regularizer.parts.0.log_weight and regularizer.parts.1.log_weight"),
    ],
)
def test_parameters_without_a_derivative_are_named(build, match):
    with pytest.raises(ValueError, match=match):
        bind(build())


def test_frozen_extras_and_parametrized_networks_are_no_trouble():
    regularizer = WithExtra()
    regularizer.extra.requires_grad_(False)
    assert len(bind(regularizer).theta) == 2
    network = Network()
    nn.utils.parametrizations.weight_norm(network.layer)
    assert len(bind(network).theta) == 3


def test_parameters_that_change_after_bind_are_named():
    regularizer = bi.TotalVariation()
    problem = bind(regularizer)
    regularizer.log_weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"log_weight.*bind again"):
        bi.hypergradient(problem, bi.SquaredError(), X, relative=0.1)


@pytest.mark.parametrize("name", ["log_weight", "log_smoothing"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 700.0])
def test_values_out_of_range_are_named(name, value):
    regularizer = bi.Sum(bi.TotalVariation())
    getattr(regularizer.parts[0], name).data.fill_(value)
    with pytest.raises(ValueError, match=rf"regularizer\.parts\.0\.{name}"):
        bind(regularizer)


def test_the_range_is_that_of_the_dtype():
    for size in (1e-300, 1e300):
        with pytest.raises(ValueError, match=r"Expected smoothing from 1e-50 to 1e\+50"):
            bi.TotalVariation(0.1, size)
    for size in (1e-30, 1e30):
        regularizer = bi.TotalVariation(0.1, size)
        with pytest.raises(ValueError, match=r"log_smoothing from -41\.4 to 41\.4.* in float32"):
            bind(regularizer, F32)
        assert all(bool(g.isfinite()) for g in gradient(regularizer, relative=0.5).values())
    at = bind(bi.SecondOrderTotalVariation(0.1, 1e-15), F32).linearize(torch.ones_like(X, dtype=F32))
    radius = torch.full((2,), 1e-3)
    along = at.directional(X.float(), radius)
    curvature = at.relative_curvature(radius, torch.ones(2))
    assert not bool(torch.stack([along.mixed.double(), curvature.double()]).isnan().any())
    assert all(bool(g.isfinite()) for g in gradient(bi.FieldsOfExperts(1, 3, smoothing=1e45)).values() if g.dim() == 1)
    none = bi.TotalVariation(0.1, 0.1)
    none.log_weight.data.fill_(-700.0)  # as good as no regularizer
    assert all(float(g.abs()) <= 1e-50 for g in gradient(none, relative=0.5).values())
    weight = bi.energies.FrequencyWeights((6, 4))
    weight.log_weights.data[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"data_weight\.log_weights"):
        bi.VariationalEnergy(bi.TotalVariation(), data_weight=weight).bind(Y, PHYSICS)


# --- subclasses


def test_a_new_fn_asks_for_new_closed_forms():
    def triple(self, x: Tensor, *args, **kwargs) -> Tensor:
        return 3 * bi.TotalVariation.fn(self, x)

    with pytest.raises(TypeError, match=r"Triple to define grad, linearize, constants, descent.* TotalVariation"):
        type("Triple", (bi.TotalVariation,), {"fn": triple})
    mixin = type("Mixin", (), {"fn": triple})
    with pytest.raises(TypeError, match="Triple"):
        type("Triple", (mixin, bi.TotalVariation), {})
    with pytest.raises(TypeError, match=r"to define linearize along"):
        names = ("grad", "constants", "descent", "gradient_scale", "coarse_gradient_scale")
        plain = {name: getattr(bi.Regularizer, name) for name in names}
        type("Triple", (bi.TotalVariation,), {"fn": triple, **plain})
    plain["linearize"] = bi.Regularizer.linearize
    triple_of = type("Triple", (bi.TotalVariation,), {"fn": triple, **plain})
    found, expected = gradient(triple_of(0.1, 0.1)), gradient(bi.TotalVariation(0.3, 0.1))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=0)
    type("Renamed", (bi.TotalVariation,), {"rescaled": lambda self: self})
    type("Own", (Network,), {"fn": triple})  # nothing there knows the former fn


# --- a fn alone


class Network(bi.Regularizer):
    """A smooth convex function of one convolution, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 2, 3, padding=1)
        self.register_buffer("scale", torch.full((1, 1, 1, 1), 0.1))
        with torch.no_grad():
            self.layer.weight.copy_(torch.linspace(-1, 1, 18).reshape(2, 1, 3, 3))
            self.layer.bias.copy_(torch.tensor([0.1, -0.2]))

    def fn(self, x: Tensor, *args, **kwargs) -> Tensor:
        features = nn.functional.softplus(self.layer(x)).sum(1, keepdim=True)
        return nn.functional.conv2d(features, self.scale).flatten(1).sum(1)


@pytest.mark.parametrize(
    "build",
    [
        lambda: bi.Scaled(bi.Sum(Network()), 1.0, learn_weight=False),
        lambda: bi.NoiseConditional(Network(), learn_weights=False, learn_scales=False).at_noise_level(0.1),
    ],
    ids=["scaled_sum", "noise_conditional"],
)
def test_networks_in_either_precision_take_images_in_either(build):
    expected = list(gradient(build().double()).values())
    energy = bind(build().double()).value(X)
    for stored, dtype in ((F32, F64), (F32, F32), (F64, F32)):
        regularizer = build().to(stored)
        found = list(gradient(regularizer, dtype).values())
        assert len(found) == 2 and all(p.dtype == stored for p in regularizer.parameters())
        torch.testing.assert_close(bind(regularizer, dtype).value(X.to(dtype)).double(), energy, rtol=1e-5, atol=0)
        for value, wanted in zip(found, expected, strict=True):
            assert value.dtype == stored
            torch.testing.assert_close(value.double(), wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


class Absolute(bi.Regularizer):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.1, dtype=F64))

    def fn(self, x: Tensor, *args, **kwargs) -> Tensor:
        return (self.a * x.abs()).flatten(1).sum(1)


class Linear(Absolute):
    def fn(self, x: Tensor, *args, **kwargs) -> Tensor:
        return self.a * x.flatten(1).sum(1)


class Half(Absolute):
    """The gradient is x itself, so that autograd answers with the very vector that it is given."""

    def fn(self, x: Tensor, *args, **kwargs) -> Tensor:
        return 0.5 * x.square().flatten(1).sum(1)

    def grad(self, x: Tensor, *args, **kwargs) -> Tensor:
        return x


@pytest.mark.parametrize(("kind", "second"), [(Absolute, 0.0), (Linear, 0.0), (Half, 1.0)])
def test_products_of_autograd_have_memory_of_their_own(kind, second):
    v = torch.ones_like(X)
    product = bind(kind()).linearize(X).hvp(v)
    assert torch.equal(product, torch.full_like(X, 1 + second)) and torch.equal(v, torch.ones_like(X))
    assert (float(gradient(kind())["regularizer.a"]) != 0) == (kind is not Half)


def test_autograd_works_in_inference_mode():
    expected = gradient(Network().double())
    with torch.inference_mode():
        inside = Network().double()
        x, _ = bi.reconstruct(Y, PHYSICS, inside)
        found = [gradient(inside), gradient(bi.Sum(inside))]
        experts = bi.VariationalEnergy(bi.FieldsOfExperts(4, 3)).bind(Y, PHYSICS)
        polished = bi.hypergradient(experts, bi.SquaredError(), X, relative=1e-3, certificate="polished")
    assert polished.certified and bool(x.isfinite().all())
    for grads in found:
        for value, wanted in zip(grads.values(), expected.values(), strict=True):
            torch.testing.assert_close(value.clone(), wanted, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (lambda a, x: a * x.square(), r"Wrong\.fn .* \(2,\)\. Got shape \(2, 1, 6, 7\)"),
        (lambda a, x: a * x.square().flatten(1).sum(1, keepdim=True), r"Got shape \(2, 1\)"),
        (lambda a, x: a * x.square().sum(), r"Got shape \(\)"),
        (lambda a, x: (x.detach().numpy() ** 2).sum((1, 2, 3)), "Got ndarray"),
        (lambda a, x: x.detach().square().flatten(1).sum(1), r"Wrong\.fn .* without a graph"),
        (lambda a, x: a * x.detach().square().flatten(1).sum(1), "without a graph"),
    ],
)
def test_a_fn_that_is_not_one_differentiable_value_per_image(value, match):
    wrong = type("Wrong", (Absolute,), {"fn": lambda self, x, *args, **kwargs: value(self.a, x)})
    for regularizer in (wrong(), bi.Sum(bi.TotalVariation(), wrong())):
        with pytest.raises(ValueError, match=match):
            gradient(regularizer)


# --- operators


def inpainting(factor: complex) -> deepinv.physics.Physics:
    return deepinv.physics.Inpainting((1, 6, 7), mask=factor * torch.ones(1, 1, 6, 7, dtype=F64))


def blur(factor: complex) -> deepinv.physics.Physics:
    return deepinv.physics.Blur(filter=factor * torch.ones(1, 1, 3, 3, dtype=F64), padding="circular")


def blur_fft(factor: complex) -> deepinv.physics.Physics:
    return deepinv.physics.BlurFFT((1, 6, 7), filter=factor * torch.ones(1, 1, 3, 3, dtype=F64))


@pytest.mark.parametrize(
    ("build", "factor"),
    [(inpainting, math.nan), (inpainting, 1j), (blur, math.inf), (blur, 1j), (blur_fft, math.nan)],
)
def test_masks_and_filters_that_are_not_real_and_finite_are_named(build, factor):
    with pytest.raises(ValueError, match="(mask|filter) of the physics"):
        bi.VariationalEnergy(bi.TotalVariation(), ridge=0.1).bind(Y, build(factor))


# --- tensors whose memory holds other numbers


def negated(t: Tensor) -> Tensor:
    """The same numbers as a view with the negative bit."""
    return torch._neg_view(-t)


@pytest.mark.parametrize("build", [lambda: bi.TotalVariation(0.1, 0.1), lambda: bi.FieldsOfExperts(4, 3)])
def test_the_negative_bit_is_not_overlooked(build):
    problem = bi.VariationalEnergy(build()).bind(negated(Y), PHYSICS)
    plain = bi.VariationalEnergy(build()).bind(Y, PHYSICS)
    assert not problem.data.y.is_neg()
    with torch.no_grad():
        torch.testing.assert_close(problem.grad(negated(X)), plain.grad(X), rtol=1e-12, atol=1e-14)
        at = plain.linearize(X)
        torch.testing.assert_close(plain.linearize(negated(X)).grad, at.grad, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(at.hvp(negated(Y)), at.hvp(Y), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(inner(negated(X), Y), inner(X, Y), rtol=1e-12, atol=0)
    solved = [bi.lower_solvers.NewtonCG().solve(p, None, 1e-10).x for p in (problem, plain)]
    torch.testing.assert_close(*solved, rtol=0, atol=2e-10)
