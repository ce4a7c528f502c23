"""What the terminal shows: a bar on a terminal, a plain line every few seconds in a log file."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

from tqdm import tqdm


def hidden(progress: bool) -> bool | None:
    """What tqdm calls ``disable``: bars on a terminal alone, if at all."""
    return None if progress else True


def format_interval(value: float, lower: float, upper: float) -> str:
    """``12.34 [12.30, 12.36]`` with as many decimals as the width of the interval makes sense of."""
    if not (math.isfinite(lower) and math.isfinite(upper)):
        return f"{value:.4g} [not certified]"
    scale = max(abs(value), abs(lower), abs(upper))
    width = upper - lower
    if scale == 0 or not 1e-3 <= scale < 1e6:
        return f"{value:.5g} [{lower:.5g}, {upper:.5g}]"
    decimals = 3 - math.floor(math.log10(scale))  # four significant digits
    if width > 0:
        decimals = max(min(decimals, 2), 1 - math.floor(math.log10(width)))
    decimals = min(max(decimals, 0), 9)
    return f"{value:.{decimals}f} [{lower:.{decimals}f}, {upper:.{decimals}f}]"


def describe(record: Mapping[str, Any], validation: Mapping[str, float]) -> str:
    """One line: loss with its interval, PSNR of the last validation and when that was, accuracies, relative bound,
    trust."""
    parts = [f"loss {format_interval(record['loss'], record['loss_lower'], record['loss_upper'])}"]
    if "psnr" in validation:
        at = validation.get("step")
        parts.append(f"PSNR {validation['psnr']:.2f}" + ("" if at is None else f" (step {at:.0f})"))
    parts.append(f"eps {record['eps']:.1e}")
    parts.append(f"delta {record['delta']:.1e}")
    if record["certified"]:
        parts.append(f"bound {100 * record['relative_bound']:.2g}%")
    parts.append(f"trusted {'yes' if record['trusted'] else 'no'}")
    return ", ".join(parts)


LAYOUT = "{percentage:3.0f}%|{bar:10}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


class Steps:
    """A bar on a terminal, else at most one line every ``interval`` seconds; the first and last steps always.

    Args:
        total: steps of the whole run.
        enabled: ``False`` shows nothing but messages.
        stream: where to; ``None`` for standard error.
        interval: seconds between two plain lines.
        bar: further arguments of tqdm.
    """

    def __init__(
        self,
        total: int,
        *,
        enabled: bool = True,
        stream: TextIO | None = None,
        interval: float = 5.0,
        **bar: Any,
    ) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._total = total
        self._enabled = enabled
        self._interval = interval
        self._next = 0.0
        self._waiting = ""
        self._bar = tqdm(total=total, file=self._stream, **bar) if enabled and self._stream.isatty() else None

    def show(self, step: int, text: str, line: str) -> None:
        """Step number ``step`` is finished: ``text`` beside the bar, or a line of its own."""
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        self._waiting = line
        now = time.monotonic()
        if now >= self._next:
            self._flush()
            self._next = now + self._interval

    def message(self, text: str) -> None:
        """One line that must be seen, without breaking the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Finish the bar or print the last line that was held back."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self._flush()

    def _flush(self) -> None:
        if self._waiting:
            print(self._waiting, file=self._stream, flush=True)
            self._waiting = ""


class Progress(Steps):
    """That of a training; ``initial`` steps are already done."""

    def __init__(self, total: int, initial: int = 0, *, enabled: bool = True) -> None:
        super().__init__(total, enabled=enabled, initial=initial, dynamic_ncols=True, bar_format=LAYOUT, leave=True)

    def update(self, record: Mapping[str, Any], validation: Mapping[str, float]) -> None:
        """Show one finished step."""
        text = describe(record, validation)
        self.show(record["step"], text, f"step {record['step']}/{self._total}: {text}, {record['seconds']:.0f} s")
