"""Tomography and MRI: the operators, the data, the split, and the whole experiment at a tiny size."""

from __future__ import annotations

import importlib.util
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from deepinv.physics import Tomography
from PIL import Image

from bilevel_imaging import ConvexRidge, TotalVariation, VariationalEnergy, load_regularizer, save_regularizer
from bilevel_imaging.data import magnitude
from bilevel_imaging.data.tomography import parallel_beam
from bilevel_imaging.energies.matrix_physics import MatrixPhysics
from bilevel_imaging.errors import DataError
from bilevel_imaging.experiments import medical, medical_learning
from bilevel_imaging.experiments.medical_data import GAP, load_stack, phantom, resized, split_positions
from bilevel_imaging.experiments.medical_problems import Problem, line_mask
from bilevel_imaging.experiments.medical_progress import Log
from bilevel_imaging.linear_solvers import ConjugateGradient, assemble_hessian
from bilevel_imaging.training.reconstruction import minimize

ROOT = Path(__file__).resolve().parent.parent
SIZE, VIEWS = 32, 10


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def dense(physics: MatrixPhysics) -> torch.Tensor:
    """The matrix, from its columns."""
    units = torch.eye(math.prod(physics.image), dtype=torch.float64).reshape(-1, 1, *physics.image)
    return physics.A(units).flatten(1).T


# --- the matrix


@pytest.mark.parametrize(("size", "views"), [(32, 10), (33, 7), (21, 1)])
def test_the_matrix_is_the_tomography_of_deepinv(size, views):
    physics, scale = parallel_beam(size, views, torch.float64)
    reference = Tomography(views, size, circle=False, normalize=False)
    x, y = rand(2, 1, size, size), rand(2, 1, *physics.measured, seed=1)
    torch.testing.assert_close(scale * physics.A(x).float(), reference.A(x.float()), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        scale * physics.A_adjoint(y).float(), reference.A_adjoint(y.float()), rtol=1e-4, atol=1e-4
    )
    assert parallel_beam(size, views)[0].A(x.float()).dtype == torch.float32


def test_adjoint_channels_and_batches():
    physics, _ = parallel_beam(SIZE, VIEWS, torch.float64)
    matrix = dense(physics)
    x, y = rand(3, 2, SIZE, SIZE), rand(3, 2, *physics.measured, seed=1)
    assert float((physics.A(x) * y).sum()) == pytest.approx(float((x * physics.A_adjoint(y)).sum()), rel=1e-12)
    torch.testing.assert_close(physics.A(x).flatten(2), x.flatten(2) @ matrix.T)
    torch.testing.assert_close(physics.A(x)[1:2, :1], physics.A(x[1:2, :1]))
    assert physics.A(x).is_contiguous()


def test_norm_is_bounded_and_nearly_one():
    physics, _ = parallel_beam(SIZE, VIEWS, torch.float64)
    norm = float(torch.linalg.matrix_norm(dense(physics), 2))
    for dtype in (torch.float32, torch.float64):
        y = rand(2, 1, *physics.measured).to(dtype)
        problem = VariationalEnergy(TotalVariation(), ridge=0.1).bind(y, parallel_beam(SIZE, VIEWS, dtype)[0])
        assert norm**2 <= float(problem.data.highest[0]) <= 1.001
    assert 0.99 < norm <= 1


def test_norm_of_a_matrix_with_entries_of_both_signs():
    signs = rand(12, 20)
    physics = MatrixPhysics(signs.to_sparse().coalesce(), (4, 5), (12,))
    problem = VariationalEnergy(TotalVariation(), ridge=0.5).bind(rand(3, 1, 12), physics)
    highest = float(problem.data.highest[0])
    exact, magnitudes = (float(torch.linalg.matrix_norm(m, 2)) ** 2 for m in (signs, signs.abs()))
    assert exact <= highest and magnitudes <= highest <= 1.05 * magnitudes


def test_products_are_differentiable_twice():
    physics, _ = parallel_beam(12, 3, torch.float64)
    x = rand(1, 1, 12, 12).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: physics.A(t).square(), x)
    assert torch.autograd.gradgradcheck(lambda t: physics.A(t).square().sum((1, 2, 3)), x)


def test_float32_measurements_are_solved_to_a_float64_certificate():
    """Restriction to samples and evaluation in float64 both work, so that the certificate is sharp."""
    problem = Problem("ct", views=VIEWS)
    pairs = problem.measure(load_stack(None, SIZE, square=True), [10, 20])
    batch = pairs.batch([0, 1])
    bound = VariationalEnergy(TotalVariation(1e-3, 0.01), ridge=1e-3).bind(batch.y, batch.physics)
    assert bound.double() is not None and bound.subset(torch.tensor([1])) is not None
    x, info = minimize(bound, error_tol=1e-3)
    exact, fine = minimize(bound.double(), error_tol=1e-8)
    assert bool(info.converged.all() and fine.converged.all())
    assert bool(((x.double() - exact).flatten(1).norm(dim=1) <= info.distance_bound + 1e-8).all())


# --- preconditioners


def start_of(kind: str, name: str, size: int, views: int = VIEWS):
    """The linearization at a rough reconstruction of a slice, in float64, under sharp potentials."""
    problem = Problem(kind, views=views, ridge=1e-3)
    batch = problem.measure(load_stack(None, size, square=True), [12, 20]).batch([0, 1])
    regularizer = TotalVariation(1e-2, 1e-3)
    if name == "ridge":
        regularizer = ConvexRidge((6,), 3, knots=6, weight=0.01, seed=1)
        with torch.no_grad():
            regularizer.log_scale += math.log(50)
    bound = VariationalEnergy(regularizer, ridge=problem.ridge).bind(batch.y, batch.physics).double()
    x = minimize(bound, error_tol=0.1)[0]
    return bound, bound.linearize(x)


@pytest.mark.parametrize("kind", ["ct", "mri"])
@pytest.mark.parametrize(("name", "gain"), [("tv", 1.5), ("ridge", 1.3)])
def test_preconditioners_save_iterations_and_solve_the_same_system(kind, name, gain):
    _, at = start_of(kind, name, SIZE, views=20)
    assert at.preconditioner() is not None
    b = at.preconditioner()(at.grad) + rand(*at.grad.shape)
    plain = ConjugateGradient(preconditioner=None).solve(at, b, 1e-7)
    solution = ConjugateGradient(preconditioner="auto").solve(at, b, 1e-7)
    assert solution.converged.all() and (gain * solution.iterations < plain.iterations).all()
    torch.testing.assert_close(solution.q, plain.q, rtol=0, atol=2e-4)  # 1e-7 over the ridge, twice


@pytest.mark.parametrize("kind", ["ct", "mri"])
@pytest.mark.parametrize("name", ["tv", "ridge"])
def test_preconditioners_are_positive_definite_and_their_spectrum_is_bounded(kind, name):
    _, at = start_of(kind, name, 16)
    precondition, count = at.preconditioner(), at.grad[0].numel()
    hessian = assemble_hessian(at)[0]
    units = torch.eye(count, dtype=torch.float64).reshape(count, 1, *at.grad.shape[1:]).expand(-1, 2, -1, -1, -1)
    inverse = torch.stack([precondition(unit)[0].flatten() for unit in units], 1)
    torch.testing.assert_close(inverse, inverse.T, rtol=0, atol=1e-10 * float(inverse.abs().max()))
    root = torch.linalg.cholesky(inverse)  # fails unless positive definite
    lowest = float(torch.linalg.eigvalsh(root.T @ hessian @ root)[0])
    assert precondition.lowest is None or 0 < float(precondition.lowest[0]) <= lowest
    assert (precondition.lowest is None) == (name == "tv")


def test_only_matrices_close_to_convolutions_are_taken_for_one():
    kernel = torch.zeros(8, 8, dtype=torch.float64)
    kernel[0, 0], kernel[0, 1], kernel[3, 2] = 1.0, 0.7, 0.2
    shifts = torch.stack([kernel.roll((i, j), (0, 1)).flatten() for i in range(8) for j in range(8)], 1)
    physics = MatrixPhysics(shifts.to_sparse().coalesce(), (8, 8), (64,))
    power = torch.fft.rfft2(kernel).abs().square()
    torch.testing.assert_close(physics.convolution[0, 0], power.clamp(min=1e-4 * float(power.max())))
    scaled = shifts * (torch.arange(64, dtype=torch.float64) % 8)[:, None]
    assert MatrixPhysics(scaled.to_sparse().coalesce(), (8, 8), (64,)).convolution is None
    assert parallel_beam(SIZE, 40)[0].convolution is not None


@pytest.mark.parametrize(("size", "views"), [(1, 3), (8, 0)])
def test_wrong_geometry(size, views):
    with pytest.raises(ValueError, match="size >= 2 and angles >= 1"):
        parallel_beam(size, views)


def test_wrong_matrix():
    with pytest.raises(ValueError, match=r"matrix of shape \(6, 4\)"):
        MatrixPhysics(torch.ones(4, 6).to_sparse().coalesce(), (2, 2), (6,))


# --- slices


def test_parts_are_no_neighbors():
    for count in range(12, 90):
        for wanted in ((4, 2, 6), (1, 1, 1), (2, 1, 3)):
            try:
                parts = split_positions(count, *wanted)
            except ValueError:
                assert count < 24
                continue
            assert tuple(map(len, (parts.train, parts.validation, parts.test))) == wanted
            first, last = parts.block
            assert all(first <= i <= last for i in parts.test) and len(set(parts.test)) == wanted[2]
            others = sorted(parts.train + parts.validation)
            assert all(i <= first - GAP or i >= last + GAP for i in others)
            assert all(b - a >= GAP for a, b in zip(others, others[1:], strict=False))
            assert 0 <= others[0] and others[-1] < count
    for wanted in ((40, 2, 6), (4, 2, 60), (0, 1, 1), (1, 0, 1)):
        with pytest.raises(ValueError, match="enough slices"):
            split_positions(80, *wanted)


def test_stack_of_a_folder(tmp_path):
    for i in range(3):
        Image.fromarray(np.full((40, 20), 10 * i, dtype=np.uint8)).save(tmp_path / f"s{i}.png")
    stack = load_stack(tmp_path, 20, square=False)
    assert list(stack.slices) == ["s0.png", "s1.png", "s2.png"] and stack.label == tmp_path.name
    assert stack.slices["s2.png"].shape == (1, 20, 10)
    torch.testing.assert_close(stack.slices["s2.png"], torch.full((1, 20, 10), 20 / 255, dtype=torch.float64))
    square = load_stack(tmp_path, 50, square=True).slices["s1.png"]
    assert square.shape == (1, 50, 50) and float(square.sum()) == pytest.approx(800 * 10 / 255)
    Image.fromarray(np.zeros((30, 20), dtype=np.uint8)).save(tmp_path / "s9.png")
    with pytest.raises(DataError, match="of one volume, of one shape"):
        load_stack(tmp_path, 20, square=False)
    with pytest.raises(ValueError, match="size >= 16"):
        load_stack(None, 8, square=True)


def test_reduction_averages():
    image = rand(1, 64, 64).sigmoid()
    small = resized(image, 16, square=False)
    assert float(small.mean()) == pytest.approx(float(image.mean()), abs=2e-3)
    assert float(small.std()) < 0.5 * float(image.std())


def test_phantom():
    slices = phantom(64)
    middle = slices["slice 24"]
    # the outer ellipse has the half axes 0.69 and 0.92 of half the width
    assert float((middle > 0.05).double().mean()) == pytest.approx(math.pi * 0.69 * 0.92 / 4, rel=0.05)
    assert all(0 <= float(s.min()) and float(s.max()) <= 1 for s in slices.values())
    assert float((slices["slice 10"] - slices["slice 30"]).abs().max()) > 0.1


# --- measurements


def test_noise_has_its_level_and_depends_on_the_slice_alone():
    stack = load_stack(None, 64, square=True)
    for problem in (Problem("ct", views=VIEWS, noise=0.05), Problem("mri", noise=0.05)):
        pairs = problem.measure(stack, [3, 20])
        physics, x, y = pairs.physics(pairs.x[1].shape), pairs.x[1], pairs.y[1]
        clean = physics.A(x[None])[0]
        noise = y - clean
        if problem.kind == "mri":
            measured = physics.mask[0].expand_as(y) > 0
            assert bool((noise[~measured] == 0).all())
            noise, largest = noise[measured], x.max()
        else:
            largest = clean.max()
        assert float(noise.std()) == pytest.approx(0.05 * float(largest), rel=0.1)
        assert torch.equal(problem.measure(stack, [20]).y[0], y)
        other = Problem(problem.kind, views=VIEWS, noise=0.05, seed=1).measure(stack, [20]).y[0]
        assert not torch.equal(other, y)


def test_mask():
    mask = line_mask(100, 4.0, 0)
    assert float(mask.sum()) == 25 and set(mask.tolist()) == {0.0, 1.0}
    assert bool(mask[46:54].all())
    assert torch.equal(mask, line_mask(100, 4.0, 0)) and not torch.equal(mask, line_mask(100, 4.0, 1))
    draws = sum(line_mask(100, 4.0, seed) for seed in range(200))
    assert float(draws[30:46].sum()) > 4 * float(draws[:16].sum())  # denser near the center
    with pytest.raises(ValueError, match="acceleration of at most"):
        line_mask(100, 50.0, 0)


def test_linear_reconstructions():
    stack = load_stack(None, 64, square=True)
    ct = Problem("ct", views=180, noise=1e-6)
    batch = ct.measure(stack, [20]).batch([0])
    fbp = ct.linear(batch.y, batch.physics)
    reference = Tomography(180, 64, circle=False, normalize=False)
    torch.testing.assert_close(fbp, reference.fbp(reference.A(batch.x)), rtol=0, atol=1e-3)
    mri = Problem("mri", acceleration=1.0, noise=1e-6)
    batch = mri.measure(stack, [20]).batch([0])
    assert batch.x.shape == (1, 2, 64, 64) and float(batch.x[:, 1].abs().max()) == 0
    torch.testing.assert_close(mri.linear(batch.y, batch.physics), batch.x, rtol=0, atol=1e-4)


def test_magnitude():
    x = rand(3, 2, 4, 5)
    torch.testing.assert_close(magnitude(x)[:, 0], torch.complex(x[:, 0], x[:, 1]).abs())
    assert magnitude(x[0]).shape == (1, 4, 5) and magnitude(x[:, :1]) is not None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"kind": "pet"}, "Unknown problem 'pet'"),
        ({"kind": "ct", "views": 0}, "views >= 1"),
        ({"kind": "mri", "acceleration": 0.5}, "acceleration >= 1"),
        ({"kind": "ct", "noise": 0.0}, "noise > 0"),
        ({"kind": "ct", "ridge": 0.0}, "ridge > 0"),
    ],
)
def test_wrong_problem(arguments, words):
    with pytest.raises(ValueError, match=words):
        Problem(**arguments)


# --- learning


def small_ridge(noise_level: float | None = 0.1) -> ConvexRidge:
    regularizer = ConvexRidge((3,), 3, knots=6)
    regularizer.noise_level = noise_level
    return regularizer


def test_only_scalars_are_adapted_from_a_start_for_the_noise():
    original = small_ridge()
    made = medical_learning.rescalable(original, 1e-4)
    assert {n for n, p in made.named_parameters() if p.requires_grad} == {"log_weight", "log_scale"}
    assert float((made.log_weight - original.log_weight).detach()) == pytest.approx(math.log(1e-4 / 0.1**2))
    unknown = medical_learning.rescalable(small_ridge(None), 1e-4)
    assert torch.equal(unknown.log_weight, original.log_weight)
    with pytest.raises(ValueError, match="log_weight to adapt it"):
        medical_learning.rescalable(Nameless(), 1.0)


class Nameless(TotalVariation):
    """A regularizer without the parameter."""

    def __init__(self):
        super().__init__()
        del self.log_weight


@pytest.fixture(scope="module", params=[pytest.param(kind, marks=pytest.mark.slow) for kind in ("ct", "mri")])
def record(request):
    problem = Problem(request.param, views=VIEWS, acceleration=3.0, noise=0.05, ridge=1e-2)
    original = small_ridge()
    before = {name: t.clone() for name, t in original.state_dict().items()}
    made = medical.run(problem, None, {"ridge": original}, size=SIZE, slices=(1, 1, 2), train=2)
    assert all(torch.equal(t, before[name]) for name, t in original.state_dict().items())
    return made


def test_record(record):
    text = json.dumps(record, allow_nan=False)
    assert json.loads(text) == record and record["complete"]
    assert str(Path.home()) + "/" not in text and str(ROOT) not in text
    linear = "filtered backprojection" if record["settings"]["problem"]["kind"] == "ct" else "zero filled"
    assert list(record["methods"]) == [linear, "TV, grid search", "TV, MAID", "ridge, adapted", "ridge, trained"]
    settings = record["settings"]
    assert [len(settings["slices"][part]) for part in ("train", "validation", "test")] == [1, 1, 2]
    assert "contiguous block" in settings["split"] and {"torch", "bilevel_imaging"} <= record["environment"].keys()


def test_scores_are_those_of_certified_reconstructions(record):
    settings = record["settings"]
    problem, stack = Problem(**settings["problem"]), load_stack(None, SIZE, square=True)
    names = list(stack.slices)
    pairs = problem.measure(stack, [names.index(name) for name in settings["slices"]["test"]])
    for method in ("TV, MAID", "ridge, adapted", "ridge, trained"):
        energy = VariationalEnergy(record.learned[method].requires_grad_(False), ridge=problem.ridge)
        batch = pairs.batch([0, 1])
        exact, info = minimize(energy.bind(batch.y, batch.physics).double(), error_tol=1e-6)
        assert bool(info.converged.all())
        for i, name in enumerate(settings["slices"]["test"]):
            row = record["methods"][method]["slices"][name]
            shown, truth = record.pictures[method][i], record.pictures["gt"][i]
            error = float((shown.double() - truth.double()).square().mean())
            assert row["psnr"] == pytest.approx(-10 * math.log10(error), abs=1e-3)
            # moduli differ by no more than complex images
            assert float((shown.double() - magnitude(exact[i])).norm()) <= row["distance"] + 1e-6
            assert row["distance"] <= settings["accuracy_per_pixel"] * math.sqrt(batch.x[0].numel()) * (1 + 1e-9)


def test_means(record):
    for made in record["methods"].values():
        for key, value in made["mean"].items():
            values = [row[key] for row in made["slices"].values()]
            assert value == pytest.approx(max(values) if key == "distance" else sum(values) / len(values))


def test_learning_lowers_losses(record):
    learned = {method: made["learning"] for method, made in record["methods"].items()}
    maid, search = learned["TV, MAID"], learned["TV, grid search"]
    assert maid["certified_steps"] == maid["steps"]
    low, high = maid["loss_interval"]
    assert low <= maid["loss"] <= high
    assert maid["loss"] <= 1.02 * search["loss"]  # two numbers against a weight and two smoothings
    adapted, trained = learned["ridge, adapted"], learned["ridge, trained"]
    assert set(adapted["values"]) == {"weight", "scale"}
    losses = trained["validation_loss"]
    assert losses[str(trained["chosen_step"])] == min(losses.values()) and set(losses) == {"0", "1", "2"}
    assert trained["certified_steps"] == 2 and trained["parameters"] > 2


def test_report(record):
    lines = medical.table(record).splitlines()
    (row,) = (line for line in lines if line.startswith("mean"))
    for made in record["methods"].values():
        assert f"{made['mean']['psnr']:.2f}" in row
    assert len({len(line) for line in lines if " | " in line}) == 1
    assert sum("certified in [" in line for line in lines) == 2
    text = medical.markdown(record)
    best = max(made["mean"]["psnr"] for made in record["methods"].values())
    assert f"**{best:.2f}**" in text and text.count("**") >= 4
    with pytest.raises(ValueError, match="record of a ct or mri"):
        medical.markdown({"methods": {}})


def test_figures(record):
    figures = medical.figures(record)
    assert list(figures) == ["scores", "reconstructions"]
    assert len(figures["reconstructions"].axes) >= 2 * 2 * 6
    values = [row["psnr"] for row in record["methods"]["TV, MAID"]["slices"].values()]
    drawn = {line.get_label(): line for line in figures["scores"].axes[0].get_lines()}
    np.testing.assert_allclose(drawn["TV, MAID"].get_xdata(), values)
    assert list(medical.figures(dict(record))) == ["scores"]


# --- what is said while it runs


def test_lines_in_a_file():
    stream = io.StringIO()
    log = Log(True, stream, interval=3600)
    log.line("begin")
    with log.steps("learning", 4) as done:
        for number in range(3):
            done(f"loss {number}")
    lines = stream.getvalue().splitlines()
    assert [line.partition(" s  ")[2] for line in lines] == [
        "begin",
        "learning: step 1/4, loss 0",
        "learning: step 3/4, loss 2",
    ]
    with pytest.raises(KeyboardInterrupt), log.steps("other", 9) as done:
        done("a")
        done("b")
        raise KeyboardInterrupt
    assert stream.getvalue().splitlines()[-1].endswith("other: step 2/9, b")


def test_nothing_is_said_unasked():
    stream = io.StringIO()
    log = Log(False, stream)
    log.line("begin")
    with log.steps("learning", 1) as done:
        done("loss")
    assert stream.getvalue() == ""


def test_what_is_finished_is_saved_after_every_method(monkeypatch, capsys):
    monkeypatch.setattr(medical, "search_tv", lambda pairs, ridge: (TotalVariation(1e-3, 0.01), {"method": "none"}))
    monkeypatch.setattr(medical, "learn_scalars", lambda regularizer, *args, **kwargs: {"method": "none"})
    saved = []

    def save(record):
        saved.append((json.loads(json.dumps(record)), list(record.learned)))

    problem, options = Problem("ct", views=VIEWS, ridge=1e-2), {"size": 16, "slices": (1, 1, 1)}
    made = medical.run(problem, None, {"r": small_ridge()}, save=save, progress=True, **options)
    names = ["filtered backprojection", "TV, grid search", "TV, MAID", "r, adapted"]
    assert [list(record["methods"]) for record, _ in saved] == [names[: i + 1] for i in range(4)]
    assert not any(record["complete"] for record, _ in saved) and made["complete"]
    assert saved[-1][1] == names[1:]
    said = capsys.readouterr().err
    for name in names:
        assert f"{name}: PSNR {made['methods'][name]['mean']['psnr']:.2f}, SSIM" in said


# --- the command


@pytest.fixture(scope="module")
def command():
    spec = importlib.util.spec_from_file_location("reproduce", ROOT / "scripts" / "reproduce.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_command(command, tmp_path, capsys):
    for name, image in phantom(SIZE).items():
        pixels = (255 * image[0]).round().byte().numpy()
        (tmp_path / "volume").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "volume" / f"{name}.png")
    save_regularizer(tmp_path / "small.safetensors", small_ridge(), noise_level=0.1)
    options = ["--images", str(tmp_path / "volume"), "--size", "32", "--views", "6", "--slices", "1", "1", "1"]
    options += ["--regularizer", str(tmp_path / "small.safetensors"), "--ridge", "0.01", "--noise", "0.05"]
    out, picture = tmp_path / "out", tmp_path / "picture.png"
    assert command.main(["ct", *options, "--output", str(out), "--figure", str(picture)]) == 0
    record = json.loads((out / "record.json").read_text())
    assert "small, adapted" in record["methods"] and str(tmp_path) not in json.dumps(record)
    assert picture.read_bytes() == (out / "reconstructions.png").read_bytes()
    learned = load_regularizer(out / "small_adapted.safetensors")
    assert learned.ridge == 0.01 and learned.metadata["problem"]["views"] == 6
    values = record["methods"]["small, adapted"]["learning"]["values"]
    assert math.exp(float(learned.log_weight)) == pytest.approx(values["weight"])
    capsys.readouterr()
    assert command.main(["ct", "--markdown", str(out / "record.json")]) == 0
    assert capsys.readouterr().out == medical.markdown(record) + "\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("ct --images /no/such/folder", "no such folder"),
        ("mri --acceleration 0.5", "acceleration >= 1"),
        ("ct --size 16 --slices 40 2 6", "enough slices"),
        ("mri --size 16 --train -1", "train >= 0"),
    ],
)
def test_mistakes_are_one_line(command, arguments, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments.split())
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and out == ""
    assert words in err and err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.slow
def test_an_interrupt_keeps_what_is_finished(monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(medical, "learn_scalars", interrupted)
    made = medical.run(Problem("mri", ridge=1e-2), size=SIZE, slices=(1, 1, 1))
    assert not made["complete"] and list(made["methods"]) == ["zero filled", "TV, grid search"]
    assert "Interrupted" in medical.table(made) and "interrupted" in medical.markdown(made)
    monkeypatch.setattr(medical, "search_tv", interrupted)
    monkeypatch.setattr(medical, "_scores", interrupted)
    empty = medical.run(Problem("mri", ridge=1e-2), size=SIZE, slices=(1, 1, 1))
    assert "Interrupted before" in medical.table(empty) and len(medical.figures(empty)) >= 1
