"""Methods that change theta, from values and hypergradients of known accuracy."""

from collections.abc import Callable
from functools import partial

from bilevel_imaging.upper_level.accuracy_schedules import Decay, DecayingTolerances
from bilevel_imaging.upper_level.base import (
    CertifiedValue,
    CurvedObjective,
    Objective,
    SampledObjective,
    Samples,
    StepReport,
    UpperLevelMethod,
)
from bilevel_imaging.upper_level.conditions import (
    AbsoluteError,
    AccuracyCondition,
    RelativeError,
    SummableTolerances,
    descent_direction_certified,
    gradient_norm_interval,
)
from bilevel_imaging.upper_level.derivative_free import DFOLS
from bilevel_imaging.upper_level.first_order import FirstOrder
from bilevel_imaging.upper_level.fsla import SingleLoop
from bilevel_imaging.upper_level.grid import GridSearch
from bilevel_imaging.upper_level.hoag import HOAG
from bilevel_imaging.upper_level.inexact_sgd import InexactFirstOrder
from bilevel_imaging.upper_level.kunisch_pock import KunischPock
from bilevel_imaging.upper_level.line_search import NoisyLineSearch
from bilevel_imaging.upper_level.losses import LOSSES, SquaredError
from bilevel_imaging.upper_level.maid import MAID
from bilevel_imaging.upper_level.objective import ProblemObjective
from bilevel_imaging.upper_level.paper_maid import PaperMAID
from bilevel_imaging.upper_level.penalties import SamplingPenalty
from bilevel_imaging.upper_level.trust_region import NoisyTrustRegion
from bilevel_imaging.upper_level.vrbo import MRBO, VRBO

UPPER_LEVEL_METHODS: dict[str, Callable[..., UpperLevelMethod]] = {
    "maid": MAID,
    "maid_paper": PaperMAID,
    "hoag": HOAG,
    "noisy_line_search": NoisyLineSearch,
    "noisy_trust_region": NoisyTrustRegion,
    "kunisch_pock": KunischPock,
    "dfo_ls": DFOLS,
    "grid": GridSearch,
    "adam": partial(FirstOrder, "Adam"),
    "adamw": partial(FirstOrder, "AdamW"),
    "sgd": partial(FirstOrder, "SGD"),
    "rmsprop": partial(FirstOrder, "RMSprop"),
    "inexact_sgd": partial(InexactFirstOrder, "SGD"),
    "inexact_adam": partial(InexactFirstOrder, "Adam"),
    "fsla": SingleLoop,
    "mrbo": MRBO,
    "vrbo": VRBO,
}
# these keep a point and an adjoint of every image from step to step, which random patches do not have
FOLLOWING_METHODS = ("fsla", "mrbo", "vrbo")
# these compare losses of all images, which minibatches do not have
ALL_IMAGES_METHODS = (
    "maid",
    "maid_paper",
    "hoag",
    "noisy_line_search",
    "noisy_trust_region",
    "kunisch_pock",
    "dfo_ls",
    "grid",
)

__all__ = [
    "ALL_IMAGES_METHODS",
    "CurvedObjective",
    "DFOLS",
    "FOLLOWING_METHODS",
    "HOAG",
    "LOSSES",
    "MAID",
    "MRBO",
    "UPPER_LEVEL_METHODS",
    "VRBO",
    "AbsoluteError",
    "AccuracyCondition",
    "CertifiedValue",
    "Decay",
    "DecayingTolerances",
    "FirstOrder",
    "GridSearch",
    "InexactFirstOrder",
    "KunischPock",
    "NoisyLineSearch",
    "NoisyTrustRegion",
    "Objective",
    "PaperMAID",
    "ProblemObjective",
    "RelativeError",
    "SampledObjective",
    "Samples",
    "SamplingPenalty",
    "SingleLoop",
    "SquaredError",
    "StepReport",
    "SummableTolerances",
    "UpperLevelMethod",
    "descent_direction_certified",
    "gradient_norm_interval",
]
