"""Other libraries on the workloads, one file each; an adapter imports its library only when called.

An adapter has ``NAME``, ``PACKAGE`` (what pip installs) and ``ladders(task)``. Where a library has no minimizer of its
own, it gets accelerated gradient steps with our proved Lipschitz constant, and gradients written by hand where that is
faster.
"""

from __future__ import annotations

from types import ModuleType

from bilevel_imaging.experiments.benchmark.peers import (
    deepinv,
    hypertorch,
    jaxopt,
    scipy,
    torchdeq,
    torchopt,
    unrolled,
)

__all__ = ["ADAPTERS"]

ADAPTERS: dict[str, ModuleType] = {
    "jaxopt": jaxopt,
    "torchopt": torchopt,
    "hypertorch": hypertorch,
    "torchdeq": torchdeq,
    "deepinv": deepinv,
    "scipy": scipy,
    "unrolled": unrolled,
}
"""By the name on the command line, in the order of the table."""
