"""The denoising benchmark: its noise, scores, certificates, tuning, and the command."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from deepinv.physics import Denoising
from PIL import Image

from bilevel_imaging import (
    ConvexRidge,
    NoiseConditional,
    TotalVariation,
    load_regularizer,
    reconstruct,
    save_regularizer,
)
from bilevel_imaging.data import photographs
from bilevel_imaging.energies import NoiseWeight
from bilevel_imaging.experiments import denoising_scores, denoising_tuning
from bilevel_imaging.experiments.denoising_scores import BASELINE, NOISY, ImageSet, load_images, noisy, rescaled, run
from bilevel_imaging.regularizers import REGULARIZERS, Regularizer

ROOT = Path(__file__).resolve().parent.parent


class Rescalable(TotalVariation):
    """(weight / scale) times total variation of scale x, in closed form."""

    def rescaled(self, weight: float, scale: float) -> TotalVariation:
        own_weight, smoothing = (math.exp(float(p.detach())) for p in (self.log_weight, self.log_smoothing))
        return Rescalable(weight * own_weight, smoothing / scale)


class Plain(Regularizer):
    """Written as a user would, without constants."""

    def fn(self, x, *args, **kwargs):
        return 0.1 * x.diff(dim=-1).square().flatten(1).sum(1)


@pytest.fixture(scope="module")
def images() -> ImageSet:
    return load_images(None, crop=32, max_images=2)


@pytest.fixture(scope="module")
def tuning() -> ImageSet:
    return load_images(None, part="train", crop=32, max_images=3)


@pytest.fixture(scope="module")
def record(images, tuning):
    regularizer = Rescalable(0.07, 0.02)
    regularizer.noise_level = 25 / 255
    return run({"learned": regularizer}, images, sigmas=(15, 40), tuning=tuning, tune=("weight", "scale"), tv=True)


@pytest.fixture(scope="module")
def command():
    spec = importlib.util.spec_from_file_location("reproduce", ROOT / "scripts" / "reproduce.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def psnr(x, truth) -> float:
    return -10 * math.log10(float(np.mean((np.asarray(x) - np.asarray(truth)) ** 2)))


# --- images and noise


def test_noise_is_that_of_the_seed_the_name_and_the_size_alone():
    image = torch.full((1, 200, 100), 0.9, dtype=torch.float64)
    y = noisy(image, "a", 25.0, 0)
    assert torch.equal(y, noisy(image, "a", 25.0, 0)) and y.dtype == torch.float64
    for other in (noisy(image, "b", 25.0, 0), noisy(image, "a", 25.0, 1)):
        correlation = np.corrcoef((y - image).flatten(), (other - image).flatten())[0, 1]
        assert abs(correlation) < 0.05
    assert float((y - image).std()) == pytest.approx(25 / 255, rel=0.03)
    assert float(y.max()) > 1.1  # not clipped
    torch.testing.assert_close(noisy(image, "a", 50.0, 0) - image, 2 * (y - image))


@pytest.mark.slow
def test_an_image_has_the_same_scores_alone(record, images):
    regularizer = Rescalable(0.07, 0.02)
    name = list(images.images)[1]
    one = ImageSet("one", {name: images.images[name]})
    alone, both = (run({"r": regularizer}, chosen, sigmas=[15]) for chosen in (one, images))
    for method in (NOISY, "r"):
        for key in ("psnr", "ssim"):
            assert alone["levels"][0]["images"][name][method][key] == both["levels"][0]["images"][name][method][key]


def test_images_of_a_folder(tmp_path):
    folder = tmp_path / "deep" / "set"
    folder.mkdir(parents=True)
    for i, shape in enumerate([(40, 30), (20, 50), (30, 30)], start=1):
        Image.fromarray(np.full(shape, 10 * i, dtype=np.uint8)).save(folder / f"{i:02d}.png")
    whole = load_images(folder)
    assert whole.label == "set" and list(whole.images) == ["01.png", "02.png", "03.png"]
    assert [tuple(image.shape) for image in whole.images.values()] == [(1, 40, 30), (1, 20, 50), (1, 30, 30)]
    assert float(whole.images["02.png"].max()) == 20 / 255
    small = load_images(folder, crop=24, max_images=2)
    assert [tuple(image.shape) for image in small.images.values()] == [(1, 24, 24), (1, 20, 24)]
    for wrong in ({"crop": 8}, {"max_images": 0}):
        with pytest.raises(ValueError, match=f"Expected {next(iter(wrong))} >="):
            load_images(folder, **wrong)


# --- scores


def test_scores_and_certificates_are_right(record, images):
    level = record["levels"][0]
    values = level["tuned"]["learned"]
    regularizer = Rescalable(0.07 * values["weight"], 0.02 / values["scale"])
    for name, image in images.images.items():
        y = noisy(image, name, 15.0, 0)
        exact, info = reconstruct(y[None], Denoising(), regularizer, error_tol=1e-9)
        assert float(info.distance_bound) <= 1e-9
        x, _ = reconstruct(y[None], Denoising(), regularizer)
        row = level["images"][name]
        # deepinv's PSNR adds 1e-8 to the mean squared error
        assert row[NOISY]["psnr"] == pytest.approx(psnr(y, image), abs=1e-3)
        assert row["learned"]["psnr"] == pytest.approx(psnr(x[0].detach(), image), abs=1e-3)
        # the minimizer itself scores the same up to the accuracy of a pixel
        assert row["learned"]["psnr"] == pytest.approx(psnr(exact[0].detach(), image), abs=0.05)
        assert float((x - exact).detach().norm()) <= row["learned"]["distance"] <= 1e-4 * 32 * (1 + 1e-12)
        assert row["learned"]["seconds"] > 0 and NOISY not in level["tuned"]


def test_means(record):
    for level in record["levels"]:
        rows = list(level["images"].values())
        assert list(level["mean"]) == [NOISY, BASELINE, "learned"]
        for method, mean in level["mean"].items():
            for key, value in mean.items():
                values = [row[method][key] for row in rows]
                assert value == pytest.approx(max(values) if key == "distance" else sum(values) / len(values))


def test_a_regularizer_without_constants_is_not_certified(images):
    made = run({"mine": Plain()}, ImageSet("one", dict(list(images.images.items())[:1])), sigmas=[10])
    (row,) = made["levels"][0]["images"].values()
    assert row["mine"]["distance"] is None and row["mine"]["psnr"] > 20
    assert " none " in denoising_scores.table(made) and "within" not in denoising_scores.markdown(made)
    json.dumps(made, allow_nan=False)


def test_the_ridge_of_a_regularizer_is_used(images):
    regularizer = TotalVariation(0.05, 0.01)
    before = run({"r": regularizer}, images, sigmas=[25])["levels"][0]["mean"]["r"]["psnr"]
    regularizer.ridge = 0.5
    assert run({"r": regularizer}, images, sigmas=[25])["levels"][0]["mean"]["r"]["psnr"] < before - 3


def test_data_weights_of_a_regularizer_are_used(images):
    weighted = TotalVariation(0.1, 0.05)
    weighted.data_weight = NoiseWeight(5.0)
    scored = run({"weighted": weighted}, images, sigmas=(25,))["levels"][0]["images"]
    name, image = next(iter(images.images.items()))
    x, _ = reconstruct(noisy(image, name, 25.0, 0)[None], Denoising(), weighted)
    assert scored[name]["weighted"]["psnr"] == pytest.approx(psnr(x[0], image), abs=1e-3)
    plain, _ = reconstruct(noisy(image, name, 25.0, 0)[None], Denoising(), TotalVariation(0.1, 0.05))
    assert abs(psnr(plain[0], image) - psnr(x[0], image)) > 0.1
    with pytest.raises(ValueError, match="weighted was learned with weights of the data term"):
        run({"weighted": weighted}, images, tuning=images, tune=("weight", "scale"))


def test_a_regularizer_that_depends_on_the_noise_gets_its_level(images):
    conditional = NoiseConditional(TotalVariation(0.1, 0.05))
    scored = run({"conditional": conditional}, images, sigmas=(40,))["levels"][0]["images"]
    name, image = next(iter(images.images.items()))
    x, _ = reconstruct(noisy(image, name, 40.0, 0)[None], Denoising(), conditional, noise_level=40 / 255)
    assert scored[name]["conditional"]["psnr"] == pytest.approx(psnr(x[0], image), abs=1e-3)


# --- tuning


def test_the_search_finds_the_maximum_between_all_grid_points():
    calls = []

    def score(values):
        calls.append(tuple(values))
        a, b = math.log2(values[0] / 3.3), math.log2(values[1] / 0.02)
        return -(a**2) - 3 * (b - 0.5 * a) ** 2

    best, value, tries = denoising_tuning.coarse_to_fine(score, (1.0, 1.0))
    assert best[0] == pytest.approx(3.3, rel=0.2) and best[1] == pytest.approx(0.02, rel=0.2)
    assert value == max(map(score, calls[:])) and value > -0.05
    assert tries == len(set(calls)) <= 80


def test_the_search_stays_on_a_plateau_and_flees_what_is_not_finite():
    flat = denoising_tuning.coarse_to_fine(lambda values: 1.0, (2.0, 5.0))
    assert flat[0] == (2.0, 5.0) and flat[1] == 1.0
    best, _, _ = denoising_tuning.coarse_to_fine(lambda v: math.nan if v[0] > 3.9 else v[0], (1.0,))
    assert 3.5 < best[0] <= 3.9


def test_tuned_total_variation_is_as_good_as_a_fine_grid(record, tuning):
    level = record["levels"][1]
    found = level["tuned"][BASELINE]
    pairs = denoising_scores._pairs(tuning, 40.0, 0, "cpu")

    def mean_psnr(weight: float) -> float:
        regularizer = TotalVariation(weight, found["smoothing"])
        points = [reconstruct(y[None], Denoising(), regularizer)[0][0].detach() for y in pairs.y]
        return sum(psnr(p, x) for p, x in zip(points, pairs.x, strict=True)) / len(points)

    assert mean_psnr(found["weight"]) == pytest.approx(found["psnr"], abs=0.02)
    assert found["psnr"] >= max(mean_psnr(found["weight"] * 2 ** (k / 4)) for k in range(-4, 5)) - 0.02


def test_tuning_adapts_a_regularizer_to_another_noise_level(record, images):
    """Rescaling covers all of total variation: both reach the same; without tuning it is far behind."""
    plain = run({"learned": Rescalable(0.07, 0.02)}, images, sigmas=[40])["levels"][0]
    level = record["levels"][1]
    assert level["tuned"]["learned"]["psnr"] == pytest.approx(level["tuned"][BASELINE]["psnr"], abs=0.05)
    assert level["mean"]["learned"]["psnr"] > plain["mean"]["learned"]["psnr"] + 1
    assert level["tuned"]["learned"]["weight"] == pytest.approx(40 / 25, rel=0.5)


def test_rescaled_means_what_it_says():
    x = torch.rand(1, 1, 12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    made = [Rescalable(0.3, 0.05), *(k() for k in REGULARIZERS.values() if hasattr(k, "rescaled"))]
    for regularizer in made:
        expected = 1.7 / 0.6 * (regularizer.fn(0.6 * x) - regularizer.fn(0 * x))
        result = rescaled(regularizer, 1.7, 0.6)
        torch.testing.assert_close(result.fn(x) - result.fn(0 * x), expected, rtol=1e-8, atol=1e-10)


def test_misuse(images, tuning):
    with pytest.raises(ValueError, match=r"can be rescaled to tune it. Got TotalVariation, .*without tuning"):
        run({"r": TotalVariation()}, images, tuning=tuning, tune=("weight", "scale"))
    with pytest.raises(ValueError, match="other images for tuning"):
        run(None, images, tuning=images)
    with pytest.raises(ValueError, match="nothing to score"):
        run({}, images, tv=False)
    for sigmas in ([], [0.0], [math.nan], [25, 25]):
        with pytest.raises(ValueError, match="different noise levels > 0"):
            run(None, images, tuning=tuning, sigmas=sigmas)
    with pytest.raises(ValueError, match="rename it"):
        run({NOISY: TotalVariation()}, images)


# --- record, table, figure


def test_record_is_plain_json_and_names_no_place(record):
    text = json.dumps(record, allow_nan=False)
    assert json.loads(text) == record and record["complete"]
    assert str(Path.home()) not in text and str(ROOT) not in text
    assert record["settings"]["tuning_images"] == "bundled photographs (train)"
    assert record["methods"]["learned"]["learned_for_sigma"] == pytest.approx(25)
    assert {"bilevel_imaging", "torch", "deepinv", "python"} <= record["environment"].keys()


def test_table(record, images):
    lines = denoising_scores.table(record).splitlines()
    for name in images.images:
        assert sum(line.startswith(name) for line in lines) == 2
    (first, _) = (line for line in lines if line.startswith("mean"))
    assert f"{record['levels'][0]['mean']['learned']['psnr']:.2f}" in first
    assert len({len(line) for line in lines if " | " in line}) == 1  # columns line up
    assert any(line.startswith("learned: weight ") and "scale" in line for line in lines)
    assert "as it is" not in "".join(lines)


def test_table_tells_of_a_noise_level_that_was_not_learned(images):
    regularizer = TotalVariation(0.07, 0.01)
    regularizer.noise_level = 25 / 255
    made = run({"r": regularizer}, images, sigmas=[15, 25])
    assert denoising_scores.table(made).count("r: learned for sigma 25 and used as it is") == 1


def test_markdown(record):
    rows = denoising_scores.markdown(record).splitlines()
    assert rows[0].endswith("| sigma = 15 | sigma = 40 |") and rows[1] == "| --- | --- | --- |"
    assert [row.split(" |")[0] for row in rows[2:5]] == [f"| {m}" for m in (NOISY, BASELINE, "learned")]
    mean = record["levels"][0]["mean"]
    best = max(mean, key=lambda method: mean[method]["psnr"])
    assert f"**{mean[best]['psnr']:.2f}** / {mean[best]['ssim']:.4f}" in "\n".join(rows)
    assert sum(row.count("**") for row in rows) == 4
    with pytest.raises(ValueError, match="record of a denoising benchmark"):
        denoising_scores.markdown({"levels": []})


def test_figure(record, images):
    axes = denoising_scores.figure(record).axes
    assert [axis.get_title() for axis in axes] == ["sigma = 15", "sigma = 40"]
    dots = [line for line in axes[0].get_lines() if line.get_linestyle() == "None"]
    values = [row["learned"]["psnr"] for row in record["levels"][0]["images"].values()]
    assert [line.get_label() for line in dots] == [BASELINE, "learned"]
    np.testing.assert_allclose(dots[1].get_xdata(), values)


# --- the command


@pytest.fixture
def files(tmp_path):
    for name, image in photographs(part="test").items():
        pixels = (255 * image[0, 100:140, 100:140]).round().byte().numpy()
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{name}.png")
    for name in ("one", "two"):
        save_regularizer(tmp_path / name / "regularizer.safetensors", TotalVariation(0.07, 0.01), noise_level=0.1)
    return tmp_path


def test_command(command, files, capsys):
    regularizers = [str(files / name / "regularizer.safetensors") for name in ("one", "two")]
    arguments = ["denoising", "--regularizer", *regularizers, "--images", str(files / "images"), "--noise", "0.1"]
    assert command.main([*arguments, "--max-images", "2", "--output", str(files / "out")]) == 0
    printed = capsys.readouterr().out
    record = json.loads((files / "out" / "record.json").read_text())
    assert printed.startswith("images, 2 images: noise of standard deviation 25.5/255") and "figure.png" in printed
    assert list(record["levels"][0]["mean"]) == [NOISY, "one", "two"] and str(files) not in json.dumps(record)
    again = ["denoising", "--markdown", str(files / "out" / "record.json"), "--output", str(files / "again")]
    assert command.main(again) == 0
    assert capsys.readouterr().out == denoising_scores.markdown(record) + "\n"
    assert (files / "again" / "figure.png").read_bytes() == (files / "out" / "figure.png").read_bytes()


@pytest.mark.parametrize("tune", [["--tune"], ["--tune", "weight"]])
def test_adapted_regularizers_are_saved(command, tune, tmp_path, capsys):
    source = ConvexRidge([2], 3, weight=2.0)
    save_regularizer(tmp_path / "small.safetensors", source, ridge=0.01, noise_level=0.05)
    options = ["--crop", "24", "--max-images", "1", "--noise", "0.1", "--output", str(tmp_path / "out"), *tune]
    assert command.main(["denoising", "--regularizer", str(tmp_path / "small.safetensors"), *options]) == 0
    values = json.loads((tmp_path / "out" / "record.json").read_text())["levels"][0]["tuned"]["small"]
    assert len(tune) == 1 or values["scale"] == pytest.approx(0.05 / 0.1)  # the level learned for over this one
    adapted = load_regularizer(tmp_path / "out" / "small_sigma_25.5.safetensors")
    assert (adapted.ridge, adapted.noise_level) == (0.01, pytest.approx(0.1))
    assert adapted.metadata["adapted"] == values
    x = torch.rand(1, 1, 8, 8, dtype=torch.float64)
    expected = source.rescaled(values["weight"], values["scale"])
    with torch.no_grad():
        torch.testing.assert_close(adapted.grad(x), expected.grad(x), rtol=1e-12, atol=1e-15)


def test_command_without_files_tunes_total_variation(command, tmp_path, capsys):
    options = ["--crop", "24", "--max-images", "1", "--output", str(tmp_path)]
    assert command.main(["denoising", *options]) == 0
    printed = capsys.readouterr().out
    assert "bundled photographs (test), 1 image:" in printed and f"{BASELINE}: weight" in printed


def test_names_of_files(command):
    paths = [Path("runs/a/regularizer.safetensors"), Path("x/foe.safetensors"), Path("y/foe.safetensors")]
    assert command.distinct_names(paths) == ["a", "foe (1)", "foe (2)"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--regularizer /no/such.safetensors", "/no/such.safetensors: no such file"),
        ("--images /no/such/folder", "/no/such/folder: no such folder"),
        ("--crop 3", "crop >= 16"),
        ("--sigma 0 --crop 16", "noise levels > 0"),
        ("--markdown /no/record.json", "/no/record.json"),
    ],
)
def test_mistakes_are_one_line(command, arguments, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(["denoising", *arguments.split()])
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and out == ""
    assert words in err and err.startswith("error: ") and err.count("\n") == 1


def test_an_interrupt_keeps_what_is_finished(command, tmp_path, monkeypatch, capsys):
    calls, minimize = [], denoising_scores.minimize

    def interrupted(problem):
        calls.append(problem)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return minimize(problem)

    monkeypatch.setattr(denoising_scores, "minimize", interrupted)
    save_regularizer(tmp_path / "tv.safetensors", TotalVariation(0.07, 0.01))
    options = ["--regularizer", str(tmp_path / "tv.safetensors"), "--crop", "24", "--output", str(tmp_path)]
    assert command.main(["denoising", *options]) == 130
    record = json.loads((tmp_path / "record.json").read_text())
    assert not record["complete"] and len(record["levels"][0]["images"]) == 2
    printed = capsys.readouterr().out
    assert "2 of 3 images" in printed and "Interrupted: only what was finished is shown." in printed
    calls[:] = [None, None]
    assert command.main(["denoising", *options]) == 130
    assert "interrupted before the first image was finished" in capsys.readouterr().out
    assert "of an interrupted run" in denoising_scores.markdown(json.loads((tmp_path / "record.json").read_text()))
