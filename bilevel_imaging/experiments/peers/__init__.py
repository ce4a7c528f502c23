"""Hypergradients as other libraries compute them, one file each; an adapter imports its library only when called.

An adapter has ``NAME``, ``PACKAGE`` (what pip installs), and ``methods(task)``: the settings that are compared, in
words, with functions that return the hypergradient as floats. The libraries are the optional extra
``pip install "bilevel-imaging[peers]"``. Not in it: hypertorch, whose name on PyPI belongs to an unrelated package;
its two recursions are written out here after the paper.
"""

from __future__ import annotations

from bilevel_imaging.experiments.peers import deepinv, hypertorch, jaxopt, torchdeq, torchopt, unrolled
from bilevel_imaging.experiments.peers.task import Task

__all__ = ["ADAPTERS", "Task"]

ADAPTERS = (unrolled, jaxopt, torchopt, hypertorch, torchdeq, deepinv)
"""In the order of the table."""
