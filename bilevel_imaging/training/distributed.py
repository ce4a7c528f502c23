"""Data-parallel training: the processes of a run share its images and see the same numbers.

What is shared out are the batches of images that are solved together, each of them whole: a process solves its batches
as one alone would, what came out of all of them is gathered in the order of the batches, and every process averages
that by itself. So the numbers of a run depend on its batches, not on how many processes there are.
"""

from __future__ import annotations

import heapq
import io
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from bilevel_imaging.data import ImagePairs, RandomPatches
from bilevel_imaging.errors import BilevelError

T = TypeVar("T")

# A process that ends is noticed at once. This is how long the others wait for one that is busy: the first one alone
# validates, evaluates and writes.
TIMEOUT = timedelta(days=7)
# The work of the busiest process, compared with what it would be if every image were a batch of its own: batches that
# were asked for may be so uneven, because one process gets the same numbers with them; chosen ones only the lesser.
UNEVEN, EVEN = 1.5, 1.1


class ProcessError(BilevelError, ValueError):
    """Another process of the run has failed; the message says which one and why."""


class Processes:
    """The processes of a run. This class is a process alone, which talks to nobody.

    All processes make the same calls in the same order; none of the functions they pass may make such a call itself.

    Attributes:
        rank: number of this process, 0 for the first one, which alone writes and prints.
        size: how many there are.
    """

    rank, size = 0, 1

    def gather(self, make: Callable[[], T]) -> list[T]:
        """What ``make`` returns in every process, in their order; tensors come on the device of this process.

        Raises:
            Exception: whatever ``make`` raised here.
            ProcessError: it failed in another process, or that process has ended.
        """
        return [make()]

    def collect(self, value: T) -> list[T]:
        """The values of all processes, for the first process; an empty list for the others.

        Raises:
            ProcessError: another process has ended.
        """
        return [value]

    def everywhere(self, action: Callable[[], T]) -> T:
        """Do it in every process; returns the result of this one. What fails in one of them fails in all."""
        results: list[T] = []
        self.gather(lambda: results.append(action()))
        return results[0]

    def first(self, action: Callable[[], T]) -> T:
        """Do it in the first process, whose result all of them get; what fails there fails in all."""
        results = self.gather(lambda: [action()] if self.rank == 0 else [])
        return results[0][0]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return any(self.gather(lambda: flag))

    def check_same(self, what: str, make: Callable[[], Any]) -> None:
        """Make sure that something is the same in all processes, e.g. by a digest of it.

        Raises:
            ProcessError: it is not.
        """
        if self.size == 1:
            return
        values = self.gather(make)
        others = [rank for rank, value in enumerate(values) if value != values[0]]
        if others:
            raise ProcessError(f"Expected the same {what} in all processes. Got others in process {others[0]}.")

    def share(self, loads: Sequence[float]) -> list[int]:
        """Positions of the pieces of work of this process, in their order: the largest go first, to who has least."""
        return shares(loads, self.size)[self.rank]


ALONE = Processes()


class TorchProcesses(Processes):
    """The processes of the default group of ``torch.distributed``; see :func:`joined`."""

    def __init__(self) -> None:
        self.rank, self.size = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def gather(self, make: Callable[[], T]) -> list[T]:
        content, failure = b"", None
        try:
            content = _packed(make())
        except Exception as error:  # the others must hear of any failure, or they would wait for ever
            failure = error
        problem = "" if failure is None else str(failure) or repr(failure)
        outcomes: list[Any] = [None] * self.size
        try:
            torch.distributed.all_gather_object(outcomes, (content, problem))
        except RuntimeError as error:
            raise failure or _ended(error) from error
        if failure is not None:
            raise failure
        for rank, (_, reason) in enumerate(outcomes):
            if reason:
                raise ProcessError(f"process {rank}: {reason}")
        return [_unpacked(value) for value, _ in outcomes]

    def collect(self, value: T) -> list[T]:
        contents: list[Any] | None = [None] * self.size if self.rank == 0 else None
        try:
            torch.distributed.gather_object(_packed(value), contents)
        except RuntimeError as error:
            raise _ended(error) from error
        return [_unpacked(content) for content in contents or []]


def _ended(error: RuntimeError) -> ProcessError:
    reason = str(error).strip().splitlines()[0]
    return ProcessError(f"another process of this run has ended; its last checkpoint is kept ({reason})")


class _Packer(pickle.Pickler):
    """Tensors as arrays: many small ones would cost milliseconds otherwise."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) is Tensor:
            return _tensor, (value.detach().cpu().numpy(), value.is_cuda)
        return NotImplemented


def _tensor(array: np.ndarray, on_gpu: bool) -> Tensor:
    """Those of another process's GPU come to that of this one."""
    tensor = torch.from_numpy(array)
    return tensor.cuda() if on_gpu else tensor


def _packed(value: Any) -> bytes:
    buffer = io.BytesIO()
    _Packer(buffer, pickle.HIGHEST_PROTOCOL).dump(value)
    return buffer.getvalue()


def _unpacked(content: bytes) -> Any:
    # written by a process of this very run: any object may be in it
    return pickle.loads(content)


def launched() -> tuple[int, int]:
    """Number of this process and of all processes, as ``torchrun`` tells them; (0, 1) without it."""
    rank, size = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    return (int(rank), int(size)) if rank and size else (0, 1)


@contextmanager
def joined(device: str = "auto") -> Iterator[Processes]:
    """The processes that ``torchrun`` started, for the time of the body; :data:`ALONE` without it.

    On GPUs every process takes one, and talks over NCCL; with fewer GPUs than processes they share them, and talk over
    gloo as on the CPU. At the end all processes wait for each other.

    Args:
        device: "cpu", or "auto" or "cuda" for GPUs where there are any.
    """
    if launched()[1] == 1:
        yield ALONE
        return
    gpus = 0 if device == "cpu" else torch.cuda.device_count()
    if gpus:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % gpus)
    own_gpu = 0 < int(os.environ.get("LOCAL_WORLD_SIZE", "1")) <= gpus
    torch.distributed.init_process_group("nccl" if own_gpu else "gloo", timeout=TIMEOUT)
    processes = TorchProcesses()
    yield processes
    # not after an error: the others are not here then
    processes.gather(lambda: None)
    torch.distributed.destroy_process_group()


def shares(loads: Sequence[float], size: int) -> list[list[int]]:
    """Share out pieces of work: positions for each of ``size`` processes, every list in order.

    The largest pieces go first, each to whoever has least; by this rule all processes find the same shares.
    """
    result: list[list[int]] = [[] for _ in range(size)]
    least = [(0.0, rank) for rank in range(size)]
    for position in sorted(range(len(loads)), key=lambda i: -loads[i]):
        load, rank = least[0]
        result[rank].append(position)
        heapq.heapreplace(least, (load + loads[position], rank))
    return [sorted(positions) for positions in result]


def batch_loads(pairs: ImagePairs, batch_size: int) -> list[int]:
    """Work of every batch of a pass over the pairs, in their order: its number of pixels."""
    return [sum(pairs.x[i].numel() for i in positions) for positions in pairs.order(batch_size)]


def shared_batch_size(
    data: ImagePairs | RandomPatches, minibatch: int | None, batch_size: int, processes: Processes, *, fixed: bool
) -> int:
    """The number of images solved together: as given, or smaller where processes would have too little to do.

    One process with batches of that size gets the same numbers.

    Args:
        data: the training images.
        minibatch: images of a step, ``None`` for all.
        batch_size: the given one.
        processes: that share the images.
        fixed: only check the given one, of a run that goes on.

    Raises:
        ValueError: there are more processes than images, or with ``fixed`` than batches.
    """
    if processes.size == 1:
        return batch_size

    def loads(size: int) -> list[int]:
        if isinstance(data, ImagePairs) and minibatch is None:
            return batch_loads(data, size)
        return [min(size, minibatch - start) for start in range(0, minibatch, size)]

    def most(size: int) -> int:
        work = loads(size)
        return max(sum(work[i] for i in positions) for positions in shares(work, processes.size))

    images, batches = len(loads(1)), len(loads(batch_size))
    what = "patches" if minibatch is None else "patches in upper.minibatch"
    if images < processes.size:
        raise ValueError(f"Expected at most {images} processes, the number of training {what}. Got {processes.size}.")
    if fixed and batches < processes.size:
        raise ValueError(
            f"Expected at most {batches} processes, the number of batches of this run (data.batch_size {batch_size}). "
            f"Got {processes.size}."
        )
    if fixed:
        return batch_size
    best, sizes = most(1), range(min(batch_size, images), 1, -1)
    if batches >= processes.size and most(batch_size) <= UNEVEN * best:
        return batch_size
    return next((b for b in sizes if len(loads(b)) >= processes.size and most(b) <= EVEN * best), 1)
