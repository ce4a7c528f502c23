"""The command line: ``train`` and ``evaluate``. Mistakes of the user end in one line and exit code 2."""

from __future__ import annotations

import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from bilevel_imaging.config import SMALLEST_CROP, RunConfig
from bilevel_imaging.config_file import add_config_option
from bilevel_imaging.training.distributed import joined, launched
from bilevel_imaging.training.run_folder import locked, new_folder

CONFIG_FILE = "config.yaml"
# what a folder that holds a run has, and what to say of it
RUN_FILES = (CONFIG_FILE, "metrics.jsonl", "checkpoints")
RUN_EXISTS = "already holds a run. Continue it with --resume {output}."
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
    try:
        from jsonargparse import ArgumentError

        with _warnings_in_one_line():
            return command(argv)
    except KeyboardInterrupt:
        _say(stopped)
        return 130
    except (ValueError, OSError, ArgumentError) as error:
        if os.environ.get("BILEVEL_DEBUG"):
            raise
        _say(f"error: {one_line(error)}")
        return 2


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Show warnings of this package without their line of code, which tells a user of commands nothing."""
    before = warnings.formatwarning

    def shown(message: Any, category: type[Warning], filename: str, lineno: int, line: str | None = None) -> str:
        if Path(filename).is_relative_to(Path(__file__).parent):
            return f"warning: {message}\n"
        return before(message, category, filename, lineno, line)

    warnings.formatwarning = shown
    try:
        yield
    finally:
        warnings.formatwarning = before


def _say(text: str) -> None:
    """One line on the terminal, from the first process if there are several."""
    if launched()[0] == 0:
        print(text, file=sys.stderr)


def one_line(error: Exception) -> str:
    """The message on one line, with keys written as everywhere else."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}."
    if isinstance(error, UnicodeDecodeError):
        return f"--config: expected a YAML file. Got one that is not text ({error.reason})."
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
    elif text.startswith("Option '") and text.endswith("' is not accepted"):
        option = text.split("'")[1]
        text = f"unknown option {option}.{_suggestion(option)}"
    return _VALUE.sub(_expected, text)


# what the parser says of a value of a wrong type, and how the types are called here
_VALUE = re.compile(
    r"(?:Does not validate against any of the Union subtypes Subtypes: \[(?P<types>.*)\] Errors: .* Given value: "
    r"|Expected a (?P<type>\w+)\. Got value: )(?P<value>.*)$"
)
_TYPES = {
    "int": "an integer",
    "float": "a number",
    "str": "a text",
    "bool": "true or false",
    "dict": "a mapping",
    "NoneType": "null",
    "tuple[float, float]": "two numbers in brackets",
}


def _expected(found: re.Match[str]) -> str:
    """The message about one value, in the words of all others."""
    types = re.split(r", (?![^\[]*\])", found["types"] or found["type"])
    named = [_TYPES.get(name, name) for name in types]
    value = "null" if found["value"] == "None" else found["value"]
    return f"expected {' or '.join(named)}. Got {value}."


def _suggestion(option: str) -> str:
    """Allowed keys of the group of a misspelled option."""
    group, dot, _ = option.lstrip("-").partition(".")
    known: dict[str, Any] = {f.name: f.default_factory for f in fields(RunConfig) if f.name != "seed"}
    if dot and group in known:
        return f" Allowed in {group}: {', '.join(f.name for f in fields(known[group]))}."
    return f" Allowed groups: {', '.join(known)}; see --help."


def check_device(option: str, device: str) -> None:
    """Refuse a device that this machine does not have, before anything is computed.

    Raises:
        ValueError: an unknown one, or CUDA where it is not available.
    """
    import torch

    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()):
        raise ValueError(f"{option}: expected cpu or cuda. Got {device!r}.")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ValueError(f"{option}: {device} is not available on this machine. Choose cpu.")


def check_writable(option: str, path: str | Path | None) -> None:
    """Refuse a file that could not be written at the end, before anything is computed; nothing is left behind.

    Raises:
        ValueError: a folder is there, or it cannot be written.
    """
    if path is None:
        return
    path = Path(path).expanduser()
    if path.is_dir():
        raise ValueError(f"{option} {path}: is a folder. Give a file.")
    made = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(f"{option} {path}: cannot be written ({error.strerror}).") from error
    finally:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()


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
    add_config_option(parser)
    parser.add_argument("--output", type=str | None, default=None, help="run folder (default: a new one in runs/)")
    parser.add_argument(
        "--resume", type=str | None, default=None, help="run folder to continue; parameters bit for bit"
    )
    parser.add_argument("--json", type=str | None, default=None, help="also write the summary to this file at the end")
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
        config, folder = _continued(parser, arguments, Path(parsed.resume).expanduser(), parsed)
    else:
        config = configuration(parser, parsed).resolved()
    check_writable("--json", parsed.json)
    from bilevel_imaging.training.checkpoints import atomic_write
    from bilevel_imaging.training_run import SUMMARY_FILE, train

    with joined(config.problem.device) as processes, ExitStack() as held:

        def claimed() -> Path:
            if resume:
                return held.enter_context(locked(folder))
            name = _run_name(parsed, config)
            return held.enter_context(new_folder(parsed.output, name, RUN_FILES, RUN_EXISTS))

        folder = processes.first(claimed)
        code = train(config, folder, resume=resume, processes=processes)
        if code == 0 and parsed.json is not None:
            target = Path(parsed.json).expanduser()
            target.parent.mkdir(parents=True, exist_ok=True)
            processes.first(lambda: atomic_write(target, (folder / SUMMARY_FILE).read_bytes()))
        return code


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
        text = one_line(error)
        raise ValueError(text if text.startswith(str(path)) else f"{path}: {text}") from error


def _continued(parser: Any, arguments: list[str], folder: Path, parsed: Any) -> tuple[RunConfig, Path]:
    """Settings of a run that goes on: those it had, but for what may change."""
    output, files = parsed.output, parsed.config
    if output is not None and Path(output).expanduser().resolve() != folder.resolve():
        raise ValueError(f"--output {output}: a resumed run stays in its folder {folder}. Leave --output out.")
    if files:  # nothing in a file tells values that are meant to change from those of the start, or from defaults
        raise ValueError(
            f"--config: a resumed run has its settings in {folder / CONFIG_FILE}. Leave --config out; "
            "give what may change by itself, e.g. --upper.max_steps 100."
        )
    saved = read_config(folder)
    # The saved settings come first, so that whatever is given again overrides them and can be compared.
    given = parser.parse_args([f"--config={folder / CONFIG_FILE}", *arguments])
    config = configuration(parser, given).resolved()
    config.check_resumes(saved)
    return config, folder


def _run_name(parsed: Any, config: RunConfig) -> str:
    files = parsed.config or []
    if files:
        path = Path(str(files[-1]))
        return path.stem if path.name != CONFIG_FILE else path.absolute().parent.name
    kinds = (config.regularizer.kind, config.problem.kind)
    return "_".join(_SHORT.get(kind, kind) for kind in kinds) + ("_color" if config.data.color else "")


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
    if parsed.crop is not None and parsed.crop != 0 and parsed.crop < SMALLEST_CROP:
        raise ValueError(f"--crop: expected 0 or an integer >= {SMALLEST_CROP}. Got {parsed.crop}.")
    folder = Path(parsed.run).expanduser()
    config = read_config(folder)
    for option in ("json", "picture"):
        check_writable(f"--{option}", getattr(parsed, option))
    from bilevel_imaging.evaluation_run import evaluate_run

    return evaluate_run(config, folder, parsed.data, parsed.crop, parsed.json, parsed.picture)
