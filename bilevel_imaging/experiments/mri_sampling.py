"""Which columns of k-space to measure: learned sampling masks at several prices of measuring, beside fixed patterns.

After Sherry et al. (2020), "Learning the sampling pattern for MRI": the mask S enters 1/2 ||S (F x - y)||^2, and the
upper level pays mean(beta S + b S (1 - S)), b growing from 0 to ``BINARY`` beta. The weight of total variation is not
learned: it could shrink together with the mask, at no loss and a smaller price. Images are bundled photographs. At the
end as many columns as S has on average, those without which the loss is largest, are measured or not, and compared with
as many of the lowest frequencies, or drawn at random, total variation tuned for each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from bilevel_imaging.cost import Cost
from bilevel_imaging.data import Degradation, ImagePairs, center_crop, extract_patches, photographs
from bilevel_imaging.energies import SamplingMask, VariationalEnergy
from bilevel_imaging.experiments.environment import environment
from bilevel_imaging.experiments.palette import DOTS
from bilevel_imaging.regularizers import TotalVariation
from bilevel_imaging.training.objective import BilevelObjective
from bilevel_imaging.training.progress import hidden
from bilevel_imaging.training.sampling import compare_patterns, describe_patterns
from bilevel_imaging.upper_level import UPPER_LEVEL_METHODS, SamplingPenalty

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Record = dict[str, Any]

PENALTIES = (3.0, 6.0, 12.0)
# final price of S (1 - S) over that of S
BINARY = 4.0
SIGMA, RIDGE, START, RATE, RELATIVE = 0.03, 1e-3, 0.9, 0.2, 0.5
STEPS = 60


def pairs(part: str, size: int, seed: int) -> ImagePairs:
    """Measurements of all of k-space: two patches of every training photograph, the middle of every test one."""
    images = list(photographs(part=part).items())
    if part == "train":
        patches = extract_patches(images, size, 2, seed)
    else:
        patches = [(name, center_crop(image, size, name)) for name, image in images]
    return ImagePairs.build(patches, Degradation("mri", sigma=SIGMA, acceleration=1, seed=seed + (part != "train")))


def run(
    *,
    penalties: Sequence[float] = PENALTIES,
    steps: int = STEPS,
    size: int = 64,
    seed: int = 0,
    progress: bool = False,
    save: Callable[[Record], None] | None = None,
) -> Record:
    """Learn one mask for every price; Ctrl-C ends early with those that are finished.

    Args:
        penalties: prices beta of all of k-space, in units of the squared error.
        steps: of Adam, with certified hypergradients.
        size: height and width of the patches, pixels.
        seed: of patches, noise and the random pattern.
        progress: show a bar on a terminal.
        save: called with the record after every mask.

    Returns:
        a JSON-able record: "runs" with "penalty", "mask", "share" (its mean), "loss" and its interval, "work",
        "certified" and "patterns" (see :func:`bilevel_imaging.training.sampling.compare_patterns`).

    Raises:
        ValueError: no penalties, one that is negative or not finite, or steps below 1.
    """
    if not penalties or not all(0 <= beta < math.inf for beta in penalties) or steps < 1:
        raise ValueError(f"Expected penalties, finite and >= 0, and steps >= 1. Got {list(penalties)} and {steps}.")
    train, test = pairs("train", size, seed), pairs("test", size, seed)
    settings = {"penalties": list(penalties), "steps": steps, "size": size, "seed": seed, "sigma": SIGMA}
    record: Record = {"experiment": "mri_sampling", "complete": False, "settings": settings, "runs": []}
    record["environment"] = environment("cpu")
    bar = tqdm(total=len(penalties) * steps, unit="step", disable=hidden(progress))
    try:
        with bar:
            for beta in penalties:
                bar.set_postfix_str(f"price {beta:g}", refresh=False)
                record["runs"].append(_learned(float(beta), train, test, steps, seed, bar))
                if save is not None:
                    save(record)
        record["complete"] = True
    except KeyboardInterrupt:
        pass
    return record


def _learned(beta: float, train: ImagePairs, test: ImagePairs, steps: int, seed: int, bar: tqdm) -> Record:
    mask = SamplingMask((1, train.x[0].shape[-1]), START)
    fixed = TotalVariation(0.01, 0.01, learn_weight=False, learn_smoothing=False)
    energy = VariationalEnergy(fixed, ridge=RIDGE, data_weight=mask)
    penalty = SamplingPenalty(energy, beta, BINARY * beta)
    objective = BilevelObjective(energy, train, penalty=penalty)
    method, cost, certified = UPPER_LEVEL_METHODS["adam"](lr=RATE, relative=RELATIVE), Cost(), True
    for step in range(steps):
        penalty.advance(step / steps)
        report = method.step(objective)
        cost, certified = cost + report.cost, certified and report.certified
        bar.update()
    penalty.advance(1.0)
    loss = objective.value(1e-4 * train.x[0].numel() ** 0.5)
    return {
        "penalty": beta,
        "mask": mask.mask.detach().flatten().tolist(),
        "share": float(mask.mask.detach().mean()),
        "loss": loss.value,
        "loss_interval": [loss.lower, loss.upper],
        "work": cost.gradients + cost.hvps + cost.mixed_products,
        "certified": certified,
        "patterns": compare_patterns(mask, fixed, train, test, ridge=RIDGE, seed=seed),
    }


def table(record: Record) -> str:
    """What was learned at every price, and the scores of the patterns."""
    lines = []
    for one in record["runs"]:
        low, high = one["loss_interval"]
        how = "all hypergradients certified" if one["certified"] else "some hypergradients not certified"
        lines.append(f"price {one['penalty']:g}: {one['share']:.0%} of k-space, loss in [{low:.4f}, {high:.4f}], {how}")
        lines += [f"  {line}" for line in describe_patterns(one["patterns"])]
    if not record["complete"]:
        lines.append("Interrupted: only what was finished is shown.")
    return "\n".join(lines)


def figure(record: Record) -> Figure:
    """Left the masks, right PSNR against the part of k-space that is measured."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(10, 3.8), layout="constrained")
    masks, scores = picture.subplots(1, 2)
    runs = sorted(record["runs"], key=lambda one: one["share"])
    for number, one in enumerate(runs):
        values, color = one["mask"], DOTS[number % len(DOTS)][0]
        frequencies = [k - len(values) // 2 for k in range(len(values))]
        masks.step(frequencies, values, where="mid", color=color, label=f"price {one['penalty']:g}")
    masks.set(xlabel="frequency of the column", ylabel="S", title="learned masks", ylim=(0, 1.05))
    for (color, marker), name in zip(DOTS, runs[0]["patterns"] if runs else (), strict=False):
        points = [one["patterns"][name] for one in runs]
        heights = [point["psnr"]["reconstructed"] for point in points]
        scores.plot([100 * p["share"] for p in points], heights, marker + "-", color=color, label=name)
    scores.set(xlabel="columns measured (%)", ylabel="PSNR (dB)", title="total variation, tuned for each pattern")
    for axis in (masks, scores):
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend()
    return picture
