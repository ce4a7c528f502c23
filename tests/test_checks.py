"""Arguments that make no sense are refused in words that name them, before anything is computed."""

import math

import cases
import deepinv
import numpy as np
import pytest
import torch

import bilevel_imaging as bi
from bilevel_imaging import lower_solvers
from bilevel_imaging.config import DataConfig, LoggingConfig, RegularizerConfig
from bilevel_imaging.energies import FrequencyWeights, NoiseWeight, SamplingMask
from bilevel_imaging.linear_solvers import Chebyshev, ConjugateGradient
from bilevel_imaging.upper_level import (
    DFOLS,
    MAID,
    UPPER_LEVEL_METHODS,
    FirstOrder,
    KunischPock,
    ProblemObjective,
    SingleLoop,
    SquaredError,
)


@pytest.fixture(scope="module")
def case() -> cases.Case:
    return cases.build(size=(5, 6))


def ask(case, **changed):
    arguments = {"problem": case.problem, "loss": SquaredError(), "x_true": case.x_true, "relative": 0.1, **changed}
    return bi.hypergradient(arguments.pop("problem"), arguments.pop("loss"), arguments.pop("x_true"), **arguments)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("problem", 3, "problem as a lower-level problem, e.g. energy.bind"),
        ("lower", "newton_cg", "lower as a lower-level solver, e.g. .*NewtonCG.*Got str 'newton_cg'"),
        ("lower", lower_solvers.NewtonCG, "Got the class NewtonCG"),
        ("lower", ConjugateGradient(), "lower as a lower-level solver"),
        ("linear", ConjugateGradient, "linear as a linear solver.*Got the class ConjugateGradient"),
        ("linear", lower_solvers.NewtonCG(), "linear as a linear solver"),
        ("loss", None, "Expected a loss"),
        ("x0", "zeros", "x0 as a tensor"),
        ("relative", "a", "relative as a positive number, e.g. 0.1. Got 'a'"),
        ("max_rounds", -1, "max_rounds as an integer >= 0. Got -1"),
        ("max_rounds", 0.5, "max_rounds as an integer >= 0. Got 0.5"),
    ],
)
def test_hypergradient(case, name, value, words):
    with pytest.raises(ValueError, match=words):
        ask(case, **{name: value})


def test_tolerances_that_are_no_numbers(case):
    with pytest.raises(ValueError, match="error_tol as one float or one value per sample. Got 'x'"):
        ask(case, relative=None, error_tol="x")


def test_complex_ground_truth_is_not_cut_to_its_real_part(case):
    with pytest.raises(ValueError, match="Expected a real x_true.*two channels"):
        ask(case, x_true=torch.complex(case.x_true, case.x_true))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: bi.ConvexRidge(48), "features as a sequence of one or more positive integers, e.g. .48,.. Got 48"),
        (lambda: bi.ConvexRidge((2.7,), 3), "features as an integer >= 1. Got 2.7"),
        (lambda: bi.ConvexRidge((4,), 3, knots=4.5), "knots as an integer >= 2"),
        (lambda: bi.InputConvex(features=3), "features as a sequence"),
        (lambda: bi.InputConvex(strong="a"), "strong as a finite number >= 0"),
        (lambda: bi.FieldsOfExperts(2.5), "count of filters as an integer >= 1. Got 2.5"),
        (lambda: bi.FieldsOfExperts(4, "x"), "filter size as an integer >= 3"),
        (lambda: bi.FieldsOfExperts(4, 3, start="random", seed="x"), "seed as an integer >= 0"),
        (lambda: bi.TotalVariation("a"), "weight as a positive finite number. Got 'a'"),
        (lambda: bi.TotalVariation(True), "weight as a positive finite number. Got True"),
        (lambda: bi.TotalVariation(None), "weight as a positive finite number. Got None"),
        (lambda: bi.VariationalEnergy(bi.TotalVariation(), ridge="a"), "ridge as a finite number >= 0. Got 'a'"),
        (lambda: MAID(memory=1.5), "memory as an integer >= 0. Got 1.5"),
        (lambda: MAID(relative="a"), "relative as a number in .0.0, 1.0.. Got 'a'"),
        (lambda: Chebyshev(max_iter=1.5), "max_iter as an integer >= 0. Got 1.5"),
        (lambda: bi.TotalVariation(isotropic="no"), "isotropic as True or False. Got 'no'"),
        (lambda: bi.TotalVariation(couple_channels="no"), "couple_channels as True or False. Got 'no'"),
        (lambda: bi.TotalVariation(learn_weight="no"), "learn_weight as True or False. Got 'no'"),
        (lambda: bi.TotalVariation(learn_smoothing=1), "learn_smoothing as True or False. Got 1"),
        (lambda: bi.regularizers.HuberTotalVariation(isotropic="no"), "isotropic as True or False"),
        (lambda: bi.ConvexRidge((2,), 3, shared="no"), "shared as True or False"),
        (lambda: bi.ConvexRidge((2,), 3, learn_potentials="no"), "learn_potentials as True or False"),
        (lambda: bi.FieldsOfExperts(4, 3, learn_filters="no"), "learn_filters as True or False"),
        (lambda: bi.FieldsOfExperts(4, 3, learn_weights="no"), "learn_weights as True or False"),
        (lambda: bi.FieldsOfExperts(4, 3, learn_smoothing="no"), "learn_smoothing as True or False"),
        (lambda: bi.regularizers.LinearSpline(learn_slopes="no"), "learn_slopes as True or False"),
        (lambda: bi.NoiseConditional(bi.TotalVariation(), learn_scales="no"), "learn_scales as True or False"),
        (lambda: bi.NoiseConditional(bi.TotalVariation(), learn_weights="no"), "learn_weights as True or False"),
        (lambda: NoiseWeight(learn="no"), "Expected learn as True or False"),
        (lambda: FrequencyWeights((4, 4), learn="no"), "Expected learn as True or False"),
        (lambda: SamplingMask((4, 4), learn="no"), "Expected learn as True or False"),
        (lambda: SingleLoop(accelerated="no"), "accelerated as True or False"),
        (lambda: lower_solvers.AcceleratedGradient(restart="no"), "restart as True or False"),
        (lambda: FirstOrder("SGD", foo=1), "options of torch.optim.SGD, some of momentum, dampening, .*. Got foo"),
        (lambda: FirstOrder("SGD", params=1), "options of torch.optim.SGD, .*. Got params"),
        (lambda: FirstOrder("SGD", nesterov="no", momentum=0.9), "nesterov as True or False. Got 'no'"),
        (lambda: DataConfig(color="no"), "data.color: expected true or false. Got 'no'"),
        (lambda: DataConfig(random_patches="no"), "data.random_patches: expected true or false"),
        (lambda: RegularizerConfig(isotropic="no"), "regularizer.isotropic: expected true or false. Got 'no'"),
        (lambda: RegularizerConfig(couple_channels="no"), "regularizer.couple_channels: expected true or false"),
        (lambda: RegularizerConfig(learn_weight="no"), "regularizer.learn_weight: expected true, false or null"),
        (lambda: LoggingConfig(evaluate="no"), "logging.evaluate: expected true or false"),
        (lambda: bi.BilevelReconstructor(bi.TotalVariation()), "energy as a VariationalEnergy"),
        (
            lambda: bi.BilevelReconstructor(bi.VariationalEnergy(bi.TotalVariation()), "x"),
            "lower as a lower-level solver",
        ),
    ],
)
def test_constructors(build, words):
    with pytest.raises(ValueError, match=words):
        build()


def test_texts_are_no_answers_to_yes_or_no(case):
    for method in (bi.unrolled, bi.inexact_ad):
        with pytest.raises(ValueError, match="certify as True or False. Got 'no'"):
            method(case.problem, SquaredError(), case.x_true, steps=1, certify="no")
    assert bi.TotalVariation(isotropic=np.bool_(False)).isotropic is False


@pytest.mark.parametrize("solver", [*cases.LOWER_SOLVERS.values(), *cases.LINEAR_SOLVERS.values()])
@pytest.mark.parametrize("limit", [-1, 1.5])
def test_limits_of_iterations(case, solver, limit):
    made = solver()
    if isinstance(made, lower_solvers.LowerSolver):
        with pytest.raises(ValueError, match="max_iter as an integer >= 0"):
            made.solve(case.problem, None, 1e-2, max_iter=limit)
    elif hasattr(made, "max_iter"):
        at = case.problem.linearize(case.x_true)
        with pytest.raises(ValueError, match="max_iter as an integer >= 0"):
            made.solve(at, case.x_true, 1e-2, max_iter=limit)


@pytest.mark.parametrize(
    ("regularizer", "shape", "words"),
    [
        (lambda: bi.FieldsOfExperts(4, 3, 3), (1, 1, 6, 6), "filters of 3 channels"),
        (lambda: bi.ConvexRidge((2,), 3, 3), (1, 1, 6, 6), "filters of 3 channels"),
        (lambda: bi.InputConvex(3, (2,), 3), (1, 1, 6, 6), "see channels"),
        (lambda: bi.FieldsOfExperts(4, 7), (1, 1, 2, 2), "at least 3 x 3 pixels"),
        (lambda: bi.Sum(bi.TotalVariation(), bi.FieldsOfExperts(4, 3, 3)), (1, 1, 6, 6), "filters of 3 channels"),
        (lambda: bi.Scaled(bi.FieldsOfExperts(4, 3, 3), 2.0), (1, 1, 6, 6), "filters of 3 channels"),
    ],
)
def test_images_that_a_regularizer_can_not_be_applied_to(regularizer, shape, words):
    with pytest.raises(ValueError, match=words):
        bi.VariationalEnergy(regularizer()).bind(torch.rand(shape), deepinv.physics.Denoising())


def test_blur_without_a_filter():
    energy = bi.VariationalEnergy(bi.TotalVariation(), ridge=0.1)
    with pytest.raises(ValueError, match="physics with a filter. Got None"):
        energy.bind(torch.rand(1, 1, 8, 8), deepinv.physics.Blur(padding="circular"))


def test_objectives(case):
    for make in (
        lambda **options: ProblemObjective(case.problem, SquaredError(), case.x_true, **options),
        lambda **options: bi.BilevelObjective(case.energy, _pairs(), **options),
    ):
        with pytest.raises(ValueError, match="Unknown certificate 'foo'"):
            make(certificate="foo")
        with pytest.raises(ValueError, match="lower as a lower-level solver"):
            make(lower="x")
    with pytest.raises(ValueError, match="x_true of the shape of the images"):
        ProblemObjective(case.problem, SquaredError(), case.x_true[:1])
    for method in (KunischPock(), DFOLS()):
        with pytest.raises(ValueError, match="hands out lower-level problems.*use BilevelObjective"):
            method.step(ProblemObjective(case.problem, SquaredError(), case.x_true))


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (3, "minibatch as at most 2, the number of images. Got 3"),
        (0, "minibatch as an integer >= 1. Got 0"),
        (1.5, "minibatch as an integer >= 1. Got 1.5"),
    ],
)
def test_minibatches_that_the_images_do_not_have(case, size, words):
    pairs = bi.data.ImagePairs.build([(name, torch.rand(1, 8, 8)) for name in "ab"], bi.data.Degradation())
    with pytest.raises(ValueError, match=words):
        bi.BilevelObjective(case.energy, pairs, minibatch=size, generator=torch.Generator())


@pytest.mark.parametrize("name", UPPER_LEVEL_METHODS)
def test_steps_of_what_is_no_objective(case, name):
    for wrong, got in ((case.problem, "VariationalProblem"), (3, "int 3"), (ProblemObjective, "the class Problem")):
        with pytest.raises(ValueError, match=f"Expected objective as .*ProblemObjective.problem, loss.*. Got {got}"):
            UPPER_LEVEL_METHODS[name]().step(wrong)


def test_names_of_files_that_are_none(tmp_path):
    for use in (bi.load_regularizer, lambda path: bi.save_regularizer(path, bi.TotalVariation())):
        for wrong in (3, None, b"r.safetensors"):
            with pytest.raises(ValueError, match="Expected path as the name of a file.*Got (int|NoneType|bytes)"):
                use(wrong)


def test_states_and_exports(tmp_path):
    method = MAID()
    with pytest.raises(ValueError, match="state of curvature with pairs"):
        method.load_state_dict({**method.state_dict(), "inverse": {}})
    for options in ({"ridge": -1.0}, {"noise_level": math.nan}, {"constants": {"mu": math.inf}}):
        with pytest.raises(ValueError, match=f"Expected {'mu' if 'constants' in options else next(iter(options))} as"):
            bi.save_regularizer(tmp_path / "r.safetensors", bi.TotalVariation(), **options)
    assert not list(tmp_path.iterdir())


def _pairs():
    images = [("a", torch.rand(1, 8, 8))]
    return bi.data.ImagePairs.build(images, bi.data.Degradation(sigma=0.1))


def test_losses_that_are_never_negative_have_no_negative_bounds(case):
    h = ask(case, relative=None, error_tol=1e3, residual_tol=1e3)
    assert h.loss_interval[0] >= 0 and h.loss >= 0
    assert (bi.hypergradients.loss_interval(case.problem, SquaredError(), case.x_true, case.y)[1] >= 0).all()


def test_parameters_that_left_the_range_of_numbers():
    energy = bi.VariationalEnergy(bi.TotalVariation())
    problem = energy.bind(torch.rand(1, 1, 6, 6), deepinv.physics.Denoising())
    with torch.no_grad():
        energy.regularizer.log_smoothing.fill_(-1e6)
    with pytest.raises(ValueError, match="Expected regularizer.log_smoothing from -41.4"):
        problem.constants()


class OwnSquares(bi.Regularizer):
    """By autograd, with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.log_weight = torch.nn.Parameter(torch.zeros(()))

    def fn(self, x):
        return 0.5 * self.log_weight.exp() * x.square().flatten(1).sum(1)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("regularizer", "name"),
    [
        (lambda: bi.TotalVariation(), "log_weight"),
        (lambda: bi.TotalVariation(learn_smoothing=False), "log_smoothing"),
        (lambda: bi.FieldsOfExperts(4, 3), "log_weights"),
        (lambda: bi.Sum(bi.Tikhonov(), bi.TotalVariation()), "parts.1.log_weight"),
        (OwnSquares, "log_weight"),
    ],
)
def test_parameters_that_became_nan_are_the_reason(regularizer, name, value):
    energy = bi.VariationalEnergy(regularizer())
    problem = energy.bind(torch.rand(2, 1, 8, 8), deepinv.physics.Denoising())
    with torch.no_grad():
        energy.regularizer.get_parameter(name).fill_(value)
    for accuracy in ({"relative": 0.1}, {"error_tol": 0.1, "residual_tol": 0.1}):
        h = bi.hypergradient(problem, SquaredError(), torch.rand(2, 1, 8, 8), **accuracy)
        assert not h.certified and h.reason == f"not certified: NaN or inf in regularizer.{name}"
    with pytest.raises(ValueError, match=f"Expected finite parameters. Got NaN or inf in regularizer.{name}"):
        bi.distance_certificates(problem, torch.rand(2, 1, 8, 8))
