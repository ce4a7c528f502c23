"""Upper level: the objective is what it says, no accepted step raises the loss, and every run can be continued."""

from __future__ import annotations

import copy
import functools
import io
import math
from types import SimpleNamespace

import pytest
import torch
from cases import UserRegularizer, exact_loss
from torch import Tensor

import bilevel_imaging as bi
from bilevel_imaging.cost import Cost
from bilevel_imaging.data import Degradation, ImagePairs, extract_patches, photographs
from bilevel_imaging.hypergradients import Hypergradient
from bilevel_imaging.upper_level import MAID, CertifiedValue, FirstOrder, SquaredError, maid
from bilevel_imaging.upper_level.quasi_newton import DAMPING, InverseHessian, assign, curvature_at_end, flatten

IMAGES = ("astronaut", "coffee", "coins", "motorcycle")


@functools.cache
def photographs_used() -> dict[str, Tensor]:
    return {name: image for name, image in photographs(part="train").items() if name in IMAGES}


@functools.cache
def patches(size: int = 32, count: int = 4) -> ImagePairs:
    crops = extract_patches(photographs_used(), size, 1, seed=3)
    return ImagePairs.build(crops[:count], Degradation(sigma=0.1))


@functools.cache
def two_shapes() -> ImagePairs:
    crops = extract_patches(photographs_used(), 20, 1, seed=3)
    images = [(name, crop if i % 2 == 0 else crop[:, :12, :16].clone()) for i, (name, crop) in enumerate(crops)]
    return ImagePairs.build(images, Degradation(sigma=0.1))


def make(pairs: ImagePairs, weight: float = 0.1, smoothing: float = 0.05, **options) -> bi.BilevelObjective:
    return bi.BilevelObjective(bi.VariationalEnergy(bi.TotalVariation(weight, smoothing)), pairs, **options)


def saved(state: dict) -> dict:
    """Through a file, as checkpoints are: nothing is shared with the run that goes on."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def bits(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    return {name: t.detach().numpy().tobytes() for name, t in tensors.items()}


def scalars(report) -> dict:
    """All of a report but the time."""
    values = {name: value for name, value in vars(report).items() if name != "cost"}
    return {**values, "work": report.cost.work, "values": report.cost.values}


# --------------------------------------------------------------------------------------------------------------------
# the objective


@pytest.mark.parametrize("error_tol", [0.3, 1e-2, 1e-5, 1e-10])
@pytest.mark.parametrize("adjoints", [False, True], ids=["plain", "corrected"])
def test_value_interval_contains_reference(error_tol, adjoints):
    objective = make(patches(8, 3), batch_size=2)
    if adjoints:
        objective.hypergradient(relative=0.1)
        assign(objective.theta, flatten(objective.theta) + torch.tensor([0.2, -0.3]))
    value = objective.value(error_tol)
    loss, uncertainty = exact_loss(objective)
    assert value.lower - uncertainty <= loss <= value.upper + uncertainty
    assert value.lower <= value.value <= value.upper
    assert value.upper - value.lower <= 4 * error_tol * max(loss, loss**0.5, error_tol)


def test_hypergradient_equals_central_differences():
    objective = make(two_shapes())
    h = objective.hypergradient(error_tol=1e-11, residual_tol=1e-11)
    theta, grad = flatten(objective.theta), flatten(h.grad)
    fresh = make(two_shapes())
    for i, direction in enumerate(torch.eye(2, dtype=torch.float64)):
        values = []
        for step in (-2e-3, -1e-3, 1e-3, 2e-3):
            assign(fresh.theta, theta + step * direction)
            values.append(fresh.value(1e-11).value)
        fourth_order = (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12 * 1e-3)
        assert fourth_order == pytest.approx(float(grad[i]), rel=1e-7)


@pytest.mark.parametrize("tolerance", [1e-2, 1e-6, 1e-12])
def test_batch_size_does_not_matter(tolerance):
    results = []
    for batch_size in (1, 2, None):
        objective = make(two_shapes(), batch_size=batch_size)
        h = objective.hypergradient(error_tol=tolerance, residual_tol=tolerance)
        assign(objective.theta, flatten(objective.theta) + 0.1)
        v = objective.value(tolerance)
        results.append(torch.cat([flatten(h.grad), torch.tensor([h.loss, v.value, v.lower, v.upper]).double()]))
        points = dict(objective.reconstructions())
        assert sorted(points) == [0, 1, 2, 3]
        results[-1] = torch.cat([results[-1], *(points[i].flatten() for i in sorted(points))])
    for other in results[1:]:
        assert float((other - results[0]).abs().max()) < 1e-10


def test_relative_holds_for_the_mean():
    # near the minimum the images pull in opposite directions: what suffices for every batch does not for their mean
    pairs = patches(20)
    start = make(pairs, 0.09, 0.02)
    method = MAID()
    for _ in range(4):
        method.step(start)
    objective = make(pairs, batch_size=1)
    assign(objective.theta, flatten(start.theta))
    passes = []
    plain = objective._pass
    objective._pass = lambda *a, **k: passes.append(plain(*a, **k)) or passes[-1]
    h = objective.hypergradient(relative=0.1)
    sizes = [part.norm for part in passes[0][0]]
    assert sum(sizes) / len(sizes) > 5 * h.norm and len(passes) > 1
    assert h.certified and h.bound <= 0.1 * h.norm
    other = make(pairs)
    assign(other.theta, flatten(objective.theta))
    truth = other.hypergradient(error_tol=1e-11, residual_tol=1e-11)
    assert float((flatten(h.grad) - flatten(truth.grad)).norm()) <= h.bound + truth.bound
    # the cost of every pass is counted
    work = sum(part.cost.work for parts, _ in passes for part in parts)
    assert h.cost.work == work


def test_warm_starts_save_work():
    objective = make(patches(20))
    cold_value, warm_value = objective.value(1e-6), objective.value(1e-6)
    assert warm_value.cost.work < 0.2 * cold_value.cost.work
    cold = objective.hypergradient(error_tol=1e-6, residual_tol=1e-6)
    warm = objective.hypergradient(error_tol=1e-6, residual_tol=1e-6)
    assert warm.cost.work < 0.2 * cold.cost.work
    assign(objective.theta, flatten(objective.theta) + 0.01)
    fresh = make(patches(20))
    assign(fresh.theta, flatten(objective.theta))
    accuracy = {"error_tol": 1e-6, "residual_tol": 1e-6}
    assert objective.hypergradient(**accuracy).cost.work < 0.8 * fresh.hypergradient(**accuracy).cost.work


def test_trial_points_are_used_where_they_belong_only():
    tried, plain = make(patches(20)), make(patches(20))
    for objective in (tried, plain):
        objective.hypergradient(relative=0.1)
    theta = flatten(tried.theta)
    assign(tried.theta, theta + 3)
    tried.value(1e-6)
    at_trial = {i: x.clone() for i, x in tried._trial_x.items()}
    assign(tried.theta, theta)  # rejected
    a, b = tried.value(1e-3), plain.value(1e-3)
    assert (a.value, a.lower, a.upper, a.cost.work) == (b.value, b.lower, b.upper, b.cost.work)
    assign(tried.theta, theta + 3)  # what another value has replaced is not used either
    assert not torch.equal(tried._start(tried._bound[0]), torch.stack(list(at_trial.values())))
    tried.value(1e-6)  # accepted: the next hypergradient goes on from here
    assert torch.equal(tried._start(tried._bound[0]), torch.stack(list(tried._trial_x.values())))
    assign(plain.theta, theta + 3)
    accuracy = {"error_tol": 1e-6, "residual_tol": 1e-6}
    assert tried.hypergradient(**accuracy).cost.gradients < plain.hypergradient(**accuracy).cost.gradients


def minibatches(seed: int, pairs: ImagePairs | None = None) -> bi.BilevelObjective:
    generator = torch.Generator().manual_seed(seed)
    return make(two_shapes() if pairs is None else pairs, minibatch=1, generator=generator)


def take(objective: bi.BilevelObjective, count: int) -> tuple[list[list[int]], list[bytes]]:
    """(images, hypergradients) of the next minibatches, theta moving a little at each."""
    images, grads = [], []
    chunk = objective._chunk
    objective._chunk = lambda batch, *number: images.append(batch.indices.tolist()) or chunk(batch, *number)
    for _ in range(count):
        grad = flatten(objective.hypergradient(relative=0.1).grad)
        grads.append(grad.numpy().tobytes())
        assign(objective.theta, flatten(objective.theta) - 0.05 * grad)
    objective._chunk = chunk
    return images, grads


def test_minibatches_are_reproducible_and_restored():
    first, second = minibatches(1), minibatches(1)
    images, grads = take(first, 10)
    assert (images, grads) == take(second, 10)
    for start in (0, 4):  # two passes, every image once in each
        assert sorted(i for batch in images[start : start + 4] for i in batch) == [0, 1, 2, 3]
    assert images[:4] != images[4:8] or images[:4] != [[0], [1], [2], [3]]
    state, theta = saved(first.state_dict()), flatten(first.theta)  # in the middle of a pass
    expected = take(first, 7)
    other = minibatches(99)
    take(other, 3)
    assign(other.theta, theta)
    other.load_state_dict(state)
    assert take(other, 7) == expected


def test_state_of_other_images_is_refused():
    objective = make(two_shapes())
    objective.hypergradient(relative=0.1)
    state = saved(objective.state_dict())
    for other in (patches(20), two_shapes().subset([0, 2])):
        with pytest.raises(ValueError, match="the data have changed since the checkpoint"):
            make(other).load_state_dict(state)
    same = make(two_shapes())
    same.load_state_dict(state)
    assert bits(dict(enumerate(same.warm.x.values()))) == bits(dict(enumerate(objective.warm.x.values())))
    with pytest.raises(ValueError, match="Expected a state"):
        same.load_state_dict({name: value for name, value in state.items() if name != "q"})


def test_wrong_batches_are_refused():
    with pytest.raises(ValueError, match="torch.Generator"):
        make(two_shapes(), minibatch=2)
    with pytest.raises(ValueError, match="batch_size"):
        make(two_shapes(), batch_size=0)


# --------------------------------------------------------------------------------------------------------------------
# MAID on images


@functools.cache
def best_of_grid() -> tuple[float, Tensor]:
    """(smallest loss, its log-parameters) of nested grids; the first spans a factor of 20 to both sides."""
    objective = make(patches(32, 2))
    best, center = math.inf, torch.tensor([0.1, 0.02], dtype=torch.float64).log()
    half = torch.tensor([3.0, 3.0], dtype=torch.float64)
    for points in (7, 5, 5):
        line = torch.linspace(-1, 1, points, dtype=torch.float64)
        around = center
        for a in line:
            for b in line:
                theta = around + half * torch.stack([a, b])
                assign(objective.theta, theta)
                loss = objective.value(1e-3).value
                if loss < best:
                    best, center = loss, theta
        half = half / (points // 2)
    assign(objective.theta, center)
    return objective.value(1e-6).value, center


class Spy(bi.BilevelObjective):
    """Notes theta and the certified interval of everything asked for."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.log: list[tuple[str, Tensor, float, float]] = []

    def value(self, error_tol):
        value = super().value(error_tol)
        self.log.append(("value", flatten(self.theta), value.lower, value.upper))
        return value

    def hypergradient(self, **accuracy):
        h = super().hypergradient(**accuracy)
        self.log.append(("hypergradient", flatten(self.theta), *h.loss_interval))
        return h


def spy(pairs: ImagePairs, weight: float, smoothing: float) -> Spy:
    return Spy(bi.VariationalEnergy(bi.TotalVariation(weight, smoothing)), pairs)


def train(objective: bi.BilevelObjective, method: MAID, steps: int) -> list:
    reports = []
    while len(reports) < steps and not (reports and reports[-1].stop):
        reports.append(method.step(objective))
    return reports


def check_every_step(objective: Spy, method: MAID, steps: int) -> list:
    """Train; every certified interval holds and no accepted step raises the loss, or AssertionError."""
    reports = []
    loss, uncertainty = exact_loss(objective)
    while len(reports) < steps and not (reports and reports[-1].stop):
        before, old = objective.log[-1:], flatten(objective.theta)
        objective.log.clear()
        report = method.step(objective)
        reports.append(report)
        # the hypergradient of the step, or that with which the step before ended
        kind, theta, lower, upper = objective.log[0] if not before or before[0][0] == "value" else before[0]
        assert kind == "hypergradient" and torch.equal(theta, old)
        assert lower - uncertainty <= loss <= upper + uncertainty
        if not report.accepted:
            assert torch.equal(flatten(objective.theta), old) and report.param_change == 0
            continue
        kind, theta, *interval = objective.log[-1]
        assert torch.equal(theta, flatten(objective.theta))
        assert interval == [report.loss_lower, report.loss_upper]
        assert report.param_change == pytest.approx(float((theta - old).norm()))
        new, new_uncertainty = exact_loss(objective)
        assert report.loss_lower - new_uncertainty <= new <= report.loss_upper + new_uncertainty
        assert new < loss, "the true loss went up"
        assert report.loss_upper <= lower, "the decrease is not certified"
        loss, uncertainty = new, new_uncertainty
    return reports


def check_corner(weight: float, smoothing: float) -> None:
    best, center = best_of_grid()
    start = (center.exp() * torch.tensor([weight, smoothing])).tolist()
    objective = make(patches(32, 2), *start)
    reports = train(objective, MAID(), 100)
    assert reports[-1].stop
    final = objective.value(1e-6)
    assert final.upper <= 1.005 * best
    if (weight, smoothing) == (100.0, 100.0):
        # on the way the smoothing itself became small, not only weight / smoothing right
        assert float(objective.theta["regularizer.log_smoothing"].detach().exp()) < 0.05


def test_best_parameters_from_the_large_smoothing_plateau():
    check_corner(100.0, 100.0)


@pytest.mark.parametrize(("weight", "smoothing"), [(0.01, 0.01), (0.01, 100.0), (100.0, 0.01)])
def test_best_parameters_from_any_start(weight, smoothing):
    check_corner(weight, smoothing)


def test_plateau_is_left(monkeypatch):
    # only weight / smoothing matters here: the loss is flat along (1, 1), and gradients say "stationary"
    objective, stuck, modeled = (make(patches(16, 2), 2.0, 2.0) for _ in range(3))
    reports = train(objective, MAID(model="secant"), 60)
    monkeypatch.setattr(maid, "flat_moves", lambda *args, **kwargs: ([], Cost()))
    without = train(stuck, MAID(model="secant"), 60)
    train(modeled, MAID(), 60)  # Gauss-Newton steps see that little bends there, and are long
    assert float(modeled.theta["regularizer.log_smoothing"].detach().exp()) < 0.1
    assert reports[-1].stop and without[-1].stop
    assert float(objective.theta["regularizer.log_smoothing"].detach().exp()) < 0.1
    assert float(stuck.theta["regularizer.log_smoothing"].detach().exp()) > 1
    assert reports[-1].loss_upper < 0.9 * without[-1].loss_lower


@pytest.mark.parametrize("memory", [10, 0])
def test_no_step_raises_the_loss(memory):
    for start in ((0.09, 0.03), (0.005, 0.5)):
        reports = check_every_step(spy(patches(8, 2), *start), MAID(memory=memory), 6)
        assert sum(r.accepted for r in reports) >= 3


def test_the_check_notices_a_broken_acceptance_test(monkeypatch):
    # close to the minimum in the weight the first move of a secant method, half a unit of a logarithm, is much too long
    settled = make(patches(8, 2), 0.09, 0.03)
    train(settled, MAID(), 6)
    start = (flatten(settled.theta) + torch.tensor([0.02, 0.0])).exp().tolist()
    reports = check_every_step(spy(patches(8, 2), *start), MAID(model="secant"), 1)
    assert reports[0].accepted and reports[0].backtracks > 0
    monkeypatch.setattr(MAID, "_compare", staticmethod(lambda value, lower, upper: "accept"))
    with pytest.raises(AssertionError, match="the true loss went up"):
        check_every_step(spy(patches(8, 2), *start), MAID(model="secant"), 1)


@pytest.mark.parametrize("memory", [10, 0])
def test_maid_continues_bit_for_bit(memory):
    def run(objective, method, steps):
        reports = [scalars(method.step(objective)) for _ in range(steps)]
        return reports, bits(objective.theta), bits({str(i): x for i, x in objective.reconstructions()})

    pairs = ImagePairs.build([("a", patches(12).x[0]), ("b", patches(12).x[1][:, :10])], Degradation(sigma=0.1))
    objective, method = make(pairs, 0.3, 0.2), MAID(memory=memory)
    run(objective, method, 3)
    state = saved({"method": method.state_dict(), "objective": objective.state_dict()})
    theta = flatten(objective.theta)
    expected = run(objective, method, 4)
    other, restored = make(pairs), MAID(memory=memory)
    assign(other.theta, theta)
    other.load_state_dict(state["objective"])
    restored.load_state_dict(state["method"])
    assert run(other, restored, 4) == expected


def test_uncertified_energy_trains():
    pairs = patches(16, 2)
    objective = bi.BilevelObjective(bi.VariationalEnergy(UserRegularizer(0.01)), pairs)
    first = objective.value(1e-6)
    reports = train(objective, MAID(), 10)
    assert not any(r.certified for r in reports) and "UserRegularizer" in reports[0].reason
    assert reports[-1].error_bound == math.inf and reports[-1].loss_upper == math.inf
    final = objective.value(1e-9).value
    losses = []
    for log_weight in torch.linspace(-4, 0, 21, dtype=torch.float64):
        assign(objective.theta, log_weight.reshape(1))
        losses.append(objective.value(1e-6).value)
    assert final <= 1.001 * min(losses) and final < 0.5 * first.value


def test_minibatches_are_refused_by_maid():
    with pytest.raises(ValueError, match="losses of all images"):
        MAID().step(minibatches(0))


# --------------------------------------------------------------------------------------------------------------------
# MAID on functions known exactly


class Known:
    """F(theta) = offset + 1/2 <theta, A theta>, gradients exact, intervals as wide as the accuracy asked for."""

    def __init__(
        self,
        start: list[float],
        diagonal: list[float],
        *,
        offset: float = 1.0,
        floor: float = 0.0,
        relative_bound: float = 1e-14,
    ):
        self.theta = {"a": torch.tensor(start, dtype=torch.float64, requires_grad=True)}
        self.diagonal = torch.tensor(diagonal, dtype=torch.float64)
        self.offset, self.floor, self.relative_bound = offset, floor, relative_bound
        self.asked: list[float] = []
        self.half_width = 1e-12  # of the interval that comes with hypergradients

    def loss(self) -> float:
        theta = flatten(self.theta)
        return self.offset + 0.5 * float(theta @ (self.diagonal * theta))

    def value(self, error_tol: float) -> CertifiedValue:
        self.asked.append(error_tol)
        width, loss = max(error_tol, self.floor), self.loss()
        return CertifiedValue(value=loss, lower=loss - width, upper=loss + width, cost=Cost(values=1))

    def hypergradient(self, *, error_tol=None, residual_tol=None, relative=None) -> Hypergradient:
        grad = self.diagonal * self.theta["a"].detach()
        loss = self.loss()
        return Hypergradient(
            grad={"a": grad},
            bound=self.relative_bound * float(grad.norm()),
            component_bounds=None,
            relative_bound=self.relative_bound,
            certified=True,
            reason="",
            certificate="classical",
            bounds={},
            before_polish=None,
            terms={},
            loss=loss,
            loss_interval=(loss - self.half_width, loss + self.half_width),
            sample_bounds=torch.zeros(1),
            x=torch.zeros(1),
            q=torch.zeros(1),
            lower=SimpleNamespace(distance_bound=torch.zeros(1)),
            linear=SimpleNamespace(residual_norm=torch.zeros(1)),
            cost=Cost(gradients=1),
        )


class Bent(Known):
    """Tells a Gauss-Newton matrix: F'' times a factor, or nothing."""

    factor: float | None = 1.0
    gauss_newton_pays = True

    def gauss_newton(self, relative: float) -> tuple[torch.Tensor, Cost] | None:
        return None if self.factor is None else (self.factor * torch.diag(self.diagonal), Cost(hvps=7))


def test_gauss_newton_steps():
    objective, method = Bent([0.5, 0.3], [1.0, 1e-3]), MAID()
    report = method.step(objective)
    assert report.accepted and report.step_size == 1 and report.cost.hvps >= 7
    assert float(flatten(objective.theta).abs().max()) < 1e-9  # at once, where a secant method has no scale yet
    for model, modeled in (("auto", False), ("gauss_newton", True), ("secant", False)):
        assert (MAID(model=model).step(Bent([0.1] * 5, [1.0] * 5)).cost.hvps >= 7) == modeled


def test_gauss_newton_steps_that_mislead_are_given_up():
    objective, method = Bent([0.5, 1e-3], [1.0, 1.0], floor=1e-3), MAID()
    wrong = torch.diag(torch.tensor([1e6, 1e-6], dtype=torch.float64))  # only the second entry seems worth a move
    objective.gauss_newton = lambda relative: (wrong, Cost(hvps=7))
    first = method.step(objective)
    assert not first.accepted and not first.stop and method.misled
    restored = MAID()
    restored.load_state_dict(method.state_dict())
    second = restored.step(objective)
    assert second.accepted and second.cost.hvps < 7 and not restored.misled


def test_gauss_newton_models_that_are_not_to_be_had():
    with pytest.raises(ValueError, match="model as one of auto, gauss_newton, secant"):
        MAID(model="newton")
    with pytest.raises(ValueError, match="SampledObjective"):
        MAID(model="gauss_newton").step(Known([0.5], [1.0]))
    objective = Bent([0.5], [1.0])
    objective.factor = None
    with pytest.raises(ValueError, match="choose model='secant'"):
        MAID(model="gauss_newton").step(objective)
    assert MAID().step(objective).accepted
    objective = Bent([0.5], [1.0])
    objective.gauss_newton_pays = False
    assert MAID().step(objective).cost.hvps < 7
    objective = Bent([0.5], [1.0])
    objective.gauss_newton = lambda relative: (torch.full((1, 1), torch.nan, dtype=torch.float64), Cost())
    assert MAID().step(objective).accepted


def test_undecided_trials_are_tightened():
    objective = Known([1.0, 0.5], [0.01, 0.02])  # a decrease of a few thousandths, far below the first accuracy
    report = MAID().step(objective)
    assert report.accepted and report.refinements >= 1 and report.backtracks == 0
    assert len(objective.asked) == report.refinements + 1
    assert objective.asked == pytest.approx([objective.asked[0] * 0.1**k for k in range(len(objective.asked))])
    assert report.cost.values == len(objective.asked)


@pytest.mark.parametrize("step_size", [1e-4, 1e2])
def test_a_useless_accuracy_and_step_before_do_not_end_the_search(step_size):
    """Warm starts more accurate than asked give the same interval again, and tiny steps change the loss too little."""
    method = MAID()
    method.load_state_dict({**method.state_dict(), "error_tol": 1e2, "step_size": step_size / 2})
    objective = make(patches(16, 2), weight=0.003, smoothing=0.007)
    report = method.step(objective)
    assert report.accepted and not report.stop


@pytest.mark.parametrize("accuracy", [1e2, 1e-6])
@pytest.mark.parametrize("step_size", [1e-4, 1e2])
def test_work_hardly_depends_on_accuracy_and_step_before(accuracy, step_size):
    def run(method: MAID) -> int:
        objective, work = make(patches(16, 2), weight=0.003, smoothing=0.007), 0
        while True:
            work += method.step(objective).cost.work
            assign(judge.theta, flatten(objective.theta))
            if judge.value(1e-6).upper <= goal:
                return work

    judge = make(patches(16, 2), weight=0.003, smoothing=0.007)
    train(judge, MAID(), 100)
    goal = 1.005 * judge.value(1e-6).lower
    method = MAID()
    method.load_state_dict({**method.state_dict(), "error_tol": accuracy, "step_size": step_size / 2})
    assert run(method) < 1.5 * run(MAID())


def test_what_can_not_be_certified_is_not_accepted():
    objective = Known([1.0, 0.5], [0.01, 0.02], floor=0.1)
    before = flatten(objective.theta)
    reports = train(objective, MAID(), 5)
    assert not any(r.accepted for r in reports) and torch.equal(flatten(objective.theta), before)
    assert "no decrease of the loss can be certified" in reports[-1].stop
    assert len(objective.asked) < 20


def test_rejected_trials_are_not_tightened():
    objective = Known([0.1, 0.0], [100.0, 1.0], offset=10.0)  # the first move, 1, raises the loss from 10.5 to 50.5
    report = MAID().step(objective)
    assert report.accepted and report.backtracks >= 1 and report.refinements == 0
    assert objective.loss() < 10.5


def test_a_hardly_better_trial_is_rejected_without_knowing_it_exactly():
    # the first move, 1, overshoots to the same height but for 4e-5: only intervals of that width could accept it
    objective = Known([0.5002, 0.0], [0.2, 0.2])
    report = MAID().step(objective)
    assert report.accepted and report.backtracks >= 1 and min(objective.asked) > 1e-3
    assert objective.loss() < 1.001


def test_no_step_promises_more_than_the_whole_loss():
    objective = Known([0.1, 0.0], [100.0, 1.0], offset=1e-3)
    loss, slope = objective.loss(), 10.0  # ||grad F||
    report = MAID().step(objective)
    assert report.accepted and report.backtracks == 0
    assert report.param_change == pytest.approx(loss / slope)


def test_steps_are_as_long_as_allowed_where_nothing_curves_upwards():
    objective = Known([10.0, 0.0], [-1e-3, -1e-3])
    method = MAID(largest_move=8.0)
    moves = [method.step(objective).param_change for _ in range(3)]
    assert moves == pytest.approx([1.0, 8.0, 8.0])


def test_steps_grow_where_errors_hide_the_curvature():
    # after a step across the valley every change of the hypergradient along it is within the certified errors
    objective, method = Known([0.5, 5.0], [1.0, 1e-3], relative_bound=0.4), MAID()
    reports = train(objective, method, 12)
    assert reports[-1].stop and objective.loss() < 1.00001


@pytest.mark.parametrize(("memory", "largest"), [(10, 1.0), (0, 4e-4)])
def test_steps_without_known_curvature_are_long(memory, largest):
    objective, method = Known([3.0, 2.0], [1.0, 2.0]), MAID(memory=memory)
    before = flatten(objective.theta)
    method.load_state_dict({**method.state_dict(), "step_size": 5e-5})
    assert method.step(objective).accepted
    assert float((flatten(objective.theta) - before).abs().max()) == pytest.approx(largest)


def test_accuracy_goes_back_when_there_is_room():
    objective = Known([3.0, 2.0], [1.0, 2.0])
    method = MAID()
    method.error_tol = 1e-2
    method.step(objective)
    assert objective.asked == [1e-2] and method.error_tol == 2e-2
    method.error_tol = 1e-9  # far more than a step that decreases the loss by so much can need
    method.sure = False  # a value, not the next hypergradient
    method.step(objective)
    assert 1e-4 < objective.asked[1] < 1e-2 and method.error_tol == 2 * objective.asked[1]


def test_a_hypergradient_that_accepts_a_step_begins_the_next_one():
    objective, method, asked = Known([3.0, 2.0, -1.0], [1.0, 2.0, 0.5]), MAID(), []
    plain = objective.hypergradient
    objective.hypergradient = lambda **accuracy: asked.append(flatten(objective.theta)) or plain(**accuracy)
    reports = [method.step(objective) for _ in range(4)]
    assert all(report.accepted and report.backtracks == 0 for report in reports)
    # the first step takes a value; every other one ends with the hypergradient that the next one begins with
    assert len(objective.asked) == 1 and len(asked) == 5
    assert torch.equal(asked[-1], flatten(objective.theta)) and method.ahead.fits(objective)
    assert sum((report.cost for report in reports), Cost()).gradients == 5
    # nothing of it is used where anything has changed
    assert not method.ahead.fits(Known([3.0, 2.0, -1.0], [1.0, 2.0, 0.5]))
    objective.exact_term = lambda: (0.1, {})
    assert not method.ahead.fits(objective)
    del objective.exact_term
    assign(objective.theta, 2 * flatten(objective.theta))
    assert not method.ahead.fits(objective)
    method.step(objective)
    assert torch.equal(asked[5], 2 * asked[4])


def test_a_trial_that_overshoots_is_followed_by_values():
    objective, method = Known([3.0, 2.0, -1.0], [1.0, 2.0, 0.5]), MAID()
    method.step(objective)
    method.step(objective)
    assert method.sure and method.ahead is not None
    loss, bump = objective.loss, [10.0]
    objective.loss = lambda: loss() + (bump.pop() if bump else 0.0)  # at the next trial
    report = method.step(objective)
    assert report.accepted and report.backtracks == 1 and method.ahead is None and not method.sure
    assert (report.cost.gradients, report.cost.values) == (1, 1 + report.refinements)
    report = method.step(objective)
    assert report.accepted and (report.cost.gradients, report.cost.values) == (1, 1 + report.refinements)
    assert method.ahead is None


def test_ill_conditioned_quadratic_is_solved():
    objective = Known([2.0, -1.0, 1.5], [1.0, 1e-2, 10.0], offset=1e-2)
    reports = train(objective, MAID(), 40)
    assert reports[-1].stop and objective.loss() < 1.001e-2
    plain = Known([2.0, -1.0, 1.5], [1.0, 1e-2, 10.0], offset=1e-2)
    train(plain, MAID(memory=0), len(reports))
    assert objective.loss() < plain.loss()


def test_moves_are_limited():
    objective = Known([100.0, 50.0], [1.0, 1.0])
    method = MAID(largest_move=0.7)
    for _ in range(6):
        before = flatten(objective.theta)
        method.step(objective)
        assert 0 < float((flatten(objective.theta) - before).abs().max()) <= 0.7 + 1e-12


def test_zero_hypergradient_stops():
    objective = Known([0.0, 0.0], [1.0, 2.0])
    report = MAID().step(objective)
    assert report.stop == "the hypergradient is zero" and not report.accepted
    assert torch.equal(flatten(objective.theta), torch.zeros(2, dtype=torch.float64))
    # measurements without noise of flat images: no parameter changes anything
    flat = ImagePairs.build([("flat", torch.full((1, 8, 8), 0.5))], Degradation(sigma=0.0))
    images = make(flat)
    before = flatten(images.theta)
    report = MAID().step(images)
    assert report.stop and not report.accepted and torch.equal(flatten(images.theta), before)


@pytest.mark.parametrize(
    ("argument", "values"),
    [
        ("relative", (0.0, 1.0, -0.1, math.nan)),
        ("decrease", (0.0, 0.5)),
        ("tolerance", (0.0, 1.0)),
        ("largest_move", (0.0, math.inf)),
        ("memory", (-1,)),
    ],
)
def test_maid_refuses_arguments(argument, values):
    for value in values:
        with pytest.raises(ValueError, match=f"Expected {argument}.*Got {value}"):
            MAID(**{argument: value})


def test_maid_refuses_states():
    with pytest.raises(ValueError, match="Expected a state of MAID with.*growth"):
        MAID().load_state_dict({"step_size": 1.0})
    for memory in (0, 10):
        with pytest.raises(ValueError, match="same kind of directions"):
            MAID(memory=memory).load_state_dict(MAID(memory=10 - memory).state_dict())


# --------------------------------------------------------------------------------------------------------------------
# quasi-Newton matrices


def positive_definite(n: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(n, n, dtype=torch.float64, generator=generator)
    return root @ root.T + 0.1 * torch.eye(n, dtype=torch.float64)


def conjugate(matrix: Tensor) -> Tensor:
    """Rows that are orthogonal in the inner product of the matrix."""
    n = matrix.shape[0]
    rotation = torch.linalg.qr(positive_definite(n, 7))[0]
    return torch.linalg.solve_triangular(torch.linalg.cholesky(matrix).T, rotation, upper=True).T


@pytest.mark.parametrize("n", [1, 2, 5])
def test_newton_direction_after_n_pairs(n):
    matrix = positive_definite(n)
    inverse = InverseHessian(n)
    for s in conjugate(matrix):
        assert inverse.update(s, matrix @ s, 0.0)
    h = torch.randn(n, dtype=torch.float64)
    assert torch.allclose(inverse.apply(h), torch.linalg.solve(matrix, h), rtol=1e-9, atol=1e-12)


def test_inverse_is_positive_definite_and_secant():
    n, matrix = 6, positive_definite(6)
    inverse = InverseHessian(3)
    h = torch.randn(n, dtype=torch.float64)
    assert torch.equal(inverse.apply(h), h) and inverse.apply(h) is not h
    for _ in range(8):
        s = torch.randn(n, dtype=torch.float64)
        z = matrix @ s + 0.05 * torch.randn(n, dtype=torch.float64)
        if inverse.update(s, z, 0.0):
            assert torch.allclose(inverse.apply(z), s)
        dense = torch.stack([inverse.apply(e) for e in torch.eye(n, dtype=torch.float64)])
        assert torch.allclose(dense, dense.T, rtol=1e-9, atol=1e-9 * float(dense.abs().max()))
        assert float(torch.linalg.eigvalsh(0.5 * (dense + dense.T)).min()) > 0
    assert len(inverse.pairs) == 3
    inverse.reset()
    assert torch.equal(inverse.apply(h), h)


def test_directions_without_curvature_are_scaled_by_the_sizes_of_the_entries():
    inverse, large = InverseHessian(3), torch.tensor([100.0, -1.0, 1e-6], dtype=torch.float64)
    inverse.observe(large)
    first, flat = inverse.apply(large).abs(), DAMPING * 100 * torch.ones(1).double()
    assert torch.allclose(first, flat * large.abs() / (large.abs() + flat) * (1 + 1e-6 / flat), rtol=1e-12)
    for _ in range(200):
        inverse.observe(torch.ones(3, dtype=torch.float64))
    assert torch.allclose(inverse.apply(large), large, rtol=1e-3)  # the mean forgets
    matrix = positive_definite(3)
    inverse.observe(large)
    for s in conjugate(matrix):
        assert inverse.update(s, matrix @ s, 0.0)
        assert torch.allclose(inverse.apply(matrix @ s), s)
    assert torch.allclose(inverse.apply(large), torch.linalg.solve(matrix, large), rtol=1e-9)
    inverse.reset()
    assert not torch.allclose(inverse.apply(large), large, rtol=0.1)


def test_curvature_at_the_end_of_a_step_is_that_of_the_cubic():
    matrix = positive_definite(3)
    start, s, along = torch.randn(3, 3, dtype=torch.float64)
    for cubic in (0.0, 0.02, -0.02):  # of F = <theta, A theta> / 2 + cubic <along, theta>^3
        points = (start, start + s)
        losses = [float(0.5 * p @ matrix @ p + cubic * (along @ p) ** 3) for p in points]
        before, after = (matrix @ p + 3 * cubic * (along @ p) ** 2 * along for p in points)
        hessian = matrix + 6 * cubic * (along @ points[1]) * torch.outer(along, along)
        rise, slopes = losses[1] - losses[0], float(s @ (before + after))
        z = curvature_at_end(s, after - before, rise, slopes, 0.0)
        assert float(s @ z) == pytest.approx(float(s @ hessian @ s), rel=1e-10)
        if cubic == 0:
            assert torch.allclose(z, after - before, rtol=1e-10)
        else:
            assert torch.equal(curvature_at_end(s, after - before, rise, slopes, 1e3), after - before)
            # orthogonally to s nothing is known beside the gradients
            change = z - (after - before)
            assert torch.allclose(change - (change @ s) / (s @ s) * s, torch.zeros(3).double(), atol=1e-12)


def test_curvature_at_the_end_is_near_the_mean_one():
    s, z = torch.tensor([1.0, 0.0]).double(), torch.tensor([2.0, 5.0]).double()
    for rise, end in ((-10.0, 6.0), (10.0, 2 / 3)):
        assert float(s @ curvature_at_end(s, z, rise, 0.0, 0.0)) == pytest.approx(end)


def test_curvature_that_can_not_be_trusted_is_rejected():
    inverse = InverseHessian()
    s = torch.tensor([1.0, 2.0], dtype=torch.float64)
    for z, noise in ((-s, 0.0), (0 * s, 0.0), (torch.tensor([2.0, -1.0]).double(), 0.0), (math.nan * s, 0.0)):
        assert not inverse.update(s, z, noise)
    size = float(s.norm())
    assert not inverse.update(s, s, 100.1 * size) and not inverse.pairs
    assert inverse.update(s, s, 99.9 * size) and len(inverse.pairs) == 1


def test_inverse_is_restored():
    matrix, inverse, other = positive_definite(4), InverseHessian(), InverseHessian()
    for s in torch.randn(3, 4, dtype=torch.float64):
        inverse.update(s, matrix @ s, 0.0)
        inverse.observe(s)
    other.load_state_dict(saved(inverse.state_dict()))
    h = torch.randn(4, dtype=torch.float64)
    assert torch.equal(inverse.apply(h), other.apply(h))


def test_flatten_and_assign():
    theta = {
        "scalar": torch.tensor(0.1, dtype=torch.float64, requires_grad=True),
        "filters": torch.randn(2, 3, 4, dtype=torch.float32).requires_grad_(),
        "half": torch.randn(5).to(torch.bfloat16).requires_grad_(),
        "transposed": torch.randn(3, 2, dtype=torch.float64).T.requires_grad_(),
    }
    before, objects = copy.deepcopy(theta), dict(theta)
    flat = flatten(theta)
    assert flat.dtype == torch.float64 and flat.shape == (1 + 24 + 5 + 6,) and not flat.requires_grad
    assign(theta, torch.zeros_like(flat))
    assert not any(bool(t.detach().any()) for t in theta.values())
    assert bool(flat.any())  # a copy, not a view
    assign(theta, flat)
    for name, tensor in theta.items():
        assert tensor is objects[name] and tensor.dtype == before[name].dtype and tensor.requires_grad
        assert torch.equal(tensor, before[name])
    single = {"one": torch.ones(3, dtype=torch.float64, requires_grad=True)}
    kept = flatten(single)
    assign(single, torch.zeros(3, dtype=torch.float64))
    assert torch.equal(kept, torch.ones(3, dtype=torch.float64))


# --------------------------------------------------------------------------------------------------------------------
# torch optimizers


@pytest.mark.parametrize(
    ("name", "build", "options"),
    [
        ("Adam", torch.optim.Adam, {"lr": 0.1}),
        ("adam", torch.optim.Adam, {"lr": 0.1, "betas": (0.8, 0.9)}),
        ("SGD", torch.optim.SGD, {"lr": 0.2, "momentum": 0.5}),
        ("sgd", torch.optim.SGD, {"lr": 0.2}),
    ],
)
def test_first_order_is_the_optimizer(name, build, options):
    pairs = patches(16, 2)
    ours, manual = make(pairs, 0.02, 0.1), make(pairs, 0.02, 0.1)
    first = make(pairs, 0.02, 0.1).value(1e-8)
    method, optimizer = FirstOrder(name, **options), build(list(manual.theta.values()), **options)
    assert method.name == build.__name__
    for _ in range(6):
        before = flatten(ours.theta)
        report = method.step(ours)
        h = manual.hypergradient(relative=0.1)
        for key, tensor in manual.theta.items():
            tensor.grad = h.grad[key].clone()
        optimizer.step()
        assert bits(ours.theta) == bits(manual.theta)
        assert all(t.grad is None for t in ours.theta.values())
        assert (report.loss, report.grad_norm, report.error_bound) == (h.loss, h.norm, h.bound)
        assert report.certified and report.error_bound <= 0.1 * report.grad_norm
        assert report.param_change == float((flatten(ours.theta) - before).norm()) and report.accepted
        assert report.step_size == options["lr"]
    assert ours.value(1e-8).upper < first.lower


def test_first_order_takes_fixed_accuracies():
    asked = []
    objective = make(patches(16, 2))
    plain = objective.hypergradient
    objective.hypergradient = lambda **accuracy: asked.append(accuracy) or plain(**accuracy)
    report = FirstOrder("SGD", lr=0.1, error_tol=1e-3, residual_tol=1e-2).step(objective)
    FirstOrder("SGD", lr=0.1, relative=0.5).step(objective)
    FirstOrder("SGD", lr=0.1).step(objective)
    assert asked == [{"error_tol": 1e-3, "residual_tol": 1e-2}, {"relative": 0.5}, {"relative": 0.1}]
    assert report.error_tol <= 1e-3 and report.residual_tol <= 1e-2


def test_first_order_refuses():
    with pytest.raises(ValueError, match="Unknown optimizer 'newton'. Choose from .*'Adam'.*'SGD'") as error:
        FirstOrder("newton")
    assert "LBFGS" not in str(error.value) and "'Optimizer'" not in str(error.value)
    for name in ("LBFGS", "lbfgs", "Optimizer", "SparseAdam"):
        with pytest.raises(ValueError, match="Unknown optimizer"):
            FirstOrder(name)
    for tolerances in ({"error_tol": 1e-3}, {"residual_tol": 1e-3}):
        with pytest.raises(ValueError, match="Got both"):
            FirstOrder(relative=0.1, **tolerances)
    with pytest.raises(ValueError, match="options of torch.optim.Adam, some of .*weight_decay.* Got momentum"):
        FirstOrder("Adam", momentum=0.9).step(make(patches(16, 2)))
    with pytest.raises(ValueError, match="relative"):
        FirstOrder("Adam", relative=0.0).step(make(patches(16, 2)))
    with pytest.raises(ValueError, match="Expected a state of the optimizer Adam. Got one of SGD"):
        FirstOrder("Adam").load_state_dict(FirstOrder("SGD").state_dict())


@pytest.mark.parametrize(("name", "options"), [("Adam", {"lr": 0.1}), ("SGD", {"lr": 0.1, "momentum": 0.9})])
@pytest.mark.parametrize("prepared", [False, True], ids=["new", "used"])
def test_first_order_continues_bit_for_bit(name, options, prepared):
    objective, method = minibatches(3), FirstOrder(name, **options)
    for _ in range(3):
        method.step(objective)
    state = saved({"method": method.state_dict(), "objective": objective.state_dict()})
    theta = flatten(objective.theta)
    expected = [scalars(method.step(objective)) for _ in range(6)]
    other, restored = minibatches(8), FirstOrder(name, **options)
    if prepared:
        restored.step(other)
    assign(other.theta, theta)
    other.load_state_dict(state["objective"])
    restored.load_state_dict(state["method"])
    # saved again before the first step: nothing is lost
    again = FirstOrder(name, **options)
    again.load_state_dict(saved(restored.state_dict()))
    assert [scalars(again.step(other)) for _ in range(6)] == expected
    assert bits(other.theta) == bits(objective.theta)


# --------------------------------------------------------------------------------------------------------------------
# losses


def test_squared_error():
    loss = SquaredError()
    x, x_true = torch.randn(2, 3, 2, 5, 4, dtype=torch.float64).unbind(0)
    x.requires_grad_()
    values = loss(x, x_true)
    assert values.shape == (3,)
    expected = [0.5 * float(d @ d) for d in (x - x_true).detach().flatten(1)]
    assert values.tolist() == pytest.approx(expected, rel=1e-14)
    (grad,) = torch.autograd.grad(values.sum(), x)
    assert torch.equal(loss.grad(x, x_true), grad)
    other = torch.randn_like(x)
    change = (loss.grad(other, x_true) - loss.grad(x, x_true)).norm()
    assert float(change.detach()) == pytest.approx(loss.smoothness * float((other - x).detach().norm()), rel=1e-14)
    assert loss.convex and not bool(loss(x_true, x_true).any())
