"""Training: the run, the loop over updates, the state and what an update does to it."""

from diladiff_jax.training.anomalies import TrainingError
from diladiff_jax.training.optimizer import make_optimizer
from diladiff_jax.training.run import train
from diladiff_jax.training.state import TrainState, init_state, make_train_step

__all__ = [
    "TrainState",
    "TrainingError",
    "init_state",
    "make_optimizer",
    "make_train_step",
    "train",
]
