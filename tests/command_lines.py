"""What tests of command lines share."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def one_line_error(capsys, command: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> str:
    """The one line that a command which refuses its arguments prints to standard error."""
    capsys.readouterr()
    assert command(list(arguments)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    return err
