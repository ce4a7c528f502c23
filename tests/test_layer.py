"""The differentiable layer where autograd is used in other ways than one forward, one backward, one set of tensors."""

from __future__ import annotations

import copy
import math
import warnings

import deepinv
import pytest
import torch
from cases import REGULARIZERS, Case, build
from torch import Tensor, nn

import bilevel_imaging as bi
from bilevel_imaging.energies import NoiseWeight
from bilevel_imaging.errors import NotCertifiedWarning

F32, F64 = torch.float32, torch.float64


def misfit(layer: nn.Module, case: Case, y: Tensor | None = None) -> Tensor:
    return (layer(case.y if y is None else y, case.physics) - case.x_true).square().sum()


def small(regularizer: str = "tv_isotropic", physics: str = "denoising", **settings) -> Case:
    return build(regularizer, physics, **{"size": (6, 5), "smoothing": 0.2, **settings})


# --- a backward knows the tensors of its forward


@pytest.mark.parametrize("changed", ["learned", "frozen", "y", "physics"])
def test_what_is_changed_in_place_before_the_backward_raises(changed):
    case = small(physics="blur_reflect")
    weight, smoothing = case.energy.parameters()
    smoothing.requires_grad_(False)
    loss = misfit(bi.BilevelReconstructor(case.energy), case)
    with torch.no_grad():
        {"learned": weight, "frozen": smoothing, "y": case.y, "physics": case.physics.filter}[changed].mul_(1.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("regularizer", ["tv_smoothing_only", "fields_of_experts", "user"])
@pytest.mark.filterwarnings("ignore::bilevel_imaging.errors.NotCertifiedWarning")
def test_parameters_of_a_functional_call(regularizer):
    case = small(regularizer)
    layer = bi.BilevelReconstructor(case.energy)
    shift = torch.tensor(0.3, dtype=F64, requires_grad=True)
    theta = {name: p.detach() + shift if p.requires_grad else p.detach() + 0.2 for name, p in layer.named_parameters()}
    other = copy.deepcopy(layer)
    other.load_state_dict({name: t.detach() for name, t in theta.items()})
    learned = [p for p in other.parameters() if p.requires_grad]
    expected = sum(g.sum() for g in torch.autograd.grad(misfit(other, case), learned))

    held = list(layer.parameters())
    x = torch.func.functional_call(layer, theta, (case.y, case.physics))
    assert torch.equal(x, other(case.y, case.physics))
    (x - case.x_true).square().sum().backward()
    assert float(shift.grad) == pytest.approx(float(expected), rel=1e-12)
    assert all(p is q and p.grad is None for p, q in zip(layer.parameters(), held, strict=True))


def test_a_learned_weight_of_a_functional_call():
    case = small()
    layer = bi.BilevelReconstructor(bi.VariationalEnergy(case.energy.regularizer, data_weight=NoiseWeight(1.0)))
    theta = {name: nn.Parameter(p.detach() + 0.3) for name, p in layer.named_parameters()}
    x = torch.func.functional_call(layer, theta, (case.y, case.physics))
    gradients = torch.autograd.grad((x - case.x_true).square().sum(), list(theta.values()))
    layer.load_state_dict({name: t.detach() for name, t in theta.items()})
    expected = torch.autograd.grad(misfit(layer, case), list(layer.parameters()))
    assert len(theta) == 3 and torch.allclose(torch.stack(gradients), torch.stack(expected), rtol=1e-12)


@pytest.mark.parametrize("dtype", [F64, F32])
def test_what_is_exchanged_before_the_backward_changes_nothing(dtype):
    case = small(physics="blur_reflect", dtype=dtype)
    layer = bi.BilevelReconstructor(case.energy)
    weight, smoothing = layer.parameters()
    (expected,) = torch.autograd.grad(misfit(layer, case), weight)
    loss, following = misfit(layer, case), case.physics.filter.flip(-1)
    case.physics.update(filter=following)  # as the loader of the next batch does
    smoothing.requires_grad_(False)
    (gradient,) = torch.autograd.grad(loss, weight)
    assert torch.equal(gradient, expected)
    assert torch.equal(case.physics.filter, following) and not smoothing.requires_grad
    smoothing.requires_grad_(True)
    assert not torch.allclose(torch.autograd.grad(misfit(layer, case), weight)[0], expected)


# --- once differentiable


@pytest.mark.parametrize("linear", [True, False])
def test_a_second_derivative_raises(linear):
    case = small()
    layer = bi.BilevelReconstructor(case.energy)
    y, target = case.y.clone().requires_grad_(True), case.x_true.clone().requires_grad_(True)
    inputs = [y, *layer.parameters()]

    def loss():
        x = layer(y, case.physics)
        # the penalty has a second derivative of its own, which must not pass for the whole one
        return (x * target if linear else (x - target) ** 2).sum() + sum((p**2).sum() for p in inputs)

    plain = torch.autograd.grad(loss(), inputs)
    gradients = torch.autograd.grad(loss(), inputs, create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(gradients, plain, strict=True))
    size = sum((g**2).sum() for g in gradients)
    for leaf in (*inputs, target):
        with pytest.raises(RuntimeError, match="only once differentiable"):
            torch.autograd.grad(size, leaf, retain_graph=True)


# --- frozen priors


@pytest.mark.parametrize("regularizer", REGULARIZERS)
@pytest.mark.filterwarnings("ignore::bilevel_imaging.errors.NotCertifiedWarning")
def test_a_frozen_prior_is_differentiated_in_the_measurements(regularizer):
    case = small(regularizer, "blur_circular" if regularizer == "tv_isotropic" else "denoising", size=(5, 4))
    layer = bi.BilevelReconstructor(case.energy).requires_grad_(False)
    cotangent, direction = torch.randn_like(case.x_true), torch.randn_like(case.y)
    gradients = []
    for dtype in (F64, F32):
        y = case.y.to(dtype, copy=True).requires_grad_(True)
        layer(y, case.physics).backward(cotangent.to(dtype))
        gradients.append(y.grad.double())
        assert layer.certificate.backward_bound is None
        assert layer.certificate.certified == (regularizer != "user") == (layer.certificate.reason == "")
    ends = [(layer(case.y + t * direction, case.physics) * cotangent).sum() for t in (1e-5, -1e-5)]
    assert float((gradients[0] * direction).sum()) == pytest.approx(float(ends[0] - ends[1]) / 2e-5, rel=1e-5)
    assert torch.allclose(gradients[1], gradients[0], rtol=0, atol=1e-3 * float(gradients[0].abs().max()))


def test_a_loaded_prior_in_a_layer(tmp_path):
    case = small("fields_of_experts")
    y = case.y.clone().requires_grad_(True)
    (expected,) = torch.autograd.grad(misfit(bi.BilevelReconstructor(case.energy), case, y), y)
    prior = bi.load_regularizer(bi.save_regularizer(tmp_path / "prior.safetensors", case.energy.regularizer))
    misfit(bi.BilevelReconstructor(bi.VariationalEnergy(prior)), case, y).backward()
    assert torch.allclose(y.grad, expected, rtol=1e-8)


# --- certificates


def test_a_certificate_gives_a_reason_only_where_a_bound_is_missing():
    case = small("fields_of_experts")
    layer = bi.BilevelReconstructor(case.energy)
    x = layer(case.y, case.physics)
    assert layer.certificate.certified and layer.certificate.reason == ""
    x.sum().backward()
    assert layer.certificate.certified and layer.certificate.reason == ""
    unknown = small("user")
    layer = bi.BilevelReconstructor(unknown.energy)
    layer(unknown.y, unknown.physics)
    assert not layer.certificate.certified and "UserRegularizer" in layer.certificate.reason


def test_the_reason_of_an_infinite_bound_is_told():
    case = small("huber_isotropic", smoothing=0.05)
    layer = bi.BilevelReconstructor(case.energy, error_tol=1.0)
    with pytest.warns(NotCertifiedWarning, match="not certified: a kink of the regularizer"):
        misfit(layer, case).backward()
    certificate = layer.certificate
    assert math.isinf(certificate.backward_bound) and not certificate.certified and "kink" in certificate.reason
    assert bool(certificate.distance_bound.isfinite().all())


def test_certificates_of_two_calls_are_not_mixed():
    case = small()
    layer = bi.BilevelReconstructor(case.energy)
    alone = misfit(layer, case)
    alone.backward()
    expected = layer.certificate
    first, after_first = misfit(layer, case), layer.certificate
    assert torch.equal(after_first.distance_bound, expected.distance_bound)
    layer.error_tol = 1e-3
    second = misfit(layer, case)
    latest = layer.certificate
    assert not torch.equal(latest.distance_bound, expected.distance_bound)
    first.backward()
    assert layer.certificate is latest and latest.backward_bound is None
    second.backward()
    done = layer.certificate
    assert torch.equal(done.distance_bound, latest.distance_bound)
    assert done.backward_bound > 10 * expected.backward_bound
    assert done.cost.work > latest.cost.work and done.cost.seconds > latest.cost.seconds > 0


# --- misuse


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("frozen", [True, False])
def test_a_cotangent_that_is_not_finite_raises(bad, frozen):
    case = small()
    layer = bi.BilevelReconstructor(case.energy).requires_grad_(not frozen)
    cotangent = torch.ones_like(case.x_true)
    cotangent[1, 0, 2, 3] = bad
    x = layer(case.y.clone().requires_grad_(True), case.physics)
    with pytest.raises(ValueError, match=r"finite cotangent.*samples \[1\]"):
        x.backward(cotangent)


def test_a_learned_physics_is_told_once_that_it_gets_no_gradient():
    case = small(physics="blur_circular")
    layer = bi.BilevelReconstructor(case.energy)
    physics = deepinv.physics.Blur(filter=nn.Parameter(case.physics.filter), padding="circular")
    physics.filter = nn.Parameter(case.physics.filter)
    with torch.no_grad():
        layer(case.y, physics)
    with pytest.warns(UserWarning, match="Got Blur with requires_grad=True for filter") as caught:
        layer(case.y, physics).sum().backward()
    assert physics.filter.grad is None and caught[0].filename == __file__
    noisy = deepinv.physics.Blur(filter=case.physics.filter, padding="circular")
    noisy.noise_model = deepinv.physics.GaussianNoise(nn.Parameter(torch.tensor(0.1)))
    assert noisy.noise_model.sigma.requires_grad
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(case.y, physics)
        bi.BilevelReconstructor(case.energy)(case.y, noisy)
