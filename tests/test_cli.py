"""The commands from end to end: train, evaluate, resume, and one line for every mistake."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from command_lines import one_line_error
from PIL import Image

from bilevel_imaging.assembly import evaluation_pairs
from bilevel_imaging.cli import evaluate_main, read_config, train_main
from bilevel_imaging.comparison_cli import compare_main
from bilevel_imaging.config import (
    DEFAULT_RIDGE,
    DataConfig,
    ProblemConfig,
    RegularizerConfig,
    RunConfig,
    UpperConfig,
)
from bilevel_imaging.data import Degradation, ImagePairs, photographs
from bilevel_imaging.energies import FrequencyWeights, NoiseWeight, SamplingMask, VariationalEnergy
from bilevel_imaging.export import load_regularizer, reconstruct, save_regularizer
from bilevel_imaging.regularizers import NoiseConditional, TotalVariation
from bilevel_imaging.training import BilevelObjective, evaluation, load_latest, read_metrics
from bilevel_imaging.training.evaluation import evaluate, grid_search, image_metrics, viewable_pairs
from bilevel_imaging.training.mean import bind_batch
from bilevel_imaging.training.validation import Validator
from bilevel_imaging.upper_level import SamplingPenalty

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "scripts" / "configs").glob("*.yaml"))
TINY = (
    "--data.patch_size=24 --data.patches_per_image=1 --data.max_images=2 --data.eval_size=48 "
    "--logging.tensorboard=false --logging.progress=false"
).split()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "tv"
    assert train_main([f"--output={folder}", "--upper.max_steps=4", *TINY]) == 0
    return folder


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--upper.method=grid", "--regularizer.kind=fields_of_experts"], "at most 4 parameters for a grid"),
        (["--upper.method=dfo_ls", "--regularizer.kind=fields_of_experts"], "at most 100 parameters for dfo_ls"),
        (["--upper.method=kunisch_pock", "--regularizer.kind=fields_of_experts"], "at most 100 parameters for kun"),
        (["--upper.options={memory: a}"], "upper: maid: Expected memory as an integer >= 0. Got 'a'."),
        (["--upper.options={largest_move: a}"], "upper: maid: Expected largest_move as a number"),
        (["--upper.relative=2"], "upper: maid: Expected relative in (0.0, 1.0). Got 2.0."),
        (["--upper.method=adam", "--upper.options={lr: 2}"], "upper.options: lr: it is a setting of its own."),
    ],
)
def test_mistakes_in_the_method_leave_nothing_behind(arguments, words, tmp_path, capsys):
    folder = tmp_path / "new"
    assert words in fails(capsys, f"--output={folder}", *TINY, *arguments)
    assert not folder.exists()


def test_parameters_that_run_away_end_the_training_in_words(tmp_path, capsys):
    arguments = ["--upper.method=adam", "--upper.lr=1e6", "--upper.max_steps=3", *TINY]
    assert train_main([f"--output={tmp_path / 'run'}", *arguments]) != 0
    said = capsys.readouterr().err
    assert "Stopped at step" in said and "Last good checkpoint: step 0" in said and "Traceback" not in said


def test_a_config_that_is_no_text(tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(bytes(range(128, 256)))
    assert "--config: expected a YAML file. Got one that is not text" in fails(capsys, f"--config={tmp_path / 'a.png'}")


def test_nothing_is_left_to_do(run, capsys):
    assert train_main([f"--resume={run}", "--upper.max_steps=2"]) == 0
    assert "Nothing was learned: 4 of 2 steps were done already." in capsys.readouterr().out


def test_crops_that_are_too_small_for_ssim(run, capsys):
    message = fails(capsys, str(run), "--crop=3", command=evaluate_main)
    assert message == "error: --crop: expected 0 or an integer >= 16. Got 3.\n"


def test_an_interrupt_while_libraries_are_loaded(tmp_path):
    """Ctrl-C long before the package is there."""
    slow = tmp_path / "bilevel_imaging"
    slow.mkdir()
    (slow / "__init__.py").write_text("raise KeyboardInterrupt")
    for script in ("train", "evaluate", "compare"):
        command = [sys.executable, str(ROOT / "scripts" / f"{script}.py")]
        ended = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
        assert (ended.returncode, ended.stderr) == (130, "Stopped before anything was done.\n")


@pytest.fixture
def short_grid(monkeypatch):
    """A grid search that tries three weights, for tests that compare nothing with the best one."""
    monkeypatch.setattr(evaluation, "GRID", (0.003, 0.01))
    monkeypatch.setattr(evaluation, "BASELINE_SMOOTHINGS", (0.01,))
    monkeypatch.setattr(evaluation, "REFINEMENTS", 0)


def fails(capsys, *arguments: str, command=train_main) -> str:
    """The one line printed to standard error."""
    return one_line_error(capsys, command, arguments)


def test_summary_and_files(run):
    summary = json.loads((run / "summary.json").read_text())
    for metric in ("psnr", "ssim"):
        assert set(summary[metric]) == {"measurement", "learned", "grid_search"}
        assert summary[metric]["learned"] > summary[metric]["measurement"]
    low, high = summary["loss_interval"]
    assert low <= summary["loss"] <= high < math.inf
    assert summary["parameters"]["weight"] == pytest.approx(math.exp(summary["parameters"]["regularizer.log_weight"]))
    assert {"smoothing", "regularizer.log_smoothing"} <= set(summary["parameters"])
    assert summary["seconds"] > 0 and summary["cost"]["hvps"] > 0
    names = "config.yaml metrics.jsonl regularizer.safetensors checkpoints grid_search.json pictures/evaluation.png"
    assert all((run / name).exists() for name in names.split())
    assert read_config(run).data.patch_size == 24
    assert yaml.safe_load((run / "config.yaml").read_text())["problem"]["ridge"] == 0.0


def test_evaluate_again_gives_the_same_numbers(run, tmp_path, capsys):
    assert evaluate_main([str(run), f"--json={tmp_path / 'e.json'}", f"--picture={tmp_path / 'e.png'}"]) == 0
    table = capsys.readouterr().out
    assert "PSNR measurement" in table and "mean" in table and "certified" in table
    summary, again = (json.loads(p.read_text()) for p in (run / "summary.json", tmp_path / "e.json"))
    for metric in ("psnr", "ssim"):
        assert again[metric] == pytest.approx(summary[metric], abs=1e-6)
    assert (tmp_path / "e.png").read_bytes().startswith(b"\x89PNG")


def test_evaluate_own_images_of_several_sizes(run, tmp_path, capsys):
    generator = torch.Generator().manual_seed(0)
    (tmp_path / "images").mkdir()
    for name, shape in (("a.png", (40, 33)), ("b.png", (30, 44))):
        pixels = torch.rand(shape, generator=generator).mul(255).byte().numpy()
        Image.fromarray(pixels).save(tmp_path / "images" / name)
    arguments = [str(run), f"--data={tmp_path / 'images'}", f"--json={tmp_path / 'e.json'}"]
    assert evaluate_main(arguments) == 0
    assert list(json.loads((tmp_path / "e.json").read_text())["images"]) == ["a.png", "b.png"]


def test_learned_regularizer_reconstructs(run):
    prior = load_regularizer(run / "regularizer.safetensors")
    config = read_config(run)
    from bilevel_imaging.assembly import evaluation_pairs

    batch = evaluation_pairs(config, "test").batch([0])
    x, info = reconstruct(batch.y, batch.physics, prior, error_tol=1e-6)
    assert x.shape == batch.x.shape and bool(info.converged.all()) and float(info.distance_bound.max()) <= 1e-6


def test_default_folders_are_fresh(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = [*TINY, "--upper.max_steps=0", "--logging.evaluate=false"]
    assert train_main(options) == 0
    assert train_main([f"--config={ROOT / 'scripts/configs/tv_denoise.yaml'}", *options]) == 0
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["tv_denoise", "tv_denoise-2"]
    assert "--resume runs/tv_denoise-2 --upper.max_steps" in capsys.readouterr().out


def test_resume_to_more_steps_equals_one_run(run, tmp_path):
    first = tmp_path / "first"
    options = [*TINY, "--logging.evaluate=false"]
    assert train_main([f"--output={first}", "--upper.max_steps=2", *options]) == 0
    assert train_main([f"--resume={first}", "--upper.max_steps=4"]) == 0
    assert read_config(first).upper.max_steps == 4
    assert_same_parameters(first, run)


def assert_same_parameters(a: Path, b: Path) -> None:
    states = [load_regularizer(folder / "regularizer.safetensors").state_dict() for folder in (a, b)]
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert tensor.numpy().tobytes() == states[1][name].numpy().tobytes(), name


EVERYTHING = (
    "--data.random_patches=true --problem.sigma_range=[0.05,0.15] --upper.schedule=cosine --upper.warmup=5 "
    "--upper.clip=2 --upper.average=0.8"
).split()


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [pytest.param([], marks=pytest.mark.slow, id="fixed patches"), pytest.param(EVERYTHING, id="random patches")],
)
def test_resume_after_sigkill_is_bit_for_bit(more, tmp_path):
    minibatches = ["--upper.method=adam", "--upper.minibatch=1", "--upper.max_steps=40"]
    options = [*TINY, *minibatches, "--logging.evaluate=false", *more]
    killed = tmp_path / "killed"
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), f"--output={killed}", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        records = read_metrics(killed / "metrics.jsonl")
        if records and records[-1]["step"] > 6:
            break
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL, process.communicate()
    assert not (killed / "regularizer.safetensors").exists()
    assert train_main([f"--resume={killed}"]) == 0
    assert train_main([f"--output={tmp_path / 'whole'}", *options]) == 0
    assert_same_parameters(killed, tmp_path / "whole")
    steps = [r["step"] for r in read_metrics(killed / "metrics.jsonl") if r["kind"] == "step"]
    assert steps == list(range(1, 41))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            "--problem.kind=x",
            "expected one of denoising, deblurring, inpainting, super_resolution, tomography, mri. Got 'x'",
        ),
        ("--problem.sigma=-1", "problem.sigma: expected a finite number >= 0"),
        ("--problem.sigma=.nan", "problem.sigma: expected a finite number >= 0. Got nan"),
        ("--problem.sigma=25", "problem.sigma: expected at most 5, as images are in [0, 1]; divide levels of 8-bit"),
        ("--problem.sigma_range=[0,50]", "problem.sigma: expected at most 5"),
        ("--problem.sigma=high", "problem.sigma: expected a number. Got high."),
        ("--problem.ridge=high", "problem.ridge: expected a number or null. Got high."),
        ("--problem.sigma_range=1", "problem.sigma_range: expected two numbers in brackets or null. Got 1."),
        ("--upper.max_steps=null", "upper.max_steps: expected an integer. Got null."),
        ('--upper.method=adam --upper.options={"betas":[2,3]}', "upper.options: adam: Invalid beta parameter at"),
        ('--upper.method=inexact_sgd --upper.options={"momentum":-1}', "upper.options: inexact_sgd: Invalid momentum"),
        ("--problem.nois=1", "Allowed in problem: kind, sigma"),
        ("--problme.kind=x", "Allowed groups: data, problem"),
        ("--problem.kind=deblurring --problem.ridge=0", "problem.ridge: expected a finite number > 0"),
        ("--upper.method=foo", "upper.method: expected one of maid, maid_paper"),
        ("--upper.lr=0.1", "upper.lr: maid does not take it"),
        ("--upper.minibatch=2", "upper.minibatch"),
        ("--upper.method=adam --upper.schedule=step", "upper.schedule: expected one of constant, cosine. Got 'step'"),
        ("--upper.schedule=cosine", "upper.schedule: maid does not take it"),
        ("--upper.average=1.5", "upper.average: expected a number in [0, 1]. Got 1.5"),
        ("--upper.clip=0.5", "upper.clip: expected a finite number >= 1. Got 0.5"),
        ("--upper.warmup=-1", "upper.warmup: expected an integer >= 0"),
        ('--upper.method=adam --upper.lr_scale={"weight":-1}', "upper.lr_scale: weight: expected a finite number > 0"),
        ('--upper.method=adam --upper.lr_scale={"bias":1}', "no parameter has 'bias' in its name"),
        ("--data.random_patches=true", "data.random_patches: maid compares losses of all images"),
        ("--data.random_patches=true --upper.method=adam", "data.random_patches: expected upper.minibatch"),
        ("--data.warm_starts=tape", "data.warm_starts: expected one of memory, disk, none. Got 'tape'"),
        ("--data.warm_starts=disk", "data.warm_starts: expected memory unless fixed patches come in minibatches"),
        ("--problem.sigma_range=[0.2,0.1]", "problem.sigma_range: expected finite numbers 0 <= low <= high"),
        ("--logging.validate_images=-1", "logging.validate_images: expected an integer >= 0"),
        ("--problem.padding=valid", "problem.padding: denoising does not take it"),
        ("--problem.padding=mirror", "problem.padding: expected one of circular, valid, reflect, replicate, constant"),
        ("--problem.kind=super_resolution --problem.factor=1", "problem.factor: expected an integer >= 2"),
        ("--problem.kind=tomography --problem.views=0", "problem.views: expected an integer >= 1"),
        ("--problem.kind=mri --problem.acceleration=0.5", "problem.acceleration: expected a finite number >= 1"),
        ("--problem.kind=mri --problem.center_fraction=0", "problem.center_fraction: expected a number in (0, 1]"),
        ("--problem.kind=mri --problem.acceleration=20", "Expected an acceleration of at most"),
        ("--problem.kind=mri --data.color=true", "data.color: mri reconstructs complex images"),
        ("--problem.kind=tomography --problem.ridge=0", "problem.ridge: expected a finite number > 0 for tomography"),
        ("--problem.data_weight=phases", "problem.data_weight: expected one of noise, frequencies, mask"),
        ("--problem.data_weight=mask", "problem.data_weight: mask is for mri. Got denoising"),
        ("--problem.kind=inpainting --problem.data_weight=frequencies", "problem.data_weight: frequencies is for"),
        (
            "--problem.kind=deblurring --problem.padding=valid --problem.data_weight=frequencies",
            "Got deblurring with padding valid",
        ),
        ('--problem.data_weight_options={"value":2}', "problem.data_weight_options: expected problem.data_weight"),
        (
            '--problem.data_weight=noise --problem.data_weight_options={"start":2}',
            "problem.data_weight_options: noise does not take start. Allowed: value, learn.",
        ),
        (
            '--problem.kind=mri --problem.data_weight=mask --problem.data_weight_options={"foo":2}',
            "problem.data_weight_options: mask does not take foo. Allowed: shape, start, learn, per_column.",
        ),
        (
            '--problem.kind=mri --problem.data_weight=mask --problem.data_weight_options={"per_column":"maybe"}',
            "Expected problem.data_weight_options.per_column as True or False. Got 'maybe'",
        ),
        (
            '--regularizer.kind=sum --regularizer.options={"parts":[{"kind":"total_variation","isotropic":"no"}]}',
            "regularizer: sum: Expected isotropic as True or False. Got 'no'",
        ),
        ("--upper.sampling_penalty=1", "upper.sampling_penalty: expected problem.data_weight mask. Got null"),
        ("--upper.sampling_penalty=-1", "upper.sampling_penalty: expected a finite number >= 0"),
        ("--upper.method=adam --upper.sampling_binary=2", "upper.sampling_binary: expected upper.sampling_penalty > 0"),
        (
            '--upper.options={"foo":1,"memory":2}',
            "upper.options: maid does not take foo. Allowed: decrease, memory, model, largest_move.",
        ),
        ('--upper.method=hoag --upper.options={"foo":1}', "upper.options: hoag does not take foo. Allowed: schedule, "),
        (
            '--upper.method=adam --upper.options={"foo":1,"bar":2}',
            "upper.options: adam does not take foo, bar. Allowed: betas, eps, weight_decay, amsgrad, ",
        ),
        (
            '--upper.method=inexact_sgd --upper.options={"foo":1}',
            "upper.options: inexact_sgd does not take foo. Allowed: error_schedule, error_power, step_schedule, "
            "step_power, momentum, dampening, ",
        ),
        (
            '--regularizer.options={"foo":1}',
            "regularizer.options: total_variation does not take foo. Allowed: weight, smoothing, isotropic, ",
        ),
        (
            '--regularizer.kind=sum --regularizer.options={"parts":[{"kind":"tikhonov","foo":1}]}',
            "regularizer: sum: Expected arguments of tikhonov, some of weight, operator, learn_weight. Got foo.",
        ),
        ("--lower.tolerance=1", "unknown option --lower.tolerance=1. Allowed in lower: solver, max_iter."),
        ("--lower.solver=foo", "lower.solver: expected one of"),
        ("--regularizer.kind=tikhonov --regularizer.isotropic=false", "regularizer.isotropic: tikhonov"),
        ("--regularizer.learn_weight=false --regularizer.learn_smoothing=false", "nothing to learn"),
        ("--data.train=/no/such/folder", "/no/such/folder: no such folder"),
        (
            "--data.patch_size=1000",
            "data.patch_size: expected at most 512, as astronaut is too small for more, 512x512 pixels (height "
            "x width). Got 1000; ask for less or remove the image.",
        ),
        (
            "--data.patch_size=600 --data.random_patches=true --upper.method=adam --upper.minibatch=1",
            "data.patch_size: expected at most 512, as astronaut is too small",
        ),
        (
            "--data.patch_size=600 --problem.kind=mri",
            "data.patch_size: expected at most 512, as astronaut is too small",
        ),
        ("--json=/", "--json /: is a folder"),
        ("--config=/no/such.yaml", "/no/such.yaml"),
        ("--resume=/no/such/run", "/no/such/run: no such folder"),
    ],
)
def test_mistakes_are_one_line(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words in fails(capsys, *arguments.split())
    assert not list(tmp_path.glob("runs/*"))


def test_images_that_can_not_be_used_are_named(capsys, tmp_path):
    def folder(name, **images):
        made = tmp_path / name
        made.mkdir()
        for image, size in images.items():
            if size:
                Image.new("L", (size, size), 100).save(made / f"{image}.png")
            else:
                (made / f"{image}.png").write_bytes(b"no image")
        return made

    broken, one, good = folder("broken", a=0), folder("one", a=40), folder("good", a=40, b=40)
    several, small, tiny = folder("several", a=0, b=40, c=0), folder("small", a=40, b=20), folder("tiny", a=7)
    assert f"{broken / 'a.png'}: cannot be read" in fails(capsys, *TINY, f"--data.train={broken}")
    assert f"{one}: only one image, a.png; none is left" in fails(capsys, *TINY, f"--data.train={one}")
    message = fails(capsys, *TINY, f"--data.train={several}")
    assert f"{several / 'a.png'}: cannot be read" in message or f"{several / 'c.png'}: cannot be read" in message
    options = [*TINY, f"--data.train={small}", f"--data.val={good}"]
    assert "data.patch_size: expected at most 20, as b.png is too small for more, 20x20" in fails(capsys, *options)
    message = fails(capsys, *TINY, f"--data.train={good}", f"--data.val={tiny}")
    assert "a.png: the image is too small to be scored, 7x7 pixels; expected at least 8x8. Remove it." in message
    mask = ["--problem.kind=mri", "--problem.data_weight=mask", "--problem.acceleration=1"]
    message = fails(capsys, *TINY, *mask, f"--data.train={good}", f"--data.val={small}")
    assert "data.patch_size: expected at most 20, as b.png is too small for more" in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ": expected groups of settings, e.g. upper: {max_steps: 10}. Got an empty file."),
        ("# a comment\n", ": expected groups of settings, e.g. upper: {max_steps: 10}. Got an empty file."),
        ("- seed\n- 3\n", ": expected groups of settings, e.g. upper: {max_steps: 10}. Got a list."),
        ("hello\n", ": expected groups of settings, e.g. upper: {max_steps: 10}. Got a text."),
        (
            "upper:\n  # lr: 3\nseed: 1\n",
            ": upper: expected settings below it, e.g. method. Got nothing; leave it out.",
        ),
        ("upper: 3\n", ": upper: expected settings below it, e.g. method. Got 3."),
        ("upper:\n  lr: [\nseed: 1\n", ", line 4: not YAML: expected ',' or ']', but got '<stream end>' (while "),
        ("upper:\n\tlr: 3\n", ", line 2: not YAML: found character '\\t' that cannot start any token"),
        ("upper: lr: 3\n", ", line 1: not YAML: mapping values are not allowed here."),
        ("upper: \0\n", ": not YAML: unacceptable character #x0000"),
    ],
)
def test_settings_files_that_hold_no_settings(text, words, capsys, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    for command in (train_main, compare_main):
        assert f"error: {path}{words}" in fails(capsys, f"--config={path}", command=command)
    message = fails(capsys, f"--resume={tmp_path}")
    assert message.count(str(path)) == 1 and f"{path}{words}" in message


def test_mistakes_with_an_existing_run(run, capsys, tmp_path):
    assert "already holds a run" in fails(capsys, f"--output={run}")
    assert "seed: cannot change" in fails(capsys, f"--resume={run}", "--seed=3")
    assert "stays in its folder" in fails(capsys, f"--resume={run}", f"--output={tmp_path}")
    (tmp_path / "again.yaml").write_text("upper: {max_steps: 50}\n")
    before = read_config(run)
    message = fails(capsys, f"--resume={run}", f"--config={tmp_path / 'again.yaml'}")
    assert f"--config: a resumed run has its settings in {run / 'config.yaml'}." in message
    assert "Leave --config out" in message and read_config(run) == before
    assert "no config.yaml" in fails(capsys, str(tmp_path), command=evaluate_main)
    message = fails(capsys, str(run), f"--json={run}/config.yaml/a.json", command=evaluate_main)
    assert "a.json: cannot be written (File exists)." in message
    assert f"--picture {run}: is a folder" in fails(capsys, str(run), f"--picture={run}", command=evaluate_main)
    assert "no images found" in fails(capsys, str(run), f"--data={tmp_path}", command=evaluate_main)


@pytest.mark.slow
def test_random_patches_from_end_to_end(tmp_path, capsys):
    folder = tmp_path / "run"
    options = ["--upper.method=adam", "--upper.minibatch=3", "--upper.max_steps=4", "--logging.validate_images=1"]
    assert train_main([f"--output={folder}", *TINY, *options, *EVERYTHING]) == 0
    assert "last minibatch)" in capsys.readouterr().out
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["loss_images"] == "last minibatch" and summary["psnr"]["learned"] > summary["psnr"]["measurement"]
    state = load_latest(folder / "checkpoints")[0]
    assert state["objective"] == {"taken": 4}
    learned = load_regularizer(folder / "regularizer.safetensors").state_dict()
    average = state["method"]["state"]["average"]
    assert average["count"] == 3
    for name, tensor in learned.items():
        assert torch.equal(tensor, average["mean"][f"regularizer.{name}"])
        assert not torch.equal(tensor, state["theta"][f"regularizer.{name}"])
    assert evaluate_main([str(folder)]) == 0


def test_baseline_is_chosen_on_few_patches_from_everywhere_with_the_noise_of_tests(tmp_path):
    from bilevel_imaging import assembly

    data = DataConfig(patch_size=16, patches_per_image=50, random_patches=True)
    problem, upper = ProblemConfig(sigma=0.2, sigma_range=(0.0, 0.01)), UpperConfig("adam", minibatch=2)
    config = RunConfig(data=data, problem=problem, upper=upper)
    pairs = assembly.training_pairs(config, "baseline")
    assert 32 <= len(pairs) <= assembly.BASELINE_PATCHES and set(pairs.noise_levels) == {0.2}
    photographs_seen = {name.split("[")[0] for name in pairs.names}
    assert photographs_seen == {name for name, _ in assembly.load_images(config, "train")}
    options = [*TINY, "--upper.max_steps=0", "--logging.evaluate=false"]
    assert train_main([f"--output={tmp_path / 'run'}", *options]) == 0
    assert not (tmp_path / "run" / "grid_search.json").exists()


def test_validation_may_look_at_a_few_images(tmp_path):
    from bilevel_imaging import assembly
    from bilevel_imaging.config import LoggingConfig
    from bilevel_imaging.training_run import make_trainer

    data = DataConfig(patch_size=24, patches_per_image=1, max_images=3, eval_size=32)
    for count, expected in ((0, 2), (1, 1)):
        config = RunConfig(data=data, logging=LoggingConfig(validate_images=count)).resolved()
        objective = assembly.make_objective(config, assembly.make_energy(config), assembly.training_pairs(config))
        shown = make_trainer(config, tmp_path, objective).log_images()
        assert shown["gt"].shape == (expected, 1, 32, 32) and shown["gt"].dtype == torch.float32


@pytest.mark.slow
def test_warm_starts_on_the_disk(tmp_path):
    options = ["--upper.method=adam", "--upper.minibatch=1", "--logging.evaluate=false"]
    for kind, steps in (("memory", (4,)), ("disk", (2, 4))):
        folder = tmp_path / kind
        for count in steps:
            start = f"--output={folder}" if count == steps[0] else f"--resume={folder}"
            more = [*TINY, *options, f"--data.warm_starts={kind}"] if count == steps[0] else []
            assert train_main([start, *more, f"--upper.max_steps={count}"]) == 0
    assert_same_parameters(tmp_path / "memory", tmp_path / "disk")
    assert (tmp_path / "disk" / "warm_starts" / "x.bin").stat().st_size == 2 * 24 * 24 * 4


def test_damaged_runs(capsys, tmp_path):
    folder = tmp_path / "run"
    assert train_main([f"--output={folder}", "--upper.max_steps=1", "--logging.evaluate=false", *TINY]) == 0
    (folder / "regularizer.safetensors").write_bytes(b"damaged")
    assert "regularizer.safetensors" in fails(capsys, str(folder), command=evaluate_main)
    data = folder / "data.json"
    content = data.read_text()
    data.write_text(content.replace('"digest": "', '"digest": "0'))
    assert "training images have changed" in fails(capsys, f"--resume={folder}")
    data.write_text(content)
    newest = max((folder / "checkpoints").glob("*.pt"))
    newest.write_bytes(newest.read_bytes()[:2000])
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), f"--resume={folder}"]
    ended = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    words = "is damaged: it ends too early or is something else. Going back to step-00000000.pt.\n"
    assert ended.returncode == 0 and ended.stderr == f"warning: The checkpoint {newest} {words}"
    for path in (folder / "checkpoints").glob("*.pt"):
        path.write_bytes(b"damaged")
    message = fails(capsys, f"--resume={folder}")
    assert "No readable checkpoint" in message and f"{newest} is damaged" in message and "Start a new run" in message
    (folder / "config.yaml").write_text("seed: 0\nproblme: 1\n")
    assert "config.yaml: unknown option problme. Allowed groups: data, problem" in fails(capsys, f"--resume={folder}")
    (folder / "config.yaml").write_text("problem: [")
    assert "config.yaml" in fails(capsys, f"--resume={folder}")


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=[] if p.stem == "tv_denoise" else [pytest.mark.slow], id=p.stem) for p in CONFIGS],
)
def test_shipped_configurations_run(path, tmp_path):
    options = [*TINY, "--upper.max_steps=1", "--logging.evaluate=false"]
    assert train_main([f"--config={path}", f"--output={tmp_path / 'run'}", *options]) == 0


@pytest.mark.slow
def test_data_weights_from_end_to_end(tmp_path, capsys, short_grid):
    sampling, noise = tmp_path / "sampling", tmp_path / "noise"
    mask = ["--problem.kind=mri", "--problem.acceleration=1", "--problem.data_weight=mask"]
    adam = ["--upper.method=adam", "--upper.max_steps=3", "--upper.sampling_penalty=5", "--upper.lr=0.3"]
    adam += ["--upper.sampling_binary=4"]
    options = '--problem.data_weight_options={"per_column":true,"start":0.8}'
    assert train_main([f"--output={sampling}", *TINY, *mask, *adam, options, "--logging.tensorboard=true"]) == 0
    prior = load_regularizer(sampling / "regularizer.safetensors")
    weight = prior.data_weight
    assert isinstance(weight, SamplingMask) and weight.mask.shape == (1, 24) and not weight.learned
    assert set(prior.state_dict()) == {"log_weight", "log_smoothing"}
    summary = json.loads((sampling / "summary.json").read_text())
    assert summary["parameters"]["sampled"] == pytest.approx(float(weight.mask.mean())) and weight.mask.std() > 0
    price = 5 * float((weight.mask + 4 * weight.mask * (1 - weight.mask)).mean())
    assert price <= summary["loss"] < price + 1  # the whole price of S (1 - S) at the end
    assert evaluate_main([str(sampling), f"--json={tmp_path / 'e.json'}"]) == 0
    again = json.loads((tmp_path / "e.json").read_text())
    assert again["psnr"] == pytest.approx(summary["psnr"], abs=1e-6)
    batch = evaluation_pairs(read_config(sampling), "test").batch([0])
    assert batch.x.shape == (1, 2, 24, 24)
    x, info = reconstruct(batch.y, batch.physics, prior, error_tol=1e-8)
    energy = VariationalEnergy(prior, ridge=prior.ridge, data_weight=weight)
    assert energy.bind(batch.y, batch.physics).grad(x).norm() < 1e-6 and float(info.distance_bound[0]) <= 1e-8
    assert VariationalEnergy(prior, ridge=prior.ridge).bind(batch.y, batch.physics).grad(x).norm() > 1e-2
    assert "learned data weights are for 24x24" in fails(capsys, str(sampling), "--crop=32", command=evaluate_main)
    learn = ["--problem.data_weight=noise", "--problem.kind=tomography", "--problem.views=9", "--upper.max_steps=2"]
    copy = tmp_path / "new" / "copy.json"
    assert train_main([f"--output={noise}", *TINY, *learn, "--logging.evaluate=false", f"--json={copy}"]) == 0
    assert copy.read_text() == (noise / "summary.json").read_text()
    summary = json.loads(copy.read_text())
    value = summary["parameters"]["data_weight.log_weight"]
    assert summary["parameters"]["data_weight"] == pytest.approx(math.exp(value)) and value != 0
    step = read_metrics(noise / "metrics.jsonl")[-2]
    assert value == pytest.approx(step["params"]["data_weight.log_weight"])


def test_the_sampling_penalty_is_part_of_loss_and_hypergradient():
    from bilevel_imaging import assembly

    data = DataConfig(patch_size=16, max_images=3, batch_size=2)
    upper = UpperConfig(method="adam", sampling_penalty=7.0, sampling_binary=3.0)
    problem = ProblemConfig("mri", data_weight="mask", acceleration=1.0, ridge=1e-2, dtype="float64")
    config = RunConfig(data=data, problem=problem, upper=upper)
    energy = assembly.make_energy(config)
    with torch.no_grad():
        energy.data_weight.logits += torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    objective = assembly.make_objective(config, energy, assembly.training_pairs(config))
    objective.penalty.advance(2 / 3)  # half of the price of S (1 - S)
    plain = assembly.make_objective(replace(config, upper=UpperConfig()), energy, assembly.training_pairs(config))
    h, without = (o.hypergradient(error_tol=1e-7, residual_tol=1e-7) for o in (objective, plain))
    mask = torch.sigmoid(energy.data_weight.logits.detach())
    assert h.bound == without.bound < 1e-3 and h.relative_bound == pytest.approx(h.bound / h.norm)
    price = float((7 * mask + 0.5 * 21 * mask * (1 - mask)).mean())
    assert h.loss - without.loss == pytest.approx(price)
    assert h.loss_interval[0] - without.loss_interval[0] == pytest.approx(price)
    values = []
    direction = torch.randn(16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for step in (1e-3, -2e-3):
        with torch.no_grad():
            energy.data_weight.logits += step * direction
        values.append(objective.value(1e-9).value)
    slope = float((h.grad["data_weight.logits"] * direction).sum())
    assert slope == pytest.approx((values[0] - values[1]) / 2e-3, rel=1e-4)
    tight = objective.hypergradient(relative=1e-3)
    assert tight.certified and tight.bound <= 1e-3 * tight.norm


def test_relative_accuracy_is_that_of_loss_and_penalty_together():
    from bilevel_imaging import assembly

    problem = ProblemConfig("mri", data_weight="mask", data_weight_options={"shape": [1, 1]}, dtype="float64")
    fixed = RegularizerConfig(learn_weight=False, learn_smoothing=False)
    config = RunConfig(data=DataConfig(patch_size=16, max_images=1), problem=problem, regularizer=fixed)
    energy, pairs = assembly.make_energy(config), assembly.training_pairs(config)
    h = assembly.make_objective(config, energy, pairs).hypergradient(error_tol=1e-8, residual_tol=1e-8)
    slope, mask = float(h.grad["data_weight.logits"]), float(energy.data_weight.mask.detach())
    assert slope < 0
    # 99.9 % of what the loss gains from a larger mask: an accuracy relative to the loss alone would not do
    penalty = SamplingPenalty(energy, -0.999 * slope / (mask * (1 - mask)))
    result = BilevelObjective(energy, pairs, penalty=penalty).hypergradient(relative=0.5)
    assert result.norm == pytest.approx(0.001 * abs(slope), rel=0.5)
    assert result.certified and result.bound <= 0.5 * result.norm


@pytest.mark.slow
@pytest.mark.parametrize("padding", ["valid", "reflect"])
def test_paddings_run(padding, tmp_path, short_grid):
    options = ["--problem.kind=deblurring", f"--problem.padding={padding}", "--upper.max_steps=2"]
    assert (
        train_main([f"--output={tmp_path / 'run'}", *TINY, *options, "--problem.sigma=0.02", "--data.max_images=1"])
        == 0
    )
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["psnr"]["learned"] > summary["psnr"]["measurement"] > 15


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["super_resolution", "tomography", "mri"])
def test_random_patches_of_every_operator(kind, tmp_path, short_grid):
    options = ["--upper.method=adam", "--upper.minibatch=2", "--upper.max_steps=2", "--data.random_patches=true"]
    problem = [f"--problem.kind={kind}", "--problem.views=9", "--problem.sigma=0.01", "--regularizer.weight=0.003"]
    assert train_main([f"--output={tmp_path / 'run'}", *TINY, *options, *problem]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["psnr"]["learned"] > summary["psnr"]["measurement"] > 10
    assert (tmp_path / "run" / "pictures" / "evaluation.png").exists()


def test_measurements_are_shown_and_scored_as_images():
    x = photographs(part="test")["camera"][:, 200:232, 200:232]
    for kind, padding in (("super_resolution", "circular"), ("tomography", "circular"), ("deblurring", "valid")):
        degradation = Degradation(kind, 0.0, padding=padding, blur_size=5, views=20)
        pairs = ImagePairs.build({"a": x}, degradation)
        shown = viewable_pairs(pairs)[0]
        assert shown.shape == x.shape != pairs.y[0].shape
        assert image_metrics(shown[None], x[None])["psnr"][0] > 15, kind
    assert torch.equal(shown[:, 2:-2, 2:-2], pairs.y[0])
    full = ImagePairs.build({"a": x}, Degradation("mri", 0.0, acceleration=1.0))
    assert torch.allclose(viewable_pairs(full)[0], full.x[0], atol=1e-12)
    same = ImagePairs.build({"a": x}, Degradation())
    assert torch.equal(viewable_pairs(same)[0], same.y[0])


def test_complex_images_are_scored_by_their_magnitudes():
    x = torch.rand(2, 1, 24, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    angle = torch.linspace(0, 6, 24, dtype=torch.float64)
    turned = torch.cat([x * angle.cos(), x * angle.sin()], 1)
    noisy = x + 0.1
    assert image_metrics(torch.cat([noisy, 0 * x], 1), turned)["psnr"] == pytest.approx([20.0, 20.0])
    expected = image_metrics(noisy, x)
    for name, values in image_metrics(torch.cat([0 * x, noisy], 1), turned).items():
        assert values == pytest.approx(expected[name])


@pytest.mark.parametrize("weight", [NoiseWeight(2.5), FrequencyWeights((1, 9), 3.0), SamplingMask((8, 8), 0.3)])
def test_data_weights_are_exported_beside_the_regularizer(weight, tmp_path):
    with torch.no_grad():
        weight.parameter.add_(torch.rand_like(weight.parameter))
    path = save_regularizer(tmp_path / "r.safetensors", TotalVariation(), data_weight=weight)
    loaded = load_regularizer(path)
    assert type(loaded.data_weight) is type(weight) and torch.equal(loaded.data_weight.weights(), weight.weights())
    assert not list(loaded.children()) and loaded.state_dict().keys() == TotalVariation().state_dict().keys()
    assert load_regularizer(save_regularizer(path, TotalVariation())).data_weight is None


def test_data_weights_hold_at_every_noise_level():
    prior = NoiseConditional({"kind": "total_variation"}, nodes=(0.05, 0.2))
    energy = VariationalEnergy(prior, data_weight=NoiseWeight(4.0))
    batch = ImagePairs.build({"a": torch.rand(1, 8, 8)}, Degradation(sigma=0.1)).batch([0])
    expected = VariationalEnergy(prior.at_noise_level(0.1), data_weight=energy.data_weight)
    x = torch.rand(1, 1, 8, 8, dtype=torch.float64)
    value = expected.bind(batch.y, batch.physics).value(x)
    assert torch.allclose(bind_batch(energy, batch).value(x), value) and "data_weight.log_weight" in energy.theta


def test_tomography_evaluates_squares_of_images_of_any_shape(tmp_path):
    from bilevel_imaging import assembly

    config = RunConfig(problem=ProblemConfig("tomography", views=5))
    images = [("wide", torch.rand(1, 20, 31, dtype=torch.float64)), ("square", torch.rand(1, 26, 26).double())]
    whole = assembly.evaluation_pairs(config, "test", images, crop=0)
    assert [tuple(x.shape) for x in whole.x] == [(1, 20, 20), (1, 26, 26)]
    assert torch.equal(whole.x[0], images[0][1][:, :, 5:25])


def test_default_ridges_make_every_kind_strongly_convex():
    from bilevel_imaging import assembly

    for kind, ridge in DEFAULT_RIDGE.items():
        config = RunConfig(
            data=DataConfig(patch_size=16, max_images=1), problem=ProblemConfig(kind, views=5)
        ).resolved()
        assert config.problem.ridge == ridge
        pairs = assembly.training_pairs(config)
        constants = assembly.make_objective(config, assembly.make_energy(config), pairs).constants()
        assert float(constants.strong_convexity[0]) >= 1e-4 and float(constants.smoothness[0]) < float("inf")


def test_default_is_the_denoising_configuration(tmp_path):
    (tmp_path / "config.yaml").write_text((ROOT / "scripts/configs/tv_denoise.yaml").read_text())
    assert read_config(tmp_path).resolved().differences(RunConfig().resolved()) == []


def test_configuration_round_trip_and_differences():
    config = RunConfig(problem=ProblemConfig("inpainting"), upper=UpperConfig("adam", max_steps=7), seed=3).resolved()
    assert config.problem.ridge > 0 and config.upper.lr == 0.05 and config.resolved() == config
    assert RunConfig().resolved().differences(config) == [
        "seed",
        "problem.kind",
        "problem.ridge",
        "upper.method",
        "upper.max_steps",
        "upper.lr",
        "upper.tolerance",
    ]


def test_grid_search_finds_the_minimum_on_the_training_images():
    from bilevel_imaging import assembly

    config = RunConfig(data=DataConfig(patch_size=24, patches_per_image=1, max_images=3, eval_size=48))
    pairs = assembly.training_pairs(config)
    search = grid_search(TotalVariation(), pairs)
    assert search.loss == min(loss for *_, loss in search.tried)
    energy = assembly.make_energy(config, TotalVariation(search.weight, search.smoothing))
    h = assembly.make_objective(config, energy, pairs).hypergradient(error_tol=1e-4, residual_tol=1e-4)
    # the weight is stationary: its derivative moves the loss by less than 0.5 % over a tenth of an e-fold
    assert abs(float(h.grad["regularizer.log_weight"])) * 0.1 < 5e-3 * search.loss
    validator = Validator(energy, assembly.evaluation_pairs(config, "val"))
    values = validator.validate()
    assert values["psnr"] > values["psnr_noisy"] and validator.images()["gt"].shape == (2, 1, 48, 48)
    evaluation = evaluate({"learned": energy}, validator.pairs)
    # a validation is accurate to 1e-3 per pixel, with errors of 0.03 per pixel in the images
    assert evaluation.mean("psnr")["learned"] == pytest.approx(values["psnr"], abs=0.03)
