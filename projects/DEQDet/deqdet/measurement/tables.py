"""Markdown tables."""

from collections.abc import Sequence


def format_table(rows: Sequence[Sequence[str]], *, names: int) -> str:
    """Format rows as a table; the first row is the header. The first `names` columns hold names, the others numbers."""
    head, *body = rows
    rule = ["---"] * names + ["---:"] * (len(head) - names)
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *body])


def format_value(value: float | None, form: str, unit: float = 1) -> str:
    """Format a number in the given unit, or a dash for None."""
    return "-" if value is None else format(value / unit, form)
