"""Time to a hypergradient of known error: ours and other libraries on the same workloads in one run.

Every method is tried at settings from loose to tight; what counts is the CPU time of its fastest setting whose true
error is below a level. Truth is our hypergradient in float64, certified.
"""

from __future__ import annotations

from bilevel_imaging.experiments.benchmark.comparison import LEVELS, run
from bilevel_imaging.experiments.benchmark.peers import ADAPTERS
from bilevel_imaging.experiments.benchmark.report import table
from bilevel_imaging.experiments.benchmark.workloads import WORKLOADS

__all__ = ["ADAPTERS", "LEVELS", "WORKLOADS", "run", "table"]
