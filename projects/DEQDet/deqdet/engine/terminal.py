"""Keeps the terminal readable: the longest of Detectron2's listings go to log.txt alone."""

import logging
import sys
from pathlib import Path

from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

LONGEST = 100  # lines of a message on the terminal: the config and the model have more, tables of results have fewer


class _Shortened(logging.Formatter):
    """A formatter that reduces a long text of another one to its first line, with a note."""

    def __init__(self, whole: logging.Formatter, file: Path):
        super().__init__()
        self._whole, self._file = whole, file

    def format(self, record: logging.LogRecord) -> str:
        first, *rest = self._whole.format(record).split("\n")
        return "\n".join([first, *rest]) if len(rest) < LONGEST else f"{first} {len(rest)} lines, in {self._file}"


def shorten_listings(output: str) -> None:
    """Let detectron2's logger print no message of more than LONGEST lines; its file keeps them whole.

    Call it before `default_setup`, which logs the config.

    Args:
        output: the run's OUTPUT_DIR.
    """
    log = setup_logger(output, distributed_rank=comm.get_rank())  # default_setup calls it too, and gets the same logger
    for handler in log.handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stdout:
            handler.setFormatter(_Shortened(handler.formatter, Path(output, "log.txt")))
