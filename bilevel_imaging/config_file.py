"""Files of settings: what is no such file is refused by its name and line, before any of its values is looked at."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from bilevel_imaging.config import RunConfig


def add_config_option(parser: Any) -> None:
    """Add ``--config FILE`` to a parser of jsonargparse."""
    from jsonargparse import ActionConfigFile

    class CheckedFile(ActionConfigFile):
        def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
            if os.path.isfile(path := os.path.expanduser(values)):
                check_config_file(Path(path))
            super().__call__(parser, cfg, values, option_string)

    parser.add_argument("--config", action=CheckedFile, help="YAML file with settings; --group.key value overrides it")


def check_config_file(path: Path) -> None:
    """Refuse a file that is not YAML, or not groups of settings.

    Raises:
        ValueError: naming the file, with the line where that is known.
        UnicodeDecodeError: not text.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        begun = error.context_mark
        where = f" ({error.context}, line {begun.line + 1})" if begun is not None else ""
        raise ValueError(f"{path}, line {error.problem_mark.line + 1}: not YAML: {error.problem}{where}.") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {error}.") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: expected groups of settings, e.g. upper: {{max_steps: 10}}. Got {_kind(content)}.")
    groups = {f.name: f.default_factory for f in fields(RunConfig) if is_dataclass(f.default_factory)}
    for name in groups.keys() & content.keys():
        if not isinstance(found := content[name], Mapping):
            got = "nothing; leave it out" if found is None else repr(found)
            example = fields(groups[name])[0].name
            raise ValueError(f"{path}: {name}: expected settings below it, e.g. {example}. Got {got}.")


def _kind(content: Any) -> str:
    kinds = {"NoneType": "an empty file", "list": "a list", "str": "a text"}
    return kinds.get(type(content).__name__, repr(content))
