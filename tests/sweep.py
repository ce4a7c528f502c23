"""Randomized attack on every certificate: ``python tests/sweep.py --cases 2000 --seed 0 [--workers 2] [--json PATH]``.

Each case draws a model, an operator, both solvers, a certificate, accuracies, a dtype, a batch and hostile settings,
and compares every bound with the true error, taken from the references of ``cases``. The only slack is the reference's
own uncertainty: about 1e-17 for the models that it knows in extended precision, more for the others, whose reference is
float64. A check is called sharp where the slack is below a tenth of the bound. Solves are cut off early on purpose: a
bound must hold at any point.
With ``--polished`` every case has the polished certificate, fixed tolerances and solvers that are not cut off, which
says how sharp that certificate is; the last table printed is about it. With ``--relative ETA`` every case asks for that
relative accuracy with the default solvers; what kept the others from it is printed, in the words of the results.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import random
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial

import numpy as np
import torch
from cases import (
    COMPLEX_PHYSICS,
    GENERIC_PHYSICS,
    JOINT_REGULARIZERS,
    LINEAR_SOLVERS,
    LOWER_SOLVERS,
    NEEDS_RIDGE,
    PHYSICS,
    REGULARIZERS,
    Case,
    build,
    reference,
)

import bilevel_imaging as bi

DRAWN = tuple(name for name in REGULARIZERS if name != "user")  # which declares no constants
SIZES = ((8, 8), (6, 9), (12, 10), (1, 16))
COLOR_SIZES = ((5, 6), (4, 7))
CERTIFICATES = bi.hypergradients.CERTIFICATES
PHYSICS_CLASSES = {
    "denoising": "denoising",
    **dict.fromkeys(("inpainting", "weighting"), "inpainting"),
    **dict.fromkeys((name for name in (*PHYSICS, *GENERIC_PHYSICS) if "blur" in name or "sharpen" in name), "blur"),
    **dict.fromkeys(COMPLEX_PHYSICS, "mri"),
}
POLISHED = ("before_polish", "polished")


@dataclass(frozen=True)
class Setting:
    """All that defines one case; ``run(Setting(**...))`` reproduces it."""

    regularizer: str
    physics: str
    lower: str
    linear: str
    certificate: str
    mode: str
    error_tol: float
    residual_tol: float
    relative: float
    dtype: str
    parameters: str
    batch: int
    channels: int
    size: tuple[int, int]
    weight: float
    smoothing: float
    ridge: float
    kind: str
    max_iter: int | None  # of both solvers; None for their own
    spread: float  # of random changes of the parameters of learned models, whose start is special
    seed: int


@dataclass
class Outcome:
    """What was found: violations in words, and effectivities bound / error by certificate.

    ``relative_bounds`` are those of the estimates that ``POLISHED`` names; ``seconds`` is the time that the case took.
    """

    setting: Setting
    violations: list[str] = field(default_factory=list)
    effectivity: dict[str, float] = field(default_factory=dict)
    relative_error: float = 0.0
    relative_bound: float = math.inf
    relative_bounds: dict[str, float] = field(default_factory=dict)
    certified: bool = False
    reason: str = ""
    checks: int = 0
    sharp: int = 0
    seconds: float = field(default=0.0, compare=False)

    def check(self, name: str, error: float, bound: float, slack: float, width: float | None = None) -> None:
        """Record a violation unless error <= bound + slack (a NaN bound is one).

        ``width`` is what the slack of a sharp check is far below, the bound itself by default; checks without slack say
        how outputs fit each other and are not counted as sharp.
        """
        self.checks += 1
        width = bound if width is None else width
        self.sharp += 0 < slack < width / 10 < math.inf
        if not error <= bound + slack:
            self.violations.append(f"{name}: error {error:.6g} > bound {bound:.6g} (+ {slack:.1g})")


def draw(rng: random.Random, regularizers: Sequence[str] = DRAWN) -> Setting:
    """One random setting with one of the given regularizers."""

    def decade(low: float, high: float) -> float:
        return 10 ** rng.uniform(low, high)

    channels = rng.choice((1, 1, 3))
    physics = rng.choice([*PHYSICS, *PHYSICS, *GENERIC_PHYSICS])
    if physics in COMPLEX_PHYSICS:
        channels = 2
    sizes = SIZES if channels == 1 else COLOR_SIZES
    size = rng.choice(sizes)
    if size[0] < 3 and ("blur" in physics):  # the kernels are 3 x 3
        size = sizes[0]
    needs = physics in NEEDS_RIDGE or rng.random() < 0.3
    regularizer = rng.choice(regularizers)
    return Setting(
        regularizer=regularizer,
        physics=physics,
        lower=rng.choice([*LOWER_SOLVERS, "newton_cg", "newton_cg"]),
        linear=rng.choice([*LINEAR_SOLVERS, "conjugate_gradient"]),
        certificate=rng.choice(CERTIFICATES),
        mode=rng.choice(("tolerances", "tolerances", "tolerances", "relative", "bound_tol")),
        error_tol=decade(-8, 0),
        residual_tol=decade(-8, 0),
        relative=decade(-3, 0),
        dtype=rng.choice(("float64", "float64", "float32")),
        parameters=rng.choice(("float64", "float64", "float64", "float32")),
        batch=rng.choice((1, 1, 1, 2, 3)),
        channels=channels,
        size=size,
        weight=decade(-4, 2),
        # a network with sharper kinks than this costs the reference hundreds of Newton steps
        smoothing=decade(-2 if regularizer == "input_convex" else -3, 0),
        ridge=decade(-4, -1) if needs else 0.0,
        kind=rng.choice(("noisy", "noisy", "flat", "saturated", "ramp", "zero")),
        max_iter=rng.choice((0, 1, 5, 30, 150)),
        spread=rng.choice((0.0, 0.1, 0.5)) if regularizer in JOINT_REGULARIZERS else 0.0,
        seed=rng.randrange(10**6),
    )


def draw_polished(rng: random.Random, regularizers: Sequence[str] = DRAWN) -> Setting:
    """One random setting that shows how sharp the polished certificate is: nothing is cut off."""
    return replace(draw(rng, regularizers), certificate="polished", mode="tolerances", max_iter=None)


def draw_relative(rng: random.Random, relative: float, regularizers: Sequence[str] = DRAWN) -> Setting:
    """One random setting that asks for a relative accuracy, as most users do."""
    defaults = {"lower": "newton_cg", "linear": "conjugate_gradient", "certificate": "auto", "max_iter": None}
    return replace(draw(rng, regularizers), mode="relative", relative=relative, **defaults)


def make(s: Setting) -> Case:
    """The batch of problems of a setting."""
    case = build(
        s.regularizer, s.physics, dtype=getattr(torch, s.dtype), batch=s.batch, channels=s.channels,
        size=tuple(s.size), weight=s.weight, smoothing=s.smoothing, ridge=s.ridge, kind=s.kind, seed=s.seed,
    )  # fmt: skip
    if s.spread:
        generator = torch.Generator().manual_seed(s.seed)
        with torch.no_grad():
            for parameter in case.energy.parameters():
                parameter += s.spread * torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
    if s.parameters == "float32":
        case.energy.float()
    if s.spread or s.parameters == "float32":
        case.problem = case.energy.bind(case.y, case.physics)
    return case


def estimate(s: Setting, case: Case) -> bi.Hypergradient:
    """The hypergradient of a setting, with solvers that may give up early."""
    certificate = s.certificate
    if certificate == "metric" and case.problem.metric() is None:
        certificate = "directional"
    accuracy = {
        "tolerances": {"error_tol": s.error_tol, "residual_tol": s.residual_tol},
        "relative": {"relative": s.relative},
        "bound_tol": {"bound_tol": s.error_tol},
    }[s.mode]
    limit = {} if s.max_iter is None else {"max_iter": s.max_iter}
    return bi.hypergradient(
        case.problem,
        bi.SquaredError(),
        case.x_true,
        lower=LOWER_SOLVERS[s.lower](**limit),
        linear=LINEAR_SOLVERS[s.linear](**limit),
        certificate=certificate,
        max_rounds=12 if s.max_iter is None else 4,
        **accuracy,
    )


def flat(grad: dict[str, torch.Tensor]) -> np.ndarray:
    """All entries in one extended precision vector."""
    return np.concatenate([g.detach().double().numpy().ravel() for g in grad.values()]).astype(np.longdouble)


def run(s: Setting) -> Outcome:
    """Everything that one case must satisfy."""
    case, outcome = make(s), Outcome(s)
    true, slack, true_loss, loss_slack, samples = reference(case)
    h = estimate(s, case)
    errors = np.abs(flat(h.grad) - true).astype(float)
    error = float(np.linalg.norm(errors))
    size = float(np.linalg.norm(true.astype(float)))
    outcome.certified, outcome.reason = h.certified, h.reason
    outcome.relative_error = error / size if size > 0 else math.inf
    outcome.relative_bound = h.relative_bound
    outcome.check("bound", error, h.bound, slack)
    for name, bound in h.bounds.items():
        outcome.check(name, error, bound, slack)
    if h.component_bounds is not None:
        names = [name for name, g in h.grad.items() for _ in range(g.numel())]
        for name, e, b in zip(names, errors, flat(h.component_bounds).astype(float), strict=True):
            outcome.check(f"component {name}", float(e), float(b), slack)
    if h.before_polish is not None:
        first = float(np.linalg.norm((flat(h.before_polish[0]) - true).astype(float)))
        outcome.check("before_polish", first, h.before_polish[1], slack)
        length = float(np.linalg.norm(flat(h.before_polish[0]).astype(float)))
        outcome.relative_bounds["before_polish"] = h.before_polish[1] / length if length > 0 else math.inf
        if first > 10 * slack:
            outcome.effectivity["before_polish"] = h.before_polish[1] / first
    width = h.loss_interval[1] - h.loss_interval[0]
    outcome.check("loss above", true_loss, h.loss_interval[1], loss_slack, width)
    outcome.check("loss below", h.loss_interval[0], true_loss, loss_slack, width)
    outcome.check("loss estimate inside", h.loss_interval[0], h.loss, 0.0)
    outcome.check("loss estimate inside", h.loss, h.loss_interval[1], 0.0)
    for i, sample in enumerate(samples):
        for name, x in (("lower.x", h.lower.x), ("x", h.x)):
            moved = (x[i].double().numpy().ravel().astype(np.longdouble) - sample.x).astype(float)
            distance = float(np.linalg.norm(moved))
            outcome.check(f"distance of {name}", distance, float(h.lower.distance_bound[i]), sample.x_uncertainty)
    if math.isfinite(h.bound):
        terms = sum(h.terms.values())
        outcome.check("terms add up", abs(terms - h.bound), 1e-12 * h.bound, 0.0)
        outcome.check("sample bounds", h.bound, float(h.sample_bounds.mean()) * (1 + 1e-12), 0.0)
    if s.mode == "relative" and h.bound > s.relative * h.norm * (1 + 1e-6) and not h.reason:
        outcome.violations.append("relative: the goal is missed without a reason")
    if s.mode == "bound_tol" and h.bound > s.error_tol * (1 + 1e-6) and not h.reason:
        outcome.violations.append("bound_tol: the goal is missed without a reason")
    if error > 10 * slack:
        outcome.effectivity.update({name: bound / error for name, bound in h.bounds.items()})
        if h.certificate == "polished":
            outcome.effectivity["polished"] = h.bound / error
            outcome.relative_bounds["polished"] = h.relative_bound
    return outcome


def attempt(s: Setting) -> Outcome:
    """``run``; an exception counts as a violation: the crash of a legitimate setting is a finding too."""
    began = time.perf_counter()
    try:
        outcome = run(s)
    except Exception as error:
        outcome = Outcome(s, [f"{type(error).__name__}: {error}"])
    outcome.seconds = time.perf_counter() - began
    return outcome


@contextmanager
def attempts(settings: list[Setting], workers: int) -> Iterator[Iterable[Outcome]]:
    """The outcomes in the order of the settings, each on one thread: tensors this small are slower on several."""
    if workers == 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield map(attempt, settings)
        finally:
            torch.set_num_threads(threads)
        return
    with multiprocessing.get_context("spawn").Pool(workers, torch.set_num_threads, (1,)) as pool:
        yield pool.imap(attempt, settings)


def sweep(
    cases: int,
    seed: int,
    *,
    seconds: float = math.inf,
    progress: bool = False,
    polished: bool = False,
    relative: float | None = None,
    workers: int = 1,
    regularizers: Sequence[str] = DRAWN,
) -> list[Outcome]:
    """Random cases, at most as many as fit in the given time; which they are does not depend on ``workers``.

    Ctrl-C ends it early, with what there is.
    """
    rng, outcomes, start = random.Random(seed), [], time.perf_counter()
    one = draw_polished if polished else draw
    if relative is not None:
        one = partial(draw_relative, relative=relative)
    settings = [one(rng, regularizers=regularizers) for _ in range(cases)]
    with suppress(KeyboardInterrupt), attempts(settings, workers) as results:
        for k, outcome in enumerate(results):
            outcomes.append(outcome)
            if progress and (outcome.violations or outcome.seconds > 5):
                print(f"case {k} ({outcome.seconds:.1f} s): {outcome.violations}\n    {outcome.setting}", flush=True)
            if progress and (k + 1) % 100 == 0:
                print(f"{k + 1} cases, {time.perf_counter() - start:.0f} s", flush=True)
            if time.perf_counter() - start > seconds:
                break
    return outcomes


def summarize(outcomes: list[Outcome], below: float = math.inf) -> dict[str, dict[str, dict[str, float]]]:
    """Median and 95th percentile of bound / error by model and certificate, where the relative error is < below."""
    collected: dict[tuple[str, str], list[float]] = {}
    for o in outcomes:
        for name, value in o.effectivity.items() if o.relative_error < below else ():
            if math.isfinite(value):
                collected.setdefault((o.setting.regularizer, name), []).append(value)
    table: dict[str, dict[str, dict[str, float]]] = {}
    for (model, name), values in sorted(collected.items()):
        table.setdefault(model, {})[name] = _statistics(values)
    return table


def summarize_polished(outcomes: list[Outcome], below: float = 0.1) -> dict[str, dict[str, dict[str, float]]]:
    """The same by model and class of operators, "tv_isotropic, blur", and by model, "tv_isotropic", where the relative
    bound itself is < below."""
    collected: dict[tuple[str, str], list[float]] = {}
    for o in outcomes:
        model = o.setting.regularizer
        for name in POLISHED:
            if name in o.effectivity and o.relative_bounds.get(name, math.inf) < below:
                for row in (model, f"{model}, {PHYSICS_CLASSES[o.setting.physics]}"):
                    collected.setdefault((row, name), []).append(o.effectivity[name])
    table: dict[str, dict[str, dict[str, float]]] = {}
    for (model, name), values in sorted(collected.items()):
        table.setdefault(model, {})[name] = _statistics(values)
    return table


def _statistics(values: list[float]) -> dict[str, float]:
    return {
        "cases": len(values),
        "median": float(np.median(values)),
        "percentile_95": float(np.percentile(values, 95)),
    }


def print_polished(table: dict[str, dict[str, dict[str, float]]]) -> None:
    """One line for each model and class of operators."""
    print("bound / error where the relative bound is below 0.1")
    print(f"{'model':34} {'before_polish':>13} {'median':>8} {'95 %':>8} {'polished':>9} {'median':>8} {'95 %':>8}")
    for model, rows in table.items():
        text = []
        for name, width in zip(POLISHED, (13, 9), strict=True):
            row = rows.get(name, {"cases": 0, "median": math.nan, "percentile_95": math.nan})
            text.append(f"{row['cases']:{width}d} {row['median']:8.3g} {row['percentile_95']:8.3g}")
        print(f"{model:34}", *text)


def endings(outcomes: list[Outcome]) -> dict[str, int]:
    """How often each reason was given for a goal that was missed, numbers left out; "" for those that reached it."""
    return dict(Counter(o.reason.split(": ", 1)[-1] for o in outcomes).most_common())


def coverage(settings: list[Setting]) -> str:
    """What was drawn: ranges of the numbers that make problems hard, and shares of float32."""
    values = {
        "weight": [s.weight for s in settings],
        "smoothing": [s.smoothing for s in settings],
        "ridge": [s.ridge for s in settings if s.ridge],
    }
    ranges = [f"{name} {min(v):.2g} to {max(v):.2g}" for name, v in values.items() if v]
    shares = [
        f"{sum(getattr(s, name) == 'float32' for s in settings) / len(settings):.0%} with float32 {what}"
        for name, what in (("dtype", "data"), ("parameters", "parameters"))
    ]
    return "drawn: " + ", ".join(ranges + shares)


def main() -> int:
    """Command line; the exit status is 1 if anything was violated."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop after this time")
    parser.add_argument("--polished", action="store_true", help='certificate="polished" alone, nothing cut off')
    parser.add_argument("--relative", type=float, metavar="ETA", help="this relative accuracy, with default solvers")
    parser.add_argument("--workers", type=int, default=1, help="processes (default: %(default)s)")
    parser.add_argument("--regularizers", nargs="+", choices=REGULARIZERS, default=DRAWN, metavar="NAME")
    parser.add_argument("--json", help="write settings, violations and effectivities there")
    arguments = parser.parse_args()
    start = time.perf_counter()
    outcomes = sweep(
        arguments.cases,
        arguments.seed,
        seconds=arguments.seconds,
        progress=True,
        polished=arguments.polished,
        relative=arguments.relative,
        workers=arguments.workers,
        regularizers=arguments.regularizers,
    )
    elapsed = time.perf_counter() - start
    table, accurate, polished = summarize(outcomes), summarize(outcomes, 0.1), summarize_polished(outcomes)
    for title, shown in (("all cases", table), ("relative error below 10 %", accurate)):
        print(f"{'model':20} {'certificate':14} {'cases':>6} {'median':>10} {'95 %':>10}   bound / error, {title}")
        for model, rows in shown.items():
            for name, row in rows.items():
                print(f"{model:20} {name:14} {row['cases']:6d} {row['median']:10.3g} {row['percentile_95']:10.3g}")
    print_polished(polished)
    if arguments.relative is not None:
        for reason, count in endings(outcomes).items():
            print(f"{count:6d} {reason or 'certified to the relative accuracy asked for'}")
    violated = [o for o in outcomes if o.violations]
    certified = sum(o.certified for o in outcomes)
    print(coverage([o.setting for o in outcomes]))
    print(
        f"{len(outcomes)} cases ({certified} certified), {sum(o.checks for o in outcomes)} checks "
        f"({sum(o.sharp for o in outcomes)} sharp), {len(violated)} cases with violations, {elapsed:.0f} s"
    )
    if arguments.json:
        report = {
            "cases": len(outcomes),
            "seconds": elapsed,
            "effectivity": table,
            "effectivity_accurate": accurate,
            "effectivity_polished": polished,
            "endings": endings(outcomes),
            "violations": [{"setting": asdict(o.setting), "violations": o.violations} for o in violated],
        }
        with open(arguments.json, "w") as stream:
            json.dump(report, stream, indent=1)
    return 1 if violated else 0


if __name__ == "__main__":
    raise SystemExit(main())
