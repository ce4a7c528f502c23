"""Long runs of first-order methods: schedule, clipping, averaging, endless patches and warm starts, resumed exactly."""

from __future__ import annotations

import copy
import gc
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import bilevel_imaging as bi
from bilevel_imaging.cost import Cost
from bilevel_imaging.data import Degradation, ImagePairs, RandomPatches, extract_patches, photographs
from bilevel_imaging.training import RandomPatchObjective, Trainer, read_metrics
from bilevel_imaging.training.mean import bind_batch
from bilevel_imaging.training.validation import PIXEL_ACCURACY, Validator
from bilevel_imaging.training.warm_starts import DiskWarmStarts, NoWarmStarts, WarmStarts
from bilevel_imaging.upper_level import MAID, FirstOrder
from bilevel_imaging.upper_level.long_runs import FIRST_CLIPPED, NormClip, schedule_factor
from bilevel_imaging.upper_level.quasi_newton import assign, flatten

NAMES = ("astronaut", "coffee")
IMAGES = {name: image for name, image in photographs(part="train").items() if name in NAMES}


def bits(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    return {name: tensor.detach().numpy().tobytes() for name, tensor in tensors.items()}


class Slope:
    """An objective with hypergradients that are given one after the other."""

    def __init__(self, *sizes: float) -> None:
        self.theta = {
            name: torch.zeros(shape, dtype=torch.float64, requires_grad=True)
            for name, shape in (("regularizer.log_weight", ()), ("regularizer.filters", (2, 3)))
        }
        self.sizes = list(sizes)

    def hypergradient(self, **_: float) -> SimpleNamespace:
        size = self.sizes.pop(0)
        grad = {name: torch.full_like(t, size / 7**0.5) for name, t in self.theta.items()}  # 7 entries: norm = size
        exact = {"bound": 0.0, "certified": True, "reason": "", "distance": 0.0, "residual": 0.0, "cost": Cost()}
        return SimpleNamespace(grad=grad, norm=abs(size), loss=0.0, loss_interval=(0.0, 0.0), **exact)


# ---------------------------------------------------------------------------------------------- schedule


def test_cosine_falls_from_one_to_a_hundredth():
    factors = [schedule_factor("cosine", step, 101) for step in range(101)]
    assert factors[0] == 1 and factors[-1] == pytest.approx(0.01, rel=1e-12)
    assert factors[50] == pytest.approx(0.505, rel=1e-12)
    assert all(a > b for a, b in zip(factors, factors[1:], strict=False))
    assert schedule_factor("cosine", 500, 101) == factors[-1]


def test_warmup_rises_linearly():
    for schedule in ("constant", "cosine"):
        factors = [schedule_factor(schedule, step, 20, warmup=4) for step in range(20)]
        assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[-1] == pytest.approx(0.01, rel=1e-12)
    assert [schedule_factor("constant", step, 20) for step in range(3)] == [1, 1, 1]
    assert schedule_factor("cosine", 0, 1) == 1  # a run of one step


def test_steps_follow_schedule_and_scales():
    method = FirstOrder(
        "SGD",
        lr=0.5,
        schedule="cosine",
        total_steps=10,
        warmup=2,
        lr_scale={"regularizer": 0.1, "regularizer.filters": 0.3},
    )
    objective = Slope(*[7**0.5] * 10)
    for step in range(10):
        before = {name: t.detach().clone() for name, t in objective.theta.items()}
        report = method.step(objective)
        pace = 0.5 * schedule_factor("cosine", step, 10, 2)
        assert report.step_size == pytest.approx(pace, rel=1e-14)
        for name, scale in (("regularizer.log_weight", 0.1), ("regularizer.filters", 0.3)):
            moved = before[name] - objective.theta[name].detach()
            assert torch.allclose(moved, torch.full_like(moved, pace * scale), rtol=1e-12)


def test_another_length_changes_the_schedule_from_there_on():
    objective = Slope(*[1.0] * 6)
    short = FirstOrder("SGD", lr=1.0, schedule="cosine", total_steps=3)
    for _ in range(3):
        short.step(objective)
    longer = FirstOrder("SGD", lr=1.0, schedule="cosine", total_steps=6)
    longer.load_state_dict(copy.deepcopy(short.state_dict()))
    assert longer.step(objective).step_size == pytest.approx(schedule_factor("cosine", 3, 6), rel=1e-14)


# ---------------------------------------------------------------------------------------------- clipping


def test_clip_is_a_multiple_of_the_running_median():
    clip = NormClip(3.0)
    assert [clip.factor(n) for n in (1.0, 1e9)] == [1.0, 1.0]  # too few to know what is usual
    clip = NormClip(3.0)
    for norm in (1.0, 2.0, 3.0) * 7:
        assert clip.factor(norm) == 1.0
    assert clip.factor(6.0) == 1.0
    assert clip.factor(60.0) == pytest.approx(0.1, rel=1e-14)
    assert clip.factor(60.0) == pytest.approx(0.1, rel=1e-14)
    assert math.isnan(clip.factor(math.nan) * math.nan) and clip.norms[-1] == 60.0
    for _ in range(200):  # a lasting change of scale is followed
        last = clip.factor(60.0)
    assert last == 1.0 and len(clip.norms) == 101


def test_one_bad_minibatch_moves_theta_no_more_than_the_others():
    plain = FirstOrder("SGD", lr=1.0)
    clipped = FirstOrder("SGD", lr=1.0, clip=2.0)
    sizes = [*[1.0] * FIRST_CLIPPED, 1e6, 1.0]
    moves = {method: [] for method in (plain, clipped)}
    for method, reports in moves.items():
        objective = Slope(*sizes)
        reports += [method.step(objective) for _ in sizes]
    assert [r.grad_norm for r in moves[clipped]] == sizes  # what is reported is what came
    assert moves[plain][-2].param_change == pytest.approx(1e6)
    assert [r.param_change for r in moves[clipped]] == pytest.approx([*[1.0] * FIRST_CLIPPED, 2.0, 1.0])
    assert moves[clipped][-2].extra == {"clip_factor": pytest.approx(2e-6)} and moves[plain][-2].extra == {}


# ---------------------------------------------------------------------------------------------- averaging


def test_average_is_the_mean_of_the_last_part():
    method = FirstOrder("SGD", lr=1.0, average=0.4, total_steps=10)
    objective = Slope(*[float(k * k) for k in range(10)])
    visited = []
    for step in range(10):
        assert (method.learned() is None) == (step <= 6)
        method.step(objective)
        visited.append(flatten(objective.theta))
    mean = torch.stack(visited[6:]).mean(0)
    assert torch.allclose(flatten(method.learned()), mean, rtol=1e-14)
    assert not torch.allclose(flatten(objective.theta), mean, rtol=1e-2)
    assert FirstOrder("SGD", lr=1.0).learned() is None


def test_a_longer_run_starts_its_average_again():
    objective = Slope(*[1.0] * 8)
    short = FirstOrder("SGD", lr=1.0, average=0.5, total_steps=4)
    for _ in range(4):
        short.step(objective)
    longer = FirstOrder("SGD", lr=1.0, average=0.25, total_steps=8)
    longer.load_state_dict(copy.deepcopy(short.state_dict()))
    assert longer.learned() is not None
    longer.step(objective)
    assert longer.learned() is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"schedule": "linear"}, "schedule as one of constant, cosine"),
        ({"schedule": "cosine"}, "total_steps"),
        ({"average": 0.5}, "total_steps"),
        ({"average": 1.5, "total_steps": 4}, r"average in \[0, 1\]"),
        ({"clip": 0.5}, "clip >= 1"),
        ({"warmup": -1}, "warmup >= 0"),
        ({"lr_scale": {"filters": 0.0}}, "factors > 0"),
    ],
)
def test_first_order_refuses(options, words):
    with pytest.raises(ValueError, match=words):
        FirstOrder("Adam", **options)


def test_scales_of_unknown_parameters_are_refused():
    with pytest.raises(ValueError, match="Got bias"):
        FirstOrder("Adam", lr_scale={"bias": 0.1}).step(Slope(1.0))


# ---------------------------------------------------------------------------------------------- random patches


def random_objective(seed: int = 0, count: int = 3, **options) -> RandomPatchObjective:
    degradation = Degradation(sigma_range=(0.05, 0.15), seed=seed)
    patches = RandomPatches(IMAGES, degradation, 16, count, seed=seed)
    return RandomPatchObjective(bi.VariationalEnergy(bi.TotalVariation(0.1, 0.05)), patches, **options)


def long_method(steps: int) -> FirstOrder:
    scale = {"log_smoothing": 0.3}
    return FirstOrder(
        "Adam", lr=0.1, schedule="cosine", warmup=2, total_steps=steps, clip=1.0, average=0.4, lr_scale=scale
    )


def trainer(folder: Path, steps: int, total: int, objective=None, **options) -> Trainer:
    settings = {"tensorboard": False, "progress": False, "checkpoint_every": 5, "validate_every": 3, **options}
    objective = random_objective() if objective is None else objective
    return Trainer(objective, long_method(total), folder, max_steps=steps, **settings)


@pytest.mark.slow
def test_resume_is_bit_for_bit_with_everything_on(tmp_path):
    total = 18
    whole = trainer(tmp_path / "whole", total, total)
    whole.fit()
    assert any(r["extra"]["clip_factor"] < 1 for r in read_metrics(tmp_path / "whole" / "metrics.jsonl"))
    for first in (1, 9, 15):  # in the warmup, before the first clipping, in the average
        folder = tmp_path / str(first)
        trainer(folder, first, total).fit()
        other = random_objective()
        other.patches.batch(5), torch.rand(3)  # what happened before does not matter
        resumed = trainer(folder, total, total, other, validate=lambda: {"psnr": 0.0})
        assert resumed.resume() == first
        resumed.fit()
        assert bits(resumed.objective.theta) == bits(whole.objective.theta)
        assert bits(resumed.method.learned()) == bits(whole.method.learned())


def test_what_is_validated_and_exported_is_the_average(tmp_path):
    seen = []
    run = trainer(tmp_path, 12, 12, validate=lambda: seen.append(flatten(run.objective.theta)) or {"psnr": 0.0})
    run.fit()
    last = flatten(run.objective.theta)
    average = flatten(run.method.learned())
    assert torch.equal(seen[-1], average) and not torch.equal(average, last)
    with run.learned():
        assert torch.equal(flatten(run.objective.theta), average)
    assert torch.equal(flatten(run.objective.theta), last)


def test_random_patches_leave_nothing_behind():
    objective = random_objective()
    method = long_method(100)

    def size() -> int:
        gc.collect()
        return sum(o.numel() for o in gc.get_objects() if type(o) is Tensor)

    sizes = []
    for _ in range(6):
        method.step(objective)
        sizes.append(size())
    assert len(set(sizes[1:])) == 1, sizes
    assert objective.warm.x == {} and objective.warm.q == {} and objective.state_dict() == {"taken": 6}


def test_random_objective_is_the_mean_over_its_minibatch():
    objective = random_objective(count=3, batch_size=2)  # in two chunks
    batch = objective.patches.batch(0)
    pairs = ImagePairs(list("abc"), list(batch.x), list(batch.y), Degradation().physics)
    accuracy = {"error_tol": 1e-8, "residual_tol": 1e-8}
    ours = objective.hypergradient(**accuracy)
    fixed = bi.BilevelObjective(objective.energy, pairs).hypergradient(**accuracy)
    assert ours.loss == pytest.approx(fixed.loss, rel=1e-9)
    assert torch.allclose(flatten(ours.grad), flatten(fixed.grad), rtol=1e-6)
    second = objective.hypergradient(**accuracy)
    assert second.loss != ours.loss
    relative = random_objective(count=3, batch_size=1).hypergradient(relative=0.02)
    assert relative.certified and relative.bound <= 0.02 * relative.norm


def test_what_needs_all_images_is_refused():
    objective = random_objective()
    with pytest.raises(ValueError, match="Got random patches"):
        objective.value(1e-3)
    with pytest.raises(ValueError, match="losses of all images"):
        MAID().step(objective)
    with pytest.raises(ValueError, match="taken"):
        objective.load_state_dict({})


# ---------------------------------------------------------------------------------------------- noise levels


class ScaledTikhonov(bi.Regularizer):
    """exp(log_weight) * sigma_i^2 / 2 * ||x_i||^2: a regularizer that knows the noise level."""

    def __init__(self, log_weight: torch.nn.Parameter | None = None, sigma: Tensor | None = None) -> None:
        super().__init__()
        self.log_weight = torch.nn.Parameter(torch.tensor(3.0)) if log_weight is None else log_weight
        self.sigma = torch.ones(1) if sigma is None else sigma

    def fn(self, x: Tensor, *args, **kwargs) -> Tensor:
        return 0.5 * self.log_weight.exp() * self.sigma.to(x) ** 2 * x.square().flatten(1).sum(1)

    def at_noise_level(self, sigma: Tensor) -> ScaledTikhonov:
        return ScaledTikhonov(self.log_weight, sigma)


def test_batches_are_bound_at_their_noise_levels():
    energy = bi.VariationalEnergy(ScaledTikhonov(), ridge=0.0)
    batch = random_objective().patches.batch(2)
    problem = bind_batch(energy, batch)
    assert (
        list(problem.theta) == list(energy.theta)
        and problem.theta["regularizer.log_weight"] is energy.theta["regularizer.log_weight"]
    )
    weight = math.exp(3) * batch.noise_level.double().reshape(-1, 1, 1, 1) ** 2
    x = torch.zeros_like(batch.x) + 0.5
    with torch.no_grad():
        assert torch.allclose(problem.grad(x), x - batch.y + weight * x, rtol=1e-6)
    plain = bind_batch(bi.VariationalEnergy(bi.TotalVariation()), batch)
    assert torch.equal(plain.grad(x), bi.VariationalEnergy(bi.TotalVariation()).bind(batch.y, batch.physics).grad(x))


# ---------------------------------------------------------------------------------------------- warm starts


def fixed_pairs(dtype: torch.dtype = torch.float64) -> ImagePairs:
    return ImagePairs.build(extract_patches(IMAGES, 16, 3, seed=1), Degradation(sigma=0.1), dtype)


def minibatches(pairs: ImagePairs, warm: WarmStarts | None = None, seed: int = 0) -> bi.BilevelObjective:
    energy = bi.VariationalEnergy(bi.TotalVariation(0.1, 0.05))
    generator = torch.Generator().manual_seed(seed)
    return bi.BilevelObjective(energy, pairs, minibatch=2, generator=generator, warm=warm)


def on_disk(folder: Path, pairs: ImagePairs) -> DiskWarmStarts:
    return DiskWarmStarts(folder, {i: x.shape for i, x in enumerate(pairs.x)}, pairs.x[0].dtype)


def losses(objective: bi.BilevelObjective, count: int) -> list[float]:
    result = []
    for _ in range(count):
        h = objective.hypergradient(error_tol=1e-3, residual_tol=1e-3)
        assign(objective.theta, flatten(objective.theta) - 0.05 * flatten(h.grad))
        result.append(h.loss)
    return result


def test_warm_starts_in_memory_do_not_keep_their_minibatches():
    objective = minibatches(fixed_pairs())
    losses(objective, 4)
    entries = [*objective.warm.x.values(), *objective.warm.q.values()]
    assert len(entries) == 12
    assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in entries)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_disk_gives_what_memory_gives(dtype, tmp_path):
    pairs = fixed_pairs(dtype)
    objective = minibatches(pairs, on_disk(tmp_path, pairs))
    assert not list(tmp_path.iterdir())  # made at the first use
    assert losses(objective, 7) == losses(minibatches(pairs), 7)
    assert objective.state_dict()["x"] == {} and objective.state_dict()["q"] == {}
    assert (tmp_path / "x.bin").stat().st_size == 6 * 256 * pairs.x[0].element_size()
    points = dict(objective.reconstructions())
    assert sorted(points) == list(range(6)) and points[3].dtype == dtype


def test_disk_continues_exactly_after_an_orderly_end(tmp_path):
    pairs = fixed_pairs()
    whole = minibatches(pairs)
    expected = losses(whole, 9)
    first = minibatches(pairs, on_disk(tmp_path, pairs))
    losses(first, 5)
    state, theta = copy.deepcopy(first.state_dict()), flatten(first.theta)
    second = minibatches(pairs, on_disk(tmp_path, pairs), seed=9)
    second.load_state_dict(state)
    assign(second.theta, theta)
    assert losses(second, 4) == expected[5:]


@pytest.mark.parametrize("damage", ["missing", "truncated", "not finite", "stale"])
def test_damaged_warm_starts_cost_iterations_only(damage, tmp_path):
    pairs = fixed_pairs()
    objective = minibatches(pairs, on_disk(tmp_path, pairs))
    losses(objective, 3)
    state, theta = copy.deepcopy(objective.state_dict()), flatten(objective.theta)
    expected = losses(objective, 3)
    path = tmp_path / "x.bin"
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:100])
    elif damage == "not finite":
        path.write_bytes(b"\xff" * path.stat().st_size)
    other = minibatches(pairs, on_disk(tmp_path, pairs))
    other.load_state_dict(state)
    assign(other.theta, theta)
    resumed = losses(other, 3)
    assert resumed == pytest.approx(expected, rel=1e-3) and all(math.isfinite(v) for v in resumed)


def test_without_warm_starts_every_step_starts_afresh():
    pairs = fixed_pairs()
    objective = minibatches(pairs, NoWarmStarts())
    starts = []
    start = objective._start
    objective._start = lambda chunk: starts.append(start(chunk)) or starts[-1]
    losses(objective, 4)
    assert starts == [None] * 4 and objective.state_dict()["x"] == {}
    assert losses(minibatches(pairs), 4) == pytest.approx(losses(minibatches(pairs, NoWarmStarts()), 4), rel=1e-3)


def test_value_of_a_minibatch_objective_is_that_of_all_pairs():
    pairs = fixed_pairs()
    objective = minibatches(pairs)
    losses(objective, 2)
    whole = bi.BilevelObjective(objective.energy, pairs)
    value, expected = objective.value(1e-6), whole.value(1e-6)
    assert value.value == pytest.approx(expected.value, rel=1e-7)
    assert value.lower <= expected.upper and expected.lower <= value.upper
    assert objective.state_dict()["trial_x"] == {}


# ---------------------------------------------------------------------------------------------- validation


def test_validation_is_accurate_to_a_thousandth():
    crops = [(n, x[:, :40, :48]) for n, x in IMAGES.items()]
    energy = bi.VariationalEnergy(bi.TotalVariation(0.1, 0.01))
    quick = Validator(energy, ImagePairs.build(crops, Degradation(), torch.float32))
    values = quick.validate()
    exact = ImagePairs.build(crops, Degradation())
    for i, batch in enumerate(exact.batches(1)):
        x, _ = bi.reconstruct(batch.y, batch.physics, energy.regularizer, error_tol=1e-8)
        assert float((quick._points[i].double() - x[0]).square().mean().sqrt()) <= 1.01 * PIXEL_ACCURACY
    assert values["psnr"] > values["psnr_noisy"] == pytest.approx(20, abs=0.5)
    shown = quick.images()
    assert shown["reconstruction"].shape == (2, 1, 40, 48) and shown["reconstruction"].dtype == torch.float32
