"""Whatever accuracy and step a method starts from, no accepted step raises the true loss beyond its own intervals.

The true loss is that of a dense reference in extended precision, which shares nothing with the solvers.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from cases import exact_loss
from torch import Tensor

import bilevel_imaging as bi
from bilevel_imaging.data import Degradation, ImagePairs, extract_patches, photographs
from bilevel_imaging.upper_level import (
    HOAG,
    MAID,
    KunischPock,
    NoisyLineSearch,
    NoisyTrustRegion,
    PaperMAID,
    UpperLevelMethod,
)
from bilevel_imaging.upper_level.quasi_newton import flatten

STEPS = 4


def _maid(error_tol: float, step: float) -> UpperLevelMethod:
    return _as_if_left(MAID(), error_tol=error_tol, step_size=step / 2)


def _maid_secant(error_tol: float, step: float) -> UpperLevelMethod:
    return _as_if_left(MAID(model="secant"), error_tol=error_tol, step_size=step / 2)


def _paper_maid(error_tol: float, step: float) -> UpperLevelMethod:
    return PaperMAID(lr=step, error_tol=error_tol, residual_tol=error_tol)


def _hoag(error_tol: float, step: float) -> UpperLevelMethod:
    return HOAG(lr=step, error_tol=error_tol)


def _noisy_line_search(error_tol: float, step: float) -> UpperLevelMethod:
    return _as_if_left(NoisyLineSearch(lr=step), error_tol=error_tol)


def _noisy_trust_region(error_tol: float, step: float) -> UpperLevelMethod:
    return _as_if_left(NoisyTrustRegion(radius=step), error_tol=error_tol)


def _kunisch_pock(error_tol: float, step: float) -> UpperLevelMethod:
    return _as_if_left(KunischPock(largest_move=step), error_tol=error_tol)


def _as_if_left(method: UpperLevelMethod, **state: float) -> UpperLevelMethod:
    """What is no setting: as if a step before had ended with it."""
    method.load_state_dict({**method.state_dict(), **state})
    return method


# by name: from a first accuracy and step; whether a decrease is certain, or only no increase beyond both intervals;
# and what breaks its acceptance test
METHODS: dict[str, tuple[Callable[[float, float], UpperLevelMethod], bool, tuple[type, str, object]]] = {
    "maid": (_maid, True, (MAID, "_compare", "accept")),
    "maid_paper": (_paper_maid, True, (PaperMAID, "_accepted", True)),
    "hoag": (_hoag, False, (HOAG, "_raised", False)),
    "noisy_line_search": (_noisy_line_search, False, (NoisyLineSearch, "_accepted", True)),
    "noisy_trust_region": (_noisy_trust_region, False, (NoisyTrustRegion, "_accepted", True)),
    "kunisch_pock": (_kunisch_pock, False, (KunischPock, "_accepted", True)),
    "maid_secant": (_maid_secant, True, (MAID, "_compare", "accept")),
}
# weight and smoothing from which the longest moves, and Newton's, which are long where the loss is flat, raise it
START = (0.2, 0.3)


@functools.cache
def pairs() -> ImagePairs:
    images = list(photographs(part="train").items())[:2]
    return ImagePairs.build(extract_patches(images, 8, 1, seed=3), Degradation(sigma=0.1))


class Watched(bi.BilevelObjective):
    """Remembers the certified intervals at every theta."""

    def __init__(self, weight: float, smoothing: float):
        super().__init__(bi.VariationalEnergy(bi.TotalVariation(weight, smoothing)), pairs())
        self.seen: list[tuple[Tensor, float, float]] = []

    def value(self, error_tol):
        value = super().value(error_tol)
        self.seen.append((flatten(self.theta), value.lower, value.upper))
        return value

    def hypergradient(self, **accuracy):
        h = super().hypergradient(**accuracy)
        self.seen.append((flatten(self.theta), *h.loss_interval))
        return h


def check(objective: Watched, method: UpperLevelMethod, *, certain: bool) -> tuple[int, int]:
    """Take steps: (how many were accepted, how many there were).

    Raises:
        AssertionError: the true loss contradicts an interval or a step.
    """
    accepted = steps = 0
    loss, uncertainty = exact_loss(objective)
    for _ in range(STEPS):
        old = flatten(objective.theta)
        # a step can begin with what the one before has computed at its end
        objective.seen = [entry for entry in objective.seen if torch.equal(entry[0], old)]
        report = method.step(objective)
        steps += 1
        before = [(lower, upper) for theta, lower, upper in objective.seen if torch.equal(theta, old)]
        assert all(lower - uncertainty <= loss <= upper + uncertainty for lower, upper in before)
        if not report.accepted:
            assert torch.equal(flatten(objective.theta), old)
        else:
            new, new_uncertainty = exact_loss(objective)
            assert report.loss_lower - new_uncertainty <= new <= report.loss_upper + new_uncertainty
            wide = max(upper - lower for lower, upper in before) + report.loss_upper - report.loss_lower
            allowed = 0.0 if certain else wide
            assert new <= loss + allowed + uncertainty + new_uncertainty, "the true loss went up"
            loss, uncertainty, accepted = new, new_uncertainty, accepted + 1
        if report.stop:
            break
    return accepted, steps


def count_accepted(name: str, seeds: Sequence[int]) -> tuple[int, int]:
    """From random accuracies, steps and parameters: (steps accepted, steps taken); raises as :func:`check` does."""
    build, certain, _ = METHODS[name]
    totals = np.zeros(2, dtype=int)
    for seed in seeds:
        rng = np.random.default_rng([seed, list(METHODS).index(name)])
        accuracy, step = 10 ** rng.uniform(-6, 2), 10 ** rng.uniform(-4, 2)
        objective = Watched(10 ** rng.uniform(-2.5, -0.5), 10 ** rng.uniform(-2, -0.5))
        totals += check(objective, build(accuracy, step), certain=certain)
    return int(totals[0]), int(totals[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_no_accepted_step_raises_the_loss(name):
    accepted, _ = count_accepted(name, range(10))
    assert accepted >= 15  # of 40 at most: the check is not empty


@pytest.mark.parametrize("name", METHODS)
def test_the_check_notices_a_broken_acceptance_test(name, monkeypatch):
    build, certain, (kind, test, verdict) = METHODS[name]
    check(Watched(*START), build(1e-2, 1e2), certain=certain)
    monkeypatch.setattr(kind, test, staticmethod(lambda *arguments: verdict))
    with pytest.raises(AssertionError, match="the true loss went up"):
        check(Watched(*START), build(1e-2, 1e2), certain=certain)


def main() -> int:
    """``python tests/test_accepted_steps.py --runs 50``: many runs of every method, too long for a test."""
    parser = argparse.ArgumentParser(description="Check that no accepted step raises the true loss.")
    parser.add_argument("--runs", type=int, default=50, metavar="N", help="of every method (default: %(default)s)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="(default: all)")
    parsed, failed = parser.parse_args(), 0
    for name in parsed.methods:
        violations, totals = 0, np.zeros(2, dtype=int)
        for seed in range(parsed.runs):
            try:
                totals += count_accepted(name, [seed])
            except AssertionError as error:
                violations += 1
                print(f"{name}, run {seed}: {str(error).splitlines()[0]}")
        print(
            f"{name}: {parsed.runs} runs, {totals[1]} steps, {totals[0]} accepted; "
            f"{violations} runs in which the true loss or an interval was violated",
            flush=True,
        )
        failed += violations
    return min(failed, 1)


if __name__ == "__main__":
    raise SystemExit(main())
