"""Exported regularizers: the same numbers after loading, useful in deepinv, and clear words for damaged files."""

from __future__ import annotations

import json

import deepinv
import pytest
import torch
from safetensors.torch import save_file

from bilevel_imaging import Tikhonov, TotalVariation, VariationalEnergy
from bilevel_imaging.data import Degradation, center_crop, photographs
from bilevel_imaging.errors import CheckpointError, NotStronglyConvexError
from bilevel_imaging.export import load_regularizer, reconstruct, save_regularizer
from bilevel_imaging.lower_solvers import LBFGS, NewtonCG
from bilevel_imaging.regularizers import Regularizer

REGULARIZERS = [
    TotalVariation(0.07, 0.02),
    TotalVariation(0.05, 0.03, isotropic=False, learn_smoothing=False),
    TotalVariation(0.05, 0.03, couple_channels=True),
    Tikhonov(0.3, "gradient"),
]


def measured(kind: str = "denoising", dtype: torch.dtype = torch.float32, size: int = 32, sigma: float = 0.1):
    degradation = Degradation(kind, sigma, blur_size=5)
    image = center_crop(photographs(part="test")["camera"], size)[None]
    physics = degradation.physics(image.shape[1:], dtype)
    return degradation.measure(image.to(dtype), [0], physics), physics


@pytest.mark.parametrize("regularizer", REGULARIZERS, ids=lambda r: f"{type(r).__name__}-{r.arguments()}")
def test_round_trip_is_exact(regularizer, tmp_path):
    path = save_regularizer(tmp_path / "sub" / "r.safetensors", regularizer, ridge=1e-3, noise_level=0.1)
    loaded = load_regularizer(path)
    x = torch.rand(2, 3, 9, 8, dtype=torch.float64)
    assert type(loaded) is type(regularizer) and isinstance(loaded, deepinv.optim.Prior)
    assert torch.equal(loaded.fn(x), regularizer.fn(x)) and torch.equal(loaded.grad(x), regularizer.grad(x))
    assert (loaded.ridge, loaded.noise_level) == (1e-3, 0.1)
    assert loaded.metadata["arguments"] == regularizer.arguments() and "torch" in loaded.metadata["versions"]
    assert not list(tmp_path.glob("**/.*"))


def test_damaged_and_foreign_files_are_named(tmp_path):
    path = save_regularizer(tmp_path / "r.safetensors", TotalVariation())
    whole = path.read_bytes()
    for damaged in (b"", b"hello", whole[: len(whole) // 2], whole[:-3]):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="r.safetensors"):
            load_regularizer(path)
    with pytest.raises(CheckpointError, match="no such file"):
        load_regularizer(tmp_path / "missing.safetensors")
    good = {"format": 1, "class": "TotalVariation", "arguments": {}, "ridge": 0.0, "noise_level": None}
    tensors = {
        "log_weight": torch.zeros((), dtype=torch.float64),
        "log_smoothing": torch.zeros((), dtype=torch.float64),
    }
    cases = [
        (None, tensors, "not written by bilevel_imaging"),
        ({**good, "format": 9}, tensors, "format 1"),
        ({**good, "class": "Unknown"}, tensors, "holds a Unknown"),
        ({**good, "arguments": {"colour": 1}}, tensors, "does not fit the class"),
        (good, {"log_weight": tensors["log_weight"]}, "does not fit the class"),
        (good, {**tensors, "log_weight": torch.tensor(float("nan"), dtype=torch.float64)}, "NaN"),
    ]
    for content, values, words in cases:
        save_file(values, path, metadata=None if content is None else {"bilevel_imaging": json.dumps(content)})
        with pytest.raises(CheckpointError, match=words) as error:
            load_regularizer(path)
        assert str(path) in str(error.value)
    save_file(tensors, path, metadata={"bilevel_imaging": json.dumps(good)})
    assert float(load_regularizer(path).log_weight) == 0


def test_unregistered_class_cannot_be_saved(tmp_path):
    class Mine(Regularizer):
        def fn(self, x, *args, **kwargs):
            return x.square().flatten(1).sum(1)

    with pytest.raises(ValueError, match="REGULARIZERS"):
        save_regularizer(tmp_path / "r.safetensors", Mine())


@pytest.mark.parametrize("kind", ["denoising", "deblurring", "inpainting"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reconstruct_is_within_its_bound(kind, dtype):
    y, physics = measured(kind, dtype)
    prior = TotalVariation(0.05, 0.02)
    prior.ridge = 1e-2
    x, info = reconstruct(y, physics, prior, error_tol=1e-3)
    assert x.dtype == dtype and not x.requires_grad and bool(info.converged.all()) and info.reason == ("",)
    exact = VariationalEnergy(prior, ridge=1e-2).bind(y, physics).double()
    reference = NewtonCG().solve(exact, None, 1e-9).x
    distance = (x.double() - reference).flatten(1).norm(dim=1)
    assert bool((distance <= info.distance_bound + 1e-9).all()) and bool((info.distance_bound <= 1e-3).all())


def test_what_cannot_be_reached_is_said():
    y, physics = measured()
    x, info = reconstruct(y, physics, TotalVariation(0.07, 0.02), error_tol=1e-6, solver=LBFGS(max_iter=3))
    assert not bool(info.converged.any()) and "iteration limit" in info.reason[0]
    assert 1e-6 < float(info.distance_bound[0]) < float("inf")

    class Plain(Regularizer):
        def fn(self, x, *args, **kwargs):
            return 0.1 * x.square().flatten(1).sum(1)

    _, info = reconstruct(y, physics, Plain(), error_tol=1e-3)
    assert float(info.distance_bound[0]) == float("inf") and info.reason[0].startswith("not certified")


def test_ridge_is_asked_for_where_it_is_needed():
    y, physics = measured("inpainting")
    with pytest.raises(NotStronglyConvexError, match="ridge"):
        reconstruct(y, physics, TotalVariation())


@pytest.mark.parametrize(("method", "stepsize", "steps"), [("GD", None, 1500), ("PGD", 1.0, 5), ("PGD", 0.3, 40)])
def test_deepinv_algorithms_agree(method, stepsize, steps, tmp_path):
    y, physics = measured()
    problem = VariationalEnergy(TotalVariation(0.07, 0.02)).bind(y, physics)
    constants = {"mu": 1.0, "L": float(problem.constants().smoothness.max())}
    path = save_regularizer(tmp_path / "r.safetensors", TotalVariation(0.07, 0.02), constants=constants)
    prior = load_regularizer(path)
    step = 1 / prior.metadata["constants"]["L"] if stepsize is None else stepsize
    model = getattr(deepinv.optim, method)(
        prior=prior, data_fidelity=deepinv.optim.L2(), lambda_reg=1.0, stepsize=step, max_iter=steps
    )
    x, _ = reconstruct(y, physics, prior, error_tol=1e-4)
    assert float((model(y, physics) - x).norm()) < 2e-3
