"""Training and evaluation: detectron2's DefaultTrainer with the paper's optimizer, and a run's set-up."""

from ..errors import UserError
from .configuration import load_config, setup
from .launcher import argument_parser, run
from .models import build_model
from .trainer import Trainer, load_weights

__all__ = ["Trainer", "UserError", "argument_parser", "build_model", "load_config", "load_weights", "run", "setup"]
