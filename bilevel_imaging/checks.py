"""What arguments must be, with errors that name them: the same words everywhere."""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from torch import Tensor


def number(name: str, value: Any, what: str = "a number") -> float:
    """The value as a float.

    Args:
        name: of the argument.
        value: anything; a tensor of one number will do, a bool will not.
        what: is expected, in words.

    Raises:
        ValueError: not a number.
    """
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        return float(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"Expected {name} as {what}. Got {value!r}.")
    return float(value)


def boolean(name: str, value: Any) -> bool:
    """The value as a bool.

    Raises:
        ValueError: not a bool; every text is true for Python, "no" as well.
    """
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"Expected {name} as True or False. Got {value!r}.")
    return bool(value)


def not_negative(name: str, value: Any) -> float:
    """The value as a float.

    Raises:
        ValueError: not a finite number >= 0.
    """
    what = "a finite number >= 0"
    if not 0 <= number(name, value, what) < math.inf:
        raise ValueError(f"Expected {name} as {what}. Got {value!r}.")
    return float(value)


def whole(name: str, value: Any, least: int) -> int:
    """The value as an int.

    Raises:
        ValueError: not an integer, or less than ``least``.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise ValueError(f"Expected {name} as an integer >= {least}. Got {value!r}.")
    return int(value)


def whole_numbers(name: str, values: Any) -> tuple[int, ...]:
    """A sequence of one or more positive integers.

    Raises:
        ValueError: something else.
    """
    if isinstance(values, str) or not isinstance(values, Iterable) or not (values := tuple(values)):
        raise ValueError(f"Expected {name} as a sequence of one or more positive integers, e.g. (48,). Got {values!r}.")
    return tuple(whole(name, value, 1) for value in values)


def instance(name: str, value: Any, kind: type | tuple[type, ...], example: str) -> None:
    """Refuse objects of another kind; classes in place of their instances, too.

    Raises:
        ValueError: not one.
    """
    if not isinstance(value, kind):
        raise ValueError(f"Expected {name} as {example}. Got {described(value)}.")


def argument_names(build: Callable[..., Any]) -> list[str]:
    """Arguments of a function or class that have a name, those behind ``**`` not among them."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [name for name, p in inspect.signature(build).parameters.items() if p.kind not in kinds]


def described(value: Any) -> str:
    """What was given in the place of something else, in a few words."""
    return f"the class {value.__name__}" if isinstance(value, type) else f"{type(value).__name__} {value!r:.80}"
