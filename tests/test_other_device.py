"""Everything runs on another device than the CPU, and gives the same there; see ``other_device``."""

import copy
import inspect
import warnings

import cases
import pytest
import torch
from other_device import Elsewhere, other_device

import bilevel_imaging as bi
from bilevel_imaging.data import Degradation, ImagePairs
from bilevel_imaging.tensors import entries
from bilevel_imaging.upper_level import UPPER_LEVEL_METHODS, SquaredError
from bilevel_imaging.upper_level.quasi_newton import flatten

SIZE = (6, 7)
# autograd asks for products in threads of its own, which know nothing of the device
REGULARIZERS = [name for name in cases.REGULARIZERS if name != "user"]


def both(case: cases.Case, **options) -> None:
    """The hypergradient here and there: certified alike, and as close as the bounds say."""
    here = bi.hypergradient(case.problem, SquaredError(), case.x_true, **options)
    with other_device() as device:
        energy, physics = copy.deepcopy(case.energy).to(device), copy.deepcopy(case.physics).to(device)
        problem = energy.bind(case.y.to(device), physics)
        there = bi.hypergradient(problem, SquaredError(), case.x_true.to(device), **options)
        tensors = [*there.grad.values(), there.x, there.q, there.sample_bounds]
        assert all(isinstance(t, Elsewhere) for t in tensors)
        difference = float((entries(there.grad).cpu() - entries(here.grad)).norm())
    assert there.certified == here.certified
    assert there.certified is False or difference <= here.bound + there.bound + 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("regularizer", REGULARIZERS)
def test_regularizers(regularizer, dtype):
    both(cases.build(regularizer, dtype=dtype, channels=2, size=SIZE), relative=0.1)


@pytest.mark.parametrize("physics", [*cases.PHYSICS, *cases.GENERIC_PHYSICS])
def test_operators(physics):
    both(cases.build("tv_isotropic", physics, dtype=torch.float32, channels=2, size=SIZE, ridge=0.2), relative=0.3)


@pytest.mark.parametrize("certificate", ["classical", "directional", "metric", "local", "polished"])
def test_certificates(certificate):
    both(cases.build("tv_isotropic", "blur_fft", size=SIZE), relative=0.1, certificate=certificate)


@pytest.mark.parametrize("solver", cases.LOWER_SOLVERS)
def test_lower_solvers(solver):
    both(cases.build(size=SIZE), lower=cases.LOWER_SOLVERS[solver](), error_tol=1e-2, residual_tol=1e-2)


@pytest.mark.parametrize("solver", cases.LINEAR_SOLVERS)
def test_linear_solvers(solver):
    both(cases.build(size=SIZE), linear=cases.LINEAR_SOLVERS[solver](), error_tol=1e-2, residual_tol=1e-2)


@pytest.mark.parametrize("method", [name for name in UPPER_LEVEL_METHODS if name != "grid"])  # hundreds of values
def test_upper_level_methods(method):
    images = [(str(k), torch.rand(1, *SIZE, generator=torch.Generator().manual_seed(k))) for k in range(3)]
    learning_rate = {} if method in ("maid", "hoag") or "lr" not in _arguments(method) else {"lr": 1e-2}

    def train(device):
        energy = bi.VariationalEnergy(bi.TotalVariation(0.1, 0.05)).to(device)
        objective = bi.BilevelObjective(energy, ImagePairs.build(images, Degradation(sigma=0.1), device=device))
        steps = UPPER_LEVEL_METHODS[method](**learning_rate)
        reports = [steps.step(objective) for _ in range(2)]
        return flatten(objective.theta), [report.certified for report in reports]

    theta, certified = train("cpu")
    with other_device() as device:
        there, also = train(device)
    assert certified == also
    # comparisons of derivative-free methods can go the other way by a rounding
    torch.testing.assert_close(there, theta, rtol=0, atol=1e-2 if method == "dfo_ls" else 1e-6)


@pytest.mark.parametrize("kind", ["deblurring", "inpainting", "super_resolution"])
def test_degradations(kind):
    images = [(str(k), torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(k))) for k in range(2)]

    def loss(device):
        energy = bi.VariationalEnergy(bi.TotalVariation(0.05, 0.05), ridge=1e-2).to(device)
        objective = bi.BilevelObjective(
            energy, ImagePairs.build(images, Degradation(kind, sigma=0.05, blur_size=5), device=device)
        )
        return objective.value(1e-6).value

    with other_device() as device:
        there = loss(device)
    assert there == pytest.approx(loss("cpu"), rel=1e-5)


@pytest.mark.parametrize("regularizer", ["tv_isotropic", "fields_of_experts", "convex_ridge"])
def test_automatic_differentiation_and_reconstruction(regularizer):
    case = cases.build(regularizer, size=SIZE)
    with other_device() as device, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        energy, y, x_true = copy.deepcopy(case.energy).to(device), case.y.to(device), case.x_true.to(device)
        problem = energy.bind(y, case.physics)
        for method in ("gradient_descent", "heavy_ball"):
            h = bi.inexact_ad(problem, SquaredError(), x_true, method=method, steps=5)
            assert all(isinstance(g, Elsewhere) for g in h.grad.values())
        h = bi.unrolled(
            problem, SquaredError(), x_true, method="accelerated_gradient", steps=6, segment=2, certify=True
        )
        assert all(isinstance(g, Elsewhere) for g in h.grad.values())
        assert isinstance(bi.reconstruct(y, case.physics, energy.regularizer, error_tol=1e-3)[0], Elsewhere)
        assert isinstance(bi.BilevelReconstructor(energy)(y, case.physics), Elsewhere)


def test_the_device_refuses_what_a_gpu_would():
    with other_device() as device:
        there = torch.ones(3, device=device)
        assert (there + 1).sum().item() == 6 and there.cpu().tolist() == [1, 1, 1]
        here = torch.ones(3)
        for mixed in (lambda: there + here, lambda: here[there.long()], lambda: torch.stack([there, here])):
            with pytest.raises((RuntimeError, IndexError)):
                mixed()
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()


def _arguments(method: str) -> set[str]:
    return set(inspect.signature(UPPER_LEVEL_METHODS[method]).parameters)
