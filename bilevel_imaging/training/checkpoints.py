"""Checkpoints that survive crashes: a reader finds either the old file or the new one, whole and checked."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from bilevel_imaging.errors import CheckpointError
from bilevel_imaging.training.metrics_log import finite_or_none
from bilevel_imaging.training.state import digest, to_plain

FORMAT = 1
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NAME = re.compile(r"step-(\d+)\.pt")


def atomic_write(path: Path, data: bytes | memoryview) -> None:
    """Replace ``path`` by ``data`` so that a crash at any moment leaves the old content or the new one.

    Raises:
        OSError: the disk is full or not writable; it names ``path``, whose content is untouched, and no temporary file
            is left.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename, error.filename2 = str(path), None
        raise
    _sync_folder(path.parent)


def write_json(path: Path, content: Any) -> None:
    """Write JSON in one piece; what is not finite becomes null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, (json.dumps(finite_or_none(content), indent=2, allow_nan=False) + "\n").encode())


def _sync_folder(folder: Path) -> None:
    """Make a rename durable; other systems than POSIX cannot open folders and do without."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _place(storage: Any, location: str) -> Any:
    """Keep tensors on the device they were saved from, on the CPU when this machine does not have it."""
    if location.startswith("cuda"):
        index = int(location.partition(":")[2] or 0)
        if not torch.cuda.is_available() or index >= torch.cuda.device_count():
            return storage
    return None


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The state saved in one file.

    Raises:
        CheckpointError: the file is missing, truncated, damaged or of another format; the message names it.
    """
    path = Path(path)
    try:
        content = torch.load(path, map_location=_place, weights_only=True)
    except Exception as error:  # torch raises many types for damaged files
        if isinstance(error, OSError) and error.filename is not None:
            raise CheckpointError(f"Cannot read the checkpoint {path}: {error.strerror}.") from error
        raise CheckpointError(f"The checkpoint {path} is damaged: it ends too early or is something else.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of format {FORMAT}.")
    if not isinstance(content.get("state"), dict) or "digest" not in content:
        raise CheckpointError(f"The checkpoint {path} is incomplete.")
    if digest(content["state"]) != content["digest"]:
        raise CheckpointError(f"The checkpoint {path} is damaged: its checksum does not match.")
    return content["state"]


class CheckpointStore:
    """The checkpoints of one run, ``step-00000020.pt`` and so on in one folder; the newest ``keep`` are kept.

    Args:
        folder: made when the first checkpoint is saved.
        keep: how many to keep, at least 1. The newest one known to be valid is never removed.
    """

    def __init__(self, folder: str | Path, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"Expected keep >= 1. Got {keep}.")
        self.folder = Path(folder)
        self.keep = keep
        self.last_valid: Path | None = None
        self._failing = False  # the last one could not be saved, which was reported

    def path(self, step: int) -> Path:
        """File of the checkpoint after ``step`` steps."""
        return self.folder / f"step-{step:08d}.pt"

    def paths(self) -> list[Path]:
        """Existing checkpoints, oldest first."""
        found = [(int(m[1]), p) for p in self.folder.glob("step-*.pt") if (m := _NAME.fullmatch(p.name))]
        return [path for _, path in sorted(found)]

    def save(self, state: dict[str, Any], step: int) -> Path:
        """Write the state, then remove what is not to be kept.

        Raises:
            OSError: e.g. the disk is full; everything saved before is intact.
            CheckpointError: the state holds something that cannot be saved.
        """
        plain = to_plain(state)
        # Serialized in memory first: every failure to write is then an OSError and none can leave half a file behind.
        buffer = io.BytesIO()
        torch.save({"format": FORMAT, "digest": digest(plain), "state": plain}, buffer)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.path(step)
        atomic_write(path, buffer.getbuffer())
        self.last_valid = path
        for old in self.paths()[: -self.keep]:
            if old != path:
                with suppress(OSError):
                    old.unlink()
        return path

    def try_save(self, state: dict[str, Any], step: int, say: Callable[[str], None]) -> bool:
        """Save where that is possible: a full disk is reported once, and the next checkpoint is tried when it is due.

        Args:
            state: the whole state.
            step: finished steps.
            say: shows one line to the user.

        Returns:
            whether it was saved.

        Raises:
            CheckpointError: nothing can be written there from the start.
        """
        try:
            self.save(state, step)
        except OSError as error:
            if self.last_valid is None and step == 0:
                raise CheckpointError(f"Cannot write checkpoints to {self.folder}: {error.strerror}.") from error
            if not self._failing:
                last = self.last_valid
                kept = (
                    "there is none yet"
                    if last is None
                    else f"that of step {int(_NAME.fullmatch(last.name)[1])} is kept"
                )
                say(f"Checkpoint of step {step} not saved: {error.strerror}; {kept}; training goes on.")
            self._failing = True
            return False
        if self._failing:
            say(f"Checkpoints are saved again, from step {step} on.")
        self._failing = False
        return True

    def load(self) -> tuple[dict[str, Any], Path]:
        """The newest readable state and its file; damaged newer files are skipped with a warning.

        Raises:
            CheckpointError: there is none.
        """
        problems: list[str] = []
        for path in reversed(self.paths()):
            try:
                state = read_checkpoint(path)
            except CheckpointError as error:
                problems.append(str(error))
                continue
            if problems:
                warnings.warn(f"{problems[0]} Going back to {path.name}.", UserWarning, stacklevel=2)
            self.last_valid = path
            return state, path
        detail = f": {' '.join(problems)} Start a new run." if problems else "."
        raise CheckpointError(f"No {'readable ' if problems else ''}checkpoint in {self.folder}{detail}")

    def set_aside_after(self, path: Path) -> None:
        """Rename checkpoints newer than ``path`` (damaged ones) so that they never win again; drop leftovers."""
        for later in self.paths():
            if later.name > path.name:
                with suppress(OSError):
                    later.replace(later.with_name(later.name + ".damaged"))
        for leftover in self.folder.glob(".step-*.pt.tmp"):
            with suppress(OSError):
                leftover.unlink()


def load_latest(folder: str | Path) -> tuple[dict[str, Any], Path]:
    """The newest readable state below a checkpoint folder, for evaluation and export.

    Raises:
        CheckpointError: there is none.
    """
    return CheckpointStore(folder).load()
