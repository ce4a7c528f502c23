"""The comparisons of the MAID paper: TV denoising and Fields of Experts, many methods, loss against total work.

After Salehi, Mukherjee, Roberts & Ehrhardt (2023), with small crops of the bundled photographs in place of Kodak's: the
original images are not part of this package, and one thread is to be enough for all runs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from bilevel_imaging.data import Degradation, ImagePairs, extract_patches, photographs
from bilevel_imaging.energies import VariationalEnergy
from bilevel_imaging.experiments import maid_report, method_comparison
from bilevel_imaging.experiments.method_comparison import MethodSpec, named
from bilevel_imaging.regularizers import FieldsOfExperts, Regularizer, TotalVariation
from bilevel_imaging.training.objective import BilevelObjective
from bilevel_imaging.upper_level import SummableTolerances

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Record = dict[str, Any]

OURS, PAPER = "MAID (ours)", "MAID (paper)"
# first accuracies (both solvers) and first steps: any of them may be what a user begins with
ACCURACIES = (1e2, 1e-2, 1e-6)
STEPS = (1e-4, 1e-1, 1e2)
# fixed accuracies, and the learning rates of which the best is chosen for each
FIXED, RATES = (1e-1, 1e-3, 1e-5), (0.3, 1.0, 3.0)


@dataclass(frozen=True)
class Problem:
    """Denoising of crops with noise of standard deviation 0.1.

    Attributes:
        title: of its figure.
        images: photographs, one crop of each.
        size: height and width of the crops.
        regularizer: makes it at its start.
        few: whether there are so few parameters that methods can take part that need no hypergradients, or dx*/dtheta.
    """

    title: str
    images: int
    size: int
    regularizer: Callable[[], Regularizer]
    few: bool

    def objective(self, *_: Any) -> BilevelObjective:
        """A new one, at the start."""
        crops = extract_patches(list(photographs(part="train").items())[: self.images], self.size, 1)
        pairs = ImagePairs.build(crops, Degradation(sigma=0.1))
        return BilevelObjective(VariationalEnergy(self.regularizer()), pairs)

    @property
    def error_tol(self) -> float:
        """Accuracy of the reconstructions when losses are measured."""
        return 1e-7 * self.size


def _total_variation() -> Regularizer:
    """The paper's start: 1/2 e^-5 times the anisotropic variation, smoothed by e^-5."""
    return TotalVariation(weight=0.5 * math.exp(-5), smoothing=math.exp(-5), isotropic=False)


PROBLEMS = {
    "tv": Problem("total variation, 2 parameters", 4, 32, _total_variation, True),
    "foe": Problem(
        "Fields of Experts, 8 filters of size 3",
        2,
        24,
        partial(FieldsOfExperts, count=8, size=3, start="random", learn_weight=True),
        False,
    ),
}


# of every problem
PARTS = ("methods", "starts")


def methods(problem: Problem) -> list[MethodSpec]:
    """All that are compared; of the fixed accuracies one for every learning rate."""
    found = [named(OURS, "maid"), named(PAPER, "maid_paper")]
    found += [named(f"HOAG, {schedule}", "hoag", schedule=schedule) for schedule in SummableTolerances.SCHEDULES]
    for accuracy in FIXED:
        exponent = f"{accuracy:.0e}".replace("e-0", "e-")
        fixed = {"error_tol": accuracy, "residual_tol": accuracy}
        found += [named(f"fixed {exponent}", "sgd", lr=rate, **fixed) for rate in RATES]
    found += [named("inexact SGD", "inexact_sgd"), named("Adam", "adam", lr=0.05)]
    if problem.few:
        found += [named("trust region", "noisy_trust_region"), named("Kunisch-Pock", "kunisch_pock")]
        found += [named("DFO-LS", "dfo_ls"), named("grid search", "grid")]
    return found


def starts() -> list[MethodSpec]:
    """MAID, ours and the paper's, from every first accuracy and step.

    Ours has no such settings: its state is set as if a step before had ended with them.
    """
    found = []
    for accuracy in ACCURACIES:
        for step in STEPS:
            ours = named(OURS, "maid", start={"error_tol": accuracy, "step_size": step / 2})
            paper = named(PAPER, "maid_paper", lr=step, error_tol=accuracy, residual_tol=accuracy)
            for spec in (ours, paper):
                settings = {"method": spec.settings["method"], "error_tol": accuracy, "lr": step}
                found.append(replace(spec, settings=settings))
    return found


def run(
    *,
    budget: int = 6000,
    problems: Sequence[str] = tuple(PROBLEMS),
    parts: Sequence[str] = PARTS,
    earlier: Sequence[Record] = (),
    save: Callable[[Record], None] | None = None,
    progress: bool = False,
) -> Record:
    """Both comparisons of every problem: all methods, and MAID from many starts.

    Args:
        budget: gradients, Hessian and mixed products per method.
        problems: some of ``PROBLEMS``; with none, what was done earlier is put together.
        parts: some of ``PARTS``: all methods, or MAID from many starts.
        earlier: records from which everything is kept that is not done anew; of two the later one counts. A part that
            was interrupted goes on, if the budget is the same.
        save: called with the record after every run.
        progress: show a bar on a terminal.

    Returns:
        a JSON-able record: "problems" by name, each with the records of :func:`method_comparison.run` under "methods"
        and "starts", and "complete", which is false after Ctrl-C and while a part is missing.

    Raises:
        ValueError: an unknown problem or part, or a budget that is not positive.
    """
    for what, given, known in (("problems", problems, PROBLEMS), ("parts", parts, PARTS)):
        unknown = [name for name in given if name not in known]
        if unknown:
            raise ValueError(f"Expected {what} out of {', '.join(known)}. Got {', '.join(unknown)}.")
    found: dict[str, Record] = {name: {"title": problem.title} for name, problem in PROBLEMS.items()}
    for old in earlier:
        for name in found:
            found[name] |= old["problems"].get(name, {})
    record: Record = {"experiment": "maid", "complete": False, "problems": {}}

    def show() -> None:
        record["problems"] = {name: one for name, one in found.items() if any(part in one for part in PARTS)}
        if save is not None:
            save(record)

    show()
    for name, part in itertools.product(problems, parts):
        problem = PROBLEMS[name]

        def keep(now: Record, name: str = name, part: str = part) -> None:
            found[name][part] = now if part == "methods" else _brief(now)
            show()

        specs = methods(problem) if part == "methods" else starts()
        settings = {"budget": budget, "error_tol": problem.error_tol, "save": keep, "progress": progress}
        before = found[name].get(part, {})
        finished = before["runs"] if before.get("budget") == budget and not before["complete"] else []
        now = method_comparison.run(specs, problem.objective, known=finished, **settings)
        keep(now)
        if not now["complete"]:
            return record
    record["complete"] = all(one.get(part, {}).get("complete", False) for one in found.values() for part in PARTS)
    return record


def _brief(record: Record) -> Record:
    """Without what the methods report themselves, which of so many runs nobody looks at."""
    kept = ("step", "work", "measured")
    runs = [{**one, "curve": [{key: point[key] for key in kept} for point in one["curve"]]} for one in record["runs"]]
    return {**record, "runs": runs}


def table(record: Record) -> str:
    """See :mod:`bilevel_imaging.experiments.maid_report`."""
    return maid_report.table(record)


def figure(record: Record) -> Figure:
    """See :mod:`bilevel_imaging.experiments.maid_report`."""
    return maid_report.figure(record)
