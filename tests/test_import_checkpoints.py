"""Imported checkpoints: the gradients of the published models, what cannot be represented, and unreadable files."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from bilevel_imaging.errors import CheckpointError
from bilevel_imaging.export import load_regularizer
from bilevel_imaging.import_checkpoints import convert_main, import_regularizer

COUNT = 5
SIGMA = 7.0


def convolutions(prefix: str, centered: tuple[int, ...], seed: int = 0) -> dict[str, Tensor]:
    """Two layers, 1 to 3 to COUNT features; those in ``centered`` are stored before their means are removed."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for n, shape in enumerate([(3, 1, 3, 3), (COUNT, 3, 5, 5)]):
        name = f"{prefix}.{n}.parametrizations.weight.original" if n in centered else f"{prefix}.{n}.weight"
        tensors[name] = 0.3 * torch.randn(shape, generator=generator)
    return tensors


def chain(tensors: dict[str, Tensor]) -> list[Tensor]:
    """The layers as they are applied."""
    layers = {name: t.double() for name, t in tensors.items() if "weight" in name}
    return [t - t.mean((1, 2, 3), keepdim=True) if "original" in name else t for name, t in layers.items()]


def forward(x: Tensor, layers: list[Tensor]) -> Tensor:
    for layer in layers:
        x = functional.conv2d(x, layer, padding=layer.shape[-1] // 2)
    return x


def adjoint(z: Tensor, layers: list[Tensor]) -> Tensor:
    for layer in reversed(layers):
        z = functional.conv_transpose2d(z, layer, padding=layer.shape[-1] // 2)
    return z


def squared_norm(layers: list[Tensor]) -> Tensor:
    """Of the convolution by the whole chain, from the response of W^T W to an impulse."""
    impulse = torch.zeros(1, 1, 25, 25, dtype=torch.float64)
    impulse[..., 12, 12] = 1
    return torch.fft.fft2(adjoint(forward(impulse, layers), layers), s=(256, 256)).abs().max()


def per_filter(values: Tensor) -> Tensor:
    return values.double().view(1, -1, 1, 1)


def crr():
    """Clipped linear activations, hidden behind what the projection of the coefficients removes."""
    tensors = {"lmbd": torch.tensor(20.0), "mu": torch.tensor(2.0), "L": torch.tensor(1.0)}
    tensors |= convolutions("conv_layer.conv_layers", (0, 1))
    knots = torch.linspace(-0.1, 0.1, 21)
    width = torch.tensor([0.01, 0.03, 0.05, 0.02, 0.06])
    height = torch.tensor([1e-3, 2e-3, 1e-3, 3e-3, 2e-3])
    values = height[:, None] * (knots / width[:, None]).clamp(-1, 1)
    values[:, -1] += 5e-4  # the last piece is made constant
    values[:, 18:] -= 2e-3  # decreasing pieces likewise
    values += 1e-2  # the value at 0 is made 0
    tensors["activation.coefficients_vect"] = values.flatten()
    layers = chain(tensors)

    def grad(x: Tensor) -> Tensor:
        z = forward(2.0 * x, layers)
        return 20.0 * adjoint(per_filter(height) * (z / per_filter(width)).clamp(-1, 1), layers)

    content = {"state_dict": tensors, "config": {"activation_params": {"knots_range": 0.1}, "sigma": 25}}
    return content, {}, grad


def conditional(rho: int = 0):
    tensors = {"mu_": torch.tensor(2.0), **convolutions("conv_layer.conv_layers", (0,), 1)}
    knots = torch.linspace(-0.1, 0.1, 101)
    tensors["activation_cvx.coefficients"] = (1.5 * knots.clamp(-0.02, 0.02))[None]  # slopes are cut off at 1
    tensors["activation_ccv.coefficients"] = knots[None].clone()
    nodes = torch.linspace(0, 30, 11)
    offsets = 0.2 * torch.arange(COUNT)
    tensors["spline_scaling.coefficients"] = 1.0 + offsets[:, None] + 0.02 * nodes  # linear in the noise level
    layers = chain(tensors)
    stretch = per_filter((1.0 + offsets + 0.02 * SIGMA).exp() / (SIGMA + 1e-5))

    def grad(x: Tensor) -> Tensor:
        norm = squared_norm(layers).sqrt()
        z = stretch * forward(x / norm, layers)
        return adjoint(math.exp(2.0) * z.clamp(-0.02, 0.02) / stretch / norm, layers)

    return {"state_dict": tensors, "config": {"rho_wcvx": rho}}, {"sigma": SIGMA}, grad


def huber():
    """With a common weight and scale."""
    inner = {f"regularizer.{name}": t for name, t in convolutions("filters", (0,), 2).items()}
    scaling = torch.linspace(1.0, 2.0, COUNT)
    tensors = {"alpha": torch.tensor(0.7), "scale": torch.tensor(0.4), "regularizer.beta": torch.tensor(3.0)}
    tensors |= {"regularizer.scaling": scaling.view(1, -1, 1, 1), **inner}
    layers = chain(tensors)

    def grad(x: Tensor) -> Tensor:
        norm = squared_norm(layers).sqrt()
        z = per_filter(scaling).exp() * forward(math.exp(0.4) * x / norm, layers)
        out = adjoint((math.exp(3.0) * z).clamp(-1, 1) * per_filter(-scaling).exp() / norm, layers)
        return math.exp(0.7 - 0.4) * out

    return tensors, {"kind": "crr"}, grad


CASES = {"crr": crr, "conditional": conditional, "huber": huber}


def image(size: int = 24) -> Tensor:
    return 0.5 * torch.rand(2, 1, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("boundary", ["symmetric", "zero"])
def test_gradients_are_those_of_the_published_model_off_the_border(name, boundary, tmp_path):
    content, arguments, grad = CASES[name]()
    torch.save(content, tmp_path / "c.pth")
    # half a filter (3) for the adjoint, and for the responses half a layer after the first (2) or, mirrored, 3 again
    margin = 5 if boundary == "zero" else 6
    x, inner = image(), (..., slice(margin, -margin), slice(margin, -margin))
    wanted = grad(x)
    errors = []
    for knots in (16, 96):
        regularizer, about = import_regularizer(tmp_path / "c.pth", boundary=boundary, knots=knots, **arguments)
        assert about["layout"] == name and about["filters"] == COUNT
        assert float((regularizer.filters().flatten(1).norm(dim=1) - 1).abs().max()) < 1e-12
        difference = regularizer.grad(x).detach() - wanted
        errors.append(float(difference[inner].abs().max() / wanted.abs().max()))
    assert errors[1] < 0.02 and errors[1] < errors[0] / 2
    # the continuation of the features is another one
    assert float(difference.abs().max()) > 0.05 * float(wanted.abs().max())


@pytest.mark.parametrize("name", CASES)
def test_reported_deviations_are_those_of_the_result(name, tmp_path):
    content, arguments, _ = CASES[name]()
    torch.save(content, tmp_path / "c.pth")
    coarse, about = import_regularizer(tmp_path / "c.pth", knots=16, **arguments)
    fine, exact = import_regularizer(tmp_path / "c.pth", knots=128, **arguments)
    t = torch.linspace(-1.2, 1.2, 4001, dtype=torch.float64) * about["reach"] / float(fine.log_scale.exp())
    found, wanted = coarse.potentials(t)[1], fine.potentials(t)[1]
    deviation = float(((found - wanted).abs() / (wanted[:, -1:] - wanted[:, :1])).max())
    assert deviation == pytest.approx(about["largest"], abs=exact["largest"] + 2e-3)
    assert about["largest"] == pytest.approx(about["largest_odd"]) and about["asymmetry"] < 1e-6
    assert 0 < exact["rms"] < about["rms"] < about["largest"]


def test_weight_and_scale_can_be_chosen(tmp_path):
    content, _, grad = crr()
    torch.save(content, tmp_path / "c.pth")
    x = image()
    own, _ = import_regularizer(tmp_path / "c.pth")
    other, about = import_regularizer(tmp_path / "c.pth", weight=5.0, scale=1.0)
    assert (about["weight"], about["weight_of_source"], about["scale_of_source"]) == (5, 20, 2)
    assert float(own.log_weight.exp()) == pytest.approx(20) and float(own.log_scale.exp()) == pytest.approx(2)
    # R = weight / scale sum psi(scale w * x): gradients are weight g(scale x)
    assert torch.allclose(other.grad(2 * x) / 5, own.grad(x) / 20, rtol=1e-10, atol=1e-14)


def test_filters_without_potential_are_left_out(tmp_path):
    content, _, _ = crr()
    content["state_dict"]["activation.coefficients_vect"].view(COUNT, -1)[1] = 0.3
    torch.save(content, tmp_path / "c.pth")
    regularizer, about = import_regularizer(tmp_path / "c.pth")
    assert (about["filters"], about["filters_of_source"]) == (COUNT - 1, COUNT) == (len(regularizer.filters()), COUNT)
    content["state_dict"]["activation.coefficients_vect"].zero_()
    torch.save(content, tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match="nothing to import"):
        import_regularizer(tmp_path / "c.pth")


def test_asymmetric_potentials_are_refused(tmp_path):
    content, _, _ = crr()
    values = content["state_dict"]["activation.coefficients_vect"].view(COUNT, -1)
    values[2] = torch.linspace(-0.1, 0.1, 21).relu()
    torch.save(content, tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match="far from odd.*--asymmetry"):
        import_regularizer(tmp_path / "c.pth")
    _, about = import_regularizer(tmp_path / "c.pth", asymmetry=0.5)
    assert 0.2 < about["asymmetry"] < about["largest"] and about["largest_odd"] < 0.05


def test_weakly_convex_ones_are_refused_but_for_their_filters(tmp_path):
    torch.save(conditional(rho=1)[0], tmp_path / "a.pth")
    torch.save(huber()[0], tmp_path / "b.pth")
    for name, arguments in (("a.pth", {"sigma": SIGMA}), ("b.pth", {"kind": "wcrr"})):
        with pytest.raises(CheckpointError, match="weakly convex.*--filters-only"):
            import_regularizer(tmp_path / name, **arguments)
    alone, about = import_regularizer(tmp_path / "b.pth", filters_only=True)
    convex, _ = import_regularizer(tmp_path / "b.pth", kind="crr")
    assert about["filters_only"] and torch.allclose(alone.filters(), convex.filters(), atol=1e-12)


def test_what_the_parameters_do_not_say_is_asked_for(tmp_path):
    torch.save(huber()[0], tmp_path / "h.pth")
    torch.save(conditional()[0], tmp_path / "c.pth")
    torch.save(crr()[0], tmp_path / "r.pth")
    for name, arguments, words in [
        ("h.pth", {}, "Expected --kind"),
        ("h.pth", {"kind": "other"}, "Unknown kind"),
        ("c.pth", {}, "Expected --sigma"),
        ("c.pth", {"sigma": 31.0}, "Expected --sigma"),
        ("c.pth", {"sigma": 5.0, "kind": "wcrr"}, "rho_wcvx = 0"),
        ("r.pth", {"kind": "wcrr"}, "layout crr is convex"),
        ("r.pth", {"knots": 1}, "knots >= 2"),
        ("r.pth", {"boundary": "periodic"}, "Unknown boundary"),
    ]:
        with pytest.raises(ValueError, match=words):
            import_regularizer(tmp_path / name, **arguments)


def test_settings_beside_the_checkpoint_are_read(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    torch.save(conditional()[0]["state_dict"], folder / "c.pth")
    with pytest.raises(ValueError, match="--kind"):
        import_regularizer(folder / "c.pth", sigma=SIGMA)
    (tmp_path / "config.json").write_text(json.dumps({"rho_wcvx": 0, "noise_range": [0, 60]}))
    wide, _ = import_regularizer(folder / "c.pth", sigma=2 * SIGMA)
    (tmp_path / "config.json").write_text(json.dumps({"rho_wcvx": 0}))
    narrow, _ = import_regularizer(folder / "c.pth", sigma=SIGMA)
    # the same node of the scaling, divided by another noise level
    assert wide.reach == pytest.approx(2 * narrow.reach, rel=1e-5)


def test_the_command_writes_what_load_regularizer_reads(tmp_path, capsys):
    content, _, _ = crr()
    torch.save(content, tmp_path / "c.pth")
    save_file(content["state_dict"], tmp_path / "c.safetensors")
    expected, _ = import_regularizer(tmp_path / "c.pth")
    x = image()
    for source, options, noise in [("c.pth", [], 25 / 255), ("c.safetensors", ["--noise", "0.2"], 0.2)]:
        output = tmp_path / "out" / "r.safetensors"
        assert convert_main([str(tmp_path / source), str(output), *options]) == 0
        text = capsys.readouterr().out
        assert "psi' deviates" in text and text.count("\n") == 1
        loaded = load_regularizer(output)
        assert torch.equal(loaded.grad(x), expected.grad(x)) and loaded.noise_level == noise
        about = loaded.metadata["imported"]
        assert about["layout"] == "crr" and about["file"] == source and 0 < about["rms"] < about["largest"]


def test_unreadable_files_end_in_one_line(tmp_path, capsys):
    good = crr()[0]
    tensors = good["state_dict"]
    spoiled = {**tensors, "mu": torch.tensor(float("nan"))}
    layer = "conv_layer.conv_layers.1.parametrizations.weight.original"
    for content, words in [
        (None, "no such file"),
        (b"", "not a checkpoint"),
        (b"hello world", "not a checkpoint"),
        ([1, 2], "expected named tensors"),
        ({"epoch": 3}, "expected named tensors"),
        ({"state_dict": torch.nn.Linear(2, 2)}, "could run code"),
        ({"head.weight": torch.ones(2)}, "unknown layout. Expected one of crr, conditional, huber. Got .*head.weight"),
        ({"state_dict": spoiled}, "mu holds numbers that are NaN"),
        ({"state_dict": {**tensors, layer: torch.ones(COUNT, 2, 3, 3)}}, "follow each other"),
        ({"state_dict": {k: t for k, t in tensors.items() if k != "lmbd"}}, "lmbd"),
        ({"state_dict": {**tensors, "activation.coefficients_vect": torch.ones(7)}}, "do not fit together"),
        ({"state_dict": {**tensors, "activation.coefficients_vect": torch.ones(4 * COUNT)}}, "odd number"),
    ]:
        path = tmp_path / "c.pth"
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            torch.save(content, path)
        assert convert_main([str(path), str(tmp_path / "r.safetensors")]) == 2
        text = capsys.readouterr().err
        assert text.count("\n") == 1 and str(path) in text
        with pytest.raises(CheckpointError, match=words):
            import_regularizer(path)
    (tmp_path / "c.safetensors").write_bytes(b"hello world")
    with pytest.raises(CheckpointError, match="safetensors"):
        import_regularizer(tmp_path / "c.safetensors")
    content = huber()[0]
    content["regularizer.scaling"] = content["regularizer.scaling"][:, :3]
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=f"each of {COUNT} filters. Got 3"):
        import_regularizer(path, kind="crr")
    torch.save(good, path)
    assert convert_main([str(path), str(tmp_path / "r.pth")]) == 2
    assert "ends in .safetensors" in capsys.readouterr().err
    assert not (tmp_path / "r.safetensors").exists()
