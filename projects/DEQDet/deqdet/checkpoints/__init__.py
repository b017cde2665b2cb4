"""Reading and writing checkpoints, model files, and the conversion of other implementations' checkpoints."""

from .checkpointer import Checkpointer, CompleteCheckpointer, check_pickle, check_query
from .conversion import Conversion, convert, convert_file
from .files import CheckpointError
from .implied import Config, Shapes
from .kinds import KINDS, Kind, register_kind, under
from .model_file import (
    ModelFile,
    ModelHeader,
    is_model_file,
    load_model_config,
    read_entries,
    read_model_file,
    read_model_header,
    resolve_file,
    write_model_file,
)
from .publish import check_complete, publish_checkpoint

__all__ = [
    "KINDS",
    "CheckpointError",
    "Checkpointer",
    "CompleteCheckpointer",
    "Config",
    "Conversion",
    "Kind",
    "ModelFile",
    "ModelHeader",
    "Shapes",
    "check_pickle",
    "check_query",
    "check_complete",
    "convert",
    "convert_file",
    "is_model_file",
    "load_model_config",
    "publish_checkpoint",
    "read_entries",
    "read_model_file",
    "read_model_header",
    "register_kind",
    "resolve_file",
    "under",
    "write_model_file",
]
