"""A forward's tensors, put back in their modules while its backward runs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_LOCK = threading.RLock()


class Replay(nn.Module):
    """Remembers the tensors that modules hold now, and runs work as if they held them still.

    Modules may hold others when a backward runs: ``torch.func.functional_call`` takes its own out again after the
    forward, ``physics.update`` brings in those of the next batch, ``requires_grad_`` says what is learned. Where
    nothing differs the modules are left alone; else one thread at a time has its tensors in them.

    Args:
        *modules: whose parameters and buffers are meant.
    """

    def __init__(self, *modules: nn.Module):
        super().__init__()
        self.parts = nn.ModuleList(modules)
        self._parameters_then, self._buffers_then = dict(self.named_parameters()), dict(self.named_buffers())
        self._state_then = self._state()

    def _state(self) -> dict[str, tuple[int, bool]]:
        """Which tensors are there, and whether they are learned."""
        held = (*self.named_parameters(), *self.named_buffers())
        return {name: (id(t), t.requires_grad) for name, t in held}

    def run(self, work: Callable[[], Any]) -> Any:
        """What ``work()`` returns with the tensors that were there at the start."""
        if self._state() == self._state_then:
            return work()
        # a tensor of a functional call becomes a parameter, as those whose place it takes
        parameters = {
            name: nn.Parameter(p.detach(), requires_grad=self._state_then[name][1])
            for name, p in self._parameters_then.items()
        }
        with _LOCK:
            return torch.func.functional_call(self, parameters | self._buffers_then, (work,))

    def forward(self, work: Callable[[], Any]) -> Any:
        return work()
