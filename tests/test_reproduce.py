"""The quadratic experiment against the numbers of its original code, and the command that runs experiments."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from bilevel_imaging.experiments import quadratic

ROOT = Path(__file__).resolve().parent.parent
STEPS = (20, 40, 60, 80, 100)


@pytest.fixture(scope="module", params=[pytest.param("whole", marks=pytest.mark.slow)])
def record():
    return quadratic.run()


@pytest.fixture(scope="module")
def command():
    spec = importlib.util.spec_from_file_location("reproduce", ROOT / "scripts" / "reproduce.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- the numbers, each to all digits that are known (Ehrhardt & Roberts 2023, Section 4.1)


CONSTANTS = {
    "smoothness": "5108.127832",
    "strong_convexity": "145.602732",
    "condition": "35.0826",
    "gradient_descent_rate": "0.944572",
    "heavy_ball_rate": "0.711110",
    "loss_smoothness": "5100.0924",
    "mixed_norm": "4964.883491",
    "solution_norm": "0.90649040",
    "loss": "3109.26038718",
    "loss_grad_norm": "5452.99254665",
    "hypergradient_norm": "5322.44724438",
}
DATA = {"A[0,0]": "0.5488135039", "b[0]": "2.4831349925", "e[0]": "6.0998427739"}
DISTANCES = {
    "FISTA": ("1.319e-1", "4.886e-3", "1.485e-4", "4.149e-6", "1.072e-7"),
    "gradient descent": ("2.520e-1", "7.201e-2", "2.105e-2", "6.266e-3", "1.891e-3"),
    "heavy ball": ("1.137e-2", "2.402e-5", "3.904e-8", "5.679e-11", "7.759e-14"),
}
# adjoint solver, lower-level point, iterations, error
HYPERGRADIENTS = (
    ("CG", "exact", 5, "5.596e-4"),
    ("CG", "exact", 10, "8.2e-12"),
    ("heavy ball", "exact", 20, "2.037e2"),
    ("heavy ball", "exact", 100, "1.43e-9"),
    ("gradient descent", "exact", 100, "1.771e1"),
    ("gradient descent", "exact", 200, "5.905e-2"),
    *((solver, "20", 200, "54.40") for solver in ("CG", "heavy ball")),
    *((solver, "60", 200, "1.919e-4") for solver in ("CG", "heavy ball")),
    *((solver, "100", 200, "3.8e-10") for solver in ("CG", "heavy ball")),
)


def agrees(value: float, printed: str, *, rounding: float = 0.0) -> bool:
    """Whether ``value``, up to rounding errors of an experiment in float64, is a number printed like that."""
    digits, _, exponent = printed.partition("e")
    unit = 10.0 ** (int(exponent or 0) - len(digits.partition(".")[2]))
    return abs(value - float(printed)) <= 0.51 * unit + rounding


def test_agreement_can_fail():
    assert agrees(0.7111104, "0.711110") and not agrees(0.7111107, "0.711110")
    assert agrees(54.404, "54.40") and not agrees(54.39, "54.40")
    assert agrees(1.4213e-9, "1.43e-9", rounding=1e-11) and not agrees(1.4213e-9, "1.43e-9")


def test_constants(record):
    for numbers, printed in ((record["constants"], CONSTANTS), (record["data"], DATA)):
        assert numbers.keys() == printed.keys()
        assert [name for name in numbers if not agrees(numbers[name], printed[name])] == []


def test_the_draw_is_that_of_the_global_legacy_generator():
    np.random.seed(0)
    A = np.random.rand(1000, 10)
    b = A @ np.random.rand(10) + 0.01 * np.random.randn(1000)
    C, D = np.random.rand(1000, 10), np.random.rand(1000, 10)
    e = C @ np.random.rand(10) + D @ np.random.rand(10) + 0.01 * np.random.randn(1000)
    setting = quadratic.Setting.draw()
    for name, value in {"A": A, "b": b, "C": C, "D": D, "e": e}.items():
        np.testing.assert_array_equal(setting.data[name], value)
    # the problem is that of the formulas: least squares, and the chain rule through the pseudoinverse
    x = np.linalg.lstsq(D, e - C @ np.ones(10), rcond=None)[0]
    np.testing.assert_allclose(setting.x[0].numpy(), x, rtol=1e-11)
    assert float(setting.loss(setting.x)) == pytest.approx(float(np.sum((A @ x - b) ** 2)), rel=1e-12)
    gradient = 2 * (A @ np.linalg.pinv(D) @ C).T @ (b - A @ x)
    np.testing.assert_allclose(setting.gradient.numpy(), gradient, rtol=1e-10)


@pytest.mark.parametrize("solver", DISTANCES)
def test_lower_level_errors(record, solver):
    errors = record["lower"][solver]["error"]
    for k, printed in zip(STEPS, DISTANCES[solver], strict=True):
        assert agrees(errors[k], printed, rounding=1e-15), (k, errors[k])


@pytest.mark.parametrize(("solver", "lower", "k", "printed"), HYPERGRADIENTS)
def test_hypergradient_errors(record, solver, lower, k, printed):
    error = record["adjoint"][solver][lower]["error"][k]
    # relative to a hypergradient of 5322, a few units of the last place
    assert agrees(error, printed, rounding=1e-11), error


def test_the_floor_is_that_of_the_lower_level(record):
    """No adjoint work helps beyond it, and it falls like the error of x."""
    floors = [record["adjoint"]["CG"][str(n)]["error"][200] for n in STEPS]
    distances = [record["lower"]["heavy ball"]["error"][n] for n in STEPS]
    ratios = [floor / distance for floor, distance in zip(floors, distances, strict=True)]
    assert max(ratios) < 1.2 * min(ratios)


# --- the curves


def test_every_curve_lies_above_the_true_errors_at_every_iteration(record):
    curves = quadratic.curves(record)
    assert len(curves) == 3 + 3 * 6
    for name, one in curves.items():
        error = np.array(one["error"])
        assert len(error) == (101 if name.startswith("lower") else 201)
        for kind in ("a_priori", "a_posteriori"):
            assert (error <= np.array(one[kind]) * (1 + 1e-12)).all(), (name, kind)


def test_a_priori_bounds_hold_without_the_allowance_down_to_rounding(record):
    """The allowance of 7e-8 hides nothing: errors of float64 itself are below 1e-11, and 1e-15 in x."""
    assert record["rounding"]["hypergradient"] < 1e-6 and record["rounding"]["distance"] < 1e-12
    groups = [("distance", one) for one in record["lower"].values()]
    groups += [("hypergradient", one) for by_lower in record["adjoint"].values() for one in by_lower.values()]
    for kind, one in groups:
        floor = {"distance": 1e-15, "hypergradient": 1e-11}[kind]
        assert (np.array(one["error"]) <= np.array(one["a_priori"]) * (1 + 1e-12) + floor).all()


def test_bounds_are_of_use(record):
    """Each falls with the error it bounds, as far as that is not rounding."""
    for name, one in quadratic.curves(record).items():
        error, posterior = np.array(one["error"]), np.array(one["a_posteriori"])
        above = error > 10 * one["rounding"]
        assert above.sum() >= 5
        assert np.exp(np.log(posterior[above] / error[above]).mean()) < 3000, name


def test_heavy_ball_without_its_constant_is_no_bound(record):
    """The curve q^k, which is often plotted, lies below the true error, of x and of the hypergradient."""
    c = record["constants"]
    curve = record["lower"]["heavy ball"]["error"][0] * c["heavy_ball_rate"] ** np.arange(101)
    error = np.array(record["lower"]["heavy ball"]["error"])
    assert (error[5:] > curve[5:]).all() and error[100] > 20 * curve[100]
    curve = c["mixed_norm"] / c["strong_convexity"] * c["loss_grad_norm"] * c["heavy_ball_rate"] ** np.arange(201)
    error = np.array(record["adjoint"]["heavy ball"]["exact"]["error"])
    assert error[100] > 2 * curve[100] > 1e-10


def test_a_short_run_and_solvers_that_stop_early():
    short = quadratic.run(lower_iterations=4, adjoint_iterations=3, counts=(2,))
    assert [len(one["error"]) for one in short["lower"].values()] == [5, 5, 5]
    assert {len(one["a_priori"]) for by in short["adjoint"].values() for one in by.values()} == {4}
    setting = quadratic.Setting.draw()
    x = quadratic.iterates(quadratic.LOWER["heavy ball"][0](), setting.problem, 400)
    assert x.shape == (401, 10) and torch.equal(x[-1], x[-2])
    assert float((x[-1] - setting.x).norm()) < 1e-14


def test_figures_and_table(record):
    figures = quadratic.figures(record)
    assert list(figures) == ["lower_level", "adjoint_exact", "adjoint_inexact", "total_work"]
    for figure in figures.values():
        titles = [axis.get_title() for axis in figure.axes]
        assert all(title.startswith(("A priori", "A posteriori")[i % 2]) for i, title in enumerate(titles))
    lower = figures["lower_level"].axes[0]
    assert lower.get_ylim() == (1e-16, 1e2) and lower.get_yscale() == "log"
    assert len(lower.get_lines()[0].get_xdata()) == 101
    work = [line.get_xdata() for line in figures["total_work"].axes[0].get_lines() if len(line.get_xdata())]
    assert {min(w) for w in work} == set(STEPS) and {max(w) for w in work} == {200}
    text = quadratic.table(record)
    rows = [line.split() for line in text.splitlines() if line.startswith(("lower level", "adjoint"))]
    assert len(rows) == 21
    assert all(float(row[-4]) <= 1 and float(row[-2]) <= 1 for row in rows)
    assert all(float(row[-3]) >= 1 and float(row[-1]) >= 1 for row in rows)


# --- the command


def test_command_writes_figures_and_record(command, record, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quadratic, "run", lambda: record)
    monkeypatch.chdir(tmp_path)
    command.main(["quadratic", "--json", "copy/here.json"])
    folder = tmp_path / "runs" / "reproduce" / "quadratic"
    names = {path.name for path in folder.iterdir()}
    assert names == {f"{name}.png" for name in quadratic.figures(record)} | {"record.json"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in folder.glob("*.png"))
    assert json.loads((folder / "record.json").read_text()) == record
    assert (tmp_path / "copy" / "here.json").read_text() == (folder / "record.json").read_text()
    printed = capsys.readouterr().out
    assert quadratic.table(record) in printed
    assert all(name in printed for name in names | {"here.json"})


def test_command_with_a_single_figure(command, tmp_path, monkeypatch, capsys):
    stub = tmp_path / "stub_experiment.py"
    stub.write_text(
        "from matplotlib.figure import Figure\n"
        "run = lambda: {'value': 1.5}\n"
        "table = lambda record: f'value {record[\"value\"]}'\n"
        "figure = lambda record: Figure(figsize=(1, 1))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(command.EXPERIMENTS, "stub", "stub_experiment")
    command.main(["stub", "--output", str(tmp_path / "out")])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"figure.png", "record.json"}
    assert json.loads((tmp_path / "out" / "record.json").read_text()) == {"value": 1.5}
    assert "value 1.5" in capsys.readouterr().out


def test_a_record_that_cannot_be_written_leaves_the_last_one(command, tmp_path):
    path = command.save_record({"value": 1.5}, tmp_path / "new" / "record.json")
    with pytest.raises(TypeError):
        command.save_record({"value": 2.5, "bad": object()}, path)
    assert json.loads(path.read_text()) == {"value": 1.5}
    (tmp_path / "hard").hardlink_to(path)
    command.save_record({"value": math.inf}, path)
    # the old file is replaced, not written over
    assert json.loads(path.read_text()) == {"value": None}
    assert json.loads((tmp_path / "hard").read_text()) == {"value": 1.5}


def test_command_refuses_unknown_names(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(["quadratc"])
    assert stopped.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "'quadratc'" in last and "quadratic" in last and "equivalence" in last


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("denoising --device foo", "--device: expected cpu or cuda. Got 'foo'."),
        ("mri --device cuda:999", "--device: cuda:999 is not available on this machine."),
        ("quadratic --json a/b.json", "--json a/b.json: cannot be written (File exists)."),
        ("quadratic --json folder", "--json folder: is a folder. Give a file."),
        ("maid --output a/b", "--output a/b/record.json: cannot be written (Not a directory)."),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_computed(
    arguments, words, command, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").write_text("")
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(command.importlib, "import_module", lambda name: pytest.fail("too late"))
    with pytest.raises(SystemExit) as end:
        command.main(arguments.split())
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert words in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "folder"]


def test_every_registered_experiment_exists_and_follows_the_convention(command):
    for name, module in command.EXPERIMENTS.items():
        experiment = importlib.import_module(module)
        assert callable(experiment.run) and callable(experiment.table), name
        assert callable(getattr(experiment, "figures", None) or experiment.figure), name


def test_record_is_plain_json(record):
    text = json.dumps(record, allow_nan=False)
    assert json.loads(text) == record
