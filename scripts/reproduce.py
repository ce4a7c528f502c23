"""Experiments of the literature and of this package: figures, a record of all numbers, and a table.

python scripts/reproduce.py quadratic [--output DIR] [--json PATH]
python scripts/reproduce.py denoising --regularizer FILE... --images DIR --sigma 15 25 50
python scripts/reproduce.py training_curves runs/A runs/B [--json PATH]
python scripts/reproduce.py ct --regularizer FILE... --images DIR --train 200
python scripts/reproduce.py mri --regularizer FILE... --images DIR --train 200
python scripts/reproduce.py mri_sampling [--penalties BETA...] [--json PATH]
python scripts/reproduce.py hypercleaning [--mnist DIR] [--settings SETTING...] [--json PATH]
python scripts/reproduce.py maid [--budget N] [--problems tv foe] [--parts methods starts] [--json PATH]
"""

import argparse
import importlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

# An experiment is a module with run() -> record (JSON-able), table(record) -> str, and either
# figures(record) -> {name: Figure} or figure(record) -> Figure.
EXPERIMENTS = {
    "quadratic": "bilevel_imaging.experiments.quadratic",
    "equivalence": "bilevel_imaging.experiments.equivalence",
    "silent_gradients": "bilevel_imaging.experiments.silent_gradients",
    "float32_floor": "bilevel_imaging.experiments.float32_floor",
    "denoising": "bilevel_imaging.experiments.denoising_scores",
    "training_curves": "bilevel_imaging.experiments.training_curves",
    "ct": "bilevel_imaging.experiments.medical",
    "mri": "bilevel_imaging.experiments.medical",
    "mri_sampling": "bilevel_imaging.experiments.mri_sampling",
    "hypercleaning": "bilevel_imaging.experiments.hypercleaning",
    "maid": "bilevel_imaging.experiments.maid",
}
MEDICAL = ("ct", "mri")
WITH_FILES = ("denoising", "training_curves", "mri_sampling", "hypercleaning", "maid", *MEDICAL)


def parser() -> argparse.ArgumentParser:
    """The command line; experiments import nothing before it is understood."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--output", type=Path, help="folder for figures and record.json (runs/reproduce/EXPERIMENT)")
    common.add_argument("--json", type=Path, help="also write the record here")
    whole = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = whole.add_subparsers(dest="experiment", required=True, help="what to reproduce")
    for name in EXPERIMENTS:
        command = commands.add_parser(name, parents=[common])
        if name == "denoising":
            add_denoising_options(command)
        if name == "training_curves":
            command.add_argument("folders", type=Path, nargs="+", metavar="RUN", help="run folders of train.py")
        if name in MEDICAL:
            add_medical_options(command, name)
        if name == "mri_sampling":
            add_sampling_options(command)
        if name == "hypercleaning":
            add_hypercleaning_options(command)
        if name == "maid":
            add_maid_options(command)
    return whole


def add_denoising_options(command: argparse.ArgumentParser) -> None:
    """What to score, on which images, and how to tune."""
    command.description = "PSNR and SSIM of regularizers on whole gray images with Gaussian noise."
    add = command.add_argument
    add("--regularizer", type=Path, nargs="+", default=[], metavar="FILE", help="regularizer.safetensors of a run")
    add("--images", type=Path, metavar="DIR", help="images to score on (default: bundled test photographs)")
    levels = command.add_mutually_exclusive_group()
    levels.add_argument("--sigma", type=float, nargs="+", help="noise levels in units of 1/255 (default: 25)")
    levels.add_argument("--noise", type=float, nargs="+", help="noise levels for images in [0, 1], instead of --sigma")
    add("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    add("--max-images", type=int, metavar="N", help="the first N images only, of every folder")
    add("--crop", type=int, metavar="SIZE", help="cut images to this height and width at most (default: whole images)")
    tune = "adapt both or one of them to every noise level, and save what comes out"
    add("--tune", nargs="*", choices=["weight", "scale"], help=tune)
    add("--tv", action="store_true", help="add total variation with tuned weight and smoothing")
    add("--tuning-images", type=Path, metavar="DIR", help="images to tune on (default: bundled training photographs)")
    add("--device", default="cpu", help="where to compute (default: %(default)s)")
    add("--markdown", type=Path, metavar="RECORD", help="compute nothing: print a saved record as Markdown")


def add_medical_options(command: argparse.ArgumentParser, name: str) -> None:
    """What to measure, on which slices, and what to learn."""
    what = "sparse-view tomography" if name == "ct" else "undersampled single-coil MRI"
    command.description = f"Regularizers for {what}, learned on some slices of a volume and scored on others."
    add = command.add_argument
    add("--regularizer", type=Path, nargs="+", default=[], metavar="FILE", help="regularizer.safetensors of a run")
    add("--images", type=Path, metavar="DIR", help="slices of one volume, sorted by name (default: phantom)")
    add("--size", type=int, default=128, help="longer side of the slices, reduced to that (default: %(default)s)")
    if name == "ct":
        add("--views", type=int, default=60, help="equispaced directions in 180 degrees (default: %(default)s)")
    else:
        add("--acceleration", type=float, default=4.0, help="columns of k-space over measured ones (default: 4)")
    largest = "largest sinogram value" if name == "ct" else "largest magnitude"
    add("--noise", type=float, default=0.01, help=f"standard deviation over the {largest} (default: %(default)s)")
    add("--ridge", type=float, default=1e-4, help="ridge over ||A||^2 (default: %(default)s)")
    add("--slices", type=int, nargs=3, default=(4, 2, 6), metavar="N", help="train, validation, test (default: 4 2 6)")
    add("--train", type=int, default=0, metavar="STEPS", help="train all parameters, too, with so many steps")
    add("--seed", type=int, default=0, help="of noise and mask (default: %(default)s)")
    add("--device", default="cpu", help="where to compute (default: %(default)s)")
    add("--figure", type=Path, metavar="PATH", help="also write the picture of reconstructions here")
    add("--markdown", type=Path, metavar="RECORD", help="compute nothing: print a saved record as Markdown")


def add_sampling_options(command: argparse.ArgumentParser) -> None:
    """What measuring costs, and how long to learn."""
    command.description = "Learned columns of k-space at several prices of measuring, beside fixed patterns."
    add = command.add_argument
    add("--penalties", type=float, nargs="+", metavar="BETA", help="prices of all of k-space (default: 3 6 12)")
    add("--steps", type=int, help="of Adam for every mask (default: 60)")
    add("--seed", type=int, help="of patches, noise and the random pattern (default: 0)")
    add("--figure", type=Path, metavar="PATH", help="also write the picture here")


def add_hypercleaning_options(command: argparse.ArgumentParser) -> None:
    """Where the digits are, and which settings to run for how long."""
    command.description = "Weights for the digits of MNIST, some of them wrongly labeled, learned on clean digits."
    add = command.add_argument
    add("--mnist", type=Path, metavar="DIR", help="holds MNIST/raw/train-images-idx3-ubyte etc. (default: download)")
    add(
        "--settings",
        nargs="+",
        metavar="SETTING",
        help='"maid", lower/adjoint/error/residual of gd, hb, fista / gd, hb, cg / 0.1, 0.01 / 0.1, 0.01, e.g. '
        'hb/cg/0.1/0.01, or "all", for many hours (default: maid and the best published)',
    )
    add("--budget", type=int, help="iterations of both solvers together, per setting (default: 100000)")
    add("--minutes", type=float, help="limit of time per setting (default: none)")
    add("--again", action="store_true", help="also run the settings that the record of --json has already finished")
    add("--keep", type=Path, nargs="+", metavar="RECORD", help="more records of runs before, whose settings are kept")


def add_maid_options(command: argparse.ArgumentParser) -> None:
    """What to compare, and for how long."""
    command.description = "Methods of the MAID paper on TV denoising and Fields of Experts: loss against total work."
    add = command.add_argument
    add("--budget", type=int, help="gradients, Hessian and mixed products per method (default: 6000)")
    add("--problems", nargs="*", metavar="PROBLEM", help="tv, foe (default: both), or none to join records only")
    add("--parts", nargs="+", metavar="PART", help="methods, starts (default: both)")
    add(
        "--keep",
        type=Path,
        nargs="+",
        metavar="RECORD",
        help="records of runs before: keep what is not done now, go on with what was interrupted",
    )
    add("--figure", type=Path, metavar="PATH", help="also write the picture here")


def maid_options(parsed: argparse.Namespace) -> dict[str, Any]:
    """Arguments of run(); the record is saved after every method."""
    chosen = given(parsed, "budget", "problems", "parts")
    chosen["earlier"] = [json.loads(path.read_text()) for path in parsed.keep or []]

    def save(record: dict[str, Any]) -> None:
        if parsed.json is not None:
            save_record(record, parsed.json)

    return {"save": save, "progress": True, **chosen}


def given(parsed: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Those of the options that were given."""
    return {name: getattr(parsed, name) for name in names if getattr(parsed, name) is not None}


def sampling_options(parsed: argparse.Namespace) -> dict[str, Any]:
    """Arguments of run(); the record is saved after every mask."""
    return {"save": partial(save_all, parsed), "progress": True, **given(parsed, "penalties", "steps", "seed")}


def hypercleaning_options(parsed: argparse.Namespace, experiment: Any) -> dict[str, Any]:
    """Arguments of run(); the digits are read here, the record is saved after every setting and completed later."""
    chosen = given(parsed, "settings", "budget", "minutes")

    def save(record: dict[str, Any]) -> None:
        if parsed.json is not None:
            save_record(record, parsed.json)

    known = [parsed.json] if parsed.json is not None and parsed.json.exists() and not parsed.again else []
    earlier = [json.loads(path.read_text()) for path in [*known, *(parsed.keep or [])]]
    return {"data": experiment.load(parsed.mnist), "earlier": earlier, "save": save, "progress": True, **chosen}


def medical_options(parsed: argparse.Namespace, experiment: Any) -> dict[str, Any]:
    """Arguments of run(): files and folders are read here; what is finished is saved after every method."""
    kind = parsed.experiment
    own = {"views": parsed.views} if kind == "ct" else {"acceleration": parsed.acceleration}
    return {
        "problem": experiment.Problem(kind, noise=parsed.noise, ridge=parsed.ridge, seed=parsed.seed, **own),
        "stack": experiment.load_stack(parsed.images, parsed.size, square=kind == "ct"),
        "regularizers": load_files(parsed),
        "slices": tuple(parsed.slices),
        "train": parsed.train,
        "save": partial(save_all, parsed),
        "progress": True,
        "device": parsed.device,
    }


def load_files(parsed: argparse.Namespace) -> dict[str, Any]:
    """The regularizers by their short names."""
    from bilevel_imaging import load_regularizer

    names = distinct_names(parsed.regularizer)
    return {name: load_regularizer(path, parsed.device) for name, path in zip(names, parsed.regularizer, strict=True)}


def denoising_options(parsed: argparse.Namespace, experiment: Any) -> dict[str, Any]:
    """Arguments of run(): files and folders are read here."""
    sizes = {"crop": parsed.crop, "max_images": parsed.max_images}
    images = experiment.load_images(parsed.images, **sizes)
    tuning = experiment.load_images(parsed.tuning_images, part="train", **sizes)
    return {
        "regularizers": load_files(parsed),
        "images": images,
        "sigmas": [255 * noise for noise in parsed.noise] if parsed.noise else parsed.sigma or [25.0],
        "seed": parsed.seed,
        "tuning": tuning,
        "tune": () if parsed.tune is None else parsed.tune or ("weight", "scale"),
        "tv": parsed.tv or None,
        "progress": True,
        "device": parsed.device,
    }


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """Short names: of the run folder for a regularizer.safetensors, else of the file; numbered where they are equal."""
    names = [p.resolve().parent.name if p.name == "regularizer.safetensors" else p.stem for p in paths]
    count, seen = Counter(names), Counter[str]()
    for i, name in enumerate(names):
        seen[name] += 1
        names[i] = f"{name} ({seen[name]})" if count[name] > 1 else name
    return names


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one experiment, print its table and the names of the files written; returns the exit code."""
    command = parser()
    parsed = command.parse_args(arguments)
    from bilevel_imaging.cli import one_line  # what it needs takes seconds to import, which --help does without

    try:
        check(parsed)
    except (ValueError, OSError) as error:
        command.exit(2, f"error: {one_line(error)}\n")
    experiment = importlib.import_module(EXPERIMENTS[parsed.experiment])
    try:
        if getattr(parsed, "markdown", None):
            return rewrite(experiment, parsed.markdown, parsed.output)
        record = experiment.run(**options(parsed, experiment))
    except (ValueError, OSError) as error:
        if parsed.experiment not in WITH_FILES or os.environ.get("BILEVEL_DEBUG"):
            raise  # without files it is no mistake of the user: there is nothing to get wrong
        command.exit(2, f"error: {one_line(error)}\n")
    print(experiment.table(record))
    write(experiment, record, parsed)
    return 0 if record.get("complete", True) else 130


def check(parsed: argparse.Namespace) -> None:
    """Notice now what would otherwise be noticed after hours: where to compute, and where to write."""
    from bilevel_imaging.cli import check_device, check_writable

    if hasattr(parsed, "device"):
        check_device("--device", parsed.device)
    if getattr(parsed, "markdown", None) is None:
        check_writable("--output", output_folder(parsed) / "record.json")
    for option in ("json", "figure"):
        check_writable(f"--{option}", getattr(parsed, option, None))


def output_folder(parsed: argparse.Namespace) -> Path:
    """Where figures and record go."""
    return parsed.output or Path("runs", "reproduce", parsed.experiment)


def options(parsed: argparse.Namespace, experiment: Any) -> dict[str, Any]:
    """Arguments of run() from the command line."""
    if parsed.experiment == "denoising":
        return denoising_options(parsed, experiment)
    if parsed.experiment == "training_curves":
        return {"folders": parsed.folders}
    if parsed.experiment == "mri_sampling":
        return sampling_options(parsed)
    if parsed.experiment == "hypercleaning":
        return hypercleaning_options(parsed, experiment)
    if parsed.experiment == "maid":
        return maid_options(parsed)
    return medical_options(parsed, experiment) if parsed.experiment in MEDICAL else {}


def rewrite(experiment: Any, path: Path, folder: Path | None) -> int:
    """The Markdown table of a saved record and, with a folder, its figure."""
    record = json.loads(path.read_text())
    print(experiment.markdown(record))
    if folder is not None:
        from bilevel_imaging.training.figures import save_figure

        save_figure(experiment.figure(record), folder / "figure.png")
    return 0


def write(experiment: Any, record: dict[str, Any], parsed: argparse.Namespace) -> None:
    """Figures, record, and what was learned; ``--figure`` is a further place for the last figure."""
    from bilevel_imaging.training.figures import save_figure

    folder, picture = output_folder(parsed), getattr(parsed, "figure", None)
    several = hasattr(experiment, "figures")
    figures = experiment.figures(record) if several else {"figure": experiment.figure(record)}
    written = [save_figure(figure, folder / f"{name}.png") for name, figure in figures.items()]
    if picture is not None:
        picture.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(written[-1], picture)
        written.append(picture)
    written += save_all(parsed, record)
    print("\nwritten:", *written, sep="\n  ")


def save_all(parsed: argparse.Namespace, record: dict[str, Any]) -> list[Path]:
    """The record in the folder of the experiment and where ``--json`` says, and what was learned."""
    folder = output_folder(parsed)
    written = [save_record(record, path) for path in filter(None, [folder / "record.json", parsed.json])]
    return written + save_learned(record, folder)


def save_record(record: dict[str, Any], path: Path) -> Path:
    """A record as JSON, in one piece: what was there stays until the new one is complete."""
    from bilevel_imaging.training.checkpoints import write_json

    write_json(path, record)
    return path


def save_learned(record: Any, folder: Path) -> list[Path]:
    """Regularizers that an experiment has learned, each as a file; records without ``learned`` hold none."""
    from bilevel_imaging import save_regularizer

    written = []
    for name, regularizer in getattr(record, "learned", {}).items():
        path = folder / (re.sub(r"[^\w.-]+", "_", name) + ".safetensors")
        written.append(save_regularizer(path, regularizer, **record.saved_with(name)))
    return written


if __name__ == "__main__":
    raise SystemExit(main())
