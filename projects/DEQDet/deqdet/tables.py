"""Tables in markdown."""

from collections.abc import Sequence


def format_table(rows: Sequence[Sequence[str]], *, names: int) -> str:
    """The first row is the head; all columns but the first `names` are numbers."""
    head, *body = rows
    rule = ["---"] * names + ["---:"] * (len(head) - names)
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *body])


def format_value(value: float | None, form: str) -> str:
    """A dash for None."""
    return "-" if value is None else format(value, form)
