"""Curves of run folders."""

import json

import pytest

from bilevel_imaging.errors import DataError
from bilevel_imaging.experiments import training_curves


def step(k: int, **changes) -> dict:
    values = {
        "kind": "step",
        "step": k,
        "seconds": 2.0 * k,
        "loss": 5 / k,
        "loss_lower": 4.9 / k,
        "loss_upper": 5.1 / k,
        "grad_norm": 1.0,
        "relative_bound": 0.5,
        "work": 10 * k,
        "certified": True,
        "trusted": True,
    }
    return {**values, **changes}


def folder_with(tmp_path, lines):
    folder = tmp_path / "a_run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_curves_of_a_run(tmp_path):
    lines = [{"kind": "validation", "step": 0, "psnr": 20.0}, *(step(k) for k in range(1, 1001))]
    lines[500]["relative_bound"], lines[500]["trusted"] = None, False
    lines.append({"kind": "validation", "step": 1000, "psnr": 28.5})
    record = training_curves.run([folder_with(tmp_path, lines)])
    curve = record["runs"]["a_run"]
    steps = [point["step"] for point in curve["curve"]]
    assert len(steps) == training_curves.POINTS and steps[0] == 1 and steps[-1] == 1000 and steps == sorted(steps)
    assert (curve["steps"], curve["certified"], curve["trusted"], curve["seconds"]) == (1000, 1000, 999, 2000.0)
    assert [v["psnr"] for v in curve["validation"]] == [20.0, 28.5]
    assert "28.50" in training_curves.table(record)
    json.dumps(record, allow_nan=False)
    axes = training_curves.figure(record).axes
    assert axes[0].lines[0].get_xdata()[-1] == pytest.approx(2000 / 60)


def test_folders_without_a_run_are_named(tmp_path):
    with pytest.raises(DataError, match="expected a run folder"):
        training_curves.run([tmp_path])
    with pytest.raises(DataError, match="no finished step"):
        training_curves.run([folder_with(tmp_path, [{"kind": "validation", "step": 0, "psnr": 20.0}])])
