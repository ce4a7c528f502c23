"""A switch for fused kernels: the same formulas through ``torch.compile`` where a loop of small operations is the cost.

Off by default: compiling takes seconds to minutes once per kernel and dtype, which pays in long runs on large batches.
Meant for CUDA: on the CPU the package's own kernels (``bilevel_imaging.native``) come first where they can be built.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch

_enabled = False
_broken: set[str] = set()


def compile_kernels(enabled: bool = True) -> None:
    """Use compiled kernels from now on in this process, or stop using them.

    Where no compiler is found, or compiling fails, the eager formula goes on being used and a warning says so once.
    What ``bilevel_imaging.native`` computes stays with it.
    """
    global _enabled
    _enabled = enabled


def fusable(fused: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator of an eager kernel: ``fused`` computes the same in a form made for the compiler.

    The eager form is used while kernels are off or gradients are recorded.
    """

    def decorate(eager: Callable[..., Any]) -> Callable[..., Any]:
        name = eager.__qualname__

        @functools.cache
        def compiled() -> Callable[..., Any]:
            return torch.compile(fused)

        @functools.wraps(eager)
        def call(*arguments: Any) -> Any:
            if not _enabled or name in _broken or torch.is_grad_enabled():
                return eager(*arguments)
            try:
                return compiled()(*arguments)
            except Exception as error:  # no compiler, unsupported device: every backend fails in its own way
                _broken.add(name)
                warnings.warn(f"{name} is not compiled: {str(error).splitlines()[0]}", RuntimeWarning, stacklevel=2)
                return eager(*arguments)

        return call

    return decorate
