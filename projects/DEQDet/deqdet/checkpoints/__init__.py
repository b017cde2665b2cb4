"""Checkpoints of other implementations, made into ours: `convert_file` reads, renames, checks and writes."""

from .checkpointer import Checkpointer, CompleteCheckpointer
from .conversion import Conversion, convert, convert_file
from .kinds import KINDS
from .reading import ConversionError

__all__ = ["KINDS", "Checkpointer", "CompleteCheckpointer", "Conversion", "ConversionError", "convert", "convert_file"]
