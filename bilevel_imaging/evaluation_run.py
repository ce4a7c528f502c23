"""What a learned regularizer is worth: scores beside the measurements and a grid search, after a run or later."""

from __future__ import annotations

import json
import math
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bilevel_imaging import assembly
from bilevel_imaging.config import RunConfig
from bilevel_imaging.energies import SamplingMask, VariationalEnergy
from bilevel_imaging.errors import CheckpointError
from bilevel_imaging.export import load_regularizer, versions
from bilevel_imaging.regularizers import Regularizer
from bilevel_imaging.training.checkpoints import write_json
from bilevel_imaging.training.comparison import comparison_figure
from bilevel_imaging.training.evaluation import Evaluation, GridSearch, baseline, evaluate, grid_search
from bilevel_imaging.training.figures import save_figure
from bilevel_imaging.training.progress import format_interval
from bilevel_imaging.training.sampling import compare_patterns, describe_patterns

REGULARIZER_FILE = "regularizer.safetensors"
GRID_FILE = "grid_search.json"


def score(config: RunConfig, folder: Path, energy: VariationalEnergy) -> dict[str, Any]:
    """Scores on the test images; with ``logging.evaluate`` beside those of the baseline, and a picture of them."""
    test = assembly.evaluation_pairs(config, "test")
    if not config.logging.evaluate:
        return evaluate({"learned": energy}, test).to_dict() | {"grid_search": None}
    search = _search(folder, config, energy.regularizer)
    evaluation = evaluate(_energies(config, energy, search), test)
    _save_picture(evaluation, folder / "pictures" / "evaluation.png")
    result = evaluation.to_dict() | {"grid_search": _search_summary(search)}
    weight = energy.data_weight
    if isinstance(weight, SamplingMask) and config.problem.acceleration == 1 and weight.mask.shape[0] == 1:
        tuning = assembly.training_pairs(config, "baseline")
        options = {"ridge": energy.ridge, "seed": config.seed, "progress": config.logging.progress}
        result["patterns"] = compare_patterns(weight, energy.regularizer, tuning, test, **options)
    return result


def named_parameters(energy: VariationalEnergy) -> dict[str, Any]:
    """Parameters with a single entry: positive ones (stored as logarithms) by value, all by their name in theta.

    The weight of the data term is ``data_weight``; of a sampling mask there is the mean, ``sampled``.
    """
    result: dict[str, Any] = {}
    for full, tensor in energy.named_parameters():
        owner, _, name = full.partition(".")
        if tensor.numel() == 1:
            value = float(tensor.detach())
            if name.startswith("log_"):
                result[name.removeprefix("log_") if owner == "regularizer" else owner] = math.exp(value)
            result[full] = value
    if isinstance(energy.data_weight, SamplingMask):
        result["sampled"] = float(energy.data_weight.mask.detach().mean())
    return result


def _search(folder: Path, config: RunConfig, regularizer: Regularizer) -> GridSearch:
    """The grid search of a run; done once and kept in its folder."""
    path = folder / GRID_FILE
    if path.exists():
        try:
            content = json.loads(path.read_text())
            tried = [tuple(entry) for entry in content.pop("tried")]
            return GridSearch(tried=tried, **content)
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged ({error}). Remove it: it will be computed again.") from error
    if config.logging.progress:
        print("Grid search for one weight on the training images, to compare with ...", file=sys.stderr, flush=True)
    pairs = assembly.training_pairs(config, "baseline")
    search = grid_search(regularizer, pairs, ridge=config.resolved().problem.ridge or 0.0)
    write_json(path, asdict(search))
    return search


def _search_summary(search: GridSearch) -> dict[str, Any]:
    return {"weight": search.weight, "smoothing": search.smoothing, "loss": search.loss}


def _energies(config: RunConfig, energy: VariationalEnergy, search: GridSearch) -> dict[str, VariationalEnergy]:
    return {
        "grid_search": assembly.make_energy(config, baseline(energy.regularizer, search.weight, search.smoothing)),
        "learned": energy,
    }


def _save_picture(evaluation: Evaluation, path: Path) -> None:
    save_figure(comparison_figure(evaluation.pictures, evaluation.names), path)


def _weights(search: dict[str, Any], digits: int = 3) -> str:
    """What the grid search has found, in words."""
    fixed = "" if search["smoothing"] is None else f", smoothing {search['smoothing']:g}"
    return f"weight {search['weight']:.{digits}g}{fixed}"


def report(summary: dict[str, Any], folder: Path, images: int) -> str:
    """The message at the end: what was learned, how good it is, what to type next."""
    values = {n: v for n, v in summary["parameters"].items() if "." not in n}
    learned = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
    low, high = summary["loss_interval"]
    notes = ["certified interval"] if math.isfinite(low) and math.isfinite(high) else []
    notes += ["last minibatch"] if summary["loss_images"] == "last minibatch" else []
    lines = [
        "",
        f"Run folder     {folder}",
        f"Training       {summary['steps']} steps in {summary['seconds']:.1f} s: {summary['reason']}",
        f"Learned        {learned}",
        f"Training loss  {format_interval(summary['loss'], low, high)}" + (f"  ({', '.join(notes)})" if notes else ""),
    ]
    search = summary["grid_search"]
    for metric, unit, digits in (("psnr", " dB", 2), ("ssim", "", 4)):
        v = {name: f"{value:.{digits}f}" for name, value in summary[metric].items()}
        beside = "" if search is None else f"; grid search {v['grid_search']} ({_weights(search)})"
        lines.append(f"{metric.upper():<14} {v['measurement']} -> {v['learned']}{unit}{beside}")
    lines.append(f"               mean over test images that the training has not seen: {images}")
    if "patterns" in summary:
        lines.append("Of the same number of columns, each measured or not, weights tuned for each pattern:")
        lines += ["  " + line for line in describe_patterns(summary["patterns"])]
    lines += ["Next:", f"  tensorboard --logdir {folder.parent}"]
    lines.append(f"  python scripts/evaluate.py {folder} --data FOLDER_WITH_IMAGES")
    if summary["status"] == "completed":
        steps = max(10, 2 * summary["steps"])
        lines.append(f"  python scripts/train.py --resume {folder} --upper.max_steps {steps}")
    return "\n".join(lines)


def evaluate_run(
    config: RunConfig, folder: Path, data: str | None, crop: int | None, json_path: str | None, picture: str | None
) -> int:
    """Evaluate a finished run: table on the terminal, picture, JSON.

    Args:
        config: settings of the run.
        folder: the run folder.
        data: folder of test images; ``None`` for those of the run.
        crop: largest height and width, 0 for whole images; ``None`` for whole images of ``data``, else
            ``data.eval_size``.
        json_path: where to write the numbers, under the keys of summary.json.
        picture: where to draw; ``None`` for the run's pictures folder.
    """
    if not (folder / REGULARIZER_FILE).exists():
        raise CheckpointError(f"{folder}: not finished, no {REGULARIZER_FILE}. Go on with train.py --resume {folder}.")
    regularizer = load_regularizer(folder / REGULARIZER_FILE)
    energy = assembly.make_energy(config, regularizer, regularizer.data_weight)
    images = None if data is None else assembly.load_folder(data, config)
    if crop is None and data is not None:
        crop = 0
    pairs = assembly.evaluation_pairs(config, "test", images, crop=crop)
    search = _search(folder, config, regularizer)
    evaluation = evaluate(_energies(config, energy, search), pairs)
    print(evaluation.table())
    distance = max(max(values) for values in evaluation.distance_bound.values())
    print(f"Grid search on the training images: {_weights(_search_summary(search), 4)}. * best.")
    print(f"Every reconstruction is certified to lie within {distance:.2g} (Euclidean) of the exact minimizer.")
    name = "evaluation.png" if data is None else "evaluation_data.png"
    path = folder / "pictures" / name if picture is None else Path(picture).expanduser()
    _save_picture(evaluation, path)
    print(f"Picture: {os.path.relpath(path)}")
    if json_path is not None:
        content = evaluation.to_dict() | {
            "parameters": named_parameters(energy),
            "grid_search": _search_summary(search),
            "run": str(folder),
            "data": data,
            "versions": versions(),
        }
        write_json(Path(json_path).expanduser(), content)
    return 0
