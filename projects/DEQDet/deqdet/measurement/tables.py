"""Tables in markdown."""

from collections.abc import Sequence


def format_table(rows: Sequence[Sequence[str]], *, names: int) -> str:
    """Make a table whose first row is its head. The first `names` columns hold names, the others numbers."""
    head, *body = rows
    rule = ["---"] * names + ["---:"] * (len(head) - names)
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *body])


def format_value(value: float | None, form: str, unit: float = 1) -> str:
    """A number in the given unit and format, or a dash where there is none."""
    return "-" if value is None else format(value / unit, form)
