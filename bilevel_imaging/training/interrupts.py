"""Ctrl-C and termination requests turned into a flag that is looked at between two steps."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def uninterrupted() -> Iterator[None]:
    """A Ctrl-C meanwhile comes at the end: libraries that were loaded in part don't work any more."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[tuple[int, FrameType | None]] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before if before is not None else signal.SIG_DFL)
    if came and callable(before):
        before(*came[0])
    elif came and before == signal.SIG_DFL:
        raise KeyboardInterrupt


_STOPPING = b"\nStopping after this step; a checkpoint will be saved. Press Ctrl-C again to stop at once.\n"


class SignalGuard:
    """Context manager: the first SIGINT or SIGTERM sets ``requested``; a SIGINT after that raises KeyboardInterrupt.

    Outside the main thread, where Python allows no handlers, and for signals that are ignored (``nohup``) it leaves
    everything as it is.

    Args:
        quiet: say nothing.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.requested, self.quiet = False, quiet
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> SignalGuard:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._previous.clear()

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.requested:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return  # schedulers repeat SIGTERM
        self.requested = True
        if not self.quiet:
            # Plain os.write: print may be running when the signal arrives.
            os.write(2, _STOPPING)
