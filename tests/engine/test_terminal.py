"""The longest messages are whole in the log file alone."""

import logging

from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from deqdet.engine.terminal import LONGEST, shorten_listings


def test_a_long_message_is_one_line(tmp_path, capsys, loggers):
    """Detectron2's set-up, which follows, adds no second handler that would print it whole."""
    shorten_listings(str(tmp_path))
    log = setup_logger(str(tmp_path), distributed_rank=comm.get_rank())  # as default_setup calls it
    listing, table = (["Model:", *(f"row {i}" for i in range(count))] for count in (LONGEST, LONGEST - 1))
    log.info("\n".join(listing))
    logging.getLogger("detectron2.engine").info("\n".join(table))
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].endswith(f"Model: {LONGEST} lines, in {tmp_path}/log.txt")
    assert printed[1].endswith("d2.engine]: \x1b[0mModel:") or printed[1].endswith("d2.engine]: Model:")
    assert printed[2:] == table[1:]
    file = (tmp_path / "log.txt").read_text()
    assert "\n".join(listing) in file and "\n".join(table) in file
