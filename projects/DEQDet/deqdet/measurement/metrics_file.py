"""The metrics.json of a training: one JSON object in each line."""

import json
import logging
from pathlib import Path

from ..errors import UserError, one_line

logger = logging.getLogger(__name__)


def read_lines(path: str | Path) -> list[dict]:
    """The lines of a metrics.json, in the order of their iterations; a training's line comes before an evaluation's.

    The file is appended to: where a later training or a resumed one goes over the same iterations, its lines count. A
    line that is damaged, as a kill leaves the last one, is left out with a warning.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        texts = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({one_line(error)}): give the OUTPUT_DIR of a run") from error
    # By iteration, and whether the line is an evaluation's own. It may stand after a line of a later iteration.
    lines: dict[tuple[int, bool], dict] = {}
    trained = -1  # the last iteration that a training's line has told of
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
            iteration, evaluated = int(line["iteration"]), "total_loss" not in line
        except (ValueError, TypeError, KeyError):
            logger.warning("%s, line %d, is damaged and is left out", path, number)
            continue
        if not evaluated:
            if iteration <= trained:  # another training begins here
                lines = {key: known for key, known in lines.items() if key[0] < iteration}
            trained = iteration
        lines[iteration, evaluated] = line
    return [lines[key] for key in sorted(lines)]
