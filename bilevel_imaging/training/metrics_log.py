"""``metrics.jsonl``: one JSON object per line, complete up to the last finished step whatever happens."""

from __future__ import annotations

import json
import math
import os
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
    """The records of a file that may be missing or end in half a line."""
    return [record for record, _ in _read(Path(path))]


def truncate_metrics(path: str | Path, step: int, validated: int) -> list[dict[str, Any]]:
    """Cut the file back to a checkpoint and return the records kept.

    Args:
        path: the file; nothing happens if it does not exist.
        step: finished steps of the checkpoint; later records and half-written lines are dropped.
        validated: step of the last validation known to the checkpoint; later validations will be done again.
    """
    path = Path(path)
    limits = {"step": step, "validation": validated}
    kept: list[dict[str, Any]] = []
    size = 0
    for record, end in _read(path):
        if record["step"] > limits.get(record.get("kind", "step"), step):
            break
        kept.append(record)
        size = end
    if path.exists() and path.stat().st_size != size:
        os.truncate(path, size)  # only ever shortens, so it works on a full disk too
    return kept


def _read(path: Path) -> list[tuple[dict[str, Any], int]]:
    """Records with the offset of their end, up to the first line that is not whole."""
    result: list[tuple[dict[str, Any], int]] = []
    end = 0
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        end += len(line)
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n") or not isinstance(record, dict) or not isinstance(record.get("step"), int):
            break
        result.append((record, end))
    return result
