"""``metrics.jsonl``: one JSON object per line, complete up to the last finished step whatever happens."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def finite_or_none(value: Any) -> Any:
    """The same nested record with NaN and infinities as ``None``: JSON has no numbers for them."""
    if isinstance(value, Mapping):
        return {str(key): finite_or_none(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_none(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


class MetricsLog:
    """Appends records to a file; every record is handed to the operating system before ``append`` returns.

    When the disk is full the line waits in memory and is written, in order, as soon as there is room again.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (closed by close)
        self._good_size = os.fstat(self._file.fileno()).st_size
        self._pending = b""

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one line; non-finite floats become ``null``.

        Raises:
            OSError: not written now; the line is kept and tried again with the next one.
        """
        self._pending += json.dumps(finite_or_none(record), allow_nan=False).encode() + b"\n"
        try:
            view = memoryview(self._pending)
            while view:
                view = view[self._file.write(view) :]
        except OSError:
            os.ftruncate(self._file.fileno(), self._good_size)  # no half lines in the middle
            raise
        self._good_size += len(self._pending)
        self._pending = b""

    def sync(self) -> None:
        """Make everything appended so far survive a power cut.

        Raises:
            OSError: the disk refuses.
        """
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a file that may be missing; damaged lines and half a line at the end are left out."""
    return [record for record, _ in _read(Path(path)) if record is not None]


def truncate_metrics(path: str | Path, step: int, validated: int) -> list[dict[str, Any]]:
    """Cut the file back to a checkpoint and return the records kept; damaged lines between them stay as they are.

    Args:
        path: the file; nothing happens if it does not exist.
        step: finished steps of the checkpoint; later records and half-written lines are dropped.
        validated: step of the last validation known to the checkpoint; later validations will be done again.
    """
    path = Path(path)
    limits = {"step": step, "validation": validated}
    lines = _read(path)
    fit = [r is not None and r["step"] <= limits.get(r.get("kind", "step"), step) for r, _ in lines]
    count = max((number for number, fits in enumerate(fit, 1) if fits), default=0)
    if damaged := sum(record is None for record, _ in lines[:count]):
        warnings.warn(f"{path}: damaged lines, kept as they are but not shown: {damaged}.", UserWarning, 2)
    size = lines[count - 1][1] if count else 0
    if path.exists() and path.stat().st_size != size:
        os.truncate(path, size)  # only ever shortens, so it works on a full disk too
    return [record for (record, _), fits in zip(lines, fit, strict=True) if record is not None and fits]


def _read(path: Path) -> list[tuple[dict[str, Any] | None, int]]:
    """Records with the offset of their end; ``None`` for lines that are damaged or not whole."""
    result: list[tuple[dict[str, Any] | None, int]] = []
    end = 0
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        end += len(line)
        result.append((_record(line), end))
    return result


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    whole = line.endswith(b"\n") and isinstance(record, dict) and isinstance(record.get("step"), int)
    return record if whole else None
