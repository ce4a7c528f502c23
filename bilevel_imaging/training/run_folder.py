"""Run folders: a new one is nobody else's, and one process at a time writes into it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

RUNS_FOLDER = Path("runs")
LOCK_FILE = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[Path]:
    """The folder for the time of the body, in which nobody else gets it: two runs in it would mix their files.

    The operating system lets go of the lock when the process ends, however it ends. Where it has no such locks, as some
    network file systems, there is no protection.

    Raises:
        ValueError: another process has it.
        OSError: the folder is missing or not writable.
    """
    descriptor = _lock(folder)
    try:
        yield folder
    finally:
        with suppress(OSError):
            (folder / LOCK_FILE).unlink()  # while it is still held: so nobody removes the lock of another
        os.close(descriptor)


def _lock(folder: Path) -> int:
    path = folder / LOCK_FILE
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise ValueError(f"{folder}: another process is working in it. Wait for its end or stop it.") from error
        except OSError:
            return descriptor  # no locks on this file system
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        os.close(descriptor)  # whoever had it has just removed it


@contextmanager
def new_folder(output: str | None, name: str, files: Sequence[str], taken: str) -> Iterator[Path]:
    """The folder asked for, or the first free one in runs/, for the time of the body locked for all others.

    One that is still empty after an error is removed: a mistake in the settings leaves nothing behind.

    Args:
        output: what the user asked for.
        name: of a folder in runs/.
        files: a folder that holds one of them is not overwritten.
        taken: what to say then; ``{output}`` stands for the folder.

    Raises:
        ValueError: the folder cannot be used.
    """
    folder = _numbered(name) if output is None else Path(output).expanduser()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output {output}: is a file. Give a folder.")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with locked(folder):
            # only now: another run may have begun since the folder was made
            if any((folder / file).exists() for file in files):
                raise ValueError(f"--output {output}: {taken.format(output=output)}")
            yield folder
    except BaseException:
        with suppress(OSError):
            folder.rmdir()  # refuses unless it is empty
        raise


def _numbered(name: str) -> Path:
    """The first free folder in runs/, made at once so that no other run takes it."""
    for number in range(1, 10_000):
        folder = RUNS_FOLDER / (name if number == 1 else f"{name}-{number}")
        with suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder
    raise ValueError(f"{RUNS_FOLDER}: too many runs named {name}. Give --output.")
