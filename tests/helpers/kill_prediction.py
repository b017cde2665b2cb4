"""A plugin that kills its process, without any chance to tidy up, while deqdet-predict writes down its n-th group.

KILL_PREDICTION is n. Half of what was to be written is in the file, as a kill may leave it.
"""

import os
import signal

from deqdet.predictions import Journal

_calls = [0]
_write = Journal._write


def _write_half(self: Journal, content: bytes) -> None:
    _calls[0] += 1
    if _calls[0] == int(os.environ.get("KILL_PREDICTION", "0")):
        _write(self, content[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    _write(self, content)


Journal._write = _write_half
