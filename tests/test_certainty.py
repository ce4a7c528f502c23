"""What certificates cost, where float32 stops, the command for benchmarks, and what the sweep says about sharpness."""

from __future__ import annotations

import importlib.util
import json
import math
import random
import sys
from pathlib import Path

import pytest
import sweep
import torch
from sweep import PHYSICS_CLASSES, Outcome, coverage, draw, draw_polished, print_polished, summarize_polished

from bilevel_imaging.experiments import certainty, float32_floor
from bilevel_imaging.hypergradients import hypergradient
from bilevel_imaging.lower_solvers import NewtonCG
from bilevel_imaging.tensors import norm
from bilevel_imaging.upper_level import SquaredError
from bilevel_imaging.upper_level.quasi_newton import flatten

ROOT = Path(__file__).resolve().parent.parent


# --- the cost of certainty


@pytest.fixture(scope="module")
def record():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certainty, "ERROR_TOLS", certainty.ERROR_TOLS[::3])
        patch.setattr(certainty, "RESIDUALS", certainty.RESIDUALS[::2])
        return certainty.run(crops=2, size=16)


def comparisons(record):
    return [row for w in record["workloads"].values() for row in (*w["crops"], w["batch"])]


@pytest.mark.slow
def test_record_of_the_cost(record):
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert list(record["workloads"]) == ["denoising", "deblurring", "inpainting"]
    assert [len(w["crops"]) for w in record["workloads"].values()] == [2, 2, 2]
    for row in comparisons(record):
        certified, oracle, one = row["certified"], row["oracle"], row["one_tolerance"]
        assert certified["reason"] == "" and certified["error"] <= certified["bound"] <= record["goal"]
        assert certified["work"] == certified["gradients"] + certified["hvps"]
        assert oracle["error"] <= record["goal"] and one["error"] <= record["goal"]
        assert row["ratio"] == certified["work"] / oracle["work"] and row["ratio"] > 1
        assert row["ratio_one_tolerance"] == certified["work"] / one["work"]
        # not at a loose end of the grid, where a still looser pair might do
        assert oracle["error_tol"] < record["error_tols"][0]


def test_table_of_the_cost(record):
    rows = certainty.table(record).splitlines()[-3:]
    assert [row.split()[0] for row in rows] == list(record["workloads"])
    for row, workload in zip(rows, record["workloads"].values(), strict=True):
        low, high = sorted(crop["ratio"] for crop in workload["crops"])
        assert f"{(low + high) / 2:.2f} ({low:.2f}-{high:.2f})" in row and f"{workload['batch']['ratio']:.2f}" in row


def test_trials_are_the_solves_that_they_say(monkeypatch):
    monkeypatch.setattr(certainty, "ERROR_TOLS", (10.0, 1.0))
    monkeypatch.setattr(certainty, "RESIDUALS", (0.5, 0.3, 0.1))
    patches = certainty.extract_patches(certainty.photographs(), 16, 1)[:3]
    problem, x_true = certainty.WORKLOADS["deblurring"].build(patches)
    true = flatten(hypergradient(problem, SquaredError(), x_true, relative=1e-6).grad)
    work, error = certainty.trials(problem, x_true, true)
    assert (work[:, 1:-1] >= work[:, :-2]).all() and (work[0] <= work[1]).all()
    for i, error_tol in enumerate(certainty.ERROR_TOLS):
        before = problem.cost.copy()
        x = NewtonCG().solve(problem, None, error_tol).x
        lower = problem.cost - before
        size = norm(x - x_true)
        for j, tol in enumerate((*(r * size for r in certainty.RESIDUALS), error_tol)):
            solver = certainty.ConjugateGradient(preconditioner="auto")
            h = hypergradient(problem, SquaredError(), x_true, error_tol=error_tol, residual_tol=tol, linear=solver)
            assert float(error[i, j]) == pytest.approx(float((flatten(h.grad) - true).norm() / true.norm()), rel=1e-6)
            assert work[i, j] * 3 == lower.gradients + lower.hvps + int(h.linear.iterations.sum())
            assert work[i, j] * 3 < h.cost.gradients + h.cost.hvps


def test_the_oracle_takes_no_lucky_pair():
    generator = torch.Generator().manual_seed(1)
    lucky = 0
    for _ in range(50):
        error = 10 ** (1 - 3 * torch.rand(5, 4, generator=generator, dtype=torch.float64))
        error[-2:, -2:] = 1e-3
        work = torch.rand(5, 4, generator=generator, dtype=torch.float64)
        allowed = [(i, j) for i in range(5) for j in range(4) if bool((error[i:, j:] <= 0.5).all())]
        i, j = min(allowed, key=lambda pair: float(work[pair]))
        found = certainty._cheapest(work, error, 0.5)
        assert found["work"] == float(work[i, j]) and found["error"] == float(error[i, j])
        assert (found["error_tol"], found["residual"]) == (certainty.ERROR_TOLS[i], certainty.RESIDUALS[j])
        lucky += float(work[error <= 0.5].min()) < found["work"]
    assert lucky > 10  # cheaper pairs there were
    with pytest.raises(RuntimeError, match=r"<= 1e-06.*extend"):
        certainty._cheapest(work, error, 1e-6)


# --- the command


@pytest.fixture
def command(monkeypatch):
    spec = importlib.util.spec_from_file_location("benchmark", ROOT / "scripts" / "benchmark.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def call(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments])
        module.main()

    return call


def test_command_for_the_cost(command, record, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(certainty, "run", lambda: record)
    command("certainty", "--threads", "1", "--json", str(tmp_path / "new" / "cost.json"))
    assert capsys.readouterr().out.strip() == certainty.table(record)
    assert json.loads((tmp_path / "new" / "cost.json").read_text()) == record
    with pytest.raises(SystemExit):
        command("certainty", "--repeats", "3")
    with pytest.raises(SystemExit):
        command()


# --- where float32 stops


@pytest.fixture(scope="module")
def floors():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(float32_floor, "ACCURACIES", (1e-1, 1e-4, 1e-8))
        return float32_floor.run(crops=1, size=16)


def test_three_ways_have_one_problem():
    degradation, weight, ridge = float32_floor.PROBLEMS["deblurring"]
    ways, x_true = float32_floor.build(degradation, weight, ridge, 1, 16)
    single, default, double = ways.values()
    assert single.double() is None and single.dtype == default.dtype == torch.float32
    assert double.dtype == torch.float64 and default.double().dtype == torch.float64
    x = x_true.double() + 0.01
    torch.testing.assert_close(default.double().grad(x), double.grad(x), rtol=0, atol=0)
    torch.testing.assert_close(single.grad(x.float()), default.grad(x.float()), rtol=0, atol=0)


@pytest.mark.slow
def test_float32_bounds_hold_and_stop_at_a_floor(floors):
    assert json.loads(json.dumps(floors, allow_nan=False)) == floors
    for problem in floors["problems"].values():
        assert problem["truth_bound"] < 1e-5
        for ways in problem["requests"].values():
            assert list(ways) == list(float32_floor.WAYS)
            for curve in ways.values():
                for bound, error in zip(curve["bound"], curve["error"], strict=True):
                    assert bound is None or error <= bound * (1 + 1e-6) + problem["truth_bound"]
        goal = {way: float32_floor.floor(curve)[0] for way, curve in problem["requests"]["goal"].items()}
        single, default, double = goal.values()
        # float64 residuals take float32 solves to the floor of float64
        assert single > 1e3 * default and default < 10 * double < 1e-5


def test_float32_table_and_figure(floors):
    rows = float32_floor.table(floors).splitlines()[-12:]
    assert [row.split()[0] for row in rows] == ["denoising"] * 6 + ["deblurring"] * 6
    axes = float32_floor.figure(floors).axes
    assert len(axes) == 4 and all(axis.get_xscale() == axis.get_yscale() == "log" for axis in axes)
    assert [len(axis.get_lines()) for axis in axes] == [6, 7, 6, 7]
    assert float32_floor.floor({"bound": [None, None], "error": [1.0, 0.5]}) is None


# --- the sweep's report


def test_sweep_draws_what_makes_problems_hard():
    rng = random.Random(0)
    settings = [draw(rng) for _ in range(3000)]
    for name, low, high in (("weight", 2e-4, 50), ("smoothing", 1.1e-3, 0.9), ("ridge", 1.2e-4, 0.08)):
        values = [value for s in settings if (value := getattr(s, name))]
        assert min(values) < low and max(values) > high, name
    for name in ("dtype", "parameters"):
        assert 0.2 < sum(getattr(s, name) == "float32" for s in settings) / len(settings) < 0.4
    assert {s.physics for s in settings} == set(PHYSICS_CLASSES)
    assert set(PHYSICS_CLASSES.values()) == {"denoising", "blur", "inpainting", "mri"}
    text = coverage(settings)
    assert "smoothing 0.001 to" in text and "% with float32 data" in text


def test_polished_draws_differ_in_nothing_else():
    first, second = random.Random(4), random.Random(4)
    for _ in range(50):
        setting, polished = draw(first), draw_polished(second)
        assert (polished.certificate, polished.mode, polished.max_iter) == ("polished", "tolerances", None)
        assert (polished.seed, polished.weight, polished.lower) == (setting.seed, setting.weight, setting.lower)


def test_polished_table(capsys):
    setting = sweep.replace(draw_polished(random.Random(0)), regularizer="tv_isotropic", physics="blur_reflect")
    outcomes = [
        Outcome(setting, effectivity={"polished": e, "before_polish": 1.0}, relative_bounds={"polished": b})
        for e, b in ((2.0, 0.01), (4.0, 0.05), (1000.0, 0.2))
    ]
    outcomes[0].relative_bounds["before_polish"] = 0.09
    table = summarize_polished(outcomes)
    row = {
        "before_polish": {"cases": 1, "median": 1.0, "percentile_95": 1.0},
        "polished": {"cases": 2, "median": 3.0, "percentile_95": pytest.approx(3.9)},
    }
    # of a model, and of it with one class of operators
    assert table == {"tv_isotropic": row, "tv_isotropic, blur": row}
    print_polished(table)
    last = capsys.readouterr().out.splitlines()[-1].split()
    assert last == ["tv_isotropic,", "blur", "1", "1", "1", "2", "3", "3.9"]


@pytest.mark.slow
def test_polished_sweep():
    outcomes = sweep.sweep(8, seed=1, polished=True)
    assert [(o.violations, o.setting) for o in outcomes if o.violations] == []
    known = [o for o in outcomes if "before_polish" in o.relative_bounds]
    assert len(known) >= 4 and all(o.seconds > 0 for o in outcomes)
    for o in known:
        assert all(value >= 1 - 1e-6 for name, value in o.effectivity.items() if math.isfinite(value)), o


@pytest.mark.slow
def test_sweep_does_not_depend_on_the_number_of_processes():
    assert sweep.sweep(12, seed=2, workers=2) == sweep.sweep(12, seed=2)
    assert len(sweep.sweep(50, seed=2, workers=2, seconds=0)) == 1


def test_bounds_by_way_of_a_better_estimate_hold_to_the_last_digit():
    """Flat images, where the better one has no error at all: the distance to it is the error, but for its rounding."""
    setting = sweep.Setting(
        regularizer="tv_isotropic",
        physics="weighting",
        lower="accelerated_gradient",
        linear="minres",
        certificate="polished",
        mode="tolerances",
        error_tol=5.135757039725606e-06,
        residual_tol=0.32436040561898477,
        relative=0.43032861214291745,
        dtype="float64",
        parameters="float64",
        batch=3,
        channels=1,
        size=(12, 10),
        weight=27.202105753717706,
        smoothing=0.05915751166578788,
        ridge=0.0,
        kind="flat",
        max_iter=30,
        spread=0.0,
        seed=576654,
    )
    outcome = sweep.attempt(setting)
    assert outcome.checks > 0 and not outcome.violations
