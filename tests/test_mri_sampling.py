"""The experiment on sampling masks: its price grows as it says, and a short run gives all that its report needs."""

from __future__ import annotations

import json

import pytest
import torch

from bilevel_imaging.energies import SamplingMask, VariationalEnergy
from bilevel_imaging.experiments import mri_sampling
from bilevel_imaging.regularizers import TotalVariation
from bilevel_imaging.training import evaluation
from bilevel_imaging.upper_level import SamplingPenalty


def test_the_price_of_values_between_0_and_1_grows_from_a_third_of_the_run_on():
    mask = SamplingMask((1, 4), 0.5)
    with torch.no_grad():
        mask.logits[0, 0] = -30.0
    penalty = SamplingPenalty(VariationalEnergy(TotalVariation(), data_weight=mask), 2.0, 8.0)
    linear, between = 2 * 0.375, 8 * 0.25 * 0.75
    for done, part in ((0.0, 0.0), (1 / 3, 0.0), (2 / 3, 0.5), (1.0, 1.0), (1.5, 1.0)):
        penalty.advance(done)
        assert penalty.value() == pytest.approx(linear + part * between)
        logits = mask.logits.detach().clone().requires_grad_(True)
        s = logits.sigmoid()
        (expected,) = torch.autograd.grad((2 * s + part * 8 * s * (1 - s)).mean(), logits)
        torch.testing.assert_close(penalty.grad(), expected)
    assert SamplingPenalty(VariationalEnergy(TotalVariation(), data_weight=mask), 2.0, 8.0).value() == pytest.approx(
        linear + between
    )
    with pytest.raises(ValueError, match="Expected binary as a finite number >= 0. Got -1"):
        SamplingPenalty(VariationalEnergy(TotalVariation(), data_weight=mask), 2.0, -1)


def test_a_short_run_has_all_that_the_report_shows(monkeypatch):
    monkeypatch.setattr(evaluation, "BASELINE_SMOOTHINGS", (0.01,))
    monkeypatch.setattr(evaluation, "GRID", (1e-2,))
    monkeypatch.setattr(evaluation, "REFINEMENTS", 0)
    saved: list[int] = []
    record = mri_sampling.run(penalties=(3.0, 300.0), steps=2, size=16, save=lambda r: saved.append(len(r["runs"])))
    assert record["complete"] and saved == [1, 2]
    assert json.loads(json.dumps(record))["settings"]["steps"] == 2
    few, many = (sum(one["mask"]) for one in reversed(record["runs"]))
    assert few < many < 16  # the higher price leaves less
    for one in record["runs"]:
        assert one["loss_interval"][0] <= one["loss"] <= one["loss_interval"][1] and one["certified"]
        assert one["work"] > 0 and len({len(found["columns"]) for found in one["patterns"].values()}) == 1
    text = mri_sampling.table(record)
    assert "price 300" in text and "all hypergradients certified" in text and "low frequencies" in text
    masks, scores = mri_sampling.figure(record).axes
    assert len(masks.lines) == 2 and len(scores.lines) == 3


def test_settings_out_of_range():
    for wrong in ({"penalties": ()}, {"penalties": (-1.0,)}, {"penalties": (float("nan"),)}, {"steps": 0}):
        with pytest.raises(ValueError, match="Expected penalties, finite and >= 0, and steps >= 1"):
            mri_sampling.run(**wrong)
