"""What a medical experiment says while it runs: bars on a terminal, lines with the elapsed time in a log file."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TextIO

from tqdm import tqdm

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
            tqdm.write(f"{time.monotonic() - self.begin:6.0f} s  {text}", file=self.stream)
            self.stream.flush()

    def steps(self, name: str, total: int) -> Steps:
        """For a ``with`` block: the steps of one learning, at most ``total``."""
        return Steps(self, name, total)


class Steps:
    """Made by :meth:`Log.steps`."""

    def __init__(self, log: Log, name: str, total: int):
        self.log, self.name, self.total = log, name, total
        self.count, self.next, self.waiting = 0, 0.0, ""

    def __enter__(self) -> Steps:
        shown = self.log.enabled and self.log.stream.isatty()
        self.bar = tqdm(
            total=self.total, desc=self.name, unit=" steps", file=self.log.stream, leave=False, disable=not shown
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.bar.close()
        self._flush()

    def done(self, text: str) -> None:
        """One more step is finished."""
        self.count += 1
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()
        self.waiting = "" if not self.bar.disable else f"{self.name}: step {self.count}/{self.total}, {text}"
        if time.monotonic() >= self.next:
            self._flush()
            self.next = time.monotonic() + self.log.interval

    def _flush(self) -> None:
        if self.waiting:
            self.log.line(self.waiting)
            self.waiting = ""
