"""The command that compares methods on the problem of a configuration: results, settings of methods, mistakes."""

from __future__ import annotations

import json
import sys

import pytest
import torch
import yaml
from command_lines import one_line_error

from bilevel_imaging import comparison_cli
from bilevel_imaging.comparison_cli import compare_main
from bilevel_imaging.experiments import method_comparison
from bilevel_imaging.training.run_folder import new_folder
from bilevel_imaging.upper_level import HOAG, FirstOrder

TINY = "--data.patch_size=16 --data.patches_per_image=1 --data.max_images=2 --logging.progress=false".split()


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def fails(capsys, *arguments: str) -> str:
    """The one line printed to standard error; nothing is left behind."""
    return one_line_error(capsys, compare_main, [*TINY, *arguments])


class Captured(Exception):
    """What would have been run."""


@pytest.fixture
def captured(monkeypatch):
    """From arguments to what the core is called with."""

    def call(*arguments: str):
        seen = {}

        def run(specs, make, **options):
            seen.update(specs=list(specs), make=make, **options)
            raise Captured

        with monkeypatch.context() as patch:
            patch.setattr(method_comparison, "run", run)
            with pytest.raises(Captured):
                compare_main([*TINY, *arguments])
        return seen

    return call


def test_a_comparison_from_end_to_end(tmp_path, capsys):
    (tmp_path / "tv.yaml").write_text(yaml.safe_dump({"problem": {"sigma": 0.05}, "regularizer": {"weight": 0.02}}))
    arguments = ["--config=tv.yaml", *TINY, "--methods", "maid", "sgd:lr=0.3,error_tol=0.01,residual_tol=0.01"]
    arguments += ["--seeds", "0", "3", "--budget", "60", "--json", "copy/record.json"]
    assert compare_main(arguments) == 0
    folder = tmp_path / "runs" / "comparison"
    record = json.loads((folder / "record.json").read_text())
    assert (tmp_path / "copy" / "record.json").read_text() == (folder / "record.json").read_text()
    assert record["complete"] and record["config"]["problem"]["sigma"] == 0.05
    label = "sgd:lr=0.3,error_tol=0.01,residual_tol=0.01"
    assert [(r["label"], r["seed"]) for r in record["runs"]] == [("maid", 0), (label, 0), ("maid", 3), (label, 3)]
    assert record["runs"][1]["settings"] == {"method": "sgd", "lr": 0.3, "error_tol": 0.01, "residual_tol": 0.01}
    for first, second in ((0, 1), (2, 3)):
        starts = [record["runs"][i]["curve"][0]["measured"] for i in (first, second)]
        assert starts[0] == starts[1]
    assert record["runs"][0]["curve"][0]["measured"] != record["runs"][2]["curve"][0]["measured"]
    for run in record["runs"]:
        # measured in float64, however coarse the training: the interval is far narrower than float32 could tell
        assert 0 <= run["final"]["upper"] - run["final"]["lower"] < 1e-5 * run["final"]["loss"]
        assert run["ended"] == "budget" and run["work"] >= 60
    assert (folder / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((folder / "tensorboard").iterdir())) == 4
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[:3]] == ["method", "maid", label]
    assert "HPARAMS" in out and "runs/comparison" in out


def test_settings_of_methods(captured):
    methods = ["maid", "adam:lr=1e-1,clip=5", "hoag:options.schedule=cubic,error_tol=0.3"]
    seen = captured("--upper.tolerance=1e-3", "--upper.max_steps=7", "--methods", *methods)
    assert [spec.label for spec in seen["specs"]] == methods
    assert [spec.max_steps for spec in seen["specs"]] == [7, 7, 7]
    ours, adam, hoag = (spec.build() for spec in seen["specs"])
    assert ours.tolerance == 1e-3  # upper belongs to upper.method, which is maid
    assert isinstance(adam, FirstOrder) and (adam.name, adam.lr, adam.clip.multiple) == ("Adam", 0.1, 5)
    assert isinstance(hoag, HOAG) and (hoag.tolerances.schedule, hoag.tolerances.first) == ("cubic", 0.3)
    assert seen["specs"][2].settings == {"method": "hoag", "error_tol": 0.3, "schedule": "cubic"}
    assert seen["specs"][0].build() is not ours


def test_defaults_and_minibatches(captured):
    seen = captured("--methods", "maid", "adam", "fsla:minibatch=1", "--upper.method=sgd", "--upper.minibatch=2")
    objectives = [seen["make"](spec, 0) for spec in seen["specs"]]
    # methods that compare losses of all images get all, others the minibatches of the settings or of their own
    assert [o.minibatch for o in objectives] == [None, 2, 1]
    assert [seen["make"](seen["specs"][1], seed).generator.initial_seed() for seed in (0, 4)] == [0, 4]
    assert seen["specs"][1].build().lr == 0.05  # what train.py has adam begin with
    assert (seen["budget"], seen["seeds"]) == (comparison_cli.BUDGET, [0])
    assert [spec.max_steps for spec in seen["specs"]] == [comparison_cli.MAX_STEPS] * 3
    default = captured()
    assert tuple(spec.label for spec in default["specs"]) == comparison_cli.METHODS


def test_objectives_are_fresh_and_losses_are_measured_in_float64(captured):
    seen = captured("--methods", "adam", "--lower.solver=gradient_descent", "--lower.max_iter=3")
    first, second, judge = (*(seen["make"](seen["specs"][0], 0) for _ in range(2)), seen["reference"](0))
    with torch.no_grad():
        first.theta["regularizer.log_weight"] += 1
    assert second.theta["regularizer.log_weight"] != first.theta["regularizer.log_weight"]
    assert first.pairs.x[0].dtype == torch.float32 and judge.pairs.x[0].dtype == torch.float64
    assert (type(first.lower).__name__, type(judge.lower).__name__) == ("GradientDescent", "NewtonCG")
    assert seen["error_tol"] == pytest.approx(1e-7 * 16)
    value = judge.value(seen["error_tol"])
    assert value.upper - value.lower < 1e-5 * value.value
    other = seen["make"](seen["specs"][0], 1)
    assert not torch.equal(other.pairs.y[0], first.pairs.y[0])


def test_mistakes_end_in_one_line(capsys, tmp_path):
    for arguments, words in (
        (["--methods", "mad"], "upper.method: expected one of maid, "),
        (["--methods", "maid", "maid"], "--methods: expected every one once. Got maid more than once."),
        (["--seeds", "1", "1"], "--seeds: expected every one once. Got 1 more than once."),
        (["--methods", "adam:lr"], "--methods: expected NAME or NAME:KEY=VALUE,KEY=VALUE. Got 'adam:lr'."),
        (["--methods", "adam:"], "Got 'adam:'."),
        (["--methods", "adam:lr=-1"], "upper.lr: expected a finite number > 0. Got -1"),
        (["--methods", "adam:lr=fast"], "upper.lr"),
        (["--methods", "adam:speed=1"], "unknown option"),
        (
            ["--methods", "hoag:options.speed=1"],
            "upper.options: hoag does not take speed. Allowed: schedule, ratio, slack.",
        ),
        (["--methods", "hoag:relative=0.1"], "upper.relative: hoag does not take it. Leave it out."),
        (["--methods", "maid:minibatch=1"], "upper.minibatch: maid compares losses of all images."),
        (["--methods", "adam:minibatch=9"], "upper.minibatch: expected at most 2"),
        (["--json", "file/record.json"], "--json file/record.json: cannot be written (File exists)."),
        (["--budget", "0"], "--budget: expected an integer >= 1. Got 0."),
        (["--problem.sigma=-1"], "problem.sigma: expected a finite number >= 0. Got -1"),
        (
            ["--upper.method=adam", "--upper.minibatch=2", "--data.random_patches=true"],
            "data.random_patches: expected fixed",
        ),
        (["--output", "file"], "--output file: is a file. Give a folder."),
    ):
        (tmp_path / "file").write_text("")
        assert words in fails(capsys, *arguments), arguments
    assert not (tmp_path / "runs").exists()


def test_a_finished_comparison_is_not_overwritten(capsys, tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "record.json").write_text("{}")
    assert "already holds a comparison" in fails(capsys, "--output", "old")
    (tmp_path / "runs" / "comparison").mkdir(parents=True)
    with new_folder(None, "comparison", [], "") as folder:
        assert folder.name == "comparison-2"


def stopped_early(specs, make, **options):
    """What a comparison returns that was stopped after its first run."""
    loss = {"loss": 1.0, "lower": 0.9, "upper": 1.1}
    point = {"step": 1, "work": 5, "seconds": 0.1, "measured": loss, **loss, "grad_norm": 1.0, "bound": 1.0}
    one = {"label": "maid", "seed": 0, "settings": {"method": "maid"}, "steps": 1, "work": 5, "seconds": 0.1}
    one |= {"ended": "budget", "curve": [point], "final": loss}
    return {"budget": 5, "seeds": [0], "complete": False, "runs": [one]}


def test_a_comparison_without_tensorboard_keeps_all_else(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(method_comparison, "run", stopped_early)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert compare_main([*TINY, "--output", "half"]) == 130
    assert (tmp_path / "half" / "comparison.png").exists() and (tmp_path / "half" / "record.json").exists()
    out, err = capsys.readouterr()
    assert err.startswith("TensorBoard events not written: ") and err.count("\n") == 2
    assert "Written: half" in out and "HPARAMS" not in out


def test_ctrl_c_writes_what_is_finished(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(method_comparison, "run", stopped_early)
    assert compare_main([*TINY, "--output", "half", "--logging.tensorboard=false"]) == 130
    assert json.loads((tmp_path / "half" / "record.json").read_text())["complete"] is False
    assert (tmp_path / "half" / "comparison.png").exists() and not (tmp_path / "half" / "tensorboard").exists()
    out, err = capsys.readouterr()
    assert out.splitlines()[1].startswith("maid") and err == "Stopped after 1 of 4 runs, which are kept.\n"


def test_the_settings_are_those_of_training():
    help_text = comparison_cli._parser().format_help()
    assert all(
        key in help_text for key in ("--methods", "--budget", "--data.patch_size", "--upper.lr", "--problem.sigma")
    )
