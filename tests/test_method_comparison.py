"""Comparisons of upper-level methods: what is counted, measured, kept, and said in tables."""

from __future__ import annotations

import importlib.util
import json
import math
import signal
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from bilevel_imaging.cost import Cost
from bilevel_imaging.experiments import maid, maid_report, method_comparison, method_comparison_board
from bilevel_imaging.experiments import method_comparison_report as report
from bilevel_imaging.experiments.method_comparison import MethodSpec, named
from bilevel_imaging.upper_level import MAID, CertifiedValue, FirstOrder, PaperMAID, StepReport, UpperLevelMethod
from bilevel_imaging.upper_level.quasi_newton import assign, flatten

ROOT = Path(__file__).resolve().parent.parent
TARGET = torch.tensor([1.0, -2.0], dtype=torch.float64)


class Bowl:
    """1 + 1/2 ||theta - target||^2, known to within ``error_tol``."""

    def __init__(self, scale: float = 1.0):
        self.theta = {"a": torch.zeros(1, dtype=torch.float64), "b": torch.zeros(1, dtype=torch.float64)}
        self.scale, self.asked = scale, []

    def exact(self) -> float:
        return self.scale * (1 + 0.5 * float((flatten(self.theta) - TARGET).square().sum()))

    def value(self, error_tol: float) -> CertifiedValue:
        self.asked.append(error_tol)
        value = self.exact()
        return CertifiedValue(value=value, lower=value - error_tol, upper=value + error_tol, cost=Cost(gradients=9))


class Walk(UpperLevelMethod):
    """Goes a fixed part of the way in every step, which costs 3 + 2 + 1 products."""

    def __init__(self, part: float = 0.5, stop_after: int = 10**9, fault: str = ""):
        self.part, self.stop_after, self.fault, self.steps = part, stop_after, fault, 0

    def step(self, objective: Bowl) -> StepReport:
        self.steps += 1
        if self.fault == "interrupt" and self.steps == 3:
            raise KeyboardInterrupt
        if self.fault == "error" and self.steps == 3:
            raise ValueError("Expected at most\n one parameter. Got 2.")
        theta = flatten(objective.theta)
        assign(objective.theta, theta + self.part * (TARGET - theta))
        loss = math.nan if self.fault == "nan" and self.steps == 3 else objective.exact()
        return StepReport(
            loss=loss,
            loss_lower=loss - 0.01,
            loss_upper=math.inf,
            grad_norm=1.0,
            error_bound=0.5,
            certified=True,
            reason="",
            error_tol=0.0,
            residual_tol=0.0,
            step_size=self.part,
            accepted=True,
            refinements=0,
            backtracks=0,
            param_change=0.0,
            cost=Cost(gradients=3, hvps=2, mixed_products=1, forward_ops=100, values=100),
            stop="there" if self.steps == self.stop_after else "",
        )

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]


def walk(label: str, part: float = 0.5, max_steps: int | None = None, **options) -> MethodSpec:
    return MethodSpec(label, lambda: Walk(part, **options), {"lr": part}, max_steps)


def compare(*specs, **options):
    options = {"budget": 60, "error_tol": 1e-9, **options}
    return method_comparison.run(specs, lambda spec, seed: Bowl(1.0 + seed), **options)


def test_work_is_counted_and_the_budget_ends_a_run():
    record = compare(walk("a"), budget=55)
    (run,) = record["runs"]
    # six products a step: the tenth step begins below the budget of 55 and is finished
    assert (run["steps"], run["work"], run["ended"]) == (10, 60, "budget")
    assert run["cost"] == {"gradients": 30, "hvps": 20, "mixed_products": 10}
    assert record["complete"] and run["seconds"] > 0
    json.dumps(record, allow_nan=False)


def test_ends():
    specs = (
        walk("stops", stop_after=4),
        walk("steps", max_steps=5),
        walk("nan", fault="nan"),
        walk("bad", fault="error"),
    )
    ends = {run["label"]: (run["steps"], run["ended"]) for run in compare(*specs)["runs"]}
    assert ends == {
        "stops": (4, "there"),
        "steps": (5, "5 steps"),
        "nan": (3, "not finite"),
        "bad": (2, "failed: Expected at most one parameter. Got 2."),
    }


def test_every_run_starts_afresh_and_is_measured_alike():
    judge = Bowl()
    record = compare(walk("a"), walk("a"), walk("b", 0.25), reference=lambda seed: judge)
    first, again, other = record["runs"]
    for run, part in ((first, 0.5), (again, 0.5), (other, 0.25)):
        for point in run["curve"]:
            exact = 1 + 2.5 * (1 - part) ** (2 * point["step"])
            assert point["measured"]["loss"] == pytest.approx(exact, rel=1e-14)
            assert point["measured"]["lower"] < point["measured"]["loss"] < point["measured"]["upper"]
        assert run["curve"][0]["step"] == 0 and run["curve"][-1]["step"] == run["steps"]
        assert run["final"] == run["curve"][-1]["measured"]
    assert set(judge.asked) == {1e-9}
    assert torch.equal(flatten(judge.theta), torch.zeros(2, dtype=torch.float64))
    # what the methods say themselves is kept too; what is not finite is not a number in JSON
    point = first["curve"][1]
    assert (point["loss"], point["upper"], point["bound"]) == (1 + 2.5 / 4, None, 0.5)


def test_curves_are_thinned_by_work_and_end_at_the_end():
    record = compare(walk("a", 0.001), budget=6000)
    curve = record["runs"][0]["curve"]
    work = [point["work"] for point in curve]
    assert work[-1] == 6000 and len(work) < 60
    steps = [b / a for a, b in zip(work[1:-2], work[2:-1], strict=True)]
    assert min(steps) >= method_comparison.THINNING and max(steps) <= 2


def test_ctrl_c_keeps_what_is_finished():
    saved = []
    specs = walk("whole"), walk("broken off", fault="interrupt"), walk("never begun")
    record = compare(*specs, save=lambda r: saved.append(len(r["runs"])))
    assert [run["label"] for run in record["runs"]] == ["whole"] and not record["complete"] and saved == [1]
    assert [line.split()[0] for line in report.table(record).splitlines()] == ["method", "whole", "above"]
    assert [line.get_label() for line in report.figure(record).axes[0].get_lines()][:1] == ["whole"]
    nothing = compare(walk("b", fault="interrupt"))
    assert report.table(nothing) == "no method is finished" and report.figure(nothing).axes


def test_learned_average_is_what_counts():
    class Averaging(Walk):
        def learned(self):
            return {"a": TARGET[:1], "b": TARGET[1:]}

    (run,) = compare(MethodSpec("average", Averaging))["runs"]
    assert run["final"]["loss"] == 1.0


def test_work_to_half_a_percent_and_hand_tuning():
    # excess after k steps is 2.5 (1 - part)^(2 k): within 0.5 % after 5 steps of 0.5, and after 3 of 0.8
    record = compare(walk("tuned", 0.5), walk("tuned", 0.8), walk("alone", 0.5), walk("short", 0.5, max_steps=2))
    rows = {row["label"]: row for row in report.summary(record)}
    best = report.best_losses(record)[0]
    assert best == pytest.approx(1, abs=2e-9) and best < 1
    assert (rows["tuned"]["needed"], rows["tuned"]["settings"], rows["tuned"]["tried"]) == (12, {"lr": 0.8}, 2)
    assert (rows["alone"]["needed"], rows["alone"]["tried"], rows["alone"]["reached"]) == (30, 1, 1)
    assert rows["short"]["needed"] == math.inf and rows["short"]["reached"] == 0
    assert rows["short"]["excess"] == pytest.approx(2.5 / 16, rel=1e-6)
    text = report.table(record)
    assert "tuned (lr 0.8, best of 2)" in text and "not reached" in text and "16 %" in text


def test_an_uncertain_end_does_not_count_as_reached():
    loose = {"loss": 1.0, "lower": 0.9, "upper": 1.1}
    assert report.excess(loose, 1.0) == pytest.approx(0.1)
    one = {"curve": [{"work": 5, "measured": loose}, {"work": 9, "measured": {**loose, "upper": 1.001}}]}
    assert report.work_to_reach(one, 1.0) == 9
    assert report.excess({"loss": None, "lower": None, "upper": None}, 1.0) == math.inf
    uncertified = {"loss": 1.002, "lower": None, "upper": None}
    assert report.excess(uncertified, 1.0) == pytest.approx(0.002)


def test_several_seeds():
    record = compare(walk("a", 0.5), walk("b", 0.05), seeds=(0, 1))
    assert [(run["label"], run["seed"]) for run in record["runs"]] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    best = report.best_losses(record)
    assert best[1] == pytest.approx(2 * best[0], rel=1e-6)
    rows = {row["label"]: row for row in report.summary(record)}
    ends = [run["final"]["loss"] for run in record["runs"] if run["label"] == "a"]
    assert rows["a"]["loss"] == sum(ends) / 2 and rows["a"]["reached"] == 2 and rows["b"]["reached"] == 0
    slow = [report.excess(run["final"], best[run["seed"]]) for run in record["runs"] if run["label"] == "b"]
    record["runs"][1]["final"] = {"loss": 3.0, "lower": 3.0, "upper": 3.0}
    worst = {row["label"]: row["excess"] for row in report.summary(record)}["b"]
    assert worst == pytest.approx(2.0, rel=1e-5) and worst > 1.5 * max(slow)
    assert "(2/2)" in report.table(record) and "(0/2)" in report.table(record)


def test_figure_shows_measured_losses_and_the_intervals_of_the_methods():
    record = compare(walk("a", 0.5), walk("b", 0.3))
    figure = report.figure(record)
    work, seconds = figure.axes
    points = record["runs"][0]["curve"][1:]
    for axis, key in ((work, "work"), (seconds, "seconds")):
        line = next(line for line in axis.get_lines() if line.get_label() == "a")
        assert list(line.get_xdata()) == [point[key] for point in points]
        assert line.get_ydata()[0] == pytest.approx(2.5 / 4, rel=1e-5)
        assert axis.get_xscale() == axis.get_yscale() == "log"
    # the upper ends are infinite here: there is no band to draw
    assert all(not path.vertices.size for band in work.collections for path in band.get_paths())
    for run in record["runs"]:
        for point in run["curve"][1:]:
            point["upper"] = point["loss"] + 0.5
    band = report.figure(record).axes[0].collections[0].get_paths()[0].vertices
    assert band[:, 1].max() == pytest.approx(2.5 / 4 + 0.5, rel=1e-5) and set(band[:, 0]) == {p["work"] for p in points}


def test_arguments_are_checked():
    for options in ({"budget": 0}, {"seeds": ()}):
        with pytest.raises(ValueError, match="Expected budget >= 1, methods and seeds"):
            compare(walk("a"), **options)
    with pytest.raises(ValueError, match="Unknown method 'mad'. Choose from maid,"):
        named("x", "mad")


def test_named_methods_and_where_they_start():
    spec = named("x", "maid", start={"error_tol": 1e2, "step_size": 3.0}, relative=0.2)
    first, second = spec.build(), spec.build()
    assert isinstance(first, MAID) and first is not second
    assert (first.error_tol, first.step_size, first.relative) == (1e2, 3.0, 0.2)
    assert spec.settings == {"method": "maid", "relative": 0.2, "error_tol": 1e2, "step_size": 3.0}
    assert (MAID().error_tol, MAID().step_size) == (0.0, 0.0)


def test_an_interrupt_waits_until_tensorboard_is_loaded(tmp_path, monkeypatch):
    import torch.utils.tensorboard as real

    class Interrupted(ModuleType):
        def __getattr__(self, name):
            signal.raise_signal(signal.SIGINT)
            loaded.append(name)
            return getattr(real, name)

    loaded = []
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", Interrupted("torch.utils.tensorboard"))
    with pytest.raises(KeyboardInterrupt):
        method_comparison_board.write_hparams(compare(walk("a")), tmp_path)
    assert loaded[-1:] == ["SummaryWriter"]


def test_board_has_settings_metrics_and_curves(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import plugin_data_pb2

    record = compare(walk("a one", 0.5), walk("b", 0.05), seeds=(0, 1))
    folders = method_comparison_board.write_hparams(record, tmp_path)
    assert [f.name for f in folders] == ["00_a_one_seed0", "01_b_seed0", "02_a_one_seed1", "03_b_seed1"]
    events = EventAccumulator(str(folders[0]))
    events.Reload()
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    given = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert (
        given["label"].string_value == "a one" and given["lr"].number_value == 0.5 and given["seed"].number_value == 0
    )
    run = record["runs"][0]
    assert events.Scalars("hparam/loss")[0].value == pytest.approx(run["final"]["loss"], rel=1e-6)
    assert events.Scalars("hparam/work_to_half_percent")[0].value == 30
    curve = events.Scalars(method_comparison_board.LOSS_TAG)
    assert [e.step for e in curve] == [point["work"] for point in run["curve"]]
    slow = EventAccumulator(str(folders[1]))
    slow.Reload()
    assert "hparam/work_to_half_percent" not in slow.Tags()["scalars"]


# --- the experiment of the MAID paper


@pytest.fixture(scope="module")
def tiny():
    """The first problem on one crop of 16 x 16."""
    return maid.Problem("tiny", 1, 16, maid.PROBLEMS["tv"].regularizer, True)


def test_the_list_of_methods_is_that_of_the_paper(tiny):
    labels = [spec.label for spec in maid.methods(tiny)]
    assert list(dict.fromkeys(labels)) == (
        ["MAID (ours)", "MAID (paper)", "HOAG, exponential", "HOAG, quadratic", "HOAG, cubic"]
        + ["fixed 1e-1", "fixed 1e-3", "fixed 1e-5", "inexact SGD", "Adam"]
        + ["trust region", "Kunisch-Pock", "DFO-LS", "grid search"]
    )
    assert labels.count("fixed 1e-1") == len(maid.RATES)
    many = [spec.label for spec in maid.methods(maid.PROBLEMS["foe"])]
    assert set(labels) - set(many) == {"trust region", "Kunisch-Pock", "DFO-LS", "grid search"}
    fixed = next(spec for spec in maid.methods(tiny) if spec.label == "fixed 1e-3").build()
    assert isinstance(fixed, FirstOrder) and fixed.accuracy == {"error_tol": 1e-3, "residual_tol": 1e-3}
    assert maid.PROBLEMS["tv"].objective().theta["regularizer.log_weight"].item() == pytest.approx(-5 - math.log(2))


def test_starts_cover_the_range():
    made = [(spec, spec.build()) for spec in maid.starts()]
    given = {(spec.settings["error_tol"], spec.settings["lr"]) for spec, _ in made}
    assert {1e2, 1e-6} <= {a for a, _ in given} and {1e-4, 1e2} <= {s for _, s in given}
    for spec, method in made:
        if isinstance(method, PaperMAID):
            found = (method.error_tol, method.residual_tol, method.step_size)
            assert found == (spec.settings["error_tol"],) * 2 + (spec.settings["lr"],)
        else:
            assert spec.label == maid.OURS
            # the next step of MAID is twice as long as the last one
            assert (method.error_tol, 2 * method.step_size) == (spec.settings["error_tol"], spec.settings["lr"])


def test_the_experiment_end_to_end(tiny, monkeypatch):
    monkeypatch.setattr(maid, "RATES", (1.0,))
    few = [spec for spec in maid.methods(tiny) if spec.label in (maid.OURS, maid.PAPER, "fixed 1e-1")]
    monkeypatch.setattr(maid, "methods", lambda problem: few)
    monkeypatch.setattr(maid, "PROBLEMS", {"tv": tiny})
    monkeypatch.setattr(maid, "ACCURACIES", (1e-2,))
    monkeypatch.setattr(maid, "STEPS", (1e-1,))
    saved = []
    record = maid.run(budget=60, problems=("tv",), save=lambda r: saved.append(json.dumps(r)))
    assert record["complete"] and len(saved) >= 5 and json.loads(saved[-1])["problems"] == record["problems"]
    json.dumps(record, allow_nan=False)
    found = record["problems"]["tv"]
    for run in (*found["methods"]["runs"], *found["starts"]["runs"]):
        assert not run["ended"].startswith(("failed", "not finite")), run["label"]
        loss = run["final"]
        assert loss["lower"] <= loss["loss"] <= loss["upper"] < math.inf
        assert loss["upper"] - loss["lower"] < 1e-5 * loss["loss"]
        # what a method certified for itself is true, where it speaks of the loss after the step
        if run in found["methods"]["runs"] and run["label"] in (maid.OURS, maid.PAPER):
            for point in run["curve"][1:]:
                assert point["lower"] <= point["measured"]["upper"] and point["measured"]["lower"] <= point["upper"]
    text = maid.table(record)
    assert all(label in text for label in ("MAID (ours)", "fixed 1e-1", "of 1 starts came within", "1e-02"))
    assert len(maid.figure(record).axes) == 2


def test_the_experiment_stops_and_refuses(tiny, monkeypatch):
    monkeypatch.setattr(maid, "PROBLEMS", {"tv": tiny, "foe": tiny})
    monkeypatch.setattr(maid, "methods", lambda problem: [walk("whole", max_steps=1), walk("b", fault="interrupt")])
    monkeypatch.setattr(maid.Problem, "objective", lambda *_: Bowl())
    record = maid.run(budget=60)
    assert not record["complete"] and list(record["problems"]) == ["tv"]
    both = maid.run(budget=70, problems=("foe",), parts=("methods",), earlier=[record])
    assert both["problems"]["tv"] == record["problems"]["tv"] and list(both["problems"]) == ["tv", "foe"]
    assert [one["methods"]["budget"] for one in both["problems"].values()] == [60, 70] and not both["complete"]
    # the part that was interrupted goes on: what had finished is not run again
    monkeypatch.setattr(maid, "methods", lambda problem: [walk("whole", fault="interrupt"), walk("b")])
    ended = maid.run(budget=60, problems=("tv",), parts=("methods",), earlier=[record])["problems"]["tv"]["methods"]
    assert ended["complete"] and ended["runs"][0] == record["problems"]["tv"]["methods"]["runs"][0]
    assert [one["label"] for one in ended["runs"]] == ["whole", "b"]
    other = maid.run(budget=61, problems=("tv",), parts=("methods",), earlier=[record])["problems"]["tv"]["methods"]
    assert not other["complete"] and other["runs"] == []
    monkeypatch.setattr(maid, "starts", lambda: [walk("start", max_steps=1)])
    added = maid.run(budget=80, problems=("tv",), parts=("starts",), earlier=[both])["problems"]
    assert added["foe"] == both["problems"]["foe"] and added["tv"]["methods"] == record["problems"]["tv"]["methods"]
    assert added["tv"]["starts"]["budget"] == 80 and added["tv"]["starts"]["complete"]
    assert maid.run(problems=(), earlier=[record, {"problems": {"foe": added["foe"]}}])["problems"] == both["problems"]
    assert "whole" in maid.table(record) and "from" not in maid.table(record) and len(maid.figure(record).axes) == 2
    with pytest.raises(ValueError, match="Expected problems out of tv, foe. Got moon."):
        maid.run(problems=("moon",))
    with pytest.raises(ValueError, match="Expected parts out of methods, starts. Got ends."):
        maid.run(parts=("ends",))


def test_verdict_counts_starts_and_compares_with_the_best_fixed_accuracy():
    def run(label, error_tol, lr, losses):
        known = [{"loss": loss, "lower": loss, "upper": loss} for loss in losses]
        curve = [{"work": 10 * (k + 1), "measured": loss} for k, loss in enumerate(known)]
        final = curve[-1]["measured"]
        return {
            "label": label,
            "seed": 0,
            "settings": {"error_tol": error_tol, "lr": lr},
            "curve": curve,
            "final": final,
        }

    one = {
        "methods": {"runs": [run("fixed 1e-1", 0, 0, [2.0, 1.5, 1.004])]},
        "starts": {
            "runs": [
                run("ours", 1e2, 1e-4, [1.0]),
                run("ours", 1e-6, 1e2, [2.0, 1.001]),
                run("paper", 1e2, 1e-4, [2.0, 1.1]),
                run("paper", 1e-6, 1e2, [3.0, 1.5]),
            ]
        },
    }
    assert maid_report.verdict(one) == [
        "ours: 2 of 2 starts came within 0.5 %, with a work of 15 on average, 20 at most",
        "paper: 0 of 2 starts came within 0.5 %",
        "best fixed accuracy and learning rate: a work of 30",
    ]
    rows = maid_report.starts_table(one).splitlines()
    assert rows[1].split() == ["1e+02", "1e-04", "0", "%", "10", "10", "%", "-"]
    assert rows[2].split() == ["1e-06", "1e+02", "0.1", "%", "20", "50", "%", "-"]


@pytest.fixture(scope="module")
def command():
    spec = importlib.util.spec_from_file_location("reproduce", ROOT / "scripts" / "reproduce.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_command_passes_its_options_and_writes_what_is_finished(command, tmp_path, monkeypatch, capsys):
    given = {}

    def run(**options):
        given.update(options)
        if not options["earlier"]:
            options["save"]({"saved": 1})
            assert json.loads((tmp_path / "copy.json").read_text()) == {"saved": 1}
        return {"experiment": "maid", "budget": 7, "complete": False, "problems": {}}

    monkeypatch.setattr(maid, "run", run)
    arguments = ["maid", "--budget", "7", "--problems", "tv", "--output", str(tmp_path / "out")]
    assert command.main([*arguments, "--json", str(tmp_path / "copy.json")]) == 130
    assert (given["budget"], given["problems"], given["earlier"]) == (7, ["tv"], []) and "parts" not in given
    assert command.main([*arguments, "--keep", str(tmp_path / "copy.json"), "--parts", "starts"]) == 130
    assert given["earlier"][0]["problems"] == {} and given["parts"] == ["starts"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"figure.png", "record.json"}
    with pytest.raises(SystemExit) as stopped:
        monkeypatch.undo()
        command.main(["maid", "--problems", "moon"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.endswith("error: Expected problems out of tv, foe. Got moon.\n")
