"""The command line: ``train`` and ``evaluate``. Mistakes of the user end in one line and exit code 2."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from bilevel_imaging.config import RunConfig
from bilevel_imaging.training.distributed import joined, launched

CONFIG_FILE = "config.yaml"
RUNS_FOLDER = Path("runs")
# what a folder that holds a run has, and what to say of it
RUN_FILES, RUN_EXISTS = (CONFIG_FILE, "metrics.jsonl"), "already holds a run. Continue it with --resume {output}."
# what may be changed when a run is continued: nothing on which its steps depend
RESUME_MAY_CHANGE = ("upper.max_steps", "logging.")
_SHORT = {"total_variation": "tv", "denoising": "denoise", "deblurring": "deblur", "inpainting": "inpaint"}


def train_main(argv: Sequence[str] | None = None) -> int:
    """Train a regularizer; returns the exit code."""
    return guarded(_train, argv)


def evaluate_main(argv: Sequence[str] | None = None) -> int:
    """Evaluate a finished run; returns the exit code."""
    return guarded(_evaluate, argv)


def guarded(
    command: Callable[[Sequence[str] | None], int],
    argv: Sequence[str] | None,
    stopped: str = "Stopped at once; the last checkpoint is kept.",
) -> int:
    """Run a command; mistakes end in one line, or in a traceback if ``BILEVEL_DEBUG`` is set.

    Args:
        command: from arguments to the exit code.
        argv: the arguments, ``None`` for those of the process.
        stopped: what to say after Ctrl-C.

    Returns:
        the exit code: 2 after a mistake, 130 after Ctrl-C.
    """
    from jsonargparse import ArgumentError

    try:
        return command(argv)
    except KeyboardInterrupt:
        _say(stopped)
        return 130
    except (ValueError, OSError, ArgumentError) as error:
        if os.environ.get("BILEVEL_DEBUG"):
            raise
        _say(f"error: {one_line(error)}")
        return 2


def _say(text: str) -> None:
    """One line on the terminal, from the first process if there are several."""
    if launched()[0] == 0:
        print(text, file=sys.stderr)


def one_line(error: Exception) -> str:
    """The message on one line, with keys written as everywhere else."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}."
    text = " ".join(str(error).split())
    if text.startswith('Parser key "'):
        key, _, rest = text.removeprefix('Parser key "').partition('"')
        text = key + rest.replace("<class '", "").replace("'>", "")
    elif text.startswith("unrecognized arguments: "):
        option = text.removeprefix("unrecognized arguments: ").split()[0]
        text = f"unknown option {option}.{_suggestion(option)}"
    elif text.startswith("Group '") and "does not accept option" in text:
        group, option = text.split("'")[1], text.split("'")[3]
        text = f"unknown option {group}.{option}.{_suggestion(f'--{group}.{option}')}"
    return text


def _suggestion(option: str) -> str:
    """Allowed keys of the group of a misspelled option."""
    group, dot, _ = option.lstrip("-").partition(".")
    known: dict[str, Any] = {f.name: f.default_factory for f in fields(RunConfig) if f.name != "seed"}
    if dot and group in known:
        return f" Allowed in {group}: {', '.join(f.name for f in fields(known[group]))}."
    return f" Allowed groups: {', '.join(known)}; see --help."


def make_parser(program: str, description: str) -> Any:
    """A parser of this package's commands."""
    from jsonargparse import ArgumentParser

    return ArgumentParser(prog=program, description=description, exit_on_error=False)


def _train_parser() -> Any:
    parser = make_parser(
        "train.py",
        "Learn a regularizer from images. Without arguments: total variation for denoising, on the bundled "
        "photographs, in less than a minute.",
    )
    parser.add_argument("--config", action="config", help="YAML file with settings; --group.key value overrides it")
    parser.add_argument("--output", type=str | None, default=None, help="run folder (default: a new one in runs/)")
    parser.add_argument("--resume", type=str | None, default=None, help="run folder to continue, bit for bit")
    parser.add_class_arguments(RunConfig, None)
    texts = _descriptions(RunConfig)
    for action in parser._actions:
        if action.dest in texts and action.option_strings:
            action.help = texts[action.dest]
    return parser


def _descriptions(kind: type, prefix: str = "") -> dict[str, str]:
    """Help texts by dotted key, from the attributes documented in the docstrings."""
    texts: dict[str, str] = {}
    lines = (kind.__doc__ or "").partition("Attributes:")[2].splitlines()
    key = ""
    for line in lines:
        name, colon, rest = line.strip().partition(": ")
        if colon and line.startswith(" " * 8) and not line.startswith(" " * 9):
            key = prefix + name
            texts[key] = rest
        elif key:
            texts[key] += " " + line.strip()
    for f in fields(kind):
        if is_dataclass(f.default_factory):
            texts |= _descriptions(f.default_factory, f"{prefix}{f.name}.")
    return {name: text.strip().replace("%", "%%") for name, text in texts.items()}


def _train(argv: Sequence[str] | None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _train_parser()
    parsed = parser.parse_args(arguments)
    resume = parsed.resume is not None
    if resume:
        config, folder = _continued(parser, arguments, Path(parsed.resume).expanduser(), parsed.output)
    else:
        config = configuration(parser, parsed).resolved()
    from bilevel_imaging.training_run import train

    with joined(config.problem.device) as processes:
        if not resume:
            name = _run_name(parsed, config)
            folder = processes.first(lambda: new_folder(parsed.output, name, RUN_FILES, RUN_EXISTS))
        return train(config, folder, resume=resume, processes=processes)


def configuration(parser: Any, parsed: Any) -> RunConfig:
    """The settings among parsed arguments."""
    values = parser.instantiate(parsed)
    return RunConfig(**{f.name: getattr(values, f.name) for f in fields(RunConfig)})


def read_config(folder: Path) -> RunConfig:
    """The settings of a run.

    Raises:
        ValueError: the folder does not hold a run, or its settings cannot be read.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        kind = "has no config.yaml, so it holds no run" if folder.is_dir() else "no such folder"
        raise ValueError(f"{folder}: {kind}. Give the folder that the training named, e.g. runs/tv_denoise.")
    parser = _train_parser()
    try:
        return configuration(parser, parser.parse_args([f"--config={path}"]))
    except Exception as error:
        raise ValueError(f"{path}: {one_line(error)}") from error


def _continued(parser: Any, arguments: list[str], folder: Path, output: str | None) -> tuple[RunConfig, Path]:
    """Settings of a run that goes on: those it had, but for what may change."""
    if output is not None and Path(output).expanduser().resolve() != folder.resolve():
        raise ValueError(f"--output {output}: a resumed run stays in its folder {folder}. Leave --output out.")
    saved = read_config(folder)
    # The saved settings come first, so that whatever is given again overrides them and can be compared.
    given = parser.parse_args([f"--config={folder / CONFIG_FILE}", *arguments])
    config = configuration(parser, given).resolved()
    changed = [name for name in saved.differences(config) if not name.startswith(RESUME_MAY_CHANGE)]
    if changed:
        raise ValueError(
            f"{', '.join(changed)}: cannot change when a run is resumed, only upper.max_steps and logging can. "
            "Start a new run for other settings."
        )
    return config, folder


def _run_name(parsed: Any, config: RunConfig) -> str:
    files = parsed.config or []
    if files:
        path = Path(str(files[-1]))
        return path.stem if path.name != CONFIG_FILE else path.absolute().parent.name
    kinds = (config.regularizer.kind, config.problem.kind)
    return "_".join(_SHORT.get(kind, kind) for kind in kinds) + ("_color" if config.data.color else "")


def new_folder(output: str | None, name: str, files: Sequence[str], taken: str) -> Path:
    """The folder asked for, or the first free one in runs/, made at once so that no other run takes it.

    Args:
        output: what the user asked for.
        name: of a folder in runs/.
        files: a folder that holds one of them is not overwritten.
        taken: what to say then; ``{output}`` stands for the folder.

    Raises:
        ValueError: the folder cannot be used.
    """
    if output is not None:
        folder = Path(output).expanduser()
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"--output {output}: is a file. Give a folder.")
        if any((folder / file).exists() for file in files):
            raise ValueError(f"--output {output}: {taken.format(output=output)}")
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    for number in range(1, 10_000):
        folder = RUNS_FOLDER / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise ValueError(f"{RUNS_FOLDER}: too many runs named {name}. Give --output.")


def _evaluate(argv: Sequence[str] | None) -> int:
    parser = make_parser(
        "evaluate.py", "PSNR and SSIM of a finished run, beside the measurements and a grid search for the weight."
    )
    parser.add_argument("run", type=str, help="run folder, e.g. runs/tv_denoise")
    parser.add_argument(
        "--data", type=str | None, default=None, help="folder of test images (default: those of the run)"
    )
    parser.add_argument(
        "--crop",
        type=int | None,
        default=None,
        help="largest height and width, 0 for whole images (default: whole images with --data, else data.eval_size)",
    )
    parser.add_argument("--json", type=str | None, default=None, help="also write the numbers to this file")
    parser.add_argument("--picture", type=str | None, default=None, help="default: pictures/evaluation.png of the run")
    parsed = parser.parse_args(list(sys.argv[1:] if argv is None else argv))
    if parsed.crop is not None and parsed.crop < 0:
        raise ValueError(f"--crop: expected an integer >= 0. Got {parsed.crop}.")
    folder = Path(parsed.run).expanduser()
    config = read_config(folder)
    from bilevel_imaging.training_run import evaluate_run

    return evaluate_run(config, folder, parsed.data, parsed.crop, parsed.json, parsed.picture)
