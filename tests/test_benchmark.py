"""The comparison with other libraries: the same energy for all, its ladders, its report, and what is missing."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import bilevel_imaging as bi
from bilevel_imaging.experiments import benchmark, kernel_rates, reconstruction_time
from bilevel_imaging.experiments.benchmark import (
    comparison,
    data_parallel,
    measuring,
    memory,
    ours,
    report,
    scaling,
    training,
)
from bilevel_imaging.experiments.benchmark.method import Answer, Ladder, Setting
from bilevel_imaging.experiments.benchmark.models import Model
from bilevel_imaging.experiments.benchmark.peers import ADAPTERS
from bilevel_imaging.experiments.benchmark.peers.lower import accelerated, lbfgs
from bilevel_imaging.experiments.benchmark.training import course, race, routes, runs
from bilevel_imaging.experiments.benchmark.workloads import WORKLOADS, model
from bilevel_imaging.upper_level.quasi_newton import flatten


class Unknown(bi.Regularizer):
    """Constants are not known: nothing is certified."""

    def fn(self, x, *args, **kwargs):
        return 0.5 * (x * x).flatten(1).sum(1)


ROOT = Path(__file__).parents[1]
TINY = {
    "W1": replace(WORKLOADS["W1"], images=2, size=12),
    "W2": replace(WORKLOADS["W2"], images=2, size=12),
    "W3": replace(WORKLOADS["W3"], images=1, size=13),
    "W4a": replace(WORKLOADS["W4a"], size=14),
    "W4b": replace(WORKLOADS["W4b"], size=256),
    "W5": replace(WORKLOADS["W5"], images=1, size=11),
}
INSTALLED = [name for name in ADAPTERS if comparison._version(ADAPTERS[name].PACKAGE) is not None]


@pytest.fixture(scope="module", params=["W1", "W2", "W3", "W5"])
def task(request):
    return TINY[request.param].build(dtype=torch.float64)


@pytest.fixture(scope="module")
def small():
    """Total variation, well conditioned, so that every method can be right."""
    return replace(TINY["W1"], size=10, energy=_smooth).build(dtype=torch.float64)


def _smooth():
    from bilevel_imaging.energies import VariationalEnergy
    from bilevel_imaging.regularizers import TotalVariation

    return VariationalEnergy(TotalVariation(0.1, 0.2))


def _point(task):
    return torch.rand(task.y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_energies_in_torch_are_ours(task):
    problem, x = task.problem(), _point(task)
    assert task.x_true.shape == task.y.shape == problem.shape
    # without constants of x: a difference of values
    ours_ = float((problem.value(x) - problem.value(task.y)).detach().sum())
    theirs = [task.model.value(torch, point, task.theta, task.data) for point in (x, task.y)]
    assert float(theirs[0] - theirs[1]) == pytest.approx(ours_, rel=1e-11)
    for gradient in (task.model.gradient, lambda *a: Model.gradient(task.model, *a)):
        torch.testing.assert_close(gradient(x, task.theta, task.data), problem.grad(x), rtol=1e-10, atol=1e-13)


def test_products_in_torch_are_ours(task):
    """Second and mixed derivatives: what the adjoint of every library is made of."""
    problem, x, q = task.problem(), _point(task), _point(task) - 0.5
    theta, leaf = task.leaf(), x.clone().requires_grad_(True)
    hvp, mixed = torch.autograd.grad(task.model.gradient(leaf, theta, task.data), (leaf, theta), q)
    linearization = problem.linearize(x)
    torch.testing.assert_close(hvp, linearization.hvp(q), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(mixed, flatten(linearization.mixed_vjp(q)), rtol=1e-9, atol=1e-12)


def test_energies_in_jax_are_ours(task):
    jax = pytest.importorskip("jax")
    problem, x, q = task.problem(), _point(task), _point(task) - 0.5
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        data = {name: jax.numpy.asarray(value.numpy()) for name, value in task.data.items()}
        point, theta, direction = (jax.numpy.asarray(a.numpy()) for a in (x, task.theta, q))

        def energy(point, theta):
            return task.model.value(jax.numpy, point, theta, data)

        @jax.jit
        def derivatives(point, theta, direction):
            gradient, pull = jax.vjp(jax.grad(energy), point, theta)
            return (gradient, *pull(direction))

        found = [torch.from_numpy(jax.device_get(a).copy()) for a in derivatives(point, theta, direction)]
    linearization = problem.linearize(x)
    torch.testing.assert_close(found[0], problem.grad(x), rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(found[1], linearization.hvp(q), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found[2], flatten(linearization.mixed_vjp(q)), rtol=1e-9, atol=1e-12)


def test_workloads_are_as_described():
    assert [(w.images, w.size) for w in WORKLOADS.values()] == [
        (16, 128), (16, 96), (8, 128), (1, 512), (1, 2048), (32, 64)
    ]  # fmt: skip
    for name in ("W4a", "W4b"):
        task = TINY[name].build()
        assert task.y.shape == task.x_true.shape == (1, 1, TINY[name].size, TINY[name].size)
    task = TINY["W1"].build()
    assert task.y.dtype == torch.float32 and torch.equal(task.y, TINY["W1"].build().y)
    assert task.theta.tolist() == pytest.approx([-2.302585, -4.605170])
    assert float((task.y - task.x_true).std()) == pytest.approx(0.1, rel=0.1)
    with pytest.raises(TypeError, match="Got Tikhonov"):
        from bilevel_imaging.energies import VariationalEnergy
        from bilevel_imaging.regularizers import Tikhonov

        model(VariationalEnergy(Tikhonov(1.0)), TINY["W1"].degradation, task.y)


def test_minimizers_of_torch_reach_the_minimizer(small):
    for x in (accelerated(small, 200), lbfgs(small, 60)):
        assert float(small.problem().grad(x).detach().norm()) <= 1e-6


@pytest.mark.filterwarnings("ignore::FutureWarning")  # TorchOpt's use of functorch
@pytest.mark.parametrize("name", INSTALLED)
def test_every_library_gets_it_right(name, small):
    """One of its first two ladders ends within 1 % of the certified truth; JAX in float32, others in float64."""
    true = flatten(comparison.reference(small).grad)
    best = {}
    for ladder in ADAPTERS[name].ladders(small)[:2]:
        few = Ladder(ladder.method, lambda ladder=ladder: islice(ladder.settings(), 0, 16))
        rows = measuring.climb(name, few, true, levels=(1e-2,), cap=60)
        assert all(row.note == "" or row.note.startswith("cut off") for row in rows), rows[-1].note
        best[ladder.method] = min(row.error for row in rows)
    assert min(best.values()) <= 1e-2, best


def test_ours_reports_a_bound_that_holds(small):
    true = flatten(comparison.reference(small).grad)
    for ladder in ours.ladders(small):
        for row in measuring.climb(ours.NAME, ladder, true, levels=(1e-6,), cap=60)[:4]:
            assert row.error <= 1.01 * row.bound / (1 - min(row.bound, 0.5)) and row.gradients > 0 and row.hvps > 0


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_torchopt_with_a_recorded_gradient():
    """Fields of Experts, where the stationarity condition comes from autograd inside of TorchOpt's own."""
    adapter = ADAPTERS["torchopt"]
    if "torchopt" not in INSTALLED:
        pytest.skip("TorchOpt is not installed")
    task = TINY["W2"].build(dtype=torch.float64)
    rows = measuring.climb(
        "", adapter.ladders(task)[0], flatten(comparison.reference(task).grad), levels=(1e-3,), cap=60
    )
    assert min(row.error for row in rows) <= 1e-3


def _ladder(method, errors, seconds, clock):
    """Settings with these errors that take these CPU seconds."""

    def settings():
        for error, cost in zip(errors, seconds, strict=True):

            def compute(error=error, cost=cost):
                clock[0] += cost
                return Answer(torch.tensor([1 + error, 0.0], dtype=torch.float64))

            yield Setting(f"error {error:g}", compute)

    return Ladder(method, settings)


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(measuring, "time", SimpleNamespace(process_time=lambda: now[0], perf_counter=lambda: now[0]))
    return now


TRUE = torch.tensor([1.0, 0.0], dtype=torch.float64)


def test_a_ladder_ends_where_it_should(clock):
    def climb(errors, seconds):
        return measuring.climb("a", _ladder("m", errors, seconds, clock), TRUE, levels=(0.5, 0.05), cap=10)

    passes = climb((2.0, 1.0, 0.3, 0.2, 0.04, 0.01, 1e-3, 1e-4), range(1, 9))
    # every second one until one passes both levels, and those right before the first passing ones
    assert [row.setting for row in passes] == ["error 1", "error 0.3", "error 0.2", "error 0.04", "error 0.01"]
    assert [row.seconds for row in passes] == [2, 3, 4, 5, 6] and passes[0].error == pytest.approx(1.0)
    assert measuring.fastest(passes, 0.5).seconds == 3 and measuring.fastest(passes, 0.05).seconds == 5
    assert measuring.fastest(passes, 1e-3) is None
    slow = climb((3.0, 2.0, 1.0, 0.9, 0.8, 0.7), (1, 2, 3, 11, 12, 13))
    assert [row.seconds for row in slow] == [2, 11] and "over 10 CPU seconds" in slow[-1].note
    stalls = climb([0.9] * 20, [1] * 20)
    assert len(stalls) == measuring.STALLED_AFTER + 1 and "no longer falls" in stalls[-1].note


def test_table_with_passing_failing_and_broken_rows(clock, monkeypatch):
    monkeypatch.setattr(measuring, "peak", lambda compute: 12.0)

    def broken():
        raise TypeError("changed interface")

    ladders = {
        "ours": lambda: [_ladder("certified", (0.05, 0.005), (3.0, 5.0), clock)],
        "fast": lambda: [_ladder("m", (0.09, 0.02, 0.004), (1.0, 2.0, 4.0), clock)],
        "wrong": lambda: [_ladder("m", (2.0, 1.0), (1.0, 2.0), clock)],
        "broken": broken,
    }
    rows = [row.record() for row in measuring.measure(ladders, TRUE, levels=(0.1, 0.01), repeats=3, cap=10)]
    assert rows == json.loads(json.dumps(rows))
    assert {row["calls"] for row in rows if row["library"] == "fast"} == {3}
    assert all(row["peak_memory_mib"] == 12 for row in rows if row["calls"] == 3)
    loose, tight = report.summary(rows, (0.1, 0.01))
    assert loose["ratio"] == pytest.approx(3.0) and tight["ratio"] == pytest.approx(5 / 4)
    assert loose["best_peer"]["library"] == "fast" and loose["fastest"]["wrong"] is None
    assert [(pair["ours"]["setting"], pair["by"]["setting"]) for pair in report.dominated(rows)] == [
        ("error 0.05", "error 0.02"),
        ("error 0.005", "error 0.004"),
    ]
    workload = {"title": "t", "images": 1, "size": 2, "reference_relative_bound": 1e-9, "rows": rows}
    workload |= {"summary": [loose, tight], "dominated": report.dominated(rows)}
    text = report.table({"workloads": {"W": workload}, "skipped": {"absent": "skipped, not installed"}})
    assert "ours / best peer 3.00" in text and "raised TypeError: changed interface" in text
    assert "wrong                    nothing passes" in text and "absent: skipped" in text and "dominated: ours" in text
    assert "No row of ours" in report.table({"workloads": {"W": workload | {"dominated": []}}, "skipped": {}})


def test_memory_of_a_call():
    def call():
        return torch.ones(16 * 2**20).sum()  # 64 MiB

    found = memory.peak(call)
    if found is None:
        pytest.skip("the system does not tell")
    assert 60 <= found <= 110
    assert memory.peak(lambda: None) <= 30


def _script():
    spec = importlib.util.spec_from_file_location("benchmark_script", ROOT / "scripts" / "benchmark.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_command(monkeypatch, tmp_path, capsys):
    script = _script()
    installed = comparison._version
    missing = {"jaxopt", "torchdeq"}
    monkeypatch.setattr(comparison, "_version", lambda name: None if name in missing else installed(name))
    monkeypatch.setattr(script, "one_thread", lambda: None)
    original, path = benchmark.run, tmp_path / "new" / "record.json"

    def tiny(*arguments, **options):
        record = original(*arguments, workloads=TINY, **options)
        assert json.loads(path.read_text()) == record  # kept before the end
        return record

    monkeypatch.setattr(script.benchmark, "run", tiny)
    command = "benchmark.py hypergradient --workloads W4a --peers jaxopt torchdeq unrolled --levels 1e-2 --repeats 2"
    monkeypatch.setattr(sys, "argv", [*command.split(), "--threads", "1", "--json", str(path)])
    script.main()
    record, text = json.loads(path.read_text()), capsys.readouterr().out
    assert text.strip() == report.table(record)
    assert "pip install jaxopt" in text and "pip install torchdeq" in text
    assert set(record["skipped"]) == {"JAXopt", "TorchDEQ"} and record["levels"] == [1e-2]
    rows = record["workloads"]["W4a"]["rows"]
    assert {row["library"] for row in rows} == {"ours", "PyTorch unrolled"}
    assert record["workloads"]["W4a"]["reference_relative_bound"] <= 1e-8
    assert record["workloads"]["W4a"]["summary"][0]["ratio"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("certainty --threads 0", "--threads: expected an integer >= 1. Got 0."),
        ("hypergradient --images 0", "--images: expected an integer >= 1. Got 0."),
        ("kernels --device foo", "--device: expected cpu or cuda. Got 'foo'."),
        ("reconstruction --regularizer nope.safetensors", "nope.safetensors"),
        ("scaling --json .", "--json .: is a folder"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_measured(arguments, words, monkeypatch, capsys):
    script = _script()
    monkeypatch.setattr(script.torch, "set_num_threads", lambda count: pytest.fail("too late"))
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments.split()])
    with pytest.raises(SystemExit) as end:
        script.main()
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and words in err


def test_seconds_to_a_certified_reconstruction():
    """The distance asked for is certified, and the picture is better than the measurement."""
    regularizers = {"TV": bi.TotalVariation(0.07, 0.01), "unknown": Unknown()}
    record = reconstruction_time.run(regularizers, size=24, noise=0.1, accuracy=1e-3, repeats=1)
    row = record["results"]["TV"]
    assert row["certified"] and row["relative_distance"] <= 1e-3 and row["psnr"] > 20.5
    assert row["cost"]["gradients"] > 2 and row["wall_seconds"] > 0
    lines = reconstruction_time.table(record).splitlines()
    assert not lines[1].endswith("not certified") and lines[2].endswith("not certified")
    with pytest.raises(ValueError, match="Expected a size of 1 to 512"):
        reconstruction_time.run(regularizers, size=1000)


def test_kernel_rates_of_a_small_image():
    """Shares are ratios of the rates in the record; every line of the table names its number."""
    record = kernel_rates.run(size=64, repeats=1)
    for name, rate in record["bytes_per_second"].items():
        assert record["share_of_copy"][name] == pytest.approx(rate / record["copy_bytes_per_second"])
        assert name in kernel_rates.table(record)
    filters = record["filters"]
    assert filters["share_of_convolutions"] == pytest.approx(
        filters["convolutions_seconds"] / filters["product_seconds"]
    )
    assert filters["operations_per_second"] * filters["product_seconds"] == pytest.approx(4 * 48 * 49 * 8 * 8)


# ------------------------------------------------------------------------------------------ whole training runs


@pytest.fixture(scope="module")
def start():
    """A small training set, far from its best parameters."""
    workload = replace(runs.TRAININGS["W6A"].workload, images=2, size=12)
    return workload.build(dtype=torch.float64)


def _learned(task):
    """Best parameters, by SciPy on losses of minimizers by torch.optim: nothing of ours but the constants."""
    from scipy.optimize import minimize

    def loss(theta):
        at = task.at(torch.from_numpy(theta.copy()), task.y)
        return at.loss(lbfgs(at, 40)).item()

    return minimize(loss, task.theta.numpy(), method="Nelder-Mead", options={"xatol": 1e-2, "fatol": 1e-6}).fun


def test_judge_measures_true_losses_and_the_reference_is_the_best(start):
    judge = runs.Judge(start, 1e-9)
    value = judge(start.theta)
    assert value.value == pytest.approx(start.loss(lbfgs(start, 80)).item(), rel=1e-7)
    assert value.lower <= value.value <= value.upper <= 1.0001 * value.lower
    before = start.theta.clone()
    assert judge(runs.reference(start, 15)).value == pytest.approx(_learned(start), rel=1e-2)
    assert torch.equal(flatten(start.energy.theta), before)  # a run leaves the start as it was


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", [name for name in routes.ROUTES if name in {"ours", *INSTALLED}])
def test_every_route_lowers_the_loss_to_the_best(name, start, monkeypatch):
    """The tightest setting with L-BFGS-B; solves go on from the last x, bounds belong to the current parameters."""
    one = {key: make for key, make in list(ADAPTERS["jaxopt"].line_searches().items())[:1]} if name == "jaxopt" else {}
    monkeypatch.setattr(ADAPTERS["jaxopt"], "line_searches", lambda: one)
    judge = race._Remembering(runs.Judge(start, 1e-5))
    best = judge(runs.reference(start, 15))
    route = [route for route in routes.routes(name, start, ()) if route.setting.endswith("L-BFGS-B")][-1]
    entry = race.Entry("", route.setting, partial(course.theirs, start, route))
    entry.first(judge, 1.02 * best, 60.0)
    assert entry.ended == "within" and entry.steps > 2 and 0 < entry.seconds <= entry.spent


def test_clock_stands_still_while_others_look(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(course, "time", SimpleNamespace(process_time=lambda: now[0], perf_counter=lambda: 2 * now[0]))

    def look(point):
        now[0] += 100.0  # whoever looks takes long

    running = course.Course(look)
    for _ in range(2):
        now[0] += 1.0
        running.note(torch.zeros(1), 0.5)
    with running.paused():
        now[0] += 50.0
    now[0] += 1.0
    running.note(torch.zeros(1), 0.5)
    assert [(point.cpu, point.wall) for point in running.points] == [(1.0, 2.0), (2.0, 4.0), (3.0, 6.0)]
    with pytest.raises(course.Enough, match="not finite"):
        running.note(torch.tensor([float("nan")]), 0.5)


def _stub(losses, clock):
    """A run with these true losses, one CPU second each."""

    def run(look):
        running = course.Course(look)
        try:
            for loss in losses:
                clock[0] += 1.0
                running.note(torch.tensor([loss]), loss)
        except course.Enough as reason:
            return running.points, str(reason)
        return running.points, "stopped"

    return run


def test_first_time_within_counts(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(course, "time", SimpleNamespace(process_time=lambda: clock[0], perf_counter=lambda: clock[0]))
    judge = lambda theta: float(theta)  # noqa: E731

    def first(losses, limit=9.0):
        entry = race.Entry("a", "b", _stub(losses, clock))
        entry.first(judge, 1.5, limit)
        return entry

    entry = first([3.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    assert (entry.seconds, entry.steps, entry.ended) == (3.0, 3, "within")
    entry.once_more()
    assert len(entry.again[0]) == 6  # half as far again, and two
    row = race._row(entry, [[3.0, 2.0, 1.0, 1.0, 1.0, 1.0]], 2.0)
    assert row["cpu_seconds"] == 2.0 and row["steps"] == 2 and len(row["curve"]) == 6
    assert race._row(entry, [[3.0] * 6], 2.0)["cpu_seconds"] is None
    assert first([3.0, 2.0], limit=9.0).ended == "stopped" and first([3.0, 2.0]).seconds is None
    assert first([3.0] * 5, limit=2.0).ended == "given up after 3.00 CPU seconds"
    rows = [{"library": name, "cpu_seconds": s} for name, s in (("ours", 1.0), ("x", 4.0), ("x", 2.0), ("y", None))]
    assert race._summary(rows) == {"cpu_seconds": {"ours": 1.0, "x": 2.0}, "ratio": 0.5}
    assert race._summary([*rows, {"library": routes.TUNED, "cpu_seconds": 0.1}])["ratio"] == 0.5


@pytest.mark.slow
def test_training_record_table_and_figure(monkeypatch, tmp_path, capsys):
    whole = runs.TRAININGS["W6A"]
    few = replace(whole.workload, images=2, size=12)
    tiny = replace(whole, workload=few, rates=(0.3,), reference_steps=15, cap=2.0)
    monkeypatch.setattr(comparison, "_version", lambda name: None if name == "jaxopt" else "1")
    monkeypatch.setattr(routes, "UNROLLED", ((True, 20),))
    script, original = _script(), training.run
    monkeypatch.setattr(
        script.training, "run", lambda *names, **options: original(*names, trainings={"W6A": tiny}, **options)
    )
    command = "benchmark.py training --peers jaxopt unrolled --repeats 2 --threads 2"
    paths = ["--json", str(tmp_path / "record.json"), "--figure", str(tmp_path / "curves.png")]
    monkeypatch.setattr(sys, "argv", [*command.split(), *paths])
    script.main()
    record, text = json.loads((tmp_path / "record.json").read_text()), capsys.readouterr().out
    one = record["trainings"]["W6A"]
    mine = one["rows"][0]
    assert mine["library"] == "ours" and len(mine["all_cpu_seconds"]) == 2 and mine["cpu_seconds"] > 0
    place = mine["steps"] - 1
    assert (
        mine["curve"][place]["loss"]
        <= 1.01 * one["best_loss"]
        < min([one["first_loss"], *(point["loss"] for point in mine["curve"][:place])])
    )
    assert "MAID, defaults" in text and "pip install jaxopt" in text and "settings tried were within" in text
    assert (tmp_path / "curves.png").stat().st_size > 1000


# ---------------------------------------------------------------------------------------------------- scaling


def test_scaling_of_small_problems(monkeypatch):
    for option in ("size", "images"):
        task = scaling.task(**{option: 128 if option == "size" else 3})
        assert task.y.shape == ((1, 1, 128, 128) if option == "size" else (3, 1, 64, 64))
    monkeypatch.setattr(scaling, "keep_freed", lambda: True)  # not in the process of all tests
    monkeypatch.setattr(scaling, "data_parallel", lambda say: PARALLEL)
    record = scaling.run(sizes=(64,), batches=(2,), repeats=1)
    row = record["images"][0]
    assert row["pixels"] == 2 * 64 * 64 and row["relative_bound"] <= 0.1 and row["hvps"] > 5
    assert row["cpu_nanoseconds_per_pixel"] == pytest.approx(1e9 * row["cpu_seconds"] / row["pixels"])
    text = scaling.table(record)
    assert "freed memory kept" in text and "1.50 times the steps of one" in text
    assert "size" not in scaling.run(["images"], batches=(1,), repeats=1)


PARALLEL = {
    "steps_per_second": {"one_process": 2.0, "all_processes": 3.0},
    "gain": 1.5,
    "gain_of_independent_runs": 1.7,
    "logical_processors": 2,
    "cores_according_to_the_system": 1,
    "undisturbed_rounds": 1,
    "rounds": [{}],
}


def test_gain_of_two_processes(monkeypatch, capsys):
    """One process measures itself thrice; the record takes the median of the rounds that nothing disturbed."""
    monkeypatch.setattr(data_parallel, "WORKLOADS", {"W1": replace(TINY["W1"], images=2, size=12)})
    monkeypatch.setattr(data_parallel, "ROUNDS", 2)
    data_parallel.main()
    found = json.loads(capsys.readouterr().out)
    assert len(found) == 2 and all(min(speed) > 0 for speeds in found for speed in speeds.values())

    def speeds(one, together, apart, processors=2.0):
        return {
            "one_process": (one, 1.0),
            "all_processes": (together, processors),
            "independent_runs": (apart, processors),
        }

    rounds = [speeds(1, 1.5, 1), speeds(2, 3, 4), speeds(4, 8, 4), speeds(4, 4, 4, 1.5)]
    done = SimpleNamespace(returncode=0, stdout="noise\n" + json.dumps(rounds))
    monkeypatch.setattr(scaling.subprocess, "run", lambda *command, **options: done)
    record = scaling.data_parallel()
    assert (record["gain"], record["gain_of_independent_runs"], record["undisturbed_rounds"]) == (1.5, 1.0, 3)
    assert record["steps_per_second"] == {"one_process": 2, "all_processes": 3, "independent_runs": 4}
