"""Time of a whole training run: until the true loss is within 1 % of the best that any method found.

Ours is MAID with its defaults. Other libraries compute hypergradients their way, at several settings, and Adam or
L-BFGS moves theta; the fastest of all settings counts, and what finding it took does not.
"""

from __future__ import annotations

from bilevel_imaging.experiments.benchmark.training.race import WITHIN, run
from bilevel_imaging.experiments.benchmark.training.report import figure, table
from bilevel_imaging.experiments.benchmark.training.routes import ROUTES
from bilevel_imaging.experiments.benchmark.training.runs import TRAININGS

__all__ = ["ROUTES", "TRAININGS", "WITHIN", "figure", "run", "table"]
