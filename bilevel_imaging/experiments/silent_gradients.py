"""What libraries return, without a word, when a hypergradient's two solves stop early; and the same with a certificate.

Two problems in float64, both started at the measurement y:

- denoising of a signal of 60 samples, a sigmoid with noise of standard deviation 0.5: x* = argmin 1/2 ||x - y||^2 +
  exp(theta)/2 ||Dx||^2 at exp(theta) = 350. Quadratic, condition number 1.4e3. The finished reconstruction is too
  smooth, so the true hypergradient is positive: smooth less. An unfinished one is too rough and says: smooth more.
- deblurring of a photograph (smoothed total variation, weight and smoothing 0.01, 9x9 Gaussian blur, ridge 1e-3).

The settings of other libraries are their defaults, those of their documentation, round numbers of iterations between 3
and 400 such as training loops use, and one that is enough; gradient steps are 1 / L long, L the Lipschitz constant of
the gradient. Truth is the implicit function theorem in dense linear algebra. "Warned" means a warning or printed text
during the computation; warnings about deprecated functions are not counted.
"""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from deepinv.physics import Denoising
from torch import Tensor

from bilevel_imaging._version import __version__
from bilevel_imaging.data import Degradation, photographs
from bilevel_imaging.data.degradations import gaussian_kernel
from bilevel_imaging.energies import LowerLevelProblem, VariationalEnergy
from bilevel_imaging.experiments.environment import environment
from bilevel_imaging.experiments.peers import ADAPTERS, Task
from bilevel_imaging.experiments.peers.task import tikhonov, total_variation
from bilevel_imaging.hypergradients import Hypergradient, hypergradient
from bilevel_imaging.linear_solvers import ConjugateGradient
from bilevel_imaging.lower_solvers import GradientDescent
from bilevel_imaging.regularizers import Tikhonov, TotalVariation
from bilevel_imaging.upper_level import SquaredError
from bilevel_imaging.upper_level.quasi_newton import flatten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SAMPLES, STIFFNESS, SIGNAL_NOISE = 60, 350.0, 0.5
WEIGHT, SMOOTHING, RIDGE = 0.01, 0.01, 1e-3
BLUR = Degradation("deblurring", sigma=0.02, blur_size=9, blur_std=2.0)
CORNER = (60, 180)  # of the crop, in the photograph "astronaut"
STEPS, ITERATIONS = 100, 20  # the early stop that we certify

OURS = "bilevel_imaging"
PACKAGES = ("jax", *sorted({adapter.PACKAGE for adapter in ADAPTERS}))
Record = dict[str, Any]
Row = dict[str, Any]


def signal_denoising(enough: int = 5000) -> tuple[Task, LowerLevelProblem]:
    """The quadratic problem, for other libraries and for ours."""
    t = torch.arange(SAMPLES, dtype=torch.float64) / SAMPLES
    x_true = torch.sigmoid(8 * (t - 0.5))[None]
    noise = torch.randn(x_true.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y, physics = x_true + SIGNAL_NOISE * noise, Denoising()
    energy = VariationalEnergy(Tikhonov(STIFFNESS, operator="gradient"))
    theta = flatten(energy.theta).detach()
    task = Task(x_true, y, theta, physics, None, tikhonov, 0.0, 1 + 4 * STIFFNESS, enough)
    return task, energy.bind(y[None, None], physics)


def photograph_deblurring(enough: int = 5000, size: int = 48) -> tuple[Task, LowerLevelProblem]:
    """The imaging problem, for other libraries and for ours."""
    top, left = CORNER
    x_true = photographs()["astronaut"][:, top : top + size, left : left + size]
    physics = BLUR.physics(x_true.shape)
    y = BLUR.measure(x_true, 0, physics)
    energy = VariationalEnergy(TotalVariation(WEIGHT, SMOOTHING), ridge=RIDGE)
    kernel = torch.zeros(size, size, dtype=torch.float64)
    width = BLUR.blur_size
    kernel[:width, :width] = gaussian_kernel(width, BLUR.blur_std)[0, 0]
    transfer = torch.fft.rfft2(kernel.roll((-(width // 2), -(width // 2)), (0, 1))).real
    smoothness = 1 + 8 * WEIGHT / SMOOTHING + RIDGE
    theta = flatten(energy.theta).detach()
    task = Task(x_true[0], y[0], theta, physics, transfer, total_variation, RIDGE, smoothness, enough)
    return task, energy.bind(y[None], physics)


def dense_hypergradient(task: Task, x: Tensor) -> Tensor:
    """-J^T H^-1 grad f at the minimizer x, H as a dense matrix from autograd, ``(P,)``."""
    theta, leaf = task.parameters(), x.clone().requires_grad_(True)
    gradient = task.gradient(leaf, theta)
    columns = [
        torch.autograd.grad(gradient, leaf, part.view(-1, *x.shape), retain_graph=True, is_grads_batched=True)[0]
        for part in torch.eye(x.numel(), dtype=x.dtype).split(256)
    ]
    factor = torch.linalg.cholesky(torch.cat(columns).flatten(1))
    adjoint = torch.cholesky_solve((x - task.x_true).reshape(-1, 1), factor).view_as(x)
    return -torch.autograd.grad(gradient, theta, adjoint)[0]


def run(*, enough: int = 5000, size: int = 48) -> Record:
    """All libraries that are installed, and ours, on both problems; returns the record that is saved as JSON.

    Args:
        enough: iterations of the settings that are meant to be enough.
        size: pixels along each side of the photograph.
    """
    made = {
        "signal denoising, quadratic": signal_denoising(enough),
        "photograph deblurring, total variation": photograph_deblurring(enough, size),
    }
    problems = []
    for title, (task, problem) in made.items():
        minimizer = hypergradient(problem, SquaredError(), task.x_true.view(problem.shape), relative=1e-8).x
        true = dense_hypergradient(task, minimizer.view_as(task.y))
        rows = [row for adapter in ADAPTERS for row in _peer_rows(adapter, task, true)]
        rows += [_row(OURS, __version__, name, compute, true) for name, compute in _ours(task, problem).items()]
        names = [name.removeprefix("regularizer.") for name in problem.theta]
        problems.append({"title": title, "parameters": names, "true": true.tolist(), "rows": rows})
    where = environment("cpu") | {name: _version(name) for name in PACKAGES}
    return {"enough": enough, "size": size, "environment": where, "problems": problems}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _peer_rows(adapter: ModuleType, task: Task, true: Tensor) -> list[Row]:
    remedy = f"pip install {adapter.PACKAGE}"
    number = _version(adapter.PACKAGE)
    if number is None:
        return [_empty_row(adapter.NAME, "", "", f"not installed: {remedy}")]
    try:
        methods = adapter.methods(task)
    except Exception as error:  # an old library may fail in many ways to load beside new ones
        return [_empty_row(adapter.NAME, number, "", f"can't be loaded, {type(error).__name__}: {error} ({remedy})")]
    return [_row(adapter.NAME, number, setting, compute, true) for setting, compute in methods.items()]


def _ours(task: Task, problem: LowerLevelProblem) -> dict[str, Callable[[], tuple[list[float], float]]]:
    """Settings, and what computes estimate and bound."""
    loss, x_true = SquaredError(), task.x_true.view(problem.shape)

    def early(certificate: str) -> Hypergradient:
        # x has had its gradient steps: none are added, and q gets so many iterations and no more
        solvers = {"lower": GradientDescent(max_iter=0), "linear": ConjugateGradient(max_iter=ITERATIONS)}
        x0 = task.descend(STEPS).view(problem.shape)
        accuracy = {"error_tol": 1e-12, "residual_tol": 1e-12}
        return hypergradient(problem, loss, x_true, x0=x0, certificate=certificate, **accuracy, **solvers)

    def certified() -> tuple[list[float], float]:
        h = early("auto")
        return flatten(h.grad).tolist(), h.bound

    def polished() -> tuple[list[float], float]:
        gradient, bound = early("polished").before_polish
        return flatten(gradient).tolist(), bound

    def relative() -> tuple[list[float], float]:
        h = hypergradient(problem, loss, x_true, relative=0.01)
        return flatten(h.grad).tolist(), h.bound

    stopped = f"{STEPS} gradient steps, CG of {ITERATIONS} iterations"
    return {stopped: certified, f'{stopped}, certificate="polished"': polished, "relative=0.01": relative}


def _empty_row(library: str, number: str, setting: str, note: str) -> Row:
    empty = dict.fromkeys(("gradient", "relative_error", "wrong_sign", "warned", "bound", "covers"))
    return {"library": library, "version": number, "setting": setting, **empty, "messages": [], "note": note}


def _row(library: str, number: str, setting: str, compute: Callable[[], Any], true: Tensor) -> Row:
    printed = io.StringIO()
    with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(printed):
        warnings.simplefilter("always")
        try:
            result = compute()
        except Exception as error:  # somebody else's code: a row of the table, not the end of it
            if library == OURS:
                raise
            return _empty_row(library, number, setting, f"raised {type(error).__name__}: {error}")
    gradient, bound = result if library == OURS else (result, None)
    error = float((torch.tensor(gradient, dtype=torch.float64) - true).norm())
    messages = [str(w.message) for w in caught if not issubclass(w.category, (DeprecationWarning, FutureWarning))]
    messages += [printed.getvalue()] if printed.getvalue() else []
    return {
        "library": library,
        "version": number,
        "setting": setting,
        "gradient": gradient,
        "relative_error": error / float(true.norm()),
        "wrong_sign": any(g * t < 0 for g, t in zip(gradient, true.tolist(), strict=True)),
        "warned": bool(messages),
        "bound": bound,
        "covers": None if bound is None else error <= bound,
        "messages": messages,
        "note": "",
    }


def summary(record: Record) -> str:
    """One sentence on all rows but ours."""
    rows = [row for problem in record["problems"] for row in problem["rows"]]
    rows = [row for row in rows if row["library"] != OURS and row["gradient"] is not None]
    off = sum(not row["relative_error"] <= 0.1 for row in rows)
    wrong, warned = (sum(row[key] for row in rows) for key in ("wrong_sign", "warned"))
    return (
        f"Of {len(rows)} hypergradients by other methods, most of them stopped early on purpose, "
        f"{off} are off by more than 10 %, {wrong} have a wrong sign, {warned} came with a warning."
    )


def table(record: Record) -> str:
    """The record as text, one table for each problem."""
    lines = []
    for problem in record["problems"]:
        lines += [
            f"{problem['title']}: hypergradient in {', '.join(problem['parameters'])}",
            f"truth {_numbers(problem['true'])}",
            "",
            f"{'library':17s} {'setting':62s} {'returned':>17s} {'error':>10s} {'sign':>5s} {'warned':>6s}  own bound",
        ]
        lines += [*map(_line, problem["rows"]), ""]
    lines += [
        "error: relative, against dense linear algebra; own bound: of the error, absolute, as reported by the method",
        "sign open: the method itself says that its bound leaves the sign undecided",
        summary(record),
    ]
    return "\n".join(lines)


def _numbers(values: list[float]) -> str:
    return ", ".join(f"{value:.3g}" for value in values)


def _line(row: Row) -> str:
    label = f"{row['library']:17s} "
    if row["note"]:
        return label + (f"{row['setting']}: " if row["setting"] else "") + row["note"]
    bound, sign = "none", "WRONG" if row["wrong_sign"] else "right"
    if row["bound"] is not None:
        bound = f"{row['bound']:.2g} ({'holds' if row['covers'] else 'VIOLATED'})"
        sign = "open" if min(map(abs, row["gradient"])) <= row["bound"] else sign
    percent = 100 * row["relative_error"]
    return (
        f"{label}{row['setting']:62s} {_numbers(row['gradient']):>17s} "
        f"{percent:{'8.0f' if percent >= 10 else '8.2g'}} % {sign:>5s} {'yes' if row['warned'] else 'no':>6s}  {bound}"
    )


def figure(record: Record) -> Figure:
    """One panel for each parameter of each problem: a dot is a returned value, the line is the truth."""
    from matplotlib.figure import Figure

    panels = [(problem, i) for problem in record["problems"] for i in range(len(problem["parameters"]))]
    rows = max(len(problem["rows"]) for problem in record["problems"])
    picture = Figure(figsize=(5.5 + 2.6 * len(panels), 2.2 + 0.24 * rows), layout="constrained")
    axes = picture.subplots(1, len(panels), squeeze=False)[0]
    for axis, (problem, component) in zip(axes, panels, strict=True):
        _panel(axis, problem, component)
        if axis is not axes[0]:
            axis.tick_params(labelleft=False)
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    picture.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    picture.suptitle(summary(record), fontsize=10)
    return picture


def _panel(axis: Axes, problem: dict[str, Any], component: int) -> None:
    true, rows = problem["true"][component], problem["rows"]
    values = [row["gradient"][component] for row in rows if row["gradient"] is not None]
    values = [0.0, true, *filter(math.isfinite, values)]
    margin = 0.25 * (max(values) - min(values))
    limits = (min(values) - margin, max(values) + margin)
    axis.axvspan(*((limits[0], 0) if true > 0 else (0, limits[1])), color="tab:red", alpha=0.08, lw=0)
    axis.axvline(true, color="tab:green", lw=2, label="truth")
    for position, row in enumerate(rows):
        if row["gradient"] is None:
            where = axis.get_yaxis_transform()
            axis.text(0.02, position, row["note"][:60], transform=where, va="center", fontsize=7, color="0.4")
        elif row["bound"] is not None:
            _certified_dot(axis, position, row["gradient"][component], row["bound"], limits)
        else:
            _dot(axis, position, row["gradient"][component], true)
    axis.set(xlim=limits, ylim=(len(rows) - 0.5, -0.5))
    labels = [": ".join(filter(None, (row["library"], row["setting"]))) for row in rows]
    axis.set_yticks(range(len(rows)), labels, fontsize=8)
    axis.grid(axis="y", alpha=0.3)
    title = problem["title"].replace(", ", ",\n")
    axis.set_title(f"{title}\nderivative in {problem['parameters'][component]}", fontsize=9)


def _certified_dot(axis: Axes, position: int, value: float, bound: float, limits: tuple[float, float]) -> None:
    axis.errorbar(value, position, xerr=bound, fmt="none", color="tab:blue", capsize=3, label="its certified range")
    axis.plot(value, position, "o", color="tab:blue", label=OURS)
    if value + bound > limits[1]:
        axis.text(limits[1], position, f" ±{bound:.2g}", va="center", fontsize=7, color="tab:blue")


def _dot(axis: Axes, position: int, value: float, true: float) -> None:
    if value * true < 0:
        axis.plot(value, position, "X", color="tab:red", label="wrong sign")
    elif not abs(value - true) <= 0.1 * abs(true):
        axis.plot(value, position, "D", color="tab:orange", ms=5, label="off by more than 10 %")
    else:
        axis.plot(value, position, "o", color="0.35", label="within 10 %")
