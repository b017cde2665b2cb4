"""Read the metrics.json of a training run, which has one JSON object per line."""

import json
import logging
from pathlib import Path

from ..errors import UserError, one_line

logger = logging.getLogger(__name__)


def read_lines(path: str | Path) -> list[dict]:
    """Read the lines of a metrics.json, sorted by iteration, the training line before the evaluation line.

    Training appends to the file. If a later or a resumed run repeats iterations, its lines replace the earlier ones. A
    damaged line, such as the last one after a kill, is left out with a warning.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        texts = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({one_line(error)}): give the OUTPUT_DIR of a run") from error
    # By iteration and whether it is an evaluation line, which may follow the training line of a later iteration.
    lines: dict[tuple[int, bool], dict] = {}
    trained = -1  # the iteration of the last training line
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
            iteration, evaluated = int(line["iteration"]), "total_loss" not in line
        except (ValueError, TypeError, KeyError):
            logger.warning("%s, line %d, is damaged and is left out", path, number)
            continue
        if not evaluated:
            if iteration <= trained:  # another run starts here
                lines = {key: known for key, known in lines.items() if key[0] < iteration}
            trained = iteration
        lines[iteration, evaluated] = line
    return [lines[key] for key in sorted(lines)]
