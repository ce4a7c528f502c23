"""Training: the loop that runs an upper-level method, and everything it writes into its run folder."""

from bilevel_imaging.training.checkpoints import CheckpointStore, load_latest, read_checkpoint
from bilevel_imaging.training.figures import reconstruction_figure, save_figure, training_figure
from bilevel_imaging.training.metrics_log import MetricsLog, read_metrics
from bilevel_imaging.training.objective import BilevelObjective
from bilevel_imaging.training.progress import Progress
from bilevel_imaging.training.random_objective import RandomPatchObjective
from bilevel_imaging.training.result import TrainingResult
from bilevel_imaging.training.state import TrainableObjective
from bilevel_imaging.training.tensorboard import TensorBoardLogger
from bilevel_imaging.training.trainer import Trainer

__all__ = [
    "BilevelObjective",
    "CheckpointStore",
    "MetricsLog",
    "Progress",
    "RandomPatchObjective",
    "TensorBoardLogger",
    "TrainableObjective",
    "Trainer",
    "TrainingResult",
    "load_latest",
    "read_checkpoint",
    "read_metrics",
    "reconstruction_figure",
    "save_figure",
    "training_figure",
]
