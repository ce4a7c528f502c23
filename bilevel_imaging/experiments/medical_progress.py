"""What a medical experiment says while it runs: bars on a terminal, lines with the elapsed time in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import TextIO

from tqdm import tqdm

from bilevel_imaging.training.progress import Steps

INTERVAL = 5.0  # seconds between two lines of one learning, at least


class Log:
    """Messages and steps of one run.

    Args:
        enabled: ``False`` says nothing at all.
        stream: where to; ``None`` for standard error.
        interval: seconds between two lines of steps; the first and the last one always come.
    """

    def __init__(self, enabled: bool, stream: TextIO | None = None, interval: float = INTERVAL):
        self.enabled, self.stream, self.interval = enabled, stream or sys.stderr, interval
        self.begin = time.monotonic()

    def line(self, text: str) -> None:
        """One line after the seconds since the start, without breaking a bar."""
        if self.enabled:
            tqdm.write(self._timed(text), file=self.stream)
            self.stream.flush()

    @contextmanager
    def steps(self, name: str, total: int) -> Iterator[Callable[[str], None]]:
        """For a ``with`` block: what is told, in words, of every finished step of one learning, at most ``total``."""
        shown = Steps(
            total,
            enabled=self.enabled,
            stream=self.stream,
            interval=self.interval,
            desc=name,
            unit=" steps",
            leave=False,
        )
        numbers = count(1)

        def done(text: str) -> None:
            step = next(numbers)
            shown.show(step, text, self._timed(f"{name}: step {step}/{total}, {text}"))

        try:
            yield done
        finally:
            shown.close()

    def _timed(self, text: str) -> str:
        return f"{time.monotonic() - self.begin:6.0f} s  {text}"
