"""Training and evaluation: the set-up of a run, and detectron2's DefaultTrainer with the paper's optimizer."""

from ..errors import UserError
from .arguments import add_config_arguments, add_plugin_argument, exit_on_user_error, parse_arguments
from .cluster import check_alone
from .configuration import adapt_device, check_run, check_training_sets, load_config, setup
from .launcher import argument_parser, run
from .models import build_model
from .options import check_options, check_processes
from .trainer import Trainer, load_weights

__all__ = [
    "Trainer",
    "UserError",
    "adapt_device",
    "add_config_arguments",
    "add_plugin_argument",
    "argument_parser",
    "build_model",
    "check_alone",
    "check_options",
    "check_processes",
    "check_run",
    "check_training_sets",
    "exit_on_user_error",
    "load_config",
    "load_weights",
    "parse_arguments",
    "run",
    "setup",
]
