"""The command ``compare``: upper-level methods on one problem with one budget: table, figure, JSON, TensorBoard."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from bilevel_imaging.cli import check_writable, configuration, guarded, make_parser
from bilevel_imaging.config import LinearConfig, LowerConfig, RunConfig, UpperConfig
from bilevel_imaging.config_file import add_config_option
from bilevel_imaging.training.run_folder import new_folder

RECORD_FILE, FIGURE_FILE, BOARD_FOLDER = "record.json", "comparison.png", "tensorboard"
METHODS = ("maid", "maid_paper", "hoag", "adam")
RECORD_EXISTS = "already holds a comparison. Give another folder."
BUDGET = 20_000
# of upper.max_steps where nothing else is given: the budget ends a run, not this
MAX_STEPS = 100_000
# lower-level accuracy of the losses measured at the end, per root of the number of pixels
ERROR_TOL = 1e-7


def compare_main(argv: Sequence[str] | None = None) -> int:
    """Compare upper-level methods; returns the exit code."""
    return guarded(_compare, argv, stopped="Stopped before the first method was finished.")


def _parser() -> Any:
    parser = make_parser(
        "compare.py",
        "Upper-level methods on one problem, from the same start, with the same budget of work. Settings are those of "
        "train.py (see its --help); those in upper belong to upper.method alone. Without arguments: four methods, "
        "total variation for denoising, on the bundled photographs.",
    )
    add = parser.add_argument
    add_config_option(parser)
    add(
        "--methods",
        type=str,
        nargs="+",
        default=list(METHODS),
        help="names of methods, with settings of theirs after a colon, e.g. adam:lr=0.1 hoag:options.schedule=cubic",
    )
    add("--seeds", type=int, nargs="+", default=[0], help="of patches, noise and minibatches; one comparison each")
    add("--budget", type=int, default=BUDGET, help="gradients, Hessian and mixed products per method and seed")
    add("--output", type=str | None, default=None, help="folder for the results (default: a new one in runs/)")
    add("--json", type=str | None, default=None, help="also write the record here")
    parser.add_class_arguments(RunConfig, None)
    parser.set_defaults({"upper.max_steps": MAX_STEPS})
    return parser


def _compare(argv: Sequence[str] | None) -> int:
    parser = _parser()
    parsed = parser.parse_args(list(sys.argv[1:] if argv is None else argv))
    config = configuration(parser, parsed)
    # a loss that changes from step to step compares nothing
    config = replace(config, upper=replace(config.upper, sampling_binary=0.0))
    _check(config, parsed)
    configs = {text: _with_method(parser, config, text) for text in parsed.methods}
    from bilevel_imaging.experiments import method_comparison
    from bilevel_imaging.training.checkpoints import write_json

    specs = [_spec(text, one) for text, one in configs.items()]
    objective, error_tol = _objectives(config, parsed.seeds)
    for one in configs.values():
        objective(one, parsed.seeds[0])  # mistakes in any of the settings show before the first method runs
    with new_folder(parsed.output, "comparison", [RECORD_FILE], RECORD_EXISTS) as folder:

        def save(record: dict[str, Any]) -> None:
            for path in filter(None, (folder / RECORD_FILE, parsed.json and Path(parsed.json).expanduser())):
                write_json(path, record | {"config": asdict(config)})

        record = method_comparison.run(
            specs,
            lambda spec, seed: objective(configs[spec.label], seed),
            budget=parsed.budget,
            error_tol=error_tol,
            seeds=parsed.seeds,
            reference=lambda seed: objective(_exact(config), seed),
            save=save,
            progress=config.logging.progress,
        )
        save(record)
        _show(record, config, folder)
        if record["complete"]:
            return 0
        count = len(specs) * len(parsed.seeds)
        print(f"Stopped after {len(record['runs'])} of {count} runs, which are kept.", file=sys.stderr)
        return 130


def _show(record: dict[str, Any], config: RunConfig, folder: Path) -> None:
    """Table on the terminal, figure and TensorBoard events in the folder."""
    from bilevel_imaging.experiments import method_comparison_board, method_comparison_report
    from bilevel_imaging.training.figures import save_figure

    print(method_comparison_report.table(record))
    save_figure(method_comparison_report.figure(record), folder / FIGURE_FILE)
    if config.logging.tensorboard:
        try:
            method_comparison_board.write_hparams(record, folder / BOARD_FOLDER)
            print(f"Compare: tensorboard --logdir {os.path.relpath(folder / BOARD_FOLDER)}  (page HPARAMS)")
        except (OSError, ImportError) as error:  # as in a training, they are not worth the results
            reason = getattr(error, "strerror", None) or str(error)
            print(f"TensorBoard events not written: {reason}; all else is.", file=sys.stderr)
    print(f"Written: {os.path.relpath(folder)}")


def _check(config: RunConfig, parsed: Any) -> None:
    """Refuse what cannot be compared."""
    check_writable("--json", parsed.json)
    if parsed.budget < 1:
        raise ValueError(f"--budget: expected an integer >= 1. Got {parsed.budget}.")
    for key in ("methods", "seeds"):
        given = getattr(parsed, key)
        twice = sorted({str(one) for one in given if given.count(one) > 1})
        if twice:
            raise ValueError(f"--{key}: expected every one once. Got {', '.join(twice)} more than once.")
    if config.data.random_patches:
        raise ValueError(
            "data.random_patches: expected fixed patches, whose loss can be measured for all methods. Got true."
        )


def _with_method(parser: Any, config: RunConfig, text: str) -> RunConfig:
    """The settings with another method, given as ``name`` or ``name:key=value,key=value``.

    Keys are those of ``upper`` in train.py, options.NAME among them. The problem and what its steps share (minibatches
    where the method takes them, the number of steps, the penalty) are those of ``config``.
    """
    from bilevel_imaging.upper_level import ALL_IMAGES_METHODS

    name, colon, rest = text.partition(":")
    pairs = [pair.partition("=")[::2] for pair in rest.split(",")] if colon else []
    if any(not (key and value) for key, value in pairs):
        raise ValueError(f"--methods: expected NAME or NAME:KEY=VALUE,KEY=VALUE. Got {text!r}.")
    base = config.upper
    if name != base.method:
        base = UpperConfig(
            method=name,
            max_steps=base.max_steps,
            minibatch=None if name in ALL_IMAGES_METHODS else base.minibatch,
            sampling_penalty=base.sampling_penalty,
        )
    arguments = [f"--upper.method={name}", *(f"--upper.{key}={value}" for key, value in pairs)]
    given = parser.instantiate(parser.parse_args(arguments)).upper
    changed = {key: getattr(given, key) for key in {key.partition(".")[0] for key, _ in pairs} - {"options"}}
    upper = replace(base, **changed, options={**base.options, **given.options})
    return replace(config, upper=upper).resolved()


def _spec(text: str, config: RunConfig) -> Any:
    from bilevel_imaging.experiments.method_comparison import MethodSpec
    from bilevel_imaging.training_run import make_method

    make_method(config.upper)  # wrong settings are found before anything runs
    defaults = UpperConfig(method=config.upper.method)
    names = [f.name for f in fields(UpperConfig) if f.name not in ("options", "max_steps")]
    given = {n: getattr(config.upper, n) for n in names if getattr(config.upper, n) != getattr(defaults, n)}
    settings = {"method": config.upper.method, **given, **config.upper.options}
    return MethodSpec(text, lambda: make_method(config.upper), settings, config.upper.max_steps)


def _exact(config: RunConfig) -> RunConfig:
    """For measuring: float64, all images, and solvers that get as accurate as one likes."""
    changed = {
        "problem": replace(config.problem, dtype="float64"),
        "lower": LowerConfig(),
        "linear": LinearConfig(),
        "upper": UpperConfig(sampling_penalty=config.upper.sampling_penalty),
    }
    return replace(config, **changed).resolved()


def _objectives(config: RunConfig, seeds: Sequence[int]) -> tuple[Callable[[RunConfig, int], Any], float]:
    """(a function from settings and a seed to a new objective, the accuracy with which to measure)."""
    from bilevel_imaging import assembly

    @lru_cache(maxsize=2)  # the data of one seed, in both dtypes
    def pairs(dtype: str, seed: int) -> Any:
        return assembly.training_pairs(replace(config, problem=replace(config.problem, dtype=dtype), seed=seed))

    def objective(one: RunConfig, seed: int) -> Any:
        seeded = replace(one, seed=seed)
        return assembly.make_objective(seeded, assembly.make_energy(seeded), pairs(one.problem.dtype, seed))

    return objective, ERROR_TOL * pairs(config.problem.dtype, seeds[0]).x[0].numel() ** 0.5
