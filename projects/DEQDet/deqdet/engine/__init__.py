"""Training and evaluation: detectron2's DefaultTrainer with the paper's optimizer, and a run's set-up."""

from .configuration import UserError, load_config, setup
from .launcher import argument_parser, run
from .trainer import Trainer, load_weights

__all__ = ["Trainer", "UserError", "argument_parser", "load_config", "load_weights", "run", "setup"]
