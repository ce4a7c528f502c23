"""The compiled kernels against PyTorch's own operations: same formulas, other code."""

import os
import subprocess
import sys
from dataclasses import replace

import deepinv
import pytest
import torch
from cases import PHYSICS, build

import bilevel_imaging as bi
from bilevel_imaging import native
from bilevel_imaging.linear_solvers import ConjugateGradient
from bilevel_imaging.native import library
from bilevel_imaging.tensors import gram, inner, norm, products

pytestmark = pytest.mark.skipif(native.native_kernels() != "native", reason="no compiled kernels on this machine")
SHAPES = [(3, 1, 17, 33), (2, 3, 8, 9), (2, 1, 1, 5), (2, 1, 6, 2), (1, 1, 40, 40)]
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12}


def both_ways(function, monkeypatch):
    """What the function returns with the kernels, and without them."""
    with torch.no_grad():
        fast = function()
        with monkeypatch.context() as patch:
            patch.setattr(library, "_load", lambda: (None, "off"))
            assert not native.serves(torch.zeros(1))
            return fast, function()


def assert_alike(fast, slow, dtype):
    assert fast.keys() == slow.keys()
    for name in fast:
        size = float(slow[name].double().abs().max())
        torch.testing.assert_close(
            fast[name], slow[name], rtol=0, atol=TOLERANCE[dtype] * size + 1e-300, msg=lambda m, n=name: f"{n}: {m}"
        )


def photograph(shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_total_variation(shape, dtype, monkeypatch):
    regularizer = bi.TotalVariation(0.1, 0.03)
    x, q = photograph(shape, dtype), photograph(shape, dtype, 1) - 0.5
    radius, mu = photograph(shape[:1], dtype, 2), 0.5 + photograph(shape[:1], dtype, 3)

    def everything():
        at = regularizer.linearize(x)
        model = at.newton_model(0.7 * at.newton_memory(cold=False))
        directional, change = at.directional(q, 0.1 * radius), at.local_change(q, radius, mu)
        return {
            "gradient": at.grad,
            "gradient alone": regularizer.grad(x),
            "unit": at.unit,
            "product": at.hvp(q),
            "model": model.hvp(q),
            "memory": model.advance(0.01 * q, radius),
            "hessian": directional.hessian,
            "components": directional.mixed_components,
            "relative curvature": at.relative_curvature(radius, mu),
            "relative change": change.hessian,
            "energy": change.energy,
            "columns": at.mixed_columns(),
            "energy norms": at.mixed_energy_norms(),
            "split energy norms": at.split_energy_norms(mu),
            "rounding": regularizer.gradient_scale(x),
        }

    assert_alike(*both_ways(everything, monkeypatch), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", [(1, 3, 3), (1, 70, 90)])  # a part of a block, and more than one
def test_inner_products(size, dtype, monkeypatch):
    a, b = photograph((3, 4, *size), dtype), photograph((3, *size), dtype, 1) - 0.5
    assert_alike(*both_ways(lambda: {"gram": gram(a), "products": products(a, b)}, monkeypatch), dtype)
    expected = torch.einsum("bnchw,bchw->bn", a.double(), b.double())
    torch.testing.assert_close(products(a, b), expected, rtol=0, atol=1e-10)
    for v in a[:1].unbind(1):  # the first starts where the columns do
        expected = (a[:1].double() * v.double().unsqueeze(1)).flatten(2).sum(2)
        torch.testing.assert_close(products(a[:1], v.contiguous()), expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(gram(a)[:, 1, 2], (a[:, 1] * a[:, 2].double()).flatten(1).sum(1), rtol=1e-10, atol=0)


@pytest.mark.parametrize("compiled", [True, False])
def test_directions_along_the_gradient_lose_no_digits(compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(library, "_load", lambda: (None, "off"))
    x, radius = photograph((2, 1, 40, 30), torch.float64), torch.full((2,), 1e-4, dtype=torch.float64)
    regularizer = bi.TotalVariation(0.1, 1e-3)
    with torch.no_grad():  # almost all of Dx lies along itself: what does not is the small difference of large squares
        exact, rounded = (
            regularizer.linearize(v).local_change(v, radius.to(v.dtype), torch.ones_like(radius).to(v.dtype))
            for v in (x, x.float())
        )
    torch.testing.assert_close(rounded.energy, exact.energy, rtol=3e-4, atol=0)
    torch.testing.assert_close(rounded.hessian.double(), exact.hessian, rtol=3e-4, atol=0)


@torch.no_grad()
def test_bounds_of_what_is_not_finite():
    """A NaN must not get lost in a maximum."""
    at = bi.TotalVariation(0.1, 0.03).linearize(photograph((2, 1, 6, 7), torch.float64))
    q, radius = photograph((2, 1, 6, 7), torch.float64, 1), torch.tensor([0.1, 0.1], dtype=torch.float64)
    q[1, 0, 3, 3] = torch.nan
    hessian = at.directional(q, radius).hessian
    assert hessian[0].isfinite() and hessian[1] == torch.inf
    change = at.local_change(q, radius, torch.ones_like(radius)).hessian
    assert change[0].isfinite() and change[1] == torch.inf
    assert at.directional(q[:1].expand(2, -1, -1, -1), torch.tensor([torch.nan, 0.1])).hessian[0] == torch.inf


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", ["spline", "shared spline", "smoothed absolute"])
def test_potentials(kind, dtype, monkeypatch):
    if kind == "smoothed absolute":
        regularizer = bi.FieldsOfExperts(5, 3, potential="smoothed_absolute")
    else:
        regularizer = bi.ConvexRidge((5,), 3, shared=kind.startswith("shared"))
    z = 4 * photograph((2, 3, 7, 5), dtype, 1) - 2
    z = z * torch.logspace(-5, 0, 7).to(dtype).reshape(1, 1, 7, 1)  # all the knots
    z[0, 0, 0, 0] = 0
    u = 0.1 * photograph(z.shape, dtype, 2)

    def everything():
        profile = regularizer.profile(z)
        slope, curvature = profile.slope_and_curvature(z)
        third, lowest = profile.change(z, u.abs())
        return {
            "slope": slope,
            "alone": profile.slope(z),
            "curvature": curvature,
            "total": profile.total(z),
            "third": third,
            "lowest": lowest,
            **profile.mixed_vjp(z, u),
        }

    assert_alike(*both_ways(everything, monkeypatch), dtype)
    if dtype == torch.float64:  # a difference of nearly equal numbers near 0

        def model():
            c, slope = torch.empty_like(z), torch.empty_like(z)
            regularizer.profile(z).primal_dual(z, u, c, slope)
            return c, slope

        for fast, slow in zip(*both_ways(model, monkeypatch), strict=True):
            torch.testing.assert_close(fast, slow, rtol=1e-8, atol=1e-15)


def systems(shape, dtype, seed=0):
    problem = bi.VariationalEnergy(bi.TotalVariation(0.1, 0.01), ridge=0.1).bind(
        photograph(shape, dtype, seed), deepinv.physics.Denoising()
    )
    return problem, problem.linearize(problem.initial())


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_conjugate_gradients(dtype, monkeypatch):
    shape = (3, 2, 12, 15)
    rhs = photograph(shape, dtype, 5)
    rhs[1] *= 1e-3

    def solve():
        _, at = systems(shape, dtype)
        solution = ConjugateGradient().solve(at, rhs, torch.tensor([1e-2, 1e-4, 0.5], dtype=dtype))
        further = ConjugateGradient().resume(at, rhs, solution, 1e-5)
        return {
            "q": solution.q,
            "iterations": solution.iterations,
            "residual": solution.residual_norm,
            "energy": solution.energy_norm,
            "later": further.q,
            "all iterations": further.iterations,
        }

    fast, slow = both_ways(solve, monkeypatch)
    assert torch.equal(fast["iterations"], slow["iterations"]) and int(fast["iterations"].min()) > 3
    assert int((fast["all iterations"] - fast["iterations"]).min()) > 0
    for name in ("q", "residual", "energy", "later"):
        relative = 1e-3 if dtype == torch.float32 else 1e-9
        torch.testing.assert_close(fast[name], slow[name], rtol=relative, atol=relative * float(slow[name].abs().max()))


def test_products_are_counted():
    problem, at = systems((2, 1, 9, 8), torch.float64)
    before = problem.cost.copy()
    solution = ConjugateGradient().solve(at, photograph(problem.shape, torch.float64, 5), 1e-6)
    # and one product of the whole batch to check
    assert (problem.cost - before).hvps == int(solution.iterations.sum()) + 2


@torch.no_grad()
def test_failures_are_told_apart():
    """Not positive definite, not finite, and a limit: in the words of the solver, the others untouched."""
    _, at = systems((4, 1, 6, 6), torch.float64)
    stencil = at.inside.stencil()
    diagonal = torch.full((4, 1, 6, 6), 1.0, dtype=torch.float64)
    diagonal[1] = -1e3
    diagonal[2, 0, 2, 2] = torch.nan
    at.inside.stencil = lambda: replace(stencil, diagonal=diagonal)
    at.inside.hvp = replace(stencil, diagonal=diagonal).product
    rhs = photograph((4, 1, 6, 6), torch.float64, 7)
    solution = ConjugateGradient().solve(
        at, rhs, torch.tensor([1e-9, 1e-9, 1e-9, 0.0], dtype=torch.float64), max_iter=40
    )
    assert solution.reason[:3] == ("converged", "not positive definite", "not finite")
    assert solution.reason[3] in ("max_iter", "stagnated")
    assert solution.q.isfinite().all()


@pytest.mark.parametrize("batch", [1, 3])
def test_threads_and_batches_change_nothing(batch):
    """Bit for bit: sums are formed row by row whoever computes the rows."""
    rhs = photograph((3, 1, 37, 23), torch.float32, 5)[:batch]
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            _, at = systems((3, 1, 37, 23), torch.float32)
            part = at.subset(torch.arange(batch))
            results.append(ConjugateGradient().solve(part, rhs, 1e-4).q)
    finally:
        torch.set_num_threads(threads)
    alone = ConjugateGradient().solve(at.subset(torch.tensor([0])), rhs[:1], 1e-4).q
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert torch.equal(results[0][:1], alone)


@torch.no_grad()
def test_threads_share_the_rows_of_one_image():
    regularizer, x = bi.TotalVariation(0.1, 0.03), photograph((1, 1, 7, 23), torch.float64)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 9):
            torch.set_num_threads(count)
            results.append((regularizer.grad(x), regularizer.linearize(x).hvp(x)))
    finally:
        torch.set_num_threads(threads)
    for gradient, product in results[1:]:
        assert torch.equal(gradient, results[0][0]) and torch.equal(product, results[0][1])


@torch.no_grad()
def test_nothing_to_do():
    """An empty batch, as when every sample has stopped."""
    _, at = systems((2, 1, 6, 7), torch.float64)
    none = at.subset(torch.empty(0, dtype=torch.int64))
    v = torch.empty((0, 1, 6, 7), dtype=torch.float64)
    assert none.hvp(v).shape == v.shape and ConjugateGradient().solve(none, v, 1e-3).q.shape == v.shape
    assert bi.TotalVariation().linearize(v).grad.shape == v.shape and bi.TotalVariation().grad(v).shape == v.shape
    assert native.inner(v, v).shape == (0,)
    experts = bi.FieldsOfExperts(5, 3, potential="smoothed_absolute").linearize(v)
    assert experts.grad.shape == v.shape and experts.hvp(v).shape == v.shape


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_updates(dtype):
    """Over more than one block; a sample without a step stays as it is."""
    shape = (3, 1, 50, 100)
    q, r, p, product = (photograph(shape, dtype, seed) - 0.5 for seed in range(4))
    rz = (r.double() ** 2).flatten(1).sum(1)
    step = torch.tensor([0.3, torch.nan, -0.1], dtype=torch.float64)
    copies = [v.clone() for v in (q, r, p)]
    square = native.advance(*copies, product, step, rz)
    for i in (0, 2):
        residual = r[i] - step[i].to(dtype) * product[i]
        torch.testing.assert_close(copies[0][i], q[i] + step[i].to(dtype) * p[i])
        torch.testing.assert_close(copies[1][i], residual)
        torch.testing.assert_close(float(square[i]), float((residual.double() ** 2).sum()), rtol=1e-6, atol=0)
        torch.testing.assert_close(copies[2][i], residual + (square[i] / rz[i]).to(dtype) * p[i])
    assert all(torch.equal(copy[1], old[1]) for copy, old in zip(copies, (q, r, p), strict=True))
    torch.testing.assert_close(native.inner(q, r), (q.double() * r.double()).flatten(1).sum(1), rtol=1e-12, atol=1e-12)


def test_tiny_numbers_keep_their_norm():
    assert float(bi.tensors.norm(torch.full((1, 1, 2, 2), 1e-30))[0]) == pytest.approx(2e-30)


SCRIPT = (
    "import torch, warnings; warnings.simplefilter('error'); import bilevel_imaging as bi; print(bi.native_kernels())"
)


def in_a_new_process(folder, **environment):
    settings = {**os.environ, "XDG_CACHE_HOME": str(folder), **environment}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=settings, timeout=120)
    return done.stdout.strip(), done.stderr


@pytest.mark.slow
def test_built_once_and_switched_off(tmp_path):
    assert in_a_new_process(tmp_path)[0] == "native"
    built = list((tmp_path / "bilevel_imaging").iterdir())
    assert [path.suffix for path in built] == [".so"]
    assert in_a_new_process(tmp_path, CC="/nowhere/cc", PATH="")[0] == "no C compiler found"
    assert in_a_new_process(tmp_path, BILEVEL_NATIVE="0")[0] == "BILEVEL_NATIVE=0"
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho no license >&2\nexit 1\n")
    broken.chmod(0o755)
    words, error = in_a_new_process(tmp_path / "other", CC=str(broken))
    assert words == "" and "no license" in error  # a warning, which that process turns into an error


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 2, 17, 33), (2, 1, 1, 5), (2, 1, 6, 1), (1, 1, 40, 16)])
@torch.no_grad()
def test_one_pass_measures_what_float64_evaluates(shape, dtype):
    """All numbers of the classical certificate, from the images as they are."""
    x, q, b, f = (photograph(shape, dtype, seed) for seed in (1, 2, 3, 4))
    regularizer = bi.TotalVariation(0.2, 0.05).double()
    weight, smoothing = (float(number.exp()) for number in (regularizer.log_weight, regularizer.log_smoothing))
    found = native.measure(x, q, b, f, constant=1.3, weight=weight, smoothing=smoothing)
    x, q, b, f = (image.double() for image in (x, q, b, f))
    at = regularizer.linearize(x)
    columns, gradient = at.mixed_columns(), at.grad + 1.3 * x - b
    residual = f - at.hvp(q) - 1.3 * q
    for name, expected in {
        "x_norm": norm(x),
        "q_norm": norm(q),
        "grad_norm": norm(gradient),
        "residual_norm": norm(residual),
        "q_dot_grad": inner(q, gradient),
        "products": products(columns, q),
        "gram": gram(columns),
    }.items():
        scale = float(expected.abs().max())
        torch.testing.assert_close(getattr(found, name), expected, rtol=0, atol=1e-13 * scale, msg=name)


@pytest.mark.parametrize("physics", PHYSICS)
@torch.no_grad()
def test_compiled_systems_are_those_of_products(physics):
    """A solve checks its residual with its own stencil: that must be the Hessian to the last digits, ridge included."""
    case = build("tv_isotropic", physics, channels=1, size=(6, 7), weight=0.3)
    at = case.problem.linearize(photograph(case.problem.shape, torch.float64, 3))
    stencil, v = at.stencil(), photograph(case.problem.shape, torch.float64, 4) - 0.5
    if stencil is None:
        pytest.skip("no compiled form")
    expected = at.hvp(v)
    torch.testing.assert_close(stencil.product(v), expected, rtol=0, atol=1e-13 * float(expected.abs().max()))
    states = native.SystemStates(*(norm(v),) * 2, norm(v).square(), None, None, *(torch.zeros(len(v)).long(),) * 3)
    r = v.clone()
    stencil.solve(torch.zeros_like(v), r, v.clone(), states, 3, v)  # nothing to do: the residual of 0 is v
    assert torch.equal(r, v)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("difference", [False, True])
def test_energies_of_one_pass(shape, dtype, difference):
    """Against derivatives in float64 at the same numbers."""
    weight, smoothing, mu = 0.1, 0.03, 1.01
    x, q, b, other, residual = (photograph(shape, dtype, seed) - 0.3 for seed in range(5))
    with torch.no_grad():
        at = bi.TotalVariation(weight, smoothing).linearize(x.double())
        product = at.hvp(q.double()) + mu * q.double()
        slope = x.double() - other.double() if difference else other.double()
        options = {"constant": mu, "weight": weight, "smoothing": smoothing}
        found = native.measure(x, q, b, other, **options, strong_convexity=mu, residual=residual, difference=difference)
        own, columns = found.energies, at.mixed_columns()
        strong_convexity = torch.full((shape[0],), mu, dtype=torch.float64)
        up = 1 + 1e-4  # which the linearization adds
        expected = {
            "residual_norm": (found.residual_norm, norm(slope - product)),
            "products": (found.products, products(columns, q.double())),
            "adjoint": (own.adjoint, inner(q.double(), product)),
            "drift": (own.drift, norm(slope - product - residual.double())),
            "misfit": (own.misfit, norm(x.double() - b.double())),
            "columns": (up * own.columns, at.mixed_energy_norms()),
            "split": (up * own.split, at.split_energy_norms(strong_convexity)),
            "loss_grad_norm": (own.loss_grad_norm, norm(slope)),
            "largest": (own.largest, x.double().abs().flatten(1).amax(1)),
        }
        for name, (fast, slow) in expected.items():
            torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}")
        if not difference:  # the numbers of the classical certificate are the same
            classical = native.measure(x, q, b, other, **options)
            assert classical.energies is None
            torch.testing.assert_close(classical.gram, found.gram, rtol=1e-12, atol=1e-13)
            torch.testing.assert_close(classical.residual_norm, found.residual_norm, rtol=1e-12, atol=1e-13)
