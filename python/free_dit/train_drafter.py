"""Public names of drafter training; the code is in :mod:`free_dit.training.train_drafter`."""

from free_dit.training.drafter_config import DrafterTrainConfig
from free_dit.training.drafter_loss import DrafterLoss
from free_dit.training.train_drafter import calibrate, train_drafter

__all__ = ["DrafterLoss", "DrafterTrainConfig", "calibrate", "train_drafter"]
